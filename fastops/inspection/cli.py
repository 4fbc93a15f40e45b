"""`fastops inspect`: see docs/inspect.md."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from fastops.inspection import catalog, render, shapes, snapshot
from fastops.inspection.api import inspect_cases, inspect_each
from fastops.inspection.assess import Assessment
from fastops.inspection.compile import InspectionError, triton_version
from fastops.inspection.gpus import Target, find_target
from fastops.kernels._static import StaticCase

EXAMPLES = """
examples:
  fastops inspect                                     every kernel the library ships, in its main configurations
  fastops inspect --all --target sm_90                all configurations
  fastops inspect attention --target "RTX 3090"       does it fit that card, and why not
  fastops inspect attention --shape 4,16,4096,256 --target "RTX 3090"    what it launches there for that shape
  fastops inspect conv2d --target sm_90 --sass        the machine code
  fastops inspect my.py:add_kernel --signature "*fp16,*fp16,i32" --constexpr BLOCK=1024 --target H100,sm_120
  fastops inspect --check tests/static                exit code 1 where a kernel got worse, naming each figure

Kernels are compiled, never run; no GPU is needed. Exit codes: 0 fine, 1 a regression, 2 bad input or a kernel that
does not compile, 130 interrupted.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `fastops inspect`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    add = parser.add_argument
    add("kernels", nargs="*", metavar="KERNEL", help="part of a name, a pattern with *, or file.py:kernel of your own")
    add("-t", "--target", metavar="LIST", help='e.g. sm_80,sm_90 or "RTX 3090,H100"; default: all it is launched on')
    add("--dtype", help="only kernels on this element type, e.g. fp16")
    add("--shape", metavar="SHAPE", help='what an op would launch for this shape, e.g. "B=4,H=16,S=4096,D=256"')
    add("--all", action="store_true", help="where no KERNEL is named: all configurations, not only the main ones")
    add("--list", action="store_true", help="name all configurations and compile nothing")
    own = parser.add_argument_group("a kernel of your own")
    own.add_argument("--signature", metavar="TYPES", help='of the arguments that are not constexpr: "*fp16,i32:16"')
    own.add_argument("--constexpr", action="append", default=[], metavar="NAME=VALUE", help="may be repeated")
    own.add_argument("--num-warps", type=_positive, metavar="N", help="warps of a program; default: 4, or autotune's")
    own.add_argument("--num-stages", type=_positive, metavar="N", help="of the pipeline; default: 3, or autotune's")
    own.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="compile option: num_ctas=2")
    own.add_argument("--grid", type=_positive, metavar="N", help="programs launched, for waves")
    own.add_argument("--flops", type=_amount, metavar="N", help="operations of the launch, for the roofline floor")
    own.add_argument("--bytes", type=_amount, metavar="N", help="least bytes the launch moves, likewise")
    output = parser.add_argument_group("output")
    output.add_argument("--sass", action="store_true", help="print the machine code")
    output.add_argument("--ptx", action="store_true", help="print the PTX")
    output.add_argument("--json", metavar="FILE", help="write everything as JSON; - for the terminal")
    output.add_argument("--markdown", metavar="FILE", help="write the table as Markdown; - for the terminal")
    output.add_argument("--explain", action="store_true", help="say what each column means")
    output.add_argument("--jobs", type=_positive, metavar="N", help="compiling processes; default: one a core")
    gate = parser.add_argument_group("the static gate")
    gate.add_argument("--check", metavar="SNAPSHOT", help="compare with a snapshot: a file, or a folder of them")
    gate.add_argument("--update", metavar="SNAPSHOT", help="write the snapshot, after saying what changes in it")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


