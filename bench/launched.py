"""What one step launches: number of kernels, and registers and shared memory of the Triton ones among them."""

from __future__ import annotations

import sys
from typing import Any

import torch

from bench.modes import Step


def launches(step: Step) -> int | None:
    """GPU kernels per step, counted by the profiler; None where it cannot count."""
    from torch.profiler import ProfilerActivity, profile

    try:
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
            step()
            torch.cuda.synchronize()
        names = [event.name for event in recorded.events() if event.device_type.name == "CUDA"]
    except (RuntimeError, AssertionError):
        return None
    return len([name for name in names if not name.startswith(("Memcpy", "Memset", "ProfilerStep"))]) or None


def triton_kernels(step: Step) -> list[dict[str, Any]]:
    """Resources of the Triton kernels that a step launches, in order of first launch."""
    if "triton" not in sys.modules:
        return []
    from triton import knobs

    handles: dict[Any, str] = {}

    def note(metadata: Any) -> None:
        data = metadata.get()
        handles.setdefault(data["function"], data["name"])

    try:
        knobs.runtime.launch_enter_hook.add(note)
    except AttributeError:  # a Triton whose hooks are not chains
        return []
    try:
        step()
    finally:
        knobs.runtime.launch_enter_hook.remove(note)
    try:
        compiled = _compiled_kernels()
        return [describe(name, compiled.get(handle)) for handle, name in handles.items()]
    except (AttributeError, IndexError, TypeError):  # internals of Triton that moved; the names are still known
        return [{"name": name} for name in handles.values()]


def describe(name: str, kernel: Any) -> dict[str, Any]:
    """Name and resources of one compiled kernel."""
    if kernel is None:
        return {"name": name}
    return {
        "name": name,
        "registers": kernel.n_regs,
        "spills": kernel.n_spills,
        "shared_bytes": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
    }


def _compiled_kernels() -> dict[Any, Any]:
    """Function handle -> compiled kernel, of every kernel in fastops.kernels."""
    from triton.runtime.jit import JITFunction

    found = {}
    for module in [m for name, m in sys.modules.items() if name.startswith("fastops.kernels.")]:
        for value in vars(module).values():
            if isinstance(value, JITFunction):
                for cache in value.device_caches.values():
                    for kernel in cache[0].values():
                        found[getattr(kernel, "function", None)] = kernel
    return found
