"""The registered ops in plain torch, and compiled graphs that go on with them where a kernel fails under "auto"."""

import warnings

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

import fastops
from fastops import _library
from fastops.ops import conv2d_contract, layer_norm_lstm, rnn
from tests.test_launch_failure import FAMILIES, plant, pytestmark, run, tensors_of, whole  # noqa: F401


def recorded(monkeypatch, call):
    """What each registered op was given and returned during a call."""
    seen = []

    def wrap(name, launcher):
        def launch(*arguments):
            results = launcher()(*arguments)
            copies = tree_map_only(torch.Tensor, lambda x: x.detach().clone(), (arguments, results))
            seen.append((name, *copies))
            return results

        return lambda: launch

    with monkeypatch.context() as patch:
        for name, launcher in list(_library.LAUNCHERS.items()):
            patch.setitem(_library.LAUNCHERS, name, wrap(name, launcher))
        call()
    return seen


def randn(*shapes):
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def backward(result):
    leaves = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor) and x.requires_grad]
    sum((x.float() ** 2).sum() for x in leaves).backward()


def conv(pool=None, dtype=torch.float32, bias=True, last=False):
    def call():
        x, w, b = (t.to(dtype) for t in randn((2, 3, 7, 6), (4, 3, 3, 2), (4,)))
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        options = {"stride": (2, 1), "padding": (1, 2), "impl": "triton"}
        if pool is None:
            return backward(fastops.conv2d_relu(x, w, b if bias else None, **options))
        return backward(fastops.conv2d_relu_max_pool2d(x, w, b if bias else None, **pool, **options))

    return call


def gradients_of_convolution():
    x, w, grad = torch.randn(2, 3, 7, 6), torch.randn(4, 3, 3, 2), torch.randn(2, 4, 4, 9)
    window = [2, 1], [1, 2], [1, 1]
    conv2d_contract.conv2d_input_grad(grad, w, x.shape[2:], *window)
    conv2d_contract.conv2d_weight_grad(x, grad, w.shape[2:], *window)


def attend(**options):
    def call():
        q, k, v = randn((2, 4, 5, 8), (2, 2, 6, 8), (2, 2, 6, 8))
        made = {name: value() if callable(value) else value for name, value in options.items()}
        backward(fastops.scaled_dot_product_attention(q, k, v, enable_gqa=True, impl="triton", **made))

    return call


def pack():
    q, k, v = randn((7, 2, 8), (7, 2, 8), (7, 2, 8))
    starts = torch.tensor([0, 3, 7], dtype=torch.int32)
    backward(fastops.varlen_attention(q, k, v, starts, starts, 4, 4, is_causal=True, impl="triton"))


def recur(mode, engine="small", lengths=None, batch_first=False, directions=2):
    def call():
        gates = {"LSTM": 4, "GRU": 3}.get(mode, 1)
        weights = [
            (*randn((gates * 4, 3), (gates * 4, 4)), *randn((gates * 4,), (gates * 4,))) for _ in range(directions)
        ]
        x = randn((2, 3, 3) if batch_first else (3, 2, 3))[0]
        ends = None if lengths is None else torch.tensor(lengths)
        backward(rnn.recurrent_layer(mode, x, None, None, weights, ends, batch_first, impl=engine))

    return call


def cell(name, gates):
    def call():
        x, h, c, *weights = randn((2, 3), (2, 4), (2, 4), (gates * 4, 3), (gates * 4, 4), (gates * 4,), (gates * 4,))
        state = (h, c) if name == "lstm_cell" else h
        backward(getattr(fastops, name)(x, state, *weights, impl="triton"))

    return call


def normalised(zoneout=None, lengths=None, save=True, **options):
    def call():
        batch_first = options.get("batch_first", False)
        gates, w_hh, gain, gain_c, bias_c, h, c = randn(
            (2, 3, 16) if batch_first else (3, 2, 16), (16, 4), (16,), (4,), (4,), (2, 4), (2, 4)
        )
        extra = {} if lengths is None else {"lengths": torch.tensor(lengths)}
        if zoneout == "masks":
            extra |= {"mask_h": torch.rand(3, 2, 4) < 0.6, "mask_c": torch.rand(3, 2, 4) < 0.6}
        if zoneout == "rates":
            extra |= {"keep_h": 0.7, "keep_c": 0.8}
        with torch.set_grad_enabled(save):
            out = layer_norm_lstm.layer_norm_lstm(
                gates, w_hh, gain, gain_c, bias_c, h, c, **{"impl": "small", **options}, **extra
            )
        if save:
            backward(out)

    return call


