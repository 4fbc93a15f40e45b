"""The registered ops of conv2d_relu in plain torch: for graphs whose kernel cannot be launched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torch.nn.grad
from torch import Tensor

DEAD = 255  # the code of a pooled element that ReLU made zero


def forward(input: Tensor, weight: Tensor, bias: Tensor | None, *window: Any) -> Tensor:
    """`fastops::conv2d_relu_forward`."""
    return F.conv2d(input, weight, bias, *window).relu()


def input_grad(grad: Tensor, weight: Tensor, size: Sequence[int], *window: Any) -> Tensor:
    """`fastops::conv2d_input_grad`."""
    return torch.nn.grad.conv2d_input((grad.shape[0], weight.shape[1], *size), weight, grad, *window)


def weight_grad(input: Tensor, grad: Tensor, size: Sequence[int], *window: Any) -> Tensor:
    """`fastops::conv2d_weight_grad`."""
    return torch.nn.grad.conv2d_weight(input, (grad.shape[1], input.shape[1], *size), grad, *window)


def bias_relu(input: Tensor, bias: Tensor | None) -> Tensor:
    """`fastops::bias_relu_forward`."""
    return (input if bias is None else input + bias.view(-1, 1, 1)).relu()


def bias_relu_backward(grad: Tensor, output: Tensor, want_bias: bool) -> tuple[Tensor, Tensor | None]:
    """`fastops::bias_relu_backward`."""
    through = torch.ops.aten.threshold_backward(grad, output, 0)
    return through, through.sum((0, 2, 3)) if want_bias else None


def bias_relu_pool(
    input: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    want_codes: bool,
) -> tuple[Tensor, Tensor | None]:
    """`fastops::bias_relu_pool_forward`."""
    maps = bias_relu(input, bias)
    pooled, places = torch.ops.aten.max_pool2d_with_indices(maps, size, stride, padding)
    if not want_codes:
        return pooled, None
    width = maps.shape[3]
    corners = [
        torch.arange(pooled.shape[2 + axis], device=maps.device) * stride[axis] - padding[axis] for axis in (0, 1)
    ]
    codes = (places // width - corners[0].view(-1, 1)) * size[1] + places % width - corners[1]
    return pooled, codes.masked_fill(pooled == 0, DEAD).to(torch.uint8)


def bias_relu_pool_backward(
    grad: Tensor,
    codes: Tensor,
    maps: Sequence[int],
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    want_bias: bool,
) -> tuple[Tensor, Tensor | None]:
    """`fastops::bias_relu_pool_backward`: each position of a window in turn, without atomics."""
    height, width = (maps[axis] + 2 * padding[axis] for axis in (0, 1))
    spread = grad.new_zeros((*grad.shape[:2], height, width), dtype=torch.float32)
    for position in range(size[0] * size[1]):
        i, j = divmod(position, size[1])
        rows = slice(i, i + (grad.shape[2] - 1) * stride[0] + 1, stride[0])
        columns = slice(j, j + (grad.shape[3] - 1) * stride[1] + 1, stride[1])
        spread[:, :, rows, columns] += torch.where(codes == position, grad, 0)
    found = spread[:, :, padding[0] : height - padding[0], padding[1] : width - padding[1]]
    return found, found.sum((0, 2, 3)) if want_bias else None
