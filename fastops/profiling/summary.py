"""From an attributed trace to the figures people read: the step, the modules, the kernels. Times are milliseconds."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from fastops.profiling import work
from fastops.profiling.attribute import OUTSIDE, PYTHON, attribute, operator_of
from fastops.profiling.ceilings import Ceilings
from fastops.profiling.trace import MARKS, MODULE_RANGE, STEP_MARK, HostEvent, Kernel, Trace

FAR_PERCENT = 10.0
MICRO_GAP_US = 10.0  # shorter pauses of the GPU are launch latency, longer ones wait for the host


@dataclass
class StepSummary:
    """One average step."""

    device: str  # "cuda" or "cpu": whose time is reported
    steps: int
    wall_ms: float
    busy_ms: float
    idle_micro_ms: float
    idle_macro_ms: float
    launches: float
    attributed_percent: float
    source: str = "kernels"  # what device times rest on: "kernels", "events" where none could be captured, else "host"
    ceilings: str | None = None  # whose ceilings the percentages are of, and where they come from

    @property
    def busy_percent(self) -> float:
        """Share of the wall time in which the device worked."""
        return 100 * self.busy_ms / self.wall_ms if self.wall_ms else 0.0

    @property
    def verdict(self) -> str:
        """One sentence: what limits the step."""
        if self.device == "cpu":
            return "no GPU: times are host times of PyTorch's CPU operators"
        if self.source == "events":
            return "no kernel was captured: times lie between CUDA events and include the GPU's pauses"
        if self.busy_percent >= 85:
            return "GPU-bound: the GPU is busy, faster kernels make the step faster"
        if self.idle_micro_ms >= self.idle_macro_ms:
            return "launch-bound: the GPU waits between short kernels (CUDA graphs or fused kernels help)"
        return "host-bound: the GPU waits for the host (data loading, .item(), Python between steps)"


@dataclass
class ModuleRow:
    """One module of the tree; own figures exclude children, total ones include them."""

    path: str
    kind: str
    depth: int
    calls: float = 0.0
    forward_ms: float = 0.0
    backward_ms: float = 0.0
    total_ms: float = 0.0
    percent: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    own_forward_ms: float = 0.0
    own_backward_ms: float = 0.0
    own_flops: float = 0.0
    own_bytes: float = 0.0
    compute_ms: float = 0.0  # least time of the arithmetic at the GPU's ceiling, with children
    memory_ms: float = 0.0  # likewise of the traffic
    floor_ms: float = 0.0  # the larger of both, module by module and direction by direction
    own_floors: dict[bool, list[float]] = field(
        default_factory=lambda: {False: [0.0, 0.0], True: [0.0, 0.0]}, repr=False
    )

    @property
    def own_ms(self) -> float:
        """Time of the module without its children."""
        return self.own_forward_ms + self.own_backward_ms

    @property
    def tflops_per_s(self) -> float:
        """Useful arithmetic a second, in 10^12."""
        return self.flops / self.total_ms / 1e9 if self.total_ms else 0.0

    @property
    def ceiling_percent(self) -> float | None:
        """How near the module comes to the time that the GPU's ceilings allow; None where nothing is known."""
        return 100 * self.floor_ms / self.total_ms if self.floor_ms and self.total_ms else None

    @property
    def bound_by(self) -> str:
        """The ceiling that is nearer, "compute" or "memory"; "neither" below a tenth of both."""
        percent = self.ceiling_percent
        if percent is None:
            return ""
        if percent < FAR_PERCENT:
            return "neither"
        return "compute" if self.compute_ms >= self.memory_ms else "memory"

    @property
    def gb_per_s(self) -> float:
        """Traffic a second, a lower bound, in 10^9 bytes."""
        return self.bytes / self.total_ms / 1e6 if self.total_ms else 0.0


@dataclass
class KernelRow:
    """All launches of one kernel (on a GPU), or all calls of one operator (without one)."""

    name: str
    full_name: str
    calls: float
    total_ms: float
    percent: float
    registers: int | None = None
    shared_bytes: int | None = None
    occupancy_percent: float | None = None
    modules: list[str] = field(default_factory=list)

    @property
    def average_us(self) -> float:
        """Microseconds of one call."""
        return 1e3 * self.total_ms / self.calls if self.calls else 0.0


@dataclass
class Summary:
    """Everything the reports show."""

    step: StepSummary
    modules: list[ModuleRow]
    kernels: list[KernelRow]
    strip: list[tuple[float, float]]  # busy intervals, milliseconds from the start of the window
    notes: list[str]


