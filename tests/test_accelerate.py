"""accelerate, restore, explain and accelerated: what changes, what stays and why, and that undoing is exact."""

import contextlib
import copy
import io
import logging
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import fastops
from fastops._accelerate import swap as accelerate_swap
from tests.accelerate_models import Everything, TorchvisionAlexNet
from tests.rule import assert_within_rule

TABLE = ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell", "MultiheadAttention"]
SMALL = {
    "LSTM": lambda: nn.LSTM(3, 4),
    "GRU": lambda: nn.GRU(3, 4),
    "RNN": lambda: nn.RNN(3, 4),
    "LSTMCell": lambda: nn.LSTMCell(3, 4),
    "GRUCell": lambda: nn.GRUCell(3, 4),
    "RNNCell": lambda: nn.RNNCell(3, 4),
    "MultiheadAttention": lambda: nn.MultiheadAttention(4, 2),
}


def classes(model):
    return {path: type(module) for path, module in model.named_modules()}


def hooks(module):
    return (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)


def test_same_object_same_parameters_same_keys():
    model = Everything()
    parameters = dict(model.named_parameters())
    keys = list(model.state_dict())
    assert fastops.accelerate(model) is model
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert list(model.state_dict()) == keys
    assert isinstance(model.rnn, nn.LSTM)
    assert type(model.rnn) is fastops.nn.LSTM
    assert type(model.encoder.layers[1]) is fastops.nn.TransformerEncoderLayer
    assert type(model.encoder.layers[1].self_attn) is fastops.nn.MultiheadAttention


def test_every_row_of_the_table_is_taken():
    report = fastops.explain(Everything())
    assert not report.kept
    assert {row.kind for row in report.accelerated} == {
        *("Conv2d + ReLU + MaxPool2d", "LSTM", "GRU", "RNN", "LSTMCell", "MultiheadAttention"),
        *("TransformerEncoder", "TransformerEncoderLayer", "TransformerDecoderLayer"),
    }


def test_restore_is_exact():
    model = Everything()
    before_classes, before_repr = classes(model), repr(model)
    before_dicts = {path: set(vars(module)) for path, module in model.named_modules()}
    fastops.accelerate(model)
    assert classes(model) != before_classes
    assert fastops.restore(model) is model
    assert classes(model) == before_classes
    assert repr(model) == before_repr
    assert {path: set(vars(module)) for path, module in model.named_modules()} == before_dicts


def test_twice_is_once():
    model = fastops.accelerate(Everything())
    after = classes(model)
    fastops.accelerate(model)
    assert classes(model) == after
    assert all(row.done for row in fastops.explain(model))
    fastops.restore(model)
    assert classes(model) == classes(Everything())


def test_restore_leaves_what_the_user_made_of_fastops():
    model = nn.Sequential(fastops.nn.LSTM(3, 4), nn.LSTM(4, 4))
    fastops.restore(fastops.accelerate(model))
    assert [type(module) for module in model] == [fastops.nn.LSTM, nn.LSTM]


@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_can_be_restored(copier):
    model = fastops.accelerate(Everything())
    model.features.register_forward_hook(_hook)
    if copier == "deepcopy":
        copied = copy.deepcopy(model)
    elif copier == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    assert classes(copied) == classes(model)
    assert len(copied.features._forward_hooks) == 1
    x = torch.randn(2, 1, 6, 6)
    assert torch.equal(copied(x), model(x))
    fastops.restore(copied)
    assert classes(copied) == classes(Everything())
    assert type(model.rnn) is fastops.nn.LSTM


def _hook(module, args, output):
    return None


def test_state_dicts_load_both_ways():
    stock, ours = Everything(), fastops.accelerate(Everything())
    ours.load_state_dict(stock.state_dict())
    stock.load_state_dict(ours.state_dict())
    x = torch.randn(2, 1, 6, 6)
    torch.testing.assert_close(ours(x), stock(x))


def test_hooks_stay_and_fire():
    model = Everything()
    seen = []
    model.rnn.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    fastops.accelerate(model)
    model(torch.randn(2, 1, 6, 6))
    assert seen == [fastops.nn.LSTM]


