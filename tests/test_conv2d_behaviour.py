"""conv2d_relu beyond numbers: bad input, uses of autograd, compile, autocast, memory, modules, choice of engine."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastops
from fastops import KernelUnavailable, tuning
from fastops.ops import conv2d_autograd, conv2d_contract
from fastops.ops import conv2d_relu as op

ENGINES = ("triton", "hybrid")
POOL = {"pool_size": 3, "pool_stride": 2}
ALL_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
SLOW_TO_COMPILE = [("triton", False), ("hybrid", True)]


def inputs(n=2, c=3, h=9, w=8, k=4, dtype=torch.float32):
    return torch.randn(n, c, h, w).to(dtype), (torch.randn(k, c, 3, 3) / 5).to(dtype), torch.randn(k).to(dtype)


def ours(x, w, b, impl, pool=None, **window):
    if pool:
        return fastops.conv2d_relu_max_pool2d(x, w, b, **window, **pool, impl=impl)
    return fastops.conv2d_relu(x, w, b, **window, impl=impl)


def stock(x, w, b, pool=None, **window):
    maps = F.relu(F.conv2d(x, w, b, **window))
    return F.max_pool2d(maps, *pool.values()) if pool else maps


def leaves(*tensors):
    return [x.detach().clone().requires_grad_() for x in tensors]


X, W, B = torch.zeros(2, 3, 8, 8), torch.zeros(4, 3, 3, 3), torch.zeros(4)
BAD_CONVOLUTIONS = {
    "rank 2": ((X[0, 0], W, B), {}),
    "rank 5": ((X[None], W, B), {}),
    "weight of rank 3": ((X, W[0], B), {}),
    "channels": ((X, W[:, :2], B), {}),
    "bias": ((X, W, B[:3]), {}),
    "bias of rank 2": ((X, W, B[None]), {}),
    "weight dtype": ((X, W.half(), B), {}),
    "bias dtype": ((X, W, B.half()), {}),
    "stride 0": ((X, W, B), {"stride": 0}),
    "stride -1": ((X, W, B), {"stride": (1, -1)}),
    "stride of three": ((X, W, B), {"stride": (1, 2, 3)}),
    "stride float": ((X, W, B), {"stride": 1.5}),
    "stride bool": ((X, W, B), {"stride": True}),
    "padding of bools": ((X, W, B), {"padding": (True, True)}),
    "groups bool": ((X, W, B), {"groups": True}),
    "dilation 0": ((X, W, B), {"dilation": 0}),
    "padding -1": ((X, W, B), {"padding": -1}),
    "padding name": ((X, W, B), {"padding": "bogus"}),
    "same with stride": ((X, W, B), {"padding": "same", "stride": 2}),
    "groups 0": ((X, W, B), {"groups": 0}),
    "groups 2": ((X, W, B), {"groups": 2}),
    "groups float": ((X, W, B), {"groups": 1.0}),
    "filter too large": ((X[:, :, :2], W, B), {}),
    "dilated filter too large": ((X, W, B), {"dilation": 4}),
    "no rows": ((X[:, :, :0], W, B), {}),
    "no rows, padded": ((X[:, :, :0], W, B), {"padding": 2}),
    "no output channels": ((X, W[:0], B[:0]), {}),
    "no filter rows": ((X, W[:, :, :0], B), {}),
    "list for input": (([1.0], W, B), {}),
    "list for weight": ((X, [1.0], B), {}),
}


@pytest.mark.parametrize("name", BAD_CONVOLUTIONS)
@pytest.mark.parametrize("impl", ["auto", *ENGINES])
def test_bad_convolutions_raise_what_torch_raises(name, impl):
    tensors, window = BAD_CONVOLUTIONS[name]
    with pytest.raises(Exception) as expected:  # noqa: PT011 - whatever torch raises
        F.conv2d(*tensors, **window)
    with pytest.raises(expected.type) as found:
        fastops.conv2d_relu(*tensors, **window, impl=impl)
    assert not isinstance(found.value, KernelUnavailable)
    assert str(found.value)


BAD_POOLS = {
    "size 0": {"pool_size": 0},
    "size -1": {"pool_size": -1},
    "size of three": {"pool_size": (2, 2, 2)},
    "size float": {"pool_size": 2.5},
    "size bool": {"pool_size": True},
    "stride bool": {"pool_size": 2, "pool_stride": True},
    "size word": {"pool_size": "a"},
    "size larger than the maps": {"pool_size": 9},
    "stride 0": {"pool_size": 2, "pool_stride": 0},
    "padding -1": {"pool_size": 2, "pool_padding": -1},
    "padding more than half": {"pool_size": 2, "pool_stride": 2, "pool_padding": 2},
}


@pytest.mark.parametrize("name", BAD_POOLS)
@pytest.mark.parametrize("impl", ["auto", *ENGINES])
def test_bad_pools_raise_what_torch_raises(name, impl):
    pool = BAD_POOLS[name]
    with pytest.raises(Exception) as expected:  # noqa: PT011 - whatever torch raises
        F.max_pool2d(F.conv2d(X, W, B), pool["pool_size"], pool.get("pool_stride"), pool.get("pool_padding", 0))
    with pytest.raises(expected.type) as found:
        fastops.conv2d_relu_max_pool2d(X, W, B, **pool, impl=impl)
    assert not isinstance(found.value, KernelUnavailable)


def test_what_torch_runs_and_an_engine_does_not_is_refused_with_a_reason():
    double = [x.double() for x in (X, W, B)]
    for tensors, window, engines, reason in (
        (double, {}, ENGINES, "float64"),
        ((X.int(), W.int(), B.int()), {}, ENGINES, "int32"),
        ((X.bfloat16(), W.bfloat16(), B.bfloat16()), {}, ENGINES, "bfloat16"),
        ((X.to("meta"), W.to("meta"), B.to("meta")), {}, ENGINES, "meta"),
        ((torch.zeros(1, 1, 40, 2), torch.zeros(1, 1, 32, 1), None), {}, ("triton",), "31 rows"),
    ):
        expected = stock(*tensors, **window)
        assert torch.empty_like(fastops.conv2d_relu(*tensors, **window)).shape == expected.shape
        for impl in engines:
            with pytest.raises(KernelUnavailable, match=reason):
                fastops.conv2d_relu(*tensors, **window, impl=impl)
    with pytest.raises(KernelUnavailable, match="255 positions"):
        fastops.conv2d_relu_max_pool2d(torch.zeros(1, 1, 20, 20), torch.zeros(1, 1, 1, 1), pool_size=16, impl="hybrid")
    with pytest.raises(ValueError, match="impl must be one of"):
        fastops.conv2d_relu(X, W, B, impl="cudnn")


def test_environment_overrides_auto_only(monkeypatch):
    monkeypatch.setenv("FASTOPS_IMPL", "hybrid")
    with pytest.raises(KernelUnavailable, match="float64"):
        fastops.conv2d_relu(X.double(), W.double(), B.double())
    fastops.conv2d_relu(X.double(), W.double(), B.double(), impl="torch")


@pytest.mark.parametrize("impl", ENGINES)
def test_unbatched_empty_strided_and_expanded(impl):
    x, w, b = inputs()
    for pool in (None, POOL):
        torch.testing.assert_close(ours(x[0], w, b, impl, pool), stock(x[0], w, b, pool))
        strided = torch.randn(2, 3, 18, 16)[:, :, ::2, ::2]
        torch.testing.assert_close(ours(strided, w, b, impl, pool), stock(strided, w, b, pool))
        w_view = torch.randn(3, 3, 4, 3).permute(2, 3, 0, 1)
        torch.testing.assert_close(ours(x, w_view, b, impl, pool), stock(x, w_view, b, pool))
        found, expected = leaves(x[:0], w, b), leaves(x[:0], w, b)
        output = ours(*found, impl, pool)
        assert output.shape == stock(*expected, pool).shape
        for mine, theirs in zip(
            torch.autograd.grad(output.sum(), found),
            torch.autograd.grad(stock(*expected, pool).sum(), expected),
            strict=True,
        ):
            assert torch.equal(mine, theirs)
        # the gradient of sum() is one number, expanded
        found, expected = leaves(x, w, b), leaves(x, w, b)
        mine = torch.autograd.grad(ours(*found, impl, pool).sum(), found)
        torch.testing.assert_close(mine, torch.autograd.grad(stock(*expected, pool).sum(), expected))


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("pool", [None, POOL], ids=["relu", "pool"])
def test_only_the_gradients_asked_for(impl, pool):
    x, w, b = inputs()
    for index in range(3):
        found, expected = [x.clone(), w.clone(), b.clone()], [x.clone(), w.clone(), b.clone()]
        found[index].requires_grad_()
        expected[index].requires_grad_()
        (mine,) = torch.autograd.grad(ours(*found, impl, pool).sum(), found[index])
        (theirs,) = torch.autograd.grad(stock(*expected, pool).sum(), expected[index])
        torch.testing.assert_close(mine, theirs)
    with torch.no_grad():
        assert not ours(*leaves(x, w, b), impl, pool).requires_grad


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("pool", [None, POOL], ids=["relu", "pool"])
def test_bytes_saved_for_backward(impl, pool):
    """x, w and b, and besides the result itself, or one byte per pooled element."""
    tensors = leaves(*inputs(dtype=torch.float16))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        output = ours(*tensors, impl, pool)
    own = {x.data_ptr() for x in tensors}
    extra = [x for x in saved if x.data_ptr() not in own]
    assert len(extra) == 1
    if pool:
        assert extra[0].dtype == torch.uint8
        assert extra[0].nbytes == output.numel()
    else:
        assert extra[0].data_ptr() == output.data_ptr()


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("pool", [None, POOL], ids=["relu", "pool"])
def test_double_backward(impl, pool):
    def second(function, tensors):
        gradients = torch.autograd.grad((function(*tensors) ** 2).sum(), tensors, create_graph=True)
        # the cube would be lost by a backward that silently carries no graph
        return torch.autograd.grad(sum((g**2).sum() for g in gradients) + (tensors[1] ** 3).sum(), tensors)

    x, w, b = inputs(n=1, h=7, w=6)
    found = second(lambda *t: ours(*t, impl, pool, padding=1), leaves(x, w, b))
    expected = second(lambda *t: stock(*t, pool, padding=1), leaves(x, w, b))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("pool", [None, POOL], ids=["relu", "pool"])
def test_function_transforms_and_checkpoint(impl, pool):
    x, w, b = inputs()

    def loss(function):
        return lambda w: function(w).square().sum()

    mine = torch.func.grad(loss(lambda w: ours(x, w, b, impl, pool)))(w)
    theirs = torch.func.grad(loss(lambda w: stock(x, w, b, pool)))(w)
    torch.testing.assert_close(mine, theirs)
    with pytest.raises(KernelUnavailable, match="forward-mode"):
        torch.func.jvp(lambda w: ours(x, w, b, impl, pool), (w,), (w,))
    assert torch.func.jvp(lambda w: ours(x, w, b, "auto", pool), (w,), (w,))[1].shape == stock(x, w, b, pool).shape

    plain, kept = leaves(x, w, b), leaves(x, w, b)
    expected = torch.autograd.grad(ours(*plain, impl, pool).sum(), plain)
    again = checkpoint(lambda *t: ours(*t, impl, pool), *kept, use_reentrant=False)
    for mine, theirs in zip(torch.autograd.grad(again.sum(), kept), expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("pool", [None, POOL], ids=["relu", "pool"])
def test_vmap_is_for_stock_pytorch(pool, monkeypatch):
    _, w, b = inputs()
    batch = torch.randn(2, 1, 3, 6, 5)

    def per_sample(function):
        return torch.vmap(torch.func.grad(lambda w, x: function(x, w).square().sum()), (None, 0))(w, batch)

    expected = per_sample(lambda x, w: stock(x, w, b, pool))
    for impl in ENGINES:
        for refused in (
            lambda impl=impl: torch.vmap(lambda x: ours(x, w, b, impl, pool))(batch),
            lambda impl=impl: torch.func.grad(lambda w: torch.vmap(lambda x: ours(x, w, b, impl, pool))(batch).sum())(
                w
            ),
            lambda impl=impl: per_sample(lambda x, w: ours(x, w, b, impl, pool)),
            lambda impl=impl: torch.vmap(lambda x: ours(x, w.clone().requires_grad_(), b, impl, pool))(batch),
        ):
            with pytest.raises(RuntimeError, match=r"vmap|transform"):
                refused()
    assert torch.equal(per_sample(lambda x, w: ours(x, w, b, "auto", pool)), expected)
    # where the table would choose an engine, as on a GPU
    monkeypatch.setattr(op, "_plain_cuda", lambda *tensors: True)
    monkeypatch.setattr(op, "ROWS", (tuning.Row("hybrid", "estimated", "", ()), *op.ROWS))
    assert torch.equal(per_sample(lambda x, w: ours(x, w, b, "auto", pool)), expected)


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("pool", [None, POOL], ids=["relu", "pool"])
def test_bias_with_gaps(impl, pool):
    x, w, _ = inputs(n=1, h=6, w=5)
    for bias in (torch.randn(8)[::2], torch.randn(1).expand(4)):
        torch.testing.assert_close(ours(x, w, bias, impl, pool), stock(x, w, bias, pool))


@pytest.mark.parametrize("impl", ENGINES)
def test_integers_as_torch_takes_them(impl):
    x, w, b = inputs(n=1, h=6, w=5)
    window = {"stride": np.int64(2), "padding": (np.int32(1), 1), "dilation": torch.tensor(1), "groups": np.int64(1)}
    torch.testing.assert_close(ours(x, w, b, impl, **window), stock(x, w, b, **window))
    for pool in (
        {"pool_size": np.int64(2), "pool_stride": []},
        {"pool_size": (2,), "pool_stride": ()},
        {"pool_size": 3, "pool_stride": np.int64(2)},
    ):
        torch.testing.assert_close(ours(x, w, b, impl, pool), stock(x, w, b, pool))
    with pytest.raises(KernelUnavailable, match="larger than"):
        ours(x, w, b, impl, stride=2**31)


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("pool", [None, POOL], ids=["relu", "pool"])
def test_autocast_casts_as_for_conv2d(impl, pool):
    tensors, expected_of = leaves(*inputs()), leaves(*inputs())
    for mine, theirs in zip(tensors, expected_of, strict=True):
        mine.data.copy_(theirs.data)
    with torch.autocast("cpu", dtype=torch.float16):
        found, expected = ours(*tensors, impl, pool), stock(*expected_of, pool)
        assert found.dtype == expected.dtype == torch.float16
        with pytest.raises(KernelUnavailable, match="float64"):
            ours(*(t.double() for t in tensors), impl, pool)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-3)  # fp16: rounded once or twice
    mine = torch.autograd.grad(found.float().sum(), tensors)
    theirs = torch.autograd.grad(expected.float().sum(), expected_of)
    assert [g.dtype for g in mine] == [torch.float32] * 3
    torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("impl", "dynamic"),
    [("triton", True), ("hybrid", False), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_TO_COMPILE)],
)
def test_compiles_as_one_graph(impl, dynamic):
    x, w, b = inputs(c=4, h=8)  # K = C, so that one layer feeds the next

    def network(x, w, b):
        return ours(ours(x, w, b, impl, padding="same"), w, b, impl, POOL)

    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (2, 3) if dynamic else (2,):
        x = torch.randn(batch, 4, 8, 8)
        plain, traced = leaves(x, w, b), leaves(x, w, b)
        expected, found = network(*plain), compiled(*traced)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found.sum(), traced), torch.autograd.grad(expected.sum(), plain))


def test_choice_by_the_table_compiles_as_one_graph(monkeypatch):
    monkeypatch.setattr(op, "_plain_cuda", lambda *tensors: True)
    chosen = []
    monkeypatch.setattr(op, "ROWS", (tuning.Row("hybrid", "estimated", "", (("maps", {"min": 1}),)), *op.ROWS))
    monkeypatch.setattr(op, "why_not", lambda *a, impl, real=op.why_not: chosen.append(impl) or real(*a, impl=impl))
    tensors = inputs()
    torch._dynamo.reset()
    found = torch.compile(lambda *t: ours(*t, "auto", POOL), fullgraph=True, backend="aot_eager")(*tensors)
    torch.testing.assert_close(found, stock(*tensors, POOL))
    assert chosen == ["hybrid"]


@pytest.mark.slow
@pytest.mark.parametrize("impl", ENGINES)
def test_compiles_with_inductor(impl):
    x, w, b = inputs()
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: ours(*t, impl, POOL), fullgraph=True)
    plain, traced = leaves(x, w, b), leaves(x, w, b)
    expected, found = ours(*plain, impl, POOL), compiled(*traced)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), traced), torch.autograd.grad(expected.sum(), plain))


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_registered_ops_pass_opcheck(memory):
    torch.use_deterministic_algorithms(False)  # opcheck compares two runs
    # the fakes depend on the memory format, what autograd and compilation make of an op does not
    checks = ["test_schema", "test_faketensor"] if memory == torch.channels_last else list(ALL_CHECKS)
    x, w, _ = inputs(h=5, w=4)
    x = x.to(memory_format=memory)
    window = [[1, 1], [1, 1], [1, 1]]
    pool = [[3, 3], [2, 2], [1, 1]]
    b = torch.randn(3)
    pooled, codes = conv2d_contract.bias_relu_pool_forward(x, b, *pool, True)
    maps = conv2d_contract.conv2d_relu_forward(x, w, None, *window)
    for operator, arguments in (
        (conv2d_contract.conv2d_relu_forward, (x, w, torch.randn(4), *window)),
        (conv2d_contract.conv2d_input_grad, (maps, w, [5, 4], *window)),
        (conv2d_contract.conv2d_weight_grad, (x, maps, [3, 3], *window)),
        (conv2d_contract.bias_relu_forward, (x, b)),
        (conv2d_contract.bias_relu_backward, (x, x, True)),
        (conv2d_contract.bias_relu_backward, (x, x, False)),
        (conv2d_contract.bias_relu_pool_forward, (x, b, *pool, True)),
        (conv2d_contract.bias_relu_pool_forward, (x, None, *pool, False)),
        (conv2d_contract.bias_relu_pool_backward, (pooled, codes, [5, 4], *pool, True)),
    ):
        results = torch.library.opcheck(operator, arguments, test_utils=checks)
        assert set(results.values()) == {"SUCCESS"}, (operator, results)


@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("pool", [None, POOL], ids=["relu", "pool"])
def test_flops_are_counted_as_torch_counts_them(impl, pool):
    def count(function):
        with FlopCounterMode(display=False) as counter:
            tensors = leaves(*inputs())
            function(tensors).sum().backward()
        return counter.get_total_flops()

    assert count(lambda t: ours(*t, impl, pool)) == count(lambda t: stock(*t, pool)) > 0


def test_triton_gradients_run_where_the_table_says(monkeypatch):
    rows = tuple(
        tuning.Row("triton", "estimated", "", (("pass", direction),)) for direction in ("input_grad", "weight_grad")
    )
    called = []
    for name in ("conv2d_input_grad", "conv2d_weight_grad"):
        real = getattr(conv2d_contract, name)
        monkeypatch.setattr(conv2d_contract, name, lambda *a, r=real, n=name: called.append(n) or r(*a))
    monkeypatch.setattr(conv2d_autograd, "ROWS", rows)
    x, w, b = inputs()
    found, expected = leaves(x, w, b), leaves(x, w, b)
    mine = torch.autograd.grad(ours(*found, "hybrid").sum(), found)
    theirs = torch.autograd.grad(stock(*expected).sum(), expected)
    torch.testing.assert_close(mine, theirs)
    assert called == ["conv2d_input_grad", "conv2d_weight_grad"]


FACTS = {"pass": "forward", "device": "cuda", "compiling": False, "bias": True, "groups": 1, "channels": 64}


@pytest.mark.parametrize(
    ("facts", "engine"),
    [
        ({"dtype": "float16", "pool": True, "maps": 2**24}, "hybrid"),
        ({"dtype": "float32", "pool": True, "maps": 2**24}, "hybrid"),
        ({"dtype": "bfloat16", "pool": False, "maps": 2**24}, "hybrid"),
        ({"dtype": "float32", "pool": False, "maps": 2**24}, "torch"),
        ({"dtype": "float16", "pool": True, "maps": 2**16}, "torch"),
        ({"dtype": "float16", "pool": True, "maps": 2**24, "compiling": True}, "torch"),
        ({"dtype": "float16", "pool": True, "maps": 2**24, "device": "cpu"}, "torch"),
        ({"dtype": "float64", "pool": True, "maps": 2**24}, "torch"),
        ({"dtype": "float16", "pool": False, "maps": 2**24, "pass": "input_grad"}, "torch"),
        ({"dtype": "float16", "pool": False, "maps": 2**24, "pass": "weight_grad"}, "torch"),
    ],
)
def test_shipped_table(facts, engine):
    assert tuning.choose(conv2d_autograd.ROWS, {**FACTS, **facts}).engine == engine


def test_auto_on_the_cpu_is_stock_to_the_bit():
    tensors = inputs()
    assert torch.equal(fastops.conv2d_relu(*tensors), stock(*tensors))
    assert torch.equal(fastops.conv2d_relu_max_pool2d(*tensors, **POOL), stock(*tensors, POOL))
    choices = op.explain_auto()
    assert {tuple(choice) for choice in choices} == {("op", "example", "engine", "why")}
