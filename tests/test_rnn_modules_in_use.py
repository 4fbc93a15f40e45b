"""fastops.nn.LSTM, GRU and RNN as programs use them: swapped, copied, compiled, checkpointed, differentiated twice."""

import copy
import io
import pickle

import pytest
import torch
import torch._dynamo.testing  # a module of its own: torch 2.11 does not import it unasked
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastops
from tests.test_rnn_modules import CLASSES, flat, packed_truth, pair, states


@pytest.mark.parametrize(("ours", "stock", "options"), CLASSES)
def test_swapping_the_class_is_enough(ours, stock, options):
    module = stock(3, 5, num_layers=2, **options)
    shown, x = repr(module), torch.randn(4, 2, 3)
    expected, parameters = module(x), list(module.parameters())
    module.__class__ = ours
    assert repr(module) == shown
    assert isinstance(module, stock)
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(flat(module(x)), flat(expected), strict=True))
    module(x, lengths=torch.tensor([4, 2]))
    module.__class__ = stock
    assert all(torch.equal(a, b) for a, b in zip(flat(module(x)), flat(expected), strict=True))


@pytest.mark.parametrize(("ours", "stock", "options"), CLASSES)
def test_copies_pickles_and_saves(ours, stock, options):
    module, theirs = pair(ours, stock, 3, 5, impl="torch", **options)
    theirs.load_state_dict(module.state_dict())
    x = torch.randn(4, 2, 3)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    others = (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False))
    for other in others:
        assert other.impl == "torch"
        assert torch.equal(other(x)[0], theirs(x)[0])
        with torch.no_grad():
            other.weight_hh_l0.zero_()
        assert not torch.equal(other(x)[0], module(x)[0])
        by_layer = other._padded(x, None, None, other._layer("torch"))
        torch.testing.assert_close(by_layer[0], other(x)[0], atol=1e-6, rtol=1e-5)
    module.double()
    assert module(x.double())[0].dtype == torch.float64
    module.flatten_parameters()


@pytest.mark.parametrize(("ours", "stock", "options"), CLASSES)
def test_functional_call_replaces_the_weights(ours, stock, options):
    module, theirs = pair(ours, stock, 3, 5, **options)
    weights = {name: p.detach() * 2 for name, p in module.named_parameters()}
    x = torch.randn(4, 2, 3)
    expected = torch.func.functional_call(theirs, weights, (x,))[0]
    assert torch.equal(torch.func.functional_call(module, weights, (x,))[0], expected)
    ragged = torch.func.functional_call(module, weights, (x,), {"lengths": torch.tensor([4, 4])})[0]
    torch.testing.assert_close(ragged, expected)


