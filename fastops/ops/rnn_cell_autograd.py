"""The recurrent cells past their two products: formulas, registered ops, and the autograd.Functions over them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastops import _library
from fastops.ops import rnn_cell_stock


def _sum(product: Tensor, bias: Tensor | None) -> Tensor:
    return product if bias is None else product + bias


def lstm_reference(
    product_x: Tensor, product_h: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, c: Tensor
) -> tuple[Tensor, Tensor]:
    """New h and c from the two products."""
    i, f, g, o = (_sum(product_x, b_ih) + _sum(product_h, b_hh)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru_reference(product_x: Tensor, product_h: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, h: Tensor) -> Tensor:
    """New h from the two products."""
    x_r, x_z, x_n = _sum(product_x, b_ih).chunk(3, -1)
    h_r, h_z, h_n = _sum(product_h, b_hh).chunk(3, -1)
    n = (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
    return n + (x_z + h_z).sigmoid() * (h - n)


def rnn_reference(product_x: Tensor, product_h: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, tanh: bool) -> Tensor:
    """New h from the two products."""
    total = _sum(product_x, b_ih) + _sum(product_h, b_hh)
    return total.tanh() if tanh else total.relu()


def _lstm_forward_fake(
    product_x: Tensor, product_h: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, c: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    batch, hidden = c.shape
    return c.new_empty((batch, hidden)), c.new_empty((batch, hidden)), c.new_empty((batch, 4 * hidden))


def _lstm_backward_fake(
    grad_h: Tensor | None, grad_c: Tensor | None, c: Tensor, c_out: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor]:
    batch, hidden = c.shape
    return c.new_empty((batch, 4 * hidden)), c.new_empty((batch, hidden))


def _gru_forward_fake(
    product_x: Tensor, product_h: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, h: Tensor
) -> tuple[Tensor, Tensor]:
    batch, hidden = h.shape
    return h.new_empty((batch, hidden)), h.new_empty((batch, 4 * hidden))


def _gru_backward_fake(grad: Tensor, h: Tensor, gates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, hidden = h.shape
    grad_x, grad_h = h.new_empty((batch, 3 * hidden)), h.new_empty((batch, 3 * hidden))
    return grad_x, grad_h, h.new_empty((batch, hidden))


def _rnn_forward_fake(
    product_x: Tensor, product_h: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, tanh: bool
) -> Tensor:
    return product_x.new_empty(product_x.shape)


def _rnn_backward_fake(grad: Tensor, h_out: Tensor, tanh: bool) -> Tensor:
    return h_out.new_empty(h_out.shape)


def _no_flops(*_: Any, **__: Any) -> int:
    """The products are torch's, and counted there; the pointwise rest is not counted, as for torch's own."""
    return 0


_KERNELS = "fastops.kernels.rnn_cell:"
_PRODUCTS = "Tensor product_x, Tensor product_h, Tensor? b_ih, Tensor? b_hh"
lstm_forward_op = _library.define(
    "lstm_cell_forward",
    f"({_PRODUCTS}, Tensor c) -> (Tensor, Tensor, Tensor)",
    _KERNELS + "lstm_cell_forward",
    _lstm_forward_fake,
    _no_flops,
    ("rnn_cell", rnn_cell_stock.lstm_forward),
)
lstm_backward_op = _library.define(
    "lstm_cell_backward",
    "(Tensor? grad_h, Tensor? grad_c, Tensor c, Tensor c_out, Tensor gates) -> (Tensor, Tensor)",
    _KERNELS + "lstm_cell_backward",
    _lstm_backward_fake,
    _no_flops,
    ("rnn_cell", rnn_cell_stock.lstm_backward),
)
gru_forward_op = _library.define(
    "gru_cell_forward",
    f"({_PRODUCTS}, Tensor h) -> (Tensor, Tensor)",
    _KERNELS + "gru_cell_forward",
    _gru_forward_fake,
    _no_flops,
    ("rnn_cell", rnn_cell_stock.gru_forward),
)
gru_backward_op = _library.define(
    "gru_cell_backward",
    "(Tensor grad, Tensor h, Tensor gates) -> (Tensor, Tensor, Tensor)",
    _KERNELS + "gru_cell_backward",
    _gru_backward_fake,
    _no_flops,
    ("rnn_cell", rnn_cell_stock.gru_backward),
)
rnn_forward_op = _library.define(
    "rnn_cell_forward",
    f"({_PRODUCTS}, bool tanh) -> Tensor",
    _KERNELS + "rnn_cell_forward",
    _rnn_forward_fake,
    _no_flops,
    ("rnn_cell", rnn_cell_stock.rnn_forward),
)
rnn_backward_op = _library.define(
    "rnn_cell_backward",
    "(Tensor grad, Tensor h_out, bool tanh) -> Tensor",
    _KERNELS + "rnn_cell_backward",
    _rnn_backward_fake,
    _no_flops,
    ("rnn_cell", rnn_cell_stock.rnn_backward),
)


def _bias_gradients(
    grad_x: Tensor, grad_h: Tensor, needs_input_grad: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    grad_b_ih = grad_x.sum(0) if needs_input_grad[2] else None
    if not needs_input_grad[3]:
        return grad_b_ih, None
    # equal, and yet not one tensor: accumulation may write into it
    return grad_b_ih, grad_h.sum(0) if grad_b_ih is None or grad_h is not grad_x else grad_b_ih.clone()


class LSTMStep(torch.autograd.Function):
    """New h and c of an LSTM, and what backward keeps, from the two products."""

    @staticmethod
    def forward(
        product_x: Tensor, product_h: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, c: Tensor, auto: bool
    ) -> Any:
        return _library.for_graph(lstm_forward_op, auto)(product_x, product_h, b_ih, b_hh, c)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        *tensors, ctx.auto = inputs
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*tensors, output[1], output[2])

    @staticmethod
    def backward(ctx: Any, grad_h: Tensor | None, grad_c: Tensor | None, _: Any) -> Any:
        product_x, product_h, b_ih, b_hh, c, c_out, gates = ctx.saved_tensors

        def stock(again: bool = False) -> Any:
            inputs = (product_x, product_h, b_ih, b_hh, c)
            wanted = ctx.needs_input_grad[:5]
            return _library.reference_gradients(lstm_reference, inputs, wanted, (grad_h, grad_c), again)

        def kernels() -> Any:
            if grad_h is None and grad_c is None:
                return None, None, None, None, None
            grad_gates, grad_c_in = _library.for_graph(lstm_backward_op, ctx.auto)(grad_h, grad_c, c, c_out, gates)
            return grad_gates, grad_gates, *_bias_gradients(grad_gates, grad_gates, ctx.needs_input_grad), grad_c_in

        if _library.differentiable_again():
            return *stock(again=True), None
        return *_library.or_stock("rnn_cell", ctx.auto, kernels, stock), None


class GRUStep(torch.autograd.Function):
    """New h of a GRU, and what backward keeps, from the two products."""

    @staticmethod
    def forward(
        product_x: Tensor, product_h: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, h: Tensor, auto: bool
    ) -> Any:
        return _library.for_graph(gru_forward_op, auto)(product_x, product_h, b_ih, b_hh, h)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.auto = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        product_x, product_h, b_ih, b_hh, h, gates = ctx.saved_tensors

        def stock(again: bool = False) -> Any:
            inputs = (product_x, product_h, b_ih, b_hh, h)
            return _library.reference_gradients(gru_reference, inputs, ctx.needs_input_grad[:5], grad, again)

        def kernels() -> Any:
            grad_x, grad_h, grad_state = _library.for_graph(gru_backward_op, ctx.auto)(grad, h, gates)
            return grad_x, grad_h, *_bias_gradients(grad_x, grad_h, ctx.needs_input_grad), grad_state

        if _library.differentiable_again():
            return *stock(again=True), None
        return *_library.or_stock("rnn_cell", ctx.auto, kernels, stock), None


class RNNStep(torch.autograd.Function):
    """New h of a vanilla recurrent net from the two products."""

    @staticmethod
    def forward(
        product_x: Tensor, product_h: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, tanh: bool, auto: bool
    ) -> Any:
        return _library.for_graph(rnn_forward_op, auto)(product_x, product_h, b_ih, b_hh, tanh)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.tanh, ctx.auto = inputs[4:]
        ctx.save_for_backward(*inputs[:4], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        product_x, product_h, b_ih, b_hh, h_out = ctx.saved_tensors

        def stock(again: bool = False) -> Any:
            formula = functools.partial(rnn_reference, tanh=ctx.tanh)
            inputs = (product_x, product_h, b_ih, b_hh)
            return _library.reference_gradients(formula, inputs, ctx.needs_input_grad[:4], grad, again)

        def kernels() -> Any:
            grad_gate = _library.for_graph(rnn_backward_op, ctx.auto)(grad, h_out, ctx.tanh)
            return grad_gate, grad_gate, *_bias_gradients(grad_gate, grad_gate, ctx.needs_input_grad)

        if _library.differentiable_again():
            return *stock(again=True), None, None
        return *_library.or_stock("rnn_cell", ctx.auto, kernels, stock), None, None
