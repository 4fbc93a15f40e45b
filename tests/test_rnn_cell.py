"""Cells: kernels against float64 torch, both derivatives, every way PyTorch calls an op."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn

import fastops
from fastops.ops import rnn_cell as ops
from fastops.ops import rnn_cell_autograd as autograd
from tests.rule import assert_within_rule

NAMES = ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
BIASES = ((True, True), (True, False), (False, True), (False, False))


def arguments(name, batch, inputs, hidden, dtype=torch.float32, device="cpu", bias=(True, True), scale=1.0):
    gates = ops.GATES[name] * hidden
    shapes = [(batch, inputs), (batch, hidden), (gates, inputs), (gates, hidden), (gates,), (gates,)]
    x, h, w_ih, w_hh, b_ih, b_hh = (torch.randn(shape, dtype=torch.float64) * scale for shape in shapes)
    tensors = [x, h, w_ih, w_hh, b_ih if bias[0] else None, b_hh if bias[1] else None]
    if name == "lstm_cell":
        tensors.append(torch.randn(batch, hidden, dtype=torch.float64))
    return [None if t is None else t.to(dtype).to(device).requires_grad_() for t in tensors]


def call(function, name, tensors, **options):
    x, h, w_ih, w_hh, b_ih, b_hh = tensors[:6]
    hx = (h, tensors[6]) if name == "lstm_cell" else h
    result = function(x, hx, w_ih, w_hh, b_ih, b_hh, **options)
    return result if isinstance(result, tuple) else (result,)


def copies(tensors, dtype=None):
    return [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]


def gradients(outputs, tensors, weights):
    wanted = [t for t in tensors if t is not None]
    loss = sum((output * weight.to(output.dtype)).sum() for output, weight in zip(outputs, weights, strict=True))
    return torch.autograd.grad(loss, wanted)


def check(name, batch, inputs, hidden, dtype, device="cpu", bias=(True, True), scale=1.0):
    ours = arguments(name, batch, inputs, hidden, dtype, device, bias, scale)
    stock, truth = copies(ours), copies(ours, torch.float64)
    got = call(getattr(fastops, name), name, ours, impl="triton")
    usual = call(getattr(torch, name), name, stock)
    exact = call(getattr(torch, name), name, truth)
    weights = [torch.randn(output.shape, device=device, dtype=torch.float64).to(dtype) for output in got]
    for k in range(len(got)):
        assert_within_rule(got[k], usual[k], exact[k], f"{name} output {k}")
    results = zip(
        gradients(got, ours, weights),
        gradients(usual, stock, weights),
        gradients(exact, truth, weights),
        strict=True,
    )
    for k, grads in enumerate(results):
        assert_within_rule(*grads, f"{name} gradient {k}")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (4, 8, 16), (5, 3, 300), (33, 2, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_numbers_and_gradients(name, shape, dtype):
    check(name, *shape, dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bias", BIASES[1:])
def test_biases_one_by_one(name, bias):
    check(name, 3, 4, 5, torch.float32, bias=bias)


@pytest.mark.parametrize("name", NAMES)
def test_saturated_gates(name):
    check(name, 3, 4, 5, torch.float32, scale=30.0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(64, 512, 512), (17, 80, 321), (2048, 64, 1024), (1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_numbers_and_gradients_on_gpu(name, shape, dtype):
    check(name, *shape, dtype, device="cuda", scale=0.2)


@pytest.mark.parametrize("name", NAMES)
def test_one_gradient_at_a_time(name, device):
    tensors = arguments(name, 3, 4, 5, device=device)
    for wanted in (t for t in tensors if t is not None):
        alone = [t if t is None or t is wanted else t.detach() for t in tensors]
        ours = torch.autograd.grad(call(getattr(fastops, name), name, alone, impl="triton")[-1].sum(), wanted)[0]
        usual = torch.autograd.grad(call(getattr(torch, name), name, alone)[-1].sum(), wanted, allow_unused=True)[0]
        torch.testing.assert_close(ours, torch.zeros_like(wanted) if usual is None else usual, atol=1e-5, rtol=1e-5)


def test_only_the_cell_state_is_used(device):
    tensors = arguments("lstm_cell", 3, 4, 5, device=device)
    for k in (0, 1):
        ours = call(fastops.lstm_cell, "lstm_cell", tensors, impl="triton")[k].sum()
        usual = call(torch.lstm_cell, "lstm_cell", tensors)[k].sum()
        for a, b in zip(torch.autograd.grad(ours, tensors), torch.autograd.grad(usual, tensors), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_references_are_torchs_and_differentiable_twice(name):
    tensors = arguments(name, 2, 3, 2, torch.float64)
    x, h, w_ih, w_hh, b_ih, b_hh, *c = tensors
    products = (x @ w_ih.T, h @ w_hh.T)
    if name == "lstm_cell":
        found = autograd.lstm_reference(*products, b_ih, b_hh, *c)
    elif name == "gru_cell":
        found = (autograd.gru_reference(*products, b_ih, b_hh, h),)
    else:
        found = (autograd.rnn_reference(*products, b_ih, b_hh, name == "rnn_tanh_cell"),)
    for a, b in zip(found, call(getattr(torch, name), name, tensors), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_double_backward_of_a_composite_loss(name, device):
    """Second derivatives, with a term outside the op that a backward without a graph would drop."""

    def second(function, dtype, **options):
        torch.manual_seed(1)
        tensors = copies(arguments(name, 2, 3, 4, device=device), dtype)
        outputs = call(function, name, tensors, **options)
        loss = sum(output.pow(2).sum() for output in outputs) + tensors[0].pow(3).sum()
        wanted = [t for t in tensors if t is not None]
        first = torch.autograd.grad(loss, wanted, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), wanted)

    ours = second(getattr(fastops, name), torch.float32, impl="triton")
    for a, b, truth in zip(
        ours,
        second(getattr(torch, name), torch.float32),
        second(getattr(torch, name), torch.float64),
        strict=True,
    ):
        assert (a - truth).abs().max() <= 4 * (b - truth).abs().max() + 1e-5 * truth.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, device):
    x, h, w_ih, w_hh, b_ih, b_hh, *c = arguments(name, 3, 4, 5, device=device)
    products = ((x @ w_ih.T).detach(), (h @ w_hh.T).detach(), b_ih.detach(), b_hh.detach())
    h = h.detach()
    if name == "lstm_cell":
        c = c[0].detach()
        outputs = autograd.lstm_forward_op(*products, c)
        torch.library.opcheck(autograd.lstm_forward_op, (*products, c))
        for grads in ((h, c), (None, c), (h, None)):
            torch.library.opcheck(autograd.lstm_backward_op, (*grads, c, *outputs[1:]))
    elif name == "gru_cell":
        torch.library.opcheck(autograd.gru_forward_op, (*products, h))
        torch.library.opcheck(autograd.gru_backward_op, (h, h, autograd.gru_forward_op(*products, h)[1]))
    else:
        tanh = name == "rnn_tanh_cell"
        torch.library.opcheck(autograd.rnn_forward_op, (*products, tanh))
        torch.library.opcheck(autograd.rnn_backward_op, (h, autograd.rnn_forward_op(*products, tanh), tanh))


@pytest.mark.parametrize("name", NAMES)
def test_strided_and_expanded_arguments(name, device):
    tensors = arguments(name, 6, 4, 5, device=device)
    strange = [t if t is None else t.detach() for t in tensors]
    strange[0] = torch.randn(4, 12, device=device).t()[::2]
    strange[1] = torch.randn(1, 5, device=device).expand(6, 5)
    if name == "lstm_cell":
        strange[6] = torch.randn(6, 10, device=device)[:, ::2]
    plain = [t if t is None else t.contiguous() for t in strange]
    for a, b in zip(
        call(getattr(fastops, name), name, strange, impl="triton"),
        call(getattr(fastops, name), name, plain, impl="triton"),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_empty_batch_and_empty_input(name, device):
    for batch, inputs in ((0, 4), (3, 0)):
        tensors = arguments(name, batch, inputs, 5, device=device)
        ours = call(getattr(fastops, name), name, tensors, impl="triton")
        for a, b in zip(ours, call(getattr(torch, name), name, tensors), strict=True):
            torch.testing.assert_close(a, b)
        gradients(ours, tensors, ours)


@pytest.mark.parametrize("name", NAMES)
def test_nan_and_inf_are_where_torch_has_them(name, device):
    tensors = [t if t is None else t.detach() for t in arguments(name, 4, 3, 5, device=device)]
    tensors[0][0, 0] = float("nan")
    tensors[1][1, 1] = float("inf")
    tensors[-1][..., 2] = float("-inf")
    for a, b in zip(
        call(getattr(fastops, name), name, tensors, impl="triton"),
        call(getattr(torch, name), name, tensors),
        strict=True,
    ):
        torch.testing.assert_close(a, b, equal_nan=True, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_same_errors_as_torch(name):
    good = [t if t is None else t.detach() for t in arguments(name, 3, 4, 5)]
    bad = {
        0: (torch.randn(3, 6), torch.randn(2, 4), torch.randn(3, 4, dtype=torch.float64)),
        1: (torch.randn(3, 6), torch.randn(2, 5), torch.randn(1, 5)),
        2: (torch.randn(7, 4),),
        3: (torch.randn(7, 5),),
        4: (torch.randn(7),),
    }
    if name == "lstm_cell":
        bad[6] = (torch.randn(3, 6), torch.randn(2, 5))
    for place, tensors in bad.items():
        for tensor in tensors:
            wrong = [tensor if k == place else t for k, t in enumerate(good)]
            with pytest.raises(RuntimeError):
                call(getattr(torch, name), name, wrong)
            with pytest.raises(RuntimeError, match=r"input|hidden|weight|bias|hx"):
                call(getattr(fastops, name), name, wrong, impl="triton")
    for engine in ("torch", "triton"):
        x, h, *weights = good[:6]
        with pytest.raises((RuntimeError, TypeError)):
            getattr(fastops, name)(x, (h,) if name == "lstm_cell" else h[0], *weights, impl=engine)
        with pytest.raises(TypeError, match="argument 'input' must be Tensor, not list"):
            getattr(fastops, name)([x], (h, h) if name == "lstm_cell" else h, *weights, impl=engine)


@pytest.mark.parametrize("name", NAMES)
def test_kinds_of_errors(name):
    """Where a subclass of RuntimeError, or the name of an argument, tells cases apart."""

    def raised(place, tensor, function=None):
        wrong = [t if t is None else t.detach() for t in arguments(name, 3, 4, 5)]
        wrong[place] = tensor
        with pytest.raises((IndexError, RuntimeError)) as error:
            call(function or partial(getattr(fastops, name), impl="triton"), name, wrong)
        return type(error.value), str(error.value)

    for tensor, kind in ((torch.zeros(4), IndexError), (torch.zeros(1, 3, 4), RuntimeError)):
        assert raised(0, tensor, getattr(torch, name))[0] is raised(0, tensor)[0] is kind
    for place in (2, 3):
        kind, words = raised(place, torch.zeros(5))
        assert kind is RuntimeError
        assert "expected 2-D weights" in words
    kind, words = raised(1, torch.zeros(3, 5, dtype=torch.float64))
    assert kind is RuntimeError
    assert "hx is torch.float64" in words
    if name == "lstm_cell":  # torch promotes a c of another dtype, on the CPU
        kind, words = raised(6, torch.zeros(3, 5, dtype=torch.float64))
        assert kind is fastops.KernelUnavailable
        assert "cx is torch.float64" in words


def test_explicit_choice_never_falls_back():
    tensors = arguments("gru_cell", 2, 3, 4, torch.float64)
    with pytest.raises(fastops.KernelUnavailable, match="float64"):
        call(fastops.gru_cell, "gru_cell", tensors, impl="triton")
    with pytest.raises(ValueError, match="'cuda'"):
        call(fastops.gru_cell, "gru_cell", tensors, impl="cuda")
    assert torch.equal(call(fastops.gru_cell, "gru_cell", tensors)[0], call(torch.gru_cell, "gru_cell", tensors)[0])


MODULES = [
    (fastops.nn.LSTMCell, nn.LSTMCell, {}),
    (fastops.nn.GRUCell, nn.GRUCell, {}),
    (fastops.nn.RNNCell, nn.RNNCell, {}),
    (fastops.nn.RNNCell, nn.RNNCell, {"nonlinearity": "relu"}),
]


def flat(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize(("ours", "stock", "options"), MODULES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("impl", ["auto", "torch", "triton"])
def test_modules_are_torchs(ours, stock, options, bias, impl, device):
    torch.manual_seed(3)
    usual = stock(4, 5, bias=bias, device=device, **options)
    torch.manual_seed(3)
    module = ours(4, 5, bias=bias, device=device, impl=impl, **options)
    assert list(module.state_dict()) == list(usual.state_dict())
    for a, b in zip(module.parameters(), usual.parameters(), strict=True):
        assert torch.equal(a, b)
    state = torch.randn(3, 5, device=device)
    batched = (state, state * 2) if stock is nn.LSTMCell else state
    single = (state[0], state[1]) if stock is nn.LSTMCell else state[0]
    for x, hx in (((3, 4), None), ((3, 4), batched), ((4,), None), ((4,), single)):
        x = torch.randn(x, device=device)
        for a, b in zip(flat(module(x, hx)), flat(usual(x, hx)), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    for x, hx in ((torch.randn(1, 2, 4), None), (torch.randn(3, 4), (torch.randn(1, 3, 5),) * 2)):
        x = x.to(device)
        hx = hx if hx is None or stock is nn.LSTMCell else hx[0]
        with pytest.raises(ValueError) as theirs:  # noqa: PT011, the message is compared
            usual(x, hx)
        with pytest.raises(ValueError) as mine:  # noqa: PT011
            module(x, hx)
        assert str(mine.value) == str(theirs.value)


@pytest.mark.parametrize(("ours", "stock", "options"), MODULES)
def test_swapped_copied_and_pickled(ours, stock, options):
    module = stock(4, 5, **options)
    shown = repr(module)
    module.__class__ = ours
    assert repr(module) == shown
    module.impl = "triton"
    assert "impl='triton'" in repr(module)
    x = torch.randn(3, 4)
    expected = flat(module(x))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert all(torch.equal(a, b) for a, b in zip(flat(other(x)), expected, strict=True))
    module.__class__ = stock
    for a, b in zip(flat(module(x)), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("ours", "stock", "options"), MODULES)
@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_compiles_to_one_graph(ours, stock, options, impl, device):
    module = ours(4, 5, impl=impl, device=device, **options)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 4, device=device, requires_grad=True)
    got, expected = flat(compiled(x)), flat(module(x))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    a = torch.autograd.grad(got[0].sum(), module.weight_hh)[0]
    torch.testing.assert_close(a, torch.autograd.grad(expected[0].sum(), module.weight_hh)[0])


def test_functional_transforms_and_checkpoint(device):
    tensors = arguments("gru_cell", 3, 4, 5, device=device)

    def loss(x, impl):
        return call(fastops.gru_cell, "gru_cell", [x, *tensors[1:]], impl=impl)[0].sum()

    expected = torch.func.grad(loss)(tensors[0], "torch")
    torch.testing.assert_close(torch.func.grad(loss)(tensors[0], "triton"), expected, atol=1e-5, rtol=1e-5)
    again = torch.utils.checkpoint.checkpoint(loss, tensors[0], "triton", use_reentrant=False)
    found = torch.autograd.grad(again, tensors[0])[0]
    torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_cuda_autocast_and_repeatability(name):
    tensors = arguments(name, 64, 80, 321, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        ours = call(getattr(fastops, name), name, tensors, impl="triton")
        stock = call(getattr(torch, name), name, tensors)
    assert [o.dtype for o in ours] == [o.dtype for o in stock]
    first = gradients(ours, tensors, ours)
    with torch.autocast("cuda", torch.bfloat16):
        ours = call(getattr(fastops, name), name, tensors, impl="triton")
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(ours, tensors, ours), strict=True))
