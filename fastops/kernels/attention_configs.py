"""The fixed tile sizes of the attention kernels, by head dim, dtype, GPU and what the call needs; never by length.

Chosen from compiled kernels (registers, spills, instructions of the main loop), not from timings. Two families of GPU:
with 227 KiB of shared memory for a block and warp-group MMAs or better (sm_90, sm_100), and all others, whose 99 KiB
(sm_86, sm_89, sm_120; sm_80 has more) every configuration of theirs fits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Config:
    """Tile sizes and compile options of one launch.

    Attributes:
        block_m: queries of a tile.
        block_n: keys of a tile.
        warps: of a program.
        stages: depth of the software pipeline.
        lag: P V one tile late (forward).
        lean: nothing is hoisted out of the loops: more instructions, fewer registers.
        split: dK and dV in a launch each, because their accumulators do not fit together.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    lag: bool = False
    lean: bool = False
    split: bool = False

    def options(self) -> dict[str, Any]:
        """What a launch passes to Triton."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Form:
    """What of a call the choice depends on.

    Attributes:
        tma: inputs are read through descriptors.
        dropout: some is applied.
        causal: there is a right bound.
        grouped: query heads share key heads.
        packed: sequences are packed.
        keyed: a mask of the keys alone.
        banded: a left bound or ALiBi.
        scored: a softcap, or a mask with a row for each query.
    """

    tma: bool = False
    dropout: bool = False
    causal: bool = False
    grouped: bool = False
    packed: bool = False
    keyed: bool = False
    banded: bool = False
    scored: bool = False

    @property
    def plain(self) -> bool:
        """Neither bias nor bounds that all tiles must be looked at for."""
        return not (self.banded or self.scored)


def configuration(kernel: str, block_d: int, element_size: int, sm: int, form: Form) -> Config:
    """The configuration of "forward", "dkdv", "dq" or "bias"."""
    if element_size != 2:
        return _fp32(kernel, block_d)
    if kernel == "bias":
        return _bias(block_d, sm, form) if 90 <= sm < 120 else _small_bias(block_d, form)
    # at D=256 pointers leave no room beside the accumulators of a warp-group MMA
    large = 90 <= sm < 120 and (block_d <= 128 or form.tma)
    instead = None
    if large and sm >= 100:
        instead = _blackwell(kernel, block_d, form)
    elif sm >= 120:
        instead = _consumer_blackwell(kernel, block_d, form)
    if instead is not None:
        return instead
    choose = {
        "forward": _forward if large else _small_forward,
        "dkdv": _dkdv if large else _small_dkdv,
        "dq": _dq if large else _small_dq,
    }
    return choose[kernel](block_d, form)


def _bias(block_d: int, sm: int, form: Form) -> Config:
    if block_d > 128:
        return Config(64, 16 if sm >= 100 and (form.dropout or form.banded) else 32, 8, 1)
    if form.dropout and form.banded:  # their indices would spill
        return Config(64 if block_d <= 64 else 32, 32, 4, 1)
    return Config(64, 64 if block_d <= 64 else 32, 4, 1)


def _small_bias(block_d: int, form: Form) -> Config:
    if block_d <= 64:
        return Config(64, 32, 4, 1)
    if block_d <= 128:
        return Config(32, 32, 4, 1)
    return Config(16 if form.dropout and form.banded else 32, 16, 4, 1)


def _blackwell(kernel: str, block_d: int, form: Form) -> Config | None:
    """What differs from sm_90, because accumulators are in tensor memory and are read into more registers at once."""
    if kernel == "dq" and form.dropout and form.tma and block_d <= 128:
        return Config(64, 64, 4, 2, lean=block_d > 64)
    if kernel == "forward" and form.tma and form.plain:
        if block_d > 128:
            return Config(128, 64, 8, 1, lean=True)
        if block_d > 64 and form.dropout:
            return Config(128, 64, 8, 2, lag=True)
    return None


def _consumer_blackwell(kernel: str, block_d: int, form: Form) -> Config | None:
    """What differs from sm_86: for the same tiles the assembler for sm_120 needs more registers."""
    if kernel == "forward":
        return Config(64, 64, 8, 2, lean=True) if 64 < block_d <= 128 else None
    if kernel == "dkdv":
        if block_d <= 64:
            return None if form.scored else Config(64, 32, 4, 2, lean=True)
        return Config(64, 64, 8, 1, lean=True) if block_d <= 128 else Config(32, 32, 8, 1, lean=True)
    if block_d <= 64:
        return Config(64, 32, 4, 1, lean=True) if form.scored else None
    return Config(64, 32, 4, 2, lean=True) if block_d <= 128 else None


def _fp32(kernel: str, block_d: int) -> Config:
    if block_d <= 64:
        return Config(32, 32, 8, 1)
    return Config(16, 16, 8 if kernel == "forward" or block_d > 128 else 4, 1, lean=kernel != "forward")


def _forward(block_d: int, form: Form) -> Config:
    if block_d <= 64:
        return Config(64, 128, 4, 2, lag=form.tma and form.plain)
    if block_d > 128:
        return Config(128, 64, 8, 1)
    if not form.plain:
        return Config(64, 64, 4, 2)
    if form.tma:
        return Config(128, 128, 8, 2, lag=True)
    return Config(128, 64 if form.dropout or form.causal or form.packed else 128, 8, 2)


def _dkdv(block_d: int, form: Form) -> Config:
    if block_d > 128:
        return Config(64, 64, 4, 1, lean=True, split=True)
    if block_d <= 64:
        return Config(64, 64, 4, 1)  # two stages serialise the MMAs, in Triton 3.9 those of causal loops as well
    busy = form.dropout or form.causal or form.packed or form.grouped or form.keyed
    if form.tma:
        deep = busy and form.plain and not form.grouped and not form.keyed  # beside a key mask Triton 3.9 serialises
        return Config(64, 64, 4, 2 if deep else 1, lean=busy or not form.plain)
    return Config(64, 64, 4, 1, lean=True, split=busy)


def _dq(block_d: int, form: Form) -> Config:
    if block_d <= 64:
        if form.dropout and not form.tma:
            return Config(64, 64, 4, 2)
        return Config(64, 128, 4, 1 if form.scored else 2, lean=form.scored)
    if block_d > 128:
        return Config(64, 32, 4, 1, lean=True)
    if form.tma and not form.dropout and not form.scored:
        return Config(64, 128, 4, 1, lean=form.banded or form.keyed)
    if form.tma and form.scored:
        return Config(64, 64, 4, 1)  # two stages serialise the MMAs beside a mask
    return Config(64, 64, 4, 1 if form.keyed and not form.tma else 2, lean=not form.tma)


def _small_forward(block_d: int, form: Form) -> Config:
    if block_d > 128:
        return Config(32, 32, 4, 1, lean=True)
    if block_d > 64 and form.packed:
        return Config(128, 64, 8, 1)
    return Config(64, 64, 4, 2, lean=True)


def _small_dkdv(block_d: int, form: Form) -> Config:
    if block_d > 128:
        return Config(32, 32, 4, 1, lean=True)
    if block_d > 64:
        return Config(64, 64, 8, 1, lean=True) if form.dropout or form.grouped else Config(32, 64, 4, 1, lean=True)
    if form.scored:
        return Config(64, 32, 4, 1, lean=True)
    crowded = form.dropout or (form.causal and not form.packed)
    return Config(64, 32 if crowded else 64, 4, 2, lean=True)


def _small_dq(block_d: int, form: Form) -> Config:
    if block_d > 128:
        return Config(32, 32, 4, 1, lean=True)
    busy = form.dropout or form.scored or form.banded or (form.causal and not form.packed)
    return Config(64, 32 if block_d > 64 and busy else 64, 4, 2, lean=block_d <= 64 or busy or form.packed)
