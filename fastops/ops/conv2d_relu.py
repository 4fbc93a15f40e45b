"""Convolution, bias, ReLU and max-pool in one op.

    conv2d_relu(x, w, b)            = relu(conv2d(x, w, b))
    conv2d_relu_max_pool2d(x, w, b) = max_pool2d(relu(conv2d(x, w, b)))

Shapes: x (N, C, H, W) or (C, H, W), w (K, C / groups, R, S), b (K,); results (N, K, P, Q), pooled (N, K, U, V), in the
memory format that conv2d gives. dtypes float16, bfloat16 and float32; others run stock PyTorch. Sums are accumulated
in fp32; fp32 products are rounded to TF32 only where torch.backends.cudnn.conv.fp32_precision allows it.

Engines: "triton", an implicit GEMM that adds bias and ReLU before it stores; "hybrid", PyTorch's convolution without
its bias, then one kernel for bias, ReLU and pooling, where stock PyTorch runs three and writes int64 indices; "torch".
Backward, both: one pass turns the gradient into that of the convolution and of the bias (no atomics: bitwise
repeatable), then aten.convolution_backward.

Saved for backward, b bytes an element: conv2d_relu x, w and the result itself (N K P Q b, which the next layer keeps
anyway); conv2d_relu_max_pool2d x, w and one byte per pooled element (N K U V), where stock PyTorch keeps the maps after
ReLU (N K P Q b), and 8 N K U V for indices. b itself is kept for second derivatives.

Error bound, held by the tests: at most twice the error of stock PyTorch in the same dtype, against float64. NaN and
Inf pass as in torch; only where a weight is Inf or NaN do the taps that meet padding differ, as they do between
PyTorch's own backends.

References: Chetlur et al. 2014, cuDNN: Efficient Primitives for Deep Learning, https://arxiv.org/abs/1410.0759;
Krizhevsky, Sutskever, Hinton 2012, ImageNet Classification with Deep Convolutional Neural Networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastops import _env, _library, tuning
from fastops.ops import conv2d_arguments as arguments
from fastops.ops.conv2d_arguments import Pool, Window
from fastops.ops.conv2d_autograd import (
    ROWS,
    Conv2dReLU,
    Conv2dReLUMaxPool2d,
    device_facts,
    pooled_maps,
    relu_maps,
)
from fastops.ops.conv2d_reference import reference

IMPLS = ("auto", "triton", "hybrid", "torch")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_PIXELS = 2**31 - 2**17  # pixel numbers are int32, and the last tile runs past the end
MAX_STEP = 2**30  # coordinates are int32
MAX_TAPS = 31  # one bit per filter row and column


def why_not(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: Window,
    groups: int = 1,
    pool: Pool | None = None,
    *,
    impl: str = "triton",
) -> str | None:
    """Why engine `impl` cannot run this call of checked arguments, or None where it can. Reads metadata only."""
    reason = _env.why_no_triton(input.device)
    if reason is not None:
        return reason
    layout = _library.why_not_dense(input=input, weight=weight, bias=bias)
    if layout is not None:
        return layout
    if input.dtype not in DTYPES:
        return f"the tensors are {input.dtype}, the kernels know float16, bfloat16 and float32"
    if input.dtype == torch.bfloat16 and _env.interpreting():
        return "Triton's interpreter computes bfloat16 wrongly"
    transform = _library.why_no_transform()
    if transform is not None:
        return transform
    maps = arguments.conv_size(input, weight, window)
    if input.shape[0] * max(input.shape[-2] * input.shape[-1], maps[0] * maps[1]) > MAX_PIXELS:
        return f"the batch has more than {MAX_PIXELS} pixels"
    steps = (*window.stride, *window.padding, *window.dilation, *(pool.stride if pool is not None else ()))
    if max(steps) > MAX_STEP:
        return f"a stride, padding or dilation is larger than {MAX_STEP}"
    if pool is not None and pool.size[0] * pool.size[1] > 255:
        return f"pool_size {pool.size} has more than 255 positions, a code is one byte"
    if impl == "triton":
        if groups != 1:
            return f"the Triton convolution knows groups=1 only, got {groups} (impl='hybrid' runs it)"
        if max(weight.shape[2:]) > MAX_TAPS:
            taps = f"at most {MAX_TAPS} rows and columns"
            return f"the filter is {tuple(weight.shape[2:])}, the Triton convolution knows {taps}"
    return None


class Call(NamedTuple):
    """A call that a fastops engine will run: checked, cast as autocast says, (N, C, H, W)."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    window: Window
    groups: int
    pool: Pool | None
    engine: str
    auto: bool  # whether stock PyTorch may step in


