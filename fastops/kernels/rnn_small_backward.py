"""Backward pass of a small recurrent layer (H <= 128): all of W_hh on chip, all time steps in one launch, no barrier.

Tiles as in rnn_small, steps in reverse. Every step turns dh and dc into the gradients of the slot sums, which are
stored (the gradients of weights, biases and input are large products over T * B rows after the kernel), and sums up
`dh[BLOCK_B, BLOCK_H] = d_sums[BLOCK_B, BLOCK_H] @ W_hh` of the gates. With STAGES = 2 what the next step reads is
fetched while this one runs.

Bytes per step and program: reads the saved slots, c (h of a GRU or plain RNN) and dy, writes the slots' gradients. dh
and dc stay in fp32 registers from the last step to the first.
"""

import triton
import triton.language as tl

from fastops.kernels.rnn_gates import step_backward
from fastops.kernels.rnn_small import FREE, join_slots, split_slots


@triton.jit(do_not_specialize=FREE)
def small_backward_kernel(
    d_output_ptr,  # (T, B, D * H) by strides
    gates_ptr,  # (D, rows, SLOTS * H) slots as the forward pass saved them; not of a plain RNN
    cells_ptr,  # (D, rows, H) fp32, c after each step of an LSTM
    c0_ptr,  # (D, B, H) of an LSTM
    history_ptr,  # (D, rows, H): h before each step for a GRU; (T, B, D * H): the output for a plain RNN
    w_hh_ptr,  # (D, G * H, H)
    d_gates_ptr,  # (D, rows, SLOTS * H), written
    d_state_ptr,  # (D, B, H) fp32: dh_n, overwritten by dh0
    d_cell_ptr,  # (D, B, H) fp32: dc_n, overwritten by dc0
    lengths_ptr,  # (B,) integers with RAGGED
    T,
    B,
    rows,
    row_t,  # row of gates, cells and history = t * row_t + b * row_b
    row_b,
    stride_dt,
    stride_db,
    stride_yt,
    stride_yb,
    MODE: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
    MATH: tl.constexpr,
    STAGES: tl.constexpr,
):
    SLOTS: tl.constexpr = 4 if MODE == "LSTM" or MODE == "GRU" else 1
    GATES: tl.constexpr = 3 if MODE == "GRU" else SLOTS

    direction = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    row64 = tl.minimum(row, B - 1).to(tl.int64)
    unit = tl.arange(0, BLOCK_H)
    unit_real = (unit < H)[None, :]
    real = (row < B)[:, None] & unit_real

    column = tl.arange(0, SLOTS * BLOCK_H)
    w_hh_ptr += direction.to(tl.int64) * (GATES * H * H)
    weights = ()
    for slot in tl.static_range(GATES):
        w_row = (slot + 2) % 3 * H + unit if MODE == "GRU" else slot * H + unit
        w_ptrs = w_hh_ptr + w_row[:, None] * H + unit[None, :]
        weights = weights + (tl.load(w_ptrs, mask=(unit < H)[:, None] & unit_real, other=0.0),)
    slot_column = column // BLOCK_H * H + column % BLOCK_H
    column_real = (column % BLOCK_H < H)[None, :]

    # steps are numbered as in the forward kernel and counted down
    sign = 1 - 2 * direction
    if RAGGED:
        length = tl.minimum(tl.maximum(tl.load(lengths_ptr + row64), 0), T).to(tl.int32)
        steps = tl.max(length, axis=0)
    else:
        length = T + tl.zeros((BLOCK_B,), tl.int32)
        steps = T
    time = (direction * (length - 1) + sign * tl.maximum(steps - 1, 0)).to(tl.int64)
    g_row = time * row_t + row64 * row_b + direction.to(tl.int64) * rows
    g_step = (sign * row_t).to(tl.int64)
    d_row = time * stride_dt + row64 * stride_db + direction * H
    d_step = (sign * stride_dt).to(tl.int64)
    y_row = time * stride_yt + row64 * stride_yb + direction * H
    y_step = (sign * stride_yt).to(tl.int64)
    slots_at = (g_row * (SLOTS * H))[:, None] + slot_column[None, :]
    slot_ptrs = gates_ptr + slots_at
    d_slot_ptrs = d_gates_ptr + slots_at
    cell_ptrs = cells_ptr + (g_row * H)[:, None] + unit[None, :]
    history_ptrs = history_ptr + (y_row if SLOTS == 1 else g_row * H)[:, None] + unit[None, :]
    dy_ptrs = d_output_ptr + d_row[:, None] + unit[None, :]
    own_state = ((direction * B + row64) * H)[:, None] + unit[None, :]

    dh = tl.load(d_state_ptr + own_state, mask=unit_real, other=0.0)
    dc = 0.0
    c = 0.0
    first_c = 0.0
    if MODE == "LSTM":
        dc = tl.load(d_cell_ptr + own_state, mask=unit_real, other=0.0)
        c = tl.load(cell_ptrs, mask=unit_real & ((steps > 0) & (steps - 1 < length))[:, None], other=0.0)
        first_c = tl.load(c0_ptr + own_state, mask=unit_real, other=0.0).to(tl.float32)
        cell_ptrs -= g_step * H
    for back in tl.range(0, steps, num_stages=STAGES):
        s = steps - 1 - back
        alive = (s < length)[:, None]
        slots_readable, readable = column_real, unit_real
        if RAGGED:
            slots_readable, readable = column_real & alive, unit_real & alive
        s0, s1, s2, s3 = dh, dh, dh, dh
        if SLOTS == 4:
            slots = tl.load(slot_ptrs, mask=slots_readable, other=0.0).to(tl.float32)
            s0, s1, s2, s3 = split_slots(slots, BLOCK_B, BLOCK_H)
        if MODE == "LSTM":
            before = tl.load(cell_ptrs, mask=unit_real & ((s > 0) & (s - 1 < length))[:, None], other=0.0)
            earlier = tl.where((s + tl.zeros((BLOCK_B,), tl.int32) > 0)[:, None], before, first_c)
        else:
            earlier = tl.load(history_ptrs, mask=readable, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptrs, mask=readable, other=0.0).to(tl.float32)

        d0, d1, d2, d3, next_dc, direct = step_backward(MODE, MATH, s0, s1, s2, s3, c, earlier, dh + dy, dc)
        dtype: tl.constexpr = d_gates_ptr.dtype.element_ty
        d0 = d0.to(dtype)
        if SLOTS == 4:
            d1, d2, d3 = d1.to(dtype), d2.to(dtype), d3.to(dtype)
            d_slots = join_slots(d0, d1, d2, d3, BLOCK_B, BLOCK_H)
        else:
            d_slots = d0
        tl.store(d_slot_ptrs, d_slots, mask=slots_readable & (row < B)[:, None])
        direct = tl.dot(d0, weights[0], direct, input_precision=PRECISION)
        if GATES > 1:
            direct = tl.dot(d1, weights[1], direct, input_precision=PRECISION)
            direct = tl.dot(d2, weights[2], direct, input_precision=PRECISION)
        if GATES > 3:
            direct = tl.dot(d3, weights[3], direct, input_precision=PRECISION)
        # units past the last one stay 0, as in the forward kernel
        if RAGGED or H != BLOCK_H:
            direct = tl.where(readable, direct, dh)
        if RAGGED and MODE == "LSTM":
            next_dc = tl.where(readable, next_dc, dc)
        dh = direct
        dc = next_dc
        if MODE == "LSTM":
            c = earlier
        slot_ptrs -= g_step * (SLOTS * H)
        d_slot_ptrs -= g_step * (SLOTS * H)
        cell_ptrs -= g_step * H
        history_ptrs -= y_step if SLOTS == 1 else g_step * H
        dy_ptrs -= d_step

    tl.store(d_state_ptr + own_state, dh, mask=real)
    if MODE == "LSTM":
        tl.store(d_cell_ptr + own_state, dc, mask=real)
