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

from typing import NamedTuple

import torch
import triton

from fastops.kernels.conv2d_gather import gather_flat_kernel, gather_kernel
from fastops.kernels.conv2d_layout import memory_format, new_maps, output_size

NUM_WARPS = 4


class GatherConfig(NamedTuple):
    """Tile of a gather kernel: pixels, output channels, reduction step, pipeline stages."""

    block_m: int
    block_n: int
    block_c: int
    num_stages: int


# (kind of arithmetic, output channels that fit the narrow tile): 16-bit and TF32 use tensor cores, fp32 does not
GATHER_CONFIGS = {
    ("16-bit", False): GatherConfig(128, 128, 64, 3),
    ("16-bit", True): GatherConfig(128, 64, 64, 3),
    ("tf32", False): GatherConfig(128, 64, 32, 3),
    ("tf32", True): GatherConfig(128, 64, 32, 3),
    ("ieee", False): GatherConfig(64, 64, 16, 2),
    ("ieee", True): GatherConfig(64, 64, 16, 2),
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
    y = new_maps(x, (x.shape[0], weight.shape[0], *size), memory_format(x, weight), x.dtype)
    if not y.numel():
        return y
    k, c, r, s = weight.shape
    n, _, h, w = x.shape
    shape = Shape(n, c, h, w, k, r, s, *size, tuple(stride), tuple(padding), tuple(dilation))
    kind = arithmetic(x.dtype)
    flat_weight = weight.permute(0, 2, 3, 1).contiguous()  # (K, R, S, C)
    form = form or choose_form(shape, kind)
    launch_gather(form, shape, kind, x, flat_weight, bias, y, relu)
    return y


def arithmetic(dtype: torch.dtype) -> str:
    """What multiplies: "16-bit", "tf32" where torch lets fp32 convolutions round to it, or "ieee"."""
    if dtype != torch.float32:
        return "16-bit"
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def choose_form(shape: Shape, kind: str) -> str:
    """The first form that fits."""
    return "gather_flat" if shape.c < 32 else "gather"


def launch_gather(
    form: str,
    shape: Shape,
    kind: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    relu: bool,
) -> None:
    """Run a gather kernel; `weight` is (K, R, S, C)."""
    config = GATHER_CONFIGS[kind, shape.k <= 64]
    kernel = gather_flat_kernel if form == "gather_flat" else gather_kernel
    pixels = shape.n * shape.p * shape.q
    kernel[(triton.cdiv(pixels, config.block_m) * triton.cdiv(shape.k, config.block_n),)](
        x, *x.stride(), weight, bias, y, *y.stride(), shape.n, shape.h, shape.w, shape.k, shape.p, shape.q,
        C=shape.c, R=shape.r, S=shape.s, STRIDE_H=shape.stride[0], STRIDE_W=shape.stride[1],
        PAD_H=shape.padding[0], PAD_W=shape.padding[1],
        DILATION_H=shape.dilation[0], DILATION_W=shape.dilation[1],
        HAS_BIAS=bias is not None, RELU=relu, PRECISION="tf32" if kind == "tf32" else "ieee",
        EVEN_K=shape.k % config.block_n == 0,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_C=config.block_c,
        num_warps=NUM_WARPS, num_stages=config.num_stages,
    )  # fmt: skip
