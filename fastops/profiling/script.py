"""Profiling a user's script or a model by name."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import runpy
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from fastops.profiling import profile
from fastops.profiling.capture import synchronize

INTERRUPTED = "interrupted; the report covers what ran"


class BadRequest(ValueError):
    """What the user asked for cannot be done; the message is for them."""


def run_script(
    path: str, arguments: Sequence[str], profiler: profile, apply_rounds: int = 0, as_module: bool = False
) -> int:
    """Run a script as `python path arguments` would, profiling it; returns its exit code.

    With `as_module`, `path` is a module's name, run as `python -m` would. With `apply_rounds`, the steps after the
    recorded ones alternate between the model as it is and accelerated, in the script's own loop, and are compared pair
    by pair.
    """
    if not as_module and not Path(path).is_file():
        raise BadRequest(f"no script {path!r}")
    saved_argv, saved_path = sys.argv, list(sys.path)
    sys.argv = [path, *arguments]
    sys.path.insert(0, os.getcwd() if as_module else str(Path(path).resolve().parent))
    process = os.getpid()
    code = 0
    alternation = Alternation(profiler, apply_rounds) if apply_rounds else None
    try:
        if as_module and not _is_module(path):
            raise BadRequest(f"no module {path!r}; a file is profiled without -m")
        with profiler:
            if as_module:
                runpy.run_module(path, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(os.path.abspath(path), run_name="__main__")  # what __file__ is for `python path`
    except BadRequest:
        raise
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if code and not isinstance(stop.code, int):
            print(stop.code, file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
        print(INTERRUPTED, file=sys.stderr)
    except BaseException as error:
        code = 1
        traceback.print_exception(type(error), error, _of_the_script(error))
    finally:
        if os.getpid() != process:  # a child that the script forked, and that came out of it
            sys.stdout.flush()
            os._exit(code & 255)
        sys.argv, sys.path[:] = saved_argv, saved_path
        if alternation is not None:
            alternation.finish()
    return code


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _of_the_script(error: BaseException) -> TracebackType | None:
    """The traceback from the script's own first line on."""
    trace = error.__traceback__
    while trace is not None and (
        trace.tb_frame.f_code.co_filename == __file__ or "runpy" in trace.tb_frame.f_code.co_filename
    ):
        trace = trace.tb_next
    return trace


class Switch:
    """`fastops.accelerate` on models, turned on and off; off, they are what they were, accelerated in part or not."""

    def __init__(self, roots: Sequence[torch.nn.Module]):
        self.roots = roots
        self._on = contextlib.ExitStack()

    def __call__(self, on: bool) -> None:
        """Turn it on, anew where it is on already, or off."""
        import fastops

        self._on.close()
        if on:
            for root in self.roots:
                self._on.enter_context(fastops.accelerated(root))


class Alternation:
    """Steps after the profile, in turn as they were and accelerated; the first after each change is not counted."""

    def __init__(self, profiler: profile, rounds: int):
        self.profiler = profiler
        self.rounds = rounds
        self.times: dict[bool, list[float]] = {False: [], True: []}
        self.switch = Switch(profiler.recorder.ranges.roots)
        self.accelerated = False
        self.fresh = True
        self.last = 0.0
        self.changes = True
        profiler.recorder.after_step = self.step

    def step(self) -> None:
        """Called at the end of every step of the script."""
        recorder = self.profiler.recorder
        if self.last and not self.changes:
            return
        if recorder.steps is None or recorder.recorded < recorder.steps or len(self.times[True]) >= self.rounds:
            return
        if not self.last:
            self.changes = would_change(recorder.ranges.roots)
        if self.last and not self.fresh:
            self.times[self.accelerated].append(recorder.step_walls[-1])
        if self.fresh and self.last:
            self.fresh = False
        elif self.last:
            self.accelerated = not self.accelerated
            self.switch(self.accelerated)
            self.fresh = True
        self.last = time.perf_counter()

    def finish(self) -> None:
        """Restore the model and hand the comparison to the profile."""
        from fastops.profiling.paired import from_pairs

        self.switch(False)
        notes = self.profiler.recorder.notes
        if not self.changes or not would_change(self.profiler.recorder.ranges.roots):
            notes.append(NOTHING_TO_APPLY)
            return
        pairs = list(zip(self.times[False], self.times[True], strict=False))
        if len(pairs) >= 3:
            self.profiler.applied = from_pairs(pairs)
        else:
            notes.append("the script ended before enough steps could be compared for --apply")


