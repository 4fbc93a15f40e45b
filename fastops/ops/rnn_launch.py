"""What the registered ops run: the kernels of the engine that was chosen, or stock PyTorch.

Stock PyTorch is an engine of the ops because torch.compile cannot trace torch.lstm, torch.gru and torch.rnn; there its
backward runs the forward pass once more.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from fastops import _library
from fastops.ops.rnn_reference import stock


def split(weights: list[Tensor]) -> list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]:
    """(w_ih, w_hh, b_ih, b_hh) of each direction from the flat list, which has biases everywhere or nowhere."""
    if len(weights) > 2 and weights[2].dim() == 1:
        return [(w[0], w[1], w[2], w[3]) for w in (weights[i : i + 4] for i in range(0, len(weights), 4))]
    return [(weights[i], weights[i + 1], None, None) for i in range(0, len(weights), 2)]


def forward(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    lengths: Tensor | None,
    mode: str,
    batch_first: bool,
    batch_rows: bool,
    engine: str,
    save: bool,
) -> tuple[Tensor, ...]:
    """`fastops::rnn_forward`."""
    if engine == "torch":
        with torch.no_grad():
            output, h_n, c_n = stock(mode, input, h0, c0, split(weights), lengths, batch_first)
        nothing = [input.new_empty(0), input.new_empty(0), input.new_empty(0, dtype=torch.float32)]
        return output.contiguous(), h_n, input.new_empty(0) if c_n is None else c_n, *nothing
    return _kernels().forward(input, h0, c0, weights, lengths, mode, batch_first, batch_rows, engine, save)


def backward(
    d_output: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    lengths: Tensor | None,
    output: Tensor,
    gates: Tensor,
    before: Tensor,
    cells: Tensor,
    mode: str,
    batch_first: bool,
    batch_rows: bool,
    engine: str,
    needs: list[bool],
) -> list[Tensor]:
    """`fastops::rnn_backward`: gradients of input, h0, c0 and the weights; empty where none is wanted."""
    if engine == "torch":
        return _stock_backward(
            [d_output, d_h_n, d_c_n], input, h0, c0, weights, lengths, mode, batch_first, batch_rows, needs
        )
    if d_output is None:
        d_output = input.new_zeros(()).expand(output.shape)
    return _kernels().backward(
        d_output,
        d_h_n,
        d_c_n,
        input,
        h0,
        c0,
        weights,
        lengths,
        output,
        gates,
        before,
        cells,
        mode,
        batch_first,
        batch_rows,
        engine,
        needs,
    )


def stock_forward(*arguments: Any) -> tuple[Tensor | None, ...]:
    """`forward` by stock PyTorch, whichever engine was chosen; what only its backward pass reads is missing."""
    options: Any = (*arguments[:8], "torch", *arguments[9:])
    output, h_n, c_n, *_ = forward(*options)
    return output, h_n, c_n if arguments[5] == "LSTM" else None, None, None, None


def stock_backward(*arguments: Any) -> list[Tensor]:
    """`backward` by stock PyTorch, which needs nothing that the forward pass kept."""
    options: Any = (*arguments[:15], "torch", *arguments[16:])
    return backward(*options)


def _kernels() -> Any:
    return importlib.import_module("fastops.kernels.rnn")


def _stock_backward(
    gradients: list[Tensor | None],
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    lengths: Tensor | None,
    mode: str,
    batch_first: bool,
    batch_rows: bool,
    needs: list[bool],
) -> list[Tensor]:
    def layer(input: Tensor, h0: Tensor | None, c0: Tensor | None, *weights: Tensor) -> tuple[Tensor, ...]:
        output, h_n, c_n = stock(mode, input, h0, c0, split(list(weights)), lengths, batch_first)
        return (output, h_n) if c_n is None else (output, h_n, c_n)

    inputs = [input, h0, c0, *weights]
    found = _library.gradients_alone(layer, inputs, needs, gradients if mode == "LSTM" else gradients[:2])
    results: list[Tensor] = []
    for x, needed, gradient in zip(inputs, needs, found, strict=True):
        if x is None or not needed:
            results.append(input.new_empty(0))
        else:
            results.append(torch.zeros_like(x) if gradient is None else gradient.contiguous())
    if needs[0] and batch_rows != batch_first:
        results[0] = results[0].transpose(0, 1).contiguous().transpose(0, 1)
    return results