def test_replicas_have_their_own_weights():
    module = fastops.nn.LSTM(3, 5, num_layers=2)
    replica = module._replicate_for_data_parallel()
    for name, p in module.named_parameters():
        setattr(replica, name, p.detach() * 2)
    x = torch.randn(4, 2, 3)
    twice = copy.deepcopy(module)
    with torch.no_grad():
        for p in twice.parameters():
            p *= 2
    torch.testing.assert_close(replica(x)[0], twice(x)[0])
    by_layer = replica._padded(x, None, None, replica._layer("torch"))[0]
    torch.testing.assert_close(by_layer, twice(x)[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("ours", "stock", "options"), CLASSES)
@pytest.mark.parametrize("ragged", [False, True])
def test_one_graph_where_stock_breaks_it(ours, stock, options, ragged):
    module, theirs = pair(ours, stock, 3, 5, num_layers=2, bidirectional=True, batch_first=True, **options)
    x = torch.randn(2, 4, 3, requires_grad=True)
    lengths = torch.tensor([3, 4]) if ragged else None
    hx = states(module, 2)

    def loss(network, function):
        return sum(t.pow(2).sum() for t in flat(function(torch.relu(x), hx))) + x.sum()

    compiled = torch.compile(lambda a, h: module(a, h, lengths=lengths), fullgraph=True, backend="aot_eager")
    eager = loss(theirs, theirs if not ragged else lambda a, h: packed_truth(theirs, a, h, lengths))
    found = loss(module, compiled)
    torch.testing.assert_close(found, eager, atol=1e-5, rtol=1e-5)
    wanted = (x, *(hx if isinstance(hx, tuple) else (hx,)))
    for a, b in zip(
        torch.autograd.grad(found, (*wanted, *module.parameters())),
        torch.autograd.grad(eager, (*wanted, *theirs.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(theirs, fullgraph=True, backend="eager")(x)


def test_compiled_once_for_all_lengths_of_sequence():
    module = fastops.nn.GRU(3, 5)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for steps in (4, 5, 9, 17):
        x = torch.randn(steps, 2, 3)
        torch.testing.assert_close(compiled(x)[0], module(x)[0])
    assert counter.frame_count <= 2


@pytest.mark.slow
def test_inductor_and_autocast():
    module = fastops.nn.LSTM(3, 5, num_layers=2, dropout=0.5)
    x = torch.randn(4, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        compiled = torch.compile(module, fullgraph=True)
        output, (h, c) = compiled(x)
        expected = module(x)
    assert [output.dtype, h.dtype, c.dtype] == [t.dtype for t in flat(expected)]
    output.float().sum().backward()


@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN"])
def test_dtypes_under_autocast_are_stocks_compiled_and_with_lengths(mode):
    """PyTorch's autocast on the CPU casts no GRU; only the products in it are cast."""
    ours, stock = pair(getattr(fastops.nn, mode), getattr(nn, mode), 3, 5, num_layers=2)
    compiled, lengths = torch.compile(ours, backend="aot_eager"), torch.tensor([4, 4])
    dtypes = (torch.float32, torch.bfloat16)
    for of_x, of_h in [(a, b) for a in dtypes for b in (*dtypes, None)] if mode == "GRU" else [(torch.float32, None)]:
        x = torch.randn(4, 2, 3).to(of_x)
        h = None if of_h is None else torch.randn(2, 2, 5).to(of_h)
        with torch.autocast("cpu", torch.bfloat16):
            expected = flat(stock(x, h))
            results = [flat(ours(x, h)), flat(compiled(x, h)), flat(ours(x, h, lengths=lengths))]
        for found in results:
            assert [each.dtype for each in found] == [each.dtype for each in expected]
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a.float(), b.float(), atol=0.02, rtol=0.02)


def test_packed_sequences_compile_with_a_break():
    module = fastops.nn.LSTM(3, 5)
    packed = pack_padded_sequence(torch.randn(4, 2, 3), [4, 2])
    compiled = torch.compile(lambda p: module(p)[0].data.sum(), backend="eager")
    torch.testing.assert_close(compiled(packed), module(packed)[0].data.sum())


@pytest.mark.parametrize(("ours", "stock", "options"), CLASSES)
def test_checkpoint(ours, stock, options):
    module, _ = pair(ours, stock, 3, 5, num_layers=2, dropout=0.3, **options)
    x = torch.randn(4, 2, 3, requires_grad=True)
    torch.manual_seed(2)
    expected = torch.autograd.grad(module(x)[0].sum(), x)[0]
    torch.manual_seed(2)
    output = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)[0]
    assert torch.equal(torch.autograd.grad(output.sum(), x)[0], expected)


@pytest.mark.parametrize(("ours", "stock", "options"), CLASSES)
def test_twice_differentiable(ours, stock, options):
    module, theirs = pair(ours, stock, 3, 4, dtype=torch.float64, bidirectional=True, **options)

    def second(function, x):
        loss = function(x)[0].pow(2).sum() + x.pow(3).sum()
        first = torch.autograd.grad(loss, x, create_graph=True)[0]
        return torch.autograd.grad(first.pow(2).sum(), x)[0]

    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    expected = second(theirs, x)
    torch.testing.assert_close(second(module, x), expected)
    torch.testing.assert_close(second(lambda a: module(a, lengths=torch.tensor([4, 4])), x), expected)


def test_exported_programs_hold_torchs_operators():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = fastops.nn.LSTM(3, 5)
            self.head = nn.Linear(5, 2)

        def forward(self, x):
            return self.head(self.rnn(x)[0])

    model, x = Tagger(), torch.randn(4, 2, 3)
    program = torch.export.export(model, (x,))
    assert not any("fastops" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), model(x))
