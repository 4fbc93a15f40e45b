"""The modules and the transformers integration over the real kernels: small in the interpreter, larger on a GPU."""

import copy

import pytest
import torch
from torch import nn

import fastops
from fastops.nn import MultiheadAttention, TransformerDecoderLayer, TransformerEncoderLayer
from tests.rule import assert_within_rule

B, L, S, E, H = 2, 5, 9, 32, 2


@pytest.fixture(autouse=True)
def no_tf32():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def padding(side, length, device, batch=B):
    position = torch.arange(length, device=device)
    lengths = torch.linspace(length, max(1, length // 3), batch, device=device).long()[:, None]
    if side == "holes":
        return (position + torch.arange(batch, device=device)[:, None]) % 3 == 1
    return position >= lengths if side == "right" else position < length - lengths


def compare(mine, stock, inputs, **call):
    """Output and gradients of `mine` against stock, both against stock in float64."""
    results = []
    for module in (mine, stock, copy.deepcopy(stock).double()):
        dtype = next(module.parameters()).dtype
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        cast = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in call.items()}
        out = module(*leaves, **cast)
        out = out[0] if isinstance(out, tuple) else out
        torch.manual_seed(1)
        direction = torch.randn(out.shape).to(out)
        results.append([out, *torch.autograd.grad(out, [*leaves, *module.parameters()], direction)])
    for i, triple in enumerate(zip(*results, strict=True)):
        assert_within_rule(*triple, what=f"result {i}")


def attention_pair(device, dtype=torch.float32, embed_dim=E, num_heads=H, **options):
    stock = nn.MultiheadAttention(embed_dim, num_heads, device=device, dtype=dtype, **options)
    mine = MultiheadAttention(embed_dim, num_heads, device=device, dtype=dtype, impl="triton", **options)
    mine.load_state_dict(stock.state_dict())
    return mine, stock


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("side", [None, "right", "left", "holes"])
def test_padding(device, batch_first, side):
    mine, stock = attention_pair(device, batch_first=batch_first)
    shapes = [(B, L, E), (B, S, E)] if batch_first else [(L, B, E), (S, B, E)]
    x, y = (torch.randn(shape, device=device) for shape in shapes)
    pad = None if side is None else padding(side, S, device)
    compare(mine, stock, (x, y, y), key_padding_mask=pad, need_weights=False)


@pytest.mark.parametrize("side", [None, "right"])
@pytest.mark.parametrize("kind", ["hint", "bool", "float"])
def test_masks(device, kind, side):
    mine, stock = attention_pair(device, batch_first=True)
    x = torch.randn(B, S, E, device=device)
    mask = torch.ones(S, S, dtype=torch.bool, device=device).triu(1)
    if kind == "float":
        mask = torch.randn(B * H, S, S, device=device)
    pad = None if side is None else padding(side, S, device)
    if kind == "float" and side:
        pad = torch.zeros(pad.shape, device=device).masked_fill(pad, float("-inf"))
    compare(mine, stock, (x, x, x), key_padding_mask=pad, attn_mask=mask, is_causal=kind == "hint", need_weights=False)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_layers(device, kind):
    options = {"d_model": E, "nhead": H, "dim_feedforward": 16, "dropout": 0.0, "batch_first": True, "device": device}
    x, memory = torch.randn(B, S, E, device=device), torch.randn(B, L, E, device=device)
    causal = torch.ones(S, S, dtype=torch.bool, device=device).triu(1)
    if kind == "encoder":
        mine, stock = TransformerEncoderLayer(**options, impl="triton"), nn.TransformerEncoderLayer(**options)
        inputs = (x,)
        masks = {"src_key_padding_mask": padding("right", S, device), "src_mask": causal, "is_causal": True}
    else:
        mine, stock = TransformerDecoderLayer(**options, impl="triton"), nn.TransformerDecoderLayer(**options)
        inputs = (x, memory)
        masks = {"tgt_mask": causal, "tgt_is_causal": True, "memory_key_padding_mask": padding("left", L, device)}
    mine.load_state_dict(stock.state_dict())
    compare(mine, stock, inputs, **masks)


def test_dropout_is_reproducible(device):
    mine, _ = attention_pair(device, dropout=0.5)
    x = torch.randn(S, B, E, device=device)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(mine(x, x, x, need_weights=False)[0])
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_rows_without_a_key_are_zero(device):
    mine, _ = attention_pair(device, batch_first=True)
    x = torch.randn(B, S, E, device=device, requires_grad=True)
    pad = padding("right", S, device)
    pad[1] = True
    out, _ = mine(x, x, x, key_padding_mask=pad, need_weights=False)
    assert torch.equal(out[1], mine.out_proj.bias.expand(S, E))
    out[1].sum().backward()
    assert (x.grad == 0).all()


def hf_pair(name, device, dtype=torch.float32, **options):
    transformers = pytest.importorskip("transformers")
    import fastops.integrations.transformers  # noqa: F401

    options = {"vocab_size": 40, "hidden_size": E, "num_hidden_layers": 1, "intermediate_size": 48, **options}
    config = getattr(transformers, f"{name}Config")(**options, attn_implementation="eager")
    kind = "BertModel" if name == "Bert" else f"{name}ForCausalLM"
    eager = getattr(transformers, kind)(config).to(device, dtype).eval()
    ours = copy.deepcopy(eager)
    ours.set_attn_implementation("fastops")
    return eager, ours


HF = {
    "Bert": {"num_attention_heads": 2},
    "Gemma2": {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_hidden_layers": 2,
        "sliding_window": 4,
        "attn_logit_softcapping": 2.0,
        "query_pre_attn_scalar": 16,
    },
}


@pytest.mark.parametrize("name", HF)
@pytest.mark.parametrize("side", ["right", "left"])
def test_transformers(device, monkeypatch, name, side):
    eager, ours = hf_pair(name, device, **HF[name])
    tokens = torch.randint(1, 40, (B, S), device=device)
    alive = ~padding(side, S, device)
    results = []
    for model, impl in ((eager, "torch"), (ours, "triton")):
        monkeypatch.setenv("FASTOPS_IMPL", impl)
        out = model(tokens, attention_mask=alive.long())
        out = (out.logits if "logits" in out else out.last_hidden_state)[alive]
        torch.manual_seed(1)
        results.append(
            (out, torch.autograd.grad(out, list(model.parameters()), torch.randn_like(out), allow_unused=True))
        )
    torch.testing.assert_close(results[1][0], results[0][0], rtol=2e-5, atol=2e-5)
    largest = max(g.abs().max() for g in results[0][1] if g is not None)
    for found, expected in zip(results[1][1], results[0][1], strict=True):
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-6 * float(largest))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("side", [None, "right", "left", "holes"])
def test_padding_on_a_gpu(dtype, side):
    mine, stock = attention_pair("cuda", dtype, embed_dim=768, num_heads=12, batch_first=True)
    x = torch.randn(4, 203, 768, device="cuda", dtype=dtype)
    pad = None if side is None else padding(side, 203, "cuda", 4)
    compare(mine, stock, (x, x, x), key_padding_mask=pad, need_weights=False)


