"""MultiheadAttention and the transformer layers against torch.nn's, argument by argument."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import fastops
from fastops.nn import MultiheadAttention, TransformerDecoderLayer, TransformerEncoder, TransformerEncoderLayer
from fastops.nn.attention import attention_masks
from tests.rule import assert_within_rule

B, L, S, E, H = 3, 5, 7, 12, 3


def twins(ours=MultiheadAttention, theirs=nn.MultiheadAttention, impl="torch", **options):
    """Stock module, ours with its weights, and stock in float64."""
    options.setdefault("embed_dim", E), options.setdefault("num_heads", H)
    stock = theirs(**options)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    mine = ours(**options, impl=impl)
    mine.load_state_dict(stock.state_dict())
    return stock, mine, copy.deepcopy(stock).double()


def random_inputs(batch_first, kdim=E, vdim=E, batch=B):
    def sequence(length, width):
        shape = (length, width) if batch is None else (batch, length, width) if batch_first else (length, batch, width)
        return torch.randn(shape, requires_grad=True)

    return sequence(L, E), sequence(S, kdim), sequence(S, vdim)


def padding(pattern, length=S, batch=B):
    """True where a key is padding; every row keeps a key."""
    position = torch.arange(length)
    rows = {
        "right": position >= torch.tensor([[length], [length // 2], [1]]),
        "left": position < torch.tensor([[0], [length // 2], [length - 1]]),
        "holes": (position + torch.arange(3)[:, None]) % 3 == 1,
    }[pattern]
    return rows if batch is not None else rows[1]


def as_float(mask):
    return None if mask is None else torch.zeros(mask.shape).masked_fill(mask, float("-inf"))


def compare(stock, mine, truth, inputs, **call):
    """Outputs, weights and every gradient within the rule."""
    results = []
    for module in (mine, stock, truth):
        dtype = next(module.parameters()).dtype
        leaves = [x.detach().to(dtype).requires_grad_() for x in dict.fromkeys(inputs)]
        of = dict(zip(dict.fromkeys(inputs), leaves, strict=True))
        cast = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in call.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # masks of two types: torch calls it deprecated
            out = module(*(of[x] for x in inputs), **cast)
        out = out if isinstance(out, tuple) else (out, None)
        torch.manual_seed(1)
        loss = (out[0] * torch.randn(out[0].shape).to(dtype)).sum()
        if out[1] is not None:
            loss = loss + (out[1] * torch.randn(out[1].shape).to(dtype)).sum()
        gradients = torch.autograd.grad(loss, [*leaves, *module.parameters()])
        results.append([out[0], *([] if out[1] is None else [out[1]]), *gradients])
    assert len(results[0]) == len(results[1])
    names = [f"input {i}" for i in range(len(leaves))] + [name for name, _ in mine.named_parameters()]
    names = ["output", "weights"][: len(results[0]) - len(names)] + names
    for name, *triple in zip(names, *results, strict=True):
        assert_within_rule(*triple, what=name)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("mask", [None, "bool", "float", "bool3", "float3"])
@pytest.mark.parametrize("pad", [None, "right", "left", "holes", "float right"])
def test_call_forms(batch_first, need_weights, mask, pad):
    modules = twins(batch_first=batch_first)
    attn_mask = None
    if mask is not None:
        shape = (B * H, L, S) if mask.endswith("3") else (L, S)
        attn_mask = torch.rand(shape) < 0.3
        attn_mask[..., 0] = False
        if pad is not None:
            attn_mask[..., -1] = attn_mask[..., 2] = False
        attn_mask = attn_mask if mask.startswith("bool") else torch.randn(shape)
    key_padding_mask = None if pad is None else padding(pad.split()[-1])
    if pad == "float right":
        key_padding_mask = as_float(key_padding_mask) + torch.randn(B, S)
    compare(
        *modules,
        random_inputs(batch_first),
        key_padding_mask=key_padding_mask,
        attn_mask=attn_mask,
        need_weights=need_weights,
        average_attn_weights=not batch_first,
    )


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 9}, {"kdim": 8, "vdim": 10}, {"dropout": 0.5}])
def test_constructors(options, need_weights):
    stock, mine, truth = twins(**options)
    for module in (stock, mine, truth):
        module.eval()
    x, y, z = random_inputs(False, options.get("kdim", E), options.get("vdim", E))
    compare(stock, mine, truth, (x, y, z), need_weights=need_weights)
    if not options.keys() & {"kdim", "vdim"}:
        compare(stock, mine, truth, (x, y, y), need_weights=need_weights)
        compare(stock, mine, truth, (x, x, x), need_weights=need_weights)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_one_unbatched_sequence(batch_first, need_weights, masked):
    masks = {"key_padding_mask": padding("right", batch=None), "attn_mask": torch.randn(H, L, S)} if masked else {}
    compare(*twins(batch_first=batch_first), random_inputs(batch_first, batch=None), need_weights=need_weights, **masks)


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_what_is_left_to_torch(options):
    stock, mine, truth = twins(**options, impl="auto")
    compare(stock, mine, truth, random_inputs(False), key_padding_mask=padding("right"))
    mine.impl = "triton"
    with pytest.raises(fastops.KernelUnavailable, match=next(iter(options))):
        mine(*random_inputs(False), need_weights=False)


@pytest.mark.parametrize("pad", [None, "right"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_causal_hint(pad, need_weights):
    x = torch.randn(B, S, E, requires_grad=True)
    compare(
        *twins(batch_first=True),
        (x, x, x),
        key_padding_mask=None if pad is None else padding(pad),
        attn_mask=torch.ones(S, S, dtype=torch.bool).triu(1),
        is_causal=True,
        need_weights=need_weights,
    )


def test_causal_hint_beside_left_padding():
    stock, mine, _ = twins(batch_first=True)
    x = torch.randn(B, S, E)
    masks = {"key_padding_mask": padding("left"), "attn_mask": torch.ones(S, S, dtype=torch.bool).triu(1)}
    out, expected = (m(x, x, x, need_weights=False, is_causal=True, **masks)[0] for m in (mine, stock))
    alive = ~padding("left")
    torch.testing.assert_close(out[alive], expected[alive])
    assert torch.equal(out[~alive], mine.out_proj.bias.expand_as(out[~alive]))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_rows_without_a_key_are_zero(need_weights, kind):
    mine = MultiheadAttention(E, H, batch_first=True)
    x = torch.randn(2, S, E, requires_grad=True)
    pad = torch.tensor([[False] * S, [True] * S])
    out, weights = mine(
        x, x, x, key_padding_mask=pad if kind == torch.bool else as_float(pad), need_weights=need_weights
    )
    assert torch.equal(out[1], mine.out_proj.bias.expand(S, E))
    assert weights is None or (weights[1] == 0).all()
    out[1].sum().backward()
    assert (x.grad == 0).all()
    assert all(p.grad.isfinite().all() for p in mine.parameters())


def test_padding_is_not_read():
    mine = MultiheadAttention(E, H, batch_first=True)
    x, pad = torch.randn(B, S, E), padding("right")
    expected = mine(x, x, x, key_padding_mask=pad, need_weights=False)[0]
    poisoned = x.masked_fill(pad[..., None], float("nan"))
    out = mine(x, poisoned, poisoned, key_padding_mask=pad, need_weights=False)[0]
    torch.testing.assert_close(out, expected)


def test_a_float_mask_is_learned():
    stock, mine, _ = twins()
    bias = torch.randn(L, S)
    x, y, z = random_inputs(False)
    gradients = []
    for module in (stock, mine):
        leaf = bias.clone().requires_grad_()
        module(x, y, z, attn_mask=leaf, need_weights=False)[0].square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_dropout_is_drawn_in_training_only():
    mine = MultiheadAttention(E, H, dropout=0.5)
    x = torch.randn(L, B, E)
    assert not torch.equal(mine(x, x, x, need_weights=False)[0], mine(x, x, x, need_weights=False)[0])
    weights = mine(x, x, x, average_attn_weights=False)[1]
    assert (weights == 0).any()
    mine.eval()
    torch.testing.assert_close(mine(x, x, x, need_weights=False)[0], mine(x, x, x)[0])


def errors():
    x, y = torch.randn(L, B, E), torch.randn(S, B, E)
    pad, mask = torch.zeros(B, S, dtype=torch.bool), torch.zeros(L, S, dtype=torch.bool)
    return {
        "width": ((torch.randn(L, B, E + 1), y, y), {}),
        "dimensions": ((x, y[0], y[0]), {}),
        "four dimensions": ((x[None], y[None], y[None]), {}),
        "key and value": ((x, y, y[:-1]), {}),
        "batch": ((x, y[:, :-1], y[:, :-1]), {}),
        "padding shape": ((x, y, y), {"key_padding_mask": pad[:, :-1]}),
        "padding dimensions": ((x, y, y), {"key_padding_mask": pad[0]}),
        "padding dtype": ((x, y, y), {"key_padding_mask": pad.int()}),
        "mask shape": ((x, y, y), {"attn_mask": mask.T}),
        "mask of heads": ((x, y, y), {"attn_mask": mask.expand(B, L, S)}),
        "width of the key": ((x, torch.randn(S, B, E + 1), torch.randn(S, B, E + 1)), {}),
        "padding that is no tensor": ((x, y, y), {"key_padding_mask": "pad"}),
        "mask that is no tensor": ((x, y, y), {"attn_mask": [[0.0]]}),
        "mask dtype": ((x, y, y), {"attn_mask": mask.long()}),
        "causal without mask": ((x, y, y), {"is_causal": True}),
        "dtype": ((x.double(), y.double(), y.double()), {}),
    }


@pytest.mark.parametrize("name", errors())
def test_errors_are_of_torchs_type(name):
    stock, mine, _ = twins()
    args, call = errors()[name]
    with pytest.raises(Exception) as expected:  # noqa: PT011
        stock(*args, need_weights=False, **call)
    with pytest.raises(type(expected.value)) as raised:
        mine(*args, need_weights=False, **call)
    assert str(raised.value)


@pytest.mark.parametrize("nested", ["query", "key", "value", "all"])
def test_nested_tensors_are_what_they_are_in_torch(nested):
    rows = torch.randn(2, S, E)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype
        ragged = torch.nested.nested_tensor(list(rows))
    args = [ragged if nested in (name, "all") else rows for name in ("query", "key", "value")]
    stock = nn.MultiheadAttention(E, 2, batch_first=True).eval()
    mine = MultiheadAttention(E, 2, batch_first=True, impl="triton").eval()
    with torch.no_grad(), pytest.raises(fastops.KernelUnavailable, match="nested"):
        mine(*args, need_weights=False)
    mine = MultiheadAttention(E, 2, batch_first=True).eval()
    mine.load_state_dict(stock.state_dict())
    with torch.no_grad():
        if nested == "all":
            found, expected = (m(*args, need_weights=False)[0] for m in (mine, stock))
            torch.testing.assert_close(found.to_padded_tensor(0.0), expected.to_padded_tensor(0.0))
            return
        for module in (mine, stock):
            with pytest.raises(AssertionError, match="NestedTensor"):
                module(*args, need_weights=False)


def test_lengths_are_asked_for_where_they_pay():
    """A GPU's kernels find the end of the padding in a mask of keys alone, and need lengths beside another mask."""
    query, pad = torch.empty(B, H, S, E // H), padding("right")
    mask = torch.zeros(S, S, dtype=torch.bool)
    for device, other, given in (("cpu", None, True), ("cpu", mask, True), ("meta", None, False), ("meta", mask, True)):
        other = None if other is None else other.to(device)
        _, lengths = attention_masks(pad.to(device), other, query.to(device))
        assert (lengths is not None) == given, (device, other)


def test_batches_that_do_not_match_are_named():
    x, y = torch.randn(L, B, E), torch.randn(S, B - 1, E)
    with pytest.raises(RuntimeError, match="batch sizes of query and key"):
        MultiheadAttention(E, H)(x, y, y)


def test_impl_is_checked_and_shown():
    with pytest.raises(ValueError, match="impl"):
        MultiheadAttention(E, H, impl="cuda")
    with pytest.raises(ValueError, match="impl"):
        TransformerEncoderLayer(E, H, impl="cuda")
    assert "impl" not in repr(MultiheadAttention(E, H))
    assert "impl='torch'" in repr(MultiheadAttention(E, H, impl="torch"))
    assert repr(TransformerDecoderLayer(E, H, impl="torch")).count("impl='torch'") == 3
    x = torch.randn(L, B, E)
    with pytest.raises(fastops.KernelUnavailable, match="need_weights"):
        MultiheadAttention(E, H, impl="triton")(x, x, x)


LAYERS = {
    "encoder": (TransformerEncoderLayer, nn.TransformerEncoderLayer),
    "decoder": (TransformerDecoderLayer, nn.TransformerDecoderLayer),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_first": True, "norm_first": True},
        {"batch_first": True, "activation": "gelu"},
        {"bias": False, "batch_first": True},
        {"activation": torch.tanh},
    ],
    ids=("plain", "norm_first", "gelu", "no_bias", "tanh"),
)
@pytest.mark.parametrize("masked", [False, True])
def test_layers(kind, options, masked):
    options = {"d_model": E, "nhead": H, "dim_feedforward": 16, "dropout": 0.0, **options}
    ours, theirs = LAYERS[kind]
    stock = theirs(**options)
    mine = ours(**options)
    mine.load_state_dict(stock.state_dict())
    length = {"encoder": S, "decoder": L}[kind]
    shape = (B, length, E) if options.get("batch_first") else (length, B, E)
    memory_shape = (B, S, E) if options.get("batch_first") else (S, B, E)
    inputs = [torch.randn(shape)] + ([torch.randn(memory_shape)] if kind == "decoder" else [])
    causal = torch.ones(length, length, dtype=torch.bool).triu(1)
    masks = {}
    if masked and kind == "encoder":
        masks = {"src_mask": causal, "src_key_padding_mask": padding("right"), "is_causal": True}
    elif masked:
        masks = {"tgt_mask": causal, "tgt_is_causal": True, "memory_key_padding_mask": padding("right")}
    for training in (True, False):
        triple = [module.train(training) for module in (stock, mine, copy.deepcopy(stock).double())]
        compare(*triple, inputs, **masks)
    with torch.no_grad():
        torch.testing.assert_close(mine(*inputs, **masks), stock(*inputs, **masks))


