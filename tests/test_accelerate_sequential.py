"""Conv2d + ReLU (+ MaxPool2d) in a Sequential: what is taken together, and that nothing can be told from outside."""

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import fastops
from fastops.nn import sequential
from tests.accelerate_models import TorchvisionAlexNet
from tests.rule import assert_within_rule


@pytest.fixture
def kernels(monkeypatch):
    """Run the kernels (in the interpreter on a CPU), and count what is called together."""
    monkeypatch.setenv("FASTOPS_IMPL", "triton")
    calls = []
    together = sequential._together

    def counting(input, modules, impl):
        calls.append("+".join(type(module).__name__ for module in modules))
        return together(input, modules, impl)

    monkeypatch.setattr(sequential, "_together", counting)
    return calls


def block(*layers):
    return nn.Sequential(*layers)


def check(model, x, calls, expected):
    """Forward of an accelerated copy against stock, float64 the truth, and which calls it made."""
    ours = fastops.accelerate(copy.deepcopy(model))
    out = ours(x)
    assert_within_rule(out, model(x), copy.deepcopy(model).double()(x.double()))
    assert calls == expected
    return ours


def test_conv_relu_and_pool(kernels):
    model = block(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(3, 2, 1), nn.ReLU())
    ours = check(model, torch.randn(2, 2, 8, 8), kernels, ["Conv2d+ReLU+MaxPool2d", "Conv2d+ReLU"])
    assert "together: 0-2, 3-4" in repr(ours)
    assert type(ours) is fastops.nn.Sequential
    assert isinstance(ours, nn.Sequential)
    assert [type(module) for module in ours] == [type(module) for module in model]


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular", "replicate"])
def test_padding_modes(kernels, mode):
    model = block(nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode=mode), nn.ReLU())
    check(model, torch.randn(1, 2, 5, 6), kernels, ["Conv2d+ReLU"])


def test_same_padding_stride_dilation_no_bias_and_one_image(kernels):
    model = block(nn.Conv2d(2, 3, 3, padding="same", dilation=2, bias=False), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    check(model, torch.randn(2, 7, 6), kernels, ["Conv2d+ReLU+MaxPool2d"])


def test_groups_by_the_hybrid_engine(kernels, monkeypatch):
    monkeypatch.setenv("FASTOPS_IMPL", "hybrid")
    model = block(nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.MaxPool2d(2))
    check(model, torch.randn(1, 4, 6, 6), kernels, ["Conv2d+ReLU+MaxPool2d"])


class OwnReLU(nn.ReLU):
    def forward(self, input):
        return F.relu(input) + 1


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        (lambda: [nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU()], "BatchNorm2d follows it, not ReLU"),
        (lambda: [nn.Conv2d(2, 2, 1), nn.LeakyReLU()], "LeakyReLU follows it, not ReLU"),
        (lambda: [nn.Conv2d(2, 2, 1), nn.ReLU6()], "ReLU6 follows it, not ReLU"),
        (lambda: [nn.Conv2d(2, 2, 1)], "nothing follows it in its Sequential"),
        (lambda: [nn.Conv2d(2, 2, 1), OwnReLU()], "OwnReLU, not exactly ReLU"),
        (lambda: [parametrizations.spectral_norm(nn.Conv2d(2, 2, 1)), nn.ReLU()], "it is parametrized"),
        (lambda: [hooked(nn.Conv2d(2, 2, 1)), nn.ReLU()], "a hook wants to see Conv2d alone"),
        (lambda: [nn.Conv2d(2, 2, 1), hooked(nn.ReLU())], "a hook wants to see ReLU alone"),
        (lambda: [forward_replaced(nn.Conv2d(2, 2, 1)), nn.ReLU()], "its forward was replaced on the instance"),
        (lambda: [convolution_replaced(nn.Conv2d(2, 2, 3)), nn.ReLU()], "its _conv_forward was replaced"),
        (lambda: [compiled(nn.Conv2d(2, 2, 1)), nn.ReLU()], "it is compiled on its own"),
        (lambda: [nn.utils.spectral_norm(nn.Conv2d(2, 2, 1)), nn.ReLU()], "recomputes its weight (SpectralNorm)"),
        (lambda: [nn.ConvTranspose2d(2, 2, 1), nn.ReLU()], None),
    ],
    ids=[
        *("batch norm", "leaky", "relu6", "last", "own relu", "parametrized", "hooked", "hooked relu"),
        *("forward", "conv forward", "compiled", "old norm", "transposed"),
    ],
)
def test_what_stays_and_why(kernels, layers, reason):
    model = block(*layers()).eval()
    report = fastops.explain(model)
    if reason is None:
        assert not report.rows
    else:
        (row,) = report.kept
        assert reason in row.reason
    x = torch.randn(1, 2, 4, 4)
    expected = model(x)
    assert torch.equal(fastops.accelerate(model)(x), expected)
    assert kernels == []


