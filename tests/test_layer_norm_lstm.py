"""LayerNormLSTM: kernels against the formula in float64, and the module around them."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
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
def test_a_length_nobody_looked_at_is_clamped_and_raised_later(impl):
    """What a GPU does, where the values cannot be checked before the launch."""
    tensors = [t.detach() for t in arguments(2, 2, 4)]
    options = (1.0, 1.0, 1e-5, True, False, False, impl)
    wrong = ops._forward(*tensors, None, None, torch.tensor([2, 3]), *options)
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
    with pytest.raises(fastops.KernelUnavailable, match="never spread over programs"):
        ops.layer_norm_lstm(*good, impl="persistent")
    with pytest.raises(fastops.KernelUnavailable, match="hidden_size <= 32"):
        ops.layer_norm_lstm(*arguments(1, 1, 33), impl="small")
    with pytest.raises(ValueError, match="'cudnn'"):
        ops.layer_norm_lstm(*good, impl="cudnn")


MODULES = [
    dict(zip(("num_layers", "bias", "batch_first", "bidirectional"), values, strict=True))
    for values in itertools.product((1, 2), (True, False), (False, True), (False, True))
]


def by_hand(module, x, lengths=None):
    """The formula, row by row and step by step, from the module's parameters."""

    def normal(v, gain, bias=0.0):
        v = v - v.mean()
        return v / (v.pow(2).mean() + module.eps).sqrt() * gain + bias

    x = x.transpose(0, 1) if module.batch_first else x
    rows, finals = [], []
    for b in range(x.shape[1]):
        steps = x.shape[0] if lengths is None else int(lengths[b])
        layer_input, states = x[:steps, b], []
        for k in range(module.num_layers):
            outputs = []
            for suffix in (f"_l{k}", f"_l{k}_reverse")[: 2 if module.bidirectional else 1]:
                w = {n.removesuffix(suffix): p for n, p in module.named_parameters() if n.endswith(suffix)}
                bias = w.get("bias_ih", 0) + w.get("bias_hh", 0)
                h = c = x.new_zeros(module.hidden_size)
                order = range(steps - 1, -1, -1) if suffix.endswith("reverse") else range(steps)
                own = [None] * steps
                for t in order:
                    gates = normal(w["weight_ih"] @ layer_input[t], w["gain_ih"]) + bias
                    i, f, g, o = (gates + normal(w["weight_hh"] @ h, w["gain_hh"])).chunk(4)
                    new = f.sigmoid() * c + i.sigmoid() * g.tanh()
                    out = o.sigmoid() * normal(new, w["gain_c"], w["bias_c"]).tanh()
                    z_h, z_c = module.zoneout
                    h, c = z_h * h + (1 - z_h) * out, z_c * c + (1 - z_c) * new
                    own[t] = h
                outputs.append(torch.stack(own))
                states.append((h, c))
            layer_input = torch.cat(outputs, -1)
        rows.append(torch.cat([layer_input, layer_input.new_zeros(x.shape[0] - steps, layer_input.shape[1])]))
        finals.append(states)
    output = torch.stack(rows, 0 if module.batch_first else 1)
    h_n = torch.stack([torch.stack([s[0] for s in states]) for states in finals], 1)
    c_n = torch.stack([torch.stack([s[1] for s in states]) for states in finals], 1)
    return output, (h_n, c_n)


def perturb(module):
    with torch.no_grad():
        for p in module.parameters():
            p += 0.1 * torch.randn_like(p)
    return module


@pytest.mark.parametrize("shape", MODULES, ids=str)
@pytest.mark.parametrize("ragged", [False, True])
def test_module_is_the_formula(shape, ragged):
    module = perturb(fastops.nn.LayerNormLSTM(3, 4, zoneout=(0.2, 0.4), dtype=torch.float64, **shape)).eval()
    x = torch.randn(*((2, 4) if module.batch_first else (4, 2)), 3, dtype=torch.float64)
    lengths = torch.tensor([2, 4]) if ragged else None
    output, (h_n, c_n) = module(x, lengths=lengths)
    expected, (h, c) = by_hand(module, x, lengths)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(h_n, h)
    torch.testing.assert_close(c_n, c)