@pytest.mark.parametrize("kind", LAYERS)
def test_a_swapped_class_is_the_same_model(kind):
    ours, theirs = LAYERS[kind]
    stock = theirs(E, H, 16, dropout=0.0, batch_first=True)
    x = torch.randn(B, S, E)
    inputs = (x,) if kind == "encoder" else (x, torch.randn(B, L, E))
    expected, keys, parameters = stock(*inputs), list(stock.state_dict()), list(stock.parameters())
    for module in list(stock.modules()):
        if type(module) in (nn.MultiheadAttention, theirs):
            module.__class__ = MultiheadAttention if type(module) is nn.MultiheadAttention else ours
    torch.testing.assert_close(stock(*inputs), expected)
    assert list(stock.state_dict()) == keys
    assert all(a is b for a, b in zip(stock.parameters(), parameters, strict=True))
    assert "impl" not in repr(stock)


def test_a_new_layer_starts_with_torchs_weights():
    for ours, theirs in LAYERS.values():
        torch.manual_seed(3)
        expected = theirs(E, H).state_dict()
        torch.manual_seed(3)
        state = ours(E, H).state_dict()
        assert list(state) == list(expected)
        assert all(torch.equal(state[k], expected[k]) for k in expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("how", ["built", "swapped", "layers only"])
def test_encoder(training, how):
    layer = nn.TransformerEncoderLayer(12, 2, 16, dropout=0.0, batch_first=True)
    stock = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(12)).train(training)
    if how == "built":
        mine = TransformerEncoder(
            TransformerEncoderLayer(12, 2, 16, dropout=0.0, batch_first=True), 2, nn.LayerNorm(12)
        )
        mine.load_state_dict(stock.state_dict())
    else:
        mine = copy.deepcopy(stock)
        for module in list(mine.modules()):
            module.__class__ = {
                nn.MultiheadAttention: MultiheadAttention,
                nn.TransformerEncoderLayer: TransformerEncoderLayer,
                nn.TransformerEncoder: TransformerEncoder if how == "swapped" else nn.TransformerEncoder,
            }.get(type(module), type(module))
    mine.train(training)
    x, pad = torch.randn(B, S, 12), padding("right")
    causal = torch.ones(S, S, dtype=torch.bool).triu(1)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nested tensors are a prototype
            alive = ~pad[..., None]
            for call in ({}, {"mask": causal}, {"mask": as_float(causal)}):
                torch.testing.assert_close(mine(x, **call), stock(x, **call))
                call["src_key_padding_mask"] = pad
                torch.testing.assert_close(mine(x, **call) * alive, stock(x, **call) * alive)


