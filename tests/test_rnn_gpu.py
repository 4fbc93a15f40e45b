"""The recurrent engines on a GPU: the real barrier, bf16, repeatability, CUDA graphs, lengths checked by the kernel."""

import pytest
import torch

from fastops.ops.rnn import recurrent_layer, reference, why_not
from fastops.ops.rnn_reference import stock
from tests.rule import assert_within_rule
from tests.test_rnn import MODES, Layer, assert_layer, engine

pytestmark = pytest.mark.gpu

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.fixture(autouse=True)
def repeatable_products(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def lengths_of(steps, batch):
    return torch.randint(0, steps + 1, (batch,), device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("impl", "hidden"), [("small", 128), ("small", 40), ("persistent", 256), ("persistent", 200)])
def test_against_stock(impl, hidden, mode, dtype):
    layer = Layer(mode, dtype, 17, 37, 48, hidden, 2, device="cuda")
    x, h0, c0, weights = layer.leaves(dtype)
    reason = why_not(mode, x, h0, c0, weights, None, False, impl)
    if reason is not None:
        pytest.skip(reason)
    # without gradients where relu jumps at zero
    if mode == "RNN_RELU":
        ours, stocks = (layer.run(f, gradients=False) for f in (engine(impl), stock))
        truth = layer.run(reference, torch.float64, gradients=False)
        for name in ("output", "h_n"):
            assert_within_rule(ours[name], stocks[name], truth[name], name)
        return
    assert_layer(layer, impl)
    assert_layer(layer, impl, lengths_of(17, 37), batch_first=True)


@pytest.mark.parametrize("hidden", [136, 192, 256, 320, 384, 512, 640, 768, 1024])
@pytest.mark.parametrize("batch", [1, 16, 33, 64, 130, 300])
def test_the_barrier_at_every_grid_size(hidden, batch):
    for mode in ("LSTM", "GRU"):
        assert_layer(Layer(mode, torch.float16, 9, batch, 32, hidden, 1, device="cuda"), "persistent")


@pytest.mark.parametrize("mode", MODES)
def test_step_engine_at_an_odd_size(mode):
    dtype = torch.float32 if mode == "RNN_RELU" else torch.float16
    layer = Layer(mode, dtype, 7, 19, 30, 1111, device="cuda")
    if mode != "RNN_RELU":
        assert_layer(layer, "step", lengths_of(7, 19))
    else:
        torch.testing.assert_close(
            layer.run(engine("step"), gradients=False)["output"],
            layer.run(reference, torch.float64, gradients=False)["output"].float(),
            rtol=1e-2,
            atol=1e-2,
        )


@pytest.mark.parametrize(("impl", "hidden"), [("persistent", 512), ("small", 64)])
def test_a_thousand_repeats_are_bitwise_equal(impl, hidden):
    layer = Layer("LSTM", torch.bfloat16, 16, 64, 64, hidden, device="cuda")
    x, h0, c0, weights = layer.leaves(torch.bfloat16)

    def once():
        output, h_n, c_n = recurrent_layer("LSTM", x, h0, c0, weights, impl=impl)
        found = torch.autograd.grad(output.float().square().sum(), [x, *weights[0]])
        return [output, h_n, c_n, *found]

    first = once()
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        for a, b in zip(first, once(), strict=True):
            different += (a != b).sum()
    assert different.item() == 0


@pytest.mark.parametrize(("impl", "hidden"), [("persistent", 256), ("small", 64), ("step", 96)])
def test_in_a_cuda_graph(impl, hidden):
    layer = Layer("GRU", torch.float16, 12, 16, 32, hidden, device="cuda")
    x, h0, _, weights = (y if not isinstance(y, torch.Tensor) else y.detach() for y in layer.leaves(torch.float16))
    call = engine(impl)
    with torch.no_grad():
        expected = call("GRU", x, h0, None, weights)[0]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = call("GRU", x, h0, None, weights)[0]
        output.zero_()
        graph.replay()
        torch.cuda.synchronize()
    assert torch.equal(output, expected)


@pytest.mark.parametrize(("impl", "hidden"), [("persistent", 256), ("small", 64), ("step", 96), ("torch", 64)])
def test_a_length_out_of_range_raises_in_a_later_call(impl, hidden):
    layer = Layer("LSTM", torch.float16, 4, 3, 8, hidden, device="cuda")
    layer.run(engine(impl), lengths=torch.tensor([1, 5, 4], device="cuda"), gradients=False)
    torch.cuda.synchronize()
    later = {"lengths": torch.tensor([1, 2, 4], device="cuda") if impl == "torch" else None, "gradients": False}
    with pytest.raises(ValueError, match=r"lengths\[1\]"):  # of stock PyTorch, calls with lengths alone look
        layer.run(engine(impl), **later)
    layer.run(engine(impl), **later)


def test_a_barrier_that_cannot_complete_is_reported_and_ends(monkeypatch):
    from fastops.kernels import rnn

    layer = Layer("LSTM", torch.float16, 64, 16, 8, 512, device="cuda")
    assert_layer(layer, "persistent")
    monkeypatch.setattr(rnn, "PATIENCE", 0)  # the first wait gives up at once
    found = layer.run(engine("persistent"), gradients=False)
    torch.cuda.synchronize()
    assert found["h_n"].isnan().any()
    with pytest.raises(RuntimeError, match="gave up"):
        layer.run(engine("persistent"), gradients=False)
    monkeypatch.undo()
    assert_layer(layer, "persistent")


def test_fp32_without_tf32_is_exact(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    layer = Layer("LSTM", torch.float32, 9, 16, 8, 32, device="cuda")
    assert_layer(layer, "small")
    assert_layer(Layer("LSTM", torch.float32, 9, 16, 8, 200, device="cuda"), "step")


@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
def test_auto_is_never_wrong(mode):
    for dtype in DTYPES:
        for hidden, batch in ((64, 4), (128, 64), (160, 48), (512, 24), (1200, 8)):
            assert_layer(Layer(mode, dtype, 20, batch, 80, hidden, 2, device="cuda"), "auto")