def test_parameters_are_torchs_and_four_more():
    torch.manual_seed(1)
    stock = nn.LSTM(3, 4, 2, bidirectional=True)
    torch.manual_seed(1)
    module = fastops.nn.LayerNormLSTM(3, 4, 2, bidirectional=True)
    for name, p in stock.named_parameters():
        assert torch.equal(p, module.get_parameter(name))
    extra = set(module.state_dict()) - set(stock.state_dict())
    assert extra == {
        f"{n}_l{k}{d}" for n in ("gain_ih", "gain_hh", "gain_c", "bias_c") for k in (0, 1) for d in ("", "_reverse")
    }
    assert not module.load_state_dict(stock.state_dict(), strict=False).unexpected_keys
    before = {n: p.clone() for n, p in module.named_parameters()}
    torch.manual_seed(1)
    nn.LSTM(3, 4, 2, bidirectional=True)
    perturb(module)
    torch.manual_seed(1)
    module.reset_parameters()
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())
    assert "zoneout=(0.1, 0.1)" in repr(fastops.nn.LayerNormLSTM(3, 4, zoneout=0.1))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_call_forms(impl, device):
    module = perturb(fastops.nn.LayerNormLSTM(3, 4, 2, bidirectional=True, device=device, impl=impl))
    x = torch.randn(3, 3, 3, device=device)
    hx = (torch.randn(4, 3, 4, device=device), torch.randn(4, 3, 4, device=device))
    lengths = torch.tensor([2, 3, 1])
    output, (h, c) = module(x, hx, lengths=lengths.to(device))
    packed, (packed_h, packed_c) = module(pack_padded_sequence(x, lengths, enforce_sorted=False), hx)
    unpacked = pad_packed_sequence(packed, total_length=3)[0]
    for a, b in ((output, unpacked), (h, packed_h), (c, packed_c)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    for b in range(3):
        n = int(lengths[b])
        single, (h_1, c_1) = module(x[:n, b], (hx[0][:, b], hx[1][:, b]))
        for a, e in ((output[:n, b], single), (h[:, b], h_1), (c[:, b], c_1)):
            torch.testing.assert_close(a, e, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("impl", ["torch", "small", "step"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_padding_reaches_nothing(impl, batch_first, device):
    module = perturb(fastops.nn.LayerNormLSTM(3, 4, bidirectional=True, batch_first=batch_first, impl=impl).to(device))
    lengths = torch.tensor([2, 1, 0], device=device)
    padding = torch.arange(2, device=device) >= lengths.unsqueeze(1)
    padding = padding if batch_first else padding.t()
    x, found = torch.randn(*padding.shape, 3, device=device), []
    for filling in (0.0, float("nan")):
        x = x.masked_fill(padding.unsqueeze(-1), filling).requires_grad_()
        output, (h, c) = module(x, lengths=lengths)
        grads = torch.autograd.grad(output.sum() + h.sum() + c.sum(), [x, *module.parameters()])
        found.append([output, h, c, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert output[padding].eq(0).all()


@pytest.mark.parametrize("impl", ["small", "step"])
def test_two_halves_with_carried_state_and_permuted_rows(impl, device):
    module = perturb(fastops.nn.LayerNormLSTM(3, 4, device=device, impl=impl))
    x = torch.randn(3, 3, 3, device=device)
    whole, final = module(x)
    first, state = module(x[:1])
    second, again = module(x[1:], state)
    torch.testing.assert_close(torch.cat([first, second]), whole, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(again, final, atol=1e-6, rtol=1e-5)
    order = torch.tensor([2, 0, 1], device=device)
    torch.testing.assert_close(module(x[:, order])[0], whole[:, order], atol=1e-6, rtol=1e-5)
    assert torch.equal(module(x)[0], whole)


def test_zoneout_masks_come_from_torchs_generator(device):
    modules = [fastops.nn.LayerNormLSTM(3, 4, zoneout=(0.5, 0.3), device=device, impl=i) for i in ("torch", "triton")]
    modules[1].load_state_dict(modules[0].state_dict())
    x = torch.randn(6, 3, 3, device=device)
    outputs = []
    for module in (*modules, modules[0]):
        torch.manual_seed(4)
        outputs.append(module(x)[0])
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], modules[0](x)[0])
    torch.testing.assert_close(modules[0].eval()(x)[0], modules[1].eval()(x)[0], atol=1e-5, rtol=1e-5)
    frozen = fastops.nn.LayerNormLSTM(3, 4, zoneout=1.0, device=device)
    hx = torch.randn(1, 3, 4, device=device), torch.randn(1, 3, 4, device=device)
    output, (_, c) = frozen(x, hx)
    assert torch.equal(output, hx[0].expand_as(output))
    assert torch.equal(c, hx[1])


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_compiles_to_one_graph(impl, device):
    module = fastops.nn.LayerNormLSTM(3, 4, bidirectional=True, batch_first=True, device=device, impl=impl)
    x = torch.randn(2, 3, 3, device=device)
    lengths = torch.tensor([3, 1], device=device)
    compiled = torch.compile(lambda a: module(a, lengths=lengths)[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x, lengths=lengths)[0], atol=1e-6, rtol=1e-5)
    found = torch.autograd.grad(compiled(x).square().sum(), module.weight_hh_l0)[0]
    expected = torch.autograd.grad(module(x, lengths=lengths)[0].square().sum(), module.weight_hh_l0)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_copies_checkpoint_and_autocast():
    module = perturb(fastops.nn.LayerNormLSTM(3, 4, zoneout=0.1, impl="triton"))
    x = torch.randn(5, 2, 3, requires_grad=True)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other.eval()(x)[0], copy.deepcopy(module).eval()(x)[0])
    torch.manual_seed(2)
    expected = torch.autograd.grad(module(x)[0].sum(), x)[0]
    torch.manual_seed(2)
    output = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)[0]
    assert torch.equal(torch.autograd.grad(output.sum(), x)[0], expected)
    with torch.autocast("cpu", torch.float16):
        output, (h, c) = module(x)
    assert (output.dtype, h.dtype, c.dtype) == (torch.float16,) * 3
    output.float().sum().backward()
    assert module.gain_hh_l0.grad.dtype == torch.float32


def test_errors():
    module = fastops.nn.LayerNormLSTM(3, 4)
    x = torch.randn(5, 2, 3)
    zeros = torch.zeros(1, 2, 4)
    for call, kind in (
        (lambda: module(torch.randn(3)), ValueError),
        (lambda: module(torch.randn(5, 2, 7)), RuntimeError),
        (lambda: module(x.double()), ValueError),
        (lambda: module(x, (zeros[0], zeros[0])), RuntimeError),
        (lambda: module(x, (zeros, torch.zeros(1, 3, 4))), RuntimeError),
        (lambda: module(x, lengths=torch.tensor([6, 1])), ValueError),
        (lambda: fastops.nn.LayerNormLSTM(3, 4, zoneout=1.5), ValueError),
        (lambda: fastops.nn.LayerNormLSTM(3, 0), ValueError),
        (lambda: fastops.nn.LayerNormLSTM(3, 4, impl="cudnn"), ValueError),
        (lambda: fastops.nn.LayerNormLSTM(3, 4, impl="persistent")(x), fastops.KernelUnavailable),
    ):
        with pytest.raises(kind):
            call()
