"""Recurrent layers with lengths on a CPU: packed where that is faster, with the results of the padded way."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastops
from fastops.ops import rnn_reference
from fastops.ops.rnn_reference import PACKING_PAYS, _packing_pays, reference, stock
from tests.rule import assert_within_rule
from tests.test_rnn import DTYPES, MODES, Layer

ALWAYS, NEVER = dict.fromkeys(PACKING_PAYS, (1.0, 0)), dict.fromkeys(PACKING_PAYS, (0.0, 0))


@pytest.mark.parametrize(
    ("mode", "directions", "batch_first"), [(m, 1 + i % 2, i < 2) for i, m in enumerate(MODES)] + [("LSTM", 2, True)]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("states", [True, False])
def test_packed_rows_within_the_rule(mode, directions, batch_first, dtype, states, monkeypatch):
    layer = Layer(mode, dtype, 6, 3, 4, 5, directions, bias=directions == 1, states=states)
    options = {"lengths": torch.tensor([2, 6, 1]), "batch_first": batch_first}
    truth = layer.run(reference, torch.float64, **options)
    monkeypatch.setattr(rnn_reference, "PACKING_PAYS", NEVER)
    padded = layer.run(stock, **options)
    monkeypatch.setattr(rnn_reference, "PACKING_PAYS", ALWAYS)
    for name, found in layer.run(stock, **options).items():
        if found is not None:
            assert_within_rule(found, padded[name], truth[name], f"{mode} {name}")


def call(mode="LSTM", batch=32, hidden=64, steps=10, real=5, gradients=False):
    gates = rnn_reference.GATES[mode] * hidden
    weights = [(torch.zeros(gates, 2, requires_grad=gradients), torch.zeros(gates, hidden), None, None)]
    return mode, torch.zeros(steps, batch, 2), None, None, weights, torch.full((batch,), real), False


@pytest.mark.parametrize(
    ("arguments", "pays"),
    [
        ({}, True),
        ({"real": 6}, True),
        ({"real": 7}, False),
        ({"batch": 31}, False),
        ({"gradients": True}, False),
        ({"gradients": True, "real": 1}, False),
        ({"mode": "GRU"}, True),
        ({"mode": "GRU", "real": 10, "batch": 1, "hidden": 1}, True),
        ({"mode": "GRU", "gradients": True, "real": 4}, False),
        ({"mode": "GRU", "gradients": True, "real": 3}, True),
        ({"mode": "GRU", "gradients": True, "real": 3, "batch": 31}, False),
        ({"mode": "RNN_TANH"}, True),
        ({"mode": "GRU", "batch": 0}, False),
        ({"mode": "GRU", "steps": 0, "real": 0}, False),
        ({"mode": "GRU", "real": 11}, False),
        ({"mode": "GRU", "real": 1}, True),
    ],
)
def test_where_packing_pays(arguments, pays):
    assert _packing_pays(*call(**arguments)) is pays


def test_without_gradients_what_requires_some_counts_as_inference():
    with torch.no_grad():
        assert _packing_pays(*call(gradients=True))


def test_a_row_without_steps_is_not_packed():
    """torch's packed sequences have none; the others of the batch are as if it were not there."""
    arguments = list(call("GRU"))
    arguments[5] = torch.tensor([0, *arguments[5][1:]])
    assert not _packing_pays(*arguments)
    assert stock(*arguments)[1].shape == (1, 32, 64)


def test_batch_first_is_another_way_round():
    mode, x, *others, lengths, _ = call("GRU", steps=4, real=3, gradients=True, batch=32)
    assert not _packing_pays(mode, x.transpose(0, 1), *others, lengths, True)
    assert _packing_pays(mode, x.new_zeros(32, 9, 2), *others, lengths, True)
    assert not _packing_pays(mode, x.new_zeros(9, 32, 2), *others, lengths, True)


def test_not_under_autocast_whose_dtypes_differ():
    with torch.autocast("cpu", torch.bfloat16):
        assert _packing_pays(*call()) is False
    assert _packing_pays(*call())


def test_not_with_tangents_which_torch_packs_none_of():
    with forward_ad.dual_level():
        assert _packing_pays(*call()) is False


