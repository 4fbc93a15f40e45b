"""One direction of a layer-norm LSTM: kernels against the formula in float64, limits and errors."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastops
from fastops.ops import layer_norm_lstm as ops
from tests.conftest import GPU
from tests.rule import assert_within_rule


def arguments(steps, batch, hidden, dtype=torch.float32, device="cpu", batch_first=False):
    gates = torch.randn(*((batch, steps) if batch_first else (steps, batch)), 4 * hidden)
    tensors = [
        gates,
        torch.randn(4 * hidden, hidden) / hidden**0.5,
        1 + 0.2 * torch.randn(4 * hidden),
        1 + 0.2 * torch.randn(hidden),
        0.2 * torch.randn(hidden),
        torch.randn(batch, hidden),
        torch.randn(batch, hidden),
    ]
    return [t.to(device=device, dtype=dtype).requires_grad_() for t in tensors]


def run(tensors, dtype, impl, grads=(0, 1, 2), **options):
    tensors = [t.detach().to(dtype).requires_grad_() for t in tensors]
    outputs = ops.layer_norm_lstm(*tensors, impl=impl, **options)
    torch.manual_seed(7)
    weights = [torch.randn(o.shape, dtype=torch.float64).to(o) for o in outputs]
    loss = sum((outputs[k] * weights[k]).sum() for k in grads)
    found = torch.autograd.grad(loss, tensors, allow_unused=True)
    return [*outputs, *(torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True))]


def check(impl, tensors, **options):
    dtype = tensors[0].dtype
    ours, stock, truth = (
        run(tensors, d, i, **options) for d, i in ((dtype, impl), (dtype, "torch"), (torch.float64, "torch"))
    )
    for k, values in enumerate(zip(ours, stock, truth, strict=True)):
        assert_within_rule(*values, f"{impl} value {k}")


def options_for(steps, batch, hidden, reverse, batch_first, ragged, masks, device="cpu"):
    options = {"reverse": reverse, "batch_first": batch_first, "keep_h": 0.9, "keep_c": 0.8}
    if ragged:
        lengths = torch.arange(batch) % (steps + 1)
        options["lengths"] = lengths.flip(0).to(device)
    if masks:
        draws = torch.rand(2, steps, batch, hidden, device=device) > 0.3
        options |= {"mask_h": draws[0], "mask_c": draws[1]}
    return options


@pytest.mark.parametrize("impl", ["small", "step"])
@pytest.mark.parametrize("variant", list(itertools.product((False, True), repeat=4)), ids=str)
def test_every_variant(impl, variant):
    steps, batch, hidden = 3, 18 if impl == "small" else 4, 12
    tensors = arguments(steps, batch, hidden, batch_first=variant[1])
    check(impl, tensors, **options_for(steps, batch, hidden, *variant))


@pytest.mark.parametrize("impl", ["small", "step"])
def test_tensors_with_gaps(impl):
    tensors = arguments(3, 4, 12)
    tensors[2:5] = [torch.stack([t.detach(), t.detach() + 1], 1)[:, 0] for t in tensors[2:5]]
    masks = {name: (torch.rand(4, 3, 12) > 0.3).transpose(0, 1) for name in ("mask_h", "mask_c")}
    check(impl, tensors, **masks, lengths=torch.tensor([3, 0, 2, 0, 1, 0, 3, 0], dtype=torch.int32)[::2])


def row_errors(found, truth):
    """Largest error of each batch row: of the output (T, B, H), h_n and c_n (B, H)."""
    return [(f.double() - t).abs().transpose(0, -2).flatten(1).amax(1) for f, t in zip(found, truth, strict=True)]


@pytest.mark.parametrize("impl", ["small", "step"])
def test_rounding_over_many_rows(impl):
    """In units of what a rounding of the inputs does to a row, the mean square of all rows is at most twice stock's.

    A row whose candidate is nearly constant multiplies every rounding, so that no bound holds for the largest error.
    """
    with torch.no_grad():
        tensors = [t.detach() for t in arguments(3, 200 if impl == "small" else 50, 12)]
        exact = [t.double() for t in tensors]
        truth = ops.layer_norm_lstm(*exact, impl="torch")
        units = [torch.full((len(truth[1]),), 2.0**-24, dtype=torch.float64)] * 3
        for _ in range(4):
            rounded = [t * (1 + 2.0**-24 * (2 * torch.rand_like(t) - 1)) for t in exact]
            moved = row_errors(ops.layer_norm_lstm(*rounded, impl="torch"), truth)
            units = [torch.maximum(u, m) for u, m in zip(units, moved, strict=True)]
        ours, stock = (row_errors(ops.layer_norm_lstm(*tensors, impl=i), truth) for i in (impl, "torch"))
    for mine, theirs, unit in zip(ours, stock, units, strict=True):
        assert (mine / unit).square().mean().sqrt() <= 2 * (theirs / unit).square().mean().sqrt()


@pytest.mark.parametrize("impl", ["small", "step"])
@pytest.mark.parametrize(("steps", "batch", "hidden"), [(1, 1, 1), (2, 3, 16), (5, 2, 31)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sizes_and_dtypes(impl, steps, batch, hidden, dtype):
    # of one number normalised, the gradient is nothing but rounding: 1 unit only forward
    tensors = arguments(steps, batch, hidden, dtype)
    if hidden == 1:
        with torch.no_grad():
            ours = ops.layer_norm_lstm(*tensors, impl=impl)
            stock = ops.layer_norm_lstm(*tensors, impl="torch")
            truth = ops.layer_norm_lstm(*(t.double() for t in tensors), impl="torch")
        for values in zip(ours, stock, truth, strict=True):
            assert_within_rule(*values)
        return
    check(impl, tensors)


@pytest.mark.skipif(GPU, reason="bf16 is right on a GPU")
@pytest.mark.parametrize("impl", ["small", "step"])
def test_bf16_is_refused_by_the_interpreter(impl):
    with pytest.raises(fastops.KernelUnavailable, match="bf16 products wrongly"):
        ops.layer_norm_lstm(*arguments(2, 2, 8, torch.bfloat16), impl=impl)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["small", "step"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("steps", "batch", "hidden"), [(64, 70, 32), (40, 33, 50), (50, 64, 128), (20, 600, 64)])
@pytest.mark.parametrize("variant", [(False,) * 4, (True, False, True, True), (False, True, True, False)])
def test_on_gpu(impl, dtype, steps, batch, hidden, variant):
    tensors = arguments(steps, batch, hidden, dtype, "cuda", variant[1])
    if ops.why_not(tensors[0], hidden, impl) is not None:
        pytest.skip(ops.why_not(tensors[0], hidden, impl))
    options = options_for(steps, batch, hidden, *variant, device="cuda")
    check(impl, tensors, **options)
    again = (run(tensors, dtype, impl, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(*again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [512, 1000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_wide_rows_on_gpu(hidden, dtype):
    check("step", arguments(6, 20, hidden, dtype, "cuda"))


@pytest.mark.parametrize("impl", ["small", "step"])
@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2)])
def test_any_result_alone_has_its_gradient(impl, used):
    tensors = arguments(3, 2, 8)
    ours, truth = run(tensors, torch.float32, impl, used), run(tensors, torch.float64, "torch", used)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b.float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("impl", ["small", "step"])
def test_nothing_is_saved_without_a_backward(impl):
    tensors = [t.detach() for t in arguments(2, 3, 8)]
    lengths = torch.tensor([1, 2, 0])
    for options in ({}, {"lengths": lengths}, {"lengths": lengths, "reverse": True}):
        for a, b in zip(
            ops.layer_norm_lstm(*tensors, impl=impl, **options),
            ops.layer_norm_lstm(*(t.clone().requires_grad_() for t in tensors), impl=impl, **options),
            strict=True,
        ):
            assert torch.equal(a, b)
    saved = ops._forward(*tensors, None, None, None, 1.0, 1.0, 1e-5, False, False, False, impl)[3:]
    assert all(t.numel() == 0 for t in saved)


def test_reference_gradients():
    tensors = arguments(3, 2, 2, torch.float64)
    lengths = torch.tensor([3, 1])

    def function(*inputs):
        return ops.reference(*inputs, None, None, lengths, 0.9, 0.8, 1e-2, True, False)

    assert torch.autograd.gradcheck(function, tensors)


def test_double_backward(device):
    def second(impl, dtype):
        torch.manual_seed(3)
        tensors = [t.detach().to(device=device, dtype=dtype).requires_grad_() for t in arguments(3, 2, 4)]
        outputs = ops.layer_norm_lstm(*tensors, impl=impl)
        loss = sum(o.pow(2).sum() for o in outputs) + tensors[0].pow(3).sum()
        first = torch.autograd.grad(loss, tensors, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), tensors)

    for ours, stock, truth in zip(
        second("triton", torch.float32), second("torch", torch.float32), second("torch", torch.float64), strict=True
    ):
        scale = truth.abs().max()
        assert (ours - truth).abs().max() <= 4 * (stock - truth).abs().max() + 1e-5 * scale


@pytest.mark.parametrize("engine", ["small", "step"])
@pytest.mark.parametrize("save", [False, True])
def test_opcheck(engine, save, device):
    tensors = [t.detach() for t in arguments(2, 2, 8, device=device)]
    lengths = torch.tensor([2, 1], device=device)
    options = (None, None, lengths, 0.9, 1.0, 1e-5, True, False)
    torch.library.opcheck(ops._forward, (*tensors, *options, save, engine))
    output, h_n, _, _, c, product = ops._forward(*tensors, *options, True, engine)
    torch.library.opcheck(ops._backward, (output, h_n, None, *tensors[:5], c, product, *options, engine))


@pytest.mark.parametrize("impl", ["small", "step"])
@pytest.mark.parametrize("length", [3, 2**32 + 2])
def test_a_length_nobody_looked_at_is_clamped_and_raised_later(impl, length):
    """What a GPU does, where the values cannot be checked before the launch."""
    tensors = [t.detach() for t in arguments(2, 2, 4)]
    options = (1.0, 1.0, 1e-5, True, False, False, impl)
    wrong = ops._forward(*tensors, None, None, torch.tensor([2, length]), *options)
    with pytest.raises(ValueError, match=r"lengths\[1\]"):
        ops._forward(*tensors, None, None, torch.tensor([2, 2]), *options)
    right = ops._forward(*tensors, None, None, torch.tensor([2, 2]), *options)
    assert torch.equal(wrong[0], right[0])


def test_products_are_counted():
    tensors = arguments(3, 2, 4)
    counter = FlopCounterMode(display=False)
    with counter:
        ops.layer_norm_lstm(*tensors, impl="small")[0].sum().backward()
    product = 2 * 3 * 2 * 16 * 4
    found = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    assert found["fastops.layer_norm_lstm_forward"] == found["fastops.layer_norm_lstm_backward"] == product
    assert counter.get_total_flops() == 3 * product


@pytest.mark.parametrize("wrong", ["half", (0.1, "half"), None, True, (0.1, 0.2, 0.3), 1.5, float("nan")])
def test_zoneout_is_a_rate_or_two(wrong):
    with pytest.raises((TypeError, ValueError), match="zoneout must be a rate"):
        fastops.nn.LayerNormLSTM(3, 4, zoneout=wrong)
    assert fastops.nn.LayerNormLSTM(3, 4, zoneout=[0.1, 0.2]).zoneout == (0.1, 0.2)


def test_bad_arguments():
    good = [t.detach() for t in arguments(3, 2, 4)]
    for place, tensor, message in (
        (0, torch.randn(3, 2, 15), "gates"),
        (1, torch.randn(16, 5), "gates"),
        (2, torch.randn(4), "gain_hh"),
        (3, torch.randn(5), "gain_c"),
        (4, torch.randn(4).double(), "bias_c"),
        (5, torch.randn(3, 4), "h0"),
        (6, torch.randn(2, 4, device="meta"), "c0"),
    ):
        wrong = [tensor if k == place else t for k, t in enumerate(good)]
        with pytest.raises(ValueError, match=message):
            ops.layer_norm_lstm(*wrong, impl="triton")
    with pytest.raises(ValueError, match="mask_h"):
        ops.layer_norm_lstm(*good, mask_h=torch.ones(3, 2, 4, dtype=torch.bool))
    with pytest.raises(fastops.KernelUnavailable, match="float64"):
        ops.layer_norm_lstm(*(t.double() for t in good), impl="triton")
    for lengths, message in (
        ([4, 1], r"lengths\[0\].*4"),
        ([1, -1], r"lengths\[1\].*-1"),
        ([1.0, 2.0], "float32"),
        ([1], r"\(2,\)"),
    ):
        for impl in ("torch", "small", "step"):
            with pytest.raises(ValueError, match=message):
                ops.layer_norm_lstm(*good, lengths=torch.tensor(lengths), impl=impl)
    masks = {"mask_h": torch.ones(3, 2, 4), "mask_c": torch.ones(3, 2, 4)}
    with pytest.raises(ValueError, match="mask_h must be bool"):
        ops.layer_norm_lstm(*good, **masks)
    with pytest.raises(ValueError, match="'persistent'"):  # a row is normalised whole, never spread over programs
        ops.layer_norm_lstm(*good, impl="persistent")
    with pytest.raises(fastops.KernelUnavailable, match="hidden_size <= 32"):
        ops.layer_norm_lstm(*arguments(1, 1, 33), impl="small")
    with pytest.raises(ValueError, match="'cudnn'"):
        ops.layer_norm_lstm(*good, impl="cudnn")
