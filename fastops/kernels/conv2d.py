"""Implicit-GEMM conv2d + bias + ReLU: which form of kernel runs for which shape, and its launchers.

Letters: images (N, C, H, W), weight (K, C, R, S), maps (N, K, P, Q). The GEMM has M = N P Q rows, K columns and reduces
over R S C. Bytes moved at least: images, weight and maps once each; bias and ReLU cost none.

Forms, the first that fits is taken:

    batch        TMA, one output pixel of 128 images; skips the taps that fall on padding     conv2d_boxes
    boxes        TMA, boxes of output pixels, operands swapped                                conv2d_boxes
    gather       pointers and tap masks: any stride, dilation, layout, channel count          conv2d_gather
    gather_flat  the same for the few channels of a first layer                               conv2d_gather

Four warps everywhere: with eight, this loop over taps is known to be miscompiled on H100
(https://github.com/pytorch/pytorch/issues/173068).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from fastops import _env
from fastops.kernels._common import weight_operand
from fastops.kernels.conv2d_boxes import batch_kernel, boxes_kernel
from fastops.kernels.conv2d_gather import gather_flat_kernel, gather_kernel
from fastops.kernels.conv2d_layout import memory_format, new_maps, output_size

NUM_WARPS = 4
FLAT_CHANNELS = 32  # with fewer, a block of channels would be mostly empty
SMALL_MAP = 256  # output pixels up to which one pixel of many images beats a box of one image


class Tile(NamedTuple):
    """Pixels, output channels, reduction step and pipeline stages of a program."""

    block_m: int
    block_n: int
    block_c: int
    num_stages: int


# by arithmetic, and whether it is for K <= 64; 16-bit and TF32 run on tensor cores, IEEE fp32 does not
GATHER_TILES = {
    ("16-bit", False): Tile(128, 128, 64, 3),
    ("16-bit", True): Tile(128, 64, 64, 3),
    ("tf32", False): Tile(128, 64, 32, 3),
    ("ieee", False): Tile(64, 64, 16, 2),
}
# Triton 3.6 makes three times the instructions of the gather by single elements, and spills with the larger tile
TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
# by arithmetic; smaller, because every element has its own address
FLAT_TILES = {
    "16-bit": Tile(128, 64, 64, 2) if TRITON >= (3, 7) else Tile(64, 64, 32, 3),
    "tf32": Tile(64, 64, 32, 3),
    "ieee": Tile(64, 32, 16, 2),
}
# by arithmetic, and whether K % 128 == 0: the output channels of one program fill the tile
BATCH_TILES = {
    ("16-bit", True): Tile(128, 128, 64, 3),
    ("16-bit", False): Tile(128, 64, 64, 4),
    ("tf32", True): Tile(128, 128, 32, 3),
    ("tf32", False): Tile(128, 64, 32, 4),
}
# by arithmetic, and whether K <= 64
BOX_TILES = {
    ("16-bit", False): Tile(128, 128, 64, 3),
    ("16-bit", True): Tile(256, 64, 64, 3),
    ("tf32", False): Tile(128, 128, 32, 3),
    ("tf32", True): Tile(256, 64, 32, 3),
}
# images x rows x columns; the one that covers the maps with the least waste is taken
BOXES = {
    128: ((1, 8, 16), (2, 8, 8), (8, 4, 4), (32, 2, 2), (128, 1, 1)),
    256: ((1, 16, 16), (4, 8, 8), (16, 4, 4), (64, 2, 2), (256, 1, 1)),
}


class Shape(NamedTuple):
    """One convolution by its numbers; hashable, so that what follows from it is computed once."""

    n: int
    c: int
    h: int
    w: int
    k: int
    r: int
    s: int
    p: int
    q: int
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> torch.Tensor:
    """relu(conv2d(x, weight, bias))."""
    size = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    return convolve(x, weight, bias, stride, padding, dilation, size, relu=True)


def convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    size: tuple[int, int],
    relu: bool,
    form: str | None = None,
) -> torch.Tensor:
    """conv2d with `size` output pixels, ReLU on request, by the given form or the first that fits."""
    layout = memory_format(x, weight)
    y = new_maps(x, (x.shape[0], weight.shape[0], *size), layout, x.dtype)
    if not y.numel():
        return y
    k, c, r, s = weight.shape
    n, _, h, w = x.shape
    shape = Shape(n, c, h, w, k, r, s, *size, tuple(stride), tuple(padding), tuple(dilation))
    kind = arithmetic(x.dtype)
    if c >= FLAT_CHANNELS:
        x = x.contiguous(memory_format=torch.channels_last)
    weight = weight_operand(weight.permute(0, 2, 3, 1).contiguous(), precision(kind))  # (K, R, S, C)
    bias = None if bias is None else bias.contiguous()
    if form is None:
        aligned = layout == torch.channels_last and (x.data_ptr() | weight.data_ptr()) % 16 == 0
        form = choose_form(shape, kind, aligned and has_tma(x.device))
    launch = {"batch": _batch, "boxes": _boxes, "gather": _gather, "gather_flat": _gather_flat}[form]
    launch(shape, kind, x, weight, bias, y, relu)
    return y


def has_tma(device: torch.device) -> bool:
    """Whether the device has tensor memory accelerators: sm_90 and newer, and the interpreter."""
    return device.type == "cpu" or _env.interpreting() or _env.capability(_env.index_of(device)) >= (9, 0)


def arithmetic(dtype: torch.dtype) -> str:
    """What multiplies: "16-bit" and "tf32", where torch lets fp32 convolutions round to it, or "ieee"."""
    if dtype != torch.float32:
        return "16-bit"
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


@functools.lru_cache(maxsize=1024)
def choose_form(shape: Shape, kind: str, tma: bool) -> str:
    """The first form that fits; `tma` says whether device, layout and alignment allow TMA."""
    if shape.c < FLAT_CHANNELS:
        return "gather_flat"
    if tma and why_not_batch(shape, kind) is None and (shape.stride != (1, 1) or shape.p * shape.q <= SMALL_MAP):
        return "batch"
    if tma and why_not_boxes(shape, kind) is None:
        return "boxes"
    return "gather"


def why_not_boxes(shape: Shape, kind: str) -> str | None:
    """Why the box kernel cannot run this shape, TMA given."""
    if kind == "ieee":
        return "IEEE fp32 does not run on tensor cores"
    tile = BOX_TILES[kind, shape.k <= 64]
    if shape.stride != (1, 1):
        return f"stride {shape.stride} is not 1"
    if shape.c % tile.block_c:
        return f"C = {shape.c} is not a multiple of {tile.block_c}"
    if shape.k % 8:
        return f"K = {shape.k} is not a multiple of 8, which TMA needs to store"
    return None


def why_not_batch(shape: Shape, kind: str) -> str | None:
    """Why the batch kernel cannot run this shape, TMA given, or would waste more than a fifth of its rows."""
    if kind == "ieee":
        return "IEEE fp32 does not run on tensor cores"
    tile = BATCH_TILES[kind, shape.k % 128 == 0]
    if shape.c % tile.block_c:
        return f"C = {shape.c} is not a multiple of {tile.block_c}"
    if shape.k % tile.block_n:
        return f"K = {shape.k} is not a multiple of {tile.block_n}"
    if max(shape.h * shape.w * shape.c, shape.p * shape.q * shape.k) >= 2**31:
        return "one image or its maps have 2**31 elements or more"
    rows = triton.cdiv(shape.n, tile.block_m) * tile.block_m
    if shape.n * 5 < rows * 4:
        return f"N = {shape.n} fills less than four fifths of {rows} rows"
    if not (_every_pixel_has_a_tap(shape, 0) and _every_pixel_has_a_tap(shape, 1)):
        return "some output pixel sees padding only"
    return None


def _every_pixel_has_a_tap(shape: Shape, axis: int) -> bool:
    size, taps, outputs = (shape.h, shape.w)[axis], (shape.r, shape.s)[axis], (shape.p, shape.q)[axis]
    stride, padding, dilation = shape.stride[axis], shape.padding[axis], shape.dilation[axis]
    firsts = (output * stride - padding for output in range(outputs))
    return all(any(0 <= first + tap * dilation < size for tap in range(taps)) for first in firsts)


def choose_box(shape: Shape, pixels: int) -> tuple[int, int, int]:
    """The box of `pixels` that covers the maps with the least waste; the first of equals."""

    def covered(box: tuple[int, int, int]) -> int:
        return triton.cdiv(shape.n, box[0]) * triton.cdiv(shape.p, box[1]) * triton.cdiv(shape.q, box[2])

    return min(BOXES[pixels], key=covered)


def precision(kind: str) -> str:
    """`input_precision` of tl.dot for what `arithmetic` names."""
    return "tf32" if kind == "tf32" else "ieee"


def _gather(shape, kind, x, weight, bias, y, relu):
    narrow = shape.k <= 64 and (kind, True) in GATHER_TILES
    tile = GATHER_TILES[kind, narrow]
    even = shape.k % tile.block_n == 0
    _launch_gather(gather_kernel, tile, shape, kind, x, weight, bias, y, relu, EVEN_K=even)


def _gather_flat(shape, kind, x, weight, bias, y, relu):
    _launch_gather(gather_flat_kernel, FLAT_TILES[kind], shape, kind, x, weight, bias, y, relu)


def _launch_gather(kernel, tile, shape, kind, x, weight, bias, y, relu, **constexprs):
    grid = (triton.cdiv(shape.n * shape.p * shape.q, tile.block_m) * triton.cdiv(shape.k, tile.block_n),)
    kernel[grid](
        x, *x.stride(), weight, bias, y, *y.stride(), shape.n, shape.h, shape.w, shape.k, shape.p, shape.q,
        C=shape.c, R=shape.r, S=shape.s, STRIDE_H=shape.stride[0], STRIDE_W=shape.stride[1],
        PAD_H=shape.padding[0], PAD_W=shape.padding[1],
        DILATION_H=shape.dilation[0], DILATION_W=shape.dilation[1],
        HAS_BIAS=bias is not None, RELU=relu, PRECISION=precision(kind), **constexprs,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_C=tile.block_c,
        num_warps=NUM_WARPS, num_stages=tile.num_stages,
    )  # fmt: skip


def _boxes(shape, kind, x, weight, bias, y, relu):
    tile = BOX_TILES[kind, shape.k <= 64]
    box = choose_box(shape, tile.block_m)
    n, c, h, w, k, r, s, p, q = shape[:9]
    grid = (triton.cdiv(n, box[0]) * triton.cdiv(p, box[1]) * triton.cdiv(q, box[2]) * triton.cdiv(k, tile.block_n),)
    boxes_kernel[grid](
        TensorDescriptor(x, [n, h, w, c], [h * w * c, w * c, c, 1], [*box, tile.block_c]),
        TensorDescriptor(weight, [k, r * s * c], [r * s * c, 1], [tile.block_n, tile.block_c]),
        bias,
        TensorDescriptor(y, [n, p, q, k], [p * q * k, q * k, k, 1], [*box, tile.block_n]),
        k, p, q,
        C=c, R=r, S=s, PAD_H=shape.padding[0], PAD_W=shape.padding[1],
        DILATION_H=shape.dilation[0], DILATION_W=shape.dilation[1],
        HAS_BIAS=bias is not None, RELU=relu, PRECISION=precision(kind),
        BOX_N=box[0], BOX_H=box[1], BOX_W=box[2], BLOCK_N=tile.block_n, BLOCK_C=tile.block_c,
        num_warps=NUM_WARPS, num_stages=tile.num_stages,
    )  # fmt: skip


def _batch(shape, kind, x, weight, bias, y, relu):
    tile = BATCH_TILES[kind, shape.k % 128 == 0]
    n, c, h, w, k, r, s, p, q = shape[:9]
    batch_kernel[(triton.cdiv(n, tile.block_m) * p * q * (k // tile.block_n),)](
        TensorDescriptor(x, [n, h * w * c], [h * w * c, 1], [tile.block_m, tile.block_c]),
        TensorDescriptor(weight, [k, r * s * c], [r * s * c, 1], [tile.block_n, tile.block_c]),
        bias,
        TensorDescriptor(y, [n, p * q * k], [p * q * k, 1], [tile.block_m, tile.block_n]),
        h, w, k, p, q,
        C=c, R=r, S=s, STRIDE_H=shape.stride[0], STRIDE_W=shape.stride[1],
        PAD_H=shape.padding[0], PAD_W=shape.padding[1],
        DILATION_H=shape.dilation[0], DILATION_W=shape.dilation[1],
        HAS_BIAS=bias is not None, RELU=relu, PRECISION=precision(kind),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_C=tile.block_c,
        num_warps=NUM_WARPS, num_stages=tile.num_stages,
    )  # fmt: skip