def _prepare(
    name: str,
    impl: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    pool: tuple[Any, Any, Any] | None,
) -> Call | None:
    """The call for a fastops engine, or None where stock PyTorch runs it."""
    impl = _env.choose_impl(impl, IMPLS)
    if impl == "torch":
        return None
    if impl == "auto" and ("conv2d_relu" in _library.BROKEN or not _plain_cuda(input, weight, bias)):
        return None
    try:
        call = _checked(input, weight, bias, stride, padding, dilation, groups, pool)
    except (RuntimeError, TypeError):
        if impl == "auto":
            return None  # stock PyTorch raises its own error
        raise
    engine = tuning.choose(ROWS, _facts(call)).engine if impl == "auto" else impl
    if engine == "torch":
        return None
    reason = why_not(*call[:6], impl=engine)
    if reason is not None:
        if impl == "auto":
            return None
        raise _env.KernelUnavailable(f"{name}(impl={impl!r}): {reason}")
    return call._replace(input=arguments.pad_extra(call.input, call.window), engine=engine, auto=impl == "auto")


def _checked(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    pool: tuple[Any, Any, Any] | None,
) -> Call:
    arguments.check_types(input, weight, bias)
    dtype = _env.autocast_dtype(input.device)
    if dtype is not None:
        input, weight, bias = (_env.autocast(x, dtype) for x in (input, weight, bias))
    arguments.check_tensors(input, weight, bias, groups)
    window = arguments.window(weight, stride, padding, dilation)
    maps = arguments.conv_size(input, weight, window)
    pooling = None if pool is None else arguments.pool(*pool)
    if pooling is not None:
        arguments.pooled_size(maps, pooling)
    batched = input if input.dim() == 4 else input.unsqueeze(0)
    return Call(batched, weight, bias, window, arguments.integer(groups), pooling, "torch", False)


def _plain_cuda(*tensors: Tensor | None) -> bool:
    """Whether all are ordinary CUDA tensors; a subclass (DTensor, ...) knows how to run stock ops only."""
    return all(
        tensor is None or (type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cuda")
        for tensor in tensors
    )


def _facts(call: Call) -> dict[str, Any]:
    """What the rows of the tuning table may ask of a forward pass."""
    size = arguments.conv_size(call.input, call.weight, call.window)
    return {
        **device_facts(call.input, "forward"),
        "compiling": torch.compiler.is_compiling(),
        "pool": call.pool is not None,
        "bias": call.bias is not None,
        "groups": call.groups,
        "channels": call.input.shape[1],
        "maps": call.input.shape[0] * call.weight.shape[0] * size[0] * size[1],
    }


def conv2d_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    impl: str = "auto",
) -> Tensor:
    """relu(conv2d(input, weight, bias)); bytes saved for backward as the module's docstring says.

    Args:
        input: (N, C, H, W) or (C, H, W), any memory format; channels_last is the fast one.
        weight: (K, C / groups, R, S).
        bias: (K,) or None.
        stride: int or (height, width).
        padding: int, (height, width), "same" or "valid".
        dilation: int or (height, width).
        groups: blocked connections, as in conv2d.
        impl: "auto", "triton", "hybrid" or "torch".

    Returns:
        (N, K, P, Q) or (K, P, Q), in the memory format and (under autocast) the dtype that conv2d gives.

    Raises:
        RuntimeError, TypeError: where torch.nn.functional.conv2d does.
        KernelUnavailable: the engine asked for cannot run this call; the message says why.
    """
    if _env.nothing_to_choose(impl, input):
        return reference(input, weight, bias, stride, padding, dilation, groups)
    call = _prepare("conv2d_relu", impl, input, weight, bias, stride, padding, dilation, groups, None)

    def stock() -> Tensor:
        return reference(input, weight, bias, stride, padding, dilation, groups)

    def kernels() -> Tensor:
        assert call is not None
        tensors = call[:3]
        if _library.wants_grad(*tensors):
            output = Conv2dReLU.apply(*tensors, call.window, call.groups, call.engine, call.auto)
        else:
            output = relu_maps(call.engine, *tensors, call.window, call.groups, call.auto)
        return output if input.dim() == 4 else output.squeeze(0)

    return stock() if call is None else _library.or_stock("conv2d_relu", call.auto, kernels, stock)


