"""What the GPU could do at most: as measured on this machine where somebody has, else as its data sheet says."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fastops import _env

CUDNN_WORDS = ("conv", "rnn", "lstm", "gru")


@dataclass(frozen=True)
class Ceilings:
    """TFLOP/s by kind of operand ("fp16", "bf16", "tf32", "fp32") and GB/s of one GPU.

    Attributes:
        source: "measured" or "data sheet".
        tf32_convolutions: whether fp32 convolutions and recurrent layers may round to TF32; else they are held
            against fp32.
        tf32_products: likewise for matrix products.
    """

    gpu: str
    source: str
    tflops: Mapping[str, float]
    gbytes_per_second: float
    tf32_convolutions: bool = True
    tf32_products: bool = False

    def compute_ms(self, flops: float, operator: str, dtype: str) -> float:
        """Least time of that arithmetic; 0 where no ceiling is known for the type."""
        if dtype == "fp32":
            convolution = any(word in operator for word in CUDNN_WORDS)
            dtype = "tf32" if (self.tf32_convolutions if convolution else self.tf32_products) else "fp32"
        peak = self.tflops.get(dtype)
        return flops / peak / 1e9 if peak else 0.0

    def memory_ms(self, moved: float) -> float:
        """Least time of moving that many bytes."""
        return moved / self.gbytes_per_second / 1e6

    def __str__(self) -> str:
        return f"{self.gpu}, {self.source}"


def load() -> Ceilings | None:
    """Ceilings of the current GPU; None without one, or where nothing is known about it."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    try:
        found, source = json.loads(cache_path().read_text(encoding="utf-8")), "measured"
        return _ceilings(name, source, {kind: found[kind] for kind in ("fp16", "bf16", "tf32", "fp32")}, found["gbps"])
    except (OSError, ValueError, KeyError, TypeError):
        return data_sheet(name)


def data_sheet(name: str) -> Ceilings | None:
    """What NVIDIA publishes about a GPU; None where fastops does not know it."""
    from fastops.inspection import find_target

    try:
        gpu = find_target(name).gpu
    except ValueError:
        return None
    if gpu is None:
        return None
    tflops = {kind: gpu.tflops(kind) for kind in ("fp16", "bf16", "tf32", "fp32")}
    return _ceilings(name, "data sheet", tflops, gpu.gbytes_per_second)


def _ceilings(name: str, source: str, tflops: Mapping[str, float], gbytes_per_second: float) -> Ceilings:
    # not allow_tf32: reading that raises once a program has set fp32_precision
    convolutions = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    products = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return Ceilings(name, source, dict(tflops), float(gbytes_per_second), convolutions, products)


def cache_path(device: torch.device | None = None) -> Path:
    """Where the benchmark leaves the measured ceilings of a GPU (the current one), its driver and this PyTorch."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    properties = torch.cuda.get_device_properties(torch.cuda.current_device() if device is None else device)
    key = f"{properties.name}|{getattr(properties, 'uuid', '')}|{_env.driver_version()}|{torch.__version__}"
    return base / "fastops" / f"ceilings-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
