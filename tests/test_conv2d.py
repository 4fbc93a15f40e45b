"""conv2d_relu and conv2d_relu_max_pool2d: numbers and gradients of every engine against stock PyTorch and float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

import fastops
from fastops.kernels import conv2d, conv2d_backward
from fastops.kernels.conv2d import Shape
from fastops.kernels.conv2d_layout import is_channels_last, output_size
from tests.rule import assert_within_rule

ENGINES = ("triton", "hybrid")
FORMATS = (torch.contiguous_format, torch.channels_last)
POOL = {"pool_size": 3, "pool_stride": 2}
# every dtype and every format in each run, all pairs in the long one
KINDS = pytest.mark.parametrize(
    ("dtype", "memory"),
    [
        pytest.param(torch.float32, torch.contiguous_format, id="float32-contiguous"),
        pytest.param(torch.float16, torch.channels_last, id="float16-channels_last"),
        pytest.param(torch.float32, torch.channels_last, id="float32-channels_last", marks=pytest.mark.slow),
        pytest.param(torch.float16, torch.contiguous_format, id="float16-contiguous", marks=pytest.mark.slow),
    ],
)


def tensors(n, c, h, w, k, r, s, dtype=torch.float32, device="cpu", memory=torch.contiguous_format, groups=1):
    x = torch.randn(n, c, h, w, device=device).to(dtype).to(memory_format=memory)
    weight = (torch.randn(k, c // groups, r, s, device=device) / (c // groups * r * s) ** 0.5).to(dtype)
    return x, weight, torch.randn(k, device=device).to(dtype)


def gradients(function, inputs, grad):
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    output = function(*leaves)
    wanted = [leaf for leaf in leaves if leaf is not None]
    return output, torch.autograd.grad(output, wanted, grad.to(output.dtype))


def check(inputs, window, pool=None, impl="triton"):
    """The result for random numbers, and all gradients for small integers, within the rule; stock's memory format.

    Small integers make every convolution exact, so that signs and maxima, and with them the way that a gradient takes,
    are the same in every dtype; and they make ties.
    """

    def ours(x, w, b):
        if pool:
            return fastops.conv2d_relu_max_pool2d(x, w, b, **window, **pool, impl=impl)
        return fastops.conv2d_relu(x, w, b, **window, impl=impl)

    def stock(x, w, b):
        maps = F.relu(F.conv2d(x, w, b, **window))
        return F.max_pool2d(maps, *pool.values()) if pool else maps

    output, expected = ours(*inputs), stock(*inputs)
    assert layout(output) == layout(expected)
    assert_within_rule(output, expected, stock(*double(*inputs)), "output")

    integers = [None if x is None else torch.randint_like(x, -1, 2) for x in inputs]
    grad = torch.randint_like(output, -3, 4)
    output, found = gradients(ours, integers, grad)
    expected, by_stock = gradients(stock, integers, grad)
    _, exact = gradients(stock, double(*integers), grad)
    assert torch.equal(output, expected)
    for name, mine, theirs, true in zip(("input", "weight", "bias"), found, by_stock, exact, strict=False):
        assert_within_rule(mine, theirs, true, f"gradient of {name}")


def layout(x):
    """Strides along the axes that have any."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


def double(*inputs):
    return tuple(None if x is None else x.double() for x in inputs)


# n, c, h, w, k, r, s, stride, padding, dilation
WINDOWS = [
    (1, 3, 23, 15, 70, 11, 11, 4, 2, 1),  # conv1 of AlexNet, partial tiles
    (1, 40, 9, 7, 24, 3, 3, 1, 1, 1),
    (2, 5, 8, 10, 17, 3, 2, (2, 1), (0, 2), (2, 1)),
    (1, 33, 7, 9, 3, 1, 1, 3, 1, 1),
    (1, 64, 5, 4, 65, 5, 5, 1, 2, 1),
    (1, 2, 9, 9, 4, 3, 3, 3, 4, 2),  # outputs that see padding only
    (3, 1, 5, 5, 1, 2, 4, 2, 0, 1),
]


@KINDS
@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("case", WINDOWS, ids=str)
def test_conv2d_relu(case, impl, dtype, memory):
    *shape, stride, padding, dilation = case
    inputs = tensors(*shape, dtype=dtype, memory=memory)
    check(inputs, {"stride": stride, "padding": padding, "dilation": dilation}, impl=impl)


POOLS = [
    {"pool_size": 3, "pool_stride": 2, "pool_padding": 0},  # overlapping, AlexNet
    {"pool_size": 2, "pool_stride": 2, "pool_padding": 1},
    {"pool_size": (3, 2), "pool_stride": (1, 3), "pool_padding": (1, 0)},  # gaps along the width
    {"pool_size": 5, "pool_stride": 1, "pool_padding": 2},  # not unrolled
]


