"""Launchers of the recurrent layer: what `fastops::rnn_forward` and `fastops::rnn_backward` run.

The input product is one GEMM over all T * B rows before the recurrence, the gradients of weights, biases and input are
GEMMs over all rows after it; both go to torch's own (cuBLAS). Only the recurrence is ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastops._sequences import without_padding
from fastops.kernels import rnn_plan, rnn_step
from fastops.kernels._common import dot_precision, interpreted, weight_operand
from fastops.kernels.rnn_backward import backward_kernel
from fastops.kernels.rnn_forward import forward_kernel
from fastops.kernels.rnn_plan import SLOTS, Machine, Plan
from fastops.kernels.rnn_small import small_forward_kernel
from fastops.kernels.rnn_small_backward import small_backward_kernel

# polls of a barrier before it is given up, more than ten seconds: nothing that can finish takes as long
PATIENCE = 1 << 24

_errors: dict[torch.device, Tensor] = {}


def errors_of(device: torch.device) -> Tensor:
    """Two words the kernels write to: a barrier was given up; 1 + the batch row of a length out of range.

    They are in pinned host memory, which a GPU writes to directly, so that looking at them needs no synchronisation.
    What an earlier call wrote is raised here.
    """
    words = _errors.get(device)
    if words is None:
        with torch.inference_mode(False):  # made inside of it they could not be written to outside
            words = torch.zeros(2, dtype=torch.int32, pin_memory=device.type == "cuda")
        _errors[device] = words
    barrier, row = words.tolist()
    if barrier or row:
        words.zero_()
    if barrier:
        raise RuntimeError(
            "an earlier fastops recurrent layer gave up: the programs of a persistent kernel did not all run at once. "
            "Its results are NaN. Use impl='step', and report the GPU and the sizes"
        )
    if row:
        raise ValueError(f"lengths[{row - 1}] of an earlier fastops recurrent layer was negative or larger than T")
    return words


@torch.no_grad()
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output, h_n, c_n and what backward needs: slots, h before and c after each step (empty without `save`)."""
    errors = errors_of(input.device)
    x = _rows(input, batch_first, batch_rows)
    steps, batch = _steps_and_batch(input, batch_first)
    directions, per = _directions(weights)
    hidden = weights[1].shape[1]
    slots = SLOTS[mode]
    ragged = lengths is not None
    lengths = None if lengths is None else lengths.contiguous()
    fresh = input.new_zeros if ragged else input.new_empty

    gates = input.new_empty((directions, steps * batch, slots * hidden))
    for direction in range(directions):
        _input_product(mode, x, weights[per * direction : per * (direction + 1)], gates[direction])
    output = fresh((batch, steps, directions * hidden) if batch_first else (steps, batch, directions * hidden))
    before = fresh((directions, steps * batch, hidden)) if save else input.new_empty(0)
    keep_cells = save and mode == "LSTM"
    cells = input.new_empty((directions, steps * batch, hidden) if keep_cells else 0, dtype=torch.float32)
    h_in = input.new_zeros((directions, batch, hidden)) if h0 is None else h0.contiguous()
    h_n = torch.empty_like(h_in)
    cell = input.new_empty(0, dtype=torch.float32)
    if mode == "LSTM":
        cell = h_n.new_zeros(h_n.shape, dtype=torch.float32)
        if c0 is not None:
            cell.copy_(c0)
    b_hn = _bias_of_candidate(mode, weights, per, directions, input)
    w_hh = _recurrent_weights(weights, per, directions)
    time, row = (1, 0) if batch_first else (0, 1)
    sizes = (steps, batch, steps * batch, 1 if batch_rows else batch, steps if batch_rows else 1)
    strides = (output.stride(time), output.stride(row))
    if engine == "step":
        h_n.copy_(h_in)
        tensors = (gates, w_hh, b_hn, h_n, cell, output, before, cells, lengths, errors)
        rnn_step.forward_steps(tensors, sizes, strides, steps, mode, ragged, save, math_of(input.dtype))
    else:
        plan = _plan(engine, mode, hidden, batch, directions, input, backward=False)
        w_hh = weight_operand(w_hh, _precision(input.dtype))
        tensors = (gates, w_hh, b_hn, h_in, h_n, cell, output, before, cells, lengths, errors)
        kind = {"MODE": mode, "H": hidden, "RAGGED": ragged, "SAVE": save, "MATH": math_of(input.dtype)}
        kind["PRECISION"] = _precision(input.dtype)
        if plan.tiles == 1:
            _launch_alone(small_forward_kernel, plan, tensors, sizes, strides, directions, kind)
        else:
            _forward_together(plan, tensors, sizes, strides, directions, kind)
    c_n = cell.to(input.dtype) if mode == "LSTM" else input.new_empty(0)
    return output, h_n, c_n, gates if save and slots == 4 else input.new_empty(0), before, cells