@pytest.mark.parametrize("before", [True, False], ids=["optimizer first", "accelerate first"])
def test_training_follows_stock(before):
    stock, ours = Everything(), Everything()
    ours.load_state_dict(stock.state_dict())
    if not before:
        fastops.accelerate(ours)
    optimizers = [torch.optim.SGD(model.parameters(), 0.1, momentum=0.9) for model in (stock, ours)]
    if before:
        fastops.accelerate(ours)
    x = torch.randn(2, 1, 6, 6)
    for _ in range(3):
        for model, optimizer in zip((stock, ours), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    for (name, a), (_, b) in zip(stock.named_parameters(), ours.named_parameters(), strict=True):
        torch.testing.assert_close(b, a, msg=name)


@pytest.mark.parametrize("cls", ["TorchvisionAlexNet", "Everything"])
def test_with_kernels_outputs_and_gradients_are_within_the_rule(cls, monkeypatch):
    model = (TorchvisionAlexNet(width=2) if cls == "TorchvisionAlexNet" else Everything()).train()
    x = torch.randn((2, 3, 63, 63) if cls == "TorchvisionAlexNet" else (2, 1, 6, 6))

    def run(model, x):
        model.zero_grad()
        out = model(x)
        out.square().sum().backward()
        return [out, *(parameter.grad for parameter in model.parameters())]

    truth = run(copy.deepcopy(model).double(), x.double())
    stock = run(copy.deepcopy(model), x)
    fastops.accelerate(model)
    monkeypatch.setenv("FASTOPS_IMPL", "triton")
    ours = run(model, x)
    assert_within_rule(ours[0], stock[0], truth[0], "output")
    # of a whole model the gradients are judged together, each in units of its largest: of a few numbers alone stock's
    # error is a matter of luck
    scales = [gradient.abs().max().clamp(min=1e-30) for gradient in truth[1:]]

    def together(gradients, dtype):
        return torch.cat([(g.double() / s).flatten() for g, s in zip(gradients, scales, strict=True)]).to(dtype)

    assert_within_rule(
        together(ours[1:], x.dtype), together(stock[1:], x.dtype), together(truth[1:], torch.float64), "gradients"
    )


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        ("rnn", {"rnn"}),
        ({"rnn", "attention"}, {"rnn", "attention"}),
        (["conv2d_relu"], {"conv2d_relu"}),
        (set(), set()),
        (None, {"conv2d_relu", "rnn", "attention"}),
    ],
)
def test_only(only, expected):
    model = Everything()
    assert {row.op for row in fastops.explain(model, only=only)} == expected
    fastops.accelerate(model, only=only)
    assert (type(model.rnn) is fastops.nn.LSTM) == ("rnn" in expected)
    assert (type(model.attention) is fastops.nn.MultiheadAttention) == ("attention" in expected)


def test_only_with_an_unknown_word():
    with pytest.raises(ValueError, match=r"conv2d_relu.*got \['conv'\]"):
        fastops.accelerate(Everything(), only={"conv"})


def test_filter_sees_modules_and_paths():
    model, seen = Everything(), {}

    def choose(module, path):
        seen[path] = module
        return path == "gru"

    fastops.accelerate(model, filter_fn=choose)
    assert type(model.gru) is fastops.nn.GRU
    assert type(model.rnn) is nn.LSTM
    assert seen["features.0"] is model.features[0]
    assert seen["encoder.layers.0"] is model.encoder.layers[0]


def test_a_module_itself():
    assert type(fastops.accelerate(nn.LSTM(3, 4))) is fastops.nn.LSTM
    (row,) = fastops.explain(nn.GRU(3, 4))
    assert (row.path, row.kind, row.op, row.becomes) == ("", "GRU", "rnn", "fastops.nn.GRU")


@pytest.mark.parametrize("wrong", [None, "model", nn.LSTM, torch.zeros(1)])
def test_no_module(wrong):
    for call in (
        fastops.accelerate,
        fastops.restore,
        fastops.explain,
        lambda model: fastops.accelerated(model).__enter__(),
    ):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
            call(wrong)


def test_shared_modules_are_swapped_once_and_stay_shared():
    shared = nn.LSTM(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared])})
    fastops.accelerate(model)
    assert model["a"] is model["b"][0] is shared
    assert len(fastops.explain(model)) == 1
    fastops.restore(model)
    assert type(shared) is nn.LSTM


class OwnLSTM(nn.LSTM):
    def forward(self, input, hx=None):
        return super().forward(input * 2, hx)


def parametrized():
    return parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")


def old_weight_norm():
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.GRUCell(3, 4), "weight_hh")


def pruned():
    module = nn.RNN(3, 4)
    prune.l1_unstructured(module, "weight_hh_l0", 0.5)
    return module


def patched():
    module = nn.LSTM(3, 4)
    module.forward = lambda *args: None
    return module


def compiled():
    module = nn.LSTM(3, 4)
    module.compile()
    return module


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: OwnLSTM(3, 4), "OwnLSTM, not exactly LSTM"),
        (parametrized, "parametrized"),
        (old_weight_norm, "recomputes its weight"),
        (pruned, "recomputes its weight"),
        (patched, "forward was replaced"),
        (compiled, "compiled on its own"),
    ],
    ids=["subclass", "parametrized", "weight_norm", "pruned", "patched forward", "compiled"],
)
def test_more_than_torchs_own_stays(make, reason):
    model = nn.ModuleList([make()])
    before = type(model[0])
    (row,) = fastops.explain(model)
    assert row.becomes is None
    assert reason in row.reason
    fastops.accelerate(model)
    assert type(model[0]) is before
    with pytest.raises(ValueError, match="strict"):
        fastops.accelerate(model, strict=True)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", ["Quantised", "DTensor"])