def convolution_replaced(module):
    module._conv_forward = lambda x, weight, bias: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)
    return module


def forward_replaced(module):
    forward = module.forward
    module.forward = lambda x: 2 * forward(x)
    return module


def compiled(module):
    module.compile(backend="eager")
    return module


def hooked(module):
    module.register_forward_hook(lambda module, args, output: output * 2)
    return module


@pytest.mark.parametrize(
    ("pool", "reason"),
    [
        (nn.MaxPool2d(2, ceil_mode=True), "ceil_mode"),
        (nn.MaxPool2d(2, dilation=2), "dilation 2"),
        (nn.AvgPool2d(2), None),
    ],
)
def test_pools_that_stay_apart(kernels, pool, reason):
    model = block(nn.Conv2d(1, 2, 1), nn.ReLU(), pool)
    check(model, torch.randn(1, 1, 5, 5), kernels, ["Conv2d+ReLU"])
    (row,) = fastops.explain(model)
    assert row.kind == "Conv2d + ReLU"
    assert (reason or "") in row.reason


@pytest.mark.parametrize("dilation", [1, (1, 1)])
def test_a_dilation_of_one_in_any_form(kernels, dilation):
    model = block(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.MaxPool2d(2, dilation=dilation))
    check(model, torch.randn(1, 1, 5, 5), kernels, ["Conv2d+ReLU+MaxPool2d"])


def test_pool_that_returns_indices(kernels):
    model = block(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.MaxPool2d(2, return_indices=True))
    x = torch.randn(1, 1, 4, 4)
    _, indices = model(x)
    assert torch.equal(fastops.accelerate(model)(x)[1], indices)


