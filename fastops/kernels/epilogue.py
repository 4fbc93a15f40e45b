"""What follows a convolution, one pass each way: bias + ReLU, and bias + ReLU + max-pool with one-byte codes.

One program handles a tile of BLOCK_M pixels x BLOCK_N channels. Bytes moved, for maps of E elements of b bytes and
pooled maps of Z elements:

    bias_relu                 read E b, write E b      (eager: bias 2 E b, ReLU 2 E b)
    bias_relu_pool            read E b, write Z (b+1)  (eager: bias 2 E b, ReLU 2 E b, pool E b + Z (b+8))
    relu_backward             read 2 E b, write E b    (eager: the same, and E b for the bias)
    relu_pool_backward        read Z (b+1), write E b  (eager: pool Z (b+8) + E b, ReLU 3 E b, bias E b)

The code of a pooled element is the position, in its window, of the maximum that max_pool2d would take (the first of
equals, the last NaN), or DEAD where ReLU gave zero and no gradient passes. Backward gathers: each pixel looks at the
windows that cover it, so nothing is added atomically and results are bitwise repeatable. The bias gradient is summed
per program into fp32 rows, which are then added in a fixed order.

Letters: maps (N, K, P, Q), pooled maps (N, K, U, V).
"""

import torch
import triton
import triton.language as tl

from fastops.kernels._common import relu
from fastops.kernels.conv2d_layout import is_channels_last, memory_format, new_maps, output_size

DEAD = tl.constexpr(255)  # max_pool2d windows have at most 255 positions: 0..254
# tile (pixels, channels), with its long side along the axis that is contiguous in memory
BLOCKS = {"channels_last": (32, 64), "contiguous": (512, 4)}
POOL_BLOCKS = {"channels_last": (16, 64), "contiguous": (128, 2)}  # smaller: each pixel holds a window's addresses
PARTIAL_ROWS = 2048  # rows of partial bias gradients at most: 15 programs for each of 132 multiprocessors


