"""What a layer-norm LSTM means, in plain torch: the loop over time, and its two registered ops without kernels.

The ops are for graphs whose kernels cannot be launched. Shapes as in `fastops.ops.layer_norm_lstm`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastops import _library
from fastops._sequences import mirrored, without_padding


def reference(
    gates: Tensor,
    w_hh: Tensor,
    gain_hh: Tensor,
    gain_c: Tensor,
    bias_c: Tensor,
    h0: Tensor,
    c0: Tensor,
    mask_h: Tensor | None,
    mask_c: Tensor | None,
    lengths: Tensor | None,
    keep_h: float,
    keep_c: float,
    eps: float,
    reverse: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, h_n and c_n, as a loop over time. `keep` is how much of a state is replaced: 1 without zoneout."""
    x, lengths = in_order(gates.transpose(0, 1) if batch_first else gates, lengths, reverse)
    h, c, rows = h0, c0, []
    for t in range(len(x)):
        recurrent = F.linear(h, w_hh)
        row, h, c = step(
            x[t], recurrent, gain_hh, gain_c, bias_c, h, c, t, mask_h, mask_c, lengths, keep_h, keep_c, eps
        )
        rows.append(row)
    output = torch.stack(rows) if rows else x.new_zeros(0, x.shape[1], w_hh.shape[1])
    output, _ = in_order(output, lengths, reverse)
    return output.transpose(0, 1) if batch_first else output, h, c


def in_order(x: Tensor, lengths: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor | None]:
    """(T, B, ...) in the order in which steps are run, or back from it, zeros for the padding; lengths in range."""
    if lengths is None:
        return x.flip(0) if reverse else x, None
    lengths = lengths.clamp(0, x.shape[0])  # read as indices; on a GPU nobody has looked at them
    x = without_padding(x, lengths)
    return mirrored(x, lengths) if reverse else x, lengths


def step(
    x: Tensor,
    product: Tensor,
    gain_hh: Tensor,
    gain_c: Tensor,
    bias_c: Tensor,
    h: Tensor,
    c: Tensor,
    t: int,
    mask_h: Tensor | None,
    mask_c: Tensor | None,
    lengths: Tensor | None,
    keep_h: float,
    keep_c: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Step t, from both halves of the gates, (B, 4H) each: its row of the output, the new h and the new c."""
    i, f, g, o = (x + F.layer_norm(product, product.shape[-1:], gain_hh, None, eps)).chunk(4, -1)
    next_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    next_h = o.sigmoid() * F.layer_norm(next_c, next_c.shape[-1:], gain_c, bias_c, eps).tanh()
    next_h, next_c = _zone(next_h, h, mask_h, t, keep_h), _zone(next_c, c, mask_c, t, keep_c)
    if lengths is None:
        return next_h, next_h, next_c
    running = (t < lengths).unsqueeze(-1)
    row = torch.where(running, next_h, torch.zeros_like(next_h))
    return row, torch.where(running, next_h, h), torch.where(running, next_c, c)


def _zone(new: Tensor, old: Tensor, mask: Tensor | None, t: int, keep: float) -> Tensor:
    if mask is not None:
        return torch.where(mask[t], new, old)
    return new if keep == 1.0 else keep * new + (1.0 - keep) * old


def stock_forward(
    gates: Tensor,
    w_hh: Tensor,
    gain_hh: Tensor,
    gain_c: Tensor,
    bias_c: Tensor,
    h0: Tensor,
    c0: Tensor,
    mask_h: Tensor | None,
    mask_c: Tensor | None,
    lengths: Tensor | None,
    keep_h: float,
    keep_c: float,
    eps: float,
    reverse: bool,
    batch_first: bool,
    save: bool,
    engine: str,
) -> tuple[Tensor | None, ...]:
    """`fastops::layer_norm_lstm_forward`, with the states and products that its backward pass reads."""
    x, lengths = in_order(gates.transpose(0, 1) if batch_first else gates, lengths, reverse)
    rest = (mask_h, mask_c, lengths, keep_h, keep_c, eps)
    rows, products, hs, cs = [], [], [h0], [c0]
    for t in range(len(x)):
        products.append(F.linear(hs[-1], w_hh))
        row, h, c = step(x[t], products[-1], gain_hh, gain_c, bias_c, hs[-1], cs[-1], t, *rest)
        rows.append(row)
        hs.append(h)
        cs.append(c)
    output, _ = in_order(torch.stack(rows) if rows else x.new_zeros(0, x.shape[1], h0.shape[1]), lengths, reverse)
    output = output.transpose(0, 1) if batch_first else output
    if not save:
        return output, hs[-1], cs[-1], None, None, None
    product = torch.stack(products) if products else x
    return output, hs[-1], cs[-1], torch.stack(hs), torch.stack(cs), product


def stock_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    gates: Tensor,
    w_hh: Tensor,
    gain_hh: Tensor,
    gain_c: Tensor,
    bias_c: Tensor,
    c: Tensor,
    product: Tensor,
    mask_h: Tensor | None,
    mask_c: Tensor | None,
    lengths: Tensor | None,
    keep_h: float,
    keep_c: float,
    eps: float,
    reverse: bool,
    batch_first: bool,
    engine: str,
) -> tuple[Tensor, ...]:
    """`fastops::layer_norm_lstm_backward`: a step at a time in fp32, from what the forward pass kept."""
    x, ragged = in_order(gates.transpose(0, 1) if batch_first else gates, lengths, reverse)
    given = None
    if grad_output is not None:
        given, _ = in_order(grad_output.transpose(0, 1) if batch_first else grad_output, lengths, reverse)
    through_h = torch.zeros_like(c[0]) if grad_h_n is None else grad_h_n.float()
    through_c = torch.zeros_like(c[0]) if grad_c_n is None else grad_c_n.float()
    of_gates, of_products = torch.zeros_like(x, dtype=torch.float32), torch.zeros_like(product, dtype=torch.float32)
    sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in (gain_hh, gain_c, bias_c)]
    for t in reversed(range(len(x))):

        def one(*tensors: Tensor, t: int = t) -> tuple[Tensor, ...]:
            both: Any = (*tensors, t, mask_h, mask_c, ragged, keep_h, keep_c, eps)
            return step(*both)

        # h itself counts only where zoneout keeps it, and there by its gradient alone
        inputs = [each.float() for each in (x[t], product[t], gain_hh, gain_c, bias_c, torch.zeros_like(c[t]), c[t])]
        wanted = (None if given is None else given[t].float(), through_h, through_c)
        found = _library.gradients_alone(one, inputs, [True] * 7, wanted)
        of_gates[t], of_products[t], *weights, of_h, of_c = (
            torch.zeros_like(each) if gradient is None else gradient
            for each, gradient in zip(inputs, found, strict=True)
        )
        sums = [total + each for total, each in zip(sums, weights, strict=True)]
        through_h, through_c = of_h + of_products[t] @ w_hh.float(), of_c
    of_gates, _ = in_order(of_gates, lengths, reverse)
    of_gates = of_gates.transpose(0, 1) if batch_first else of_gates
    return of_gates, of_products, through_h, through_c, torch.cat(sums)
