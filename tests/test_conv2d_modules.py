"""Convolution modules, and convolutions on a GPU."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastops
from tests.rule import assert_within_rule
from tests.test_conv2d_behaviour import ENGINES, POOL, ours, stock


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("impl", ["auto", *ENGINES])
def test_modules_are_conv2d_with_more(mode, impl):
    arguments = (3, 4, 3, (1, 2), 1, 1, 1, True, mode)
    plain = nn.Conv2d(*arguments)
    fast = fastops.nn.Conv2dReLU(*arguments, impl=impl)
    pooled = fastops.nn.Conv2dReLUMaxPool2d(*arguments, **POOL, impl=impl)
    x = torch.randn(1, 3, 5, 9)
    for module, pool in ((fast, None), (pooled, POOL)):
        module.load_state_dict(plain.state_dict())
        expected = F.relu(plain(x))
        expected = F.max_pool2d(expected, *pool.values()) if pool else expected
        found = module(x)
        torch.testing.assert_close(found, expected)
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        for twin in (
            copy.deepcopy(module),
            pickle.loads(pickle.dumps(module)),
            torch.load(buffer, weights_only=False),
        ):
            assert torch.equal(twin(x), found)
            assert repr(twin) == repr(module)
        assert ("impl=" in repr(module)) == (impl != "auto")
    assert "pool_size=3" in repr(pooled)


def test_a_conv2d_becomes_fused_by_its_class():
    plain = nn.Conv2d(3, 4, 3)
    x = torch.randn(1, 3, 6, 6)
    expected = plain(x).relu()
    plain.__class__ = fastops.nn.Conv2dReLU
    assert torch.equal(plain(x), expected)
    assert repr(plain) == "Conv2dReLU(3, 4, kernel_size=(3, 3), stride=(1, 1))"


def test_modules_refuse_an_unknown_engine_when_made():
    with pytest.raises(ValueError, match="impl must be one of"):
        fastops.nn.Conv2dReLU(3, 4, 3, impl="cudnn")
    with pytest.raises(ValueError, match="impl must be one of"):
        fastops.nn.Conv2dReLUMaxPool2d(3, 4, 3, **POOL, impl="cudnn")


def test_a_slice_of_a_sequential_keeps_its_engine():
    layers = fastops.nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), impl="hybrid")
    layers.apart = ("0",)
    for part in (layers[:2], layers[-4:3]):
        assert type(part) is fastops.nn.Sequential
        assert (part.impl, part.apart) == ("hybrid", ("0",))
    assert layers[:2][0] is layers[0]
    assert "impl" not in vars(fastops.nn.Sequential(nn.ReLU())[:1])


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ENGINES)
def test_bias_with_gaps_on_a_gpu(impl, device):
    x, w = torch.randn(2, 64, 9, 8, device=device), torch.randn(64, 64, 3, 3, device=device) / 24
    for layout in (torch.contiguous_format, torch.channels_last):
        x = x.half().to(memory_format=layout)
        for bias in (torch.randn(128, device=device).half()[::2], torch.randn(1, device=device).half().expand(64)):
            for pool in (None, POOL):
                found = ours(x, w.half(), bias, impl, pool)
                torch.testing.assert_close(found, stock(x, w.half(), bias, pool), rtol=2e-3, atol=4e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_auto_on_a_gpu_is_never_wrong(dtype, device):
    for shape in ((64, 3, 224, 224), (2, 3, 32, 32), (0, 3, 32, 32)):
        x = torch.randn(shape, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        w = torch.randn(64, 3, 11, 11, device=device, dtype=dtype) / 19
        b = torch.randn(64, device=device, dtype=dtype)
        for pool in (None, POOL):
            found = ours(x, w, b, "auto", pool, stride=4, padding=2)
            expected = stock(x, w, b, pool, stride=4, padding=2)
            assert_within_rule(found, expected, stock(x.double(), w.double(), b.double(), pool, stride=4, padding=2))
    for bad in (x[:, :2], x.int(), x.cpu()):
        with pytest.raises(RuntimeError):
            fastops.conv2d_relu(bad, w, b)


@pytest.mark.gpu
def test_compiled_and_autocast_on_a_gpu(device):
    layers = nn.Sequential(
        fastops.nn.Conv2dReLUMaxPool2d(3, 64, 11, 4, 2, **POOL, impl="hybrid"),
        fastops.nn.Conv2dReLU(64, 64, 3, padding=1, impl="triton"),
    ).to(device, memory_format=torch.channels_last)
    x = torch.randn(32, 3, 224, 224, device=device).to(memory_format=torch.channels_last)
    compiled = torch.compile(layers, fullgraph=True)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        expected, found = layers(x), compiled(x)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    expected.float().sum().backward()
    by_eager = [p.grad.clone() for p in layers.parameters()]
    layers.zero_grad()
    found.float().sum().backward()
    for p, theirs in zip(layers.parameters(), by_eager, strict=True):
        torch.testing.assert_close(p.grad, theirs, rtol=2e-2, atol=2e-2 * float(theirs.abs().max()))