@KINDS
@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("pool", POOLS, ids=lambda pool: "-".join(map(str, pool.values())))
def test_conv2d_relu_max_pool2d(pool, impl, dtype, memory):
    inputs = tensors(2, 3, 5, 6, 5, 3, 3, dtype=dtype, memory=memory)
    check(inputs, {"stride": 1, "padding": 1}, pool, impl)


@pytest.mark.parametrize("impl", ENGINES)
def test_without_bias(impl):
    x, w, _ = tensors(2, 4, 7, 6, 5, 3, 3)
    check((x, w, None), {"padding": 1}, impl=impl)
    check((x, w, None), {"padding": 1}, POOLS[0], impl)


@pytest.mark.parametrize("groups", [2, 6])
def test_groups_run_in_the_hybrid(groups):
    inputs = tensors(2, 6, 8, 7, 12, 3, 3, groups=groups)
    check(inputs, {"padding": 1, "groups": groups}, impl="hybrid")
    check(inputs, {"padding": 1, "groups": groups}, POOLS[0], "hybrid")
    with pytest.raises(fastops.KernelUnavailable, match="groups=1 only"):
        fastops.conv2d_relu(*inputs, groups=groups, impl="triton")


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_named_padding(impl, padding):
    # an even filter pads "same" unevenly
    check(tensors(2, 3, 8, 7, 4, 4, 3), {"padding": padding, "dilation": (1, 2)}, impl=impl)


# form, n, c, h, w, k, r, s, stride, padding, dilation: shipped tiles, partial in every axis
FORMS = [
    ("boxes", 2, 64, 9, 7, 72, 3, 3, 1, 1, 1),
    ("boxes", 3, 64, 5, 17, 40, 3, 2, 1, (2, 0), (2, 1)),
    ("boxes", 1, 64, 18, 5, 136, 1, 1, 1, 0, 1),
    ("batch", 110, 64, 4, 3, 64, 3, 3, 1, 1, 1),
    ("batch", 120, 64, 5, 4, 128, 3, 3, 2, (1, 2), (1, 2)),
    ("gather", 2, 70, 6, 5, 130, 3, 3, 1, 1, 1),
    ("gather_flat", 2, 64, 5, 4, 40, 2, 2, 1, 0, 1),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", FORMS, ids=str)
def test_every_form_of_the_implicit_gemm(case, dtype):
    form, *shape, stride, padding, dilation = case
    x, w, b = tensors(*shape, dtype=dtype, memory=torch.channels_last)
    stride, padding, dilation = ([v, v] if isinstance(v, int) else list(v) for v in (stride, padding, dilation))
    size = output_size(x.shape[2:], w.shape[2:], stride, padding, dilation)
    for bias, relu in ((b, True), (None, False)):
        ours = conv2d.convolve(x, w, bias, stride, padding, dilation, size, relu, form)
        stock, truth = (F.conv2d(*t, stride, padding, dilation) for t in ((x, w, bias), double(x, w, bias)))
        if relu:
            stock, truth = stock.relu(), truth.relu()
        assert layout(ours) == layout(stock)
        assert_within_rule(ours, stock, truth, form)


def shape_of(n, c, h, k, r, stride=1, padding=1, dilation=1):
    p, q = output_size((h, h), (r, r), (stride, stride), (padding, padding), (dilation, dilation))
    return Shape(n, c, h, h, k, r, r, p, q, (stride, stride), (padding, padding), (dilation, dilation))


@pytest.mark.parametrize(
    ("shape", "kind", "tma", "form"),
    [
        (shape_of(256, 3, 224, 64, 11, 4, 2), "16-bit", True, "gather_flat"),  # AlexNet, layer by layer
        (shape_of(256, 64, 27, 192, 5, 1, 2), "16-bit", True, "boxes"),
        (shape_of(256, 192, 13, 384, 3), "16-bit", True, "batch"),
        (shape_of(256, 384, 6, 256, 3), "16-bit", True, "batch"),
        (shape_of(256, 384, 6, 256, 3), "16-bit", False, "gather"),  # sm_80
        (shape_of(8, 384, 6, 256, 3), "16-bit", True, "boxes"),
        (shape_of(256, 128, 28, 256, 3, 2), "16-bit", True, "batch"),
        (shape_of(8, 128, 28, 256, 3, 2), "16-bit", True, "gather"),
        (shape_of(256, 64, 27, 192, 5, 1, 2), "ieee", True, "gather"),
        (shape_of(256, 64, 27, 192, 5, 1, 2), "tf32", True, "boxes"),
        (shape_of(256, 72, 13, 192, 3), "16-bit", True, "gather"),
        (shape_of(256, 64, 13, 60, 3), "16-bit", True, "gather"),
        (shape_of(256, 64, 3, 64, 3, 1, 4), "16-bit", True, "boxes"),  # outputs that see padding only
    ],
)
def test_choice_of_form(shape, kind, tma, form):
    assert conv2d.choose_form(shape, kind, tma) == form


def test_precision_of_fp32_is_what_torch_allows(fp32_precision):
    fp32_precision(torch.backends.cudnn.conv, "ieee")
    assert conv2d.arithmetic(torch.float32) == "ieee"
    x, w, b = tensors(1, 36, 6, 6, 8, 3, 3)
    ours = fastops.conv2d_relu(x, w, b, impl="triton")
    assert_within_rule(ours, F.relu(F.conv2d(x, w, b)), F.relu(F.conv2d(*double(x, w, b))))
    fp32_precision(torch.backends.cudnn.conv, "tf32")
    assert conv2d.arithmetic(torch.float32) == "tf32"
    assert conv2d.arithmetic(torch.float16) == "16-bit"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "case",
    [
        (2, 40, 9, 7, 24, 3, 3, 1, 1, 1),  # stride 1: the forward kernel on the turned filter
        (1, 64, 8, 5, 66, 3, 2, (2, 1), (0, 2), (2, 1)),
        (2, 3, 11, 9, 5, 5, 5, 4, 2, 1),
        (1, 5, 5, 5, 3, 1, 1, 3, 4, 1),
        (2, 4, 6, 5, 8, 3, 3, 1, 3, 1),  # more padding than the turned filter can undo
    ],
    ids=str,
)
def test_convolution_gradients_by_triton(case, dtype, monkeypatch):
    monkeypatch.setattr(conv2d_backward, "SPLIT_PIXELS", 30)  # several parts on a small map
    *shape, stride, padding, dilation = case
    for memory in FORMATS:
        x, w, _ = tensors(*shape, dtype=dtype, memory=memory)
        window = [[v, v] if isinstance(v, int) else list(v) for v in (stride, padding, dilation)]
        maps = F.conv2d(x, w, None, *window)
        grad = torch.randn_like(maps)
        stock, exact = (
            torch.ops.aten.convolution_backward(g, x, w, None, *window, False, (0, 0), 1, (True, True, False))
            for g, x, w in ((grad, x, w), double(grad, x, w))
        )
        dx = torch.ops.fastops.conv2d_input_grad(grad, w, x.shape[2:], *window)
        dw = torch.ops.fastops.conv2d_weight_grad(x, grad, w.shape[2:], *window)
        assert_within_rule(dx, stock[0], exact[0], "input")
        assert_within_rule(dw, stock[1], exact[1], "weight")
        assert layout(dx) == layout(stock[0])
        assert layout(dw) == layout(stock[1])


