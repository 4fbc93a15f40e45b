"""Recording: torch.profiler around the steps that count, and what to do where something else is in its way."""

from __future__ import annotations

import functools
import os
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fastops.profiling import ceilings, trace
from fastops.profiling.clock import EventClock
from fastops.profiling.ranges import ModuleRanges
from fastops.profiling.steps import StepFinder
from fastops.profiling.summary import Summary, summarise

MOST_STEPS = 200  # where nobody says how many: a trace of more says nothing new and fills the memory
MOST_CALLS = 20_000  # of modules; a trace holds some 30 events for each
NO_KERNELS = (
    "A GPU is there but the profiler captured no kernel: CUPTI could not start. In a container, run with "
    "--cap-add SYS_ADMIN or let all users read GPU counters (NVreg_RestrictProfilingToAdminUsers=0). "
)
OTHER_PROFILER = (
    "Another torch profiler ran as well; two cannot run at once, so steps under the other are not recorded."
)
OTHER_THREADS = "Modules ran in several threads; times of one module add up over them, steps are those of one thread."


class Recorder:
    """Counts steps, profiles `steps` of them after `warmup`, and summarises. `steps.py` says when a step ends."""

    def __init__(
        self,
        root: torch.nn.Module | None = None,
        *,
        warmup: int = 0,
        steps: int | None = None,
        script: bool = False,
    ):
        if warmup < 0 or (steps is not None and steps < 1):
            raise ValueError(f"warmup must be >= 0 and steps >= 1, got warmup={warmup}, steps={steps}")
        self.ranges = ModuleRanges(root)
        self.finder = StepFinder(root, script)
        self.warmup = warmup
        self.steps = steps
        self.seen = 0
        self.trace_path: Path | None = None
        self.notes: list[str] = []
        self.step_walls: list[float] = []  # seconds of every step seen, profiled or not
        self.profiled_walls: list[float] = []
        self.after_step: Callable[[], None] | None = None
        self._forwards = 0  # recorded boundaries, by what ended them
        self._steps = 0
        self._profiler: Any = None
        self._finished = False
        self._entered = False
        self._other_profiler = False
        self._hooks: list[Any] = []
        self._last = 0.0
        self._process = os.getpid()
        self._owner: threading.Thread | None = None  # only its calls end steps
        self._begun_by = 0
        self._calls_before = 0
        self._all_threads = False
        self._clock: EventClock | None = None
        self._others = Others(self.make_way)

    @property
    def recorded(self) -> int:
        """Whole steps in the trace."""
        return self._steps or self._forwards

    def __enter__(self) -> Recorder:
        if self._entered:
            raise RuntimeError("this profile has been used; make a new one")
        self._entered = True
        self._last = time.perf_counter()
        self.ranges.start(self._on_root)
        self._others.watch()
        try:
            self._hooks = [
                register_optimizer_step_pre_hook(self._before_optimizer),
                register_optimizer_step_post_hook(self._on_optimizer),
            ]
            if self.warmup == 0:
                self._begin()
        except BaseException:
            self._remove_hooks()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        if os.getpid() != self._process:
            return
        try:
            if self.finder.pending and not self.finder.training and not self._finished:
                self._boundary(trace.FORWARD_MARK)
            self._end()
        finally:
            self._remove_hooks()

    def _remove_hooks(self) -> None:
        self.ranges.stop()
        self._others.forget()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def mark(self) -> None:
        """End a step here."""
        self.finder.marked_by_hand()
        self._boundary(trace.STEP_MARK)

    def _boundary(self, kind: str) -> None:
        recording = self._profiler is not None
        if recording and not self._may_stop_here():
            return
        if recording or self.seen + 1 == self.warmup or self.after_step:
            synchronize()
        now = time.perf_counter()
        self.step_walls.append(now - self._last)
        self.seen += 1
        if recording:
            self.profiled_walls.append(self.step_walls[-1])
            if kind == trace.STEP_MARK:
                self._steps += 1
            else:
                self._forwards += 1
            stamp(kind)
            if self._clock is not None:
                self._clock.cut(kind)
            full = self.recorded >= MOST_STEPS or self.ranges.calls - self._calls_before >= MOST_CALLS
            if self.recorded >= self.steps if self.steps else full:
                self._end()
        elif self.seen >= self.warmup and not self._finished:
            self._begin()
        if self.after_step is not None:
            self.after_step()
        self._last = time.perf_counter()

    def _on_root(self, module: torch.nn.Module, done: bool) -> None:
        if not self._is_owner():
            return
        if self.finder.forward_ends(module) if done else self.finder.forward_begins(module):
            self._boundary(trace.FORWARD_MARK)

    def _before_optimizer(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._clock is not None and self._profiler is not None:
            self._clock.optimizer()

    def _on_optimizer(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if os.getpid() != self._process:
            return
        if self._clock is not None and self._profiler is not None:
            self._clock.outside()
        if self._profiler is None or self._may_stop_here():
            self._owner = threading.current_thread()  # whoever trains
        if self._is_owner() and self.finder.optimizer_stepped(optimizer):
            self._boundary(trace.STEP_MARK)

    def _is_owner(self) -> bool:
        if self._owner is None or not self._owner.is_alive():
            self._owner = threading.current_thread()
        return self._owner is threading.current_thread()

    def _may_stop_here(self) -> bool:
        """A profiler of one thread must be stopped in that thread; in another one, PyTorch would crash."""
        return self._all_threads or threading.get_ident() == self._begun_by

    def _begin(self) -> None:
        if self._others.running:
            self._other_profiler = True  # and try again at the next step
            return
        self._others.ours = True
        try:
            self._start_profiler()
        finally:
            self._others.ours = False

    def _start_profiler(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            if not captures_kernels():
                self.ranges.clock = self._clock = EventClock()
        threaded = not on_gpu or bool(self.ranges.threads - {threading.get_ident()})
        options = all_threads_config() if threaded else None
        self._all_threads = options is not None
        self._begun_by = threading.get_ident()
        profiler = torch.profiler.profile(activities=activities, record_shapes=True, experimental_config=options)
        synchronize()
        profiler.__enter__()
        self._profiler = profiler
        self._calls_before = self.ranges.calls
        stamp(trace.STEP_MARK)
        if self._clock is not None:
            self._clock.start()

    def make_way(self) -> None:
        """The script starts a profiler of its own: stop this one, and start it again later where it has nothing yet."""
        if self._profiler is None or not self._may_stop_here():
            return
        self._other_profiler = True
        empty = self.recorded == 0
        self._end()
        if empty:
            self.discard()
            self.trace_path, self._finished = None, False

    def _end(self) -> None:
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        self._finished = True
        if self._clock is not None:
            self._clock.stop()
        self._others.ours = True
        try:
            profiler.__exit__(None, None, None)
        finally:
            self._others.ours = False
        handle, name = tempfile.mkstemp(suffix=".json", prefix="fastops-trace-")
        os.close(handle)
        self.trace_path = Path(name)
        weakref.finalize(self, self.trace_path.unlink, missing_ok=True)
        profiler.export_chrome_trace(name)

    def summary(self) -> Summary:
        """Figures of the recorded steps; RuntimeError where nothing whole was recorded."""
        if self.trace_path is None or self.recorded == 0:
            raise RuntimeError(self._why_nothing())
        recorded = trace.read(self.trace_path)
        recorded.rename(self.ranges.labels)
        notes = [*self.notes, *self._remarks()]
        timed = self._clock.times(self._steps > 0) if self._clock is not None else None
        if torch.cuda.is_available() and not recorded.device:
            notes.append(
                NO_KERNELS + ("Times are between CUDA events." if timed else "The times below are host times.")
            )
        return summarise(recorded, self.ranges.kinds, notes, ceilings.load(), timed)

    def _why_nothing(self) -> str:
        if self._profiler is not None:
            return "the profile is still running; its report is there after the with statement"
        if self._other_profiler:
            return "nothing was profiled: another torch profiler was running, and two cannot run at once"
        if not self.seen:
            return (
                "nothing was profiled: no step was seen, neither a forward of a torch.nn.Module with parameters nor an "
                "optimizer's step; end steps by hand with mark()"
            )
        return (
            f"nothing was profiled: {self.seen} step(s) ran, {self.warmup} of them are warm-up "
            "(ask for fewer with warmup=0 or --warmup 0)"
        )

    def _remarks(self) -> list[str]:
        remarks = []
        if self.ranges.compiled:
            names = ", ".join(self.ranges.compiled)
            remarks.append(f"Modules inside compiled code cannot be told apart; they count as one: {names}.")
        if self._other_profiler:
            remarks.append(OTHER_PROFILER)
        if len(self.ranges.threads) > 1:
            remarks.append(OTHER_THREADS)
        if self.steps is None and self.seen > self.warmup + self.recorded:
            remarks.append(f"Only the first {self.recorded} steps after the warm-up are recorded; say steps= for more.")
        walls = sorted(self.profiled_walls)
        if len(walls) >= 3 and walls[-1] > 3 * walls[len(walls) // 2]:
            number = self.profiled_walls.index(walls[-1]) + 1
            ratio = walls[-1] / walls[len(walls) // 2]
            cure = "; warm up before, so that it does not count" if number == 1 and not self.warmup else ""
            remarks.append(
                f"Recorded step {number} took {ratio:.0f} times the median and weighs on the averages{cure}."
            )
        return remarks

    def discard(self) -> None:
        """Delete the temporary trace."""
        if self.trace_path is not None:
            self.trace_path.unlink(missing_ok=True)


def all_threads_config() -> Any:
    """The profiler setting that sees all threads and may be stopped in any; None where this PyTorch lacks it."""
    try:
        return torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    except (AttributeError, TypeError):
        return None


@functools.cache
def captures_kernels() -> bool:
    """Whether the profiler sees kernels of this GPU: tried once, on one."""
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as probe:
        torch.zeros(1, device="cuda").add_(1)
        torch.cuda.synchronize()
    return any(event.device_type == torch._C._autograd.DeviceType.CUDA for event in probe.events())


class Others:
    """Knows while another torch profiler is on or made ready, and tells before it starts: two at once crash PyTorch."""

    def __init__(self, before_start: Callable[[], None]):
        self.running = False
        self.ours = False  # the calls that come now are our own
        self._before_start = before_start
        self._originals: dict[str, Callable[..., Any]] = {}

    def watch(self) -> None:
        """Listen to whoever prepares, starts or stops a profiler."""
        self.running = bool(
            torch._C._autograd._profiler_enabled() or getattr(torch.autograd.profiler, "_is_profiler_enabled", False)
        )
        for name in ("_prepare_profiler", "_enable_profiler", "_disable_profiler"):
            if hasattr(torch.autograd.profiler, name):
                self._wrap(name)

    def forget(self) -> None:
        """Listen no more."""
        for name, original in self._originals.items():
            setattr(torch.autograd.profiler, name, original)
        self._originals.clear()

    def _wrap(self, name: str) -> None:
        original = self._originals[name] = getattr(torch.autograd.profiler, name)

        def call(*args: Any, **options: Any) -> Any:
            if self.ours:
                return original(*args, **options)
            if name == "_disable_profiler":
                self.running = False
            else:
                self._before_start()
                self.running = True
            return original(*args, **options)

        setattr(torch.autograd.profiler, name, call)


def stamp(kind: str) -> None:
    """Leave a mark in the trace."""
    with torch.autograd.profiler.record_function(kind):
        pass


def synchronize() -> None:
    """Wait for the GPU, where one is in use."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
