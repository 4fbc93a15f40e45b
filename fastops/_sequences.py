"""Rows of different lengths in plain torch: what the references, the modules and the launchers mean by padding."""

from __future__ import annotations

import torch
from torch import Tensor


def ended(lengths: Tensor, steps: int, batch_first: bool = False) -> Tensor:
    """(T, B) or (B, T) bool, True where a row of the batch has ended."""
    time = torch.arange(steps, device=lengths.device)
    return time >= lengths.unsqueeze(-1) if batch_first else time.unsqueeze(-1) >= lengths


def without_padding(x: Tensor, lengths: Tensor, batch_first: bool = False) -> Tensor:
    """(T, B, F) or (B, T, F) with zeros past each row's end: NaN there would reach gradients, as a factor of zero."""
    steps = x.shape[1 if batch_first else 0]
    return x.masked_fill(ended(lengths, steps, batch_first).unsqueeze(-1), 0)


def mirrored(x: Tensor, lengths: Tensor) -> Tensor:
    """(T, B, F) with each row reversed within its length, which must be within 0..T, and its padding where it was."""
    steps = x.shape[0]
    time = torch.arange(steps, device=x.device).unsqueeze(-1)
    mirror = torch.where(ended(lengths, steps), time, lengths - 1 - time)
    return x.gather(0, mirror.unsqueeze(-1).expand_as(x))
