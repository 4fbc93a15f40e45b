"""Forward pass of a recurrent layer over several programs a batch tile: all time steps and directions in one launch.

A program owns BLOCK_B rows of the batch and BLOCK_H hidden units, keeps its slice of W_hh on chip, and every step
computes `sums[slots * BLOCK_H, BLOCK_B] = W_slice @ h^T` (transposed, so that the tensor core's long side is gate rows
and its short side is the batch). The programs of a batch tile exchange h through the output tensor and meet at one
counter, which only ever grows; all of them must be resident.

Bytes per step and program: reads BLOCK_B * H of h (from L2) and slots * BLOCK_H * BLOCK_B of the input product, writes
BLOCK_H * BLOCK_B of h, and with SAVE the slots, c and the state before the step. W_hh is read once per launch.
"""

import triton
import triton.language as tl

from fastops.kernels.rnn_gates import FREE, arrive, place, step_forward, wait


@triton.jit(do_not_specialize=FREE)
def forward_kernel(
    gates_ptr,  # (D, rows, SLOTS * H) input product; with SAVE overwritten by what backward needs
    w_hh_ptr,  # (D, G * H, H)
    b_hn_ptr,  # (D, H) of a GRU
    h_in_ptr,  # (D, B, H) state before step s_start
    h_out_ptr,  # (D, B, H) state after step s_end - 1
    cell_ptr,  # (D, B, H) fp32: c before s_start, overwritten by c after s_end - 1
    output_ptr,  # (T, B, D * H) by strides
    before_ptr,  # (D, rows, H) with SAVE: h before each step
    cells_ptr,  # (D, rows, H) fp32 with SAVE: c after each step
    lengths_ptr,  # (B,) integers with RAGGED
    counter_ptr,  # (D, batch tiles) int32
    error_ptr,  # (2,) int32: 1 where a barrier did not complete; 1 + a batch row whose length is out of range
    T,
    B,
    rows,
    row_t,  # row of gates, before and cells = t * row_t + b * row_b
    row_b,
    stride_yt,
    stride_yb,
    first_tile,
    batch_tiles,
    s_start,
    s_end,
    patience,
    MODE: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RAGGED: tl.constexpr,
    SAVE: tl.constexpr,
    BARRIER: tl.constexpr,
    PRECISION: tl.constexpr,
    MATH: tl.constexpr,
):
    TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    CHUNKS: tl.constexpr = (H + BLOCK_K - 1) // BLOCK_K
    SLOTS: tl.constexpr = 4 if MODE == "LSTM" or MODE == "GRU" else 1
    GATES: tl.constexpr = 3 if MODE == "GRU" else SLOTS

    pid = tl.program_id(0)
    direction, tile_b, unit, unit_real, row, row64 = place(pid, first_tile, batch_tiles, B, H, BLOCK_H, BLOCK_B)
    real = unit_real[:, None] & (row < B)[None, :]
    # columns of the products are independent, so rows past the batch may repeat its last one; only stores are masked
    readable = unit_real[:, None] & tl.full((1, BLOCK_B), True, tl.int1)
    dtype = w_hh_ptr.dtype.element_ty

    w_hh_ptr += direction.to(tl.int64) * (GATES * H * H)
    weights = ()
    m = tl.arange(0, SLOTS * BLOCK_H)
    slot = m // BLOCK_H
    m_unit = pid % TILES * BLOCK_H + m % BLOCK_H
    gate = (slot + 2) % 3 if MODE == "GRU" else slot
    w_ptrs = w_hh_ptr + (gate * H + m_unit)[:, None] * H
    m_real = ((m_unit < H) & (slot < GATES))[:, None]
    for chunk in tl.static_range(CHUNKS):
        ks = (chunk * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
        weights = weights + (tl.load(w_ptrs + ks, mask=m_real & (ks < H), other=0.0),)

    # step s is time s forward and time length - 1 - s backward: both start at step 0 with the initial state
    sign = 1 - 2 * direction
    if RAGGED:
        given = tl.load(lengths_ptr + row64)
        length = tl.minimum(tl.maximum(given, 0), T).to(tl.int32)  # 64-bit ones are cut before that
        wrong = tl.max(tl.where(given == length, 0, row64 + 1), axis=0)
        if wrong > 0:
            tl.store(error_ptr + 1, wrong.to(tl.int32))
        s_end = tl.minimum(s_end, tl.max(length, axis=0))
    else:
        length = T + tl.zeros((BLOCK_B,), tl.int32)
    time = (direction * (length - 1) + sign * s_start).to(tl.int64)
    g_row = time * row_t + row64 * row_b + direction.to(tl.int64) * rows
    y_row = time * stride_yt + row64 * stride_yb + direction * H
    g_step = (sign * row_t).to(tl.int64)
    y_step = (sign * stride_yt).to(tl.int64)
    state_row = (direction * B + row64) * H

    h_state = tl.load(h_in_ptr + state_row[None, :] + unit[:, None], mask=readable, other=0.0)
    c = 0.0
    if MODE == "LSTM":
        c = tl.load(cell_ptr + state_row[None, :] + unit[:, None], mask=readable, other=0.0)
    bias = 0.0
    if MODE == "GRU":
        bias = tl.load(b_hn_ptr + direction * H + unit, mask=unit < H, other=0.0).to(tl.float32)[:, None]
    g_ptrs = gates_ptr + g_row[None, :] * (SLOTS * H) + unit[:, None]
    y_ptrs = output_ptr + y_row[None, :] + unit[:, None]
    before_ptrs = before_ptr + g_row[None, :] * H + unit[:, None]
    cells_ptrs = cells_ptr + g_row[None, :] * H + unit[:, None]
    counter_ptr += direction * batch_tiles + (tile_b - first_tile)
    h_rows = h_in_ptr + state_row
    y_rows = output_ptr + y_row
    for s in range(s_start, s_end):
        running = real
        if RAGGED:
            readable = unit_real[:, None] & (s < length)[None, :]
            running = real & readable
        # while the others arrive
        x0, x1, x2, x3 = _load_slots(g_ptrs, readable, bias, MODE, H)
        if SAVE:
            tl.store(before_ptrs, h_state, mask=running)
        if BARRIER:
            patience = wait(counter_ptr, (s - s_start) * TILES, patience)
        chunks = _load_state(h_rows, s < length, RAGGED, H, BLOCK_K, CHUNKS)
        sums = tl.dot(weights[0], chunks[0], input_precision=PRECISION)
        for chunk in tl.static_range(1, CHUNKS):
            sums = tl.dot(weights[chunk], chunks[chunk], sums, input_precision=PRECISION)
        if SLOTS == 4:
            even, odd = tl.split(tl.permute(tl.reshape(sums, (2, 2, BLOCK_H, BLOCK_B)), (2, 3, 0, 1)))
            sum0, sum2 = tl.split(even)
            sum1, sum3 = tl.split(odd)
        else:
            sum0, sum1, sum2, sum3 = sums, 0.0, 0.0, 0.0
        h, next_c, s0, s1, s2, s3 = step_forward(
            MODE, MATH, sum0 + x0, sum1 + x1, sum2 + x2, sum3 + x3, h_state.to(tl.float32), c
        )
        h = h.to(dtype)
        tl.store(y_ptrs, h, mask=running)
        if RAGGED:
            h = tl.where(running, h, h_state)
            next_c = tl.where(running, next_c, c) if MODE == "LSTM" else next_c
        h_state = h
        c = next_c
        if BARRIER:
            arrive(counter_ptr)

        if SAVE and SLOTS == 4:
            tl.store(g_ptrs, s0, mask=running)
            tl.store(g_ptrs + H, s1, mask=running)
            tl.store(g_ptrs + 2 * H, s2, mask=running)
            tl.store(g_ptrs + 3 * H, s3, mask=running)
        if SAVE and MODE == "LSTM":
            tl.store(cells_ptrs, c, mask=running)
        h_rows = y_rows
        y_rows += y_step
        y_ptrs += y_step
        g_ptrs += g_step * (SLOTS * H)
        before_ptrs += g_step * H
        cells_ptrs += g_step * H

    if BARRIER:
        if patience == 0:
            tl.store(error_ptr, 1)
            h_state = tl.full((BLOCK_H, BLOCK_B), float("nan"), dtype)
    # the place once more, from a number that only the loop knows (0): else registers would hold it all the while
    pid += tl.minimum(patience, 0)
    direction, _, unit, unit_real, row, row64 = place(pid, first_tile, batch_tiles, B, H, BLOCK_H, BLOCK_B)
    real = unit_real[:, None] & (row < B)[None, :]
    own_state = ((direction * B + row64) * H)[None, :] + unit[:, None]
    tl.store(h_out_ptr + own_state, h_state, mask=real)
    if MODE == "LSTM":
        tl.store(cell_ptr + own_state, c, mask=real)


@triton.jit
def _load_state(row_ptrs, running, RAGGED: tl.constexpr, H: tl.constexpr, BLOCK_K: tl.constexpr, CHUNKS: tl.constexpr):
    """h^T from other programs, so past L1; all of it is requested before the first product."""
    chunks = ()
    for chunk in tl.static_range(CHUNKS):
        ks = chunk * BLOCK_K + tl.arange(0, BLOCK_K)
        ptrs = row_ptrs[None, :] + ks[:, None]
        if RAGGED or H % BLOCK_K != 0:
            mask = (ks < H)[:, None]
            if RAGGED:
                mask = mask & running[None, :]
            chunks = chunks + (tl.load(ptrs, mask=mask, other=0.0, cache_modifier=".cg"),)
        else:
            chunks = chunks + (tl.load(ptrs, cache_modifier=".cg"),)
    return chunks


@triton.jit
def _load_slots(ptrs, mask, bias, MODE: tl.constexpr, H: tl.constexpr):
    """The input product of one step, a slot each; the first slot of a GRU has a bias only."""
    x0, x1, x2, x3 = bias, 0.0, 0.0, 0.0
    if MODE != "GRU":
        x0 = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    if MODE == "LSTM" or MODE == "GRU":
        x1 = tl.load(ptrs + H, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(ptrs + 2 * H, mask=mask, other=0.0).to(tl.float32)
        x3 = tl.load(ptrs + 3 * H, mask=mask, other=0.0).to(tl.float32)
    return x0, x1, x2, x3