@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
def test_transforms_which_torch_packs_for_none_of(mode, monkeypatch):
    monkeypatch.setattr(rnn_reference, "PACKING_PAYS", ALWAYS)
    module = getattr(fastops.nn, mode)(2, 3, dtype=torch.float64)
    x, lengths = torch.randn(4, 2, 2, dtype=torch.float64), torch.tensor([2, 4])

    def loss(x, parameters):
        return torch.func.functional_call(module, parameters, (x,), {"lengths": lengths})[0].square().sum()

    def beside_inference(x):
        with torch.no_grad():
            kept = module(x.detach(), lengths=lengths)[0].sum()
        return (x * kept).sum()

    parameters = dict(module.named_parameters())
    leaf = x.clone().requires_grad_()
    wanted = torch.autograd.grad(loss(leaf, parameters), [leaf, *parameters.values()])
    detached = {name: value.detach() for name, value in parameters.items()}
    found = torch.func.grad(loss, (0, 1))(x, detached)
    for a, b in zip([found[0], *found[1].values()], wanted, strict=True):
        torch.testing.assert_close(a, b)
    kept = module(x, lengths=lengths)[0].sum().detach()
    torch.testing.assert_close(torch.func.grad(beside_inference)(x), torch.full_like(x, kept.item()))


def test_a_trace_reads_lengths_when_it_runs():
    module = fastops.nn.GRU(3, 5).requires_grad_(False)
    x, lengths = torch.randn(6, 2, 3), (torch.tensor([2, 3]), torch.tensor([6, 1]))
    traced = torch.jit.trace(lambda x, lengths: module(x, lengths=lengths)[0], (x, lengths[0]))
    for each in lengths:
        torch.testing.assert_close(traced(x, each), module(x, lengths=each)[0])


@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN"])
def test_inference_is_what_packing_by_hand_gives(mode, monkeypatch):
    monkeypatch.setattr(rnn_reference, "PACKING_PAYS", ALWAYS)
    theirs = getattr(torch.nn, mode)(3, 5, num_layers=2, bidirectional=True)
    ours = getattr(fastops.nn, mode)(3, 5, num_layers=2, bidirectional=True)
    ours.load_state_dict(theirs.state_dict())
    x, lengths = torch.randn(6, 3, 3), torch.tensor([2, 6, 4])
    with torch.no_grad():
        found = ours(x, lengths=lengths)
        packed = theirs(pack_padded_sequence(x, lengths, enforce_sorted=False))
    torch.testing.assert_close(found[0], pad_packed_sequence(packed[0], total_length=6)[0])
    torch.testing.assert_close(found[1], packed[1])


def test_what_is_in_the_padding_is_not_read(monkeypatch):
    monkeypatch.setattr(rnn_reference, "PACKING_PAYS", ALWAYS)
    module = fastops.nn.GRU(3, 5)
    x, lengths = torch.randn(6, 2, 3), torch.tensor([2, 6])
    x[2:, 0] = float("nan")
    x.requires_grad_()
    output, h_n = module(x, lengths=lengths)
    (output.sum() + h_n.sum()).backward()
    assert all(each.isfinite().all() for each in (output, h_n, x.grad))
    assert not x.grad[2:, 0].any()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize(("mode", "projected"), [("LSTM", 0), ("LSTM", 2), ("GRU", 0)])
def test_derivatives_of_every_kind(mode, projected, monkeypatch):
    monkeypatch.setattr(rnn_reference, "PACKING_PAYS", ALWAYS)
    options = {"proj_size": projected} if projected else {}
    module = getattr(fastops.nn, mode)(2, 3, dtype=torch.float64, **options)
    x, lengths = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True), torch.tensor([2, 4])

    def run(x):
        return module(x, lengths=lengths)[0]

    assert torch.autograd.gradcheck(run, x)
    assert torch.autograd.gradgradcheck(run, x)
    _, tangent = torch.func.jvp(run, (x.detach(),), (torch.ones_like(x),))
    full = torch.autograd.functional.jacobian(run, x.detach()).sum((-3, -2, -1))
    torch.testing.assert_close(tangent, full)