def test_nested_tensors_are_left_to_torch():
    layer = TransformerEncoderLayer(12, 2, 16, batch_first=True).eval()
    rows = [torch.randn(n, 12) for n in (4, 6)]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = layer(torch.nested.nested_tensor(rows))
        for row, expected in zip(out.unbind(), rows, strict=True):
            torch.testing.assert_close(row, layer(expected[None])[0])
        layer = TransformerEncoderLayer(12, 2, 16, batch_first=True, impl="triton").eval()
        with pytest.raises(fastops.KernelUnavailable, match="nested"):
            layer(torch.nested.nested_tensor(rows))


def test_copies_pickles_and_saves():
    layer = TransformerEncoderLayer(E, H, 16, impl="torch").eval()
    x = torch.randn(S, B, E)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        assert type(copied.self_attn) is MultiheadAttention
        assert copied.impl == copied.self_attn.impl == "torch"
        torch.testing.assert_close(copied(x), layer(x))


@pytest.mark.parametrize("masked", [False, True])
def test_checkpoint_and_second_derivatives(masked):
    mine = MultiheadAttention(E, H, batch_first=True).double()
    x = torch.randn(2, 3, E, dtype=torch.float64, requires_grad=True)
    pad = torch.tensor([[False, False, True], [False, False, False]]) if masked else None

    def attend(x):
        return mine(x, x, x, key_padding_mask=pad, need_weights=False)[0]

    direct = torch.autograd.grad(attend(x).square().sum(), x)[0]
    again = torch.autograd.grad(checkpoint(attend, x, use_reentrant=False).square().sum(), x)[0]
    torch.testing.assert_close(direct, again)
    with sdpa_kernel(SDPBackend.MATH):  # stock's other CPU kernel has no second derivative, and says so
        assert torch.autograd.gradgradcheck(attend, (x,))