def _launch_alone(
    kernel: Any, plan: Plan, tensors: tuple, sizes: tuple, strides: tuple, directions: int, kind: dict
) -> None:
    """One program a batch tile and direction."""
    kernel[(-(-sizes[1] // plan.block_b), directions)](
        *tensors,
        *sizes,
        *strides,
        BLOCK_H=plan.block_h,
        BLOCK_B=plan.block_b,
        STAGES=plan.stages,
        **kind,
        **({} if interpreted() else plan.options),
    )


def _forward_together(plan: Plan, tensors: tuple, sizes: tuple, strides: tuple, directions: int, kind: dict) -> None:
    """Several programs a batch tile, which meet once a step."""
    *given, lengths, errors = tensors
    h_in, h_n = given[3], given[4]
    # the interpreter runs programs one after another: where they would meet, each step is a launch of its own
    windows = [(s, s + 1) for s in range(sizes[0])] if interpreted() else [(0, sizes[0])]
    for first, count in _launches(sizes[1], plan):
        counters = torch.zeros(directions * count, dtype=torch.int32, device=h_in.device)
        given[3] = h_in
        for s_start, s_end in windows:
            forward_kernel[(plan.tiles * count * directions,)](
                *given,
                lengths,
                counters,
                errors,
                *sizes,
                *strides,
                first,
                count,
                s_start,
                s_end,
                PATIENCE,
                BLOCK_H=plan.block_h,
                BLOCK_B=plan.block_b,
                BLOCK_K=plan.block_k,
                BARRIER=not interpreted(),
                **kind,
                **({} if interpreted() else plan.options),
            )
            if interpreted():
                given[3] = h_n.clone()


@torch.no_grad()
def backward(
    d_output: Tensor,
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
    """Gradients of input, h0, c0 and the weights, in that order; an empty tensor where `needs` says none is wanted."""
    errors = errors_of(input.device)
    steps, batch = _steps_and_batch(input, batch_first)
    directions, per = _directions(weights)
    hidden = weights[1].shape[1]
    slots = SLOTS[mode]
    ragged = lengths is not None
    lengths = None if lengths is None else lengths.contiguous()
    if d_output.stride(-1) != 1:
        d_output = d_output.contiguous()

    shape = (directions, batch, hidden)
    fresh = input.new_zeros if ragged else input.new_empty
    d_gates = fresh((directions, steps * batch, slots * hidden))
    d_state = _fp32(d_h_n, input, shape)
    d_cell = _fp32(d_c_n, input, shape) if mode == "LSTM" else input.new_empty(0, dtype=torch.float32)
    start_c = c0
    if mode == "LSTM":
        start_c = input.new_zeros(shape) if c0 is None else c0.contiguous()
    w_hh = _recurrent_weights(weights, per, directions)
    if engine != "step":
        w_hh = weight_operand(w_hh, _precision(input.dtype))
    time, row = (1, 0) if batch_first else (0, 1)
    sizes = (steps, batch, steps * batch, 1 if batch_rows else batch, steps if batch_rows else 1)
    strides = (d_output.stride(time), d_output.stride(row), output.stride(time), output.stride(row))
    tensors = (
        d_output,
        gates,
        cells,
        start_c,
        output if slots == 1 else before,
        w_hh,
        d_gates,
        d_state,
        d_cell,
        lengths,
    )
    if engine == "step":
        rnn_step.backward_steps((*tensors, errors), sizes, strides, steps, mode, ragged, math_of(input.dtype))
    else:
        plan = _plan(engine, mode, hidden, batch, directions, input, backward=True)
        kind = {"MODE": mode, "H": hidden, "RAGGED": ragged, "MATH": math_of(input.dtype)}
        kind["PRECISION"] = _precision(input.dtype)
        if plan.tiles == 1:
            _launch_alone(small_backward_kernel, plan, tensors, sizes, strides, directions, kind)
        else:
            _backward_together(plan, (*tensors, errors), sizes, strides, directions, kind)
    found = [_input_gradient(input, weights, per, d_gates, mode, batch_first, batch_rows) if needs[0] else None]
    found.append(d_state.to(input.dtype) if needs[1] else None)
    found.append(d_cell.to(input.dtype) if needs[2] else None)
    x = None
    if any(needs[3 + per * direction] for direction in range(directions)):
        dense = input if lengths is None else without_padding(input, lengths, batch_first)
        x = _rows(dense, batch_first, batch_rows)
    for direction in range(directions):
        wanted = needs[3 + per * direction : 3 + per * (direction + 1)]
        found += _weight_gradients(mode, x, before[direction], d_gates[direction], hidden, wanted)
    return [input.new_empty(0) if gradient is None else gradient for gradient in found]


def _backward_together(plan: Plan, tensors: tuple, sizes: tuple, strides: tuple, directions: int, kind: dict) -> None:
    """Several programs a batch tile, which meet once a step."""
    *given, errors = tensors
    steps = sizes[0]
    windows = [(s, s + 1) for s in reversed(range(steps))] + [(0, 0)] if interpreted() else [(0, steps)]
    for first, count in _launches(sizes[1], plan):
        counters = torch.zeros(directions * count, dtype=torch.int32, device=given[0].device)
        for s_start, s_end in windows:
            backward_kernel[(plan.tiles * count * directions,)](
                *given,
                counters,
                errors,
                *sizes,
                *strides,
                first,
                count,
                s_start,
                s_end,
                PATIENCE,
                BLOCK_H=plan.block_h,
                BLOCK_B=plan.block_b,
                BLOCK_K=plan.block_k,
                SPLIT=plan.split,
                GROUP=plan.group,
                BARRIER=not interpreted(),
                FINISH=not interpreted() or s_end == 0,
                **kind,
                **({} if interpreted() else plan.options),
            )


def _steps_and_batch(input: Tensor, batch_first: bool) -> tuple[int, int]:
    return (input.shape[1], input.shape[0]) if batch_first else (input.shape[0], input.shape[1])


def _directions(weights: list[Tensor]) -> tuple[int, int]:
    """Number of directions, tensors per direction (w_ih, w_hh, and with biases b_ih, b_hh)."""
    has_bias = len(weights) > 2 and weights[2].dim() == 1
    per = 4 if has_bias else 2
    return len(weights) // per, per


def _rows(input: Tensor, batch_first: bool, batch_rows: bool) -> Tensor:
    """(T * B, I), or (B * T, I) with `batch_rows`; a view where the input allows it."""
    x = input if batch_rows == batch_first else input.transpose(0, 1)
    return x.reshape(-1, x.shape[-1])


def _input_product(mode: str, x: Tensor, weights: list[Tensor], gates: Tensor) -> None:
    """The product x @ w_ih.T with all biases that are simply added, into the slots that take part."""
    w_ih, w_hh, *biases = weights
    hidden = w_hh.shape[1]
    into = gates[:, hidden:] if mode == "GRU" else gates
    if not biases:
        torch.mm(x, w_ih.t(), out=into)
        return
    b_ih, b_hh = biases
    if mode == "GRU":
        bias = b_ih.clone()
        bias[: 2 * hidden] += b_hh[: 2 * hidden]
    else:
        bias = b_ih + b_hh
    torch.addmm(bias, x, w_ih.t(), out=into)


def _bias_of_candidate(mode: str, weights: list[Tensor], per: int, directions: int, input: Tensor) -> Tensor:
    """(D, H) b_hn of a GRU, which the reset gate multiplies; empty for other modes."""
    if mode != "GRU":
        return input.new_empty(0)
    hidden = weights[1].shape[1]
    if per == 2:
        return input.new_zeros((directions, hidden))
    return torch.stack([weights[per * direction + 3][2 * hidden :] for direction in range(directions)])


def _recurrent_weights(weights: list[Tensor], per: int, directions: int) -> Tensor:
    if directions == 1:
        return weights[1].contiguous().unsqueeze(0)
    return torch.stack([weights[per * direction + 1] for direction in range(directions)])


def _fp32(gradient: Tensor | None, input: Tensor, shape: tuple[int, int, int]) -> Tensor:
    if gradient is None:
        return input.new_zeros(shape, dtype=torch.float32)
    return gradient.to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def _plan(engine: str, mode: str, hidden: int, batch: int, directions: int, input: Tensor, backward: bool) -> Plan:
    machine = Machine.at(input.device)
    itemsize = input.element_size()
    if engine == "small":
        plan = rnn_plan.small(mode, hidden, itemsize, machine, backward)
    else:
        plan = rnn_plan.persistent(mode, hidden, batch, directions, itemsize, machine, backward)
    assert isinstance(plan, Plan), plan  # why_not has asked the same question
    return plan


def _launches(batch: int, plan: Plan) -> list[tuple[int, int]]:
    """(first batch tile, number of batch tiles) of each launch."""
    tiles = -(-batch // plan.block_b)
    return [(first, min(plan.batch_tiles, tiles - first)) for first in range(0, tiles, plan.batch_tiles)]


def _precision(dtype: torch.dtype) -> str:
    """fp32 is rounded to TF32 where torch lets recurrent nets do so (torch.backends.cudnn.rnn, cudnn.allow_tf32)."""
    return dot_precision(dtype, torch._C._get_fp32_precision_getter("cuda", "rnn") == "tf32")


def math_of(dtype: torch.dtype) -> str:
    """How exact the pointwise part is, see rnn_gates."""
    if interpreted():
        return "exact"
    return {torch.float16: "fast", torch.bfloat16: "approx"}.get(dtype, "exact")


def _input_gradient(
    input: Tensor,
    weights: list[Tensor],
    per: int,
    d_gates: Tensor,
    mode: str,
    batch_first: bool,
    batch_rows: bool,
) -> Tensor:
    rows_first = input.shape if batch_rows == batch_first else (input.shape[1], input.shape[0], input.shape[2])
    d_input = input.new_empty(rows_first)
    flat = d_input.view(-1, input.shape[-1])
    for direction in range(d_gates.shape[0]):
        d_x = _input_slots(mode, d_gates[direction], weights[1].shape[1])
        if direction == 0:
            torch.mm(d_x, weights[0], out=flat)
        else:
            flat.addmm_(d_x, weights[per * direction])
    return d_input if batch_rows == batch_first else d_input.transpose(0, 1)


def _input_slots(mode: str, d_gates: Tensor, hidden: int) -> Tensor:
    return d_gates[:, hidden:] if mode == "GRU" else d_gates


def _weight_gradients(
    mode: str, x: Tensor | None, before: Tensor, d_gates: Tensor, hidden: int, wanted: list[bool]
) -> list[Tensor | None]:
    """Gradients of w_ih, w_hh and, where there are any, b_ih and b_hh of one direction."""
    d_x = _input_slots(mode, d_gates, hidden)
    # rows of w_hh and their slots: torch's r, z, n are slots 1, 2, 0
    parts = [(0, 2 * hidden, hidden), (2 * hidden, hidden, 0)] if mode == "GRU" else [(0, d_gates.shape[1], 0)]
    found: list[Tensor | None] = [None] * len(wanted)
    if wanted[0]:
        assert x is not None
        found[0] = d_x.t() @ x
    if wanted[1]:
        d_w_hh = before.new_empty((d_x.shape[1], hidden))
        for row, count, slot in parts:
            torch.mm(d_gates[:, slot : slot + count].t(), before, out=d_w_hh[row : row + count])
        found[1] = d_w_hh
    if len(wanted) == 4 and wanted[2]:
        found[2] = d_x.sum(0)
    if len(wanted) == 4 and wanted[3]:
        found[3] = torch.cat([d_gates[:, slot : slot + count].sum(0) for _, count, slot in parts])
    return found
