"""`python -m bench`: measure, compare, report. `run` is what no command means."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from fastops.__main__ import until_cut_off

COMMANDS = {
    "run": ("bench.cli.run", "measure a suite (the default command)"),
    "compare": ("bench.cli.compare", "gate on what changed between two result files, or within one"),
    "report": ("bench.cli.report", "turn a result file into an offline HTML page, figures, Markdown"),
    "ceilings": ("bench.cli.ceilings", "what this GPU can really do: products per dtype, copy"),
    "env": ("bench.cli.env", "the machine and versions that results are recorded with"),
    "list": ("bench.cli.list", "cases, suites and arms"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or (arguments[0] not in COMMANDS and arguments[0] not in ("-h", "--help")):
        arguments.insert(0, "run")
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="The benchmark of fastops. Exit codes: 0 ok, 1 regression, 2 cannot be done or compared, "
        "3 an arm is wrong or impossibly fast, 4 the CUDA context was lost (go on with --resume), 130 interrupted.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    for name, (path, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == arguments[0]:
            module = importlib.import_module(path)
            module.add_arguments(command)
    parsed = parser.parse_args(arguments)
    try:
        return until_cut_off(lambda: module.run(parsed))
    except KeyboardInterrupt:
        print("interrupted; what was measured is on disk", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
