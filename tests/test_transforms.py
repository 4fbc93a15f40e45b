"""torch.func: what engines have no rule for is refused by name, and left to stock PyTorch under "auto"."""

import pytest
import torch

import fastops
from fastops.ops import layer_norm_lstm as layer_norm
from fastops.ops import rnn

STEPS, BATCH, HIDDEN = 3, 2, 8


def recurrent(x, impl):
    weights = torch.eye(HIDDEN).repeat(4, 1)
    return rnn.recurrent_layer("LSTM", x, None, None, [(weights, weights, None, None)], impl=impl)[0]


def normalised(x, impl):
    states = [torch.zeros(BATCH, HIDDEN), torch.zeros(BATCH, HIDDEN)]
    norms = [torch.ones(4 * HIDDEN), torch.ones(HIDDEN), torch.zeros(HIDDEN)]
    return layer_norm.layer_norm_lstm(x.repeat(1, 1, 4), torch.eye(HIDDEN).repeat(4, 1), *norms, *states, impl=impl)[0]


def cell(x, impl):
    weights = torch.eye(HIDDEN).repeat(3, 1)
    return fastops.gru_cell(x[0], x[1], weights, weights, impl=impl)


def attention(x, impl):
    return fastops.scaled_dot_product_attention(x, x, x, impl=impl)


CALLS = {
    "recurrent small": (recurrent, "small"),
    "recurrent step": (recurrent, "step"),
    "layer norm small": (normalised, "small"),
    "layer norm step": (normalised, "step"),
    "cell": (cell, "triton"),
    "attention": (attention, "triton"),
}


@pytest.mark.parametrize("name", CALLS)
def test_forward_mode_derivatives_are_refused_by_name(name):
    function, impl = CALLS[name]
    x = torch.randn(STEPS, BATCH, HIDDEN)
    with pytest.raises(fastops.KernelUnavailable, match="forward-mode"):
        torch.func.jvp(lambda x: function(x, impl), (x,), (x,))


@pytest.mark.parametrize("name", [name for name in CALLS if name != "attention"])  # which has a rule
def test_vmap_is_refused_by_name(name):
    function, impl = CALLS[name]
    with pytest.raises(fastops.KernelUnavailable, match="vmap"):
        torch.vmap(lambda x: function(x, impl))(torch.randn(2, STEPS, BATCH, HIDDEN))


def convolution(x, impl):
    return fastops.conv2d_relu_max_pool2d(x[None], torch.ones(2, STEPS, 1, 3), pool_size=(1, 2), impl=impl)


REVERSE = {**CALLS, "convolution": (convolution, "triton")}


@pytest.mark.parametrize("name", REVERSE)
def test_reverse_mode_transforms(name):
    """torch.func.vjp runs the backward when its inputs are out of autograd again, and jacrev does so under vmap."""
    function, impl = REVERSE[name]
    x = torch.randn(STEPS, BATCH, HIDDEN)
    found = []
    for engine in (impl, "torch"):
        output, vjp = torch.func.vjp(lambda x, engine=engine: function(x, engine), x)
        jacobian = torch.func.jacrev(lambda x, engine=engine: function(x, engine).flatten()[:3])(x)
        found.append((output, *vjp(torch.ones_like(output)), jacobian))
    for ours, stock in zip(*found, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["recurrent small", "layer norm small", "convolution"])
def test_a_transform_of_a_transform(name):
    function, impl = REVERSE[name]
    x = torch.randn(STEPS, BATCH, HIDDEN)

    def slope(x, engine):
        output, vjp = torch.func.vjp(lambda x: function(x, engine).square(), x)
        return vjp(torch.ones_like(output))[0].square().sum()

    found, expected = (torch.func.grad(slope)(x, engine) for engine in (impl, "torch"))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_what_stock_pytorch_can_do_is_done_under_auto():
    x = torch.randn(STEPS, BATCH, HIDDEN)
    value, derivative = torch.func.jvp(lambda x: normalised(x, "auto"), (x,), (x,))
    torch.testing.assert_close(value, normalised(x, "small"), rtol=1e-4, atol=1e-5)
    assert derivative.abs().sum() > 0
    batch = torch.randn(2, STEPS, BATCH, HIDDEN)
    torch.testing.assert_close(torch.vmap(lambda x: normalised(x, "auto"))(batch)[1], normalised(batch[1], "auto"))


@pytest.mark.parametrize("impl", ["small", "step"])
def test_recurrent_layers_refuse_to_be_traced_by_name(impl):
    """Sizes are tensors there; under "auto" the module is stock PyTorch."""
    x = torch.randn(STEPS, BATCH, HIDDEN)
    with pytest.raises(fastops.KernelUnavailable, match=r"torch\.jit\.trace"):
        torch.jit.trace(lambda x: recurrent(x, impl), (x,))
    module = fastops.nn.LSTM(HIDDEN, 4)
    traced = torch.jit.trace(module, (x,))
    torch.testing.assert_close(traced(2 * x)[0], module(2 * x)[0])
