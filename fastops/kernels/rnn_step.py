"""The recurrence one step at a time, for any hidden size: a GEMM h @ W_hh^T by torch (cuBLAS), then one fused kernel.

A program of the fused kernel owns BLOCK_B rows and BLOCK_H units of one direction. Per step it reads and writes what
the pointwise part needs and nothing twice. Two launches a step and no host sync, so a CUDA graph can hold the layer.
"""

import torch
import triton
import triton.language as tl

from fastops.kernels.rnn_gates import FREE, step_backward, step_forward

BLOCK_B = 4
BLOCK_H = 128
FREE_OF_STEP = (*FREE[:5], "s")


@triton.jit(do_not_specialize=FREE_OF_STEP)
def step_forward_kernel(
    product_ptr,  # (D, B, G * H) h @ W_hh^T, torch's gate order
    gates_ptr,  # (D, rows, SLOTS * H) input product; with SAVE overwritten by what backward needs
    b_hn_ptr,  # (D, H) of a GRU
    state_ptr,  # (D, B, H) h, updated
    cell_ptr,  # (D, B, H) fp32 c, updated
    output_ptr,  # (T, B, D * H) by strides
    before_ptr,  # (D, rows, H) with SAVE: h before each step
    cells_ptr,  # (D, rows, H) fp32 with SAVE: c after each step
    lengths_ptr,  # (B,) integers with RAGGED
    error_ptr,
    T,
    B,
    rows,
    row_t,
    row_b,
    stride_yt,
    stride_yb,
    s,
    MODE: tl.constexpr,
    H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    RAGGED: tl.constexpr,
    SAVE: tl.constexpr,
    MATH: tl.constexpr,
):
    GATED: tl.constexpr = MODE == "LSTM" or MODE == "GRU"
    SLOTS: tl.constexpr = 4 if GATED else 1
    GATES: tl.constexpr = 3 if MODE == "GRU" else SLOTS
    direction = tl.program_id(2)
    row, unit, mask, time = _place(lengths_ptr, error_ptr, direction, s, T, B, H, BLOCK_B, BLOCK_H, RAGGED)
    own = (direction * B + row)[:, None] * H + unit[None, :]
    g_row = time * row_t + row * row_b + direction.to(tl.int64) * rows
    slots = gates_ptr + g_row[:, None] * (SLOTS * H) + unit[None, :]
    product = product_ptr + (direction * B + row)[:, None] * (GATES * H) + unit[None, :]

    h = tl.load(state_ptr + own, mask=mask, other=0.0)
    first = 2 * H if MODE == "GRU" else 0
    s0 = tl.load(product + first, mask=mask, other=0.0).to(tl.float32)
    s1, s2, s3, c = s0, s0, s0, s0
    if MODE == "GRU":
        s0 += tl.load(b_hn_ptr + direction * H + unit, mask=unit < H, other=0.0).to(tl.float32)[None, :]
        s1 = tl.load(product, mask=mask, other=0.0).to(tl.float32)
        s2 = tl.load(product + H, mask=mask, other=0.0).to(tl.float32)
        s3 = 0.0
    else:
        s0 += tl.load(slots, mask=mask, other=0.0).to(tl.float32)
    if MODE == "LSTM":
        s1 = tl.load(product + H, mask=mask, other=0.0).to(tl.float32)
        s2 = tl.load(product + 2 * H, mask=mask, other=0.0).to(tl.float32)
        s3 = tl.load(product + 3 * H, mask=mask, other=0.0).to(tl.float32)
        c = tl.load(cell_ptr + own, mask=mask, other=0.0)
    if GATED:
        s1 += tl.load(slots + H, mask=mask, other=0.0).to(tl.float32)
        s2 += tl.load(slots + 2 * H, mask=mask, other=0.0).to(tl.float32)
        s3 += tl.load(slots + 3 * H, mask=mask, other=0.0).to(tl.float32)
    if SAVE:
        tl.store(before_ptr + g_row[:, None] * H + unit[None, :], h, mask=mask)
    h, c, s0, s1, s2, s3 = step_forward(MODE, MATH, s0, s1, s2, s3, h.to(tl.float32), c)
    tl.store(state_ptr + own, h, mask=mask)
    output = output_ptr + (time * stride_yt + row * stride_yb + direction * H)[:, None] + unit[None, :]
    tl.store(output, h, mask=mask)
    if MODE == "LSTM":
        tl.store(cell_ptr + own, c, mask=mask)
    if SAVE and GATED:
        tl.store(slots, s0, mask=mask)
        tl.store(slots + H, s1, mask=mask)
        tl.store(slots + 2 * H, s2, mask=mask)
        tl.store(slots + 3 * H, s3, mask=mask)
    if SAVE and MODE == "LSTM":
        tl.store(cells_ptr + g_row[:, None] * H + unit[None, :], c, mask=mask)


