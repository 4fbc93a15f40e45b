"""Sequences of different lengths: packed or padded, and the way from one to the other without a host sync."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

__all__ = ["Packing", "check_lengths"]

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def check_lengths(lengths: Tensor, batch: int, steps: int, device: torch.device) -> Tensor:
    """`lengths` as int64 in [0, steps]; ValueError where that is not what was given.

    Values are checked on the CPU only: on a GPU, reading them would wait for it. There they are clamped.
    """
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths must be an integer tensor, got {type(lengths).__name__}")
    if lengths.dtype not in INTEGERS:
        raise ValueError(f"lengths must be an integer tensor, got {lengths.dtype}")
    if lengths.shape != (batch,):
        raise ValueError(f"lengths must have shape ({batch},), one per batch row, got {tuple(lengths.shape)}")
    if lengths.device != device:
        raise ValueError(f"lengths are on {lengths.device}, the input is on {device}; they must be on one device")
    lengths = lengths.to(torch.int64)
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = ((lengths < 0) | (lengths > steps)).nonzero()
        if len(wrong):
            row = int(wrong[0])
            got = int(lengths[row])
            raise ValueError(f"lengths must be between 0 and the input's {steps} steps, got {got} in batch row {row}")
        return lengths
    return lengths.clamp(0, steps)


class Packing:
    """Where the rows of a PackedSequence are in a padded (T, B, ...) tensor.

    `batch_sizes` are on the CPU by contract, so T, B and the number of rows are known without asking a GPU; the
    indices are made on it.

    Attributes:
        steps: T.
        batch: B.
        lengths: (B,) int64 on the data's device, in the sorted order of the packed data.
    """

    def __init__(self, packed: PackedSequence) -> None:
        device, rows = packed.data.device, packed.data.shape[0]
        self.steps = packed.batch_sizes.shape[0]
        self.batch = int(packed.batch_sizes[0])
        sizes = packed.batch_sizes.to(device, non_blocking=True)
        time = torch.arange(self.steps, device=device)
        of_row = torch.repeat_interleave(time, sizes, output_size=rows)
        first = sizes.cumsum(0) - sizes
        self.place = of_row * self.batch + torch.arange(rows, device=device) - first[of_row]
        self.lengths = (sizes.unsqueeze(1) > torch.arange(self.batch, device=device)).sum(0)

    def pad(self, data: Tensor) -> Tensor:
        """(rows, F) -> (T, B, F), 0 in the padding."""
        features = data.shape[1:]
        padded = data.new_zeros(self.steps * self.batch, *features).index_copy(0, self.place, data)
        return padded.unflatten(0, (self.steps, self.batch))

    def pack(self, padded: Tensor) -> Tensor:
        """(T, B, F) -> (rows, F)."""
        return padded.flatten(0, 1).index_select(0, self.place)
