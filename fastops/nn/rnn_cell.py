"""LSTMCell, GRUCell and RNNCell: torch.nn's, with the pointwise half of the step in one kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastops import _env
from fastops.nn._impl import set_impl, with_impl
from fastops.ops import rnn_cell as ops

__all__ = ["GRUCell", "LSTMCell", "RNNCell"]


class _Cell(torch.nn.modules.rnn.RNNCellBase):
    """What the three cells add to torch.nn's: an `impl`."""

    impl: str = "auto"

    def __init__(self, *args: Any, impl: str = "auto", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        set_impl(self, impl, ops.IMPLS)

    def extra_repr(self) -> str:
        return with_impl(self, super().extra_repr())

    def _stock(self, input: Tensor) -> bool:
        return _env.nothing_to_choose(self.impl, input) or ops.choose(self.impl, input) == "torch"

    def _check_dims(self, input: Tensor, *states: Tensor) -> None:
        lstm = isinstance(self, torch.nn.LSTMCell)
        name = "LSTMCell" if lstm else "GRUCell" if isinstance(self, torch.nn.GRUCell) else "RNNCell"
        if input.dim() not in (1, 2):
            raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
        for k, state in enumerate(states):
            if state.dim() not in (1, 2):
                what = f"hx[{k}]" if lstm else "hidden"
                raise ValueError(f"{name}: Expected {what} to be 1D or 2D, got {state.dim()}D instead")

    def _weights(self) -> tuple[Any, ...]:
        return self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh

    def _one_state(self, function: Any, input: Tensor, hx: Tensor | None) -> Tensor:
        self._check_dims(input, *(() if hx is None else (hx,)))
        batched = input.dim() == 2
        rows = input if batched else input.unsqueeze(0)
        if hx is None:
            hx = rows.new_zeros(rows.size(0), self.hidden_size)
        elif not batched:
            hx = hx.unsqueeze(0)
        result = function(rows, hx, *self._weights(), impl=self.impl)
        return result if batched else result.squeeze(0)


class LSTMCell(_Cell, torch.nn.LSTMCell):
    """torch.nn.LSTMCell with `impl` ("auto", "triton", "torch"): two matrix products and one fused kernel.

    Constructor, parameters, initialisation, call forms and errors are torch.nn.LSTMCell's. `fastops.lstm_cell` has
    the formula, dtypes and errors.
    """

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """(h', c') from input (B, I) or (I) and hx = (h, c), zeros where None."""
        if self._stock(input):
            return super().forward(input, hx)
        self._check_dims(input, *(() if hx is None else hx))
        batched = input.dim() == 2
        rows = input if batched else input.unsqueeze(0)
        if hx is None:
            zeros = rows.new_zeros(rows.size(0), self.hidden_size)
            hx = (zeros, zeros)
        elif not batched:
            hx = (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
        h, c = ops.lstm_cell(rows, hx, *self._weights(), impl=self.impl)
        return (h, c) if batched else (h.squeeze(0), c.squeeze(0))


class GRUCell(_Cell, torch.nn.GRUCell):
    """torch.nn.GRUCell with `impl` ("auto", "triton", "torch"); see `fastops.gru_cell`."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """The new h from input (B, I) or (I) and hx (B, H) or (H), zeros where None."""
        return super().forward(input, hx) if self._stock(input) else self._one_state(ops.gru_cell, input, hx)


class RNNCell(_Cell, torch.nn.RNNCell):
    """torch.nn.RNNCell (tanh or relu) with `impl` ("auto", "triton", "torch"); see `fastops.rnn_tanh_cell`."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """The new h from input (B, I) or (I) and hx (B, H) or (H), zeros where None."""
        if self._stock(input) or self.nonlinearity not in ("tanh", "relu"):
            return super().forward(input, hx)
        function = ops.rnn_tanh_cell if self.nonlinearity == "tanh" else ops.rnn_relu_cell
        return self._one_state(function, input, hx)
