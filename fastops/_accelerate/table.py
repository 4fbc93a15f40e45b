"""The one table: which torch class becomes which fastops class."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

import fastops.nn

OPS = ("conv2d_relu", "rnn", "attention")


class Row(NamedTuple):
    """A torch class, what it becomes, and by which word of `only` it is chosen."""

    torch_class: type[nn.Module]
    fastops_class: type[nn.Module]
    op: str


# nn.Sequential and nn.Conv2d are not here: what becomes of them depends on what surrounds them
ROWS = tuple(
    Row(getattr(nn, name), getattr(fastops.nn, name), op)
    for op, names in (
        ("rnn", ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")),
        ("attention", ("MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer")),
    )
    for name in names
)


def row_of(module: nn.Module) -> Row | None:
    """The row whose torch class a module is, or is derived from, as fastops' own class is."""
    for row in ROWS:
        if isinstance(module, row.torch_class):
            return row
    return None
