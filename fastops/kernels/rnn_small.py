"""Forward pass of a small recurrent layer (H <= 128): all of W_hh on chip, all time steps in one launch, no barrier.

A program owns BLOCK_B rows of the batch in one direction. Every step computes
`sums[BLOCK_B, slots * BLOCK_H] = x_slots + h @ W_hh^T`. The batch is the short side of the product, so that
all slots of a unit lie in one thread (a warp for every 8 units) and what comes out of the product goes into the
pointwise part without passing through shared memory. The input product of the next step is fetched a whole step ahead:
STAGES is the depth of that pipeline: 2, or 1 where shared memory has no room for the input products of two steps.

Bytes per step and program: reads slots * H * BLOCK_B of the input product, writes BLOCK_B * H of h, and with SAVE the
slots, c and the state before the step. W_hh is read once per launch.
"""

import triton
import triton.language as tl

from fastops.kernels.rnn_gates import step_forward

# arguments that no kernel is compiled anew for, whatever their value
FREE = ("T", "B", "rows", "row_t", "row_b")


@triton.jit(do_not_specialize=FREE)
def small_forward_kernel(
    gates_ptr,  # (D, rows, SLOTS * H) input product; with SAVE overwritten by what backward needs
    w_hh_ptr,  # (D, G * H, H)
    b_hn_ptr,  # (D, H) of a GRU
    h_in_ptr,  # (D, B, H) initial state
    h_out_ptr,  # (D, B, H) final state
    cell_ptr,  # (D, B, H) fp32: initial c, overwritten by the final one
    output_ptr,  # (T, B, D * H) by strides
    before_ptr,  # (D, rows, H) with SAVE: h before each step
    cells_ptr,  # (D, rows, H) fp32 with SAVE: c after each step
    lengths_ptr,  # (B,) integers with RAGGED
    error_ptr,  # (2,) int32: second word is 1 + a batch row whose length is out of range
    T,
    B,
    rows,
    row_t,  # row of gates, before and cells = t * row_t + b * row_b
    row_b,
    stride_yt,
    stride_yb,
    MODE: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    RAGGED: tl.constexpr,
    SAVE: tl.constexpr,
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
    slot = column // BLOCK_H
    column_unit = column % BLOCK_H
    gate = (slot + 2) % 3 if MODE == "GRU" else slot
    w_hh_ptr += direction.to(tl.int64) * (GATES * H * H)
    w_ptrs = w_hh_ptr + ((gate * H + column_unit) * H)[None, :] + unit[:, None]
    w_real = (unit < H)[:, None] & ((column_unit < H) & (slot < GATES))[None, :]
    weights = tl.load(w_ptrs, mask=w_real, other=0.0)
    # the input product has no part in the first slot of a GRU
    column_real = ((column_unit < H) & ((slot > 0) | (MODE != "GRU")))[None, :]
    bias = 0.0
    if MODE == "GRU":
        bias = tl.load(b_hn_ptr + direction * H + unit, mask=unit < H, other=0.0).to(tl.float32)[None, :]

    # step s is time s forward and time length - 1 - s backward: both start at step 0 with the initial state
    sign = 1 - 2 * direction
    if RAGGED:
        given = tl.load(lengths_ptr + row64)
        length = tl.minimum(tl.maximum(given, 0), T).to(tl.int32)  # 64-bit ones are cut before that
        wrong = tl.max(tl.where(given == length, 0, row64 + 1), axis=0)
        if wrong > 0:
            tl.store(error_ptr + 1, wrong.to(tl.int32))
        steps = tl.max(length, axis=0)
    else:
        length = T + tl.zeros((BLOCK_B,), tl.int32)
        steps = T
    time = (direction * (length - 1)).to(tl.int64)
    g_row = time * row_t + row64 * row_b + direction.to(tl.int64) * rows
    y_row = time * stride_yt + row64 * stride_yb + direction * H
    g_step = (sign * row_t).to(tl.int64)
    y_step = (sign * stride_yt).to(tl.int64)
    state_row = ((direction * B + row64) * H)[:, None] + unit[None, :]

    # rows of a product are independent, so rows past the batch may repeat its last one; only stores are masked
    h = tl.load(h_in_ptr + state_row, mask=unit_real, other=0.0)
    c = 0.0
    if MODE == "LSTM":
        c = tl.load(cell_ptr + state_row, mask=unit_real, other=0.0)
    x_ptrs = gates_ptr + (g_row * (SLOTS * H))[:, None] + (slot * H + column_unit)[None, :]
    y_ptrs = output_ptr + y_row[:, None] + unit[None, :]
    before_ptrs = before_ptr + (g_row * H)[:, None] + unit[None, :]
    cells_ptrs = cells_ptr + (g_row * H)[:, None] + unit[None, :]
    for s in tl.range(0, steps, num_stages=STAGES):
        running, readable = real, column_real
        if RAGGED:
            alive = (s < length)[:, None]
            running, readable = real & alive, column_real & alive
        x = tl.load(x_ptrs, mask=readable, other=0.0)
        if SAVE:
            tl.store(before_ptrs, h, mask=running)
        sums = tl.dot(h, weights, x.to(tl.float32), input_precision=PRECISION)
        if SLOTS == 4:
            s0, s1, s2, s3 = split_slots(sums, BLOCK_B, BLOCK_H)
        else:
            s0, s1, s2, s3 = sums, 0.0, 0.0, 0.0
        next_h, next_c, s0, s1, s2, s3 = step_forward(MODE, MATH, s0 + bias, s1, s2, s3, h.to(tl.float32), c)
        next_h = next_h.to(h.dtype)
        tl.store(y_ptrs, next_h, mask=running)
        # units past the last one stay 0: infinity times a weight of 0 is NaN there, which the product would spread
        if RAGGED or H != BLOCK_H:
            next_h = tl.where(running, next_h, h)
        if RAGGED and MODE == "LSTM":
            next_c = tl.where(running, next_c, c)
        h = next_h
        c = next_c
        if SAVE and SLOTS == 4:
            slots_running = (column_unit < H)[None, :] & ((row < B) & (s < length))[:, None]
            tl.store(x_ptrs, join_slots(s0, s1, s2, s3, BLOCK_B, BLOCK_H), mask=slots_running)
        if SAVE and MODE == "LSTM":
            tl.store(cells_ptrs, c, mask=running)
        x_ptrs += g_step * (SLOTS * H)
        y_ptrs += y_step
        before_ptrs += g_step * H
        cells_ptrs += g_step * H

    tl.store(h_out_ptr + state_row, h, mask=real)
    if MODE == "LSTM":
        tl.store(cell_ptr + state_row, c, mask=real)


@triton.jit
def split_slots(tile, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):
    """The four slots, (BLOCK_B, BLOCK_H) each, that lie side by side in a tile."""
    even, odd = tl.split(tl.permute(tl.reshape(tile, (BLOCK_B, 2, 2, BLOCK_H)), (0, 3, 1, 2)))
    s0, s2 = tl.split(even)
    s1, s3 = tl.split(odd)
    return s0, s1, s2, s3


@triton.jit
def join_slots(s0, s1, s2, s3, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):
    """The tile of which split_slots gives the parts."""
    slots = tl.permute(tl.join(tl.join(s0, s2), tl.join(s1, s3)), (0, 2, 3, 1))
    return tl.reshape(slots, (BLOCK_B, 4 * BLOCK_H))
