import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.transformer import CausalLanguageModel, MultiHeadAttention, PositionalEncoding, TransformerClassifier


def small_classifier(**options):
    return TransformerClassifier(30, 3, d_model=32, num_heads=4, num_layers=2, d_feedforward=48, **options)


def small_language_model(**options):
    return CausalLanguageModel(30, d_model=32, num_heads=4, num_layers=2, d_feedforward=48, max_length=16, **options)


def test_textbook_attention_equals_torchs():
    theirs = nn.MultiheadAttention(24, 3, batch_first=True)
    ours = MultiHeadAttention.like(theirs)
    x, y = torch.randn(2, 5, 24), torch.randn(2, 7, 24)
    hidden = torch.arange(7) >= torch.tensor([[7], [4]])
    expected, _ = theirs(x, y, y, key_padding_mask=hidden)
    torch.testing.assert_close(ours(x, y, y, ~hidden[:, None, None]), expected)


def test_textbook_attention_refuses_a_width_its_heads_do_not_divide():
    with pytest.raises(ValueError, match="d_model"):
        MultiHeadAttention(10, 4)


@pytest.mark.parametrize("d_model", [6, 7])
def test_positional_encoding_is_the_papers_formula(d_model):
    table = PositionalEncoding(d_model, 9)(torch.zeros(1, 9, d_model))[0]
    for position in range(9):
        for i in range(d_model):
            angle = position / 10000 ** (2 * (i // 2) / d_model)
            assert table[position, i].item() == pytest.approx(math.cos(angle) if i % 2 else math.sin(angle), abs=1e-5)


def test_positional_encoding_refuses_what_is_too_long():
    with pytest.raises(ValueError, match="max_length 4"):
        PositionalEncoding(8, 4)(torch.zeros(1, 5, 8))


def test_classifier_does_not_see_padding():
    model = small_classifier().eval()
    tokens = torch.randint(1, 30, (3, 9))
    padded = F.pad(tokens, (0, 4))
    torch.testing.assert_close(model(padded), model(tokens))


def test_language_model_sees_no_future():
    model = small_language_model().eval()
    tokens = torch.randint(30, (2, 10))
    changed = tokens.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 30
    torch.testing.assert_close(model(changed)[:, :6], model(tokens)[:, :6])
    assert not torch.allclose(model(changed)[:, 6:], model(tokens)[:, 6:])


def test_language_model_generates_its_own_most_likely_tokens():
    model = small_language_model().eval()
    tokens = model.generate(torch.randint(30, (2, 3)), 4)
    assert tokens.shape == (2, 7)
    assert torch.equal(tokens[:, 3:], model(tokens)[:, 2:-1].argmax(-1))


def test_models_learn():
    """A token repeated a step later, and which of two tokens a row holds, in a few dozen steps."""
    tokens = torch.randint(1, 30, (16, 8)).repeat_interleave(2, 1)
    model = small_language_model(dropout=0.0)
    assert trained_loss(model, tokens, lambda: (model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())) < 0.75
    classifier = small_classifier(dropout=0.0)
    classes = torch.arange(16) % 3
    marked = F.pad(tokens % 20 + 1, (0, 3))
    marked[:, 4] = 25 + classes
    assert trained_loss(classifier, marked, lambda: (classifier(marked), classes)) < 0.3


def trained_loss(model, tokens, outputs):
    """Loss after 40 steps, as a share of the first."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = None
    for _ in range(40):
        loss = F.cross_entropy(*outputs())
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item() / first


class TestBert:
    @pytest.fixture(autouse=True)
    def config(self):
        transformers = pytest.importorskip("transformers")
        return transformers.BertConfig(
            vocab_size=40,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            classifier_dropout=0.3,
        )

    def test_padding_does_not_change_the_logits(self, config):
        from models.bert import BertClassifier

        model = BertClassifier(5, config).eval()
        tokens = torch.randint(1, 40, (2, 7))
        padded = F.pad(tokens, (0, 3))
        torch.testing.assert_close(model(padded, padded.ne(0).long()), model(tokens))
        assert model(tokens).shape == (2, 5)
        assert model.dropout.p == 0.3

    def test_loads_what_was_saved(self, config, tmp_path):
        from models.bert import BertClassifier

        model = BertClassifier(2, config).eval()
        model.bert.save_pretrained(tmp_path)
        loaded = BertClassifier.from_pretrained(tmp_path, 2, attention="eager").eval()
        assert loaded.bert.config._attn_implementation == "eager"
        tokens = torch.randint(1, 40, (2, 7))
        torch.testing.assert_close(loaded.bert(tokens).pooler_output, model.bert(tokens).pooler_output)
        assert BertClassifier.from_pretrained(tmp_path, dtype=torch.bfloat16).classifier.weight.dtype == torch.bfloat16
