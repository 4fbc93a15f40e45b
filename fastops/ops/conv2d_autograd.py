"""How the engines of conv2d_relu compute and are differentiated; arguments are checked by then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastops import _env, _library, tuning
from fastops.ops import conv2d_arguments as arguments
from fastops.ops import conv2d_contract as ops
from fastops.ops.conv2d_arguments import Pool, Window
from fastops.ops.conv2d_reference import reference

ROWS = tuning.load("conv2d_relu")


def device_facts(tensor: Tensor, direction: str) -> dict[str, Any]:
    """What rows of the tuning table may ask of a tensor, in a pass: forward, input_grad or weight_grad."""
    facts: dict[str, Any] = {
        "pass": direction,
        "device": tensor.device.type,
        "dtype": str(tensor.dtype).removeprefix("torch."),
    }
    if tensor.device.type == "cuda":
        facts |= _env.gpu_facts(tensor.device)
    return facts


def _convolution(
    engine: str, input: Tensor, weight: Tensor, bias: Tensor | None, window: Window, groups: int, auto: bool
) -> tuple[Tensor, Tensor | None]:
    """The convolution, and the bias that is still to be added: "triton" has added it, and ReLU, already."""
    if engine == "triton":
        launch = _library.for_graph(ops.conv2d_relu_forward, auto)
        return launch(input, weight, bias, window.stride, window.padding, window.dilation), None
    maps = torch.ops.aten.convolution.default(
        input, weight, None, window.stride, window.padding, window.dilation, False, (0, 0), groups
    )
    return maps, bias


def relu_maps(
    engine: str, input: Tensor, weight: Tensor, bias: Tensor | None, window: Window, groups: int, auto: bool
) -> Tensor:
    """relu(conv2d + bias) by an engine of fastops, without autograd."""
    maps, bias = _convolution(engine, input, weight, bias, window, groups, auto)
    return maps if engine == "triton" else _library.for_graph(ops.bias_relu_forward, auto)(maps, bias)


def pooled_maps(
    engine: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: Window,
    groups: int,
    pool: Pool,
    want_codes: bool,
    auto: bool,
) -> tuple[Tensor, Tensor]:
    """Pooled maps and, for backward, the position of each maximum, one byte each; without autograd."""
    maps, bias = _convolution(engine, input, weight, bias, window, groups, auto)
    return _library.for_graph(ops.bias_relu_pool_forward, auto)(maps, bias, *pool, want_codes)


def _convolution_gradients(
    grad: Tensor, input: Tensor, weight: Tensor, window: Window, groups: int, needs: Sequence[bool], auto: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of input and weight, each by the engine that the tuning table names for it."""
    found: list[Tensor | None] = [None, None]
    stock = [False, False, False]
    for index, direction in enumerate(("input_grad", "weight_grad")):
        if not needs[index]:
            continue
        row = tuning.choose(ROWS, {**device_facts(grad, direction), "groups": groups})
        if row.engine != "triton" or groups != 1 or _env.why_no_triton(grad.device) is not None:
            stock[index] = True
        elif direction == "input_grad":
            found[0] = _library.for_graph(ops.conv2d_input_grad, auto)(grad, weight, input.shape[2:], *window[:3])
        else:
            launch = _library.for_graph(ops.conv2d_weight_grad, auto)
            found[1] = launch(input, grad, weight.shape[2:], *window[:3])
    if any(stock):
        by_torch = torch.ops.aten.convolution_backward.default(
            grad, input, weight, None, window.stride, window.padding, window.dilation, False, (0, 0), groups, stock
        )
        found = [by_torch[i] if stock[i] else found[i] for i in range(2)]
    return found[0], found[1]


def _reference_gradients(
    window: Window,
    groups: int,
    pool: Pool | None,
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    grad: Tensor,
    again: bool,
) -> tuple[Tensor | None, ...]:
    def stock(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return reference(input, weight, bias, window.stride, window.padding, window.dilation, groups, pool)

    return _library.reference_gradients(stock, inputs, needs, grad, again)


class Conv2dReLU(torch.autograd.Function):
    """Differentiable conv2d_relu of an engine."""

    @staticmethod
    def forward(input: Any, weight: Any, bias: Any, window: Window, groups: int, engine: str, auto: bool) -> Tensor:
        return relu_maps(engine, input, weight, bias, window, groups, auto)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, bias, ctx.window, ctx.groups, _, ctx.auto = inputs
        ctx.save_for_backward(input, weight, bias, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        input, weight, bias, output = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]

        def stock(again: bool = False) -> tuple[Any, ...]:
            return _reference_gradients(ctx.window, ctx.groups, None, (input, weight, bias), needs, grad, again)

        def kernels() -> tuple[Any, ...]:
            maps_grad, bias_grad = _library.for_graph(ops.bias_relu_backward, ctx.auto)(grad, output, needs[2])
            gradients = _convolution_gradients(maps_grad, input, weight, ctx.window, ctx.groups, needs, ctx.auto)
            return *gradients, bias_grad if needs[2] else None

        if _library.differentiable_again():
            found = stock(again=True)
        else:
            found = _library.or_stock("conv2d_relu", ctx.auto, kernels, stock)
        return *found, None, None, None, None


class Conv2dReLUMaxPool2d(torch.autograd.Function):
    """Differentiable conv2d_relu_max_pool2d of an engine; the second output is its codes."""

    @staticmethod
    def forward(
        input: Any, weight: Any, bias: Any, window: Window, groups: int, pool: Pool, engine: str, auto: bool
    ) -> tuple[Tensor, Tensor]:
        return pooled_maps(engine, input, weight, bias, window, groups, pool, True, auto)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        input, weight, bias, ctx.window, ctx.groups, ctx.pool, _, ctx.auto = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(input, weight, bias, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:  # type: ignore[override]
        input, weight, bias, codes = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]

        def stock(again: bool = False) -> tuple[Any, ...]:
            return _reference_gradients(ctx.window, ctx.groups, ctx.pool, (input, weight, bias), needs, grad, again)

        def kernels() -> tuple[Any, ...]:
            size = arguments.conv_size(input, weight, ctx.window._replace(extra=(0, 0)))
            launch = _library.for_graph(ops.bias_relu_pool_backward, ctx.auto)
            maps_grad, bias_grad = launch(grad, codes, size, *ctx.pool, needs[2])
            gradients = _convolution_gradients(maps_grad, input, weight, ctx.window, ctx.groups, needs, ctx.auto)
            return *gradients, bias_grad if needs[2] else None

        if _library.differentiable_again():
            found = stock(again=True)
        else:
            found = _library.or_stock("conv2d_relu", ctx.auto, kernels, stock)
        return *found, None, None, None, None, None
