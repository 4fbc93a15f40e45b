"""The fixed tile sizes of the attention kernels, by head dim, dtype, GPU and what the call needs; never by length.

Chosen from compiled kernels (registers, spills, instructions of the main loop), not from timings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Config:
    """Tile sizes and compile options of one launch."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    lag: bool = False

    def options(self) -> dict[str, Any]:
        """What a launch passes to Triton."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


def configuration(
    kernel: str, block_d: int, element_size: int, *, sm: int, plain: bool, dropout: bool, causal: bool, tma: bool
) -> Config:
    """The configuration of "forward", "dkdv", "dq" or "bias".

    `plain`: no mask, ALiBi, softcap, window, query lengths or packing: the loops the static gate watches.
    """
    if element_size != 2:
        return Config(32, 32, 4, 1)
    if kernel == "bias":
        return Config(64, 64, 4, 1) if block_d <= 128 else Config(32, 32, 4, 1)
    if kernel == "forward":
        if block_d <= 64:
            return Config(64, 128, 4, 2, lag=plain and tma) if sm >= 90 else Config(64, 64, 4, 2)
        if block_d == 128:
            return Config(128, 128, 8, 2, lag=plain and tma) if sm >= 90 and plain else Config(64, 64, 4, 2)
        return Config(64, 64, 8, 1)
    if kernel == "dkdv":
        if block_d <= 64:
            # two stages serialise the MMAs of the plain loop in Triton 3.7 and 3.9
            return Config(64, 64, 4, 2 if dropout or causal else 1)
        if block_d == 128:
            if dropout:
                return Config(32, 64, 4, 2)
            return Config(64, 64, 4, 2 if causal else 1)
        return Config(32, 64, 8, 1)
    if block_d <= 64:
        return Config(64, 128, 4, 2) if sm >= 90 else Config(64, 64, 4, 2)
    if block_d == 128:
        return Config(64, 128, 4, 1) if sm >= 90 and plain and not dropout else Config(64, 64, 4, 2)
    return Config(64, 32, 8, 1)
