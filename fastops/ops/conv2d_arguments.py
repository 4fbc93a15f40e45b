"""Arguments of conv2d and max_pool2d: read as torch reads them, refused with torch's error types before any work."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from fastops.kernels.conv2d_layout import output_size

Pair = tuple[int, int]


class Pool(NamedTuple):
    """Window, stride and padding of a max-pool."""

    size: Pair
    stride: Pair
    padding: Pair


class Window(NamedTuple):
    """Stride, padding and dilation of a convolution; `extra` rows and columns of zeros for an uneven "same"."""

    stride: Pair
    padding: Pair
    dilation: Pair
    extra: Pair


def pair(name: str, value: int | Sequence[int]) -> Pair:
    """`value` as (height, width): an int, or one or two of them."""
    values = value if isinstance(value, (tuple, list)) else (value,)
    if not all(is_integer(v) for v in values):
        raise TypeError(f"{name} must be an int or a tuple of two ints, got {value!r}")
    if len(values) not in (1, 2):
        raise RuntimeError(f"{name} must be an int or a tuple of two ints, got {value!r}")
    return integer(values[0]), integer(values[-1])


def is_integer(value: object) -> bool:
    """Whether torch takes `value` for an integer: NumPy's too, but no bool."""
    if isinstance(value, (int, torch.SymInt)):
        return not isinstance(value, bool)
    return hasattr(value, "__index__")


def integer(value: Any) -> int:
    """`value` as an int; a symbolic one stays what it is."""
    return value if isinstance(value, (int, torch.SymInt)) else operator.index(value)  # type: ignore[return-value]


def window(
    weight: torch.Tensor,
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
) -> Window:
    """The window of a convolution, with "same" and "valid" worked out as torch does."""
    stride, dilation = pair("stride", stride), pair("dilation", dilation)
    if min(stride) < 1:
        raise RuntimeError(f"stride must be positive, got {stride}")
    if min(dilation) < 1:
        raise RuntimeError(f"dilation must be positive, got {dilation}")
    extra = (0, 0)
    if isinstance(padding, str):
        if padding == "valid":
            padding = 0
        elif padding == "same":
            if stride != (1, 1):
                raise RuntimeError(f"padding='same' is not supported for strided convolutions, got stride {stride}")
            total_h, total_w = (dilation[i] * (weight.shape[2 + i] - 1) for i in range(2))
            padding, extra = (total_h // 2, total_w // 2), (total_h % 2, total_w % 2)
        else:
            raise RuntimeError(f"padding must be 'same', 'valid', an int or a tuple of two ints, got {padding!r}")
    padding = pair("padding", padding)
    if min(padding) < 0:
        raise RuntimeError(f"padding must not be negative, got {padding}")
    return Window(stride, padding, dilation, extra)


def check_types(input: object, weight: object, bias: object) -> None:
    """Tensors where tensors are due."""
    for name, tensor in (("input", input), ("weight", weight), ("bias", bias)):
        if not isinstance(tensor, torch.Tensor) and not (name == "bias" and tensor is None):
            raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")


def check_tensors(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, groups: int) -> None:
    """Ranks, devices, dtypes and channel counts."""
    if input.dim() not in (3, 4):
        raise RuntimeError(f"input must be (N, C, H, W) or (C, H, W), got shape {tuple(input.shape)}")
    if weight.dim() != 4:
        raise RuntimeError(f"weight must be (K, C / groups, R, S), got shape {tuple(weight.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.device != input.device:
            raise RuntimeError(f"input is on {input.device} and {name} on {tensor.device}; they must be on one device")
        if tensor.dtype != input.dtype:
            raise RuntimeError(f"input is {input.dtype} and {name} {tensor.dtype}; they must have one dtype")
    if not is_integer(groups):
        raise TypeError(f"groups must be an int, got {groups!r}")
    if groups < 1:
        raise RuntimeError(f"groups must be positive, got {groups}")
    if 0 in input.shape[-2:] and (input.dim() == 3 or input.shape[0]):  # torch pads an image without pixels in no batch
        raise RuntimeError(f"input must not be empty but for its batch, got shape {tuple(input.shape)}")
    shapes = f"input {tuple(input.shape)}, weight {tuple(weight.shape)}, groups {groups}"
    if 0 in weight.shape:
        raise RuntimeError(f"weight must not be empty: {shapes}")
    if weight.shape[0] % groups:
        raise RuntimeError(f"the output channels of weight must be a multiple of groups: {shapes}")
    if input.shape[-3] != weight.shape[1] * groups:
        raise RuntimeError(f"input must have {weight.shape[1] * groups} channels for this weight: {shapes}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise RuntimeError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}: {shapes}")


def conv_size(input: torch.Tensor, weight: torch.Tensor, window: Window) -> Pair:
    """Height and width of the convolution's result."""
    height, width = (input.shape[i - 2] + window.extra[i] for i in range(2))
    size = output_size((height, width), weight.shape[2:], window.stride, window.padding, window.dilation)
    if size[0] < 1 or size[1] < 1:
        raise RuntimeError(
            f"weight {tuple(weight.shape)} with dilation {window.dilation} is larger than input {tuple(input.shape)} "
            f"with padding {window.padding}"
        )
    return size


def pool(
    pool_size: int | Sequence[int], pool_stride: int | Sequence[int] | None, pool_padding: int | Sequence[int]
) -> Pool:
    """The window of a max-pool; the stride is its size where none is given."""
    size, padding = pair("pool_size", pool_size), pair("pool_padding", pool_padding)
    none = pool_stride is None or (isinstance(pool_stride, (tuple, list)) and not pool_stride)
    stride = size if none else pair("pool_stride", pool_stride)  # type: ignore[arg-type]
    if min(size) < 1:
        raise RuntimeError(f"pool_size must be positive, got {size}")
    if min(stride) < 1:
        raise RuntimeError(f"pool_stride must be positive, got {stride}")
    if min(padding) < 0 or padding[0] > size[0] // 2 or padding[1] > size[1] // 2:
        raise RuntimeError(f"pool_padding must be between 0 and half of pool_size {size}, got {padding}")
    return Pool(size, stride, padding)


def pooled_size(maps: Pair, pool: Pool) -> Pair:
    """Height and width of the pooled maps."""
    size = output_size(maps, pool.size, pool.stride, pool.padding)
    if size[0] < 1 or size[1] < 1:
        raise RuntimeError(f"pool_size {pool.size} with pool_padding {pool.padding} is larger than the maps, {maps}")
    return size


def pad_extra(input: torch.Tensor, window: Window) -> torch.Tensor:
    """`input` with the zeros that an uneven "same" adds below and to the right."""
    if window.extra == (0, 0):
        return input
    return F.pad(input, (0, window.extra[1], 0, window.extra[0]))
