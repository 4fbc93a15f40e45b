"""fastops.nn.LayerNormLSTM: the formula by hand, torch's call forms, lengths, zoneout."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastops

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
    assert "eps=0.001" in repr(fastops.nn.LayerNormLSTM(3, 4, eps=1e-3))
    assert "eps" not in repr(fastops.nn.LayerNormLSTM(3, 4))
    with pytest.raises(TypeError, match="eps must be a number, got 'x'"):
        fastops.nn.LayerNormLSTM(3, 4, eps="x")


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


def test_an_engine_of_other_layers_in_the_environment_changes_nothing(monkeypatch):
    module, x = fastops.nn.LayerNormLSTM(3, 4), torch.randn(5, 2, 3)
    expected = module(x)[0]
    monkeypatch.setenv("FASTOPS_IMPL", "persistent")
    assert torch.equal(module(x)[0], expected)


def test_autocast_leaves_float64_alone_as_in_torch():
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    module, stock = fastops.nn.LayerNormLSTM(3, 4).double(), torch.nn.LSTM(3, 4).double()
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x)[0].dtype == stock(x)[0].dtype == torch.float64


def test_errors():
    module = fastops.nn.LayerNormLSTM(3, 4)
    x = torch.randn(5, 2, 3)
    zeros = torch.zeros(1, 2, 4)
    for call, kind in (
        (lambda: module(torch.randn(3)), ValueError),
        (lambda: module(torch.randn(5, 2, 7)), RuntimeError),
        (lambda: module(x.double()), ValueError),
        (lambda: module(x[:0]), RuntimeError),
        (lambda: module(x[:0], lengths=torch.tensor([0, 0])), RuntimeError),
        (lambda: module(x, (zeros[0], zeros[0])), RuntimeError),
        (lambda: module(x, (zeros, torch.zeros(1, 3, 4))), RuntimeError),
        (lambda: module(x, lengths=torch.tensor([6, 1])), ValueError),
        (lambda: fastops.nn.LayerNormLSTM(3, 4, zoneout=1.5), ValueError),
        (lambda: fastops.nn.LayerNormLSTM(3, 0), ValueError),
        (lambda: fastops.nn.LayerNormLSTM(3, 4, impl="cudnn"), ValueError),
        (lambda: fastops.nn.LayerNormLSTM(3, 4, impl="persistent"), ValueError),
    ):
        with pytest.raises(kind):
            call()