@pytest.mark.parametrize("need_weights", [False, True])
def test_autocast_gives_the_dtype_torch_gives(need_weights):
    stock, mine, _ = twins(batch_first=True)
    x = torch.randn(B, S, E)
    for masks in ({}, {"key_padding_mask": padding("right")}, {"key_padding_mask": as_float(padding("right"))}):
        with torch.autocast("cpu", torch.bfloat16):
            expected, out = (module(x, x, x, need_weights=need_weights, **masks)[0] for module in (stock, mine))
        assert out.dtype == expected.dtype
        torch.testing.assert_close(out, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("batch", "length"), [(0, 4), (2, 0), (0, 0)])
def test_empty_inputs(batch, length):
    mine = MultiheadAttention(E, H, batch_first=True)
    x = torch.randn(batch, length, E, requires_grad=True)
    for pad in (None, torch.zeros(batch, length, dtype=torch.bool)):
        out, _ = mine(x, x, x, key_padding_mask=pad, need_weights=False)
        assert out.shape == x.shape
        out.sum().backward()


@pytest.mark.parametrize("padded", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_compiles_without_a_break(padded):
    layer = TransformerEncoderLayer(E, H, 16, dropout=0.0, batch_first=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (S, S + 1):
        x = torch.randn(B, length, E)
        masks = {"src_key_padding_mask": padding("right", length)} if padded else {}
        out = compiled(x, **masks)
        torch.testing.assert_close(out, layer(x, **masks))
        out.sum().backward()


@pytest.mark.parametrize("pad", [None, "right"])
def test_nothing_is_read_on_the_host(pad):
    """Meta tensors have no values: reading one raises."""
    layer = TransformerEncoderLayer(E, H, 16, batch_first=True, device="meta")
    encoder = TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.empty(B, S, E, device="meta")
    pad = None if pad is None else padding(pad).to("meta")
    causal = torch.empty(S, S, dtype=torch.bool, device="meta")
    for training in (True, False):
        encoder.train(training)
        assert encoder(x, src_key_padding_mask=pad).shape == x.shape
        assert encoder(x, mask=causal, src_key_padding_mask=pad, is_causal=True).shape == x.shape
        _, weights = layer.self_attn(x, x, x, key_padding_mask=pad, attn_mask=causal)
        assert weights.shape == (B, S, S)
