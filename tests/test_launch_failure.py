"""A kernel that Triton cannot compile or launch: "auto" goes on with stock PyTorch and says so once, a name raises."""

import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

import fastops
from fastops import _env, _library, tuning
from fastops.ops import attention, conv2d_relu, layer_norm_lstm, rnn, rnn_cell
from tests.conftest import KERNELS

triton_errors = pytest.importorskip("triton.runtime.errors")
pytestmark = pytest.mark.skipif(not KERNELS, reason="makes kernels fail, which takes kernels")


@dataclass(frozen=True)
class Family:
    """An op with its kernels taken under "auto" although the tensors are on the CPU."""

    name: str  # in _library.BROKEN
    forward: str  # registered op
    backward: str
    call: Callable  # of differentiable tensors and impl=
    shapes: tuple
    take_kernels: Callable  # of monkeypatch


def first(result):
    return result if isinstance(result, torch.Tensor) else first(result[0])


def weights_of(mode, *flat):
    return rnn.recurrent_layer(mode, flat[0], None, None, [(flat[1], flat[2], None, None)], impl=flat[3])[0]


def by_row(module):
    def take(monkeypatch):
        monkeypatch.setattr(module, "_plain_cuda", lambda *tensors: True)
        monkeypatch.setattr(_env, "nothing_to_choose", lambda impl, input: False)
        monkeypatch.setattr(tuning, "choose", lambda *_: tuning.Row("triton", "", "", ()))

    return take


FAMILIES = {
    "conv2d_relu": Family(
        "conv2d_relu",
        "conv2d_relu_forward",
        "bias_relu_backward",
        lambda x, w, b, impl: fastops.conv2d_relu(x, w, b, padding=1, impl=impl),
        ((1, 2, 5, 5), (3, 2, 3, 3), (3,)),
        by_row(conv2d_relu),
    ),
    "conv2d_relu_max_pool2d": Family(
        "conv2d_relu",
        "bias_relu_pool_forward",
        "bias_relu_pool_backward",
        lambda x, w, b, impl: fastops.conv2d_relu_max_pool2d(x, w, b, pool_size=2, impl=impl),
        ((1, 2, 6, 6), (3, 2, 3, 3), (3,)),
        by_row(conv2d_relu),
    ),
    "attention": Family(
        "attention",
        "attention_forward",
        "attention_backward",
        lambda q, k, v, impl: fastops.scaled_dot_product_attention(
            q, k, v, key_lengths=torch.tensor([3, 4]), softcap=5.0, impl=impl
        ),
        ((2, 1, 4, 8),) * 3,
        lambda monkeypatch: monkeypatch.setattr(attention, "_engine", lambda impl, *_, **__: asked(impl, "triton")),
    ),
    "varlen_attention": Family(
        "attention",
        "attention_forward",
        "attention_backward",
        lambda q, k, v, impl: fastops.varlen_attention(
            q, k, v, torch.tensor([0, 2, 5]), torch.tensor([0, 2, 5]), 3, 3, impl=impl
        ),
        ((5, 1, 8),) * 3,
        lambda monkeypatch: monkeypatch.setattr(attention, "_engine", lambda impl, *_, **__: asked(impl, "triton")),
    ),
    "rnn": Family(
        "rnn",
        "rnn_forward",
        "rnn_backward",
        lambda x, w_ih, w_hh, impl: weights_of("GRU", x, w_ih, w_hh, impl),
        ((2, 2, 3), (12, 3), (12, 4)),
        lambda monkeypatch: monkeypatch.setattr(rnn, "_from_table", lambda *_: "small"),
    ),
    **{
        name: Family(
            "rnn_cell",
            f"{name.replace('rnn_tanh', 'rnn')}_forward",
            f"{name.replace('rnn_tanh', 'rnn')}_backward",
            lambda x, h, w_ih, w_hh, impl, name=name: first(
                getattr(fastops, name)(x, (h, h) if name == "lstm_cell" else h, w_ih, w_hh, impl=impl)
            ),
            ((2, 3), (2, 4), (gates * 4, 3), (gates * 4, 4)),
            lambda monkeypatch: monkeypatch.setattr(rnn_cell, "choose", lambda impl, _: asked(impl, "triton")),
        )
        for name, gates in (("lstm_cell", 4), ("gru_cell", 3), ("rnn_tanh_cell", 1))
    },
    "layer_norm_lstm": Family(
        "layer_norm_lstm",
        "layer_norm_lstm_forward",
        "layer_norm_lstm_backward",
        lambda gates, w_hh, state, impl: layer_norm_lstm.layer_norm_lstm(
            gates, w_hh, torch.ones(16), torch.ones(4), torch.zeros(4), state, 2 * state, impl=impl
        )[0],
        ((2, 2, 16), (16, 4), (2, 4)),
        lambda monkeypatch: monkeypatch.setattr(
            layer_norm_lstm, "choose", lambda gates, hidden, impl: asked(impl, "small")
        ),
    ),
}


def asked(impl, engine):
    return engine if impl in ("auto", "triton") else impl


def no_room(*_):
    raise triton_errors.OutOfResources(999_999, 232_448, "shared memory")


@pytest.fixture(autouse=True)
def whole(monkeypatch):
    monkeypatch.setattr(_library, "BROKEN", {})
    monkeypatch.setattr(_library, "LAUNCHERS", dict(_library.LAUNCHERS))


def plant(monkeypatch, op, launcher=no_room):
    """Let the launcher of a registered op fail; returns the list that grows with each try."""
    tries = []

    def launch(*arguments):
        tries.append(op)
        return launcher(*arguments)

    monkeypatch.setitem(_library.LAUNCHERS, op, lambda: launch)
    return tries


