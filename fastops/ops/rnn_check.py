"""What a recurrent layer refuses, with torch's error types and messages that name the argument and the shapes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastops.ops.rnn_reference import GATES, Weights


def check(
    mode: str,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Weights],
    lengths: Tensor | None,
    batch_first: bool,
) -> None:
    """Raise for what no engine can compute. Reads metadata only, and the values of lengths on the CPU."""
    if mode not in GATES:
        raise ValueError(f"mode must be one of {', '.join(GATES)}, got {mode!r}")
    if input.dim() != 3:
        raise RuntimeError(f"input must have 3 dimensions, got {input.dim()}: {tuple(input.shape)}")
    if len(weights) not in (1, 2):
        raise ValueError(f"weights must hold one or two directions, got {len(weights)}")
    hidden = weights[0][1].shape[-1]
    gates = GATES[mode]
    batch, steps = (input.shape[0], input.shape[1]) if batch_first else (input.shape[1], input.shape[0])
    if steps == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    has_bias = weights[0][2] is not None
    for direction, (w_ih, w_hh, b_ih, b_hh) in enumerate(weights):
        if w_ih.dim() != 2 or w_ih.shape[0] != gates * hidden:
            raise RuntimeError(
                f"w_ih of direction {direction} must be ({gates * hidden}, input size) for {mode} with hidden size "
                f"{hidden}, got {tuple(w_ih.shape)}"
            )
        if w_ih.shape[1] != input.shape[-1]:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {w_ih.shape[1]}, got {input.shape[-1]}"
            )
        if tuple(w_hh.shape) != (gates * hidden, hidden):
            raise RuntimeError(
                f"w_hh of direction {direction} must be {(gates * hidden, hidden)}, got {tuple(w_hh.shape)}"
            )
        for name, bias in (("b_ih", b_ih), ("b_hh", b_hh)):
            if (bias is not None) != has_bias:
                raise ValueError("biases must be given for both products of all directions, or for none")
            if bias is not None and tuple(bias.shape) != (gates * hidden,):
                raise RuntimeError(
                    f"{name} of direction {direction} must be {(gates * hidden,)}, got {tuple(bias.shape)}"
                )
    expected = (len(weights), batch, hidden)
    if h0 is not None and tuple(h0.shape) != expected:
        raise RuntimeError(f"Expected hidden size {expected}, got {list(h0.shape)}")
    if c0 is not None and mode != "LSTM":
        raise ValueError(f"c0 is for an LSTM, mode is {mode}")
    if c0 is not None and tuple(c0.shape) != expected:
        raise RuntimeError(f"Expected hidden[1] size {expected}, got {list(c0.shape)}")
    _check_places(input, h0, c0, weights)
    if lengths is not None:
        check_lengths(lengths, batch, steps, input.device)


def check_lengths(lengths: Tensor, batch: int, steps: int, device: torch.device) -> None:
    """Raise ValueError unless lengths is (B,), integer, on the device and, where that needs no GPU, within 0..T."""
    if lengths.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise ValueError(f"lengths must be an integer tensor, got {lengths.dtype}")
    if tuple(lengths.shape) != (batch,):
        raise ValueError(f"lengths must have shape ({batch},), one per batch row, got {tuple(lengths.shape)}")
    if lengths.device != device:
        raise ValueError(f"lengths must be on the input's device {device}, got {lengths.device}")
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling():
        for row, length in enumerate(lengths.tolist()):
            if not 0 <= length <= steps:
                raise ValueError(f"lengths[{row}] must be between 0 and T = {steps}, got {length}")


def lengths_of(lengths: Tensor | None) -> Tensor | None:
    """Lengths as the kernels read them. 64-bit ones stay so, for the kernels to see those that 32 bits would wrap."""
    if lengths is None or lengths.dtype in (torch.int32, torch.int64):
        return lengths
    return lengths.to(torch.int32)


def _check_places(input: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Weights]) -> None:
    names = ("w_ih", "w_hh", "b_ih", "b_hh")
    others = [(name, w) for each in weights for name, w in zip(names, each, strict=True)]
    others += [("h0", h0), ("c0", c0)]
    for name, tensor in others:
        if tensor is None:
            continue
        if tensor.device != input.device:
            raise RuntimeError(
                f"Input and {name} tensors are not at the same device, found input tensor at {input.device} and "
                f"{name} tensor at {tensor.device}"
            )
        if tensor.dtype != input.dtype and name in ("h0", "c0"):
            raise RuntimeError(
                f"Input and hidden tensors are not the same dtype, found input tensor with {input.dtype} and "
                f"{name} with {tensor.dtype}"
            )
        if tensor.dtype != input.dtype:
            raise ValueError(f"RNN input dtype ({input.dtype}) does not match {name} dtype ({tensor.dtype})")