@pytest.mark.gpu
def test_no_host_sync_on_a_gpu():
    layer = TransformerEncoderLayer(768, 12, 256, batch_first=True, device="cuda", dtype=torch.bfloat16, impl="triton")
    x = torch.randn(4, 200, 768, device="cuda", dtype=torch.bfloat16)
    pad = padding("right", 200, "cuda", 4)
    layer(x, src_key_padding_mask=pad).sum().backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x, src_key_padding_mask=pad).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_graph_replays_with_new_padding():
    """Lengths are made inside the graph, from the mask it is given."""
    mine, _ = attention_pair("cuda", torch.float16, embed_dim=768, num_heads=12, batch_first=True)
    mine.eval()
    x, pad = torch.randn(4, 200, 768, device="cuda", dtype=torch.float16), padding("right", 200, "cuda", 4)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            mine(x, x, x, key_padding_mask=pad, need_weights=False)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = mine(x, x, x, key_padding_mask=pad, need_weights=False)[0]
        for side in ("left", "holes", "right"):
            pad.copy_(padding(side, 200, "cuda", 4))
            graph.replay()
            assert torch.equal(out, mine(x, x, x, key_padding_mask=pad.clone(), need_weights=False)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("name", HF)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("side", ["right", "left"])
def test_transformers_on_a_gpu(monkeypatch, name, dtype, side):
    """Ours is no farther from float64 than twice the distance of eager in the same dtype."""
    options = {**HF[name], "hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 512}
    options |= {"num_key_value_heads": 2, "head_dim": 64} if name != "Bert" else {}
    eager, ours = hf_pair(name, "cuda", dtype, **options)
    tokens = torch.randint(1, 40, (4, 203), device="cuda")
    alive = ~padding(side, 203, "cuda", 4)
    outs = []
    for model, impl in ((ours, "triton"), (eager, "torch"), (copy.deepcopy(eager).double(), "torch")):
        monkeypatch.setenv("FASTOPS_IMPL", impl)
        out = model(tokens, attention_mask=alive.long())
        outs.append((out.logits if "logits" in out else out.last_hidden_state)[alive])
    assert_within_rule(*outs)


@pytest.mark.gpu
def test_static_cache_generation_on_a_gpu(monkeypatch):
    """Compiled decoding over a static cache gives the tokens eager gives."""
    monkeypatch.setenv("FASTOPS_IMPL", "triton")
    eager, ours = hf_pair("Gemma2", "cuda", torch.float32, **HF["Gemma2"])
    tokens = torch.randint(1, 40, (2, 6), device="cuda")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = eager.generate(tokens, **options)
    assert torch.equal(ours.generate(tokens, **options), expected)
    assert torch.equal(ours.generate(tokens, cache_implementation="static", **options), expected)


def test_explicit_triton_says_why_not(device):
    mine, _ = attention_pair(device, torch.float64)
    x = torch.randn(L, B, E, device=device, dtype=torch.float64)
    with pytest.raises(fastops.KernelUnavailable, match="float64"):
        mine(x, x, x, need_weights=False)
