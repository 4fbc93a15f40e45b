"""A torch.profiler trace (Chrome JSON) as a forest of host events with the device work each of them launched.

The trace file, unlike `key_averages`, has the same form in every supported PyTorch, carries shapes, dtypes, registers
and occupancy, and lets kernel times be summed from kernel events alone (profiler overhead records inherit correlation
ids and would otherwise claim kernels).
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODULE_RANGE = "nn.Module: "
STEP_MARK = "fastops step"
FORWARD_MARK = "fastops forward"  # a step where no optimizer steps and nobody marks
MARKS = (STEP_MARK, FORWARD_MARK)
DEVICE_CATEGORIES = {"kernel", "gpu_memcpy", "gpu_memset"}
LAUNCH_CATEGORIES = {"cuda_runtime", "cuda_driver"}
HOST_CATEGORIES = {"cpu_op", "user_annotation"} | LAUNCH_CATEGORIES
NAME = re.compile(r'("name": ")(.*)(",(?:\n| "pid"))')


@dataclass(eq=False)
class HostEvent:
    """An operator, a named range or a launch call on a host thread. Times are microseconds."""

    name: str
    category: str
    thread: Any
    start: float
    end: float
    arguments: dict[str, Any]
    parent: HostEvent | None = None
    children: list[HostEvent] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)
    module: str = ""
    backward: bool = False

    @property
    def self_duration(self) -> float:
        """Duration without that of the children."""
        return self.self_duration_within(self.start, self.end)

    def self_duration_within(self, begin: float, end: float) -> float:
        """Self duration of the part that lies between two times."""
        own = min(self.end, end) - max(self.start, begin)
        return max(0.0, own - sum(max(0.0, min(c.end, end) - max(c.start, begin)) for c in self.children))

    def ancestors(self) -> Iterator[HostEvent]:
        """The enclosing events, innermost first."""
        event = self.parent
        while event is not None:
            yield event
            event = event.parent


@dataclass(eq=False)
class Kernel:
    """A kernel, copy or fill on the device. Times are microseconds."""

    name: str
    category: str
    start: float
    duration: float
    registers: int | None
    shared_bytes: int | None
    occupancy_percent: float | None
    launched_by: HostEvent | None = None

    @property
    def end(self) -> float:
        """When it finished."""
        return self.start + self.duration


@dataclass
class Trace:
    """Host events in order of start (parents before children) and device work in order of start."""

    host: list[HostEvent]
    device: list[Kernel]

    def step_marks(self) -> list[float]:
        """Times of the step boundaries: the beginning, and what ended the steps."""
        steps = [event.start for event in self.host if event.name == STEP_MARK]
        if len(steps) > 1:
            return steps
        return steps + [event.start for event in self.host if event.name == FORWARD_MARK]

    def rename(self, paths: Mapping[str, str]) -> None:
        """Put the modules' paths in place of the labels that stood for them while tracing."""
        for event in self.host:
            if event.name.startswith(MODULE_RANGE):
                label = event.name[len(MODULE_RANGE) :]
                event.name = MODULE_RANGE + paths.get(label, label)


def read(path: str | Path) -> Trace:
    """Read a trace that `torch.profiler.profile.export_chrome_trace` wrote (.json or .json.gz)."""
    return parse(load(path)["traceEvents"])


def load(path: str | Path) -> dict[str, Any]:
    """The JSON of a trace; RuntimeError where it is none."""
    opener: Any = gzip.open if str(path).endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8", errors="replace") as file:
        text = file.read()
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:  # PyTorch does not escape quotes in the names that people give to ranges
        return json.loads(NAME.sub(lambda found: found[1] + json.dumps(found[2])[1:-1] + found[3], text))
    except ValueError as error:
        raise RuntimeError(f"the profiler wrote a trace that is no JSON: {error}") from error


def parse(events: Iterable[dict[str, Any]]) -> Trace:
    """Build the forest from the list of trace events."""
    host: list[HostEvent] = []
    device: list[tuple[Kernel, dict[str, Any]]] = []
    for event in events:
        if event.get("ph") != "X":
            continue
        category, arguments = event.get("cat", ""), event.get("args", {})
        start, duration = float(event["ts"]), float(event.get("dur", 0.0))
        if category in HOST_CATEGORIES:
            host.append(HostEvent(event["name"], category, event.get("tid"), start, start + duration, arguments))
        elif category in DEVICE_CATEGORIES:
            kernel = Kernel(
                event["name"],
                category,
                start,
                duration,
                arguments.get("registers per thread"),
                arguments.get("shared memory"),
                arguments.get("est. achieved occupancy %"),
            )
            device.append((kernel, arguments))
    host.sort(key=lambda event: (event.start, -event.end))
    _nest(host)
    _link(host, device)
    kernels = sorted((kernel for kernel, _ in device), key=lambda kernel: kernel.start)
    return Trace(host, kernels)


def _nest(host: list[HostEvent]) -> None:
    stacks: dict[Any, list[HostEvent]] = {}
    for event in host:
        stack = stacks.setdefault(event.thread, [])
        while stack and event.start >= stack[-1].end:
            stack.pop()
        if stack:
            event.parent = stack[-1]
            event.end = min(event.end, event.parent.end)  # timestamps are rounded
            event.parent.children.append(event)
        stack.append(event)


def _link(host: list[HostEvent], device: list[tuple[Kernel, dict[str, Any]]]) -> None:
    """Give each kernel to the host event that launched it: by the launch call's correlation, else by external id."""
    launches = {
        event.arguments["correlation"]: event
        for event in host
        if event.category in LAUNCH_CATEGORIES and "correlation" in event.arguments
    }
    operators = {
        event.arguments["External id"]: event
        for event in host
        if event.category == "cpu_op" and "External id" in event.arguments
    }
    for kernel, arguments in device:
        launcher = launches.get(arguments.get("correlation")) or operators.get(arguments.get("External id"))
        kernel.launched_by = launcher
        if launcher is not None:
            launcher.kernels.append(kernel)
