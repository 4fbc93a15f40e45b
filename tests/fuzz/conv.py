"""conv2d_relu, conv2d_relu_max_pool2d, their modules, Sequential and accelerate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

import fastops
from fastops import _env
from tests.fuzz.engine import FLOATS, KERNEL_FLOATS, SEEDS, Spec, agree, environment, fuzzed, rarely, replace, specs

CPU = torch.device("cpu")
VALUES = st.sampled_from(["small", "grid"])
ODD_NUMBERS = st.sampled_from([0, -1, (1,), (1, -1), [2, 1], (1, 2, 3), 1.0, True, None, "2", ()])
MISTAKES = (
    *("none",) * 24,
    "channels",
    "bias shape",
    "weight dtype",
    "bias dtype",
    "input rank",
    "weight rank",
    "no tensor",
    "integers",
    "complex",
    "empty",
    "stride",
    "padding",
    "dilation",
    "groups",
    "pool_size",
    "pool_stride",
    "pool_padding",
)


@dataclass(frozen=True)
class Convolution:
    tensors: tuple[Any, Any, Any]
    window: tuple[Any, Any, Any, Any]  # stride, padding, dilation, groups
    pool: tuple[Any, Any, Any] | None
    impl: str


def number(low: int, high: int) -> Any:
    return st.one_of(st.integers(low, high), st.tuples(st.integers(low, high), st.integers(low, high)))


@st.composite
def convolutions(draw: Any, impls: tuple[str, ...], dtypes: Any, big: int, odd: bool = True) -> Convolution:
    # one mistake a call: which of two is named first is nobody's promise
    mistake = draw(st.sampled_from(MISTAKES)) if odd else "none"

    def argument(name: str, usual: Any) -> Any:
        return draw(ODD_NUMBERS if mistake == name else usual)

    dtype = draw(dtypes)
    groups = draw(st.sampled_from([1, 1, 1, 2]))
    per_group = draw(st.integers(1, 3))
    maps = groups * draw(st.integers(1, 3))
    taps = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    size = draw(st.tuples(st.integers(1, big), st.integers(1, big)))
    batch = draw(st.sampled_from([(1,), (2,), (), (0,)] if odd and "dtype" not in mistake else [(1,), (2,), ()]))
    channels = per_group * groups + (mistake == "channels")
    shapes = [(*batch, channels, *size), (maps, per_group, *taps), (maps,)]
    if mistake == "input rank":
        shapes[0] = draw(st.sampled_from([size, (1, *shapes[0], 1), ()]))
    if mistake == "weight rank":
        shapes[1] = draw(st.sampled_from([shapes[1][1:], (*shapes[1], 1)]))
    if mistake == "bias shape":
        shapes[2] = draw(st.sampled_from([(), (maps + 1,), (1, maps), (1,), (0,)]))
    if mistake == "empty":
        index, place = draw(st.sampled_from([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]))
        shapes[index] = tuple(0 if i == place else n for i, n in enumerate(shapes[index]))
    kinds = [dtype] * 3
    if mistake in ("weight dtype", "bias dtype"):
        kinds[1 if mistake == "weight dtype" else 2] = draw(FLOATS)
    if mistake == "integers":
        kinds = [torch.int64] * 3
    if mistake == "complex":
        kinds = [torch.complex64] * 3
    values = draw(VALUES)
    tensors = [draw(specs(shape, kind, values=values)) for shape, kind in zip(shapes, kinds, strict=True)]
    if draw(st.booleans()):
        tensors[2] = None
    if mistake == "no tensor":
        tensors[draw(st.integers(0, 2))] = draw(st.sampled_from([1.0, "x", [1.0]]))
    padding = st.one_of(number(0, 2), st.sampled_from(["same", "valid"]))
    if draw(st.booleans()):
        padding = number(0, 2)
    window = (
        argument("stride", number(1, 3)),
        argument("padding", padding),
        argument("dilation", number(1, 2)),
        argument("groups", st.just(groups)),
    )
    if window[2] != 1:  # torch 2.13 crashes: x and w (2, 2, 2, 1) channels_last, stride 3, padding and dilation 2, CPU
        tensors = [replace(x, layout="plain") if isinstance(x, Spec) else x for x in tensors]
    pool = None
    if draw(st.booleans()):
        pool = (
            argument("pool_size", number(1, 3)),
            argument("pool_stride", st.one_of(st.none(), number(1, 3))),
            argument("pool_padding", number(0, 1)),
        )
    return Convolution(tuple(tensors), window, pool, draw(st.sampled_from(impls)))


def ours_of(case: Convolution) -> Any:
    def ours(*tensors: Any) -> Any:
        if case.pool is None:
            return fastops.conv2d_relu(*tensors, *case.window, impl=case.impl)
        size, stride, padding = case.pool
        return fastops.conv2d_relu_max_pool2d(
            *tensors, *case.window, pool_size=size, pool_stride=stride, pool_padding=padding, impl=case.impl
        )

    return ours


def stock_of(case: Convolution) -> Any:
    def stock(*tensors: Any) -> Any:
        maps = F.relu(F.conv2d(*tensors, *case.window))
        return maps if case.pool is None else F.max_pool2d(maps, *case.pool)

    return stock


@fuzzed(convolutions(("auto", "torch"), FLOATS, 8))
def conv2d(case: Convolution) -> str:
    return agree(ours_of(case), stock_of(case), case.tensors)


@fuzzed(convolutions(("triton", "hybrid"), KERNEL_FLOATS, 6))
def conv2d_kernels(case: Convolution) -> str:
    def stock(*tensors: Any) -> Any:
        x, _, bias = tensors
        if isinstance(x, Tensor) and isinstance(bias, Tensor) and bias.dtype != x.dtype:
            raise RuntimeError("torch mixes dtypes on a CPU where padding is 'same', and nowhere else")
        zeros = [v for v in (case.window[0], case.window[2]) if v == 0 or (isinstance(v, tuple | list) and 0 in v)]
        if isinstance(x, Tensor) and x.shape[:1] == (0,) and zeros:
            raise RuntimeError("torch does not look at strides and dilations of an empty batch")
        return stock_of(case)(*tensors)

    return agree(ours_of(case), stock, case.tensors, explicit=True)


@st.composite
def sequentials(draw: Any) -> tuple[Any, ...]:
    """Constructors of children, an input, an impl, a seed, and whether a forward of the model's own calls them."""
    channels, children = 2, []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["conv", "conv relu", "conv relu pool", "relu", "pool", "norm", "identity"]))
        if "conv" in kind:
            after = draw(st.integers(1, 3))
            mode = draw(rarely(st.just("zeros"), st.sampled_from(["reflect", "circular", "replicate"])))
            options = {"padding": draw(st.integers(0, 1)), "bias": draw(st.booleans()), "padding_mode": mode}
            children.append(("Conv2d", (channels, after, draw(st.integers(1, 3))), options))
            channels = after
        if "relu" in kind:
            children.append(("ReLU", (), {"inplace": draw(st.booleans())}))
        if "pool" in kind:
            options = {"stride": draw(st.integers(1, 2)), "ceil_mode": draw(rarely(st.just(False), st.just(True)))}
            children.append(("MaxPool2d", (2,), options))
        if kind == "norm":
            children.append(("BatchNorm2d", (channels,), {"eps": 0.0}))
        if kind == "identity":
            children.append(("Identity", (), {}))
    batch = draw(st.sampled_from([(1,), (2,), ()]))
    image = draw(specs((*batch, 2, draw(st.integers(3, 7)), 6), torch.float32, values="small"))
    # where there are no kernels, a name is refused by each group of layers, and layers alone take no notice of it
    impl = draw(st.sampled_from(["auto", "triton", "hybrid"] if _env.why_no_triton(CPU) is None else ["auto", "torch"]))
    return tuple(children), image, impl, draw(SEEDS), draw(rarely(st.just(False), st.just(True)))


