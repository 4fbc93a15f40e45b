"""Names in the trace: global hooks that open a profiler range around every module call."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from fastops.profiling import trace

MOST_ROOTS = 64  # of one class; what is built anew in every step shares one name from there on
DYNAMO_WARNING = r"Using `torch\.compile\(module\)` when there are global hooks on modules"


class Clock(Protocol):
    """Told when the work of a module begins and when it is its parent's turn again."""

    def enter(self, path: str) -> None:
        """The module at this path begins."""

    def leave(self, path: str, output: Any, parent: str | None) -> None:
        """It has ended with this output; time is its parent's again."""


class ModuleRanges:
    """The hooks, and the names of all modules seen.

    The first module called from outside any other is a root; its children get the names of `named_modules`.
    """

    def __init__(self, root: torch.nn.Module | None = None):
        self.kinds: dict[str, str] = {}  # path -> class name, in the order of the models
        self.labels: dict[str, str] = {}  # name in the trace -> path
        self.roots: list[torch.nn.Module] = []
        self.root_names: list[str] = []
        self.compiled: list[str] = []
        self.threads: set[int] = set()
        self.calls = 0  # of modules
        self.clock: Clock | None = None
        self._paths: dict[int, list[str]] = {}
        self._label_of: dict[str, str] = {}
        self._roots_of_kind: Counter[str] = Counter()
        self._open = threading.local()
        self._handles: list[Any] = []
        self._process = os.getpid()
        if root is not None:
            self.add_root(root)

    def add_root(self, root: torch.nn.Module) -> None:
        """Name a model and everything below it."""
        kind = type(root).__name__
        self._roots_of_kind[kind] += 1
        name = kind if self._roots_of_kind[kind] == 1 else f"{kind}#{self._roots_of_kind[kind]}"
        self.roots.append(root)
        self.root_names.append(name)
        for path, module in root.named_modules(remove_duplicate=False):
            full = f"{name}.{path}" if path else name
            self.kinds[full] = type(module).__name__
            self._paths.setdefault(id(module), []).append(full)
            if _is_compiled(module):
                self.compiled.append(full)

    def start(self, on_root: Callable[[torch.nn.Module, bool], None]) -> None:
        """Install the hooks. `on_root(module, done)` is called before and after each outermost module call."""
        self._on_root = on_root
        # the hooks are ours: the user need not read about them
        warnings.filterwarnings("ignore", message=DYNAMO_WARNING)
        self._handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]

    def stop(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        warnings.filters[:] = [  # type: ignore[index]
            entry for entry in warnings.filters if getattr(entry[1], "pattern", None) != DYNAMO_WARNING
        ]
        self._open = threading.local()

    def _stack(self) -> list[tuple[int, str, Any]]:
        if not hasattr(self._open, "stack"):
            self._open.stack = []
            self.threads.add(threading.get_ident())
        return self._open.stack

    def _enter(self, module: torch.nn.Module, inputs: Any) -> None:
        if torch.compiler.is_compiling() or isinstance(module, torch.jit.ScriptModule):
            return
        if os.getpid() != self._process:  # a forked DataLoader worker: nobody listens there
            return
        stack = self._stack()
        if not stack:
            if id(module) not in self._paths and self._worth_a_root(module):
                self.add_root(module)
            if not in_backward():
                self._on_root(module, False)
        self.calls += 1
        path = self._path(module, stack[-1][1] if stack else "")
        span = torch.autograd.profiler.record_function(trace.MODULE_RANGE + self._label(path))
        span.__enter__()
        stack.append((id(module), path, span))
        if self.clock is not None:
            self.clock.enter(path)

    def _leave(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        stack = self._stack()
        if not any(identity == id(module) for identity, _, _ in stack):
            return
        while stack:  # a child that raised may have left its range open
            identity, path, span = stack.pop()
            span.__exit__(None, None, None)
            if identity == id(module):
                break
        if self.clock is not None:
            self.clock.leave(path, output, stack[-1][1] if stack else None)
        if not stack and not in_backward():
            self._on_root(module, True)

    def _worth_a_root(self, module: torch.nn.Module) -> bool:
        """A bare loss or activation is named by its class; so is what a loop builds again and again."""
        if next(module.parameters(), None) is None and next(module.children(), None) is None:
            return False
        return self._roots_of_kind[type(module).__name__] < MOST_ROOTS

    def _path(self, module: torch.nn.Module, parent: str) -> str:
        """The module's name; of a shared module's names the one below the module that called it."""
        paths = self._paths.get(id(module))
        if paths is None:
            path = f"{parent}.{type(module).__name__}" if parent else type(module).__name__
            self.kinds.setdefault(path, type(module).__name__)
            return path
        if len(paths) == 1 or not parent:
            return paths[0]
        return next((path for path in paths if path.startswith(parent + ".")), paths[0])

    def _label(self, path: str) -> str:
        """The path in letters that the trace writer keeps: it escapes no quotes, and drops names that are not ASCII."""
        found = self._label_of.get(path)
        if found is None:
            found = path.encode("ascii", "backslashreplace").decode().replace('"', "'").replace("\\", "/")
            found = "".join(letter if letter.isprintable() else "?" for letter in found)
            while found in self.labels:
                found += "_"
            self.labels[found] = path
            self._label_of[path] = found
        return found


def in_backward() -> bool:
    """Whether autograd is running: a module called then is recomputed by checkpointing, and starts no step."""
    return torch._C._current_graph_task_id() != -1


def _is_compiled(module: torch.nn.Module) -> bool:
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # not imported: then nothing is compiled
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)
