"""The one screen: step, modules, kernels, advice, with rich."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastops.profiling.summary import KernelRow, ModuleRow, Summary

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

    from fastops.profiling.advice import Advice
    from fastops.profiling.paired import Comparison


LONGEST_NAME = 56  # of a kernel; cuDNN has some of 130 letters, which stand in the JSON
TIMES = {"kernels": "device time", "events": "time between CUDA events", "host": "host time"}


def screen(
    summary: Summary,
    advice: list[Advice],
    *,
    top: int = 15,
    overhead_percent: float | None = None,
    applied: Comparison | None = None,
) -> RenderableType:
    """Everything on one screen, as something rich can print."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [_step(summary, overhead_percent)]
    parts.extend(Text(f"note: {note}", style="yellow") for note in summary.notes)
    parts.append(_modules(summary, top))
    parts.append(_kernels(summary, top))
    parts.append(_advice(advice, summary))
    if applied is not None:
        parts.append(Text(f"applied and measured, whole step: {applied}", style="bold"))
    return Group(*parts)


def _step(summary: Summary, overhead_percent: float | None) -> RenderableType:
    from rich.text import Text

    step = summary.step
    lines = [f"step: {step.wall_ms:.3f} ms wall, average of {step.steps}"]
    if step.source == "kernels":
        idle = step.idle_micro_ms + step.idle_macro_ms
        lines.append(
            f"GPU busy {step.busy_percent:.0f} %, idle {idle:.3f} ms "
            f"(pauses under 10 us: {step.idle_micro_ms:.3f} ms, longer: {step.idle_macro_ms:.3f} ms), "
            f"{step.launches:.0f} launches"
        )
    lines.append(step.verdict)
    tail = f"{step.attributed_percent:.1f} % of the {'GPU' if step.device == 'cuda' else 'operator'} time has an owner"
    if overhead_percent is not None:
        if overhead_percent > 0:
            tail += f"; steps took {overhead_percent:.0f} % longer with profiling on"
        else:
            tail += "; what profiling cost is within this machine's noise"
    lines.append(tail)
    return Text("\n".join(lines))


def _modules(summary: Summary, top: int) -> Table:
    from rich.table import Table

    title = f"modules: {TIMES[summary.step.source]} per step"
    caption = "total includes children; GB/s is a lower bound from argument sizes"
    ceilings = summary.step.ceilings
    if ceilings:
        caption += f"; ceilings of {ceilings}"
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    on_gpu = summary.step.device == "cuda"
    table.add_column("module", no_wrap=True)
    table.add_column("class", no_wrap=True)
    for name in ("forward ms", "backward ms", "total ms", "%", "calls", "TFLOP/s" if on_gpu else "GFLOP/s", "GB/s"):
        table.add_column(name, justify="right", no_wrap=True)
    if ceilings:
        table.add_column("% of ceiling", justify="right", no_wrap=True)
        table.add_column("bound by", no_wrap=True)
    for row in visible(summary.modules, top):
        cells = [
            "  " * row.depth + (row.path.rsplit(".", 1)[-1] if row.depth else row.path),
            row.kind,
            f"{row.forward_ms:.3f}",
            f"{row.backward_ms:.3f}",
            f"{row.total_ms:.3f}",
            f"{row.percent:.1f}",
            f"{row.calls:.0f}" if row.calls else "",
            f"{row.tflops_per_s * (1 if on_gpu else 1e3):.1f}" if row.flops else "",
            f"{row.gb_per_s:.1f}" if row.bytes else "",
        ]
        if ceilings:
            percent = row.ceiling_percent
            cells += ["" if percent is None else f"{percent:.0f}", row.bound_by]
        table.add_row(*map(printable, cells))
    return table


def visible(rows: list[ModuleRow], top: int) -> list[ModuleRow]:
    """The rows worth a line: in tree order, those above 1 %, and at most about `top` leaves."""
    largest = sorted(rows, key=lambda row: -row.total_ms)[: max(top, 1)]
    keep = {row.path for row in largest if row.percent >= 0.1 or row.depth == 0}
    for path in list(keep):
        parts = path.split(".")
        keep.update(".".join(parts[: i + 1]) for i in range(len(parts)))
    return [row for row in rows if row.path in keep]


def _kernels(summary: Summary, top: int) -> Table:
    from rich.table import Table

    on_gpu = summary.step.source == "kernels"
    table = Table(title="kernels" if on_gpu else "operators (self time)", title_justify="left")
    table.add_column("name", no_wrap=True, overflow="ellipsis", max_width=LONGEST_NAME)
    for name in ("calls", "total ms", "%", "average us"):
        table.add_column(name, justify="right", no_wrap=True)
    if on_gpu:
        for name in ("registers", "shared B", "occupancy %"):
            table.add_column(name, justify="right")
    table.add_column("for module", overflow="fold")
    for row in summary.kernels[:top]:
        cells = [row.name, f"{row.calls:.0f}", f"{row.total_ms:.3f}", f"{row.percent:.1f}", f"{row.average_us:.1f}"]
        if on_gpu:
            known = (row.registers, row.shared_bytes, row.occupancy_percent)
            cells += ["" if value is None else f"{value:.0f}" for value in known]
        table.add_row(*map(printable, [*cells, owners(row)]))
    return table


def printable(name: str) -> Text:
    """A cell that shows a name as it is: no markup, no line feeds or terminal codes."""
    from rich.text import Text

    return Text("".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in name))


def owners(row: KernelRow) -> str:
    """The modules a kernel ran for, shortened."""
    names = row.modules[:2]
    more = len(row.modules) - len(names)
    return ", ".join(names) + (f" and {more} more" if more > 0 else "")


def _advice(advice: list[Advice], summary: Summary) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    if not advice:
        return Text("advice: none; nothing here that fastops knows how to make faster")
    table = Table(title="advice", title_justify="left")
    for name in ("what", "why", "saves", "confidence", "how"):
        table.add_column(name, overflow="fold")
    for item in advice:
        cells = (item.what, item.why, item.saving(summary.step.wall_ms), item.confidence, item.edit)
        table.add_row(*map(printable, cells))
    return table
