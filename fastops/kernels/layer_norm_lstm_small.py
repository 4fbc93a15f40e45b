"""Layer-norm LSTM, all steps in one launch: a program owns BLOCK_B rows of the batch and keeps W_hh on chip."""

import triton
import triton.language as tl

from fastops.kernels.layer_norm_lstm_row import (
    add_sums,
    keep_factor,
    load_gains,
    load_gates,
    place,
    row_backward,
    row_forward,
    store_gates,
)


@triton.jit
def _weight(w_ptr, gate: tl.constexpr, hidden, first, second):
    """W_hh of one gate with unit `first` and input `second` as its sides."""
    mask = (first < hidden) & (second < hidden)
    return tl.load(w_ptr + (gate * hidden + first) * hidden + second, mask=mask, other=0.0)


@triton.jit
def _last_step(rows, batch, steps, lengths_ptr, RAGGED: tl.constexpr):
    """Steps after which no row of the tile runs."""
    last = steps
    if RAGGED:
        last = tl.max(tl.load(lengths_ptr + rows, mask=rows < batch, other=0), axis=0).to(tl.int32)
    return last


@triton.jit
def small_forward_kernel(
    gates_ptr, stride_gt, stride_gb,  # (T, B, 4H), input product, normalised, biases added
    w_ptr,  # (4H, H)
    gain_ptr, gain_c_ptr, bias_c_ptr,  # (4H), (H), (H)
    h0_ptr, c0_ptr,  # (B, H)
    output_ptr, stride_ot, stride_ob,  # (T, B, H) by time
    h_n_ptr, c_n_ptr,  # (B, H)
    h_ptr, c_ptr,  # (T+1, B, H) by steps, the second in fp32, with SAVE
    product_ptr,  # (T, B, 4H) by steps, with SAVE
    mask_h_ptr, mask_c_ptr,  # (T, B, H) by steps, or None
    lengths_ptr,  # (B) or None
    keep_h, keep_c, eps, steps, batch, hidden,
    HAS_MASKS: tl.constexpr,
    RAGGED: tl.constexpr,
    REVERSE: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    columns = tl.arange(0, BLOCK_H)[None, :]
    inputs = tl.arange(0, BLOCK_H)[:, None]
    exists = (rows < batch)[:, None]
    tile = columns < hidden
    inside = tile & exists
    w_i = _weight(w_ptr, 0, hidden, columns, inputs)
    w_f = _weight(w_ptr, 1, hidden, columns, inputs)
    w_g = _weight(w_ptr, 2, hidden, columns, inputs)
    w_o = _weight(w_ptr, 3, hidden, columns, inputs)
    gain_i, gain_f, gain_g, gain_o, gain_c, bias_c = load_gains(gain_ptr, gain_c_ptr, bias_c_ptr, columns, hidden)
    wide = rows.to(tl.int64)[:, None]
    # within the tile, from 64-bit pointers that step on by slabs: half the registers of addresses
    state = tl.arange(0, BLOCK_B)[:, None] * hidden + columns
    product = tl.arange(0, BLOCK_B)[:, None] * 4 * hidden + columns
    slab = tl.cast(batch, tl.int64) * hidden
    first = tl.cast(tl.program_id(0), tl.int64) * BLOCK_B * hidden
    h0_ptr += first
    c0_ptr += first
    h_n_ptr += first
    c_n_ptr += first
    if HAS_MASKS:
        mask_h_ptr += first
        mask_c_ptr += first
    if SAVE:
        h_ptr += first
        c_ptr += first
        product_ptr += 4 * first
    # h goes on from step to step as it is stored
    h = tl.load(h0_ptr + state, mask=inside, other=0.0)
    c = tl.load(c0_ptr + state, mask=inside, other=0.0).to(tl.float32)
    if SAVE:
        tl.store(h_ptr + state, h, mask=inside)
        tl.store(c_ptr + state, c, mask=inside)
    last = _last_step(rows, batch, steps, lengths_ptr, RAGGED)
    for step in range(last):
        time, running = place(step, rows, batch, steps, lengths_ptr, RAGGED, REVERSE)
        time, running = time[:, None], running[:, None]
        xi, xf, xg, xo = load_gates(gates_ptr, time * stride_gt + wide * stride_gb + columns, hidden, inside & running)
        ai = tl.dot(h, w_i, input_precision=PRECISION)
        af = tl.dot(h, w_f, input_precision=PRECISION)
        ag = tl.dot(h, w_g, input_precision=PRECISION)
        ao = tl.dot(h, w_o, input_precision=PRECISION)
        if SAVE:
            store_gates(product_ptr, product, hidden, ai, af, ag, ao, inside)
            product_ptr += 4 * slab
        k_h = keep_factor(mask_h_ptr, keep_h, state, inside, HAS_MASKS)
        k_c = keep_factor(mask_c_ptr, keep_c, state, inside, HAS_MASKS)
        if HAS_MASKS:
            mask_h_ptr += slab
            mask_c_ptr += slab
        new_h, c = row_forward(
            xi, xf, xg, xo, ai, af, ag, ao, gain_i, gain_f, gain_g, gain_o, gain_c, bias_c,
            h.to(tl.float32), c, k_h, k_c, running, tile, hidden, eps,
        )  # fmt: skip
        h = new_h.to(h.dtype)
        if SAVE:
            h_ptr += slab
            c_ptr += slab
            tl.store(h_ptr + state, h, mask=inside)
            tl.store(c_ptr + state, c, mask=inside)
        seen = tl.where(running, h, 0.0).to(h.dtype)
        tl.store(output_ptr + time * stride_ot + wide * stride_ob + columns, seen, mask=inside)
    tl.store(h_n_ptr + state, h, mask=inside)
    tl.store(c_n_ptr + state, c.to(c_n_ptr.dtype.element_ty), mask=inside)
    if RAGGED:
        nothing = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
        # read again: what a maximum is made of would be held in registers over the loop
        last = _last_step(rows, batch, steps, lengths_ptr, RAGGED)
        for step in range(last, steps):
            at = tl.cast(step, tl.int64) * stride_ot + wide * stride_ob + columns
            tl.store(output_ptr + at, nothing.to(output_ptr.dtype.element_ty), mask=inside)
            if SAVE:  # a factor of the weight gradient, where the other factor is 0
                h_ptr += slab
                tl.store(h_ptr + state, nothing.to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def small_backward_kernel(
    gates_ptr, stride_gt, stride_gb,  # (T, B, 4H) by time
    w_ptr, gain_ptr, gain_c_ptr, bias_c_ptr,  # (4H, H), (4H), (H), (H)
    c_ptr,  # (T+1, B, H) fp32 by steps
    product_ptr,  # (T, B, 4H) by steps
    grad_output_ptr, stride_yt, stride_yb,  # (T, B, H) by time, or None
    mask_h_ptr, mask_c_ptr, lengths_ptr,
    grad_gates_ptr, stride_dt, stride_db,  # (T, B, 4H) by time
    grad_product_ptr,  # (T, B, 4H) by steps
    grad_h_ptr, grad_c_ptr,  # (B, H) fp32: of the final states, then of the initial ones
    sums_ptr,  # (programs, 6H) fp32
    keep_h, keep_c, eps, steps, batch, hidden,
    HAS_MASKS: tl.constexpr,
    RAGGED: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    columns = tl.arange(0, BLOCK_H)[None, :]
    units = tl.arange(0, BLOCK_H)[:, None]
    exists = (rows < batch)[:, None]
    tile = columns < hidden
    inside = tile & exists
    w_i = _weight(w_ptr, 0, hidden, units, columns)
    w_f = _weight(w_ptr, 1, hidden, units, columns)
    w_g = _weight(w_ptr, 2, hidden, units, columns)
    w_o = _weight(w_ptr, 3, hidden, units, columns)
    gain_i, gain_f, gain_g, gain_o, gain_c, bias_c = load_gains(gain_ptr, gain_c_ptr, bias_c_ptr, columns, hidden)
    wide = rows.to(tl.int64)[:, None]
    state = wide * hidden + columns
    slab = tl.cast(batch, tl.int64) * hidden
    grad_h = tl.load(grad_h_ptr + state, mask=inside, other=0.0)
    grad_c = tl.load(grad_c_ptr + state, mask=inside, other=0.0)
    nothing = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    sum_i, sum_f, sum_g, sum_o, sum_gain, sum_bias = nothing, nothing, nothing, nothing, nothing, nothing
    last = _last_step(rows, batch, steps, lengths_ptr, RAGGED)
    if RAGGED:
        for step in range(last, steps):
            own = tl.cast(step, tl.int64) * stride_dt + wide * stride_db + columns
            store_gates(grad_gates_ptr, own, hidden, nothing, nothing, nothing, nothing, inside)
            at = 4 * step * slab + wide * 4 * hidden + columns
            store_gates(grad_product_ptr, at, hidden, nothing, nothing, nothing, nothing, inside)
    for ago in range(last):
        step = last - 1 - ago
        time, running = place(step, rows, batch, steps, lengths_ptr, RAGGED, REVERSE)
        time, running = time[:, None], running[:, None]
        if grad_output_ptr is not None:
            own = time * stride_yt + wide * stride_yb + columns
            grad_h += tl.load(grad_output_ptr + own, mask=inside & running, other=0.0).to(tl.float32)
        xi, xf, xg, xo = load_gates(gates_ptr, time * stride_gt + wide * stride_gb + columns, hidden, inside & running)
        at = 4 * step * slab + wide * 4 * hidden + columns
        ai, af, ag, ao = load_gates(product_ptr, at, hidden, inside)
        before = step * slab + state
        c = tl.load(c_ptr + before, mask=inside, other=0.0)
        k_h = keep_factor(mask_h_ptr, keep_h, before, inside, HAS_MASKS)
        k_c = keep_factor(mask_c_ptr, keep_c, before, inside, HAS_MASKS)
        di, df, dg, do, ri, rf, rg, ro, ai, af, ag, ao, normal, grad_normal, grad_h, grad_c = row_backward(
            xi, xf, xg, xo, ai, af, ag, ao, gain_i, gain_f, gain_g, gain_o, gain_c, bias_c,
            c, grad_h, grad_c, k_h, k_c, running, tile, hidden, eps,
        )  # fmt: skip
        store_gates(grad_gates_ptr, time * stride_dt + wide * stride_db + columns, hidden, di, df, dg, do, inside)
        store_gates(grad_product_ptr, at, hidden, ri, rf, rg, ro, inside)
        sum_i += di * ai
        sum_f += df * af
        sum_g += dg * ag
        sum_o += do * ao
        sum_gain += grad_normal * normal
        sum_bias += grad_normal
        element = w_ptr.dtype.element_ty
        grad_h = tl.dot(ri.to(element), w_i, grad_h, input_precision=PRECISION)
        grad_h = tl.dot(rf.to(element), w_f, grad_h, input_precision=PRECISION)
        grad_h = tl.dot(rg.to(element), w_g, grad_h, input_precision=PRECISION)
        grad_h = tl.dot(ro.to(element), w_o, grad_h, input_precision=PRECISION)
    tl.store(grad_h_ptr + state, grad_h, mask=inside)
    tl.store(grad_c_ptr + state, grad_c, mask=inside)
    add_sums(
        sums_ptr + tl.program_id(0).to(tl.int64) * 6 * hidden,
        tl.arange(0, BLOCK_H), hidden,
        tl.sum(sum_i, 0), tl.sum(sum_f, 0), tl.sum(sum_g, 0), tl.sum(sum_o, 0), tl.sum(sum_gain, 0),
        tl.sum(sum_bias, 0), True,
    )  # fmt: skip