def test_ties_and_dead_windows_take_the_gradient_where_torch_does():
    cases = [(memory, pool, "hybrid") for memory in FORMATS for pool in POOLS]
    for memory, pool, impl in (*cases, (FORMATS[1], POOLS[0], "triton")):
        x = torch.randint(-2, 3, (1, 3, 5, 4)).float().to(memory_format=memory)
        w = torch.eye(3)[:, :, None, None]  # the maps are small integers: ties everywhere
        b = torch.tensor([0.0, 1.0, -2.0])
        grad = torch.randint(-4, 5, F.max_pool2d(x, *pool.values()).shape).float()
        ours = gradients(lambda *t, p=pool, i=impl: fastops.conv2d_relu_max_pool2d(*t, **p, impl=i), (x, w, b), grad)
        stock = gradients(lambda *t, p=pool: F.max_pool2d(F.relu(F.conv2d(*t)), *p.values()), (x, w, b), grad)
        assert torch.equal(ours[0], stock[0])
        for mine, theirs in zip(ours[1], stock[1], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", ENGINES)
def test_nan_and_inf_pass_as_in_torch(impl):
    x, w, b = tensors(2, 4, 7, 6, 5, 3, 3)
    x[0, 1, 2, 3], x[0, 1, 2, 4], x[1, 0, 0, 0], x[1, 2, 5, 5] = float("nan"), float("nan"), torch.inf, -torch.inf
    for memory in FORMATS:
        x = x.to(memory_format=memory)
        for pool in (None, *POOLS[:2]):

            def ours(x, w, b, pool=pool):
                if pool:
                    return fastops.conv2d_relu_max_pool2d(x, w, b, padding=1, **pool, impl=impl)
                return fastops.conv2d_relu(x, w, b, padding=1, impl=impl)

            def stock(x, w, b, pool=pool):
                maps = F.relu(F.conv2d(x, w, b, padding=1))
                return F.max_pool2d(maps, *pool.values()) if pool else maps

            grad = torch.randn_like(stock(x, w, b))
            output, found = gradients(ours, (x, w, b), grad)
            expected, by_stock = gradients(stock, (x, w, b), grad)
            torch.testing.assert_close(output, expected, equal_nan=True)
            torch.testing.assert_close(found[0], by_stock[0], equal_nan=True)
            torch.testing.assert_close(found[2], by_stock[2], equal_nan=True)


def test_bias_gradient_is_the_same_bits_every_time():
    inputs = tensors(2, 4, 9, 8, 5, 3, 3)
    grad = torch.randn(2, 5, 3, 2)
    runs = [
        gradients(lambda *t: fastops.conv2d_relu_max_pool2d(*t, **POOL, impl="hybrid"), inputs, grad)[1]
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_layout_predicate_agrees_with_torch():
    for n, c, h, w in itertools.product((1, 2), (1, 3), (1, 4), (1, 5)):
        for x in (torch.randn(n, c, h, w), torch.randn(n, c, h, w).to(memory_format=torch.channels_last)):
            for view in (x, x.transpose(2, 3), x[:, :, ::2], x[:, :1], x.expand(2, -1, -1, -1) if n == 1 else x):
                expected = torch._prims_common.suggest_memory_format(view) == torch.channels_last
                assert is_channels_last(view) == expected, (view.shape, view.stride())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("memory", FORMATS, ids=("contiguous", "channels_last"))
@pytest.mark.parametrize(
    "case",
    [
        (128, 3, 224, 224, 64, 11, 11, 4, 2, 1),
        (128, 64, 27, 27, 192, 5, 5, 1, 2, 1),
        (128, 192, 13, 13, 384, 3, 3, 1, 1, 1),
        (128, 384, 6, 6, 256, 3, 3, 1, 1, 1),
        (3, 64, 56, 56, 64, 3, 3, 1, 1, 1),
        (8, 128, 28, 28, 256, 3, 3, 2, 1, 1),
        (5, 37, 19, 23, 71, 5, 3, (2, 1), (2, 0), (1, 2)),
    ],
    ids=str,
)
def test_on_a_gpu(case, impl, memory, dtype, device):
    *shape, stride, padding, dilation = case
    x, w, b = tensors(*shape, dtype=dtype, device=device, memory=memory)
    window = {"stride": stride, "padding": padding, "dilation": dilation}
    for pool in (None, POOLS[0]):
        check((x, w, b), window, pool, impl)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", ["boxes", "batch", "gather", "gather_flat"])
def test_every_form_on_a_gpu(form, dtype, device):
    """The first thing to run on a new GPU or Triton: this loop over taps was miscompiled before."""
    if form in ("boxes", "batch") and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("TMA needs sm_90")
    x, w, b = tensors(128, 64, 13, 13, 128, 3, 3, dtype=dtype, device=device, memory=torch.channels_last)
    ours = conv2d.convolve(x, w, b, [1, 1], [1, 1], [1, 1], (13, 13), True, form)
    stock, truth = (F.relu(F.conv2d(*t, padding=1)) for t in ((x, w, b), double(x, w, b)))
    assert_within_rule(ours, stock, truth, form)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_repeatable_on_a_gpu(dtype, device):
    x, w, b = tensors(64, 32, 56, 56, 64, 3, 3, dtype=dtype, device=device, memory=torch.channels_last)
    for pool in (None, *POOLS):

        def ours(x, w, b, pool=pool):
            if pool:
                return fastops.conv2d_relu_max_pool2d(x, w, b, **pool, impl="triton")
            return fastops.conv2d_relu(x, w, b, impl="triton")

        grad = torch.randn_like(ours(x, w, b))
        (first, gradients_1), (second, gradients_2) = (gradients(ours, (x, w, b), grad) for _ in range(2))
        assert torch.equal(first, second)
        assert torch.equal(gradients_1[2], gradients_2[2])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_epilogue_gradients_on_a_gpu(dtype, device):
    """With a 1x1 identity filter all sums are exact, so gradients must equal stock's."""
    x = torch.randint(-3, 4, (64, 32, 55, 55), device=device).to(dtype).to(memory_format=torch.channels_last)
    w = torch.eye(32, device=device, dtype=dtype)[:, :, None, None]
    b = torch.zeros(32, device=device, dtype=dtype)
    for pool in POOLS:
        maps = F.max_pool2d(x, *pool.values())
        grad = torch.randint(-4, 5, maps.shape, device=device).to(dtype)
        ours = gradients(lambda *t, p=pool: fastops.conv2d_relu_max_pool2d(*t, **p, impl="hybrid"), (x, w, b), grad)
        stock = gradients(lambda *t, p=pool: F.max_pool2d(F.relu(F.conv2d(*t)), *p.values()), (x, w, b), grad)
        assert torch.equal(ours[0], stock[0])
        torch.testing.assert_close(ours[1][0], stock[1][0], rtol=0, atol=0)
