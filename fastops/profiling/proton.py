"""Triton's own profiler as a backend: its file, its viewer; our launches carry FLOPs and bytes there."""

from __future__ import annotations

import argparse
import sys

from fastops.profiling import script


def run_proton(options: argparse.Namespace) -> int:
    """Profile with Proton and say how to view the result; 2 where it cannot start (it needs a GPU)."""
    try:
        import triton.profiler as proton
    except ImportError as error:
        raise script.BadRequest(f"--backend proton needs triton on Linux: {error}") from error
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