def summarise(
    trace: Trace,
    kinds: Mapping[str, str],
    notes: list[str],
    ceilings: Ceilings | None = None,
    timed: Mapping[tuple[str, bool], float] | None = None,
) -> Summary:
    """Average over the steps between the first and the last step mark.

    Args:
        trace: what was recorded.
        kinds: module path -> class name.
        notes: shown as they are.
        ceilings: of the GPU, for percentages.
        timed: milliseconds of (module path, backward) in all steps, from CUDA events, where no kernel was captured.
    """
    marks = trace.step_marks()
    if len(marks) < 2:
        raise RuntimeError("the trace holds no whole step")
    begin, end, steps = marks[0], marks[-1], len(marks) - 1
    attribute(trace)
    host = [event for event in trace.host if event.end > begin and event.start < end and event.name not in MARKS]
    inside = {event for event in host if event.start >= begin}
    launched = [k for k in trace.device if k.start >= begin and (k.launched_by is None or k.launched_by in inside)]
    source = "kernels" if launched else "events" if timed else "host"

    rows: dict[str, ModuleRow] = {}
    for path in _order(host, kinds):
        rows[path] = ModuleRow(path, kinds.get(path, ""), path.count(".") if path in kinds else 0)
    _count_work(rows, inside, steps, None if source == "host" else ceilings)
    busy: list[tuple[float, float]] = []
    window_end = end
    if launched:
        _charge_device(rows, launched, steps)
        kernels = _kernel_rows(launched, steps)
        busy = _union((kernel.start, kernel.end) for kernel in launched)
        window_end = max(end, max(stop for _, stop in busy))
        total = work_total = sum(kernel.duration for kernel in launched) / 1e3 / steps
    else:
        main = next(event.thread for event in trace.host if event.name == STEP_MARK)
        if timed:
            total = work_total = _charge_timed(rows, timed, steps)
        else:
            total = _charge_host(rows, host, main, begin, end, steps)
            work_total = total - rows[PYTHON].own_ms
            top = (event for event in host if event.parent is None)
            busy = _union((max(event.start, begin), min(event.end, end)) for event in top)
        kernels = _operator_rows(sorted(inside, key=lambda event: event.start), steps)
    _roll_up(rows, kinds, total)
    micro, macro = _gaps(busy, begin, window_end)
    outside = sum(row.own_ms for path, row in rows.items() if path == OUTSIDE)
    step = StepSummary(
        "cpu" if source == "host" else "cuda",
        steps,
        (window_end - begin) / 1e3 / steps,
        sum(stop - start for start, stop in busy) / 1e3 / steps,
        micro / 1e3 / steps if busy else 0.0,
        macro / 1e3 / steps if busy else 0.0,
        len(launched) / steps,
        100 * (1 - outside / work_total) if work_total else 0.0,
        source,
        None if ceilings is None or source == "host" else str(ceilings),
    )
    strip = [((start - begin) / 1e3, (stop - begin) / 1e3) for start, stop in busy]
    shown = [row for row in rows.values() if row.calls or row.total_ms > 0]
    return Summary(step, shown, kernels, strip, notes)


def _count_work(rows: dict[str, ModuleRow], inside: set[HostEvent], steps: int, ceilings: Ceilings | None) -> None:
    """Calls, arithmetic and traffic of every module, and the time they need at the ceilings."""
    for event in inside:
        row = rows[event.module]
        if event.name.startswith(MODULE_RANGE):
            row.calls += 1
        if event.category != "cpu_op":
            continue
        flops, moved = work.flops_of(event), work.bytes_of(event)
        row.own_flops += flops
        row.own_bytes += moved
        if ceilings is not None:
            floors = row.own_floors[event.backward]
            floors[0] += ceilings.compute_ms(flops, event.name, work.dtype_of(event)) / steps if flops else 0.0
            floors[1] += ceilings.memory_ms(moved) / steps
    for row in rows.values():
        row.calls, row.own_flops, row.own_bytes = row.calls / steps, row.own_flops / steps, row.own_bytes / steps


def _order(host: list[HostEvent], kinds: Mapping[str, str]) -> list[str]:
    """Module paths as the model lists them, then the named rest."""
    used = {event.module for event in host}
    needed = {ancestor for path in used for ancestor in _lineage(path, kinds)}
    below: dict[str, list[str]] = defaultdict(list)
    for path in kinds:
        if path in needed:
            below[path.rpartition(".")[0] if path.rpartition(".")[0] in needed else ""].append(path)
    wanted: dict[str, None] = {}
    waiting = below[""][::-1]
    while waiting:  # depth first: what was found late stands below its parent, too
        path = waiting.pop()
        wanted[path] = None
        waiting += below[path][::-1] if path else []
    return [*wanted, *sorted(used - wanted.keys())]


def _charge_device(rows: dict[str, ModuleRow], launched: list[Kernel], steps: int) -> None:
    for kernel in launched:
        event = kernel.launched_by
        row = rows.setdefault(event.module if event else OUTSIDE, ModuleRow(OUTSIDE, "", 0))
        if event is not None and event.backward:
            row.own_backward_ms += kernel.duration / 1e3 / steps
        else:
            row.own_forward_ms += kernel.duration / 1e3 / steps


