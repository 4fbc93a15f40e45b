"""The registered ops of the recurrent cells in plain torch: for graphs whose kernel cannot be launched.

`gates` are what the kernels keep for backward: i, f, g, o of an LSTM after their non-linearities; r, z, n and the
recurrent half of n, before r scales it, of a GRU. Arithmetic in fp32, as in the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _chunks(product: Tensor, bias: Tensor | None, count: int) -> Sequence[Tensor]:
    return (product.float() if bias is None else product.float() + bias.float()).chunk(count, -1)


def lstm_forward(
    product_x: Tensor, product_h: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, c: Tensor
) -> tuple[Tensor, ...]:
    """`fastops::lstm_cell_forward`."""
    pairs = zip(_chunks(product_x, b_ih, 4), _chunks(product_h, b_hh, 4), strict=True)
    i, f, g, o = (x + h for x, h in pairs)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c_out = f * c.float() + i * g
    return o * c_out.tanh(), c_out, torch.cat([i, f, g, o], -1)


def lstm_backward(
    grad_h: Tensor | None, grad_c: Tensor | None, c: Tensor, c_out: Tensor, gates: Tensor
) -> tuple[Tensor, ...]:
    """`fastops::lstm_cell_backward`."""
    i, f, g, o = gates.float().chunk(4, -1)
    bent = c_out.float().tanh()
    from_h = torch.zeros_like(bent) if grad_h is None else grad_h.float()
    whole = from_h * o * (1 - bent * bent) + (0 if grad_c is None else grad_c.float())
    of_gates = (whole * g * i * (1 - i), whole * c.float() * f * (1 - f), whole * i * (1 - g * g))
    return torch.cat([*of_gates, from_h * bent * o * (1 - o)], -1), whole * f


def gru_forward(
    product_x: Tensor, product_h: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, h: Tensor
) -> tuple[Tensor, ...]:
    """`fastops::gru_cell_forward`."""
    (x_r, x_z, x_n), (h_r, h_z, recurrent) = _chunks(product_x, b_ih, 3), _chunks(product_h, b_hh, 3)
    r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    n = (x_n + r * recurrent).tanh()
    return n + z * (h.float() - n), torch.cat([r, z, n, recurrent], -1)


def gru_backward(grad: Tensor, h: Tensor, gates: Tensor) -> tuple[Tensor, ...]:
    """`fastops::gru_cell_backward`."""
    r, z, n, recurrent = gates.float().chunk(4, -1)
    grad = grad.float()
    of_n = grad * (1 - z) * (1 - n * n)
    of_r, of_z = of_n * recurrent * r * (1 - r), grad * (h.float() - n) * z * (1 - z)
    return torch.cat([of_r, of_z, of_n], -1), torch.cat([of_r, of_z, of_n * r], -1), grad * z


def rnn_forward(product_x: Tensor, product_h: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, tanh: bool) -> Tensor:
    """`fastops::rnn_cell_forward`."""
    total = _chunks(product_x, b_ih, 1)[0] + _chunks(product_h, b_hh, 1)[0]
    return total.tanh() if tanh else total.relu()


def rnn_backward(grad: Tensor, h_out: Tensor, tanh: bool) -> Tensor:
    """`fastops::rnn_cell_backward`."""
    h_out = h_out.float()
    return grad.float() * (1 - h_out * h_out) if tanh else torch.ops.aten.threshold_backward(grad.float(), h_out, 0)
