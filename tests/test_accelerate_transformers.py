"""Models of transformers: attention switched by name, padding right, and switched back."""

import copy
import pickle
import sys

import pytest
import torch
from torch import nn

import fastops

transformers = pytest.importorskip("transformers", minversion="5.17")

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def bert(**options):
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=32, **TINY, **options)
    return transformers.BertModel(config).eval()


def llama():
    config = transformers.LlamaConfig(vocab_size=50, num_key_value_heads=1, max_position_embeddings=32, **TINY)
    return transformers.LlamaForCausalLM(config).eval()


def gpt2():
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    return transformers.GPT2LMHeadModel(config).eval()


def batch():
    tokens = torch.randint(1, 50, (3, 9))
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0
    mask[2, 2:] = 0
    return {"input_ids": tokens, "attention_mask": mask}


@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize("make", [bert, llama, gpt2], ids=["bert", "llama", "gpt2"])
def test_same_outputs_at_real_tokens(make, impl, monkeypatch):
    monkeypatch.setenv("FASTOPS_IMPL", impl)
    model, inputs = make(), batch()
    real = inputs["attention_mask"].bool()
    expected = model(**inputs)[0]
    assert fastops.accelerate(model) is model
    assert model.config._attn_implementation == "fastops"
    torch.testing.assert_close(model(**inputs)[0][real], expected[real], atol=2e-5, rtol=1e-4)
    fastops.restore(model)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(**inputs)[0], expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_old_implementation_comes_back(implementation):
    model = bert()
    model.set_attn_implementation(implementation)
    with fastops.accelerated(model):
        assert model.config._attn_implementation == "fastops"
    assert model.config._attn_implementation == implementation


def test_an_implementation_chosen_since_stays():
    model = fastops.accelerate(bert())
    model.set_attn_implementation("eager")
    assert fastops.restore(model).config._attn_implementation == "eager"
    assert fastops.restore(fastops.accelerate(model)).config._attn_implementation == "eager"


def test_inside_another_model_and_in_copies():
    model = nn.ModuleDict({"encoder": bert(), "head": nn.GRU(16, 4)})
    (encoder, head) = fastops.explain(model)
    assert (encoder.path, encoder.op) == ("encoder", "attention")
    assert encoder.becomes == 'attn_implementation="fastops"'
    assert head.path == "head"
    fastops.accelerate(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        fastops.restore(copied)
        assert copied["encoder"].config._attn_implementation == "sdpa"
    assert model["encoder"].config._attn_implementation == "fastops"
    assert all(row.done for row in fastops.explain(model))


def test_one_row_for_a_model_in_a_model():
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=32, **TINY)
    (row,) = fastops.explain(transformers.BertForSequenceClassification(config))
    assert row.path == ""
    assert "BertForSequenceClassification" in row.kind


def test_what_the_user_chose_stays():
    model = bert()
    model.config._attn_implementation = "flex_attention"
    (row,) = fastops.explain(model)
    assert row.becomes is None
    assert "'flex_attention'" in row.reason
    model = bert(attn_implementation="eager", output_attentions=True)
    (row,) = fastops.explain(model)
    assert "output_attentions" in row.reason
    fastops.accelerate(model)
    assert model.config._attn_implementation == "eager"


def test_an_attention_of_the_models_own_stays():
    config = transformers.BloomConfig(vocab_size=50, hidden_size=16, n_layer=2, n_head=2)
    model = transformers.BloomModel(config).eval()
    (row,) = (row for row in fastops.explain(model) if row.op == "attention")
    assert row.becomes is None
    assert row.reason == "its attention does not go through transformers' AttentionInterface"
    fastops.accelerate(model)
    assert model.config._attn_implementation == "eager"


def test_what_the_user_chose_for_a_model_inside_stays():
    vision = transformers.SiglipVisionConfig(image_size=32, patch_size=16, **TINY)
    text = transformers.SiglipTextConfig(
        vocab_size=50, max_position_embeddings=32, bos_token_id=1, eos_token_id=2, **TINY
    )
    model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
    model.config.vision_config._attn_implementation = "flex_attention"
    row = next(row for row in fastops.explain(model) if row.op == "attention" and row.path == "")
    assert row.becomes is None
    assert row.reason == "the attention of its SiglipVisionConfig was chosen to be 'flex_attention'"
    fastops.accelerate(model)
    assert model.config.vision_config._attn_implementation == "flex_attention"
    assert model.config.text_config._attn_implementation == "sdpa"


def test_only_and_filter_are_asked():
    model = nn.ModuleDict({"a": bert(), "b": bert()})
    assert not fastops.explain(model, only="rnn").rows
    fastops.accelerate(model, filter_fn=lambda module, path: path == "b")
    assert [model[name].config._attn_implementation for name in "ab"] == ["sdpa", "fastops"]


def test_saved_weights_do_not_carry_the_name(tmp_path):
    model = fastops.accelerate(bert())
    model.save_pretrained(tmp_path)
    assert transformers.BertModel.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_a_transformers_that_is_too_old_leaves_the_model_as_it_is(monkeypatch):
    model = bert()
    before = model.config._attn_implementation
    monkeypatch.delitem(sys.modules, "fastops.integrations.transformers", raising=False)
    monkeypatch.setitem(sys.modules, "transformers.masking_utils", None)
    (row,) = (row for row in fastops.explain(model) if row.path == "")
    assert row.becomes is None
    assert "needs transformers >= 5.17" in row.reason
    fastops.accelerate(model)
    assert model.config._attn_implementation == before
