"""fastops.nn.LSTM, GRU and RNN against torch.nn's: every constructor argument, call form, length and error."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastops
from tests.rule import assert_within_rule

CLASSES = [
    pytest.param(fastops.nn.LSTM, nn.LSTM, {}, id="lstm"),
    pytest.param(fastops.nn.GRU, nn.GRU, {}, id="gru"),
    pytest.param(fastops.nn.RNN, nn.RNN, {}, id="tanh"),
    pytest.param(fastops.nn.RNN, nn.RNN, {"nonlinearity": "relu"}, id="relu"),
]
SHAPES = [
    dict(zip(("num_layers", "bias", "batch_first", "bidirectional"), values, strict=True))
    for values in itertools.product((1, 2), (True, False), (False, True), (False, True))
]


def pair(ours, stock, *args, dtype=torch.float32, device="cpu", impl="auto", **options):
    torch.manual_seed(5)
    theirs = stock(*args, device=device, dtype=dtype, **options)
    torch.manual_seed(5)
    mine = ours(*args, device=device, dtype=dtype, impl=impl, **options)
    return mine, theirs


def twin(module, dtype):
    """The stock module of the same weights in another dtype."""
    kept = {k: getattr(module, k) for k in ("num_layers", "bias", "batch_first", "bidirectional", "dropout")}
    if isinstance(module, nn.LSTM):
        kept["proj_size"] = module.proj_size
    if isinstance(module, nn.RNN):
        kept["nonlinearity"] = module.nonlinearity
    stock = next(c for c in (nn.LSTM, nn.GRU, nn.RNN) if isinstance(module, c))
    other = stock(module.input_size, module.hidden_size, **kept)
    other.load_state_dict(module.state_dict())
    return other.to(dtype=dtype, device=next(module.parameters()).device).train(module.training)


def flat(result):
    output, state = result
    output = output.data if isinstance(output, PackedSequence) else output
    return [output, *(state if isinstance(state, tuple) else (state,))]


def states(module, batch, dtype=torch.float32, device="cpu"):
    directions = 2 if module.bidirectional else 1
    shape = (module.num_layers * directions, batch, module.hidden_size)
    h = torch.randn(shape, dtype=dtype, device=device, requires_grad=True)
    c = torch.randn(shape, dtype=dtype, device=device, requires_grad=True)
    return (h, c) if isinstance(module, nn.LSTM) else h


def tensors_of(hx):
    return () if hx is None else hx if isinstance(hx, tuple) else (hx,)


def like(hx, dtype):
    if hx is None:
        return None
    copies = tuple(h.detach().to(dtype).requires_grad_() for h in tensors_of(hx))
    return copies if isinstance(hx, tuple) else copies[0]


def sequences(module, steps, batch, dtype=torch.float32, device="cpu"):
    shape = (batch, steps) if module.batch_first else (steps, batch)
    return torch.randn(*shape, module.input_size, dtype=dtype, device=device, requires_grad=True)


def packed_truth(module, x, hx, lengths):
    """Stock with a PackedSequence, back as a padded tensor."""
    packed = pack_padded_sequence(x, lengths.cpu(), module.batch_first, enforce_sorted=False)
    output, state = module(packed, hx)
    steps = x.shape[1 if module.batch_first else 0]
    return pad_packed_sequence(output, module.batch_first, total_length=steps)[0], state


def compare(mine, x, hx, lengths=None):
    """Outputs and all gradients by the rule: ours, stock in this dtype, stock in float64."""
    results = []
    for kind, dtype in (("ours", x.dtype), ("stock", x.dtype), ("truth", torch.float64)):
        module = mine if kind == "ours" else twin(mine, dtype)
        own_x = x.detach().to(dtype).requires_grad_()
        own_hx = like(hx, dtype)
        if kind == "ours":
            found = flat(mine(own_x, own_hx) if lengths is None else mine(own_x, own_hx, lengths=lengths))
        else:
            found = flat(module(own_x, own_hx) if lengths is None else packed_truth(module, own_x, own_hx, lengths))
        torch.manual_seed(11)
        loss = sum((f * torch.randn(f.shape, dtype=torch.float64).to(f)).sum() for f in found)
        wanted = [own_x, *tensors_of(own_hx), *module.parameters()]
        results.append([*found, *torch.autograd.grad(loss, wanted)])
    for k, values in enumerate(zip(*results, strict=True)):
        assert_within_rule(*values, f"value {k}")


@pytest.mark.parametrize(("ours", "stock", "options"), CLASSES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_every_constructor_combination(ours, stock, options, shape, impl):
    mine, theirs = pair(ours, stock, 3, 5, impl=impl, **shape, **options)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))
    x = sequences(mine, 4, 2)
    for hx in (None, states(mine, 2)):
        for a, b in zip(flat(mine(x, hx)), flat(theirs(x, hx)), strict=True):
            assert torch.equal(a, b)
    single = x.detach()[0]
    alone = None if not mine.bidirectional else states(mine, 1)
    alone = None if alone is None else tuple(a[:, 0] for a in alone) if isinstance(alone, tuple) else alone[:, 0]
    for a, b in zip(flat(mine(single, alone)), flat(theirs(single, alone)), strict=True):
        assert a.shape == b.shape
        assert torch.equal(a, b)


@pytest.mark.parametrize(("ours", "stock", "options"), CLASSES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lengths_are_a_packed_sequence(ours, stock, options, shape):
    """In float64: stock's two ways, packed and padded, round differently in fp32."""
    mine, theirs = pair(ours, stock, 3, 5, dtype=torch.float64, **shape, **options)
    x, hx = sequences(mine, 5, 4, torch.float64), states(mine, 4, torch.float64)
    lengths = torch.tensor([3, 5, 1, 5])
    results = []
    for module, found in ((mine, mine(x, hx, lengths=lengths)), (theirs, packed_truth(theirs, x, hx, lengths))):
        loss = sum((f * torch.arange(f.numel()).view(f.shape).cos()).sum() for f in flat(found))
        wanted = [x, *tensors_of(hx), *module.parameters()]
        results.append([*flat(found), *torch.autograd.grad(loss, wanted)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-13, rtol=1e-12)


@pytest.mark.parametrize(("ours", "stock", "options"), CLASSES)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_rows_without_a_step(ours, stock, options, bidirectional):
    mine, theirs = pair(ours, stock, 3, 5, bidirectional=bidirectional, **options)
    x = torch.randn(4, 3, 3)
    x[:, 1] = float("nan")  # what is in the padding must reach nothing
    x.requires_grad_()
    hx = states(mine, 3)
    for lengths in (torch.tensor([2, 0, 4]), torch.tensor([0, 0, 0])):
        output, state = mine(x, hx, lengths=lengths)
        for b, length in enumerate(lengths.tolist()):
            assert torch.equal(output[length:, b], torch.zeros_like(output[length:, b]))
            if length == 0:
                assert all(
                    torch.equal(n[:, b], h[:, b]) for n, h in zip(tensors_of(state), tensors_of(hx), strict=True)
                )
    output, state = mine(x, hx, lengths=torch.tensor([2, 0, 4]))
    row = tuple(h[:, 2:] for h in hx) if isinstance(hx, tuple) else hx[:, 2:]
    for a, b in zip(flat((output[:, 2:], state)), flat(theirs(x[:, 2:], row)), strict=True):
        torch.testing.assert_close(a[..., -1:, :], b[..., -1:, :])
    output.sum().backward()
    assert all(p.grad.isfinite().all() for p in mine.parameters())


@pytest.mark.parametrize(("ours", "stock", "options"), CLASSES)
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed_in_packed_out(ours, stock, options, enforce_sorted):
    mine, theirs = pair(ours, stock, 3, 5, num_layers=2, bidirectional=True, **options)
    x, lengths = torch.randn(6, 4, 3), torch.tensor([6, 4, 4, 1] if enforce_sorted else [4, 6, 1, 4])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted)
    for hx in (None, states(mine, 4)):
        got, expected = mine(packed, hx), theirs(packed, hx)
        assert isinstance(got[0], PackedSequence)
        assert torch.equal(got[0].batch_sizes, expected[0].batch_sizes)
        for a, b in zip(flat(got), flat(expected), strict=True):
            assert torch.equal(a, b)
        # the way engines take: padded on the device and packed again
        again = mine._packed(packed, hx, mine._layer("torch"))
        for a, b in zip(flat(again), flat(expected), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("ours", "stock", "options"), CLASSES)
