"""What `make bench` can still say where there is no GPU: what the compiler makes of every kernel, and old results."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench import environment, results, table
from fastops.inspection.render import duration

if TYPE_CHECKING:
    from fastops.inspection import Assessment
    from fastops.kernels._static import StaticCase

TARGET = "H100"
STATIC_S = 110.0
CHUNK = 8
FOLDER = Path(__file__).resolve().parent / "results"


def show(console: Console, folder: Path = FOLDER) -> None:
    """Static figures of every kernel for the H100, then the newest committed GPU results."""
    console.print()
    show_static(console)
    console.print()
    show_newest(console, folder)
    console.print()


def show_static(console: Console) -> None:
    """Compile every shipped configuration and print what it needs. Nothing here was run."""
    from fastops.inspection import InspectionError, assess, compile_cases, find_target
    from fastops.inspection.catalog import library_cases

    target = find_target(TARGET)
    number = target.capability.number
    deadline = time.monotonic() + STATIC_S
    try:
        cases = in_turns([case for case in library_cases() if number in case.targets])
        found = []
        with console.status(f"compiling {len(cases)} kernel configurations for {TARGET}"):
            for start in range(0, len(cases), CHUNK):
                if time.monotonic() > deadline:
                    break
                reports = compile_cases(cases[start : start + CHUNK], [number])
                found += [assess(report, target) for report in reports]
    except InspectionError as error:
        console.print(f"static figures: {error}", style="yellow", markup=False)
        return
    families: dict[str, list[Assessment]] = {}
    for one in found:
        families.setdefault(family(one.report.name), []).append(one)
    console.print(_table(families, target.label))
    for one in found:
        if not one.fits or one.report.spills:
            console.print(f"  {one.report.name}: {one.verdict}", style="yellow", highlight=False, markup=False)
    left = len(cases) - len(found)
    note = f"; {left} more not compiled within {STATIC_S:.0f} s, run again for them (results are kept)" if left else ""
    console.print(
        f"{len(found)} configurations{note}; floor: roofline of the data sheet for the sample shapes, estimated; "
        "`fastops inspect` prints each",
        style="dim",
        highlight=False,
        soft_wrap=True,
    )


def in_turns(cases: list[StaticCase]) -> list[StaticCase]:
    """One of each family, then the second of each, and so on: a cut then costs no family."""
    turns: dict[str, int] = {}
    order = []
    for index, case in enumerate(cases):
        name = family(case.name)
        order.append((turns.setdefault(name, 0), index, case))
        turns[name] += 1
    return [case for _, _, case in sorted(order, key=lambda entry: entry[:2])]


def family(name: str) -> str:
    """The kernel, without its configuration."""
    return name.partition("[")[0]


def _table(families: dict[str, list[Assessment]], label: str) -> Table:
    shown = Table(
        title=f"every kernel compiled for {label}: static, not timed",
        title_justify="left",
        header_style="bold",
        show_edge=False,
        pad_edge=False,
    )
    shown.add_column("kernel", no_wrap=True)
    for name in ("configurations", "registers", "spilling", "shared memory", "occupancy", "floor of the samples"):
        shown.add_column(name, justify="right", no_wrap=True)
    for name, members in sorted(families.items()):
        reports = [one.report for one in members]
        floors = [one.floor.seconds for one in members if one.floor]
        shown.add_row(
            escape(name),
            str(len(members)),
            span([report.registers for report in reports], str),
            str(sum(report.spills or report.error is not None for report in reports) or "none"),
            span([report.shared_bytes // 1024 for report in reports], lambda kib: f"{kib} KiB"),
            span([round(100 * one.occupancy.fraction) for one in members if one.occupancy], lambda p: f"{p} %"),
            span(floors, duration),
        )
    return shown


def span(values: Sequence[Any], text: Callable[[Any], str]) -> str:
    """One value, or the range."""
    if not values:
        return "-"
    lo, hi = text(min(values)), text(max(values))
    return lo if lo == hi else f"{lo} to {hi}"


def show_newest(console: Console, folder: Path = FOLDER) -> None:
    """The newest committed measurement, with its machine and date."""
    newest = results.newest_on_gpu(folder)
    if newest is None:
        console.print("newest committed GPU results: none yet", highlight=False)
        return
    path, document = newest
    env = document["env"]
    console.print(f"newest committed GPU results: {path.name}, {env.get('date', 'no date')}", style="bold")
    console.print(environment.one_line(env), highlight=False)
    table.print_rows(console, document["rows"])
    console.print(table.verdict_line(document["rows"], env.get("machine", "an unnamed machine")), highlight=False)
