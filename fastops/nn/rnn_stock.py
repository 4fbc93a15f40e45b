"""Stock PyTorch's recurrent layers as seen by torch.compile: one opaque op, where tracing would unroll every time step.

torch.compile refuses torch.nn.LSTM, GRU and RNN, and their subclasses, whatever their forward does: it stops the
graph at the module. For the subclasses in fastops.nn that refusal is lifted here, and only for them; a torch.nn.LSTM
in the same model is treated as ever. What would then be traced through stock PyTorch is called through
`fastops::stock_rnn_forward`. Its backward op runs stock's forward again, with gradients, so that a compiled training
step through it costs one forward more than an eager one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastops import _library

__all__ = ["stock_layer", "trace_through"]

FUNCTIONS: dict[str, Any] = {"LSTM": torch.lstm, "GRU": torch.gru, "RNN_TANH": torch.rnn_tanh, "RNN_RELU": torch.rnn_relu}


def run(
    input: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], lengths: Tensor | None, mode: str
) -> list[Tensor]:
    """Output (T, B, D H), h_n and, for an LSTM, c_n of one layer through torch.lstm and its kin.

    Args:
        input: (T, B, I).
        states: h0 and, for an LSTM, c0: (D, B, H), D directions.
        weights: w_ih, w_hh and, where there are biases, b_ih, b_hh, for each direction.
        lengths: (B,) or None.
        mode: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU".
    """
    from fastops.ops.rnn import recurrent_layer

    directions = states[0].shape[0]
    per_direction = len(weights) // directions
    if lengths is None:
        hx = states if mode == "LSTM" else states[0]
        has_bias = per_direction == 4
        return list(FUNCTIONS[mode](input, hx, weights, has_bias, 1, 0.0, False, directions == 2, False))
    grouped = []
    for k in range(0, len(weights), per_direction):
        w_ih, w_hh, *biases = weights[k : k + per_direction]
        grouped.append((w_ih, w_hh, *(biases or (None, None))))
    c0 = states[1] if mode == "LSTM" else None
    found = recurrent_layer(mode, input, states[0], c0, grouped, lengths, impl="torch")  # type: ignore[arg-type]
    return [tensor for tensor in found if tensor is not None]


def forward(
    input: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], lengths: Tensor | None, mode: str
) -> list[Tensor]:
    """Launcher of the op: `run` without a graph."""
    with torch.no_grad(), torch.autocast(input.device.type, enabled=False):
        return [x.clone(memory_format=torch.contiguous_format) for x in run(input, states, weights, lengths, mode)]


def backward(
    grads: Sequence[Tensor],
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    mode: str,
) -> list[Tensor]:
    """Gradients of input, states and weights: stock's forward with a graph, and stock's backward."""
    with torch.enable_grad(), torch.autocast(input.device.type, enabled=False):
        leaves = [x.detach().requires_grad_() for x in (input, *states, *weights)]
        count = 1 + len(states)
        outputs = run(leaves[0], leaves[1:count], leaves[count:], lengths, mode)
        found = torch.autograd.grad(outputs, leaves, list(grads), allow_unused=True)
    return [
        x.new_zeros(x.shape) if g is None else g.clone(memory_format=torch.contiguous_format)
        for x, g in zip(leaves, found, strict=True)
    ]


def _forward_fake(
    input: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], lengths: Tensor | None, mode: str
) -> list[Tensor]:
    directions, batch, hidden = states[0].shape
    output = input.new_empty((input.shape[0], batch, directions * hidden))
    return [output, *(input.new_empty((directions, batch, hidden)) for _ in states)]


def _backward_fake(
    grads: Sequence[Tensor],
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    mode: str,
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (input, *states, *weights)]


_TAKES = "Tensor input, Tensor[] states, Tensor[] weights, Tensor? lengths, str mode"
_forward = _library.define(
    "stock_rnn_forward", f"({_TAKES}) -> Tensor[]", "fastops.nn.rnn_stock:forward", _forward_fake
)
_backward = _library.define(
    "stock_rnn_backward", f"(Tensor[] grads, {_TAKES}) -> Tensor[]", "fastops.nn.rnn_stock:backward", _backward_fake
)


class _StockLayer(torch.autograd.Function):
    @staticmethod
    def forward(mode: str, states: int, lengths: Tensor | None, input: Tensor, *rest: Tensor) -> Any:
        return tuple(_forward(input, list(rest[:states]), list(rest[states:]), lengths, mode))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mode, ctx.states, lengths, *tensors = inputs
        ctx.save_for_backward(lengths, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        lengths, input, *rest = ctx.saved_tensors
        states, weights = rest[: ctx.states], rest[ctx.states :]
        return None, None, None, *_backward(list(grads), input, states, weights, lengths, ctx.mode)


def stock_layer(
    input: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], lengths: Tensor | None, mode: str
) -> tuple[Tensor, ...]:
    """`run` as one op to torch.compile."""
    return _StockLayer.apply(mode, len(states), lengths, input, *states, *weights)


def trace_through(classes: tuple[type, ...]) -> None:
    """Let torch.compile trace the forward of modules of these classes, as it does for any other module.

    Dynamo asks `isinstance(module, (RNN, GRU, LSTM)) and not config.allow_rnn` where it wraps a module. The switch is
    global; here it is thrown for the one question. Where a future PyTorch has no such method, nothing is changed.
    """

    def patch(builder: Any) -> None:
        wrap = getattr(getattr(builder, "VariableBuilder", None), "wrap_module", None)
        if wrap is None or not hasattr(builder.config, "allow_rnn"):
            return

        def wrap_module(self: Any, value: torch.nn.Module) -> Any:
            if not isinstance(value, classes):
                return wrap(self, value)
            with builder.config.patch(allow_rnn=True):
                return wrap(self, value)

        builder.VariableBuilder.wrap_module = wrap_module

    _library.after_import("torch._dynamo.variables.builder", patch)
