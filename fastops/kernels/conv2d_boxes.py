"""Implicit GEMM fed by TMA: conv2d + bias + ReLU for channels_last tensors whose channels fill whole blocks.

`boxes_kernel` (stride 1): one program computes a box of BOX_N x BOX_H x BOX_W output pixels x BLOCK_N output channels.
Tap (r, s) needs the same box of the images, moved by (r, s): one TMA load, which also writes the zeros of the padding.
The weight is the left operand: only a right operand may be reshaped and transposed without leaving shared memory, so
that both feed the tensor cores from there.

`batch_kernel` (any stride): one program computes one output pixel of BLOCK_M images x BLOCK_N output channels. Every
operand is a box of rank two, and taps that fall on padding are skipped: 10 % of AlexNet's multiply-adds, 21 % on its
6 x 6 maps.

The taps and channels are one flat loop, with counters in place of divisions. Letters: images (N, H, W, C), weight
(K, R, S, C), maps (N, P, Q, K).
"""

import triton
import triton.language as tl

from fastops.kernels._common import relu


@triton.jit
def boxes_kernel(
    x_desc,  # (N, H, W, C) in [BOX_N, BOX_H, BOX_W, BLOCK_C]
    w_desc,  # (K, R S C) in [BLOCK_N, BLOCK_C]
    bias_ptr,  # (K,)
    y_desc,  # (N, P, Q, K) in [BOX_N, BOX_H, BOX_W, BLOCK_N]
    K, P, Q,
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    BLOCK_M: tl.constexpr = BOX_N * BOX_H * BOX_W
    blocks_n = tl.cdiv(K, BLOCK_N)
    blocks_q = tl.cdiv(Q, BOX_W)
    blocks_p = tl.cdiv(P, BOX_H)
    k = (tl.program_id(0) % blocks_n) * BLOCK_N
    box = tl.program_id(0) // blocks_n
    q = (box % blocks_q) * BOX_W
    p = ((box // blocks_q) % blocks_p) * BOX_H
    n = (box // (blocks_q * blocks_p)) * BOX_N
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    c = 0
    h = p - PAD_H
    w = q - PAD_W
    last_w = w + S * DILATION_W
    for step in range(0, R * S * (C // BLOCK_C)):
        x = x_desc.load([n, h, w, c]).reshape(BLOCK_M, BLOCK_C)
        acc = tl.dot(w_desc.load([k, step * BLOCK_C]), x.T, acc, input_precision=PRECISION)
        c += BLOCK_C
        row_done = c >= C
        c = tl.where(row_done, 0, c)
        w = tl.where(row_done, w + DILATION_W, w)
        taps_done = w >= last_w
        w = tl.where(taps_done, q - PAD_W, w)
        h = tl.where(taps_done, h + DILATION_H, h)
    if HAS_BIAS:
        channel = k + tl.arange(0, BLOCK_N)
        acc += tl.load(bias_ptr + channel, mask=channel < K, other=0.0).to(tl.float32)[:, None]
    if RELU:
        acc = relu(acc)
    y_desc.store([n, p, q, k], acc.to(y_desc.dtype).T.reshape(BOX_N, BOX_H, BOX_W, BLOCK_N))


@triton.jit
def batch_kernel(
    x_desc,  # (N, H W C) in [BLOCK_M, BLOCK_C]
    w_desc,  # (K, R S C) in [BLOCK_N, BLOCK_C]
    bias_ptr,  # (K,)
    y_desc,  # (N, P Q K) in [BLOCK_M, BLOCK_N]; K % BLOCK_N == 0
    H, W, K, P, Q,
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    blocks_n = K // BLOCK_N
    k = (tl.program_id(0) % blocks_n) * BLOCK_N
    pixel = (tl.program_id(0) // blocks_n) % (P * Q)
    n = (tl.program_id(0) // (blocks_n * P * Q)) * BLOCK_M
    h = (pixel // Q) * STRIDE_H - PAD_H
    w = (pixel % Q) * STRIDE_W - PAD_W
    first_r = tl.maximum(0, (DILATION_H - 1 - h) // DILATION_H)
    first_s = tl.maximum(0, (DILATION_W - 1 - w) // DILATION_W)
    end_r = tl.minimum(R, (H - h + DILATION_H - 1) // DILATION_H)
    end_s = tl.minimum(S, (W - w + DILATION_W - 1) // DILATION_W)
    steps = (end_r - first_r) * (end_s - first_s) * (C // BLOCK_C)
    # the launcher gives this kernel only shapes where every pixel has a tap; a loop that may not run is serialised
    tl.assume(steps > 0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    c = 0
    r = first_r
    s = first_s
    for _ in range(0, steps):
        x = x_desc.load([n, ((h + r * DILATION_H) * W + w + s * DILATION_W) * C + c])
        acc = tl.dot(x, w_desc.load([k, (r * S + s) * C + c]).T, acc, input_precision=PRECISION)
        c += BLOCK_C
        tap_done = c >= C
        c = tl.where(tap_done, 0, c)
        s = tl.where(tap_done, s + 1, s)
        row_done = s >= end_s
        s = tl.where(row_done, first_s, s)
        r = tl.where(row_done, r + 1, r)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + k + tl.arange(0, BLOCK_N)).to(tl.float32)[None, :]
    if RELU:
        acc = relu(acc)
    y_desc.store([n, pixel * K + k], acc.to(y_desc.dtype))