NOTHING_TO_APPLY = "--apply: there is nothing here that fastops.accelerate would change"


def would_change(roots: Sequence[torch.nn.Module]) -> bool:
    """Whether `fastops.accelerate` would do anything to these models."""
    import fastops

    return any(row.becomes and not row.done for root in roots for row in fastops.explain(root))


def model_step(factory: str, inputs: Sequence[str], train: bool) -> tuple[torch.nn.Module, Callable[[], None]]:
    """Build `pkg.mod:factory` and a callable that runs one step on random inputs of the given shapes."""
    model = build(factory)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).train(train)
    try:
        tensors = [parse_input(text, device, model) for text in inputs]
    except RuntimeError as error:
        raise BadRequest(f"--input {' --input '.join(inputs)}: {str(error).splitlines()[0]}") from error
    optimizer = (
        torch.optim.SGD(model.parameters(), lr=1e-4) if train and any(True for _ in model.parameters()) else None
    )

    def step() -> None:
        if optimizer is None:
            with torch.no_grad():
                model(*tensors)
            return
        scalar_of(model(*tensors)).backward()
        optimizer.step()
        optimizer.zero_grad()

    try:
        step()
    except BadRequest:
        raise
    except Exception as error:  # whatever a model makes of a wrong input
        shapes = ", ".join(inputs)
        raise BadRequest(f"{factory} does not accept input {shapes}: {type(error).__name__}: {error}") from error
    synchronize()
    return model, step


def build(factory: str) -> torch.nn.Module:
    """Call `pkg.mod:factory`, which returns a module (a module class will do)."""
    module_name, _, name = factory.partition(":")
    if not module_name or not name:
        raise BadRequest(f"--model must be pkg.module:factory, got {factory!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        target = getattr(importlib.import_module(module_name), name)
    except AttributeError:
        raise BadRequest(f"module {module_name!r} has no {name!r}") from None
    except Exception as error:
        raise BadRequest(f"cannot import {module_name!r}: {type(error).__name__}: {error}") from error
    try:
        model = target() if callable(target) and not isinstance(target, torch.nn.Module) else target
    except Exception as error:
        raise BadRequest(f"{factory}() raised {type(error).__name__}: {error}") from error
    if not isinstance(model, torch.nn.Module):
        raise BadRequest(f"{factory} gave a {type(model).__name__}, not a torch.nn.Module")
    return model


DTYPES = {
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp64": torch.float64,
    "float64": torch.float64,
    "int64": torch.int64,
    "bool": torch.bool,
}


def parse_input(text: str, device: torch.device, model: torch.nn.Module) -> torch.Tensor:
    """A random tensor for "64x3x224x224" or "8x128:int64"; integers stay below the smallest embedding's size."""
    shape_text, _, kind = text.partition(":")
    try:
        shape = [int(size) for size in shape_text.split("x")]
        if min(shape) < 0:
            raise ValueError
    except ValueError:
        raise BadRequest(f"--input must look like 64x3x224x224 or 8x128:int64, got {text!r}") from None
    if kind and kind not in DTYPES:
        raise BadRequest(f"--input dtype must be one of {', '.join(DTYPES)}, got {kind!r}")
    dtype = DTYPES.get(kind, torch.float32)
    if dtype == torch.bool:
        return torch.ones(shape, dtype=dtype, device=device)
    if not dtype.is_floating_point:
        tables = [m.num_embeddings for m in model.modules() if isinstance(m, torch.nn.Embedding)]
        return torch.randint(0, min(tables, default=2), shape, device=device, dtype=dtype)
    first = next((p.dtype for p in model.parameters()), dtype)
    return torch.randn(shape, device=device, dtype=dtype if kind else first)


def scalar_of(output: Any) -> torch.Tensor:
    """One number to differentiate: the mean of the first floating tensor in whatever a model returns."""
    if isinstance(output, torch.Tensor):
        return output.float().mean()
    values = output.values() if isinstance(output, dict) else output
    for value in values if isinstance(values, Iterable) else ():
        found = value if isinstance(value, torch.Tensor) else None
        if found is not None and found.is_floating_point():
            return found.float().mean()
    raise BadRequest(f"the model returned {type(output).__name__} without a floating tensor; profile a script instead")