def test_tensor_subclass_parameters_stay(name, sharded):
    """But for the DTensors of FSDP2, which are whole again by the time forward runs."""
    model = nn.LSTM(3, 4)
    tensor_class = type(name, (torch.Tensor,), {})
    model.weight_hh_l0 = nn.Parameter(model.weight_hh_l0.detach().as_subclass(tensor_class))
    model._is_fsdp_managed_module = sharded
    (row,) = fastops.explain(model)
    assert row.reason == ("" if sharded and name == "DTensor" else f"its weight_hh_l0 is a {name}")


def test_a_weight_that_is_no_parameter_stays():
    model = nn.GRUCell(3, 4)
    weight = model._parameters.pop("weight_hh").detach()
    model.weight_hh = weight
    (row,) = fastops.explain(model)
    assert (row.becomes, row.reason) == (None, "its weight_hh is no parameter of its own")


def test_quantised_and_scripted_stay_with_the_reason():
    model = nn.ModuleDict({"lstm": nn.LSTM(3, 4), "linear": nn.Linear(4, 4)})
    with pytest.warns(DeprecationWarning, match="quantization"):
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM}, dtype=torch.qint8)
    (row,) = fastops.explain(quantised)
    assert "quantised" in row.reason
    with pytest.warns(DeprecationWarning, match="jit"):
        scripted = torch.jit.script(nn.Sequential(nn.GRU(3, 4)))
    (row,) = fastops.explain(scripted)
    assert (row.kind, row.becomes) == ("GRU", None)
    assert "scripted" in row.reason
    fastops.accelerate(scripted)


def test_on_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(2), nn.LSTM(4, 4))
    fastops.accelerate(model)
    assert model(torch.empty(2, 1, 4, 4, device="meta"))[0].shape == (2, 2, 4)
    model.to_empty(device="cpu")
    stock = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(2), nn.LSTM(4, 4))
    model.load_state_dict(stock.state_dict(), assign=True)
    x = torch.randn(2, 1, 4, 4)
    torch.testing.assert_close(model(x)[0], stock(x)[0])


def test_double_half_and_to():
    model = fastops.accelerate(Everything()).double()
    assert model(torch.randn(2, 1, 6, 6, dtype=torch.float64)).dtype == torch.float64
    assert model.to(torch.float32)(torch.randn(2, 1, 6, 6)).dtype == torch.float32


def test_strict_where_nothing_is():
    with pytest.raises(ValueError, match="nothing to accelerate"):
        fastops.accelerate(nn.Linear(2, 2), strict=True)
    with pytest.raises(ValueError, match="no attention to accelerate"):
        fastops.accelerate(nn.Sequential(nn.LSTM(3, 4)), only={"rnn", "attention"}, strict=True)


def test_strict_changes_nothing_when_it_raises(monkeypatch):
    model = nn.ModuleList([nn.LSTM(3, 4), OwnLSTM(3, 4)])
    with pytest.raises(ValueError, match="filter_fn chose modules that stay: 1 "):
        fastops.accelerate(model, filter_fn=lambda module, path: True, strict=True)
    assert type(model[0]) is nn.LSTM
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if not torch.cuda.is_available():
        with pytest.raises(fastops.KernelUnavailable, match="on the CPU"):
            fastops.accelerate(model, strict=True)
    assert type(model[0]) is nn.LSTM


def test_one_line_is_logged(caplog):
    caplog.set_level(logging.INFO, "fastops")
    model = nn.ModuleList([nn.LSTM(3, 4), OwnLSTM(3, 4), nn.Conv2d(1, 1, 1)])
    fastops.accelerate(model)
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    message = record.getMessage()
    assert "1 rnn" in message
    assert "2 stay" in message
    assert "OwnLSTM" in message
    assert "\n" not in message
    caplog.clear()
    fastops.accelerate(nn.Linear(1, 1))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING


def test_accelerated_undoes_only_what_it_did():
    model = Everything()
    fastops.accelerate(model, only="attention")
    before = classes(model)
    with fastops.accelerated(model) as inside:
        assert inside is model
        assert type(model.rnn) is fastops.nn.LSTM
    assert classes(model) == before
    with pytest.raises(ZeroDivisionError), fastops.accelerated(model):
        raise ZeroDivisionError
    assert classes(model) == before


