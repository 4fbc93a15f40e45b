"""conv2d + bias + ReLU (+ max-pool) by stock PyTorch: oracle, fallback, and the source of second derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor


def reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    pool: tuple[Any, Any, Any] | None = None,
) -> Tensor:
    """relu(conv2d(...)), and of that max_pool2d where `pool` gives its size, stride and padding."""
    # in place: nobody else holds the convolution's result
    maps = F.conv2d(input, weight, bias, stride, padding, dilation, groups).relu_()  # type: ignore[arg-type]
    return maps if pool is None else F.max_pool2d(maps, *pool)
