"""Sequences of different lengths: packed or padded, and the way from one to the other without a host sync."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastops.ops import rnn_check

__all__ = ["Packing", "check_lengths"]


def check_lengths(lengths: Tensor, batch: int, steps: int, device: torch.device) -> Tensor:
    """`lengths` as int64; an error where they are not one integer for each row, on the input's device.

    Values are checked on the CPU only: on a GPU, reading them here would wait for it.
    """
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths must be an integer tensor, got {type(lengths).__name__}")
    rnn_check.check_lengths(lengths, batch, steps, device)
    return lengths.to(torch.int64)


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
