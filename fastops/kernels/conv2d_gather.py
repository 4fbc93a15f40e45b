"""Implicit GEMM that gathers: conv2d + bias + ReLU for any stride, dilation, padding, channel count and layout.

One program computes BLOCK_M output pixels x BLOCK_N output channels. A is gathered from the images pixel by pixel,
B is the weight as (K, R, S, C). Whether filter row r (column s) of a pixel lies inside the image is one bit of a mask
made once per pixel, so that the main loop tests two bits and adds one scalar instead of comparing coordinates: the
"optimized" iterator of CUTLASS (https://github.com/NVIDIA/cutlass, implicit GEMM convolution).

Letters: images (N, C, H, W), weight (K, R, S, C), maps (N, K, P, Q); M = N P Q pixels.
"""

import triton
import triton.language as tl

from fastops.kernels._common import relu


@triton.jit
def _pixels(pid_m, N, P, Q, BLOCK_M: tl.constexpr):
    """Image, row and column of the BLOCK_M output pixels of a program, and which of them exist."""
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    return m // (P * Q), (m // Q) % P, m % Q, m < N * P * Q


@triton.jit
def _taps_inside(first, exists, SIZE, TAPS: tl.constexpr, DILATION: tl.constexpr):
    """Bit t of each pixel: whether its filter tap t, at first + t DILATION, lies inside [0, SIZE)."""
    bits = tl.zeros_like(first)
    for tap in tl.static_range(TAPS):
        position = first + tap * DILATION
        bits |= ((position >= 0) & (position < SIZE) & exists).to(tl.int32) << tap
    return bits


@triton.jit
def _finish(
    acc,  # (BLOCK_M, BLOCK_N)
    bias_ptr,  # (K,)
    y_ptr, stride_yn, stride_yk, stride_yp, stride_yq,  # (N, K, P, Q)
    n, p, q, k, exists, K,
    HAS_BIAS: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    mask = exists[:, None] & (k < K)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    if RELU:
        acc = relu(acc)
    pixel = n.to(tl.int64) * stride_yn + p.to(tl.int64) * stride_yp + q.to(tl.int64) * stride_yq
    offsets = pixel[:, None] + (k.to(tl.int64) * stride_yk)[None, :]
    tl.store(y_ptr + offsets, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gather_kernel(
    x_ptr, stride_xn, stride_xc, stride_xh, stride_xw,  # (N, C, H, W)
    w_ptr,  # (K, R, S, C), contiguous
    bias_ptr,  # (K,)
    y_ptr, stride_yn, stride_yk, stride_yp, stride_yq,  # (N, K, P, Q)
    N, H, W, K, P, Q,
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Reduces over (tap, block of channels): for C that fills a block."""
    STEPS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    EVEN_C: tl.constexpr = C % BLOCK_C == 0
    blocks_n = tl.cdiv(K, BLOCK_N)
    n, p, q, exists = _pixels(tl.program_id(0) // blocks_n, N, P, Q, BLOCK_M)
    k = (tl.program_id(0) % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    h = p * STRIDE_H - PAD_H
    w = q * STRIDE_W - PAD_W
    rows = _taps_inside(h, exists, H, R, DILATION_H)
    columns = _taps_inside(w, exists, W, S, DILATION_W)
    c = tl.arange(0, BLOCK_C)
    pixel = n.to(tl.int64) * stride_xn + h.to(tl.int64) * stride_xh + w.to(tl.int64) * stride_xw
    # may point outside the images; such taps are masked
    x_ptrs = x_ptr + pixel[:, None] + (c.to(tl.int64) * stride_xc)[None, :]
    w_ptrs = w_ptr + (k.to(tl.int64) * (R * S * C))[None, :] + c[:, None]
    step_r = tl.cast(stride_xh, tl.int64) * DILATION_H
    step_s = tl.cast(stride_xw, tl.int64) * DILATION_W
    step_c = tl.cast(stride_xc, tl.int64) * BLOCK_C
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, R * S * STEPS):
        tap = step // STEPS
        block = step % STEPS
        inside = ((rows >> (tap // S)) & (columns >> (tap % S)) & 1) != 0
        offset = (tap // S) * step_r + (tap % S) * step_s + block * step_c
        c_exists = c < C - block * BLOCK_C
        if EVEN_C:
            a = tl.load(x_ptrs + offset, mask=inside[:, None], other=0.0)
        else:
            a = tl.load(x_ptrs + offset, mask=inside[:, None] & c_exists[None, :], other=0.0)
        if EVEN_C and EVEN_K:
            b = tl.load(w_ptrs + (tap * C + block * BLOCK_C))
        else:
            b = tl.load(w_ptrs + (tap * C + block * BLOCK_C), mask=(k < K)[None, :] & c_exists[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    _finish(acc, bias_ptr, y_ptr, stride_yn, stride_yk, stride_yp, stride_yq, n, p, q, k, exists, K, HAS_BIAS, RELU)


@triton.jit
def gather_flat_kernel(
    x_ptr, stride_xn, stride_xc, stride_xh, stride_xw,  # (N, C, H, W)
    w_ptr,  # (K, R, S, C), contiguous
    bias_ptr,  # (K,)
    y_ptr, stride_yn, stride_yk, stride_yp, stride_yq,  # (N, K, P, Q)
    N, H, W, K, P, Q,
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Reduces over R S C as one axis: for the few channels of a first layer, which would leave a block mostly empty."""
    blocks_n = tl.cdiv(K, BLOCK_N)
    n, p, q, exists = _pixels(tl.program_id(0) // blocks_n, N, P, Q, BLOCK_M)
    k = (tl.program_id(0) % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    h = p * STRIDE_H - PAD_H
    w = q * STRIDE_W - PAD_W
    rows = _taps_inside(h, exists, H, R, DILATION_H)
    columns = _taps_inside(w, exists, W, S, DILATION_W)
    pixel = n.to(tl.int64) * stride_xn + h.to(tl.int64) * stride_xh + w.to(tl.int64) * stride_xw
    j = tl.arange(0, BLOCK_C)
    x_ptrs = x_ptr + pixel[:, None]
    w_ptrs = w_ptr + (k.to(tl.int64) * (R * S * C))[None, :] + j[:, None]
    step_r = tl.cast(stride_xh, tl.int64) * DILATION_H
    step_s = tl.cast(stride_xw, tl.int64) * DILATION_W
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, R * S * C, BLOCK_C):
        position = start + j
        tap = position // C
        r = tl.minimum(tap // S, 31)  # bit 31 is never set: past the last tap everything is outside
        s = tap % S
        offset = r * step_r + s * step_s + (position % C) * tl.cast(stride_xc, tl.int64)
        inside = ((rows[:, None] >> r[None, :]) & (columns[:, None] >> s[None, :]) & 1) != 0
        a = tl.load(x_ptrs + offset[None, :], mask=inside & (position < R * S * C)[None, :], other=0.0)
        b = tl.load(w_ptrs + start, mask=(k < K)[None, :] & (position < R * S * C)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    _finish(acc, bias_ptr, y_ptr, stride_yn, stride_yk, stride_yp, stride_yq, n, p, q, k, exists, K, HAS_BIAS, RELU)