def test_hooks_added_later_see_what_they_always_saw(kernels):
    model = TorchvisionAlexNet()
    x = torch.randn(1, 3, 63, 63)
    seen = []

    def watch(model):
        return [module.register_forward_hook(lambda m, a, out: seen.append(out.clone())) for module in model.features]

    handles = watch(model)
    model(x)
    expected, seen = seen, []
    for handle in handles:
        handle.remove()
    fastops.accelerate(model)
    model(x)
    assert len(kernels) == 3
    watch(model)
    model(x)
    assert len(kernels) == 3
    assert len(seen) == len(expected)
    # in-place ReLU changes what the convolution's hook kept no copy of: copies are compared
    for a, b in zip(seen, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_indices_slices_and_iteration_mean_what_they_did(kernels):
    model = TorchvisionAlexNet()
    x = torch.randn(1, 3, 63, 63)
    expected = [model.features[:end](x) for end in range(1, 9)]
    tapped = x
    fastops.accelerate(model)
    for end in range(1, 9):
        torch.testing.assert_close(model.features[:end](x), expected[end - 1], atol=1e-5, rtol=1e-5)
        tapped = model.features[end - 1](tapped)
        torch.testing.assert_close(tapped, expected[end - 1], atol=1e-5, rtol=1e-5)
    assert "Conv2d+ReLU+MaxPool2d" in kernels


def test_editing_the_children_afterwards(kernels):
    model = fastops.accelerate(block(nn.Conv2d(1, 2, 1), nn.ReLU()))
    model[1] = nn.Tanh()
    x = torch.randn(1, 1, 3, 3)
    torch.testing.assert_close(model(x), model[0](x).tanh())
    model.append(nn.Conv2d(2, 2, 1))
    model.append(nn.ReLU())
    model(x)
    assert kernels == ["Conv2d+ReLU"]


def test_shared_convolution_and_shared_relu(kernels):
    convolution, relu = nn.Conv2d(2, 2, 3, padding=1), nn.ReLU()
    model = block(convolution, relu, convolution, nn.Tanh(), convolution, relu)
    check(model, torch.randn(1, 2, 4, 4), kernels, ["Conv2d+ReLU", "Conv2d+ReLU"])


class Counting(nn.Sequential):
    def __init__(self, channels, scale=2):
        super().__init__(nn.Conv2d(channels, 2, 1), nn.ReLU())
        self.scale = scale


class OwnForward(nn.Sequential):
    def forward(self, x):
        for module in self:
            x = module(x) + 1
        return x


def test_a_subclass_without_a_forward_is_taken(kernels):
    model = nn.ModuleList([Counting(3)])
    x = torch.randn(1, 3, 4, 4)
    expected = model[0](x)
    fastops.accelerate(model)
    assert isinstance(model[0], Counting)
    torch.testing.assert_close(model[0](x), expected)
    assert kernels == ["Conv2d+ReLU"]
    for copied in (copy.deepcopy(model[0]), pickle.loads(pickle.dumps(model[0]))):
        assert type(copied) is type(model[0])
        assert copied.scale == 2
        torch.testing.assert_close(copied(x), expected)
        assert type(fastops.restore(copied)) is Counting
    assert type(fastops.restore(model)[0]) is Counting


def test_a_subclass_with_a_forward_stays(kernels):
    model = OwnForward(nn.Conv2d(1, 1, 1), nn.ReLU())
    (row,) = fastops.explain(model)
    assert "has a forward of its own" in row.reason
    x = torch.randn(1, 1, 3, 3)
    expected = model(x)
    assert torch.equal(fastops.accelerate(model)(x), expected)
    assert type(model) is OwnForward


def test_filter_leaves_single_convolutions_alone(kernels):
    model = block(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.ReLU())
    fastops.accelerate(model, filter_fn=lambda module, path: path == "2")
    assert [(row.path, row.becomes is not None) for row in fastops.explain(model)] == [("0", True), ("2", True)]
    assert fastops.explain(model).rows[0].done is False
    model(torch.randn(1, 1, 3, 3))
    assert kernels == ["Conv2d+ReLU"]
    with fastops.accelerated(model):
        assert all(row.done for row in fastops.explain(model))
    assert [row.done for row in fastops.explain(model)] == [False, True]
    fastops.accelerate(model)
    assert all(row.done for row in fastops.explain(model))
    model(torch.randn(1, 1, 3, 3))
    assert len(kernels) == 3
    fastops.restore(model)
    assert "apart" not in vars(model)


def test_names_with_an_ordered_dict_and_nesting(kernels):
    inner = nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 2, 1), relu=nn.ReLU()))
    model = nn.Sequential(OrderedDict(stem=inner, head=nn.Flatten()))
    fastops.accelerate(model)
    assert type(model) is nn.Sequential
    assert [row.path for row in fastops.explain(model)] == ["stem.conv"]
    model(torch.randn(1, 1, 3, 3))
    assert kernels == ["Conv2d+ReLU"]


def test_on_the_cpu_auto_is_the_stock_forward_bit_for_bit(monkeypatch):
    monkeypatch.delenv("FASTOPS_IMPL", raising=False)
    model = TorchvisionAlexNet()
    x = torch.randn(1, 3, 63, 63)
    expected = model(x)
    assert torch.equal(fastops.accelerate(model)(x), expected)


def test_impl_on_the_module(kernels, monkeypatch):
    monkeypatch.delenv("FASTOPS_IMPL")
    model = fastops.nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), impl="torch")
    assert "impl='torch'" in repr(model)
    model(torch.randn(1, 1, 3, 3))
    assert kernels == []
    model.impl = "triton"
    model(torch.randn(1, 1, 3, 3))
    assert kernels == ["Conv2d+ReLU"]
    with pytest.raises(ValueError, match="impl must be one of"):
        fastops.nn.Sequential(impl="fast")


def test_symbolic_trace_looks_inside(kernels):
    model = fastops.accelerate(TorchvisionAlexNet())
    traced = torch.fx.symbolic_trace(model)
    assert any(node.target == "features.0" for node in traced.graph.nodes)
    x = torch.randn(1, 3, 63, 63)
    fastops.restore(model)
    torch.testing.assert_close(traced(x), model(x))


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiled_without_a_graph_break(kernels, backend):
    model = fastops.accelerate(block(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 1, 1), nn.ReLU()))
    x = torch.randn(1, 1, 6, 6)
    expected = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