def run(family, tensors, impl):
    out = family.call(*tensors, impl=impl)
    return out, *torch.autograd.grad(out.square().sum(), tensors)


def tensors_of(family):
    torch.manual_seed(0)
    return [torch.randn(shape, requires_grad=True) for shape in family.shapes]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", FAMILIES)
def test_auto_goes_on_with_stock_and_warns_once(name, direction, monkeypatch):
    family = FAMILIES[name]
    tensors = tensors_of(family)
    expected = run(family, tensors, "torch")
    family.take_kernels(monkeypatch)
    tries = plant(monkeypatch, getattr(family, direction))
    with pytest.warns(RuntimeWarning) as heard:
        found = run(family, tensors, "auto")
    heard = [w for w in heard if w.category is RuntimeWarning]  # not those of Triton 3.6's interpreter
    assert len(heard) == 1, [str(w.message) for w in heard]
    said = str(heard[0].message)
    assert said.startswith(f"{family.name}: stock PyTorch runs from now on")
    assert f"fastops::{getattr(family, direction)}" in said
    assert "OutOfResources" in said
    assert "shared memory" in said
    assert heard[0].filename == __file__, "a warning names the line of the user"
    users = (family.call, weights_of) if direction == "forward" else (run,)
    assert heard[0].lineno in {line for user in users for *_, line in user.__code__.co_lines()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        again = run(family, tensors, "auto")
    assert len(tries) == 1
    for ours, later, stock in zip(found, again, expected, strict=True):
        torch.testing.assert_close(ours, stock)
        torch.testing.assert_close(later, stock)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_named_engine_raises_with_the_reason_each_time(name, direction, monkeypatch):
    family = FAMILIES[name]
    tries = plant(monkeypatch, getattr(family, direction))
    for _ in range(2):
        with pytest.raises(fastops.KernelUnavailable, match=r"OutOfResources.*shared memory"):
            run(family, tensors_of(family), "triton")
    assert len(tries) == 2
    assert not _library.BROKEN


def test_what_is_no_failure_of_triton_is_raised_as_it_is(monkeypatch):
    family = FAMILIES["attention"]
    family.take_kernels(monkeypatch)
    for error in (torch.OutOfMemoryError("CUDA out of memory"), ValueError("a length of an earlier call"), OSError()):

        def launch(*_, error=error):
            raise error

        plant(monkeypatch, family.forward, launch)
        with pytest.raises(type(error)):
            run(family, tensors_of(family), "auto")
    assert not _library.BROKEN


def test_an_error_inside_triton_counts_whatever_its_type(monkeypatch):
    from triton.runtime import interpreter

    def refuse(*_, **__):
        raise RuntimeError("Triton Error [CUDA]: no kernel image is available")

    family = FAMILIES["conv2d_relu"]
    family.take_kernels(monkeypatch)
    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", refuse)
    with pytest.warns(RuntimeWarning, match="no kernel image"):
        run(family, tensors_of(family), "auto")


def test_two_threads_that_fail_at_once_warn_once(monkeypatch):
    family = FAMILIES["conv2d_relu"]
    family.take_kernels(monkeypatch)
    monkeypatch.setattr(_library, "interpreting", lambda: False)  # no lock around the launcher, as on a GPU
    both = threading.Barrier(2)

    def launch(*_):
        both.wait(10)
        no_room()

    plant(monkeypatch, family.forward, launch)

    def both_run():
        threads = [threading.Thread(target=run, args=(family, tensors_of(family), "auto")) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    with pytest.warns(RuntimeWarning) as heard:
        both_run()
    assert len(heard) == 1


class ElsewhereLengths:
    """Lengths on a GPU, as far as a look at them asks."""

    device = torch.device("cuda", 0)

    def numel(self):
        return 2


def test_stock_pytorch_goes_on_where_not_even_lengths_can_be_looked_at(monkeypatch):
    """It runs a small kernel of ours beside stock PyTorch's; where that fails, wrong lengths are only clamped."""
    from fastops.ops import rnn_lengths

    looked = []

    def clamp(lengths, steps):
        looked.append(steps)
        raise _library.LaunchFailed("fastops::clamp_lengths: no compiler")

    monkeypatch.setattr(_library, "BROKEN", {})
    monkeypatch.setattr(_env, "why_no_triton", lambda device: None)
    monkeypatch.setattr(rnn_lengths, "_clamp", clamp)
    monkeypatch.setenv("FASTOPS_IMPL", "torch")
    rnn_lengths.note_lengths(ElsewhereLengths(), 5)
    assert not looked, "FASTOPS_IMPL=torch keeps Triton out"
    monkeypatch.delenv("FASTOPS_IMPL")
    with pytest.warns(RuntimeWarning, match="clamp_lengths: stock PyTorch runs from now on"):
        rnn_lengths.note_lengths(ElsewhereLengths(), 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rnn_lengths.note_lengths(ElsewhereLengths(), 6)
    assert looked == [5]
    monkeypatch.setattr(_library, "BROKEN", {"rnn": "it fell over"})
    rnn_lengths.note_lengths(ElsewhereLengths(), 7)
    assert looked == [5], "what just failed is not tried in another kernel"


def test_a_look_at_lengths_is_an_op_like_any_other():
    from fastops.ops import rnn_lengths

    given = torch.tensor([3, -1, 9, 0])
    assert rnn_lengths._clamp(given, 5).tolist() == [3, 0, 5, 0]
    with pytest.raises(ValueError, match=r"lengths\[2\] of an earlier fastops recurrent layer"):
        rnn_lengths._clamp(given, 5)
    torch.library.opcheck(rnn_lengths._clamp, (torch.tensor([1, 2]), 5))
