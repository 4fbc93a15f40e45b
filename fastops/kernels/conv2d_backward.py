"""Gradients of a convolution by implicit GEMM. PyTorch's own are the default; these run where the tuning table says so.

Input gradient, stride 1: the forward kernels on the output gradient, with the filter turned round and its channels
exchanged (`conv2d.convolve`). Other strides: `input_grad_kernel`, one program for BLOCK_M input pixels x BLOCK_N input
channels, reducing over the taps whose output pixel exists and over the output channels.

Weight gradient: `weight_grad_kernel`, one program for BLOCK_N output channels x BLOCK_J of the R S C filter elements
and one of SPLIT parts of the N P Q output pixels. The parts are fp32 and added in a fixed order: no atomics.

Letters: images (N, C, H, W), weight (K, C, R, S), maps and their gradient (N, K, P, Q).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastops.kernels._common import rounded, weight_operand
from fastops.kernels.conv2d import NUM_WARPS, TRITON, Tile, arithmetic, convolve, precision
from fastops.kernels.conv2d_layout import memory_format, new_maps

# pixels, channels of the result, reduction step; for 16-bit, TF32 and IEEE fp32
INPUT_TILES = {"16-bit": Tile(64, 64, 64, 3), "tf32": Tile(128, 64, 32, 3), "ieee": Tile(64, 64, 16, 2)}
# filter elements, output channels, pixels of a reduction step
WEIGHT_TILES = {"16-bit": Tile(64, 64, 64, 2), "tf32": Tile(64, 64, 32, 2), "ieee": Tile(32, 64, 16, 2)}
# Triton 3.9 would rather spill than hold fewer blocks on a multiprocessor
WEIGHT_OPTIONS = {"tf32": {"maxnreg": 128}} if TRITON >= (3, 9) else {}
SPLIT_PIXELS = 4096  # pixels that one part sums at least; by shape alone, so that results repeat on every GPU
MAX_SPLIT = 32


@triton.jit
def input_grad_kernel(
    grad_ptr, stride_gn, stride_gk, stride_gp, stride_gq,  # (N, K, P, Q)
    w_ptr,  # (R, S, K, C), contiguous
    dx_ptr, stride_xn, stride_xc, stride_xh, stride_xw,  # (N, C, H, W)
    N, H, W, C, P, Q,
    K: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    STEPS: tl.constexpr = (K + BLOCK_C - 1) // BLOCK_C
    blocks_n = tl.cdiv(C, BLOCK_N)
    m = (tl.program_id(0) // blocks_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = (tl.program_id(0) % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    n = m // (H * W)
    h = (m // W) % H
    w = m % W
    exists = m < N * H * W
    k = tl.arange(0, BLOCK_C)
    g_ptrs = grad_ptr + (n.to(tl.int64) * stride_gn)[:, None] + (k.to(tl.int64) * stride_gk)[None, :]
    w_ptrs = w_ptr + (k.to(tl.int64) * C)[:, None] + c[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, R * S * STEPS):
        tap = step // STEPS
        first = (step % STEPS) * BLOCK_C
        above = h + PAD_H - (tap // S) * DILATION_H
        left = w + PAD_W - (tap % S) * DILATION_W
        p = above // STRIDE_H
        q = left // STRIDE_W
        reached = (above >= 0) & (left >= 0) & (above % STRIDE_H == 0) & (left % STRIDE_W == 0) & (p < P) & (q < Q)
        offset = p.to(tl.int64) * stride_gp + q.to(tl.int64) * stride_gq + tl.cast(first, tl.int64) * stride_gk
        k_exists = k < K - first
        grad = tl.load(g_ptrs + offset[:, None], mask=(exists & reached)[:, None] & k_exists[None, :], other=0.0)
        weight = tl.load(
            w_ptrs + (tap * K + first).to(tl.int64) * C, mask=k_exists[:, None] & (c < C)[None, :], other=0.0
        )
        acc = tl.dot(grad, weight, acc, input_precision=PRECISION)
    pixel = n.to(tl.int64) * stride_xn + h.to(tl.int64) * stride_xh + w.to(tl.int64) * stride_xw
    offsets = pixel[:, None] + (c.to(tl.int64) * stride_xc)[None, :]
    tl.store(dx_ptr + offsets, acc.to(dx_ptr.dtype.element_ty), mask=exists[:, None] & (c < C)[None, :])


@triton.jit
def weight_grad_kernel(
    x_ptr, stride_xn, stride_xc, stride_xh, stride_xw,  # (N, C, H, W)
    grad_ptr, stride_gn, stride_gk, stride_gp, stride_gq,  # (N, K, P, Q)
    part_ptr,  # (SPLIT, K, R S C) fp32
    N, H, W, K, P, Q, pixels,
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    J: tl.constexpr = R * S * C
    BLOCKS_J: tl.constexpr = (J + BLOCK_J - 1) // BLOCK_J
    blocks_n = tl.cdiv(K, BLOCK_N)
    j = (tl.program_id(0) % BLOCKS_J) * BLOCK_J + tl.arange(0, BLOCK_J)
    k = ((tl.program_id(0) // BLOCKS_J) % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(0) // (BLOCKS_J * blocks_n)
    tap = j // C
    down = (tap // S) * DILATION_H - PAD_H
    right = (tap % S) * DILATION_W - PAD_W
    x_taps = down.to(tl.int64) * stride_xh + right.to(tl.int64) * stride_xw + (j % C).to(tl.int64) * stride_xc
    g_channels = k.to(tl.int64) * stride_gk
    acc = tl.zeros((BLOCK_N, BLOCK_J), tl.float32)
    # `pixels` is at least one: a loop that may not run is serialised
    for start in range(0, pixels, BLOCK_M):
        m = part * pixels + start + tl.arange(0, BLOCK_M)
        exists = (m < N * P * Q) & (m < (part + 1) * pixels)
        n = m // (P * Q)
        p = (m // Q) % P
        q = m % Q
        g_pixels = n.to(tl.int64) * stride_gn + p.to(tl.int64) * stride_gp + q.to(tl.int64) * stride_gq
        mask = (k < K)[:, None] & exists[None, :]
        grad = tl.load(grad_ptr + g_channels[:, None] + g_pixels[None, :], mask=mask, other=0.0)
        h = p * STRIDE_H
        w = q * STRIDE_W
        x_pixels = n.to(tl.int64) * stride_xn + h.to(tl.int64) * stride_xh + w.to(tl.int64) * stride_xw
        rows = h[:, None] + down[None, :]
        columns = w[:, None] + right[None, :]
        inside = (rows >= 0) & (rows < H) & (columns >= 0) & (columns < W)
        mask = inside & exists[:, None] & (j < J)[None, :]
        x = tl.load(x_ptr + x_pixels[:, None] + x_taps[None, :], mask=mask, other=0.0)
        acc = tl.dot(grad, rounded(x, PRECISION), acc, input_precision=PRECISION)
    offsets = (part.to(tl.int64) * K + k.to(tl.int64))[:, None] * J + j[None, :]
    tl.store(part_ptr + offsets, acc, mask=(k < K)[:, None] & (j < J)[None, :])


def input_grad(
    grad: torch.Tensor,
    weight: torch.Tensor,
    size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> torch.Tensor:
    """Gradient of the (N, C, *size) input of a convolution."""
    k, c, r, s = weight.shape
    turned = [dilation[0] * (r - 1) - padding[0], dilation[1] * (s - 1) - padding[1]]
    if list(stride) == [1, 1] and min(turned) >= 0:
        swapped = weight.flip(2, 3).transpose(0, 1)
        if memory_format(grad, weight) == torch.channels_last:
            swapped = swapped.contiguous(memory_format=torch.channels_last)
        return convolve(grad, swapped, None, stride, turned, dilation, (size[0], size[1]), relu=False)
    n, _, p, q = grad.shape
    dx = new_maps(grad, (n, c, *size), memory_format(grad, weight), grad.dtype)
    if not dx.numel():
        return dx
    kind = arithmetic(grad.dtype)
    tile = INPUT_TILES[kind]
    weight = weight_operand(weight.permute(2, 3, 0, 1).contiguous(), precision(kind))  # (R, S, K, C)
    input_grad_kernel[(triton.cdiv(n * size[0] * size[1], tile.block_m) * triton.cdiv(c, tile.block_n),)](
        grad, *grad.stride(), weight, dx, *dx.stride(), n, *size, c, p, q,
        K=k, R=r, S=s, STRIDE_H=stride[0], STRIDE_W=stride[1], PAD_H=padding[0], PAD_W=padding[1],
        DILATION_H=dilation[0], DILATION_W=dilation[1], PRECISION=precision(kind),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_C=tile.block_c,
        num_warps=NUM_WARPS, num_stages=tile.num_stages,
    )  # fmt: skip
    return dx


def weight_grad(
    x: torch.Tensor,
    grad: torch.Tensor,
    size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> torch.Tensor:
    """Gradient of the (K, C, *size) weight of a convolution."""
    n, c, h, w = x.shape
    k, p, q = grad.shape[1:]
    dw = new_maps(grad, (k, c, *size), memory_format(x, grad), grad.dtype)
    if not grad.numel():
        return dw.zero_()
    kind = arithmetic(grad.dtype)
    tile = WEIGHT_TILES[kind]
    split, pixels = split_pixels(n * p * q)
    reduction = size[0] * size[1] * c
    parts = grad.new_empty((split, k, *size, c), dtype=torch.float32)
    weight_grad_kernel[(split * triton.cdiv(reduction, tile.block_m) * triton.cdiv(k, tile.block_n),)](
        x, *x.stride(), grad, *grad.stride(), parts, n, h, w, k, p, q, pixels,
        C=c, R=size[0], S=size[1], STRIDE_H=stride[0], STRIDE_W=stride[1], PAD_H=padding[0], PAD_W=padding[1],
        DILATION_H=dilation[0], DILATION_W=dilation[1], PRECISION=precision(kind),
        BLOCK_J=tile.block_m, BLOCK_N=tile.block_n, BLOCK_M=tile.block_c,
        num_warps=NUM_WARPS, num_stages=tile.num_stages, **WEIGHT_OPTIONS.get(kind, {}),
    )  # fmt: skip
    return dw.copy_(parts.sum(0).permute(0, 3, 1, 2))


def split_pixels(pixels: int) -> tuple[int, int]:
    """How many parts the sum over pixels has, and the pixels of each."""
    split = max(1, min(MAX_SPLIT, pixels // SPLIT_PIXELS))
    return split, triton.cdiv(pixels, split)
