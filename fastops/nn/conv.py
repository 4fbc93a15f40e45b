"""Convolution modules with ReLU and max-pooling built in: nn.Conv2d by constructor, parameters and state_dict."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastops.nn._impl import set_impl, with_impl
from fastops.ops.conv2d_relu import IMPLS, conv2d_relu, conv2d_relu_max_pool2d

Pair = int | tuple[int, int]


class Conv2dReLU(nn.Conv2d):
    """relu(Conv2d(x)). The constructor is that of nn.Conv2d, and `impl`.

    Input (N, C, H, W) or (C, H, W), output (N, K, P, Q) or (K, P, Q), as nn.Conv2d.
    """

    impl: str = "auto"

    def __init__(self, *args: Any, impl: str = "auto", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        set_impl(self, impl, IMPLS)

    def forward(self, input: Tensor) -> Tensor:
        """relu(conv2d(input))."""
        input, padding = padded(self, input)
        return conv2d_relu(
            input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups, impl=self.impl
        )

    def extra_repr(self) -> str:
        """As nn.Conv2d, and `impl` where it is not "auto"."""
        return with_impl(self, super().extra_repr())


class Conv2dReLUMaxPool2d(Conv2dReLU):
    """max_pool2d(relu(Conv2d(x))). The constructor is that of nn.Conv2d, and `pool_*` and `impl`.

    Args:
        args: as nn.Conv2d.
        pool_size: window of the max-pool.
        pool_stride: its stride; `pool_size` where None.
        pool_padding: at most half of `pool_size`.
        impl: "auto", "triton", "hybrid" or "torch".
        kwargs: as nn.Conv2d.
    """

    def __init__(
        self,
        *args: Any,
        pool_size: Pair,
        pool_stride: Pair | None = None,
        pool_padding: Pair = 0,
        impl: str = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, impl=impl, **kwargs)
        self.pool_size = pool_size
        self.pool_stride = pool_stride
        self.pool_padding = pool_padding

    def forward(self, input: Tensor) -> Tensor:
        """max_pool2d(relu(conv2d(input)))."""
        input, padding = padded(self, input)
        return conv2d_relu_max_pool2d(
            input,
            self.weight,
            self.bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            pool_size=self.pool_size,
            pool_stride=self.pool_stride,
            pool_padding=self.pool_padding,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        """As nn.Conv2d, the pool, and `impl` where it is not "auto"."""
        pool = f", pool_size={self.pool_size}, pool_stride={self.pool_stride}, pool_padding={self.pool_padding}"
        return super().extra_repr() + pool


def padded(convolution: nn.Conv2d, input: Tensor) -> tuple[Tensor, Any]:
    """The input, padded here where the padding is not of zeros, and the padding left to the op."""
    if convolution.padding_mode == "zeros":
        return input, convolution.padding
    return F.pad(input, convolution._reversed_padding_repeated_twice, mode=convolution.padding_mode), 0
