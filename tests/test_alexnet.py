import copy

import pytest
import torch
from torch import nn

import fastops
from models.alexnet import AlexNet


def small(model):
    """A few filters in place of hundreds, for the interpreter: the same graph."""
    torch.manual_seed(0)
    for layer in model.features:
        if isinstance(layer, nn.Conv2d):
            layer.in_channels = max(3, layer.in_channels // 32)
            layer.out_channels = max(3, layer.out_channels // 32)
            layer.weight = nn.Parameter(
                torch.randn(layer.out_channels, layer.in_channels, *layer.kernel_size) / layer.kernel_size[0] ** 2
            )
            layer.bias = nn.Parameter(torch.randn(layer.out_channels))
    return model


def test_the_network_is_the_one_described():
    model = AlexNet().eval()

    def described(layer):
        if isinstance(layer, nn.Conv2d):
            assert (layer.dilation, layer.groups, layer.padding_mode) == ((1, 1), 1, "zeros")
            assert layer.bias is not None
            height, width = zip(layer.kernel_size, layer.stride, layer.padding, strict=True)
            assert height == width
            return "conv", layer.in_channels, layer.out_channels, *height
        if isinstance(layer, nn.MaxPool2d):
            assert (layer.padding, layer.dilation, layer.ceil_mode) == (0, 1, False)
            return "pool", layer.kernel_size, layer.stride
        if isinstance(layer, nn.Linear):
            assert layer.bias is not None
            return "linear", layer.in_features, layer.out_features
        return (type(layer).__name__,)

    relu, pool = ("ReLU",), ("pool", 3, 2)
    assert [described(layer) for layer in model.features] == [
        *(("conv", 3, 64, 11, 4, 2), relu, pool),
        *(("conv", 64, 192, 5, 1, 2), relu, pool),
        *(("conv", 192, 384, 3, 1, 1), relu),
        *(("conv", 384, 256, 3, 1, 1), relu),
        *(("conv", 256, 256, 3, 1, 1), relu, pool),
        *(("conv", 256, 384, 3, 1, 1), relu),
        *(("conv", 384, 256, 3, 1, 1), relu),
        *(("conv", 256, 256, 3, 1, 1), relu, pool),
    ]
    assert model.avgpool.output_size == (1, 1)
    assert [described(layer) for layer in model.classifier] == [
        *(("Dropout",), ("linear", 256, 4096), relu),
        *(("linear", 4096, 4096), relu, ("linear", 4096, 1000)),
    ]
    sizes = []
    for layer in model.features:
        if isinstance(layer, nn.MaxPool2d):
            layer.register_forward_hook(lambda module, inputs, output: sizes.append((*inputs[0].shape[2:],)))
    with torch.no_grad():
        assert model(torch.randn(1, 3, 224, 224)).shape == (1, 1000)
    assert sizes == [(55, 55), (27, 27), (13, 13), (6, 6)]


def test_accelerate_takes_every_convolution_with_its_relu_and_pool():
    model = AlexNet(num_classes=7).eval()
    state, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
    images = torch.randn(1, 3, 127, 127)
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(fastops.accelerate(model)(images), expected)
    assert list(model.state_dict()) == state
    assert [id(p) for p in model.parameters()] == parameters
    with_pool, alone = "Conv2d + ReLU + MaxPool2d", "Conv2d + ReLU"
    kinds = [row.kind for row in fastops.explain(model)]
    assert kinds == [with_pool, with_pool, alone, alone, with_pool, alone, alone, with_pool]


# the hybrid's convolution is stock PyTorch's, its one kernel runs in "triton" too
@pytest.mark.parametrize("impl", ["triton", pytest.param("hybrid", marks=pytest.mark.slow)])
def test_features_train_alike_on_every_engine(impl):
    model = small(AlexNet())
    fast = fastops.accelerate(copy.deepcopy(model))
    fast.features.impl = impl
    images = torch.randn(1, 3, 127, 127)
    expected = model.features(images)
    found = fast.features(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    grad = torch.randn_like(expected)
    for mine, theirs in zip(
        torch.autograd.grad(found, list(fast.features.parameters()), grad),
        torch.autograd.grad(expected, list(model.features.parameters()), grad),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
