import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastops
from models.lstm import CELLS, ByteLanguageModel, SequenceClassifier

OURS = {"rnn": fastops.nn.RNN, "gru": fastops.nn.GRU, "lstm": fastops.nn.LSTM}


@pytest.mark.parametrize("cell", CELLS)
def test_language_model_predicts_from_the_past_only(cell):
    model = ByteLanguageModel(cell, embedding=8, hidden=16, layers=2).eval()
    tokens = torch.randint(256, (2, 9))
    logits = model(tokens)
    assert logits.shape == (2, 9, 256)
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 256
    torch.testing.assert_close(model(changed)[:, :5], logits[:, :5])
    assert not torch.allclose(model(changed)[:, 5:], logits[:, 5:])


@pytest.mark.parametrize("cell", CELLS)
def test_carried_state_goes_on_where_the_text_stopped(cell):
    model = ByteLanguageModel(cell, embedding=8, hidden=16).eval()
    tokens = torch.randint(256, (2, 9))
    first, state = model.step(tokens[:, :4])
    second, _ = model.step(tokens[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), model(tokens))
    grown = model.generate(tokens, 3)
    assert torch.equal(grown[:, :9], tokens)
    for k in range(9, 12):
        assert torch.equal(grown[:, k], model(grown[:, :k])[:, -1].argmax(-1))
    torch.manual_seed(1)
    drawn = model.generate(tokens, 3, temperature=1.0)
    torch.manual_seed(1)
    assert torch.equal(model.generate(tokens, 3, temperature=1.0), drawn)


@pytest.mark.parametrize("cell", CELLS)
def test_classifier_does_not_see_padding(cell):
    model = SequenceClassifier(30, 3, cell, embedding=8, hidden=16, layers=2).eval()
    tokens, lengths = torch.randint(30, (3, 7)), torch.tensor([7, 2, 4])
    logits = model(tokens, lengths)
    for b, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(model(tokens[b : b + 1, :length])[0], logits[b])
    torch.testing.assert_close(model(tokens), model(tokens, torch.full((3,), 7)))


def test_unknown_cells_are_named():
    with pytest.raises(ValueError, match="'elman'"):
        ByteLanguageModel("elman")


@pytest.mark.parametrize("cell", CELLS)
def test_it_is_plain_torch_and_runs_on_fastops(cell):
    model = SequenceClassifier(30, 3, cell, embedding=8, hidden=16, layers=2, dropout=0.3)
    assert type(model.net) is CELLS[cell]
    tokens, lengths = torch.randint(30, (3, 7)), torch.tensor([7, 2, 4])

    def step():
        torch.manual_seed(2)
        loss = model(tokens, lengths).square().sum()
        return loss, torch.autograd.grad(loss, list(model.parameters()))

    loss, gradients = step()
    model.net.__class__ = OURS[cell]
    again, found = step()
    assert torch.equal(loss, again)
    assert all(torch.equal(a, b) for a, b in zip(found, gradients, strict=True))


def test_an_lstm_starts_with_open_forget_gates_and_orthogonal_recurrence():
    net = ByteLanguageModel("lstm", embedding=4, hidden=8).net
    assert torch.equal((net.bias_ih_l0 + net.bias_hh_l0)[8:16], torch.ones(8))
    for gate in net.weight_hh_l0.split(8):
        torch.testing.assert_close(gate @ gate.T, torch.eye(8), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_it_learns_a_pattern(cell):
    torch.manual_seed(0)
    text = torch.tensor(list(b"aabb" * 16)).unsqueeze(0)
    model = ByteLanguageModel(cell, embedding=8, hidden=32)
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    for _ in range(200):
        loss = F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert loss < 0.1  # knowing the last byte alone gives log(2)
    assert bytes(model.generate(text[:, :12], 6)[0, 12:].tolist()) == b"aabbaa"