class Chain(nn.Module):
    """What a Sequential does, as a trace must find out; ReLUs become fastops.nn.FusedReLU."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@fuzzed(sequentials())
def sequential(case: tuple[Any, ...]) -> str:
    """accelerate() computes the same, and is undone exactly; integers, so that layers do not round."""
    children, image, impl, seed, trace = case
    torch.manual_seed(seed)

    def build() -> nn.Module:
        layers = (getattr(nn, name)(*args, **options) for name, args, options in children)
        return (Chain if trace else nn.Sequential)(*layers).eval()

    model, double = build(), build().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.random_(-2, 3)
    double.load_state_dict(model.state_dict())
    classes, shown = [type(m) for m in model.modules()], repr(model)

    # an input that wants its gradient is not written to: the first child may be an in-place ReLU, and a leaf refuses it
    def run(network: nn.Module) -> Any:
        return lambda x: network(x * 1)

    parameters, exact = list(model.parameters()), list(double.parameters())

    def accelerated(x: Any) -> Any:
        fastops.accelerate(model, trace=trace)
        try:
            with environment(FASTOPS_IMPL=impl):
                result = model(x * 1)
        finally:
            fastops.restore(model)
        return result

    end = agree(
        accelerated,
        run(model),
        [image],
        extra=parameters,
        stock_extra=parameters,
        truth_of=run(double),
        truth_extra=exact,
    )
    assert ([type(m) for m in model.modules()], repr(model)) == (classes, shown)
    return end


@fuzzed(convolutions(("auto", "triton", "hybrid", "torch"), KERNEL_FLOATS, 6, odd=False))
def conv2d_modules(case: Convolution) -> str:
    """nn.Conv2dReLU and nn.Conv2dReLUMaxPool2d with the weights of an nn.Conv2d, in any padding mode."""
    image, weight, bias = case.tensors
    stride, padding, dilation, groups = case.window
    made = weight.make()
    mode = ("zeros", "reflect", "circular", "replicate")[image.seed % 4]
    maps, channels = weight.shape[0], weight.shape[1] * groups
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    options |= {"bias": bias is not None, "padding_mode": mode, "dtype": image.dtype}

    def build(make: Any, **more: Any) -> nn.Module:
        return make(channels, maps, tuple(weight.shape[2:]), **options, **more)

    try:
        stock = build(nn.Conv2d)
    except Exception as error:
        try:
            build(fastops.nn.Conv2dReLU)
        except type(error):
            return "error"
        raise AssertionError(f"torch's constructor raises {error!r}, ours does not") from error
    with torch.no_grad():
        stock.weight.copy_(made)  # type: ignore[operator]
        if bias is not None:
            stock.bias.copy_(bias.make())  # type: ignore[operator]
    if case.pool is None:
        ours = build(fastops.nn.Conv2dReLU, impl=case.impl)
    else:
        size, pool_stride, pool_padding = case.pool
        pool = {"pool_size": size, "pool_stride": pool_stride, "pool_padding": pool_padding}
        ours = build(fastops.nn.Conv2dReLUMaxPool2d, impl=case.impl, **pool)
    ours.load_state_dict(stock.state_dict())
    double = build(nn.Conv2d).double()
    double.load_state_dict(stock.state_dict())

    def through(module: nn.Module) -> Any:
        def call(x: Any) -> Any:
            result = F.relu(module(x))
            return result if case.pool is None else F.max_pool2d(result, *case.pool)

        return call

    return agree(
        ours,
        through(stock),
        [image],
        explicit=case.impl in ("triton", "hybrid"),
        extra=list(ours.parameters()),
        stock_extra=list(stock.parameters()),
        truth_of=through(double),
        truth_extra=list(double.parameters()),
    )
