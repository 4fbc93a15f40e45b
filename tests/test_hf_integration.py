"""attn_implementation="fastops" against "eager" on small random models of transformers."""

import copy
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

transformers = pytest.importorskip("transformers")

from transformers import masking_utils  # noqa: E402

from fastops.integrations import transformers as integration  # noqa: E402

SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
GQA = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MODELS = {
    "bert": ("BertModel", "BertConfig", {**SMALL, **NO_DROPOUT}),
    "bert decoder": ("BertLMHeadModel", "BertConfig", {**SMALL, **NO_DROPOUT, "is_decoder": True}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GQA),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**GQA, "sliding_window": 4}),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**GQA, "sliding_window": 5, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    ),
    "modernbert": (
        "ModernBertModel",
        "ModernBertConfig",
        {**SMALL, "num_hidden_layers": 3, "local_attention": 6, "pad_token_id": 0, "bos_token_id": 1}
        | {"eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
    ),
}
# attention sinks
MODELS["gpt oss"] = (
    "GptOssForCausalLM",
    "GptOssConfig",
    {**GQA, "sliding_window": 4, "num_local_experts": 2, "num_experts_per_tok": 1, "pad_token_id": 0},
)
CAUSAL = ("llama", "mistral", "gemma2", "gpt oss")
LENGTH = 19


def pair(name, training=False, **changes):
    """The same random model with "eager" and with "fastops" attention."""
    model, config, options = MODELS[name]
    config = getattr(transformers, config)(**{**options, **changes}, attn_implementation="eager")
    eager = getattr(transformers, model)(config).train(training)
    ours = copy.deepcopy(eager)
    ours.set_attn_implementation("fastops")
    assert ours.config._attn_implementation == "fastops"
    return eager, ours