@triton.jit
def _tile(K, BLOCK_N: tl.constexpr):
    """First pixel tile and channels of a program, of programs numbered channels first."""
    blocks_n = tl.cdiv(K, BLOCK_N)
    k = (tl.program_id(0) % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    return tl.program_id(0) // blocks_n, k


@triton.jit
def _offsets(image, stride_n, pixel, stride_m, k, stride_k):
    """(BLOCK_M, BLOCK_N) offsets of pixels of images, across channels."""
    rows = image.to(tl.int64) * stride_n + pixel.to(tl.int64) * stride_m
    return rows[:, None] + (k.to(tl.int64) * stride_k)[None, :]


@triton.jit
def bias_relu_kernel(
    x_ptr,  # (N, K, P Q), the strides of y
    bias_ptr,  # (K,)
    y_ptr, stride_yn, stride_yk, stride_ym,  # (N, K, P Q)
    N, K, PQ,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile, k = _tile(K, BLOCK_N)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = (m < N * PQ)[:, None] & (k < K)[None, :]
    offsets = _offsets(m // PQ, stride_yn, m % PQ, stride_ym, k, stride_yk)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offsets, relu(x).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def relu_backward_kernel(
    grad_ptr,  # (N, K, P Q), the strides of y
    y_ptr,  # (N, K, P Q)
    dx_ptr, stride_yn, stride_yk, stride_ym,  # (N, K, P Q)
    partial_ptr,  # (rows, K) fp32
    N, K, PQ, tiles,
    WANT_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row, k = _tile(K, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile in range(0, tiles):
        m = (row * tiles + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (m < N * PQ)[:, None] & (k < K)[None, :]
        offsets = _offsets(m // PQ, stride_yn, m % PQ, stride_ym, k, stride_yk)
        y = tl.load(y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        dx = tl.where(y <= 0.0, 0.0, grad)  # a NaN lets the gradient through, as in torch
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        total += dx
    if WANT_BIAS:
        tl.store(partial_ptr + row.to(tl.int64) * K + k, tl.sum(total, axis=0), mask=k < K)


@triton.jit
def bias_relu_pool_kernel(
    x_ptr, stride_xn, stride_xk, stride_xp, stride_xq,  # (N, K, P, Q)
    bias_ptr,  # (K,)
    z_ptr, stride_zn, stride_zk, stride_zm,  # (N, K, U V)
    code_ptr,  # (N, K, U V), the strides of z
    N, K, P, Q, U, V,
    POOL_H: tl.constexpr, POOL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    HAS_BIAS: tl.constexpr, WANT_CODES: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile, k = _tile(K, BLOCK_N)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    image = m // (U * V)
    p = ((m // V) % U) * STRIDE_H - PAD_H
    q = (m % V) * STRIDE_W - PAD_W
    exists = (m < N * U * V)[:, None] & (k < K)[None, :]
    corner = _offsets(image, stride_xn, p, stride_xp, k, stride_xk) + (q.to(tl.int64) * stride_xq)[:, None]
    bias = tl.zeros((BLOCK_N,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    best = tl.full((BLOCK_M, BLOCK_N), -1.0, tl.float32)  # below every ReLU
    code = tl.full((BLOCK_M, BLOCK_N), DEAD, tl.int32)
    for position in tl.range(0, POOL_H * POOL_W, loop_unroll_factor=UNROLL):
        i = position // POOL_W
        j = position % POOL_W
        inside = (p + i >= 0) & (p + i < P) & (q + j >= 0) & (q + j < Q)
        step = tl.cast(i, tl.int64) * stride_xp + tl.cast(j, tl.int64) * stride_xq
        x = tl.load(x_ptr + corner + step, mask=exists & inside[:, None], other=0.0).to(tl.float32)
        # rounded before it is compared, so that ties are those of the stored maps
        y = relu(x + bias[None, :]).to(z_ptr.dtype.element_ty).to(tl.float32)
        better = ((y > best) | (y != y)) & inside[:, None]
        best = tl.where(better, y, best)
        code = tl.where(better, position, code)
    out = _offsets(image, stride_zn, m % (U * V), stride_zm, k, stride_zk)
    tl.store(z_ptr + out, best.to(z_ptr.dtype.element_ty), mask=exists)
    if WANT_CODES:
        code = tl.where(best == 0.0, DEAD, code)
        tl.store(code_ptr + out, code.to(tl.uint8), mask=exists)


@triton.jit
def relu_pool_backward_kernel(
    grad_ptr, stride_zn, stride_zk, stride_zm,  # (N, K, U V)
    code_ptr,  # (N, K, U V), the strides of the gradient
    dx_ptr, stride_xn, stride_xk, stride_xm,  # (N, K, P Q)
    partial_ptr,  # (rows, K) fp32
    N, K, P, Q, U, V, tiles,
    POOL_H: tl.constexpr, POOL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    WANT_BIAS: tl.constexpr, UNROLL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    ACROSS: tl.constexpr = (POOL_W + STRIDE_W - 1) // STRIDE_W  # windows that cover a pixel, at most, along a row
    COVER: tl.constexpr = ((POOL_H + STRIDE_H - 1) // STRIDE_H) * ACROSS
    row, k = _tile(K, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile in range(0, tiles):
        m = (row * tiles + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        image = m // (P * Q)
        p = (m // Q) % P + PAD_H
        q = m % Q + PAD_W
        exists = (m < N * P * Q)[:, None] & (k < K)[None, :]
        dx = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for window in tl.range(0, COVER, loop_unroll_factor=UNROLL):
            u = p // STRIDE_H - window // ACROSS
            v = q // STRIDE_W - window % ACROSS
            i = p - u * STRIDE_H
            j = q - v * STRIDE_W
            covers = (u >= 0) & (u < U) & (v >= 0) & (v < V) & (i < POOL_H) & (j < POOL_W)
            offsets = _offsets(image, stride_zn, u * V + v, stride_zm, k, stride_zk)
            mask = exists & covers[:, None]
            code = tl.load(code_ptr + offsets, mask=mask, other=DEAD).to(tl.int32)
            grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            dx += tl.where(code == (i * POOL_W + j)[:, None], grad, 0.0)
        offsets = _offsets(image, stride_xn, m % (P * Q), stride_xm, k, stride_xk)
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=exists)
        total += dx
    if WANT_BIAS:
        tl.store(partial_ptr + row.to(tl.int64) * K + k, tl.sum(total, axis=0), mask=k < K)


def bias_relu(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """relu(x + bias) of (N, K, P, Q) maps."""
    x = _dense(x)
    y = new_maps(x, x.shape, memory_format(x), x.dtype)
    if y.numel():
        block_m, block_n = _blocks(y, BLOCKS)
        n, k, pq, strides = _as_pixels(y)
        grid = (triton.cdiv(n * pq, block_m) * triton.cdiv(k, block_n),)
        bias_relu_kernel[grid](
            x, _vector(bias), y, *strides, n, k, pq, HAS_BIAS=bias is not None, BLOCK_M=block_m, BLOCK_N=block_n
        )
    return y


def bias_relu_backward(grad: torch.Tensor, y: torch.Tensor, want_bias: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x and bias, given y = relu(x + bias); the second is empty where it is not wanted."""
    y = _dense(y)
    grad = grad.contiguous(memory_format=memory_format(y))
    dx = new_maps(y, y.shape, memory_format(y), y.dtype)
    block_m, block_n = _blocks(y, BLOCKS)
    n, k, pq, strides = _as_pixels(y)
    rows, tiles = partial_rows(n * pq, block_m)
    partial = grad.new_empty((rows, k) if want_bias else (0,), dtype=torch.float32)
    if y.numel():
        relu_backward_kernel[(rows * triton.cdiv(k, block_n),)](
            grad, y, dx, *strides, partial, n, k, pq, tiles, WANT_BIAS=want_bias, BLOCK_M=block_m, BLOCK_N=block_n
        )
    return dx, _bias_gradient(partial, y.dtype, want_bias)


def bias_relu_pool(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    pool: list[int],
    stride: list[int],
    padding: list[int],
    want_codes: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """max_pool2d(relu(x + bias)) and, where they are wanted, its codes (else an empty tensor)."""
    size = (*x.shape[:2], *output_size(x.shape[2:], pool, stride, padding))
    z = new_maps(x, size, memory_format(x), x.dtype)
    codes = new_maps(x, size, memory_format(x), torch.uint8) if want_codes else x.new_empty((0,), dtype=torch.uint8)
    if z.numel():
        block_m, block_n = _blocks(z, POOL_BLOCKS)
        n, k, uv, strides = _as_pixels(z)
        bias_relu_pool_kernel[(triton.cdiv(n * uv, block_m) * triton.cdiv(k, block_n),)](
            x, *x.stride(), _vector(bias), z, *strides, codes, n, k, *x.shape[2:], *size[2:], *pool, *stride, *padding,
            HAS_BIAS=bias is not None, WANT_CODES=want_codes, UNROLL=_unroll(pool[0] * pool[1]),
            BLOCK_M=block_m, BLOCK_N=block_n,
        )  # fmt: skip
    return z, codes


def bias_relu_pool_backward(
    grad: torch.Tensor,
    codes: torch.Tensor,
    size: list[int],
    pool: list[int],
    stride: list[int],
    padding: list[int],
    want_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x, of height and width `size`, and of the bias; the second is empty where it is not wanted."""
    grad = grad.contiguous(memory_format=memory_format(codes))
    dx = new_maps(grad, (*grad.shape[:2], *size), memory_format(codes), grad.dtype)
    block_m, block_n = _blocks(dx, POOL_BLOCKS)
    n, k, pq, strides = _as_pixels(dx)
    rows, tiles = partial_rows(n * pq, block_m)
    partial = grad.new_empty((rows, k) if want_bias else (0,), dtype=torch.float32)
    if dx.numel():
        cover = triton.cdiv(pool[0], stride[0]) * triton.cdiv(pool[1], stride[1])
        relu_pool_backward_kernel[(rows * triton.cdiv(k, block_n),)](
            grad, *_as_pixels(codes)[3], codes, dx, *strides, partial, n, k, *size, *grad.shape[2:], tiles,
            *pool, *stride, *padding,
            WANT_BIAS=want_bias, UNROLL=_unroll(cover), BLOCK_M=block_m, BLOCK_N=block_n,
        )  # fmt: skip
    return dx, _bias_gradient(partial, grad.dtype, want_bias)


def _dense(maps: torch.Tensor) -> torch.Tensor:
    return maps.contiguous(memory_format=memory_format(maps))


def _vector(bias: torch.Tensor | None) -> torch.Tensor | None:
    """The bias without gaps: kernels take no stride of it."""
    return None if bias is None else bias.contiguous()


def _as_pixels(maps: torch.Tensor) -> tuple[int, int, int, tuple[int, int, int]]:
    """N, K, P Q of dense maps, and the strides of these three axes."""
    n, k, p, q = maps.shape
    strides = (p * q * k, 1, k) if memory_format(maps) == torch.channels_last else (k * p * q, p * q, 1)
    return n, k, p * q, strides


def _blocks(maps: torch.Tensor, blocks: dict[str, tuple[int, int]]) -> tuple[int, int]:
    return blocks["channels_last" if is_channels_last(maps) else "contiguous"]


def partial_rows(pixels: int, block_m: int) -> tuple[int, int]:
    """Programs along the pixels, and tiles of each; a matter of shape alone, so that sums repeat on every GPU."""
    blocks = triton.cdiv(pixels, block_m)
    tiles = max(triton.cdiv(blocks, PARTIAL_ROWS), 1)
    return triton.cdiv(blocks, tiles), tiles


def _bias_gradient(partial: torch.Tensor, dtype: torch.dtype, wanted: bool) -> torch.Tensor:
    return partial.sum(0).to(dtype) if wanted else partial.to(dtype)


def _unroll(steps: int) -> int:
    """Whole small windows, so that their loads are in flight together; large ones step by step."""
    return steps if steps <= 16 else 1
