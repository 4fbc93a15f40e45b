"""trace=True: a ReLU that forward calls itself, proven to be the only one to see the convolution's output."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastops
from tests.accelerate_models import FunctionalAlexNet


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setenv("FASTOPS_IMPL", "triton")


def rows(model):
    return {row.path: row for row in fastops.explain(model, trace=True)}


def test_functional_and_module_relus():
    model = FunctionalAlexNet()
    found = rows(model)
    assert found["conv1"].becomes == found["conv2"].becomes == "fastops.nn.Conv2dReLU"
    assert found["conv4"].becomes == "fastops.nn.Conv2dReLU"
    assert "stays and changes nothing" in found["conv1"].reason
    assert "FusedReLU" in found["conv2"].reason
    assert "stays and changes nothing" in found["conv4"].reason  # self.shared serves two
    assert "2 operations use its output" in found["conv3"].reason
    assert "the output of forward follows it" in found["conv5"].reason


def test_numbers_training_and_restore():
    model = FunctionalAlexNet()
    stock = copy.deepcopy(model)
    x = torch.randn(2, 3, 8, 8)
    fastops.accelerate(model, trace=True)
    assert type(model.conv1) is fastops.nn.Conv2dReLU
    assert type(model.relu) is fastops.nn.FusedReLU
    assert isinstance(model.relu, nn.ReLU)
    assert "done by the convolution" in repr(model.relu)
    assert type(model.shared) is nn.ReLU
    assert list(model.state_dict()) == list(stock.state_dict())
    torch.testing.assert_close(model(x), stock(x))
    for m in (model, stock):
        m(x).square().sum().backward()
    for a, b in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    fastops.restore(model)
    assert repr(model) == repr(stock)
    assert torch.equal(model(x), stock(x))


def test_without_trace_nothing_of_it():
    report = fastops.explain(FunctionalAlexNet())
    assert report.kept
    assert not report.accelerated
    assert all("trace=True looks into forward" in row.reason for row in report.kept)


def test_twice_is_once():
    model = fastops.accelerate(FunctionalAlexNet(), trace=True)
    before = repr(model)
    fastops.accelerate(model, trace=True)
    assert repr(model) == before
    assert sum(row.done for row in fastops.explain(model, trace=True)) == 3


class Branches(nn.Module):
    """What cannot be proven, each for its own reason."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(1, 1, 1)
        self.relu = nn.ReLU()

    def forward(self, x, tap=False):
        if self.kind == "data":
            if x.sum() > 0:
                return F.relu(self.conv(x))
            return self.conv(x)
        if self.kind == "flag":
            y = self.conv(x)
            return (F.relu(y), y) if tap else F.relu(y)
        if self.kind == "training":
            y = self.conv(x)
            return F.relu(y) if self.training else y
        if self.kind == "twice":
            return self.conv(F.relu(self.conv(x)))
        if self.kind == "kept":
            y = self.conv(x)
            return F.relu(y) + y.detach()
        if self.kind == "leaky":
            return F.leaky_relu(self.conv(x))
        if self.kind == "hooked":
            return self.relu(self.conv(x))
        return x


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("data", "cannot be traced"),
        ("flag", "cannot be traced"),
        ("training", "the output of forward follows it"),
        ("twice", "the output of forward follows it"),
        ("kept", "2 operations use its output"),
        ("leaky", "leaky_relu() follows it"),
        ("hooked", "a hook wants to see"),
        ("unused", "forward does not call it"),
    ],
)
def test_what_cannot_be_proven_stays(kind, reason):
    model = Branches(kind)
    if kind == "hooked":
        model.conv.register_forward_hook(lambda *args: None)
    assert reason in rows(model)["conv"].reason
    assert model.training
    fastops.accelerate(model, trace=True)
    assert type(model.conv) is nn.Conv2d


class Spelled(nn.Module):
    def __init__(self, relu):
        super().__init__()
        self.conv, self.second, self.relu = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1), relu

    def forward(self, x):
        return self.relu(self.second(self.relu(self.conv(x))))


@pytest.mark.parametrize(
    ("relu", "taken"),
    [
        (F.relu, True),
        (torch.relu, True),
        (lambda x: x.relu(), True),
        (nn.ReLU(), True),
        # in place on what the convolution keeps for backward
        (F.relu_, False),
        (torch.relu_, False),
        (lambda x: x.relu_(), False),
        (lambda x: F.relu(x, inplace=True), False),
        (lambda x: F.relu(x, True), False),
        (nn.ReLU(inplace=True), False),  # serves two, so it is not made FusedReLU
    ],
)
def test_every_spelling_of_relu(relu, taken):
    model, x = Spelled(relu), torch.randn(1, 1, 3, 3)
    wanted = [model(x), *torch.autograd.grad(model(x).sum(), list(model.parameters()))]
    report = fastops.explain(model, trace=True)
    assert len(report.accelerated) == (2 if taken else 0)
    assert taken or all("works in place" in row.reason for row in report.kept)
    fastops.accelerate(model, trace=True)
    found = [model(x), *torch.autograd.grad(model(x).sum(), list(model.parameters()))]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_modes_come_back_as_they_were():
    model = FunctionalAlexNet()
    model.eval()
    model.conv1.train()
    fastops.explain(model, trace=True)
    assert not model.training
    assert model.conv1.training
    assert not model.conv2.training


def test_a_train_method_of_the_models_own_is_not_called():
    """It may do more than set the mode: LoRA merges its weights in evaluation."""

    class Merging(FunctionalAlexNet):
        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)

    for mode in (True, False):
        model = Merging().train(mode)
        assert any(row.becomes for row in fastops.explain(model, trace=True))
        assert model.merged is not mode
        assert model.conv1.training is mode


def test_a_sequential_beside_it_is_taken_as_ever():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1))

        def forward(self, x):
            return F.relu(self.stem(x))

    model = Mixed()
    x = torch.randn(1, 1, 3, 3)
    expected = model(x)
    found = rows(model)
    assert found["stem.0"].becomes == "one call: conv2d_relu"
    assert found["stem.2"].becomes == "fastops.nn.Conv2dReLU"
    fastops.accelerate(model, trace=True)
    torch.testing.assert_close(model(x), expected)
    fastops.restore(model)
    assert torch.equal(model(x), expected)
