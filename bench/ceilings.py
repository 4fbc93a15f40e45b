"""What this GPU can really do: matrix products per dtype and a copy, measured once and cached.

The spec sheet is the labelled fallback, and the limit beyond which a time is called IMPOSSIBLE: no kernel beats it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from bench.clocks import GraphTimed
from fastops.profiling.ceilings import cache_path, data_sheet

GEMM_SIZES = (4096, 8192)
COPY_BYTES = 2**30
UNSEEN_WRITES = 0.6  # the last outputs may still be in L2, so a third of the traffic can hide; leave room
FASTER_THAN_MEASURED = 1.25  # a short burst may run at higher clocks than the long product that set the ceiling


def spec(name: str) -> dict[str, float] | None:
    """Data sheet of a GPU, None where the table lacks it: TFLOP/s per dtype, GB/s."""
    sheet = data_sheet(name)
    return None if sheet is None else {**sheet.tflops, "gbps": sheet.gbytes_per_second}


def load(device: torch.device, measure_missing: bool = True) -> dict[str, Any] | None:
    """Ceilings of the current GPU, from the cache, else measured (about 5 s), else from the spec sheet. None on CPU."""
    if device.type != "cuda":
        return None
    path = cache_path(device)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.get("source") == "measured" and "gbps" in found:
            return found
    except (OSError, ValueError):
        pass
    if measure_missing:
        try:
            found = measure(device)
        except (RuntimeError, torch.OutOfMemoryError):
            return fallback(device)
        store(path, found)
        return found
    return fallback(device)


def fallback(device: torch.device) -> dict[str, Any] | None:
    """The spec sheet, labelled as such."""
    row = spec(torch.cuda.get_device_name(device))
    return {"source": "spec sheet", **row} if row else None


def measure(device: torch.device) -> dict[str, Any]:
    """Best sustained rate of a large product per dtype (random numbers: zeros run faster) and of a large copy."""
    found: dict[str, Any] = {"source": "measured", "gpu": torch.cuda.get_device_name(device)}
    for name, dtype, tf32 in (
        ("fp16", torch.float16, False),
        ("bf16", torch.bfloat16, False),
        ("tf32", torch.float32, True),
        ("fp32", torch.float32, False),
    ):
        found[name] = round(max(_product_tflops(size, dtype, tf32, device) for size in GEMM_SIZES), 1)
    found["gbps"] = round(_copy_gbps(device), 1)
    return found


def _product_tflops(size: int, dtype: torch.dtype, tf32: bool, device: torch.device) -> float:
    matmul = torch.backends.cuda.matmul
    allowed, matmul.fp32_precision = matmul.fp32_precision, "tf32" if tf32 else "ieee"
    try:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        timed = GraphTimed([lambda: (a @ b,)])
        seconds = sorted(timed.block(3) for _ in range(7))[3]
        return 2 * size**3 / seconds / 1e12
    finally:
        matmul.fp32_precision = allowed


def _copy_gbps(device: torch.device) -> float:
    source = torch.randn(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)

    def copy() -> tuple[torch.Tensor, ...]:
        target.copy_(source)
        return ()

    timed = GraphTimed([copy])
    seconds = sorted(timed.block(3) for _ in range(9))[4]
    return 2 * COPY_BYTES / seconds / 1e9


def peak_name(dtype: str, tf32: bool) -> str:
    """Which ceiling a dtype is held against."""
    return "tf32" if dtype == "fp32" and tf32 else dtype


def floor_seconds(flops: float, bytes_moved: float, peak: str, ceilings: dict[str, Any]) -> tuple[float, str]:
    """Least time at these ceilings, and which one binds."""
    compute = flops / (ceilings[peak] * 1e12) if ceilings.get(peak) else 0.0
    memory = bytes_moved / (ceilings["gbps"] * 1e9)
    return (compute, "compute") if compute >= memory else (memory, "memory")


def impossible_below(
    flops: float, bytes_moved: float, algebra: float, peak: str, ceilings: dict[str, Any], gpu: str
) -> float:
    """Seconds under which a time cannot be true.

    Uses the data sheet where it is known and generous room over the measurement elsewhere; `algebra` is how many times
    fewer operations a clever algorithm may need, and warm caches may hide a part of the traffic.
    """
    sheet = spec(gpu) or {}
    rate = max(sheet.get(peak, 0.0), FASTER_THAN_MEASURED * ceilings.get(peak, 0.0))
    bandwidth = max(sheet.get("gbps", 0.0), FASTER_THAN_MEASURED * ceilings["gbps"])
    compute = flops / algebra / (rate * 1e12) if rate else 0.0
    return max(compute, UNSEEN_WRITES * bytes_moved / (bandwidth * 1e9))


def store(path: Path, found: dict[str, Any]) -> None:
    """Keep for the next run; a read-only home is no reason to fail."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found), encoding="utf-8")
    except OSError:
        pass
