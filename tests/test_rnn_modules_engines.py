"""fastops.nn.LSTM, GRU and RNN on our engines: interpreted at small sizes, and on a GPU where there is one."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastops
from fastops.ops.rnn import _forward_op, why_not
from tests.test_rnn_modules import CLASSES, compare, flat, pair, sequences, states

ENGINES = ("triton", "step")
SHAPES = [
    {"num_layers": 1, "bias": True, "batch_first": False, "bidirectional": False},
    {"num_layers": 2, "bias": True, "batch_first": True, "bidirectional": True},
    {"num_layers": 1, "bias": False, "batch_first": True, "bidirectional": True},
]


@pytest.mark.parametrize(("ours", "stock", "options"), CLASSES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("impl", ENGINES)
@pytest.mark.parametrize("ragged", [False, True])
def test_numbers_and_gradients(ours, stock, options, shape, impl, ragged, device):
    mine, _ = pair(ours, stock, 3, 16, impl=impl, device=device, **shape, **options)
    lengths = torch.tensor([3, 2, 4], device=device) if ragged else None
    compare(mine, sequences(mine, 4, 3, device=device), states(mine, 3, device=device), lengths)


@pytest.mark.gpu
@pytest.mark.parametrize(("ours", "stock", "options"), CLASSES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("impl", ["auto", "triton", "step"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("hidden", [24, 128, 320])
@pytest.mark.parametrize("ragged", [False, True])
def test_numbers_and_gradients_on_gpu(ours, stock, options, shape, impl, dtype, hidden, ragged):
    mine, _ = pair(ours, stock, 40, hidden, impl=impl, device="cuda", dtype=dtype, **shape, **options)
    lengths = torch.randint(1, 31, (50,), device="cuda") if ragged else None
    x = sequences(mine, 30, 50, dtype, "cuda")
    directions = mine._weights()[: 2 if mine.bidirectional else 1]
    reason = why_not(mine.mode, x, None, None, directions, lengths, mine.batch_first, impl)
    if reason is not None:
        pytest.skip(reason)
    compare(mine, x, states(mine, 50, dtype, "cuda"), lengths)
    again = [mine(x) if lengths is None else mine(x, lengths=lengths) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(flat(again[0]), flat(again[1]), strict=True))


@pytest.mark.parametrize(("ours", "stock", "options"), CLASSES)
@pytest.mark.parametrize("impl", ENGINES)
def test_call_forms(ours, stock, options, impl, device):
    mine, theirs = pair(ours, stock, 3, 16, bidirectional=True, impl=impl, device=device, **options)
    x, lengths = torch.randn(4, 3, 3, device=device), torch.tensor([2, 4, 1])
    hx = states(mine, 3, device=device)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    got, expected = mine(packed, hx), theirs(packed, hx)
    padded = mine(x, hx, lengths=lengths.to(device))
    torch.testing.assert_close(pad_packed_sequence(got[0], total_length=4)[0], padded[0], atol=1e-6, rtol=1e-5)
    for a, b in zip(flat(got), flat(expected), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    for a, b in zip(flat(mine(x[:, 0])), flat(theirs(x[:, 0])), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("ours", "stock", "options"), CLASSES)
@pytest.mark.parametrize("impl", ENGINES)
def test_what_must_not_matter(ours, stock, options, impl, device):
    mine, _ = pair(ours, stock, 3, 16, impl=impl, device=device, **options)
    x = torch.randn(6, 3, 3, device=device)
    whole, final = mine(x)
    assert torch.equal(mine(x)[0], whole)
    first, carried = mine(x[:2])
    second, end = mine(x[2:], carried)
    torch.testing.assert_close(torch.cat([first, second]), whole, atol=1e-6, rtol=1e-5)
    for a, b in zip(flat((second, end))[1:], flat((whole, final))[1:], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    order = torch.tensor([2, 0, 1], device=device)
    torch.testing.assert_close(mine(x[:, order])[0], whole[:, order], atol=1e-6, rtol=1e-5)
    longer = torch.cat([x, torch.full((2, 3, 3), float("nan"), device=device)])
    padded = mine(longer, lengths=torch.tensor([6, 6, 6], device=device))
    torch.testing.assert_close(padded[0][:6], whole, atol=1e-6, rtol=1e-5)
    assert not padded[0][6:].any()


@pytest.mark.parametrize(("ours", "stock", "options"), CLASSES)
@pytest.mark.parametrize("impl", ENGINES)
def test_reversed_time_is_the_reverse_direction(ours, stock, options, impl, device):
    both, _ = pair(ours, stock, 3, 16, bidirectional=True, impl=impl, device=device, **options)
    one = ours(3, 16, impl=impl, device=device, **options)
    reverse = {k.removesuffix("_reverse"): v for k, v in both.state_dict().items() if k.endswith("_reverse")}
    one.load_state_dict(reverse)
    x = torch.randn(5, 3, 3, device=device)
    torch.testing.assert_close(both(x)[0][..., 16:], one(x.flip(0))[0].flip(0), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("ours", "stock", "options"), CLASSES)
def test_one_graph(ours, stock, options, device):
    mine, _ = pair(ours, stock, 3, 16, num_layers=2, impl="triton", device=device, **options)
    x = torch.randn(4, 3, 3, device=device, requires_grad=True)
    compiled = torch.compile(mine, fullgraph=True, backend="aot_eager")
    for a, b in zip(flat(compiled(x)), flat(mine(x)), strict=True):
        torch.testing.assert_close(a, b)
    found = torch.autograd.grad(compiled(x)[0].square().sum(), x)[0]
    torch.testing.assert_close(found, torch.autograd.grad(mine(x)[0].square().sum(), x)[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("ours", "stock", "options"), CLASSES)
def test_twice_differentiable(ours, stock, options, device):
    mine, theirs = pair(ours, stock, 3, 16, impl="triton", device=device, **options)
    theirs = theirs.double()

    def second(module, dtype):
        x = torch.linspace(-1, 1, 18, device=device, dtype=dtype).view(3, 2, 3).requires_grad_()
        with torch.backends.cudnn.flags(enabled=False):
            loss = module(x)[0].pow(2).sum() + x.pow(3).sum()
            first = torch.autograd.grad(loss, x, create_graph=True)[0]
            return torch.autograd.grad(first.pow(2).sum(), x)[0]

    expected = second(theirs, torch.float64)
    torch.testing.assert_close(second(mine, torch.float32).double(), expected, atol=1e-4, rtol=1e-4)


def test_dropout_draws_from_torchs_generator(device):
    mine, _ = pair(fastops.nn.LSTM, nn.LSTM, 3, 16, num_layers=2, dropout=0.5, impl="triton", device=device)
    other = nn.LSTM(3, 16, num_layers=2, dropout=0.5)
    other.load_state_dict(mine.state_dict())
    x = torch.randn(4, 2, 3, device=device)
    torch.manual_seed(1)
    first = mine(x)[0]
    torch.manual_seed(1)
    assert torch.equal(mine(x)[0], first)
    assert not torch.equal(mine(x)[0], first)
    if device.type == "cpu":
        torch.manual_seed(1)
        torch.testing.assert_close(other(x)[0], first, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("ours", "stock", "options"), CLASSES)
def test_autocast_and_swap_on_gpu(ours, stock, options):
    module = stock(40, 320, num_layers=2, device="cuda", **options)
    x = torch.randn(30, 50, 40, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        expected = flat(module(x))
        module.__class__ = ours
        found = flat(module(x))
    assert [f.dtype for f in found] == [e.dtype for e in expected]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.float(), b.float(), atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
def test_lengths_never_wait_for_the_gpu():
    module = fastops.nn.LSTM(40, 320, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(30, 50, 40, device="cuda", dtype=torch.bfloat16)
    lengths = torch.randint(1, 31, (50,), device="cuda")
    module(x, lengths=lengths)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        module(x, lengths=lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_is_noticed_after_inference_mode_raises_its_own_error(device, monkeypatch):
    """The words that a kernel writes to are made once, by whichever call comes first."""
    from fastops.kernels import rnn

    monkeypatch.setattr(rnn, "_errors", {})
    x, weights = torch.randn(3, 2, 4, device=device), [torch.randn(8, n, device=device) for n in (4, 8)]

    def forward(*lengths):
        lengths = torch.tensor(lengths, device=device)
        return _forward_op(x, None, None, weights, lengths, "RNN_TANH", False, False, "small", False)[0]

    with torch.inference_mode():
        expected = forward(3, 2)
    forward(3, 4)
    if device.type == "cuda":
        torch.cuda.synchronize()
    with pytest.raises(ValueError, match=r"lengths\[1\]"):
        forward(3, 2)
    assert torch.equal(forward(3, 2), expected)
