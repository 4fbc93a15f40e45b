"""Triton's own profiler as a backend: its file, its viewer; launches of fastops' kernels carry their bytes there."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Mapping
from typing import Any

from fastops.profiling import script


def run_proton(options: argparse.Namespace) -> int:
    """Profile with Proton and say how to view the result; 2 where it cannot start (it needs a GPU)."""
    try:
        import triton.profiler as proton
    except ImportError as error:
        raise script.BadRequest(f"--backend proton needs triton on Linux: {error}") from error
    annotate_kernels()
    try:
        session = proton.start("fastops", hook="triton")
    except RuntimeError as error:
        raise script.BadRequest(f"Proton cannot start here: {error}. It needs an NVIDIA GPU; drop --backend") from error
    try:
        if options.script:
            from fastops.profiling import profile

            code = script.run_script(options.script, options.arguments, profile(steps=1, warmup=10**9))
        else:
            _, step = script.model_step(options.model, options.input, options.train)
            for _ in range(options.steps):
                step()
            code = 0
    finally:
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


def launch_metadata(grid: Any, metadata: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Name of a launch, and its bytes: each tensor argument once, which is what it moves at least or nearly so."""
    tensors = {value.data_ptr(): value for value in arguments.values() if hasattr(value, "data_ptr")}
    moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return {"name": metadata.name, "bytes": moved}
