"""What several workloads need."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from bench.case import Case, Unavailable

COMPILE_MODES = {"compile": None, "compile-max": "max-autotune-no-cudagraphs"}
# CUDA graphs are taken by the clock, for every arm alike; nested ones cannot be captured


def named(path: str) -> Any:
    """What `path`, below fastops or models, names; Unavailable where this version lacks it."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise Unavailable(f"{path} is not in this version ({error})") from error


def compiled(function: Callable[..., Any], device: torch.device, mode: str | None = None) -> Callable[..., Any]:
    """torch.compile for static shapes. Not on the CPU, where it would time Inductor's C++."""
    only_on_gpu(device, "torch.compile arms run on GPUs only")
    done: Callable[..., Any] = torch.compile(function, dynamic=False, mode=mode)
    return done


def only_on_gpu(device: torch.device, reason: str) -> None:
    """Raise Unavailable on the CPU."""
    if device.type != "cuda":
        raise Unavailable(reason)


def random(
    device: torch.device, seed: int, *sizes: int, dtype: torch.dtype, scale: float = 1.0, salt: int = 0
) -> torch.Tensor:
    """Normal numbers, the same on every machine. Never zeros, never all positive: both run faster than real data."""
    generator = torch.Generator(device=device).manual_seed(seed * 1000 + salt)
    return (torch.randn(*sizes, generator=generator, device=device, dtype=torch.float32) * scale).to(dtype)


def needs_grad(case: Case) -> bool:
    """Whether the mode differentiates."""
    return case.mode in ("train", "bwd")


def passes(case: Case, backward: float = 2.0) -> float:
    """How many forward's worth of work a mode is, where the backward pass costs `backward` of them."""
    return {"infer": 1.0, "fwd": 1.0, "bwd": backward, "train": 1.0 + backward}[case.mode]


def double(tensors: dict[str, torch.Tensor], wrt: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """Float64 copies of floating tensors, leaves where gradients are wanted."""
    return {
        name: x.detach().double().requires_grad_(name in wrt) if x.is_floating_point() else x
        for name, x in tensors.items()
    }