@triton.jit(do_not_specialize=FREE_OF_STEP)
def step_backward_kernel(
    d_output_ptr,  # (T, B, D * H) by strides
    gates_ptr,  # (D, rows, SLOTS * H) slots; not of a plain RNN
    cells_ptr,  # (D, rows, H) fp32, c after each step of an LSTM
    c0_ptr,  # (D, B, H) of an LSTM
    history_ptr,  # (D, rows, H): h before each step for a GRU; (T, B, D * H): the output for a plain RNN
    product_ptr,  # (D, B, H) what the step after this one sends back through W_hh
    d_gates_ptr,  # (D, rows, SLOTS * H), written
    d_step_ptr,  # (D, B, G * H), torch's gate order: the gradients of this step, zero where the row does not run
    d_state_ptr,  # (D, B, H) fp32 dh without the product, updated
    d_cell_ptr,  # (D, B, H) fp32 dc, updated
    lengths_ptr,  # (B,) integers with RAGGED
    error_ptr,
    T,
    B,
    rows,
    row_t,
    row_b,
    stride_dt,
    stride_db,
    stride_yt,
    stride_yb,
    s,
    MODE: tl.constexpr,
    H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    RAGGED: tl.constexpr,
    MATH: tl.constexpr,
):
    GATED: tl.constexpr = MODE == "LSTM" or MODE == "GRU"
    SLOTS: tl.constexpr = 4 if GATED else 1
    GATES: tl.constexpr = 3 if MODE == "GRU" else SLOTS
    direction = tl.program_id(2)
    row, unit, mask, time = _place(lengths_ptr, error_ptr, direction, s, T, B, H, BLOCK_B, BLOCK_H, RAGGED)
    inside = (unit < H)[None, :] & (row < B)[:, None]
    own = (direction * B + row)[:, None] * H + unit[None, :]
    sign = 1 - 2 * direction
    g_row = time * row_t + row * row_b + direction.to(tl.int64) * rows
    own_slots = g_row[:, None] * (SLOTS * H) + unit[None, :]
    own_row = g_row[:, None] * H + unit[None, :]

    dh = tl.load(d_state_ptr + own, mask=mask, other=0.0) + tl.load(product_ptr + own, mask=mask, other=0.0)
    d_output = d_output_ptr + (time * stride_dt + row * stride_db + direction * H)[:, None] + unit[None, :]
    dh += tl.load(d_output, mask=mask, other=0.0).to(tl.float32)
    s0, s1, s2, s3, c, dc = dh, dh, dh, dh, dh, dh
    if GATED:
        s0 = tl.load(gates_ptr + own_slots, mask=mask, other=0.0).to(tl.float32)
        s1 = tl.load(gates_ptr + own_slots + H, mask=mask, other=0.0).to(tl.float32)
        s2 = tl.load(gates_ptr + own_slots + 2 * H, mask=mask, other=0.0).to(tl.float32)
        s3 = tl.load(gates_ptr + own_slots + 3 * H, mask=mask, other=0.0).to(tl.float32)
    if MODE == "LSTM":
        dc = tl.load(d_cell_ptr + own, mask=mask, other=0.0)
        c = tl.load(cells_ptr + own_row, mask=mask, other=0.0)
        if s > 0:
            earlier = tl.load(cells_ptr + own_row - (sign * row_t).to(tl.int64) * H, mask=mask, other=0.0)
        else:
            earlier = tl.load(c0_ptr + own, mask=mask, other=0.0).to(tl.float32)
    elif MODE == "GRU":
        earlier = tl.load(history_ptr + own_row, mask=mask, other=0.0).to(tl.float32)
    else:
        y = (time * stride_yt + row * stride_yb + direction * H)[:, None] + unit[None, :]
        earlier = tl.load(history_ptr + y, mask=mask, other=0.0).to(tl.float32)

    d0, d1, d2, d3, dc, direct = step_backward(MODE, MATH, s0, s1, s2, s3, c, earlier, dh, dc)
    tl.store(d_state_ptr + own, direct, mask=mask)
    d_step = d_step_ptr + (direction * B + row)[:, None] * (GATES * H) + unit[None, :]
    first = 2 * H if MODE == "GRU" else 0
    tl.store(d_step + first, tl.where(mask, d0, 0.0), mask=inside)
    tl.store(d_gates_ptr + own_slots, d0, mask=mask)
    if GATED:
        tl.store(d_gates_ptr + own_slots + H, d1, mask=mask)
        tl.store(d_gates_ptr + own_slots + 2 * H, d2, mask=mask)
        tl.store(d_gates_ptr + own_slots + 3 * H, d3, mask=mask)
    if MODE == "GRU":
        tl.store(d_step, tl.where(mask, d1, 0.0), mask=inside)
        tl.store(d_step + H, tl.where(mask, d2, 0.0), mask=inside)
    if MODE == "LSTM":
        tl.store(d_cell_ptr + own, dc, mask=mask)
        tl.store(d_step + H, tl.where(mask, d1, 0.0), mask=inside)
        tl.store(d_step + 2 * H, tl.where(mask, d2, 0.0), mask=inside)
        tl.store(d_step + 3 * H, tl.where(mask, d3, 0.0), mask=inside)


