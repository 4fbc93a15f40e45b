"""A GPU's look at the lengths of a call that stock PyTorch runs."""

from __future__ import annotations

import torch
from torch import Tensor

from fastops import _env, _library


def _fake(lengths: Tensor, steps: int) -> Tensor:
    return lengths.new_empty(lengths.shape, dtype=torch.int32)


_clamp = _library.define(
    "clamp_lengths",
    "(Tensor lengths, int steps) -> Tensor",
    "fastops.kernels.layer_norm_lstm:clamped",
    _fake,
)


def note_lengths(lengths: Tensor, steps: int) -> None:
    """Have a GPU look at lengths without waiting for it; one out of range raises ValueError in a later call.

    As the kernels do for theirs. Such lengths are only clamped where Triton is missing, where one of its kernels could
    not be launched before or FASTOPS_IMPL=torch keeps it out, and in a graph that torch.compile traces.
    """
    if lengths.device.type != "cuda" or not lengths.numel() or torch.compiler.is_compiling() or _library.BROKEN:
        return
    if _env.choose_impl("auto", _env.KNOWN_IMPLS) == "torch" or _env.why_no_triton(lengths.device) is not None:
        return
    _library.or_stock("clamp_lengths", True, lambda: _clamp(lengths, steps), lambda: None)
