"""`fastops profile script.py [args]` and `fastops profile --model pkg.mod:factory --input 64x3x224x224`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from fastops.profiling import profile

EXAMPLES = """examples:
  fastops profile train.py --epochs 1
  fastops profile --steps 10 --html report.html train.py
  fastops profile -m models.train lstm --epochs 1
  fastops profile --model models.alexnet:AlexNet --input 64x3x224x224 --train --apply
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `fastops profile`. Those of the script come after its name and are its own."""
    parser.epilog = EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", metavar="PKG.MOD:FACTORY", help="profile what this returns, on random input")
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="SHAPE[:DTYPE]",
        help="one input of --model, e.g. 64x3x224x224 or 8x128:int64; repeat for several",
    )
    parser.add_argument("--train", action="store_true", help="with --model: forward, backward and an SGD step")
    parser.add_argument("--steps", type=int, default=5, help="steps to record (default 5)")
    parser.add_argument("--warmup", type=int, default=3, help="steps to run before (default 3)")
    parser.add_argument("--top", type=int, default=15, metavar="N", help="rows to show (default 15)")
    parser.add_argument("--html", metavar="FILE", help="write one offline HTML report")
    parser.add_argument("--json", metavar="FILE", help="write all figures")
    parser.add_argument("--trace", metavar="FILE", help="write the trace for Perfetto (.json or .json.gz)")
    parser.add_argument(
        "--apply", action="store_true", help="run fastops.accelerate and measure the step before and after, in pairs"
    )
    parser.add_argument(
        "--backend", choices=("torch", "proton"), default="torch", help="proton: Triton's profiler, its own viewer"
    )
    parser.add_argument(
        "-m",
        dest="module",
        nargs=argparse.REMAINDER,
        metavar="PKG.MOD",
        help="a module as python -m runs it, and its arguments",
    )
    parser.add_argument("script", nargs="?", help="a Python script, run unchanged")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")


def run(options: argparse.Namespace) -> int:
    """Profile, print the screen, write the files; the script's exit code, or 2 for a request that makes no sense."""
    from fastops.profiling.script import BadRequest

    try:
        return _run(options)
    except BadRequest as error:
        print(f"fastops profile: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    from fastops.profiling import profile, script

    if options.module is not None:
        if not options.module:
            raise script.BadRequest("-m needs the name of a module, e.g. -m models.train")
        # argparse ends what -m takes at a bare --
        rest = ["--", options.script, *options.arguments] if options.script else []
        options.script, options.arguments = options.module[0], [*options.module[1:], *rest]
    if bool(options.model) == bool(options.script):
        raise script.BadRequest("give either a script or --model, see --help")
    if options.script and (options.input or options.train):
        raise script.BadRequest("--input and --train belong to --model; a script brings its own data and loop")
    if options.model and not options.input:
        raise script.BadRequest("--model needs at least one --input, e.g. --input 64x3x224x224")
    written: dict[Path, str] = {}
    for name in ("html", "json", "trace"):
        path = getattr(options, name)
        if path:
            _check_writable(name, Path(path).resolve())
            other = written.setdefault(Path(path).resolve(), name)
            if other != name:
                raise script.BadRequest(f"--{other} and --{name} would write the same file, {path}")
    if options.top < 1:
        raise script.BadRequest(f"--top must be >= 1, got {options.top}")
    if options.steps < 1 or options.warmup < 0:
        raise script.BadRequest(f"--steps must be >= 1 and --warmup >= 0, got {options.steps} and {options.warmup}")
    if options.backend == "proton":
        from fastops.profiling.proton import run_proton

        return run_proton(options)

    if options.script:
        profiler = profile(warmup=options.warmup, steps=options.steps, script=True)
        rounds = 10 if options.apply else 0
        as_module = options.module is not None
        code = script.run_script(options.script, options.arguments, profiler, rounds, as_module)
    else:
        code = 0
        model, step = script.model_step(options.model, options.input, options.train)
        profiler = profile(model, warmup=options.warmup, steps=options.steps)
        try:
            with profiler:
                for _ in range(options.warmup + options.steps + 3):
                    step()
        except KeyboardInterrupt:
            code = 130
            print(script.INTERRUPTED, file=sys.stderr)
        if options.apply and not code:
            try:
                _apply(profiler, model, step)
            except KeyboardInterrupt:  # the profile is complete, only the comparison is not
                code = 130
                profiler.recorder.notes.append("--apply: interrupted before the step was measured before and after")
                print("interrupted; the report has the profile, without --apply", file=sys.stderr)
    try:
        return _report(profiler, options, code)
    finally:
        profiler.recorder.discard()


def _check_writable(name: str, path: Path) -> None:
    """Before anything runs: a long run is not to end with a report that cannot be written."""
    from fastops.profiling.script import BadRequest

    if not path.parent.is_dir():
        raise BadRequest(f"--{name}: no folder {path.parent}")
    if path.name == "-":
        raise BadRequest(f"--{name} writes a file, the terminal has the report; give it a name")
    if path.is_dir():
        raise BadRequest(f"--{name}: {path} is a folder")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise BadRequest(f"--{name}: {path} cannot be written")


def _apply(profiler: profile, model: torch.nn.Module, step: Callable[[], object]) -> None:
    from fastops.profiling import script
    from fastops.profiling.paired import compare

    if not script.would_change([model]):
        profiler.recorder.notes.append(script.NOTHING_TO_APPLY)
        return
    try:
        profiler.applied = compare(step, script.Switch([model]))
    except (RuntimeError, ValueError) as error:  # FASTOPS_IMPL may name what cannot run here; the profile stands
        profiler.recorder.notes.append(f"--apply: the accelerated step failed: {type(error).__name__}: {error}")


def _report(profiler: profile, options: argparse.Namespace, code: int) -> int:
    try:
        profiler.advice()
    except RuntimeError as error:
        print(f"fastops profile: {error}", file=sys.stderr)
        return code or 1
    written = []  # before the screen, which may break off
    for name in ("html", "json", "trace"):
        path = getattr(options, name)
        if path:
            try:
                getattr(profiler, name)(path)
            except OSError as error:
                print(f"fastops profile: --{name}: {error}", file=sys.stderr)
                code = code or 1
            else:
                written.append(f"{name}: {path}")
    profiler.show(top=options.top)
    print("".join(f"{line}\n" for line in written), end="")
    return code
