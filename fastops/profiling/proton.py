"""Triton's own profiler as a backend: its file, its viewer; fastops' launches carry bytes and FLOPs there."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils._pytree import tree_map

from fastops import _library
from fastops.profiling import script


def run_proton(options: argparse.Namespace) -> int:
    """Profile with Proton and say how to view the result.

    Raises:
        BadRequest: it cannot start (it needs a GPU), or was asked for what is the other backend's.
    """
    for name in ("html", "json", "trace", "apply"):
        if getattr(options, name):
            raise script.BadRequest(f"--{name} is of the torch backend; Proton writes fastops.hatchet")
    try:
        import triton.profiler as proton
    except ImportError as error:
        raise script.BadRequest(f"--backend proton needs triton on Linux: {error}") from error
    try:
        session = proton.start("fastops", hook="triton")
    except RuntimeError as error:
        reason = str(error).rstrip(".")
        raise script.BadRequest(
            f"Proton cannot start here: {reason}; it needs an NVIDIA GPU, drop --backend without one"
        ) from error
    annotate_kernels()
    launchers = dict(_library.LAUNCHERS)
    scope_ops(proton.scope)
    try:
        if options.script:
            from fastops.profiling import profile

            as_module = options.module is not None
            profiler = profile(steps=1, warmup=10**9)  # which only watches the steps go by
            code = script.run_script(options.script, options.arguments, profiler, as_module=as_module)
        else:
            _, step = script.model_step(options.model, options.input, options.train)
            for _ in range(options.steps):
                step()
            code = 0
    finally:
        _library.LAUNCHERS.update(launchers)
        proton.finalize(session)
    print("wrote fastops.hatchet; view it with: proton-viewer -m time/ms,util fastops.hatchet", file=sys.stderr)
    return code


def annotate_kernels() -> int:
    """Let every kernel of fastops that has no metadata of its own report its bytes; returns how many there are."""
    import fastops.kernels

    found = set()
    for module in pkgutil.iter_modules(fastops.kernels.__path__, "fastops.kernels."):
        for thing in vars(importlib.import_module(module.name)).values():
            while not hasattr(thing, "launch_metadata") and hasattr(thing, "fn"):
                thing = thing.fn  # inside a heuristic or an autotuner
            if hasattr(thing, "launch_metadata") and thing not in found:
                found.add(thing)
                thing.launch_metadata = thing.launch_metadata or launch_metadata
    return len(found)


def scope_ops(scope: Callable[..., AbstractContextManager[Any]]) -> None:
    """Run every op of fastops that has a FLOP formula in a Proton scope of its name that carries its FLOPs."""
    for name, formula in _library.FLOP_FORMULAS.items():
        _library.LAUNCHERS[name] = _scoped(name, formula, _library.LAUNCHERS[name], scope)


def _scoped(name: str, formula: Callable[..., int], launcher: Callable[[], Any], scope: Any) -> Callable[[], Any]:
    def launch(*arguments: Any) -> Any:
        shapes = tree_map(_shape, (arguments, _library.FAKES[name](*arguments)))
        flops = formula(*shapes[0], out_shape=shapes[1])
        bits = 8 * next(a.element_size() for a in arguments if isinstance(a, torch.Tensor))
        with scope(f"fastops::{name}", {f"flops{bits}": flops}):
            return launcher()(*arguments)

    return lambda: launch


def _shape(value: Any) -> Any:
    return value.shape if isinstance(value, torch.Tensor) else value


def launch_metadata(grid: Any, metadata: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Name of a launch, and its bytes: each tensor argument once, which is what it moves at least or nearly so."""
    tensors = {value.data_ptr(): value for value in arguments.values() if hasattr(value, "data_ptr")}
    moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return {"name": metadata.name, "bytes": moved}
