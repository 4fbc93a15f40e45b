"""What every op shares, without a kernel: gradients by reference, kinds of failure, transforms, waiting for imports."""

import importlib
import subprocess
import sys

import pytest
import torch

from fastops import _library


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
    if not given[0] and needs == (False, True) and leaves:
        return  # nothing depends on y then: autograd has no graph to go through
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
