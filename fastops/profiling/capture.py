"""Recording: module ranges by forward hooks, step marks, and torch.profiler around the steps that count."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastops.profiling import trace
from fastops.profiling.summary import Summary, summarise


class ModuleRanges:
    """Global hooks that open a profiler range named after the module around every module call.

    The first module called from outside any other is a root; its children get the names of `named_modules`.
    """

    def __init__(self, root: torch.nn.Module | None = None):
        self.kinds: dict[str, str] = {}  # path -> class name, in the order of the models
        self.roots: list[torch.nn.Module] = []
        self.compiled: list[str] = []
        self._paths: dict[int, list[str]] = {}
        self._open = threading.local()
        self._handles: list[Any] = []
        if root is not None:
            self.add_root(root)

    def add_root(self, root: torch.nn.Module) -> None:
        """Name a model and everything below it."""
        kind = type(root).__name__
        name = kind if kind not in self.kinds else f"{kind}#{len(self.roots) + 1}"
        self.roots.append(root)
        for path, module in root.named_modules(remove_duplicate=False):
            full = f"{name}.{path}" if path else name
            self.kinds[full] = type(module).__name__
            self._paths.setdefault(id(module), []).append(full)
            if _is_compiled(module):
                self.compiled.append(full)

    def start(self, on_root: Callable[[torch.nn.Module, bool], None]) -> None:
        """Install the hooks. `on_root(module, done)` is called before and after each outermost module call."""
        self._on_root = on_root
        self._handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]

    def stop(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _stack(self) -> list[tuple[int, str, Any]]:
        if not hasattr(self._open, "stack"):
            self._open.stack = []
        return self._open.stack

    def _enter(self, module: torch.nn.Module, inputs: Any) -> None:
        if torch.compiler.is_compiling() or isinstance(module, torch.jit.ScriptModule):
            return
        stack = self._stack()
        if not stack:
            if id(module) not in self._paths:
                self.add_root(module)
            if not in_backward():
                self._on_root(module, False)
        path = self._path(module, stack[-1][1] if stack else "")
        span = torch.autograd.profiler.record_function(trace.MODULE_RANGE + path)
        span.__enter__()
        stack.append((id(module), path, span))

    def _leave(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        stack = self._stack()
        if not any(identity == id(module) for identity, _, _ in stack):
            return
        while stack:  # a child that raised may have left its range open
            identity, _, span = stack.pop()
            span.__exit__(None, None, None)
            if identity == id(module):
                break
        if not stack and not in_backward():
            self._on_root(module, True)

    def _path(self, module: torch.nn.Module, parent: str) -> str:
        """The module's name; of a shared module's names the one below the module that called it."""
        paths = self._paths.get(id(module))
        if paths is None:
            path = f"{parent}.{type(module).__name__}" if parent else type(module).__name__
            self.kinds.setdefault(path, type(module).__name__)
            return path
        return next((path for path in paths if parent and path.startswith(parent + ".")), paths[0])


def _is_compiled(module: torch.nn.Module) -> bool:
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # not imported: then nothing is compiled
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


class Recorder:
    """Counts steps, profiles `steps` of them after `warmup`, and summarises.

    A step ends when an optimizer has stepped, or, where none does, when the next outermost forward begins or an
    inference forward ends. `mark()` ends one by hand.
    """

    def __init__(self, root: torch.nn.Module | None = None, *, warmup: int = 0, steps: int | None = None):
        if warmup < 0 or (steps is not None and steps < 1):
            raise ValueError(f"warmup must be >= 0 and steps >= 1, got warmup={warmup}, steps={steps}")
        self.ranges = ModuleRanges(root)
        self.warmup = warmup
        self.steps = steps
        self.seen = 0
        self.recorded = 0
        self.trace_path: Path | None = None
        self.notes: list[str] = []
        self.step_walls: list[float] = []  # seconds of every step seen, profiled or not
        self.after_step: Callable[[], None] | None = None
        self._pending = False
        self._optimizer_seen = False
        self._profiler: Any = None
        self._finished = False
        self._optimizer_hook: Any = None
        self._last = 0.0

    def __enter__(self) -> Recorder:
        self.ranges.start(self._on_root)
        self._optimizer_hook = register_optimizer_step_post_hook(self._on_optimizer)
        self._last = time.perf_counter()
        if self.warmup == 0:
            self._begin()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._pending and not self._finished:
            self.mark()
        self._end()
        self.ranges.stop()
        self._optimizer_hook.remove()

    def mark(self) -> None:
        """End a step here."""
        self._pending = False
        recording = self._profiler is not None
        if recording or self.seen + 1 == self.warmup or self.after_step:
            synchronize()
        now = time.perf_counter()
        self.step_walls.append(now - self._last)
        self.seen += 1
        if recording:
            self.recorded += 1
            stamp()
            if self.steps is not None and self.recorded >= self.steps:
                self._end()
        elif self.seen == self.warmup and not self._finished:
            self._begin()
        if self.after_step is not None:
            self.after_step()
        self._last = time.perf_counter()

    def _on_root(self, module: torch.nn.Module, done: bool) -> None:
        if not done:
            if self._pending and not self._optimizer_seen:
                self.mark()
            self._pending = True
        elif not torch.is_grad_enabled():
            self.mark()

    def _on_optimizer(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._optimizer_seen = True
        if self._pending:
            self.mark()

    def _begin(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities, record_shapes=True)
        synchronize()
        self._profiler.__enter__()
        stamp()

    def _end(self) -> None:
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        self._finished = True
        profiler.__exit__(None, None, None)
        handle, name = tempfile.mkstemp(suffix=".json", prefix="fastops-trace-")
        os.close(handle)
        self.trace_path = Path(name)
        profiler.export_chrome_trace(name)

    def summary(self) -> Summary:
        """Figures of the recorded steps; RuntimeError where nothing whole was recorded."""
        if self.trace_path is None or self.recorded == 0:
            raise RuntimeError(
                f"nothing was profiled: {self.seen} step(s) ran, {self.warmup} of them are warm-up "
                "(ask for fewer with warmup=0 or --warmup 0)"
            )
        recorded = trace.read(self.trace_path)
        notes = list(self.notes)
        if torch.cuda.is_available() and not recorded.device:
            notes.append(
                "A GPU is there but the profiler captured no kernel: CUPTI could not start. In a container, run with "
                "--cap-add SYS_ADMIN or let all users read GPU counters (NVreg_RestrictProfilingToAdminUsers=0). "
                "The times below are host times."
            )
        if self.ranges.compiled:
            names = ", ".join(self.ranges.compiled)
            notes.append(f"Modules inside compiled code cannot be told apart; they count as one: {names}.")
        return summarise(recorded, self.ranges.kinds, notes)

    def discard(self) -> None:
        """Delete the temporary trace."""
        if self.trace_path is not None:
            self.trace_path.unlink(missing_ok=True)


def in_backward() -> bool:
    """Whether autograd is running: a module called then is recomputed by checkpointing, and starts no step."""
    return torch._C._current_graph_task_id() != -1


def stamp() -> None:
    """Leave a step mark in the trace."""
    with torch.autograd.profiler.record_function(trace.STEP_MARK):
        pass


def synchronize() -> None:
    """Wait for the GPU, where one is in use."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
