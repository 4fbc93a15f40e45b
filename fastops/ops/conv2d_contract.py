"""The registered ops behind conv2d_relu and conv2d_relu_max_pool2d: schemas, launchers, fakes, FLOP formulas.

They take plain (N, C, H, W) tensors that were checked, know no gradients and are composed by `fastops.ops.conv2d_relu`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastops import _library
from fastops.kernels.conv2d_layout import memory_format, new_maps, output_size
from fastops.ops import conv2d_stock as stock

WINDOW = "int[] stride, int[] padding, int[] dilation"
POOL = "int[] pool_size, int[] pool_stride, int[] pool_padding"


def _flops(maps: Sequence[int], weight: Sequence[int]) -> int:
    """Two per multiply-add, over all taps, those on padding too: as torch counts aten.convolution."""
    return 2 * maps[0] * maps[2] * maps[3] * math.prod(weight)


def _fake_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    size = output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    maps = (input.shape[0], weight.shape[0], *size)
    return new_maps(input, maps, memory_format(input, weight), input.dtype)


conv2d_relu_forward = _library.define(
    "conv2d_relu_forward",
    f"(Tensor input, Tensor weight, Tensor? bias, {WINDOW}) -> Tensor",
    "fastops.kernels.conv2d:forward",
    _fake_forward,
    lambda input, weight, *_, out_shape=None, **__: _flops(out_shape, weight),
    stock=("conv2d_relu", stock.forward),
)


def _fake_input_grad(grad: Tensor, weight: Tensor, size: Sequence[int], *_: Any) -> Tensor:
    return new_maps(grad, (grad.shape[0], weight.shape[1], *size), memory_format(grad, weight), grad.dtype)


conv2d_input_grad = _library.define(
    "conv2d_input_grad",
    f"(Tensor grad, Tensor weight, SymInt[] size, {WINDOW}) -> Tensor",
    "fastops.kernels.conv2d_backward:input_grad",
    _fake_input_grad,
    lambda grad, weight, *_, **__: _flops(grad, weight),
    stock=("conv2d_relu", stock.input_grad),
)


def _fake_weight_grad(input: Tensor, grad: Tensor, size: Sequence[int], *_: Any) -> Tensor:
    weight = (grad.shape[1], input.shape[1], *size)
    return new_maps(grad, weight, memory_format(input, grad), grad.dtype)


conv2d_weight_grad = _library.define(
    "conv2d_weight_grad",
    f"(Tensor input, Tensor grad, SymInt[] size, {WINDOW}) -> Tensor",
    "fastops.kernels.conv2d_backward:weight_grad",
    _fake_weight_grad,
    lambda input, grad, *_, out_shape=None, **__: _flops(grad, out_shape),
    stock=("conv2d_relu", stock.weight_grad),
)


def _fake_bias_relu(input: Tensor, bias: Tensor | None) -> Tensor:
    return new_maps(input, input.shape, memory_format(input), input.dtype)


bias_relu_forward = _library.define(
    "bias_relu_forward",
    "(Tensor input, Tensor? bias) -> Tensor",
    "fastops.kernels.epilogue:bias_relu",
    _fake_bias_relu,
    stock=("conv2d_relu", stock.bias_relu),
)


def _bias_gradient(grad: Tensor, wanted: bool) -> Tensor:
    return grad.new_empty((grad.shape[1] if wanted else 0,))


def _fake_bias_relu_backward(grad: Tensor, output: Tensor, want_bias: bool) -> tuple[Tensor, Tensor]:
    return new_maps(output, output.shape, memory_format(output), output.dtype), _bias_gradient(output, want_bias)


bias_relu_backward = _library.define(
    "bias_relu_backward",
    "(Tensor grad, Tensor output, bool want_bias) -> (Tensor, Tensor)",
    "fastops.kernels.epilogue:bias_relu_backward",
    _fake_bias_relu_backward,
    stock=("conv2d_relu", stock.bias_relu_backward),
)


def _fake_pool(
    input: Tensor,
    bias: Tensor | None,
    pool_size: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
    want_codes: bool,
) -> tuple[Tensor, Tensor]:
    size = (*input.shape[:2], *output_size(input.shape[2:], pool_size, pool_stride, pool_padding))
    pooled = new_maps(input, size, memory_format(input), input.dtype)
    if not want_codes:
        return pooled, input.new_empty((0,), dtype=torch.uint8)
    return pooled, new_maps(input, size, memory_format(input), torch.uint8)


bias_relu_pool_forward = _library.define(
    "bias_relu_pool_forward",
    f"(Tensor input, Tensor? bias, {POOL}, bool want_codes) -> (Tensor, Tensor)",
    "fastops.kernels.epilogue:bias_relu_pool",
    _fake_pool,
    stock=("conv2d_relu", stock.bias_relu_pool),
)


def _fake_pool_backward(
    grad: Tensor,
    codes: Tensor,
    size: Sequence[int],
    pool_size: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
    want_bias: bool,
) -> tuple[Tensor, Tensor]:
    maps = new_maps(grad, (*grad.shape[:2], *size), memory_format(codes), grad.dtype)
    return maps, _bias_gradient(grad, want_bias)


bias_relu_pool_backward = _library.define(
    "bias_relu_pool_backward",
    f"(Tensor grad, Tensor codes, SymInt[] size, {POOL}, bool want_bias) -> (Tensor, Tensor)",
    "fastops.kernels.epilogue:bias_relu_pool_backward",
    _fake_pool_backward,
    stock=("conv2d_relu", stock.bias_relu_pool_backward),
)
