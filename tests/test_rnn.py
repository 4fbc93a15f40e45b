"""The recurrent layer against float64: every engine, mode, direction, layout and length, values and gradients."""

import dataclasses
import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastops import KernelUnavailable
from fastops.ops.rnn import IMPLS, _forward_op, recurrent_layer, reference, why_not
from fastops.ops.rnn_check import lengths_of
from fastops.ops.rnn_reference import GATES, stock
from tests.conftest import GPU, needs_kernels
from tests.rule import assert_within_rule

MODES = tuple(GATES)
# several hidden tiles; a launch for each step in the interpreter, so kept small
TILED = {"LSTM": 24, "GRU": 24, "RNN_TANH": 72, "RNN_RELU": 72}
DTYPES = (torch.float32, torch.float16)


class Layer:
    """Arguments of recurrent_layer, rounded to a dtype and held in float64."""

    def __init__(self, mode, dtype, steps, batch, size, hidden, directions=1, bias=True, states=True, device="cpu"):
        def uniform(*shape):
            return ((torch.rand(*shape, dtype=torch.float64) * 2 - 1) * hidden**-0.5).to(dtype).double().to(device)

        gates = GATES[mode] * hidden
        self.mode, self.dtype, self.bias = mode, dtype, bias
        self.input = torch.randn(steps, batch, size, dtype=torch.float64).to(dtype).double().to(device)
        self.h0 = 2 * uniform(directions, batch, hidden) if states else None
        self.c0 = 2 * uniform(directions, batch, hidden) if states and mode == "LSTM" else None
        self.weights = [
            (uniform(gates, size), uniform(gates, hidden), *([uniform(gates), uniform(gates)] if bias else [None] * 2))
            for _ in range(directions)
        ]

    def leaves(self, dtype, batch_first=False):
        def leaf(x):
            return None if x is None else x.to(dtype).detach().clone().requires_grad_()

        x = self.input.transpose(0, 1).contiguous() if batch_first else self.input
        return leaf(x), leaf(self.h0), leaf(self.c0), [tuple(leaf(w) for w in each) for each in self.weights]

    def run(self, function, dtype=None, lengths=None, batch_first=False, gradients=True):
        """Results and gradients, by name."""
        x, h0, c0, weights = self.leaves(dtype or self.dtype, batch_first)
        results = function(self.mode, x, h0, c0, weights, lengths, batch_first)
        found = dict(zip(("output", "h_n", "c_n"), results, strict=True))
        if not gradients:
            return found
        names = ["input", "h0", "c0"] + [
            f"{n}{d}" for d in range(len(weights)) for n in ("w_ih", "w_hh", "b_ih", "b_hh")
        ]
        tensors = [x, h0, c0, *(w for each in weights for w in each)]
        wanted = {name: tensor for name, tensor in zip(names, tensors, strict=True) if tensor is not None}
        weighted = [(y.double() * ramp(y)).sum() for y in found.values() if y is not None]
        for name, gradient in zip(wanted, torch.autograd.grad(sum(weighted), list(wanted.values())), strict=True):
            found[f"d_{name}"] = gradient
        return found


def ramp(y):
    """Fixed weights without symmetry for a scalar loss."""
    return torch.cos(torch.arange(y.numel(), dtype=torch.float64, device=y.device) * 0.7).view(y.shape)


def engine(impl):
    return functools.partial(recurrent_layer, impl=impl)


def assert_layer(layer, impl, lengths=None, batch_first=False):
    ours = layer.run(engine(impl), lengths=lengths, batch_first=batch_first)
    stocks = layer.run(stock, lengths=lengths, batch_first=batch_first)
    truth = layer.run(reference, torch.float64, lengths, batch_first)
    for name, value in truth.items():
        assert (ours[name] is None) == (value is None), name
        if value is not None:
            assert_within_rule(ours[name], stocks[name], value, f"{layer.mode} {impl} {name}")


CASES = [
    # directions, ragged, batch_first, bias, states
    pytest.param(1, False, False, True, True, id="plain"),
    pytest.param(2, False, True, False, True, id="both-batch_first-no_bias"),
    pytest.param(2, True, False, True, False, id="both-ragged-no_states"),
    pytest.param(1, True, True, True, True, id="ragged-batch_first"),
]


