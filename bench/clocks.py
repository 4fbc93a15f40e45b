"""How a block of launches is timed. A clock never changes within one case: ratios do not mix clocks.

cuda-graph  replay of a captured graph of one step per input set, the sets together at least 3x the L2 cache
cuda-event  events around each launch, the L2 cache overwritten before it
host        perf_counter around launches that end in one synchronisation: what a Python loop feels
cpu         perf_counter, caches as the previous launch left them
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from bench.modes import Step

ROTATE_TIMES_L2 = 3
MAX_SETS = 256
L2_FALLBACK_BYTES = 64 * 2**20


class Timed(Protocol):
    """One arm on one clock."""

    def block(self, launches: int) -> float:
        """Seconds per launch, over a block of at least this many."""


class NotCapturable(Exception):
    """This step cannot run inside a CUDA graph; the message says why."""


class CpuTimed:
    """perf_counter around launches on the CPU."""

    def __init__(self, steps: Sequence[Step]):
        self.steps = steps

    def block(self, launches: int) -> float:
        """Seconds per launch."""
        steps, count = self.steps, len(self.steps)
        start = time.perf_counter()
        for i in range(launches):
            steps[i % count]()
        return (time.perf_counter() - start) / launches


class HostTimed:
    """perf_counter around launches that end in a device synchronisation."""

    def __init__(self, steps: Sequence[Step]):
        self.steps = steps

    def block(self, launches: int) -> float:
        """Seconds per launch, launching included."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        for i in range(launches):
            self.steps[i % len(self.steps)]()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / launches


class EventTimed:
    """CUDA events around each launch, after a write over the whole L2 cache."""

    def __init__(self, steps: Sequence[Step]):
        self.steps = steps
        self.flush = torch.empty(2 * l2_bytes(), dtype=torch.int8, device="cuda")

    def block(self, launches: int) -> float:
        """Seconds per launch on the device; the flush also lets the host run ahead of it."""
        events = []
        for i in range(launches):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self.flush.zero_()
            start.record()
            self.steps[i % len(self.steps)]()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) / launches / 1e3


class Capture(torch.cuda.graph):
    """torch.cuda.graph, of which a capture that fails leaves nothing behind.

    torch's own leaves its stream the current one, the allocator in the capture's pool and, before PyTorch 2.12, the
    default generator in capture mode, so that whatever draws random numbers afterwards raises.
    """

    _before: torch.cuda.Stream
    _device: int

    def __init__(self, cuda_graph: torch.cuda.CUDAGraph, pool: Any = None, *arguments: Any, **options: Any):
        super().__init__(cuda_graph, torch.cuda.graph_pool_handle() if pool is None else pool, *arguments, **options)

    def __enter__(self) -> None:
        self._before, self._device = torch.cuda.current_stream(), torch.cuda.current_device()
        try:
            super().__enter__()
        except BaseException:
            self._abandon()
            raise

    def __exit__(self, *error: object) -> None:
        try:
            super().__exit__(*error)
        except BaseException as spoiled:
            self._abandon()
            if error[0] is None or not isinstance(spoiled, Exception):
                raise  # else the error of the step goes on, which says more

    def _abandon(self) -> None:
        torch.cuda.set_stream(self._before)
        try:
            torch._C._cuda_endAllocateToPool(self._device, *self.pool)
        except RuntimeError:
            pass  # torch came as far as that itself, and its graph will release the pool
        else:
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_releasePool(self._device, *self.pool)
        # only a capture that succeeds brings the generator back; where not even this one does, the context is gone
        with contextlib.suppress(Exception), warnings_off():
            try:
                with _TorchsCapture(torch.cuda.CUDAGraph(), stream=torch.cuda.Stream()):
                    torch.zeros(1, device="cuda")
            finally:
                torch.cuda.set_stream(self._before)


_TorchsCapture = Capture.__mro__[1]  # tests put Capture in the place of torch.cuda.graph


class GraphTimed:
    """Replays of one CUDA graph that holds a step per input set."""

    def __init__(self, steps: Sequence[Step]):
        self.count = len(steps)
        self.graph = torch.cuda.CUDAGraph()
        self.outputs: list[Any] = []
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream), warnings_off():
                for step in list(steps[:1]) * 3:
                    step()
            torch.cuda.synchronize()
            # outputs are kept, so that each step writes memory that the one before it did not leave in the cache
            with no_garbage_collection(), Capture(self.graph, stream=stream):
                self.outputs = [step() for step in steps]
            self.graph.replay()
            torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a step does that a capture forbids
            raise NotCapturable(first_line(error)) from error

    def block(self, launches: int) -> float:
        """Seconds per launch on the device."""
        replays = max(1, round(launches / self.count))
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(replays):
            self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / replays / self.count


CLOCKS = {"cpu": CpuTimed, "host": HostTimed, "cuda-event": EventTimed, "cuda-graph": GraphTimed}
CACHE = {
    "cpu": "as the last launch left it",
    "host": "as the last launch left it",
    "cuda-event": "L2 flushed",
    "cuda-graph": "cold, inputs rotated",
}


def launches_for(timed: Timed, seconds: float) -> int:
    """How many launches fill a block of about this long."""
    estimate = timed.block(1)
    if estimate > 20 * seconds:  # even an interrupted first look says that one is plenty
        return 1
    estimate = min(estimate, timed.block(1), timed.block(1))
    return max(1, math.ceil(seconds / max(estimate, 1e-7)))


def l2_bytes() -> int:
    """Size of the L2 cache of the current GPU."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return getattr(properties, "L2_cache_size", 0) or L2_FALLBACK_BYTES


def input_sets(bytes_per_set: float, device: torch.device) -> int:
    """How many input sets keep a rotation out of the cache; one on the CPU."""
    if device.type != "cuda":
        return 1
    return min(MAX_SETS, max(1, math.ceil(ROTATE_TIMES_L2 * l2_bytes() / max(bytes_per_set, 1))))


def is_cold(bytes_in_rotation: float, device: torch.device) -> bool:
    """Whether a rotation over this much cannot stay in the cache."""
    return device.type == "cuda" and bytes_in_rotation >= ROTATE_TIMES_L2 * l2_bytes()


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """A collection during capture may unload a module and spoil the graph."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def warnings_off() -> Iterator[None]:
    """Warm-up launches may warn about what the timed ones will not do."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def first_line(error: BaseException) -> str:
    """Type and first line of an error, for a table cell."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__
