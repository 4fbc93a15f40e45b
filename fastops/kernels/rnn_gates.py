"""Pointwise halves of a recurrent step, forward and backward, and the barrier between the programs of a batch tile.

Gate slots. An LSTM keeps torch's i, f, g, o. A GRU has q = h W_hn^T + b_hn apart from x_n, because the reset gate
multiplies q alone, so its four slots are q, r, z, n: the first three take part in the recurrent product, the last three
in the input product, and both are contiguous columns of one buffer. A plain RNN has one slot.

MATH. "exact" is Triton's sigmoid and an accurate tanh, for fp32 and in the interpreter. "fast" drops guards and keeps
an absolute error near 1e-7, for fp16. "approx" is the GPU's tanh instruction, half as many slow operations with a
relative error up to 2^-11: lost in bf16's rounding (simulated: error 1.1 times that without it), too coarse for fp16
(2.2 times; for the sigmoids and the candidate alone still up to 1.9, too near the bound of twice stock's error).
"""

import triton
import triton.language as tl

from fastops.kernels._common import tanh

# arguments that no kernel is compiled anew for, whatever their value
FREE = ("T", "B", "rows", "row_t", "row_b", "first_tile", "batch_tiles", "s_start", "s_end", "patience")


@triton.jit
def _sigmoid(x, MATH: tl.constexpr):
    if MATH == "approx":
        y = 0.5 * _tanh_approx(0.5 * x) + 0.5
    elif MATH == "fast":
        y = _reciprocal(1.0 + _exp2(x * -1.4426950408889634))
    else:
        y = tl.sigmoid(x)
    return y


@triton.jit
def _tanh(x, MATH: tl.constexpr):
    if MATH == "approx":
        y = _tanh_approx(x)
    elif MATH == "fast":
        y = 1.0 - 2.0 * _reciprocal(1.0 + _exp2(x * 2.8853900817779268))
    else:
        y = tanh(x)
    return y


# one instruction each, where Triton's own guard against denormals and overflow that cannot matter here
@triton.jit
def _exp2(x):
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _reciprocal(x):
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _tanh_approx(x):
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def step_forward(MODE: tl.constexpr, MATH: tl.constexpr, s0, s1, s2, s3, h, c):
    """(h', c', saved slots) from the sums of the slots; h is the state before, used by a GRU only."""
    if MODE == "LSTM":
        s0 = _sigmoid(s0, MATH)
        s1 = _sigmoid(s1, MATH)
        s2 = _tanh(s2, MATH)
        s3 = _sigmoid(s3, MATH)
        c = s1 * c + s0 * s2
        h = s3 * _tanh(c, MATH)
    elif MODE == "GRU":
        s1 = _sigmoid(s1, MATH)
        s2 = _sigmoid(s2, MATH)
        s3 = _tanh(s3 + s1 * s0, MATH)
        h = (1.0 - s2) * s3 + s2 * h
    elif MODE == "RNN_TANH":
        h = _tanh(s0, MATH)
    else:
        h = tl.maximum(s0, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return h, c, s0, s1, s2, s3


@triton.jit
def step_backward(MODE: tl.constexpr, MATH: tl.constexpr, s0, s1, s2, s3, c, earlier, dh, dc):
    """Gradients of the slot sums, of c before the step, and the part of dh that bypasses the recurrent product.

    `earlier` is c before the step for an LSTM, h before the step for a GRU and h after the step for a plain RNN.
    """
    # 0, for NaN and Inf too; with a 0 that the compiler knows the persistent kernels spill registers
    d0, d1, d2, d3, direct = dh, dh, dh, dh, tl.minimum(tl.abs(dh), 0.0)
    if MODE == "LSTM":
        tc = _tanh(c, MATH)
        d3 = dh * tc * s3 * (1.0 - s3)
        dc += dh * s3 * (1.0 - tc * tc)
        d0 = dc * s2 * s0 * (1.0 - s0)
        d1 = dc * earlier * s1 * (1.0 - s1)
        d2 = dc * s0 * (1.0 - s2 * s2)
        dc = dc * s1
    elif MODE == "GRU":
        d3 = dh * (1.0 - s2) * (1.0 - s3 * s3)
        d2 = dh * (earlier - s3) * s2 * (1.0 - s2)
        d1 = d3 * s0 * s1 * (1.0 - s1)
        d0 = d3 * s1
        direct = dh * s2
    elif MODE == "RNN_TANH":
        d0 = dh * (1.0 - earlier * earlier)
    else:
        d0 = tl.where(earlier <= 0.0, 0.0, dh)  # NaN passes, as in torch
    return d0, d1, d2, d3, dc, direct


@triton.jit
def place(pid, first_tile, batch_tiles, B, H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr):
    """Direction, batch tile, units and batch rows of a program; rows past the batch repeat its last one."""
    TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    direction = pid // (TILES * batch_tiles)
    tile_b = first_tile + pid // TILES % batch_tiles
    unit = pid % TILES * BLOCK_H + tl.arange(0, BLOCK_H)
    row = tile_b * BLOCK_B + tl.arange(0, BLOCK_B)
    unit_real = unit < H
    if H % BLOCK_H == 0:
        unit_real = tl.full((BLOCK_H,), True, tl.int1)
    return direction, tile_b, unit, unit_real, row, tl.minimum(row, B - 1).to(tl.int64)


@triton.jit
def inner(chunk, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr):
    """(SPLIT, BLOCK_K / SPLIT) indices along the inner dimension, a row for each part."""
    warp = tl.arange(0, SPLIT) * (BLOCK_K // SPLIT)
    return chunk * BLOCK_K + warp[:, None] + tl.arange(0, BLOCK_K // SPLIT)[None, :]


@triton.jit
def arrive(counter_ptr):
    """Publish this program's stores and count it in."""
    # without a barrier of the whole program the release orders the stores of one thread only
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait(counter_ptr, target, patience):
    """Wait until `target` programs were counted; returns the patience left, 0 once it ever ran out.

    A program that gave up does not wait again, so a broken launch ends soon instead of hanging the GPU.
    """
    left = patience
    seen = target - 1
    while (seen < target) & (left > 0):
        seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
        left -= 1
    return tl.where(seen < target, 0, patience)