def _charge_timed(rows: dict[str, ModuleRow], timed: Mapping[tuple[str, bool], float], steps: int) -> float:
    for (path, backward), spent in timed.items():
        row = rows.setdefault(path, ModuleRow(path, "", 0))
        if backward:
            row.own_backward_ms += spent / steps
        else:
            row.own_forward_ms += spent / steps
    return sum(timed.values()) / steps


def _charge_host(
    rows: dict[str, ModuleRow], host: list[HostEvent], main: object, begin: float, end: float, steps: int
) -> float:
    """Charge self times; what no event covers on the main thread is Python's. Returns the total of a step in ms."""
    covered = 0.0
    total = 0.0
    for event in host:
        row = rows[event.module]
        spent = event.self_duration_within(begin, end) / 1e3 / steps
        total += spent
        if event.thread == main:
            covered += spent
        if event.backward:
            row.own_backward_ms += spent
        else:
            row.own_forward_ms += spent
    python = max(0.0, (end - begin) / 1e3 / steps - covered)
    rows[PYTHON] = ModuleRow(PYTHON, "", 0, own_forward_ms=python)
    return total + python


def _roll_up(rows: dict[str, ModuleRow], kinds: Mapping[str, str], total: float) -> None:
    for path, row in rows.items():
        floors = row.own_floors.values()
        for ancestor in _lineage(path, kinds):
            if ancestor in rows:
                upper = rows[ancestor]
                upper.compute_ms += sum(compute for compute, _ in floors)
                upper.memory_ms += sum(memory for _, memory in floors)
                upper.floor_ms += sum(map(max, floors))
                upper.forward_ms += row.own_forward_ms
                upper.backward_ms += row.own_backward_ms
                upper.flops += row.own_flops
                upper.bytes += row.own_bytes
    for row in rows.values():
        row.total_ms = row.forward_ms + row.backward_ms
        row.percent = 100 * row.total_ms / total if total else 0.0


def _lineage(path: str, kinds: Mapping[str, str]) -> list[str]:
    if path not in kinds:
        return [path]
    return [path[:i] for i, letter in enumerate(path) if letter == "."] + [path]


def _kernel_rows(launched: list[Kernel], steps: int) -> list[KernelRow]:
    groups: dict[str, list[Kernel]] = defaultdict(list)
    for kernel in launched:
        groups[kernel.name].append(kernel)
    total = sum(kernel.duration for kernel in launched)
    rows = []
    for name, group in groups.items():
        spent = sum(kernel.duration for kernel in group)
        first = group[0]
        modules = sorted({kernel.launched_by.module for kernel in group if kernel.launched_by})
        rows.append(
            KernelRow(
                short_name(name),
                name,
                len(group) / steps,
                spent / 1e3 / steps,
                100 * spent / total if total else 0.0,
                first.registers,
                first.shared_bytes,
                first.occupancy_percent,
                modules,
            )
        )
    return sorted(rows, key=lambda row: -row.total_ms)


def _operator_rows(host: list[HostEvent], steps: int) -> list[KernelRow]:
    groups: dict[str, list[HostEvent]] = defaultdict(list)
    for event in host:
        if event.category == "cpu_op":
            groups[event.name].append(event)
    total = sum(event.self_duration for group in groups.values() for event in group) / 1e3 / steps or 1.0
    rows = []
    for name, group in groups.items():
        spent = sum(event.self_duration for event in group) / 1e3 / steps
        modules = sorted({operator_of(event).module for event in group})
        rows.append(KernelRow(short_name(name), name, len(group) / steps, spent, 100 * spent / total, modules=modules))
    return sorted(rows, key=lambda row: -row.total_ms)


def short_name(name: str) -> str:
    """A kernel's name without return type, arguments, template arguments and namespaces."""
    short = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    if short.startswith("autograd::engine::evaluate_function: "):
        return short.removeprefix("autograd::engine::evaluate_function: ") + " (engine)"
    depth, kept = 0, []
    for letter in short:
        if letter == "<":
            depth += 1
        elif letter == ">":
            depth -= 1
        elif depth == 0:
            kept.append(letter)
    short = "".join(kept).split("(")[0].strip()
    return re.sub(r"^(?:\w+::)+(?=\w+$)", "", short) if not short.startswith(("aten::", "fastops::")) else short


def _union(intervals: object) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for start, stop in sorted(intervals):  # type: ignore[call-overload]
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged


def _gaps(busy: list[tuple[float, float]], begin: float, end: float) -> tuple[float, float]:
    """Idle microseconds in short and in long pauses."""
    edges = [begin, *(edge for interval in busy for edge in interval), end]
    micro = macro = 0.0
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        gap = max(0.0, stop - start)
        if gap < MICRO_GAP_US:
            micro += gap
        else:
            macro += gap
    return micro, macro