def test_the_report_reads_well():
    report = fastops.explain(TorchvisionAlexNet())
    text = str(report)
    assert "features.0" in text
    assert "Conv2d + ReLU + MaxPool2d" in text
    assert "3 of 3 become fastops'." in text
    assert max(map(len, text.splitlines())) <= 132
    assert repr(report) == text
    assert len(report) == len(report.rows) == 3
    from rich.console import Console

    Console(file=io.StringIO(), width=60).print(report)
    assert "nothing" in str(fastops.explain(nn.Linear(1, 1))).lower()


def test_the_report_says_that_a_cpu_runs_stock(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "stock PyTorch" in fastops.explain(nn.LSTM(3, 4)).note


@torch.no_grad()
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_encoder_in_evaluation_with_padding(nested, impl, monkeypatch):
    monkeypatch.setenv("FASTOPS_IMPL", impl)
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    x, padding = torch.randn(3, 5, 8), torch.arange(5) >= torch.tensor([[5], [3], [1]])
    expected = model(x, src_key_padding_mask=padding)
    assert (expected[padding] == 0).all() == nested
    fastops.accelerate(model)
    assert type(model) is (nn.TransformerEncoder if nested else fastops.nn.TransformerEncoder)
    if nested and impl == "triton":
        with pytest.raises(fastops.KernelUnavailable, match="nested"):
            model(x, src_key_padding_mask=padding)
    else:
        found = model(x, src_key_padding_mask=padding)
        real = slice(None) if nested else ~padding
        torch.testing.assert_close(found[real], expected[real])


def test_explain_changes_nothing():
    model = Everything()
    before, state = classes(model), {path: dict(vars(module)) for path, module in model.named_modules()}
    fastops.explain(model, trace=True)
    assert classes(model) == before
    assert {path: dict(vars(module)) for path, module in model.named_modules()} == state


@pytest.mark.parametrize("name", TABLE)
def test_each_class_and_its_hookless_swap(name):
    model = fastops.accelerate(SMALL[name]())
    assert type(model) is getattr(fastops.nn, name)
    assert not any(map(len, hooks(model)))
    assert type(fastops.restore(model)) is getattr(nn, name)


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("make", [lambda: nn.LSTM(4, 6), lambda: Convolves()], ids=["LSTM", "Conv2d"])
def test_parametrized_after_it_was_accelerated(make, context):
    model = make()
    name = "weight_hh_l0" if isinstance(model, nn.LSTM) else "weight"
    x = torch.randn(5, 4) if isinstance(model, nn.LSTM) else torch.randn(1, 3, 6, 6)

    def results():
        found = model(x)
        return found[0] if isinstance(found, tuple) else found

    before = results()
    inner = model if isinstance(model, nn.LSTM) else model.conv
    kind = type(inner)
    with fastops.accelerated(model, trace=True) if context else contextlib.nullcontext():
        if not context:
            fastops.accelerate(model, trace=True)
        assert type(inner).__module__.startswith("fastops.")
        torch.nn.utils.parametrizations.weight_norm(inner, name)
        torch.testing.assert_close(results(), before)
    fastops.restore(model)
    assert isinstance(inner, kind)
    assert not type(inner).__mro__[1].__module__.startswith("fastops.")
    torch.testing.assert_close(results(), before)
    torch.nn.utils.parametrize.remove_parametrizations(inner, name)
    assert type(inner) is kind
    torch.testing.assert_close(results(), before)


class Convolves(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return nn.functional.relu(self.conv(x))


@pytest.mark.parametrize("make", [lambda: nn.LSTM(4, 6), lambda: nn.MultiheadAttention(8, 2)])
def test_an_attribute_of_the_users_that_ours_would_hide(make):
    module = make()
    module.impl = "mine"
    (row,) = fastops.explain(module).kept
    assert row.reason == "it has an attribute 'impl' of its own"
    kind = type(module)
    fastops.accelerate(module)
    assert type(module) is kind
    assert module.impl == "mine"


def test_an_error_half_way_changes_nothing(monkeypatch):
    model = nn.ModuleList([nn.LSTM(3, 4), nn.GRU(3, 4), nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())])
    kinds = [type(module) for module in model.modules()]
    swap = accelerate_swap.swap

    def breaks(module, new, **attributes):
        swap(module, new, **attributes)
        if isinstance(module, nn.GRU):
            raise RuntimeError("in the middle")

    monkeypatch.setattr(accelerate_swap, "swap", breaks)
    with pytest.raises(RuntimeError, match="in the middle"):
        fastops.accelerate(model)
    assert [type(module) for module in model.modules()] == kinds
    with pytest.raises(RuntimeError, match="in the middle"), fastops.accelerated(model):
        pass
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize(
    ("arguments", "message"), [({"only": 3}, "only must be a word"), ({"filter_fn": 3}, "filter_fn must be a function")]
)
def test_arguments_of_another_type(arguments, message):
    with pytest.raises(TypeError, match=message):
        fastops.accelerate(nn.LSTM(3, 4), **arguments)