NAMES = {
    "attention": "attention",
    "conv2d_relu": ("conv2d", "bias_relu"),
    "layer_norm_lstm": "layer_norm_lstm",
    "rnn": ("rnn_forward", "rnn_backward"),
    "rnn_cell": ("lstm_cell", "gru_cell", "rnn_cell"),
}
CALLS = {
    "conv": conv(),
    "conv channels_last fp16": conv(dtype=torch.float16, last=True),
    "conv without bias": conv(bias=False),
    "pool": conv({"pool_size": 2}),
    "pool that overlaps, padded": conv({"pool_size": (3, 2), "pool_stride": (1, 2), "pool_padding": (1, 0)}, last=True),
    "gradients of a convolution": gradients_of_convolution,
    "attention": attend(is_causal=True, softcap=3.0),
    "attention lengths": attend(key_lengths=lambda: torch.tensor([4, 6])),
    "attention mask": attend(attn_mask=lambda: torch.randn(2, 4, 5, 6, requires_grad=True)),
    "attention dropout": attend(dropout_p=0.3),
    "packed attention": pack,
    "LSTM": recur("LSTM"),
    "LSTM ragged": recur("LSTM", lengths=[3, 2], batch_first=True),
    "GRU ragged": recur("GRU", lengths=[1, 3]),
    "RNN_TANH": recur("RNN_TANH", batch_first=True, directions=1),
    "RNN_RELU step": recur("RNN_RELU", "step"),
    "lstm_cell": cell("lstm_cell", 4),
    "gru_cell": cell("gru_cell", 3),
    "rnn_tanh_cell": cell("rnn_tanh_cell", 1),
    "rnn_relu_cell": cell("rnn_relu_cell", 1),
    "layer norm": normalised(),
    "layer norm reverse masks": normalised("masks", reverse=True),
    "layer norm ragged reverse rates": normalised("rates", [2, 3], reverse=True, batch_first=True),
    "layer norm without gradients": normalised(save=False),
    "layer norm step": normalised(impl="step"),
}


def name_of(op):
    """The name in _library.BROKEN."""
    for name, starts in NAMES.items():
        if op.startswith(starts):
            return name
    raise AssertionError(op)


@pytest.mark.parametrize("name", CALLS)
def test_each_registered_op_in_plain_torch_is_what_its_kernels_are(name, monkeypatch):
    seen = recorded(monkeypatch, CALLS[name])
    assert seen
    torch.use_deterministic_algorithms(False)
    for op, arguments, expected in seen:
        overload = getattr(torch.ops.fastops, op).or_stock
        monkeypatch.setattr(_library, "BROKEN", {name_of(op): "for this test"})
        found = overload(*arguments)
        for index, (ours, kernel) in enumerate(zip(tree_leaves(found), tree_leaves(expected), strict=True)):
            what = f"{op}, result {index}"
            assert (ours.shape, ours.dtype, ours.stride()) == (kernel.shape, kernel.dtype, kernel.stride()), what
            if ours.numel() and ours.is_floating_point() and ours.isnan().all() and op == "rnn_forward" and index > 2:
                continue  # what only the kernels of the backward pass read
            tolerance = {"rtol": 2e-2, "atol": 2e-3} if ours.dtype == torch.float16 else {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(ours, kernel, **tolerance, msg=lambda m, what=what: f"{what}: {m}")


def test_every_op_has_a_second_overload():
    in_graphs = set(_library.LAUNCHERS) - {"clamp_lengths"}  # a look at lengths that no graph takes
    assert {op._schema.name.partition("::")[2] for op in _library.OR_STOCK} == in_graphs


QUICK = ("conv2d_relu", "lstm_cell")


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_a_compiled_graph_goes_on_and_warns_once(name, direction, monkeypatch):
    family = FAMILIES[name]
    tensors = tensors_of(family)
    expected = run(family, tensors, "torch")
    family.take_kernels(monkeypatch)
    tries = plant(monkeypatch, getattr(family, direction))
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: family.call(*t, impl="auto"), backend="aot_eager", fullgraph=True)

    def call():
        out = compiled(*tensors)
        return out, *torch.autograd.grad(out.square().sum(), tensors)

    with pytest.warns(RuntimeWarning) as heard:
        found = call()
    heard = [str(w.message) for w in heard if "from now on" in str(w.message)]
    assert len(heard) == 1
    assert heard[0].startswith(f"{family.name}: stock PyTorch runs from now on")
    assert f"fastops::{getattr(family, direction)}" in heard[0]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*stock PyTorch runs from now on", RuntimeWarning)
        again = call()
    assert len(tries) == 1
    for ours, later, stock in zip(found, again, expected, strict=True):
        torch.testing.assert_close(ours, stock)
        torch.testing.assert_close(later, stock)


def test_a_compiled_graph_of_a_named_engine_raises(monkeypatch):
    family = FAMILIES["conv2d_relu"]
    tries = plant(monkeypatch, family.forward)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: family.call(*t, impl="triton"), backend="aot_eager", fullgraph=True)
    for _ in range(2):
        with pytest.raises(fastops.KernelUnavailable, match="shared memory"):
            compiled(*tensors_of(family))
    assert len(tries) == 2
    assert not _library.BROKEN
