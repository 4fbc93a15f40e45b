"""Shapes and memory formats of conv2d: shared by the fakes and the launchers, free of triton.

Letters: images (N, C, H, W), weight (K, C // groups, R, S), maps (N, K, P, Q), pooled maps (N, K, U, V).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def output_size(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int] = (1, 1),
) -> tuple[int, int]:
    """Height and width of what a window of `kernel` gives on maps of `size`, as conv2d and max_pool2d count."""
    height, width = ((size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2))
    return height, width


def is_channels_last(tensor: torch.Tensor) -> bool:
    """Whether PyTorch propagates channels_last from this 4-D tensor (`suggest_memory_format` of ATen)."""
    sizes, strides = tensor.shape, tensor.stride()
    if strides[1] == 0:
        return False
    smallest = 0
    for axis in (1, 3, 2, 0):
        # an (N, 1, 1, 1) tensor fits both formats; ATen takes it for contiguous
        if sizes[axis] == 0 or strides[axis] < smallest or (axis == 0 and smallest == strides[1]):
            return False
        smallest = strides[axis] * max(sizes[axis], 1)
    return True


def memory_format(*tensors: torch.Tensor) -> torch.memory_format:
    """Format of a convolution's result: channels_last where its input or its weight is."""
    if any(is_channels_last(tensor) for tensor in tensors):
        return torch.channels_last
    return torch.contiguous_format


def new_maps(like: torch.Tensor, size: Sequence[int], layout: torch.memory_format, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised (N, K, P, Q) tensor on the device of `like`."""
    return torch.empty(tuple(size), dtype=dtype, device=like.device, memory_format=layout)
