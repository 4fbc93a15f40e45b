"""What a recurrent layer means, in plain torch: the step formulas, the layer, and the layer through stock PyTorch.

`reference` is a loop over time: oracle of the tests and source of second derivatives. `stock` calls the kernels PyTorch
itself uses (cuDNN on a GPU), and adds per-row lengths to them without a host sync; on a CPU, where lengths can be read,
it packs the rows where that is faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fastops import _env, _library
from fastops._sequences import ended, mirrored, without_padding
from fastops.ops.rnn_lengths import note_lengths

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None]

# a number and a weight whose product pushes a sigmoid to exactly 0 or 1 whatever else is added, and a bias that does so
# where nothing else is; fp16 reaches no further
SHUT = {torch.float16: (6.0e4, 2.0e4, 6.0e4)}
SHUT_ELSE = (1.0e18, 1.0e18, 1.0e30)

# up to which share of real steps, and from which batch size times H on, a CPU runs a packed sequence faster than the
# padded one (measured on an Intel Xeon, 1 thread). Whole steps keep oneDNN's LSTM, which has no packed form; a backward
# pass costs more packed, step by step
PACKING_PAYS = {  # of an LSTM, and with gradients
    (True, False): (0.6, 2048),
    (True, True): (0.0, 0),
    (False, False): (1.0, 0),
    (False, True): (0.35, 2048),
}


def step(
    mode: str, gates_x: Tensor, h: Tensor, c: Tensor | None, w_hh: Tensor, b_hh: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """One time step of torch's recurrent nets, after the input product `gates_x = x @ w_ih.T + b_ih`.

    LSTM (gates i, f, g, o):  c' = sigmoid(f) c + sigmoid(i) tanh(g),  h' = sigmoid(o) tanh(c')
    GRU (gates r, z, n):      n = tanh(x_n + sigmoid(r) (h W_hn^T + b_hn)),  h' = (1 - sigmoid(z)) n + sigmoid(z) h
    RNN:                      h' = tanh or relu of the sum
    """
    gates_h = F.linear(h, w_hh, b_hh)
    if mode == "LSTM":
        assert c is not None
        i, f, g, o = (gates_x + gates_h).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    if mode == "GRU":
        x_r, x_z, x_n = gates_x.chunk(3, -1)
        h_r, h_z, h_n = gates_h.chunk(3, -1)
        z = (x_z + h_z).sigmoid()
        n = (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
        return (1 - z) * n + z * h, None
    total = gates_x + gates_h
    return (total.tanh() if mode == "RNN_TANH" else total.relu()), None


def reference(
    mode: str,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Weights],
    lengths: Tensor | None = None,
    batch_first: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`recurrent_layer` as a loop over time; see there for the arguments."""
    x = input.transpose(0, 1) if batch_first else input
    steps, batch, _ = x.shape
    hidden = weights[0][1].shape[1]
    if lengths is not None:
        # what is in the padding, NaN included, must reach neither results nor gradients
        x = without_padding(x, lengths)
    outputs, last_h, last_c = [], [], []
    for direction, (w_ih, w_hh, b_ih, b_hh) in enumerate(weights):
        h = x.new_zeros(batch, hidden) if h0 is None else h0[direction]
        c = None
        if mode == "LSTM":
            c = x.new_zeros(batch, hidden) if c0 is None else c0[direction]
        gates_x = F.linear(x, w_ih, b_ih)
        rows: list[Tensor] = [h] * steps
        for t in reversed(range(steps)) if direction else range(steps):
            next_h, next_c = step(mode, gates_x[t], h, c, w_hh, b_hh)
            if lengths is None:
                h, c, rows[t] = next_h, next_c, next_h
                continue
            running = (t < lengths).unsqueeze(-1)
            h = torch.where(running, next_h, h)
            c = None if c is None or next_c is None else torch.where(running, next_c, c)
            rows[t] = torch.where(running, next_h, torch.zeros_like(next_h))
        outputs.append(torch.stack(rows))
        last_h.append(h)
        last_c.append(c)
    output = torch.cat(outputs, -1)
    c_n = torch.stack([c for c in last_c if c is not None]) if mode == "LSTM" else None
    return output.transpose(0, 1) if batch_first else output, torch.stack(last_h), c_n


def stock(
    mode: str,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Weights],
    lengths: Tensor | None = None,
    batch_first: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`recurrent_layer` through torch.lstm, torch.gru or torch.rnn_*, which run cuDNN on a GPU.

    Weights with a fifth tensor w_hr (P, H) are those of an LSTM with a projection: h has P numbers, c has H.

    Rows of different lengths need no packing: a reverse direction reads each row reversed within its length, outputs
    past the end are zeroed, h_n is picked from the output, and for c_n an extra input column, huge in the padding,
    shuts the input gate and opens the forget gate, so that the cell state passes through the padding unchanged.
    """
    if lengths is not None:
        call = (mode, input, h0, c0, weights, lengths, batch_first)
        return _stock_packed(*call) if _packing_pays(*call) else _stock_ragged(*call)
    return _torch_layer(mode, (input,), input.shape[0 if batch_first else 1], h0, c0, weights, batch_first)


def _torch_layer(
    mode: str,
    data: Any,
    batch: int,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Weights],
    *batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """torch.lstm, torch.gru or torch.rnn_* of a padded input, or of the data and batch sizes of a packed one."""
    zeros = data[0].new_zeros
    h0 = zeros(len(weights), batch, weights[0][1].shape[1]) if h0 is None else h0
    flat = [w for direction in weights for w in direction if w is not None]
    has_bias = weights[0][2] is not None
    options = (has_bias, 1, 0.0, False, len(weights) == 2, *batch_first)
    functions = {"LSTM": torch.lstm, "GRU": torch.gru, "RNN_TANH": torch.rnn_tanh, "RNN_RELU": torch.rnn_relu}
    function: Any = functions[mode]
    if mode == "LSTM":
        c0 = zeros(len(weights), batch, weights[0][0].shape[0] // 4) if c0 is None else c0
        return function(*data, (h0, c0), flat, *options)
    output, h_n = function(*data, h0, flat, *options)
    return output, h_n, None


def _packing_pays(
    mode: str,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Weights],
    lengths: Tensor,
    batch_first: bool,
) -> bool:
    batch, steps = input.shape[:2] if batch_first else (input.shape[1], input.shape[0])
    # a packed LSTM keeps its dtype under autocast, a padded one does not
    if input.device.type != "cpu" or _env.autocast_dtype(input.device) is not None or not _env.may_read_values():
        return False
    if _library.transformed():  # torch packs no tensors of that kind
        return False
    each = lengths.tolist()
    if not each or not all(0 < length <= steps for length in each):
        return False
    training = _library.wants_grad(input, h0, c0, *(w for own in weights for w in own))
    most, least = PACKING_PAYS[mode == "LSTM", training]
    return sum(each) <= most * batch * steps and batch * weights[0][1].shape[0] // GATES[mode] >= least


def _stock_packed(
    mode: str,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Weights],
    lengths: Tensor,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    batch, steps = input.shape[:2] if batch_first else (input.shape[1], input.shape[0])
    packed = pack_padded_sequence(input, lengths, batch_first, enforce_sorted=False)
    there, back = packed.sorted_indices, packed.unsorted_indices
    assert there is not None
    assert back is not None
    h0, c0 = (None if x is None else x.index_select(1, there) for x in (h0, c0))
    data, h_n, c_n = _torch_layer(mode, (packed.data, packed.batch_sizes), batch, h0, c0, weights)
    output, _ = pad_packed_sequence(packed._replace(data=data), batch_first, total_length=steps)
    return output, h_n.index_select(1, back), None if c_n is None else c_n.index_select(1, back)


def _stock_ragged(
    mode: str,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Weights],
    lengths: Tensor,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    x = input.transpose(0, 1) if batch_first else input
    steps, batch, _ = x.shape
    seen, hidden = weights[0][1].shape[1], weights[0][0].shape[0] // GATES[mode]
    note_lengths(lengths, steps)
    lengths = lengths.to(torch.int64).clamp(0, steps)  # read as indices; on a GPU nobody has looked at them
    padding = ended(lengths, steps).unsqueeze(-1)
    x = x.masked_fill(padding, 0)
    last = (lengths - 1).clamp(min=0).view(1, batch, 1).expand(1, batch, seen)
    outputs, last_h, last_c = [], [], []
    # of a projection, autocast casts all of them on the way
    mark, weight, most = SHUT.get(_env.autocast_dtype(x.device) or x.dtype, SHUT_ELSE)
    for direction, each in enumerate(weights):
        w_ih, w_hh, b_ih, b_hh = each[:4]
        own_x = mirrored(x, lengths) if direction else x
        if mode == "LSTM":
            shut = w_ih.new_zeros(4, hidden)
            shut[0], shut[1] = -weight, weight
            own_x = torch.cat([own_x, mark * padding.to(x.dtype)], -1)
            w_ih = torch.cat([w_ih, shut.view(-1, 1)], -1)
            # an infinite one would win
            b_ih, b_hh = (None if b is None else b.clamp(-most, most) for b in (b_ih, b_hh))
        own_h0 = None if h0 is None else h0[direction : direction + 1]
        own_c0 = None if c0 is None else c0[direction : direction + 1]
        y, _, c_n = stock(mode, own_x, own_h0, own_c0, [(w_ih, w_hh, b_ih, b_hh, *each[4:])])  # type: ignore[list-item]
        h_n = y.gather(0, last)
        start = y.new_zeros(1, batch, seen) if own_h0 is None else own_h0.to(y.dtype)
        last_h.append(torch.where((lengths > 0).view(1, batch, 1), h_n, start))
        last_c.append(c_n)
        y = mirrored(y, lengths) if direction else y
        outputs.append(y.masked_fill(padding, 0))
    output = torch.cat(outputs, -1)
    c_n = torch.cat([c for c in last_c if c is not None]) if mode == "LSTM" else None
    return output.transpose(0, 1) if batch_first else output, torch.cat(last_h), c_n