def _amount(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return number


def run(arguments: argparse.Namespace) -> int:
    """Run the command; the exit code."""
    try:
        return _run(arguments)
    except BrokenPipeError:  # an OSError, and no fault of the command's
        raise
    except (InspectionError, ValueError, OSError) as error:
        print(f"fastops inspect: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastops inspect: interrupted", file=sys.stderr)
        return 130


def _run(arguments: argparse.Namespace) -> int:
    if arguments.explain:
        for heading, _, explanation in render.COLUMNS:
            print(f"{heading:12s}{explanation}")
        return 0
    _check_output(arguments)
    _check_combination(arguments)
    targets = _targets(arguments.target)
    if arguments.shape is not None:
        return _run_shape(arguments, targets)
    known = _snapshot(arguments)
    cases, whole_library = _cases(arguments)
    if arguments.list:
        for case in cases:
            print(f"{case.name}  {' '.join(f'sm_{target}' for target in case.targets)}  {case.sample}".rstrip())
        return 0
    console = _console()
    notes = []
    if whole_library and not (arguments.all or arguments.check or arguments.update):
        total, cases = len(cases), catalog.main_cases(cases)
        notes.append(f"{len(cases)} main configurations of {total}; --all for the others, or name a KERNEL.")
    assessments = _compile(cases, targets, arguments.jobs)
    if arguments.check or arguments.update:
        _write_files(arguments, assessments)
        return _gate(arguments, known, assessments, whole_library, targets is None, console)
    return _show(arguments, assessments, console, notes)


def _check_output(arguments: argparse.Namespace) -> None:
    """Before anything compiles: minutes are not to end with a file that cannot be written."""
    if arguments.check and arguments.update:
        raise InspectionError("--check compares with a snapshot and --update writes it: give one of them")
    if arguments.json == "-" and arguments.markdown == "-":
        raise InspectionError("--json - and --markdown - would be one after the other on the terminal: give one a FILE")
    for option in ("json", "markdown"):
        place = getattr(arguments, option)
        if place and place != "-":
            path = Path(place).resolve()
            if path.is_dir() or not path.parent.is_dir():
                what = f"{path} is a folder" if path.is_dir() else f"there is no folder {path.parent}"
                raise InspectionError(f"--{option}: {what}")
            if not os.access(path if path.exists() else path.parent, os.W_OK):
                raise InspectionError(f"--{option}: {path} cannot be written")


def _check_combination(arguments: argparse.Namespace) -> None:
    """Refuse an option that another one would have ignored."""

    def given(*options: str) -> str:
        values = {option: getattr(arguments, option[2:].replace("-", "_")) for option in options}
        return " and ".join(option for option, value in values.items() if value not in (None, False, []))

    others = given("--check", "--update", "--shape", "--json", "--markdown", "--sass", "--ptx")
    if arguments.list and others:
        raise InspectionError(f"--list names the configurations and compiles nothing: leave out {others}")
    if gate := given("--check", "--update"):
        if texts := given("--sass", "--ptx"):
            raise InspectionError(f"{gate} prints what changed: leave out {texts}")
        if "-" in (arguments.json, arguments.markdown):
            raise InspectionError(f"{gate} prints what changed: give --json and --markdown a FILE")
    own = given("--signature", "--constexpr", "--num-warps", "--num-stages", "--option", "--grid", "--flops", "--bytes")
    if own and (arguments.shape is not None or not any(":" in kernel for kernel in arguments.kernels)):
        raise InspectionError(
            f"{own}: only to describe a kernel of your own, named as file.py:kernel; "
            "the library's configurations are fixed (--list)"
        )


def _snapshot(arguments: argparse.Namespace) -> dict[str, Any]:
    """The budgets to compare with; before anything compiles, for the same reason."""
    if arguments.check:
        return snapshot.read(Path(arguments.check))
    if arguments.update:
        place = Path(arguments.update)
        snapshot.check_writable(place)
        if snapshot.path_for(place).exists():
            return snapshot.read(place)
    return {}


def _run_shape(arguments: argparse.Namespace, targets: list[Target] | None) -> int:
    if len(arguments.kernels) != 1 or arguments.check or arguments.update:
        raise InspectionError(
            f"--shape takes one op of {', '.join(shapes.EXAMPLES)}, e.g. `attention --shape 4,16,4096,128`, and no gate"
        )
    op = arguments.kernels[0].lower()
    shape = shapes.parse_shape(op, arguments.shape)
    dtype = catalog.plain_dtype(arguments.dtype or "fp16")
    assessments: list[Assessment] = []
    notes = []
    wanted = targets or [find_target(name) for name in ("sm_80", "sm_86", "sm_90", "sm_100")]
    for target, ops in zip(wanted, shapes.launches(op, shape, dtype, wanted), strict=True):
        notes += [render.floor_note(launched, dtype, target) for launched in ops]
        assessments += _compile([case for launched in ops for case in launched.cases], [target], arguments.jobs)
    return _show(arguments, assessments, _console(), notes)


def _show(arguments: argparse.Namespace, assessments: list[Assessment], console: Any, notes: list[str]) -> int:
    if not ("-" in (arguments.json, arguments.markdown) or arguments.sass or arguments.ptx):
        _print_table(assessments, console)
        for note in notes:
            console.print(note, style="dim", highlight=False, soft_wrap=True)
    _write_files(arguments, assessments)
    for kind in ("sass", "ptx"):
        if getattr(arguments, kind):
            _print_texts(assessments, kind)
    broken = [assessment for assessment in assessments if assessment.report.error is not None]
    for assessment in broken:
        print(f"\n{assessment.report.name} {assessment.target.label}:\n{assessment.report.error}", file=sys.stderr)
    return 2 if broken else 0


def _targets(text: str | None) -> list[Target] | None:
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise InspectionError("--target names no target; e.g. sm_90 or 'RTX 3090'")
    return [find_target(name) for name in names]


def _cases(arguments: argparse.Namespace) -> tuple[list[StaticCase], bool]:
    own = [kernel for kernel in arguments.kernels if ":" in kernel]
    patterns = [kernel for kernel in arguments.kernels if ":" not in kernel]
    cases: list[StaticCase] = []
    if own:
        if arguments.signature is None:
            raise InspectionError(
                f"{own[0]} needs --signature: the types of its arguments that are not constexpr, e.g. '*fp16,*fp16,i32'"
            )
        for kernel in own:
            cases += catalog.user_cases(
                kernel,
                arguments.signature,
                catalog.parse_constexprs(arguments.constexpr),
                num_warps=arguments.num_warps,
                num_stages=arguments.num_stages,
                options=catalog.parse_constexprs(arguments.option, "--option", "num_ctas=2"),
                grid=arguments.grid,
                flops=arguments.flops,
                bytes=arguments.bytes,
            )
    if patterns or not own:
        library = catalog.library_cases()
        cases += catalog.select(library, patterns, arguments.dtype)
        if not cases:
            raise InspectionError("the library ships no kernel configurations")
    return cases, not arguments.kernels and arguments.dtype is None


def _compile(cases: Sequence[StaticCase], targets: list[Target] | None, jobs: int | None) -> list[Assessment]:
    """Each case where the library launches it; if that is on none of the targets, what it would need there."""
    if targets is None:
        with _Progress(sum(len(case.targets) for case in cases)) as advance:
            return inspect_cases(cases, jobs=jobs, progress=advance)
    wanted = [[one for one in targets if case.launched_on(one.capability.number)] for case in cases]
    if not any(wanted):
        wanted = [targets] * len(cases)
    with _Progress(sum(len(own) for own in wanted)) as advance:
        return inspect_each(cases, wanted, jobs=jobs, progress=advance)


def _print_table(assessments: Sequence[Assessment], console: Any) -> None:
    console.print(render.table(assessments))
    broken = sum(assessment.report.error is not None for assessment in assessments)
    unfit = sum(assessment.occupancy is not None and not assessment.fits for assessment in assessments)
    spilling = sum(assessment.report.spills for assessment in assessments)
    words = [f"{len(assessments)} compiled with Triton {triton_version()}, none run"]
    words += [
        f"{count} {what}"
        for count, what in ((broken, "do not compile"), (unfit, "do not fit"), (spilling, "spill"))
        if count
    ]
    console.print("; ".join(words) + ". `--explain` says what the columns mean.", style="dim", highlight=False)


def _write_files(arguments: argparse.Namespace, assessments: Sequence[Assessment]) -> None:
    if arguments.json:
        _write(arguments.json, json.dumps(render.to_json(assessments, triton_version()), indent=1) + "\n")
    if arguments.markdown:
        _write(arguments.markdown, render.markdown(assessments))


def _write(place: str, text: str) -> None:
    if place == "-":
        sys.stdout.write(text)
    else:
        Path(place).write_text(text, encoding="utf-8")


def _print_texts(assessments: Sequence[Assessment], kind: str) -> None:
    for assessment in assessments:
        if assessment.report.error is None:
            print(f"// {assessment.report.name} {assessment.target.label}")
            print(getattr(assessment.report, kind))


def _gate(
    arguments: argparse.Namespace,
    known: dict[str, Any],
    assessments: Sequence[Assessment],
    whole_library: bool,
    all_targets: bool,
    console: Any,
) -> int:
    place = Path(arguments.check or arguments.update)
    path = snapshot.path_for(place)
    changes = snapshot.compare(known, assessments, whole_library)
    for change in changes:
        if arguments.update and change.before == snapshot.NO_BUDGET and "spills" not in str(change.after):
            continue  # a new kernel is what --update is for
        mark = "[red]WORSE[/red]" if change.worse else "[green]better[/green]"
        console.print(f"{mark} ", end="")
        console.print(str(change), markup=False, highlight=False, soft_wrap=True)
    worse = sum(change.worse for change in changes)
    count = f"{len(assessments)} kernels x targets, Triton {triton_version()}, {path}"
    if arguments.update:
        snapshot.write(place, assessments, keep=not (whole_library and all_targets))
        new = sum(change.before == snapshot.NO_BUDGET for change in changes)
        words = f"{new} new, {len(changes) - new} figures changed, {worse - new} for the worse"
        console.print(f"written: {count}: {words}", markup=False, highlight=False)
        return 0
    if worse:
        console.print(
            f"FAILED: {count}: {worse} figures got worse. Where that is meant: fastops inspect --update {place}",
            markup=False,
        )
        return 1
    better = f"; {len(changes)} figures got better, `--update {place}` keeps them so" if changes else ""
    console.print(f"ok: {count}{better}", markup=False, highlight=False)
    return 0


def _console() -> Any:
    from rich.console import Console

    console = Console()
    # a pipe has no width; wrapping would break what reads it
    return console if console.is_terminal else Console(width=240)


class _Progress(AbstractContextManager["Any"]):
    """A progress bar on stderr, on a terminal only."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.bar: Any = None

    def __enter__(self) -> Any:
        if not sys.stderr.isatty():
            return None
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.bar = Progress(
            TextColumn("compiling"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=Console(stderr=True),
            transient=True,
        )
        self.bar.start()
        task = self.bar.add_task("", total=self.total)
        return lambda report: self.bar.update(task, advance=1, description=f"{report.name} sm_{report.target}")

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.stop()
