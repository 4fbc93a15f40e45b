"""Models inside DistributedDataParallel, FSDP2 and torch.compile: accelerated before and after, and restored."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastops
from tests.accelerate_models import Everything


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def images():
    return torch.randn(2, 1, 6, 6)


@pytest.mark.parametrize("first", ["accelerate", "wrap"])
def test_distributed_data_parallel(group, images, first):
    model = Everything()
    expected = copy.deepcopy(model)(images)
    if first == "accelerate":
        wrapped = DistributedDataParallel(fastops.accelerate(model))
    else:
        wrapped = fastops.accelerate(DistributedDataParallel(model))
    assert type(model.rnn) is fastops.nn.LSTM
    out = wrapped(images)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in model.gru.parameters())
    fastops.restore(wrapped)
    assert type(model.rnn) is nn.LSTM
    assert any(row.path == "module.rnn" for row in fastops.explain(wrapped))


@pytest.mark.parametrize("first", ["accelerate", "shard"])
@pytest.mark.parametrize("part", ["root", "layers"])
def test_fsdp2(group, images, first, part):
    mesh = dist.init_device_mesh("cpu", (1,))
    model = Everything()
    expected = copy.deepcopy(model)(images)

    def shard():
        if part == "layers":
            for layer in model.encoder.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model.rnn, mesh=mesh)
            fully_shard(model.features, mesh=mesh)
        fully_shard(model, mesh=mesh)

    if first == "accelerate":
        fastops.accelerate(model)
        shard()
    else:
        shard()
        fastops.accelerate(model)
    assert isinstance(model, FSDPModule)
    for module, ours in (
        (model.rnn, fastops.nn.LSTM),
        (model.encoder.layers[1], fastops.nn.TransformerEncoderLayer),
        (model.features, fastops.nn.Sequential),
        (model.attention, fastops.nn.MultiheadAttention),
    ):
        assert isinstance(module, ours)
    if part == "layers":
        assert isinstance(model.rnn, FSDPModule)
        assert type(model.rnn).__name__ == "FSDPLSTM"
    assert not fastops.explain(model).kept
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    out = model(images)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    optimizer.step()
    fastops.restore(model)
    assert not any(type(module).__module__.startswith("fastops") for module in model.modules())
    assert isinstance(model, FSDPModule)
    assert isinstance(model.rnn, nn.LSTM)
    assert not isinstance(model.rnn, fastops.nn.LSTM)
    model(images)


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2))
        self.gru = nn.GRU(4, 4)

    def forward(self, images):
        return self.gru(self.features(images).flatten(2))[0]


@pytest.mark.parametrize("make", [Part, pytest.param(Everything, marks=pytest.mark.slow)])
@pytest.mark.parametrize("impl", ["auto", pytest.param("triton", marks=pytest.mark.slow)])
def test_compiled_whole_model(images, make, impl, monkeypatch):
    monkeypatch.setenv("FASTOPS_IMPL", impl)
    model = make()
    expected = model(images)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(images), expected)
    assert fastops.accelerate(compiled) is compiled
    assert type(model.gru) is fastops.nn.GRU
    torch.testing.assert_close(compiled(images), expected)
    fastops.restore(compiled)
    assert type(model.gru) is nn.GRU
    torch.testing.assert_close(compiled(images), expected)
    assert next(iter(compiled.state_dict())).startswith("_orig_mod.")


def test_compiled_in_place(images):
    model = Part()
    expected = model(images)
    torch._dynamo.reset()
    model.compile(backend="eager")
    fastops.accelerate(model)
    assert type(model.gru) is fastops.nn.GRU
    torch.testing.assert_close(model(images), expected)