def dtypes_of(mode):
    # the gradient of relu jumps where rounding changes a sign: compared in fp32 only
    return DTYPES[:1] if mode == "RNN_RELU" else DTYPES


@pytest.mark.parametrize(("directions", "ragged", "batch_first", "bias", "states"), CASES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("impl", ["small", "step"])
def test_values_and_gradients(device, impl, mode, directions, ragged, batch_first, bias, states):
    for dtype in dtypes_of(mode) if impl == "small" else DTYPES[:1]:
        layer = Layer(mode, dtype, 3, 17 if impl == "small" else 5, 7, 20, directions, bias, states, device)
        batch = layer.input.shape[1]
        lengths = torch.tensor([3, 1, 0, 2, 3] + [2] * (batch - 5), device=device) if ragged else None
        assert_layer(layer, impl, lengths, batch_first)


@needs_kernels
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_batch_too_large_for_the_grid_of_the_step_engine(device, batch_first):
    weights = [(torch.empty(8, 4, device=device), torch.empty(8, 8, device=device), None, None)]
    for batch, refused in ((262_140, False), (262_141, True)):
        input = torch.empty(1, device=device).expand(*((batch, 2) if batch_first else (2, batch)), 4)
        reason = why_not("RNN_TANH", input, None, None, weights, None, batch_first, "step")
        assert (reason is not None) == refused


@pytest.mark.parametrize("impl", ["small", "step"])
def test_lengths_with_gaps(device, impl):
    layer = Layer("GRU", torch.float32, 3, 4, 5, 8, device=device)
    lengths = torch.tensor([3, 0, 1, 0, 2, 0, 3, 0], dtype=torch.int32, device=device)[::2]
    assert_layer(layer, impl, lengths)


def test_lengths_as_the_kernels_read_them():
    assert lengths_of(None) is None
    for dtype in (torch.int32, torch.int64):
        lengths = torch.tensor([2, 3], dtype=dtype)
        assert lengths_of(lengths) is lengths
    for dtype in (torch.uint8, torch.int8, torch.int16):
        found = lengths_of(torch.tensor([2, 3], dtype=dtype))
        assert (found.dtype, found.tolist()) == (torch.int32, [2, 3])


@pytest.mark.parametrize("impl", ["small", "step", "persistent"])
@pytest.mark.parametrize("wrong", [4, -1, 2**32 + 2])
def test_a_length_nobody_looked_at_is_clamped_and_raised_later(device, impl, wrong):
    """What a GPU does, where the values cannot be checked before the launch; 32 bits would make 2 of the last."""
    layer = Layer("RNN_TANH", torch.float32, 3, 2, 4, 72 if impl == "persistent" else 8, states=False, device=device)
    x, _, _, weights = layer.leaves(torch.float32)

    def forward(*lengths):
        flat = [w.detach() for w in weights[0]]
        return _forward_op(
            x.detach(), None, None, flat, torch.tensor(lengths, device=device), "RNN_TANH", False, False, impl, False
        )[0]

    found = forward(2, wrong)
    if device.type == "cuda":
        torch.cuda.synchronize()
    with pytest.raises(ValueError, match=r"lengths\[1\]"):
        forward(2, 3)
    assert torch.equal(found, forward(2, min(max(wrong, 0), 3)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ragged", [False, True])
def test_persistent(device, mode, ragged):
    dtype = torch.float32 if mode == "RNN_RELU" or ragged else torch.float16
    layer = Layer(mode, dtype, 3, 5, 7, TILED[mode], 2 if ragged else 1, device=device)
    assert_layer(layer, "persistent", torch.tensor([2, 3, 0, 1, 3], device=device) if ragged else None, ragged)


def test_persistent_with_several_batch_tiles(device):
    assert_layer(Layer("LSTM", torch.float32, 2, 17, 3, 24, device=device), "persistent")


@pytest.mark.skipif(GPU, reason="the plan of a GPU is tested in test_rnn_gpu")
def test_persistent_with_tiles_of_32_rows(monkeypatch):
    """Larger batches take these: they load the saved slots after the product, and a launch for each group of tiles."""
    from fastops.kernels import rnn_plan

    plan = rnn_plan.persistent

    def wider(*args):
        return dataclasses.replace(plan(*args), block_b=32, group=2, batch_tiles=1)

    monkeypatch.setattr(rnn_plan, "persistent", wider)
    lengths = torch.tensor([2, 1, 0] * 11)
    assert_layer(Layer("LSTM", torch.float32, 2, 33, 3, 24), "persistent", lengths)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("directions", [1, 2])
def test_reference_is_torch(mode, directions):
    module = {"LSTM": torch.nn.LSTM, "GRU": torch.nn.GRU}.get(mode, torch.nn.RNN)
    options = {} if mode in ("LSTM", "GRU") else {"nonlinearity": mode[4:].lower()}
    module = module(3, 5, bidirectional=directions == 2, dtype=torch.float64, **options)
    weights = [tuple(module._flat_weights[4 * d : 4 * d + 4]) for d in range(directions)]
    layer = Layer(mode, torch.float64, 6, 4, 3, 5, directions)
    hx = (layer.h0, layer.c0) if mode == "LSTM" else layer.h0
    lengths = torch.tensor([3, 6, 1, 4])
    packed = torch.nn.utils.rnn.pack_padded_sequence(layer.input, lengths, enforce_sorted=False)
    for given, x in ((None, layer.input), (lengths, packed)):
        output, last = module(x, hx)
        if given is not None:
            output, _ = torch.nn.utils.rnn.pad_packed_sequence(output)
        expected = [output, *(last if mode == "LSTM" else (last, None))]
        for function in (reference, stock):
            found = function(mode, layer.input, layer.h0, layer.c0, weights, given)
            for ours, theirs in zip(found, expected, strict=True):
                assert (ours is None) == (theirs is None)
                if ours is not None:
                    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("impl", ["small", "step", "torch"])
@pytest.mark.parametrize("mode", ["LSTM", "RNN_TANH"])
def test_padding_reaches_nothing(device, impl, mode):
    layer = Layer(mode, torch.float32, 4, 3, 5, 8, 2, device=device)
    lengths = torch.tensor([4, 2, 1], device=device)
    clean = layer.run(engine(impl), lengths=lengths)
    padding = torch.arange(4, device=device).unsqueeze(1) >= lengths
    layer.input[padding] = float("nan")
    dirty = layer.run(engine(impl), lengths=lengths)
    assert dirty["output"][padding].eq(0).all()
    assert dirty["d_input"][padding].eq(0).all()
    for name, value in clean.items():
        if value is not None:
            assert torch.equal(value, dirty[name]), name


@pytest.mark.parametrize("mode", MODES)
def test_two_halves_are_one_whole(device, mode):
    layer = Layer(mode, torch.float32, 6, 3, 4, 16, device=device)
    x, h0, c0, weights = layer.leaves(torch.float32)
    run = functools.partial(recurrent_layer, mode, weights=weights, impl="small")
    whole = run(x, h0, c0)
    first = run(x[:2], h0, c0)
    second = run(x[2:], *first[1:])
    assert torch.equal(torch.cat([first[0], second[0]]), whole[0])
    assert torch.equal(second[1], whole[1])


@pytest.mark.parametrize("mode", MODES)
def test_a_permuted_batch_and_reversed_time(device, mode):
    layer = Layer(mode, torch.float32, 4, 5, 4, 16, 2, device=device)
    x, h0, c0, weights = layer.leaves(torch.float32)
    run = functools.partial(recurrent_layer, mode, impl="small")
    output, h_n, _ = run(x, h0, c0, weights)
    order = torch.tensor([3, 0, 4, 1, 2], device=device)
    permuted, *_ = run(x[:, order], h0[:, order], None if c0 is None else c0[:, order], weights)
    assert torch.equal(permuted, output[:, order])
    alone, last, _ = run(x.flip(0), h0[1:], None if c0 is None else c0[1:], weights[1:])
    assert torch.equal(alone.flip(0), output[..., 16:])
    assert torch.equal(last, h_n[1:])


def test_transposed_input_and_output_gradient_are_read_by_their_strides(device):
    layer = Layer("GRU", torch.float32, 4, 3, 5, 8, device=device)
    x, h0, _, weights = layer.leaves(torch.float32)
    straight = recurrent_layer("GRU", x, h0, None, weights, impl="small")[0]
    other = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    found = recurrent_layer("GRU", other, h0, None, weights, impl="small")[0]
    torch.testing.assert_close(found, straight)
    slope = torch.randn(8, 4, 3, device=device).permute(1, 2, 0)
    ours, theirs = (torch.autograd.grad(y, z, slope)[0] for y, z in ((found, other), (straight, x)))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kept", ["output", "h_n", "c_n"])
def test_gradient_of_one_result_alone(device, kept):
    layer = Layer("LSTM", torch.float32, 3, 2, 4, 8, device=device)
    found = {}
    for function in (engine("small"), stock):
        x, h0, c0, weights = layer.leaves(torch.float32)
        results = dict(zip(("output", "h_n", "c_n"), function("LSTM", x, h0, c0, weights), strict=True))
        wanted = [x, h0, c0, *weights[0]]
        found[function] = torch.autograd.grad((results[kept] * ramp(results[kept]).float()).sum(), wanted)
    for ours, theirs in zip(*found.values(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_only_what_needs_a_gradient_gets_one(device):
    layer = Layer("LSTM", torch.float32, 3, 2, 4, 8, device=device)
    x, h0, c0, weights = (y if not isinstance(y, torch.Tensor) else y.detach() for y in layer.leaves(torch.float32))
    w_hh = weights[0][1]
    fixed = [(weights[0][0].detach(), w_hh, weights[0][2].detach(), weights[0][3].detach())]
    recurrent_layer("LSTM", x, h0, c0, fixed, impl="small")[0].sum().backward()
    assert w_hh.grad is not None
    assert all(w.grad is None for w in (x, h0, c0, fixed[0][0]))


@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
def test_double_backward_differentiates_the_reference(device, mode):
    layer = Layer(mode, torch.float64, 2, 2, 2, 3, 2, device=device)
    x, h0, c0, weights = layer.leaves(torch.float32)
    y, *_ = recurrent_layer(mode, x, h0, c0, weights, impl="small")
    (d_x,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
    found = torch.autograd.grad((d_x.pow(2) + x**3).sum(), [x, weights[0][1]])
    x64, h64, c64, weights64 = layer.leaves(torch.float64)
    y64, *_ = reference(mode, x64, h64, c64, weights64)
    (d_x64,) = torch.autograd.grad(y64.pow(2).sum(), x64, create_graph=True)
    expected = torch.autograd.grad((d_x64.pow(2) + x64**3).sum(), [x64, weights64[0][1]])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_reference_passes_gradcheck(mode):
    layer = Layer(mode, torch.float64, 2, 2, 2, 2, 2)
    x, h0, c0, weights = layer.leaves(torch.float64)
    lengths = torch.tensor([2, 1])

    def function(x, h0, *rest):
        c, flat = (rest[0], rest[1:]) if mode == "LSTM" else (None, rest)
        results = reference(mode, x, h0, c, [flat[:4], flat[4:]], lengths)
        return tuple(y for y in results if y is not None)

    inputs = [x, h0, *([c0] if mode == "LSTM" else []), *(w for each in weights for w in each)]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_saved_bytes_are_as_documented(device):
    steps, batch, hidden = 4, 3, 16
    for mode, each in (("LSTM", 14), ("GRU", 10), ("RNN_TANH", 2)):
        layer = Layer(mode, torch.float16, steps, batch, 5, hidden, device=device)
        x, h0, c0, weights = layer.leaves(torch.float16)
        output, *_ = recurrent_layer(mode, x, h0, c0, weights, impl="small")
        known = {y.data_ptr() for y in (x, h0, c0, output, *weights[0]) if y is not None}
        saved = [y for y in output.grad_fn.saved_tensors if y is not None and y.data_ptr() not in known]
        assert sum(y.numel() * y.element_size() for y in saved) == each * hidden * steps * batch, mode


def test_inference_saves_nothing(device):
    layer = Layer("LSTM", torch.float16, 4, 3, 5, 16, device=device)
    x, h0, c0, weights = layer.leaves(torch.float16)
    with torch.no_grad():
        results = torch.ops.fastops.rnn_forward(x, h0, c0, list(weights[0]), None, "LSTM", False, False, "small", False)
    assert [y.numel() for y in results[3:]] == [0, 0, 0]


@pytest.mark.parametrize("impl", ["small", "persistent", "step"])
def test_repeats_bit_for_bit(device, impl):
    hidden = 24 if impl == "persistent" else 16
    layer = Layer("LSTM", torch.float16, 2, 3, 4, hidden, device=device)
    first, second = (layer.run(engine(impl)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_fp64_and_empty_batches_run_on_stock(device):
    layer = Layer("LSTM", torch.float64, 2, 3, 4, 5, device=device)
    for impl in ("small", "persistent", "step"):
        with pytest.raises(KernelUnavailable, match="float64"):
            layer.run(engine(impl))
    assert torch.equal(layer.run(engine("auto"))["output"], layer.run(stock)["output"])
    x, h0, c0, weights = layer.leaves(torch.float32)
    nothing = recurrent_layer("LSTM", x[:, :0], h0[:, :0], c0[:, :0], weights)
    assert nothing[0].shape == (2, 0, 5)
    assert "empty" in why_not("LSTM", x[:, :0], h0[:, :0], c0[:, :0], weights, engine="small")


@pytest.mark.parametrize("impl", ["small", "step"])
def test_odd_sizes_strides_and_nan(device, impl):
    for steps, batch, size, hidden in ((1, 1, 1, 1), (2, 1, 4, 5), (1, 3, 2, 33)):
        assert_layer(Layer("LSTM", torch.float32, steps, batch, size, hidden, device=device), impl)
    layer = Layer("LSTM", torch.float32, 3, 2, 4, 5, 2, device=device)
    _, _, _, weights = layer.leaves(torch.float32)
    turned = [tuple(w.t().contiguous().t() for w in each) for each in weights]
    h0 = torch.randn(2, 2, 5, device=device).transpose(0, 1)
    y = torch.randn(3, 2, 8, device=device)[..., ::2]
    y[1, 0, 0] = float("nan")
    y[0, 1, 0] = float("inf")
    ours = recurrent_layer("LSTM", y, h0, h0[:1].expand(2, 2, 5), turned, impl=impl)
    expected = reference("LSTM", y, h0, h0[:1].expand(2, 2, 5), weights)
    for found, value in zip(ours, expected, strict=True):
        torch.testing.assert_close(found, value, equal_nan=True)


@pytest.mark.parametrize("impl", ["small", "step"])
def test_the_gradient_of_a_nan_passes_a_relu_as_in_torch(device, impl):
    layer = Layer("RNN_RELU", torch.float32, 3, 2, 4, 5, device=device)
    _, _, _, weights = layer.leaves(torch.float32)
    found = []
    for function in (lambda *given: recurrent_layer(*given, impl=impl), reference):
        x = torch.zeros(3, 2, 4, device=device)
        x[1, 0] = float("nan")
        x.requires_grad_()
        h0 = torch.zeros(1, 2, 5, device=device, requires_grad=True)
        output = function("RNN_RELU", x, h0, None, weights)[0]
        found.append(torch.autograd.grad(output[2, 1].sum() + output[1, 0].sum(), [x, h0]))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, equal_nan=True)
    assert found[0][0][1, 0].any()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("place", ["h0", "d_h_n"])
@pytest.mark.parametrize("mode", ["RNN_TANH", "RNN_RELU"])
@pytest.mark.parametrize(("impl", "hidden"), [("small", 3), ("step", 3), ("persistent", 24)])
def test_what_is_not_finite_spreads_as_in_torch(device, impl, hidden, mode, place, value):
    layer = Layer(mode, torch.float32, 3, 2, 4, hidden, device=device)
    found = []
    for function in (engine(impl), stock):
        x, h0, _, weights = layer.leaves(torch.float32)
        slopes = [torch.ones(3, 2, hidden, device=device), torch.ones(1, 2, hidden, device=device)]
        with torch.no_grad():
            weights[0][1].abs_()  # no infinity meets another of the other sign
            (h0 if place == "h0" else slopes[1])[0, 0] = value
        results = function(mode, x, h0, None, weights)[:2]
        found.append([*results, *torch.autograd.grad(results, [x, h0, *weights[0]], slopes)])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, equal_nan=True)


def test_meta_tensors_run_on_stock():
    layer = Layer("LSTM", torch.float32, 3, 2, 4, 5)
    x, _, _, weights = layer.leaves(torch.float32)
    output, *_ = recurrent_layer("LSTM", x.to("meta"), None, None, [tuple(w.to("meta") for w in weights[0])])
    assert output.shape == (3, 2, 5)


@needs_kernels
def test_triton_chooses_by_hidden_size_and_says_why_not(device):
    big = Layer("LSTM", torch.float16, 2, 2, 2, 1100, device=device)
    x, h0, c0, weights = big.leaves(torch.float16)
    assert "1024" in why_not("LSTM", x, h0, c0, weights)
    with pytest.raises(KernelUnavailable, match=r"at most 128, got 1100.*at most 1024"):
        recurrent_layer("LSTM", x, h0, c0, weights, impl="triton")
    assert why_not("LSTM", x, h0, c0, weights, engine="step") is None


BAD = {
    "mode": ({"mode": "LSTMM"}, ValueError, "mode must be one of LSTM"),
    "2-D": ({"input": torch.zeros(3, 4)}, RuntimeError, "3 dimensions"),
    "no steps": ({"input": torch.zeros(0, 3, 4)}, RuntimeError, "sequence length"),
    "input size": ({"input": torch.zeros(2, 3, 5)}, RuntimeError, "Expected 4, got 5"),
    "h0": ({"h0": torch.zeros(1, 2, 6)}, RuntimeError, r"Expected hidden size \(1, 3, 6\), got \[1, 2, 6\]"),
    "c0": ({"c0": torch.zeros(1, 3, 5)}, RuntimeError, r"Expected hidden\[1\] size \(1, 3, 6\)"),
    "dtype": ({"input": torch.zeros(2, 3, 4, dtype=torch.float16)}, ValueError, "does not match w_ih dtype"),
    "dtype of a state": ({"h0": torch.zeros(1, 3, 6, dtype=torch.float16)}, RuntimeError, r"h0 with torch\.float16"),
    "lengths float": ({"lengths": torch.ones(3)}, ValueError, "integer"),
    "lengths shape": ({"lengths": torch.ones(2, dtype=torch.long)}, ValueError, r"shape \(3,\)"),
    "lengths negative": ({"lengths": torch.tensor([1, -1, 2])}, ValueError, r"lengths\[1\].*got -1"),
    "lengths long": ({"lengths": torch.tensor([1, 2, 3])}, ValueError, r"lengths\[2\].*T = 2, got 3"),
    "impl": ({"impl": "cuda"}, ValueError, "impl must be one of 'auto'"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("impl", ["small", "torch"])
def test_bad_input(case, impl):
    given, error, message = BAD[case]
    arguments = {
        "mode": "LSTM",
        "input": torch.zeros(2, 3, 4),
        "h0": torch.zeros(1, 3, 6),
        "c0": torch.zeros(1, 3, 6),
        "weights": [(torch.zeros(24, 4), torch.zeros(24, 6), None, None)],
        "impl": impl,
    }
    with pytest.raises(error, match=message):
        recurrent_layer(**(arguments | given))


@pytest.mark.skipif(GPU, reason="on a GPU the values are checked by the kernel, see test_rnn_gpu")
def test_a_length_out_of_range_is_reported_by_the_next_call():
    weights = [torch.zeros(4, 2), torch.zeros(4, 1)]
    x = torch.zeros(2, 3, 2)
    lengths = torch.tensor([1, 2, 3], dtype=torch.int32)
    call = functools.partial(torch.ops.fastops.rnn_forward, x, None, None, weights)
    call(lengths, "LSTM", False, False, "small", False)
    with pytest.raises(ValueError, match=r"lengths\[2\]"):
        call(None, "LSTM", False, False, "small", False)
    call(None, "LSTM", False, False, "small", False)


@pytest.mark.parametrize("impl", ["small", "torch"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(device, impl, dynamic):
    layer = Layer("LSTM", torch.float32, 3, 2, 4, 8, 2, device=device)
    lengths = torch.tensor([3, 1], device=device)
    torch._dynamo.reset()
    compiled = torch.compile(engine(impl), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for given in (None, lengths):
        ours, expected = layer.run(compiled, lengths=given), layer.run(engine(impl), lengths=given)
        for name, value in expected.items():
            if value is not None:
                torch.testing.assert_close(ours[name], value, msg=name)


# stock's backward builds a graph, which the dispatch modes of opcheck do not let an op do
@pytest.mark.parametrize(
    ("name", "kind"), [("rnn_forward", "small"), ("rnn_backward", "small"), ("rnn_forward", "torch")]
)
def test_opcheck(device, name, kind):
    layer = Layer("GRU", torch.float32, 3, 2, 4, 8, device=device)
    x, h0, _, weights = layer.leaves(torch.float32)
    x, h0, weights = x.detach(), h0.detach(), [w.detach() for w in weights[0]]
    forward = (x, h0, None, weights, None, "GRU", False, False, kind)
    results = torch.ops.fastops.rnn_forward(*forward, True)
    if name == "rnn_forward":
        torch.library.opcheck(torch.ops.fastops.rnn_forward.default, (*forward, True))
        return
    saved = (results[0], *results[3:])
    arguments = (results[0], None, None, x, h0, None, weights, None, *saved, "GRU", False, False, kind)
    needs = [True, True, False, True, True, True, True]
    torch.library.opcheck(torch.ops.fastops.rnn_backward.default, (*arguments, needs))


def test_checkpoint_autocast_and_functional_gradients(device):
    layer = Layer("GRU", torch.float32, 3, 2, 4, 8, device=device)
    plain = layer.run(engine("small"))
    again = layer.run(lambda *args: checkpoint(functools.partial(engine("small"), *args), use_reentrant=False))
    assert all(torch.equal(plain[name], again[name]) for name in plain if plain[name] is not None)

    x, h0, _, weights = layer.leaves(torch.float32)
    with torch.autocast(device.type, dtype=torch.float16):
        low = recurrent_layer("GRU", x, h0, None, weights, impl="small")
    cast = torch.float16 if device.type == "cuda" else torch.float32  # autocast knows no GRU on the CPU
    assert low[0].dtype == low[1].dtype == cast
    low[0].sum().backward()
    assert x.grad.dtype == torch.float32

    def loss(x):
        return (recurrent_layer("GRU", x, h0.detach(), None, fixed, impl="small")[0] * ramp(plain["output"])).sum()

    fixed = [tuple(w.detach() for w in weights[0])]
    expected = torch.autograd.grad(loss(x), x)[0]
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), expected)


def test_flops_are_those_of_the_products(device):
    from torch.utils.flop_counter import FlopCounterMode

    layer = Layer("LSTM", torch.float32, 3, 2, 4, 8, 2, device=device)
    with FlopCounterMode(display=False) as counter:
        layer.run(engine("small"))
    forward = 2 * 3 * 2 * (4 + 8) * 4 * 8 * 2
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    assert counts["fastops.rnn_forward"] == forward
    assert counts["fastops.rnn_backward"] == 2 * forward


def test_tables_name_engines():
    from fastops.ops import rnn

    assert {row.engine for row in rnn.ROWS} <= set(IMPLS) - {"auto", "triton"}
    assert all(row.mark and row.why for row in rnn.ROWS)
    found = {row["example"]: row["engine"] for row in rnn.explain_auto()}
    assert found["LSTM bf16 H=512 B=64"] == "persistent"
    assert found["LSTM fp16 H=512 B=64"] == "torch"
