"""Command line: `fastops env | inspect | profile`, the same as `python -m fastops`."""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence

# command -> module with `add_arguments(parser)` and `run(arguments) -> exit code`; imported only when asked for
COMMANDS = {
    "env": ("fastops._env_cli", "versions, GPUs, and which engine each op would run and why"),
    "inspect": ("fastops.inspection.cli", "what a Triton kernel needs on a GPU that need not be here"),
    "profile": ("fastops.profiling.cli", "where the GPU time of a model goes, and what to do about it"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, run one command, return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="fastops", description="Triton kernels for PyTorch, with their tools.")
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    chosen = next((argument for argument in arguments if argument in COMMANDS), None)
    module = None
    for name, (path, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == chosen:
            module = importlib.import_module(path)
            module.add_arguments(command)
    parsed = parser.parse_args(arguments)
    assert module is not None
    return until_cut_off(lambda: module.run(parsed))


def until_cut_off(command: Callable[[], int]) -> int:
    """Run a command; its exit code, and 0 where whoever read its output has seen enough, as `head` has."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without a letter shows "?", and no traceback
    try:
        code = int(command())
        sys.stdout.flush()  # now, and not when Python ends and nobody can answer for it
        return code
    except (BrokenPipeError, SystemExit) as stop:
        # rich leaves with SystemExit(1) where a pipe breaks, which here would mean a failure
        if not isinstance(stop, BrokenPipeError) and not isinstance(stop.__context__, BrokenPipeError):
            raise
        _to_nowhere()
        return 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _to_nowhere()
        print(f"the output could not be written: {error.strerror}", file=sys.stderr)
        return 1


def _to_nowhere() -> None:
    """What is still in the buffer of stdout goes nowhere, and no error comes of it when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _version() -> str:
    import fastops

    return f"fastops {fastops.__version__}"


if __name__ == "__main__":
    sys.exit(main())
