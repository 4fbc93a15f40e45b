"""Backward pass of a recurrent layer over several programs a batch tile: the gradients of the slot sums, in one launch.

Same tiles as the forward kernel, steps in reverse. Every step turns dh and dc into gradients of the slot sums, which
are stored (the gradients of weights, biases and input are large products over T * B rows after the kernel), and
`dh[BLOCK_H, BLOCK_B] = W_slice^T @ d_sums^T` sums over all gates and units. Its long inner dimension is split over the
warps of a program by a batched product, each warp with its part of W_slice, and the gradients are exchanged through the
buffer they are stored in.

Bytes per step and program: reads GATES * H * BLOCK_B gradients (from L2), the saved slots, c and dy of its own tile;
writes its own slots' gradients. dh and dc stay in fp32 registers from the last step to the first.
"""

import triton
import triton.language as tl

from fastops.kernels.rnn_gates import FREE, arrive, inner, place, step_backward, wait


@triton.jit(do_not_specialize=FREE)
def backward_kernel(
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
    counter_ptr,  # (D, batch tiles) int32
    error_ptr,  # (2,) int32: 1 where a barrier did not complete
    T,
    B,
    rows,
    row_t,  # row of gates, cells and history = t * row_t + b * row_b
    row_b,
    stride_dt,
    stride_db,
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
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    RAGGED: tl.constexpr,
    BARRIER: tl.constexpr,
    FINISH: tl.constexpr,
    PRECISION: tl.constexpr,
    MATH: tl.constexpr,
):
    TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    SLOTS: tl.constexpr = 4 if MODE == "LSTM" or MODE == "GRU" else 1
    GATES: tl.constexpr = 3 if MODE == "GRU" else SLOTS
    CHUNKS: tl.constexpr = (H + BLOCK_K - 1) // BLOCK_K
    SHIFT: tl.constexpr = 2 if MODE == "GRU" else 0

    pid = tl.program_id(0)
    direction, tile_b, unit, unit_real, row, row64 = place(pid, first_tile, batch_tiles, B, H, BLOCK_H, BLOCK_B)
    real = unit_real[:, None] & (row < B)[None, :]
    readable = unit_real[:, None] & tl.full((1, BLOCK_B), True, tl.int1)
    dtype = w_hh_ptr.dtype.element_ty

    w_hh_ptr += direction.to(tl.int64) * (GATES * H * H)
    weights = ()
    for index in tl.static_range(GATES * CHUNKS):
        gate = (index // CHUNKS + SHIFT) % GATES
        ks = inner(index % CHUNKS, BLOCK_K, SPLIT)
        ptrs = w_hh_ptr + (gate * H + ks)[:, None, :] * H + unit[None, :, None]
        mask = unit_real[None, :, None] & (ks < H)[:, None, :]
        weights = weights + (tl.load(ptrs, mask=mask, other=0.0),)

    # steps are numbered as in the forward kernel; s counts them down
    sign = 1 - 2 * direction
    if RAGGED:
        length = tl.minimum(tl.maximum(tl.load(lengths_ptr + row64), 0), T).to(tl.int32)
        s_end = tl.minimum(s_end, tl.max(length, axis=0))
        longest = tl.max(length, axis=0)
    else:
        length = T + tl.zeros((BLOCK_B,), tl.int32)
        longest = T
    last = tl.maximum(s_end - 1, 0)
    time = (direction * (length - 1) + sign * last).to(tl.int64)
    g_row = time * row_t + row64 * row_b + direction.to(tl.int64) * rows
    g_step = (sign * row_t).to(tl.int64)
    d_row = time * stride_dt + row64 * stride_db + direction * H
    d_step = (sign * stride_dt).to(tl.int64)
    y_row = time * stride_yt + row64 * stride_yb + direction * H
    y_step = (sign * stride_yt).to(tl.int64)
    own = g_row[None, :] * H + unit[:, None]
    own_slots = g_row[None, :] * (SLOTS * H) + unit[:, None]
    own_output = d_row[None, :] + unit[:, None]
    own_history = (y_row if SLOTS == 1 else g_row * H)[None, :] + unit[:, None]
    own_state = ((direction * B + row64) * H)[None, :] + unit[:, None]
    all_slots = g_row * (SLOTS * H)

    dh = tl.load(d_state_ptr + own_state, mask=readable, other=0.0)
    dc = 0.0
    c = 0.0
    if MODE == "LSTM":
        dc = tl.load(d_cell_ptr + own_state, mask=readable, other=0.0)
        in_reach = readable & (last < length)[None, :]
        c = tl.load(cells_ptr + own, mask=in_reach, other=0.0)
    counter_ptr += direction * batch_tiles + (tile_b - first_tile)

    for back in range(0, s_end - s_start):
        s = s_end - 1 - back
        running = real
        if RAGGED:
            readable = unit_real[:, None] & (s < length)[None, :]
            running = real & readable
        # the loads of this step go before the wait where registers allow it
        if BLOCK_B > 16:
            if s + 1 < longest:
                if BARRIER:
                    patience = wait(counter_ptr, back * TILES, patience)
                later = d_gates_ptr + g_step * (SLOTS * H) + all_slots
                dh += _product(weights, later, s + 1 < length, RAGGED, H, BLOCK_K, SPLIT, GROUP, GATES, PRECISION)
        s0, s1, s2, s3 = dh, dh, dh, dh
        if SLOTS == 4:
            s0 = tl.load(gates_ptr + own_slots, mask=readable, other=0.0).to(tl.float32)
            s1 = tl.load(gates_ptr + own_slots + H, mask=readable, other=0.0).to(tl.float32)
            s2 = tl.load(gates_ptr + own_slots + 2 * H, mask=readable, other=0.0).to(tl.float32)
            s3 = tl.load(gates_ptr + own_slots + 3 * H, mask=readable, other=0.0).to(tl.float32)
        if MODE == "LSTM":
            if s > 0:
                in_reach = unit_real[:, None] & (s - 1 < length)[None, :]
                if not RAGGED:
                    in_reach = readable
                earlier = tl.load(cells_ptr - g_step * H + own, mask=in_reach, other=0.0)
            else:
                earlier = tl.load(c0_ptr + own_state, mask=unit_real[:, None], other=0.0).to(tl.float32)
        else:
            earlier = tl.load(history_ptr + own_history, mask=readable, other=0.0).to(tl.float32)
        dy = tl.load(d_output_ptr + own_output, mask=readable, other=0.0).to(tl.float32)

        if BLOCK_B <= 16:
            if s + 1 < longest:
                if BARRIER:
                    patience = wait(counter_ptr, back * TILES, patience)
                later = d_gates_ptr + g_step * (SLOTS * H) + all_slots
                dh += _product(weights, later, s + 1 < length, RAGGED, H, BLOCK_K, SPLIT, GROUP, GATES, PRECISION)

        d0, d1, d2, d3, next_dc, direct = step_backward(MODE, MATH, s0, s1, s2, s3, c, earlier, dh + dy, dc)
        d0 = d0.to(dtype)
        tl.store(d_gates_ptr + own_slots, d0, mask=running)
        if SLOTS == 4:
            d1 = d1.to(dtype)
            d2 = d2.to(dtype)
            d3 = d3.to(dtype)
            tl.store(d_gates_ptr + own_slots + H, d1, mask=running)
            tl.store(d_gates_ptr + own_slots + 2 * H, d2, mask=running)
            tl.store(d_gates_ptr + own_slots + 3 * H, d3, mask=running)
        if BARRIER:
            arrive(counter_ptr)
        if RAGGED:
            dh = tl.where(readable, direct, dh)
            if MODE == "LSTM":
                dc = tl.where(readable, next_dc, dc)
        else:
            dh = direct
            dc = next_dc
        if MODE == "LSTM":
            c = earlier
        gates_ptr -= g_step * (SLOTS * H)
        d_gates_ptr -= g_step * (SLOTS * H)
        cells_ptr -= g_step * H
        history_ptr -= y_step if SLOTS == 1 else g_step * H
        d_output_ptr -= d_step

    if FINISH:
        if longest > 0:
            if BARRIER:
                patience = wait(counter_ptr, (s_end - s_start) * TILES, patience)
            # one step was taken back too many, or with no steps here the pointers are still at step 0
            first = d_gates_ptr + all_slots + (g_step * (SLOTS * H) if BARRIER else 0)
            dh += _product(weights, first, 0 < length, RAGGED, H, BLOCK_K, SPLIT, GROUP, GATES, PRECISION)
    if BARRIER:
        if patience == 0:
            tl.store(error_ptr, 1)
            dh = tl.full((BLOCK_H, BLOCK_B), float("nan"), tl.float32)
    # the place once more, from a number that only the loop knows (0): else registers would hold it all the while
    pid += tl.minimum(patience, 0)
    direction, _, unit, unit_real, row, row64 = place(pid, first_tile, batch_tiles, B, H, BLOCK_H, BLOCK_B)
    real = unit_real[:, None] & (row < B)[None, :]
    own_state = ((direction * B + row64) * H)[None, :] + unit[:, None]
    tl.store(d_state_ptr + own_state, dh, mask=real)
    if MODE == "LSTM":
        tl.store(d_cell_ptr + own_state, dc, mask=real)


@triton.jit
def _product(
    weights,
    row_ptrs,
    running,
    RAGGED: tl.constexpr,
    H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    GATES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """W_slice^T @ d_sums^T, GROUP pieces of d_sums requested before their products."""
    CHUNKS: tl.constexpr = (H + BLOCK_K - 1) // BLOCK_K
    PIECES: tl.constexpr = GATES * CHUNKS
    BLOCK_H: tl.constexpr = weights[0].shape[1]
    BLOCK_B: tl.constexpr = row_ptrs.shape[0]
    total = tl.zeros((SPLIT, BLOCK_H, BLOCK_B), tl.float32)
    for first in tl.static_range(0, PIECES, GROUP):
        pieces = ()
        for index in tl.static_range(first, min(first + GROUP, PIECES)):
            ks = inner(index % CHUNKS, BLOCK_K, SPLIT)
            ptrs = row_ptrs[None, None, :] + index // CHUNKS * H + ks[:, :, None]
            if RAGGED or H % BLOCK_K != 0:
                mask = (ks < H)[:, :, None]
                if RAGGED:
                    mask = mask & running[None, None, :]
                pieces = pieces + (tl.load(ptrs, mask=mask, other=0.0, cache_modifier=".cg"),)
            else:
                pieces = pieces + (tl.load(ptrs, cache_modifier=".cg"),)
        for index in tl.static_range(first, min(first + GROUP, PIECES)):
            total = tl.dot(weights[index], pieces[index - first], total, input_precision=PRECISION)
    return tl.sum(total, axis=0)