def test_compiled_before_it_was_accelerated(kernels):
    model = block(nn.Conv2d(1, 2, 1), nn.ReLU())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(1, 1, 3, 3)
    expected = compiled(x)
    fastops.accelerate(compiled)
    torch.testing.assert_close(compiled(x), expected)
    assert kernels == ["Conv2d+ReLU"]
    fastops.restore(compiled)
    assert torch.equal(compiled(x), expected)
    assert kernels == ["Conv2d+ReLU"]


def test_checkpointed_autocast_and_no_grad(kernels):
    model = fastops.accelerate(block(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2)))
    x = torch.randn(1, 1, 6, 6, requires_grad=True)
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).sum().backward()
    assert x.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        assert model(x).dtype == torch.float16


class WithArguments(nn.Sequential):
    def __init__(self, channels):
        super().__init__(nn.Conv2d(3, channels, 3), nn.ReLU())
        self.channels = channels


class Reduces(WithArguments):
    def __reduce__(self):
        return type(self), (self.channels,)


class Registers(WithArguments):
    def __init_subclass__(cls, *, tag, **options):
        super().__init_subclass__(**options)
        cls.tag = tag


class Meta(type):
    pass


class WithMeta(WithArguments, metaclass=Meta):
    pass


class OwnName(WithArguments):
    def fused(self):
        return "mine"


def with_attribute(name):
    module = WithArguments(4)
    setattr(module, name, "mine")
    return module


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Reduces(4), "Reduces has a __reduce__ of its own"),
        (lambda: Registers(4), "Registers has a __init_subclass__ of its own"),
        (lambda: WithMeta(4), "WithMeta has a metaclass, Meta"),
        (lambda: OwnName(4), "it has an attribute 'fused' of its own"),
        (lambda: with_attribute("impl"), "it has an attribute 'impl' of its own"),
        (lambda: with_attribute("apart"), "it has an attribute 'apart' of its own"),
        (
            lambda: nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3), relu=nn.ReLU(), impl=nn.Identity())),
            "it has an attribute 'impl' of its own",
        ),
    ],
    ids=["reduce", "init_subclass", "metaclass", "method", "impl", "apart", "child"],
)
def test_sequentials_of_which_no_class_is_made(make, reason):
    module = make()
    kind = type(module)
    (row,) = fastops.explain(module).kept
    assert row.reason == f"{kind.__name__}, its Sequential, stays: {reason}"
    x = torch.randn(1, 3, 6, 6)
    expected = module(x)
    fastops.accelerate(module)
    assert type(module) is kind
    assert copy.deepcopy(module)(x).min() == 0
    assert torch.equal(module(x), expected)


def test_restored_leaves_no_trace():
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU()]
    model = nn.Sequential(*layers)
    before = dict(model.__dict__)
    assert fastops.restore(fastops.accelerate(model)).__dict__ == before
    for _ in range(2):  # the second time it knows one of the two already
        fastops.accelerate(model, filter_fn=lambda module, path: path == "0")
        fastops.accelerate(model)
    assert list(model.fused()) == [(0, 2), (2, 2)]
    assert fastops.restore(model).__dict__ == before


def test_a_slice_can_be_restored():
    part = fastops.accelerate(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Dropout()))[:2]
    assert isinstance(part, fastops.nn.Sequential)
    assert type(fastops.restore(part)) is nn.Sequential


class Backwards(nn.Sequential):
    def __iter__(self):
        return iter(list(self._modules.values())[::-1])


def test_an_order_of_its_own_is_kept(kernels):
    model, x = Backwards(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1)), torch.randn(1, 3, 5, 5)
    expected = model(x)
    report = fastops.explain(model)
    assert {row.reason for row in report.kept} >= {"Backwards, its Sequential, has an __iter__ of its own"}
    assert torch.equal(fastops.accelerate(model)(x), expected)

    class Ours(fastops.nn.Sequential):
        __iter__ = Backwards.__iter__

    assert torch.equal(Ours(*model._modules.values())(x), expected)
    assert kernels == []


def test_what_was_left_out_stays_so_when_the_sequential_is_edited():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.ReLU())
    fastops.accelerate(model, filter_fn=lambda module, path: path != "2")
    assert list(model.fused()) == [(0, 2)]
    model.insert(0, nn.Identity())
    assert list(model.fused()) == [(1, 2)]
    del model[0]
    assert list(model.fused()) == [(0, 2)]
    del model[:2]
    assert list(model.fused()) == []
    fastops.restore(model)
    assert type(model) is nn.Sequential
    assert "apart" not in model.__dict__