@triton.jit
def _place(
    lengths_ptr,
    error_ptr,
    direction,
    s,
    T,
    B,
    H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Rows, units, which of them run step s, and each row's time: s, or length - 1 - s backwards."""
    row = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    unit = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    length = T + tl.zeros((BLOCK_B,), tl.int32)
    if RAGGED:
        given = tl.load(lengths_ptr + row, mask=row < B, other=0)
        length = tl.minimum(tl.maximum(given, 0), T).to(tl.int32)  # 64-bit ones are cut before that
        wrong = tl.max(tl.where(given == length, 0, row + 1), axis=0)
        if wrong > 0:
            tl.store(error_ptr + 1, wrong.to(tl.int32))
    mask = (unit < H)[None, :] & ((row < B) & (s < length))[:, None]
    time = tl.where(direction == 0, s, length - 1 - s).to(tl.int64)
    return row, unit, mask, time


def forward_steps(tensors, sizes, strides, steps: int, mode: str, ragged: bool, save: bool, math: str) -> None:
    """Run all steps forward. `tensors` and the rest are as `fastops.kernels.rnn.forward` prepares them."""
    gates, w_hh, b_hn, state, cell, output, before, cells, lengths, errors = tensors
    directions, batch, hidden = state.shape
    transposed = w_hh.transpose(1, 2)
    product = state.new_empty((directions, batch, w_hh.shape[1]))
    grid = (triton.cdiv(hidden, BLOCK_H), triton.cdiv(batch, BLOCK_B), directions)
    for s in range(steps):
        torch.bmm(state, transposed, out=product)
        step_forward_kernel[grid](
            product,
            gates,
            b_hn,
            state,
            cell,
            output,
            before,
            cells,
            lengths,
            errors,
            *sizes,
            *strides,
            s,
            MODE=mode,
            H=hidden,
            BLOCK_B=BLOCK_B,
            BLOCK_H=BLOCK_H,
            RAGGED=ragged,
            SAVE=save,
            MATH=math,
        )


def backward_steps(tensors, sizes, strides, steps: int, mode: str, ragged: bool, math: str) -> None:
    """Run all steps backward. `tensors` and the rest are as `fastops.kernels.rnn.backward` prepares them."""
    d_output, gates, cells, c0, history, w_hh, d_gates, d_state, d_cell, lengths, errors = tensors
    directions, batch, hidden = d_state.shape
    product = d_gates.new_zeros((directions, batch, hidden))
    d_step = d_gates.new_empty((directions, batch, w_hh.shape[1]))
    grid = (triton.cdiv(hidden, BLOCK_H), triton.cdiv(batch, BLOCK_B), directions)
    for s in reversed(range(steps)):
        step_backward_kernel[grid](
            d_output,
            gates,
            cells,
            c0,
            history,
            product,
            d_gates,
            d_step,
            d_state,
            d_cell,
            lengths,
            errors,
            *sizes,
            *strides,
            s,
            MODE=mode,
            H=hidden,
            BLOCK_B=BLOCK_B,
            BLOCK_H=BLOCK_H,
            RAGGED=ragged,
            MATH=math,
        )
        torch.bmm(d_step, w_hh, out=product)
    d_state += product
