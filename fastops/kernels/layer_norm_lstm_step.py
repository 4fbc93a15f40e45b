"""Layer-norm LSTM, one launch a step: one program normalises a row and updates its state; products are cuBLAS's."""

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
def step_forward_kernel(
    gates_ptr, stride_gt, stride_gb,  # (T, B, 4H), input product, normalised, biases added
    product_ptr,  # (B, 4H): h W_hh^T of this step
    gain_ptr,  # (4H)
    gain_c_ptr, bias_c_ptr,  # (H), (H)
    h_ptr, c_ptr,  # (B, H) and (B, H) fp32 before the step
    h_out_ptr, c_out_ptr,  # and after it
    output_ptr, stride_ot, stride_ob,  # (T, B, H) by time
    mask_h_ptr, mask_c_ptr,  # (B, H) of this step, or None
    lengths_ptr,  # (B) or None
    keep_h, keep_c, eps, step, steps, batch, hidden,
    HAS_MASKS: tl.constexpr,
    RAGGED: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) + tl.arange(0, 1)
    columns = tl.arange(0, BLOCK_H)[None, :]
    inside = columns < hidden
    time, running = place(step, rows, batch, steps, lengths_ptr, RAGGED, REVERSE)
    rows = rows.to(tl.int64)[:, None]
    time, running = time[:, None], running[:, None]
    gain_i, gain_f, gain_g, gain_o, gain_c, bias_c = load_gains(gain_ptr, gain_c_ptr, bias_c_ptr, columns, hidden)
    xi, xf, xg, xo = load_gates(gates_ptr, time * stride_gt + rows * stride_gb + columns, hidden, inside & running)
    ai, af, ag, ao = load_gates(product_ptr, rows * 4 * hidden + columns, hidden, inside)
    state = rows * hidden + columns
    h = tl.load(h_ptr + state, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(c_ptr + state, mask=inside, other=0.0)
    k_h = keep_factor(mask_h_ptr, keep_h, state, inside, HAS_MASKS)
    k_c = keep_factor(mask_c_ptr, keep_c, state, inside, HAS_MASKS)
    h, c = row_forward(
        xi, xf, xg, xo, ai, af, ag, ao, gain_i, gain_f, gain_g, gain_o, gain_c, bias_c,
        h, c, k_h, k_c, running, inside, hidden, eps,
    )  # fmt: skip
    tl.store(h_out_ptr + state, h.to(h_out_ptr.dtype.element_ty), mask=inside)
    tl.store(c_out_ptr + state, c, mask=inside)
    seen = tl.where(running, h, 0.0).to(output_ptr.dtype.element_ty)
    tl.store(output_ptr + time * stride_ot + rows * stride_ob + columns, seen, mask=inside)


@triton.jit
def step_backward_kernel(
    gates_ptr, stride_gt, stride_gb,  # (T, B, 4H) by time
    product_ptr,  # (B, 4H): h W_hh^T of this step
    gain_ptr, gain_c_ptr, bias_c_ptr,  # (4H), (H), (H)
    c_ptr,  # (B, H) fp32 before the step
    grad_output_ptr, stride_yt, stride_yb,  # (T, B, H) by time, or None
    mask_h_ptr, mask_c_ptr, lengths_ptr,
    grad_gates_ptr, stride_dt, stride_db,  # (T, B, 4H) by time
    grad_product_ptr,  # (B, 4H) of this step
    through_ptr,  # (B, H): what reached h through the recurrent product of the step after this
    grad_h_ptr, grad_c_ptr,  # (B, H) fp32, read and written
    sums_ptr,  # (programs, 6H) fp32, read and written
    keep_h, keep_c, eps, step, steps, batch, hidden,
    HAS_MASKS: tl.constexpr,
    RAGGED: tl.constexpr,
    REVERSE: tl.constexpr,
    FIRST: tl.constexpr,  # the first launch, for the last step
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK_H)[None, :]
    inside = columns < hidden
    gain_i, gain_f, gain_g, gain_o, gain_c, bias_c = load_gains(gain_ptr, gain_c_ptr, bias_c_ptr, columns, hidden)
    sums_ptr += tl.program_id(0).to(tl.int64) * 6 * hidden
    for row in range(tl.program_id(0), batch, tl.num_programs(0)):
        rows = row + tl.arange(0, 1)
        time, running = place(step, rows, batch, steps, lengths_ptr, RAGGED, REVERSE)
        rows = rows.to(tl.int64)[:, None]
        time, running = time[:, None], running[:, None]
        state = rows * hidden + columns
        grad_h = tl.load(grad_h_ptr + state, mask=inside, other=0.0)
        grad_c = tl.load(grad_c_ptr + state, mask=inside, other=0.0)
        if not FIRST:
            grad_h += tl.load(through_ptr + state, mask=inside, other=0.0).to(tl.float32)
        if grad_output_ptr is not None:
            own = time * stride_yt + rows * stride_yb + columns
            grad_h += tl.load(grad_output_ptr + own, mask=inside & running, other=0.0).to(tl.float32)
        xi, xf, xg, xo = load_gates(gates_ptr, time * stride_gt + rows * stride_gb + columns, hidden, inside & running)
        at = rows * 4 * hidden + columns
        ai, af, ag, ao = load_gates(product_ptr, at, hidden, inside)
        c = tl.load(c_ptr + state, mask=inside, other=0.0)
        k_h = keep_factor(mask_h_ptr, keep_h, state, inside, HAS_MASKS)
        k_c = keep_factor(mask_c_ptr, keep_c, state, inside, HAS_MASKS)
        di, df, dg, do, ri, rf, rg, ro, ai, af, ag, ao, normal, grad_normal, grad_h, grad_c = row_backward(
            xi, xf, xg, xo, ai, af, ag, ao, gain_i, gain_f, gain_g, gain_o, gain_c, bias_c,
            c, grad_h, grad_c, k_h, k_c, running, inside, hidden, eps,
        )  # fmt: skip
        store_gates(grad_gates_ptr, time * stride_dt + rows * stride_db + columns, hidden, di, df, dg, do, inside)
        store_gates(grad_product_ptr, at, hidden, ri, rf, rg, ro, inside)
        tl.store(grad_h_ptr + state, grad_h, mask=inside)
        tl.store(grad_c_ptr + state, grad_c, mask=inside)
        # straight to memory: sums held over the loop would cost registers that wide rows need
        add_sums(
            sums_ptr, columns, hidden, di * ai, df * af, dg * ag, do * ao, grad_normal * normal, grad_normal, False
        )
