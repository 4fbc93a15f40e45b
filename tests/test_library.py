"""What every op shares, without a kernel: gradients by reference, kinds of failure, transforms, waiting for imports."""

import contextlib
import importlib
import subprocess
import sys
import warnings

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils import flop_counter

from fastops import _library, _triton_cache
from tests.pretended_gpu import fake


def two_results(x, y, unused):
    return x * y.sin(), (x + 1).prod(-1)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(2, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, y, None


UPSTREAM = torch.full((2, 3), 2.0, dtype=torch.float64), torch.full((2,), 3.0, dtype=torch.float64)


def expected(x, y, first=True, second=True):
    by_x = torch.zeros_like(x)
    if first:
        by_x = by_x + 2 * y.sin()
    if second:
        by_x = by_x + 3 * (x + 1).prod(-1, keepdim=True) / (x + 1)
    return by_x, 2 * x * y.cos() if first else None


@pytest.mark.parametrize("leaves", [True, False])
@pytest.mark.parametrize("given", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_gradients_by_reference(inputs, needs, given, leaves):
    x, y, _ = inputs
    if leaves:  # of what torch.func.vjp has taken out of autograd it is the other way
        x, y = x.clone().requires_grad_(needs[0]), y.clone().requires_grad_(needs[1])
    upstream = [g if there else None for g, there in zip(UPSTREAM, given, strict=True)]
    found = _library.reference_gradients(two_results, (x, y, None), (*needs, True), upstream)
    assert len(found) == 3
    assert found[2] is None
    for gradient, wanted, needed in zip(found, expected(x.detach(), y.detach(), *given), needs, strict=False):
        if not needed:
            assert gradient is None
        elif wanted is None:
            assert gradient is None or not gradient.any()
        else:
            torch.testing.assert_close(gradient.detach(), wanted)


def test_gradients_of_one_result_and_of_a_tensor_given_twice(inputs):
    x = inputs[0].clone().requires_grad_()
    for tensor in (x, x.detach()):
        first, second = _library.reference_gradients(
            lambda a, b: a * b.sin(), (tensor, tensor), (True, True), UPSTREAM[0]
        )
        torch.testing.assert_close(first.detach(), 2 * x.detach().sin())
        torch.testing.assert_close(second.detach(), 2 * (x * x.cos()).detach())


@pytest.mark.parametrize("again", [True, False])
def test_gradients_that_are_differentiated_again(inputs, again):
    x = inputs[0].clone().requires_grad_()
    (found,) = _library.reference_gradients(lambda x: x**3, (x,), (True,), UPSTREAM[0], again)
    assert found.requires_grad == again
    if again:
        torch.testing.assert_close(torch.autograd.grad(found.sum(), x)[0], 12 * x.detach())
    assert _library.reference_gradients(lambda x: x**3, (x,), (True,), UPSTREAM[0])[0].requires_grad  # the default


def test_gradients_alone(inputs):
    x, y, _ = inputs
    found = _library.gradients_alone(two_results, (x, y, None), (True, False, False), UPSTREAM)
    torch.testing.assert_close(found[0], expected(x, y)[0])
    assert found[1:] == (None, None)
    assert not found[0].requires_grad
    assert not x.requires_grad


def test_differentiable_again():
    assert _library.differentiable_again() is True
    with torch.no_grad():
        assert _library.differentiable_again() is False
        seen = []
        torch.vmap(lambda x: (seen.append(_library.differentiable_again()), x)[1])(torch.zeros(2))
        assert seen == [True]


def test_transforms():
    seen = []

    def look(x):
        seen.append((_library.why_no_transform(), _library.why_no_transform(vmap=False)))
        return x

    look(0)
    torch.vmap(look)(torch.zeros(2))
    torch.vmap(torch.func.grad(lambda x: look(x).sum()))(torch.zeros(2, 2))
    torch.func.grad(look)(torch.tensor(1.0))
    torch.func.jvp(look, (torch.zeros(2),), (torch.zeros(2),))
    batched, forward = "torch.vmap is not implemented", "forward-mode derivatives are not implemented"
    assert seen == [(None, None), (batched, None), (batched, None), (None, None), (forward, forward)]


@pytest.fixture
def define(monkeypatch):
    """`_library.define` with a registry of its own; what it registers is gone after the test."""
    for name in ("LAUNCHERS", "FAKES", "OR_STOCK", "FLOP_FORMULAS"):
        monkeypatch.setattr(_library, name, {})
    monkeypatch.setattr(flop_counter, "flop_registry", dict(flop_counter.flop_registry))
    with torch.library._scoped_library("fastops", "FRAGMENT") as library:
        monkeypatch.setattr(_library, "LIBRARY", library)
        yield lambda name, **options: _library.define(
            name, "(Tensor x) -> Tensor", f"{__name__}:launch", torch.empty_like, **options
        )


launched = []


def launch(x):
    launched.append(x.device)
    return x + 1


def test_defining_an_op(define, monkeypatch):
    op = define("for_a_test")
    assert op(torch.zeros(2)).tolist() == [1, 1]
    assert op(torch.zeros(2, device="meta")).shape == (2,)
    assert not _library.FLOP_FORMULAS
    assert not _library.OR_STOCK
    counted = define("counted_in_a_test", flops=lambda shape, **_: 7 * shape[0])
    assert list(_library.FLOP_FORMULAS) == ["counted_in_a_test"]
    assert list(flop_counter.flop_registry)[-1] is torch.ops.fastops.counted_in_a_test
    with flop_counter.FlopCounterMode(display=False) as counter:
        counted(torch.zeros(3))
    assert counter.get_total_flops() == 21
    both = define("with_stock_in_a_test", stock=("test", lambda x: x + 1))
    assert both._schema.overload_name == ""
    assert list(_library.OR_STOCK) == [both]
    assert _library.OR_STOCK[both](torch.zeros(2)).tolist() == [1, 1]


@pytest.mark.parametrize("current", [0, 1])
def test_kernels_run_with_the_device_of_their_tensors_made_current(define, monkeypatch, current):
    kernels = {}
    register = _library.LIBRARY.impl
    monkeypatch.setattr(
        _library.LIBRARY,
        "impl",
        lambda name, kernel, key, **_: kernels.update({key: kernel}) or register(name, kernel, key),
    )
    define("on_a_gpu_in_a_test")
    made_current = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", lambda device: made_current.append(device) or contextlib.nullcontext())
    monkeypatch.setattr(_library, "interpreting", lambda: False)
    device = torch.device("cuda", 1)
    launched.clear()
    with fake(1).fake_mode:
        assert kernels["CUDA"](fake(2, device=device)).shape == (2,)
    assert launched == [device]
    assert made_current == ([] if current == 1 else [device])


class CompilationError(Exception):
    __module__ = "triton.compiler.errors"


class MemoryOfTriton(torch.OutOfMemoryError):
    __module__ = "triton.runtime"


def test_what_is_a_failure_to_launch(monkeypatch):
    assert _library._is_launch_failure(CompilationError("no such instruction"))
    assert not _library._is_launch_failure(RuntimeError("no such instruction"))
    assert _library._is_launch_failure(CompilationError("CUDA: out of memory")) is False
    assert _library._is_launch_failure(MemoryOfTriton("no room")) is False
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert _library._is_launch_failure(CompilationError("no such instruction")) is False


def test_a_damaged_cache_is_compiled_anew_once(define, monkeypatch):
    """What comes of that is what counts; an error that is not Triton's is raised as it is."""
    op, outcomes, anew = define("compiled_anew_in_a_test"), [], []

    def launcher(x):
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    @contextlib.contextmanager
    def compiling_anew(failure):
        anew.append(str(failure))
        yield

    monkeypatch.setitem(_library.LAUNCHERS, "compiled_anew_in_a_test", lambda: launcher)
    monkeypatch.setattr(_triton_cache, "damaged", lambda error: "damaged" in str(error))
    monkeypatch.setattr(_triton_cache, "compiling_anew", compiling_anew)
    outcomes[:] = [CompilationError("damaged"), torch.ones(2)]
    assert op(torch.zeros(2)).tolist() == [1, 1]
    assert anew == ["damaged"]
    outcomes[:] = [CompilationError("damaged"), CompilationError("no such instruction")]
    with pytest.raises(_library.LaunchFailed, match="no such instruction"):
        op(torch.zeros(2))
    outcomes[:] = [CompilationError("damaged"), OSError("disk full")]
    with pytest.raises(OSError, match="disk full"):
        op(torch.zeros(2))
    outcomes[:] = [CompilationError("whole"), torch.ones(2)]
    with pytest.raises(_library.LaunchFailed, match="whole"):
        op(torch.zeros(2))
    assert len(anew) == 3


def test_long_messages_are_cut_in_the_middle():
    assert _library._short("a\n  b") == "a b"
    assert _library._short("x" * 399) == "x" * 399
    assert _library._short("x" * 400) == "x" * 100 + " ... " + "x" * 280


def test_waiting_for_an_import(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("awaited", "other"):
        (tmp_path / f"module_{name}.py").write_text("value = 7")
    seen, finders = [], list(sys.meta_path)
    _library.after_import("module_awaited", lambda module: seen.append(module.value))
    assert sys.meta_path[1:] == finders, "whoever waits is asked before whoever finds"
    importlib.import_module("module_other")
    assert not seen
    module = importlib.import_module("module_awaited")
    assert (module.value, seen) == (7, [7])
    assert sys.meta_path == finders
    _library.after_import("module_awaited", lambda module: seen.append(module))
    assert seen == [7, module]
    _library.after_import("module_that_is_not_there", seen.append)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("module_that_is_not_there")
    assert sys.meta_path == finders


@pytest.mark.parametrize("order", [("torch.utils.flop_counter", "fastops"), ("fastops", "torch.utils.flop_counter")])
def test_formulas_of_operations_are_entered_whoever_comes_first(order):
    code = f"""
import {order[0]}, {order[1]}, torch
from fastops import _library
from torch.utils.flop_counter import flop_registry
import fastops.ops.attention, fastops.ops.conv2d_relu, fastops.ops.rnn
assert _library.FLOP_FORMULAS
missing = [name for name in _library.FLOP_FORMULAS if getattr(torch.ops.fastops, name) not in flop_registry]
assert not missing, missing
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_what_a_kernel_cannot_read_is_named():
    dense = torch.ones(2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is about to drop them
        quantised = torch.quantize_per_tensor(dense, 0.1, 0, torch.qint8)
    assert _library.why_not_dense(x=dense, bias=None) is None
    assert _library.why_not_dense(x=dense, weight=quantised) == "weight is not a dense tensor (torch.strided)"
    assert _library.why_not_dense(x=dense.to_sparse()) == "x is not a dense tensor (torch.sparse_coo)"


def test_a_batch_of_gradients_is_seen(monkeypatch):
    seen = []

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            seen.append(_library.differentiable_again((None, grad)))
            with monkeypatch.context() as patch:
                patch.setattr(torch.compiler, "is_compiling", lambda: True)
                assert _library._batched((grad,)) is False  # a compiled graph has no such tensors
            return 2 * grad

    x = torch.ones(3, requires_grad=True)
    y = Twice.apply(x)
    (rows,) = torch.autograd.grad(y, x, torch.eye(3), is_grads_batched=True, retain_graph=True)
    torch.autograd.grad(y, x, torch.ones(3))
    assert torch.equal(rows, 2 * torch.eye(3))
    assert seen == [True, False]


def test_gradients_are_wanted_of_what_requires_some_where_they_are_on():
    plain, leaf = torch.ones(1), torch.ones(1, requires_grad=True)
    assert _library.wants_grad(None, plain, leaf) is True
    assert _library.wants_grad(None, plain) is False
    assert _library.wants_grad() is False
    with torch.no_grad():
        assert _library.wants_grad(leaf) is False


def test_tangents_are_seen_while_they_are_carried():
    assert _library.has_tangents() is False
    with forward_ad.dual_level():
        assert _library.has_tangents() is True
    assert _library.has_tangents() is False


def test_transforms_of_every_kind_are_seen():
    seen = []
    x = torch.ones(2)
    for transform in (torch.func.grad, torch.vmap):
        transform(lambda x: seen.append(_library.transformed()) or x.sum())(x)
    with forward_ad.dual_level():
        seen.append(_library.transformed())
    assert seen == [True, True, True]
    assert _library.transformed() is False