@pytest.mark.parametrize("shape", SHAPES[::3], ids=str)
def test_the_layered_way_is_stock_too(ours, stock, options, shape):
    """What an engine is called through, checks and permutations included, with stock as the engine."""
    mine, theirs = pair(ours, stock, 3, 5, **shape, **options)
    for x, hx in (
        (sequences(mine, 4, 2), None),
        (sequences(mine, 4, 2), states(mine, 2)),
        (torch.randn(4, 3), None),
    ):
        found = mine._padded(x, hx, None, mine._layer("torch"))
        for a, b in zip(flat(found), flat(theirs(x, hx)), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_projections_take_lengths(bias):
    options = {"num_layers": 2, "proj_size": 2, "bidirectional": True, "batch_first": True, "bias": bias}
    mine, theirs = pair(fastops.nn.LSTM, nn.LSTM, 3, 6, dtype=torch.float64, **options)
    x = torch.randn(3, 4, 3, dtype=torch.float64, requires_grad=True)
    hx = (torch.randn(4, 3, 2, dtype=torch.float64), torch.randn(4, 3, 6, dtype=torch.float64))
    lengths = torch.tensor([4, 1, 2])
    found, expected = mine(x, hx, lengths=lengths), packed_truth(theirs, x, hx, lengths)
    for a, b in zip(flat(found), flat(expected), strict=True):
        torch.testing.assert_close(a, b)
    d_found, d_expected = (
        torch.autograd.grad(sum(f.square().sum() for f in flat(result)), [x, *module.parameters()])
        for result, module in ((found, mine), (expected, theirs))
    )
    for a, b in zip(d_found, d_expected, strict=True):
        torch.testing.assert_close(a, b)
    output, (h, c) = mine(x, hx, lengths=torch.tensor([0, 0, 0]))
    assert output.eq(0).all()
    assert torch.equal(h, hx[0])
    assert torch.equal(c, hx[1])


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_projections_run_stock():
    mine, theirs = pair(fastops.nn.LSTM, nn.LSTM, 3, 6, num_layers=2, proj_size=2, bidirectional=True)
    x = torch.randn(4, 2, 3)
    for a, b in zip(flat(mine(x)), flat(theirs(x)), strict=True):
        assert torch.equal(a, b)
    lengths = torch.tensor([2, 4])
    for a, b in zip(flat(mine(x, lengths=lengths)), flat(packed_truth(theirs, x, None, lengths)), strict=True):
        torch.testing.assert_close(a, b)
    mine.impl = "triton"
    with pytest.raises(fastops.KernelUnavailable, match="proj_size"):
        mine(x)


def test_dropout_between_layers_is_torchs():
    mine, theirs = pair(fastops.nn.LSTM, nn.LSTM, 3, 5, num_layers=3, dropout=0.5)
    x = torch.randn(4, 2, 3)

    def seeded(function, *args):
        torch.manual_seed(9)
        return function(*args)[0]

    assert torch.equal(seeded(mine, x), seeded(theirs, x))
    layered = seeded(mine._padded, x, None, None, mine._layer("torch"))
    torch.testing.assert_close(layered, seeded(theirs, x), atol=1e-6, rtol=1e-5)
    assert not torch.equal(layered, mine(x)[0])
    assert torch.equal(mine.eval()(x)[0], theirs.eval()(x)[0])


@pytest.mark.parametrize(("ours", "stock", "options"), CLASSES)
def test_errors_are_torchs(ours, stock, options):
    mine, theirs = pair(ours, stock, 3, 5, **options)
    good = torch.randn(4, 2, 3)
    lstm = stock is nn.LSTM

    def hx(*shape):
        return (torch.zeros(shape), torch.zeros(shape)) if lstm else torch.zeros(shape)

    calls = [
        (torch.randn(3), None),
        (torch.randn(1, 4, 2, 3), None),
        (torch.randn(4, 2, 7), None),
        (torch.randn(4, 7), None),
        (good.double(), None),
        (good, hx(1, 5)),
        (good[:, 0], hx(1, 2, 5)),
        (good, hx(2, 2, 5)),
        (good, hx(1, 3, 5)),
        (good, hx(1, 2, 6)),
        (pack_padded_sequence(good, [4, 2]), hx(1, 3, 5)),
        (pack_padded_sequence(torch.randn(4, 2, 7), [4, 2]), None),
    ]
    for x, state in calls:
        with pytest.raises((RuntimeError, ValueError)) as expected:
            theirs(x, state)
        for call in (mine, lambda *a: by_layer(mine, *a)):
            with pytest.raises(expected.type) as found:
                call(x, state)
            if not isinstance(x, PackedSequence):  # whose states torch.nn.LSTM does not check
                assert str(found.value) == str(expected.value)
    wide = tuple(h.double() for h in hx(1, 2, 5)) if lstm else hx(1, 2, 5).double()
    for call in (mine, theirs):
        with pytest.raises(RuntimeError, match="dtype"):
            call(good, wide)
    with pytest.raises(RuntimeError, match=r"h0 with torch\.float64"):
        by_layer(mine, good, wide)
    for arguments in ((0, 5), (3, 0), (3.0, 5)):
        with pytest.raises((TypeError, ValueError)) as expected:
            stock(*arguments)
        with pytest.raises(expected.type, match=str(expected.value)[:20]):
            ours(*arguments)
    with pytest.raises(ValueError, match="impl must be one of"):
        ours(3, 5, impl="cudnn")


@pytest.mark.parametrize("impl", ["auto", "step"])
def test_states_that_are_no_pair_are_refused_as_torch_does(impl):
    mine, theirs = fastops.nn.LSTM(3, 5, impl=impl), nn.LSTM(3, 5)
    x, h = torch.randn(4, 2, 3), torch.zeros(1, 2, 5)
    packed = pack_padded_sequence(x, [4, 2])
    for state in ((h, h, h), [h, h, h], (h,), (), h, torch.stack([h, h]), (h, None), "ab", 3):
        for input in (x, packed):
            with pytest.raises(Exception) as expected:  # noqa: PT011
                theirs(input, state)
            with pytest.raises(expected.type) as found:
                mine(input, state)
            assert str(found.value) == str(expected.value)
    # an unbatched call reads the first two, in torch as here
    one = (h[:, 0],) * 3
    assert mine(x[:, 0], one)[0].shape == theirs(x[:, 0], one)[0].shape == (4, 5)
    for state in ((h, h, h), (h,), h):
        with pytest.raises(RuntimeError, match="lstm expects two hidden states"):
            fastops.nn.LayerNormLSTM(3, 5)(x, state)


def by_layer(module, x, hx):
    layer = module._layer("torch")
    return module._packed(x, hx, layer) if isinstance(x, PackedSequence) else module._padded(x, hx, None, layer)


def test_bad_lengths():
    module = fastops.nn.GRU(3, 5)
    x = torch.randn(4, 2, 3)
    for lengths, message in (
        (torch.tensor([4, 5]), r"lengths\[1\].*5"),
        (torch.tensor([-1, 2]), r"lengths\[0\].*-1"),
        (torch.tensor([4.0, 2.0]), "float32"),
        (torch.tensor([True, True]), "bool"),
        (torch.tensor([4]), r"\(2,\).*\(1,\)"),
        (torch.tensor([[4, 2]]), r"\(2,\)"),
        (torch.tensor([4, 2], device="meta"), "meta"),
    ):
        with pytest.raises(ValueError, match=message):
            module(x, lengths=lengths)
    turned = fastops.nn.GRU(3, 5, batch_first=True)
    assert turned(x, lengths=torch.tensor([2, 0, 1, 2]))[0].shape == (4, 2, 5)
    for lengths, message in (
        (torch.tensor([2, 3, 1, 1]), r"lengths\[1\].*3"),
        (torch.tensor([2, 2]), r"\(4,\).*\(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            turned(x, lengths=lengths)
    with pytest.raises(TypeError, match="input must be a Tensor or a PackedSequence, got NoneType"):
        module(None, lengths=torch.tensor([4, 2]))
    with pytest.raises(TypeError, match="list"):
        module(x, lengths=[4, 2])
    with pytest.raises(ValueError, match="batched"):
        module(x[:, 0], lengths=torch.tensor([4]))
    with pytest.raises(ValueError, match="PackedSequence"):
        module(pack_padded_sequence(x, [4, 2]), lengths=torch.tensor([4, 2]))
    with pytest.raises(TypeError):
        module(x, None, torch.tensor([4, 2]))


def test_a_choice_by_name_never_falls_back():
    module = fastops.nn.LSTM(3, 5, impl="triton", dtype=torch.float64)
    assert "impl='triton'" in repr(module)
    with pytest.raises(fastops.KernelUnavailable, match="triton"):
        module(torch.randn(4, 2, 3, dtype=torch.float64))


@pytest.mark.parametrize(("impl", "projection"), [("auto", 0), ("auto", 2), ("step", 0)])
@pytest.mark.parametrize(
    ("gates", "bias"),
    [
        (slice(4, 8), -1e9),
        (slice(4, 8), -float("inf")),
        (slice(0, 16), 3e4),
        (slice(0, 4), float("inf")),
    ],
    ids=["never forgets", "infinite", "all open", "input open"],
)
def test_a_cell_passes_through_padding_whatever_its_biases(impl, projection, gates, bias):
    """Stock PyTorch is kept from updating c there by its gates, which a bias must not win back."""
    ours = fastops.nn.LSTM(3, 4, proj_size=projection, impl=impl)
    with torch.no_grad():
        ours.bias_ih_l0[gates] = bias
    stock = nn.LSTM(3, 4, proj_size=projection)
    stock.load_state_dict(ours.state_dict())
    x, lengths = torch.randn(5, 2, 3), torch.tensor([2, 5])
    for dtype in (torch.float16, torch.bfloat16) if impl == "auto" and abs(bias) < 1e5 else ():
        with torch.autocast("cpu", dtype):
            assert all(state.isfinite().all() for state in ours(x, lengths=lengths)[1])
    _, expected = stock(nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False))
    _, found = ours(x, lengths=lengths)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    if impl == "auto":
        grads = [
            torch.autograd.grad(c.sum(), list(net.parameters())) for net, (_, c) in ((ours, found), (stock, expected))
        ]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)