def conv2d_relu_max_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    pool_size: int | Sequence[int],
    pool_stride: int | Sequence[int] | None = None,
    pool_padding: int | Sequence[int] = 0,
    impl: str = "auto",
) -> Tensor:
    """max_pool2d(relu(conv2d(input, weight, bias))); bytes saved for backward as the module's docstring says.

    Args:
        input: (N, C, H, W) or (C, H, W), any memory format; channels_last is the fast one.
        weight: (K, C / groups, R, S).
        bias: (K,) or None.
        stride: int or (height, width).
        padding: int, (height, width), "same" or "valid".
        dilation: int or (height, width).
        groups: blocked connections, as in conv2d.
        pool_size: window of the max-pool, int or (height, width).
        pool_stride: its stride; `pool_size` where None.
        pool_padding: at most half of `pool_size`.
        impl: "auto", "triton", "hybrid" or "torch".

    Returns:
        (N, K, U, V) or (K, U, V), in the memory format and (under autocast) the dtype that stock PyTorch gives.

    Raises:
        RuntimeError, TypeError: where conv2d or max_pool2d of torch.nn.functional do.
        KernelUnavailable: the engine asked for cannot run this call; the message says why.
    """
    pooling = (pool_size, pool_stride, pool_padding)
    if _env.nothing_to_choose(impl, input):
        return reference(input, weight, bias, stride, padding, dilation, groups, pooling)
    call = _prepare("conv2d_relu_max_pool2d", impl, input, weight, bias, stride, padding, dilation, groups, pooling)

    def stock() -> Tensor:
        return reference(input, weight, bias, stride, padding, dilation, groups, pooling)

    def kernels() -> Tensor:
        assert call is not None
        assert call.pool is not None
        tensors = call[:3]
        if _library.wants_grad(*tensors):
            arguments = (call.window, call.groups, call.pool, call.engine, call.auto)
            output = Conv2dReLUMaxPool2d.apply(*tensors, *arguments)[0]
        else:
            output = pooled_maps(call.engine, *tensors, call.window, call.groups, call.pool, False, call.auto)[0]
        return output if input.dim() == 4 else output.squeeze(0)

    return stock() if call is None else _library.or_stock("conv2d_relu", call.auto, kernels, stock)


def explain_auto() -> list[dict[str, str]]:
    """What "auto" runs for a layer of AlexNet in training at batch 256, for `fastops env`."""
    examples = {
        "conv1 of AlexNet, fp16, channels_last": ("float16", 3, 64, 55, False),
        "conv1 of AlexNet with its max-pool, fp16": ("float16", 3, 64, 55, True),
        "conv4 of AlexNet, fp32": ("float32", 384, 256, 13, False),
    }
    choices = []
    for example, (dtype, channels, maps, width, pool) in examples.items():
        facts = {
            **{"pass": "forward", "device": "cuda", "dtype": dtype, "compiling": False, **_env.shown_gpu_facts()},
            **{"pool": pool, "bias": True, "groups": 1, "channels": channels, "maps": 256 * maps * width * width},
        }
        op = "conv2d_relu_max_pool2d" if pool else "conv2d_relu"
        choices.append(tuning.explained(op, example, tuning.choose(ROWS, facts)))
    return choices