def tokens_and_mask(side, length=LENGTH):
    tokens = torch.randint(1, 40, (3, length))
    if side is None:
        return tokens, None
    lengths = torch.tensor([[length], [length // 2], [3]])
    position = torch.arange(length)
    return tokens, ((position < lengths) if side == "right" else (position >= length - lengths)).long()


def hidden(model, tokens, mask, **call):
    out = model(tokens, attention_mask=mask, **call)
    out = out.logits if "logits" in out else out.last_hidden_state
    alive = mask if mask is not None and mask.dim() == 2 else torch.ones_like(tokens)
    return out * alive[..., None]


def assert_same(eager, ours, tokens, mask, gradients=True, **call):
    results = []
    for model in (eager, ours):
        out = hidden(model, tokens, mask, **call)
        torch.manual_seed(1)
        parameters = [p for p in model.parameters() if p.requires_grad] if gradients else []
        loss = (out * torch.randn_like(out)).sum()
        found = torch.autograd.grad(loss, parameters, allow_unused=True) if gradients else ()
        results.append((out, found))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=2e-5, atol=2e-5)
    largest = max((g.abs().max() for g in results[0][1] if g is not None), default=1.0)
    for ours_gradient, expected in zip(results[1][1], results[0][1], strict=True):
        assert (ours_gradient is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(ours_gradient, expected, rtol=1e-4, atol=1e-6 * float(largest))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("side", [None, "right", "left"])
@pytest.mark.parametrize("training", [False, True])
def test_logits_and_gradients(name, side, training):
    assert_same(*pair(name, training), *tokens_and_mask(side))


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_masks_of_four_dimensions(name):
    """A user's own mask goes past the mask function: True attends, or added."""
    models = pair(name)
    tokens, padding = tokens_and_mask("right")
    visible = padding.bool()[:, None, None] & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    visible = visible | torch.eye(LENGTH, dtype=torch.bool)  # eager averages where nothing is seen
    added = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    assert_same(*models, tokens, added)
    torch.testing.assert_close(hidden(models[1], tokens, visible), hidden(models[0], tokens, added))


@pytest.mark.parametrize("name", CAUSAL)
def test_packed_positions(name):
    """Sequences packed in one row, told by positions that start anew, do not see each other."""
    eager, ours = pair(name)
    tokens, _ = tokens_and_mask(None)
    positions = torch.cat([torch.arange(7), torch.arange(LENGTH - 7)]).expand(3, -1)
    assert_same(eager, ours, tokens, None, position_ids=positions, use_cache=False)
    alone = ours(tokens[:, :7]).logits
    torch.testing.assert_close(ours(tokens, position_ids=positions, use_cache=False).logits[:, :7], alone)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("side", ["left", None])
def test_generate(name, cache, side):
    tokens, mask = tokens_and_mask(side, 9)
    mask = torch.ones_like(tokens) if mask is None else mask
    results = [
        model.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=12,
            do_sample=False,
            cache_implementation=cache,
            disable_compile=True,
            pad_token_id=0,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
        for model in pair(name)
    ]
    assert torch.equal(results[1].sequences, results[0].sequences)
    torch.testing.assert_close(torch.stack(results[1].logits), torch.stack(results[0].logits), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", CAUSAL)
def test_generate_with_beams(name):
    tokens, mask = tokens_and_mask("left", 6)
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    eager, ours = (model.generate(tokens, attention_mask=mask, **options) for model in pair(name))
    assert torch.equal(ours, eager)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("with_mask", [False, True])
def test_several_tokens_after_a_cache(name, with_mask):
    """Causality is aligned at the end: query i of q sees i + 1 + cached keys."""
    eager, ours = pair(name)
    tokens, mask = tokens_and_mask("left")
    mask = mask if with_mask else None
    alive = torch.ones(3, 8, dtype=torch.bool) if mask is None else mask[:, 11:].bool()
    with torch.no_grad():
        expected = hidden(eager, tokens, mask)[:, 11:]
        first = ours(tokens[:, :11], attention_mask=None if mask is None else mask[:, :11], use_cache=True)
        positions = {} if mask is None else {"position_ids": torch.arange(11, LENGTH).expand(3, -1)}
        out = ours(tokens[:, 11:], attention_mask=mask, past_key_values=first.past_key_values, **positions)
    torch.testing.assert_close(out.logits[alive], expected[alive], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["T5", "Bart"])
def test_encoder_decoder(kind):
    """Cross-attention with padding at both sides and a learned position bias (T5); equal lengths, too."""
    if kind == "T5":
        config = transformers.T5Config(
            vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0
        )
        config.decoder_start_token_id = 0
        eager = transformers.T5ForConditionalGeneration(config).eval()
    else:
        sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 2) | dict.fromkeys(
            ("encoder_ffn_dim", "decoder_ffn_dim"), 48
        )
        heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
        config = transformers.BartConfig(vocab_size=40, d_model=32, dropout=0.0, **sizes, **heads)
        eager = transformers.BartForConditionalGeneration(config).eval()
    ours = copy.deepcopy(eager)
    eager.set_attn_implementation("eager")
    ours.set_attn_implementation("fastops")
    for target in (5, LENGTH):
        tokens, mask = tokens_and_mask("right")
        labels = torch.randint(1, 40, (3, target))
        outs = [model(tokens, attention_mask=mask, decoder_input_ids=labels).logits for model in (eager, ours)]
        torch.testing.assert_close(outs[1], outs[0], rtol=2e-5, atol=2e-5)


def test_padding_that_holds_nan_does_not_spread():
    _, ours = pair("bert")
    tokens, mask = tokens_and_mask("right")
    expected = hidden(ours, tokens, mask)
    embedded = ours.embeddings(tokens).detach()
    poisoned = embedded.masked_fill(mask[..., None] == 0, float("nan"))
    out = ours.encoder(poisoned, attention_mask=mask.bool()).last_hidden_state
    torch.testing.assert_close(out[mask.bool()], expected[mask.bool()])


def test_a_sequence_of_padding_alone():
    _, ours = pair("bert", training=True)
    tokens, mask = tokens_and_mask("right")
    mask[1] = 0
    hidden(ours, tokens, mask).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters() if p.grad is not None)


def test_dropout_of_the_weights():
    _, ours = pair("bert", training=True, attention_probs_dropout_prob=0.5)
    tokens, mask = tokens_and_mask("right")
    assert not torch.equal(hidden(ours, tokens, mask), hidden(ours, tokens, mask))
    ours.eval()
    torch.testing.assert_close(hidden(ours, tokens, mask), hidden(ours, tokens, mask))


def test_gradient_checkpointing():
    eager, ours = pair("llama", training=True)
    ours.gradient_checkpointing_enable()
    assert_same(eager, ours, *tokens_and_mask("right"), use_cache=False)


@pytest.mark.parametrize("name", ["bert", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_compiles_without_a_break(name):
    eager, ours = pair(name, **({"num_hidden_layers": 1} if name == "bert" else {}))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    tokens, mask = tokens_and_mask("right")
    options = {} if name == "bert" else {"use_cache": False}
    expected = hidden(eager, tokens, mask, **options)
    torch.testing.assert_close(hidden(compiled, tokens, mask, **options), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("side", ["right", None])
def test_output_attentions(name, side):
    eager, ours = pair(name)
    tokens, mask = tokens_and_mask(side)
    expected, found = (m(tokens, attention_mask=mask, output_attentions=True).attentions for m in (eager, ours))
    alive = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    assert len(found) == len(expected)
    for ours_weights, eager_weights in zip(found, expected, strict=True):
        ours_weights, eager_weights = (w.transpose(1, 2)[alive] for w in (ours_weights, eager_weights))
        torch.testing.assert_close(ours_weights, eager_weights, rtol=2e-5, atol=2e-6)


def masks(function, q_length=6, kv_length=6, padding=True, **options):
    attention_mask = torch.ones(2, kv_length, dtype=torch.bool) if padding else None
    return integration.fastops_mask(
        2,
        q_length,
        kv_length,
        mask_function=function,
        attention_mask=attention_mask,
        device=torch.device("cpu"),
        **options,
    )


def test_masks_stay_small_and_are_never_read():
    causal, both = masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function
    window = masking_utils.sliding_window_causal_mask_function(3)
    band = masking_utils.sliding_window_bidirectional_mask_function(3)
    with FakeTensorMode(), pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
        torch.ones(1).all().item()
    with FakeTensorMode():  # any value read on the host raises here
        assert masks(both, allow_is_bidirectional_skip=True).shape == (2, 6)
        assert masks(both, 4, 6, allow_is_bidirectional_skip=True).shape == (2, 6)
        assert masks(both, padding=False, allow_is_bidirectional_skip=True) is None
        assert masks(causal).shape == (2, 6)
        assert masks(causal, padding=False) is None
        assert masks(causal, 1, 6, q_offset=5).shape == (2, 6)
        assert masks(causal, 1, 6, q_offset=torch.tensor(3)).shape == (2, 1, 1, 6)
        assert masks(causal, 1, 6, q_offset=3).shape == (2, 1, 1, 6)
        assert masks(causal, 3, 6, q_offset=3).shape == (2, 1, 3, 6)
        assert masks(causal, q_offset=2).shape == (2, 1, 6, 6)
        assert masks(window, 1, 6, q_offset=5).shape == (2, 1, 1, 6)
        assert masks(window, 1, 3, q_offset=2).shape == (2, 3)
        assert masks(causal, allow_is_causal_skip=False).shape == (2, 1, 6, 6)
        assert masks(window).shape == (2, 3, 1, 1, 6)
        assert masks(window).untyped_storage().nbytes() <= 12
        assert masks(window, padding=False).shape == (2, 3, 1, 1, 0)
        assert masks(band).shape == (2, 4, 4, 1, 6)
        assert masks(window, 3, 6, q_offset=3).shape == (2, 1, 3, 6)
        other = masking_utils.and_masks(causal, lambda b, h, q, k: k != q)
        assert masks(other).shape == (2, 1, 6, 6)
        assert masks(masking_utils.or_masks(window, both)).shape == (2, 1, 6, 6)


@pytest.mark.parametrize("name", ["Splinter", "ClapText"])
@pytest.mark.parametrize("side", ["right", None])
def test_a_model_for_both_directions_that_does_not_say_so(name, side):
    config = getattr(transformers, f"{name}Config")(**SMALL, **NO_DROPOUT)
    eager = getattr(transformers, f"{name}Model")._from_config(config, attn_implementation="eager")
    ours = copy.deepcopy(eager)
    ours.set_attn_implementation("fastops")
    assert_same(eager, ours, *tokens_and_mask(side))


@pytest.mark.parametrize("name", ["PegasusX", "BigBirdPegasus"])
def test_a_decoder_that_says_it_is_not_causal(name):
    sizes = {"layers": 1, "ffn_dim": 48, "attention_heads": 4}
    sizes = {f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in sizes.items()}
    config = getattr(transformers, f"{name}Config")(d_model=32, dropout=0.0, vocab_size=40, **sizes)
    eager = getattr(transformers, f"{name}Model")._from_config(config, attn_implementation="eager").eval()
    ours = copy.deepcopy(eager)
    ours.set_attn_implementation("fastops")
    tokens, mask = tokens_and_mask("right")
    results = [m(tokens, mask, decoder_input_ids=tokens, decoder_attention_mask=mask)[0] for m in (eager, ours)]
    torch.testing.assert_close(results[1][mask.bool()], results[0][mask.bool()], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["Bloom", "CodeGen", "XGLM"])
def test_a_model_that_computes_attention_itself_is_refused(name):
    """It would take the mask for its own and see the tokens to come."""
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "vocab_size": 40}
    sizes |= {"ffn_dim": 16, "rotary_dim": 4, "n_inner": 16}
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = getattr(transformers, f"{name}Model")._from_config(config, attn_implementation="fastops")
    with pytest.raises(ValueError, match=f"{name} compute attention themselves"):
        model(tokens_and_mask(None)[0])


def test_a_model_that_does_not_tell_its_window_gets_it_right():
    """The mask decides, not the layer's sliding_window."""
    query = torch.randn(2, 4, 6, 8)
    mask = masks(masking_utils.sliding_window_causal_mask_function(3))
    out, weights = integration.fastops_attention(torch.nn.Module(), query, query, query, mask, sliding_window=5)
    position = torch.arange(6)
    distance = position[:, None] - position
    expected = torch.nn.functional.scaled_dot_product_attention(query, query, query, (distance >= 0) & (distance < 3))
    torch.testing.assert_close(out, expected.transpose(1, 2))
    assert out.is_contiguous()
    assert weights is None


def test_a_mask_after_dropped_keys_is_cut_where_they_were():
    """Keys 4..5 of a window cache, of which the first is padding."""
    padding = torch.tensor([[True, True, True, True, False, True]])
    options = {"attention_mask": padding, "device": torch.device("cpu")}
    mask = integration.fastops_mask(1, 1, 2, q_offset=5, kv_offset=4, **options)
    assert mask.tolist() == [[[[False, True]]]]


def test_padding_of_other_keys_than_the_queries_own_is_not_causal():
    """Cross-attention of a module that does not say it is not causal."""
    query, key = torch.randn(2, 4, 3, 8), torch.randn(2, 4, 6, 8)
    mask = torch.arange(6) < torch.tensor([[6], [2]])
    out, _ = integration.fastops_attention(torch.nn.Module(), query, key, key, mask)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, key, mask[:, None, None])
    torch.testing.assert_close(out, expected.transpose(1, 2))


@pytest.mark.parametrize("name", ["cache", "indices", "head_mask"])
def test_what_is_not_supported_raises(name):
    query = torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match=name):
        integration.fastops_attention(torch.nn.Module(), query, query, query, None, **{name: torch.ones(1)})
    with pytest.raises(ValueError, match=r"\(1, 3, 3\)"):
        integration.fastops_attention(torch.nn.Module(), query, query, query, torch.ones(1, 3, 3))


def test_only_sure_self_attention_skips_padded_queries():
    from transformers.models.bart.modeling_bart import BartAttention
    from transformers.models.bert.modeling_bert import BertCrossAttention, BertSelfAttention

    assert integration.attends_to_itself(BertSelfAttention)
    assert not integration.attends_to_itself(BertCrossAttention)
    assert not integration.attends_to_itself(BartAttention)


def test_without_transformers_the_message_says_what_to_install():
    code = "import sys; sys.modules['transformers'] = None; import fastops.integrations.transformers"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: fastops.integrations.transformers needs transformers" in result.stderr
    assert "fastops-triton[hf]" in result.stderr
