"""What `make bench` can still say where there is no GPU: what the compiler makes of every kernel, and old results."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench import environment, results, table

TARGET = "H100"
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
    try:
        cases = [case for case in library_cases() if number in case.targets]
        with console.status(f"compiling {len(cases)} kernel configurations for {TARGET}"):
            found = [assess(report, target) for report in compile_cases(cases, [number])]
    except InspectionError as error:
        console.print(f"static figures: {error}", style="yellow", markup=False)
        return
    shown = Table(
        title=f"every kernel compiled for {target.label}: static, not timed",
        title_justify="left",
        header_style="bold",
        show_edge=False,
        pad_edge=False,
    )
    shown.add_column("kernel")
    for name in ("registers", "spills", "shared memory", "occupancy", "floor"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("compiler")
    for one in found:
        report = one.report
        shown.add_row(
            escape(report.name),
            str(report.registers or "-"),
            "yes" if report.spills else "none",
            f"{report.shared_bytes / 1024:.0f} KiB",
            f"{100 * one.occupancy.fraction:.0f} %" if one.occupancy else "-",
            f"{table.time(one.floor.seconds)} ({one.floor.bound})" if one.floor else "-",
            escape(one.verdict),
        )
    console.print(shown)
    bad = sum(not one.fits or one.report.spills for one in found)
    console.print(
        f"{len(found)} configurations, {bad} spill or do not fit; floor: roofline of the data sheet for the sample "
        "shape, estimated, no kernel can be faster",
        style="dim",
        highlight=False,
    )


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
