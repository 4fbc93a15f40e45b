"""Which engine runs: the tables' reader, the machine's limits, modules, and what `fastops env` shows; no kernel."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fastops
from fastops import KernelUnavailable, _env, _env_cli, tuning
from fastops.__main__ import main
from fastops.nn import rnn as rnn_modules
from fastops.ops import layer_norm_lstm
from tests.pretended_gpu import CUDA, fake

# the tables


def row(when, engine="triton"):
    return {"engine": engine, "mark": "estimated", "why": f"because of {engine}", "when": when}


@pytest.mark.parametrize(
    ("when", "holds", "fails"),
    [
        ({"n": 3}, [3], [2, 4]),
        ({"n": [1, 3]}, [1, 3], [2]),
        ({"n": {"min": 3}}, [3, 4], [2]),
        ({"n": {"max": 3}}, [2, 3], [4]),
        ({"n": {"min": 2, "max": 4}}, [2, 3, 4], [1, 5]),
        ({"n": {"multiple_of": 8}}, [0, 8, 16], [1, 12]),
        ({"n": {"min": 9, "multiple_of": 8}}, [16], [8, 17]),
        ({"n": True}, [True], [False]),
        ({}, [0, 5], []),
        ({"other": 1}, [], [1]),
        ({"n": 3, "other": 1}, [], [3]),
    ],
    ids=str,
)
def test_a_row_holds_where_all_its_conditions_do(when, holds, fails, tmp_path):
    (tmp_path / "op.json").write_text(json.dumps({"rows": [row(when)]}))
    (found,) = tuning.load("op", tmp_path)
    for value in holds:
        assert tuning.choose((found,), {"n": value}) is found
    for value in fails:
        assert tuning.choose((found,), {"n": value}) is tuning.STOCK
    assert tuning.STOCK.engine == "torch"


def test_the_first_row_that_holds_decides(tmp_path):
    table = {"rows": [row({"n": 1}, "first"), row({}, "second"), row({"n": 2}, "never")]}
    (tmp_path / "op.json").write_text(json.dumps(table))
    rows = tuning.load("op", tmp_path)
    assert [tuning.choose(rows, {"n": n}).engine for n in (1, 2)] == ["first", "second"]
    assert (rows[0].mark, rows[0].why, rows[0].when) == ("estimated", "because of first", (("n", 1),))


@pytest.mark.parametrize(
    "text",
    [
        *(None, "", "\udcff", "{", "[]", "{}", '{"rows": 3}', '{"rows": [{}]}'),
        *(f'{{"rows": [{{"engine": "a", "mark": "b", "when": {when}}}]}}' for when in ("3", "[]")),
        *(
            f'{{"rows": [{{"engine": "a", "mark": "b", "when": {{"n": {{{bounds}}}}}}}]}}'
            for bounds in (
                '"mn": 3',
                '"min": 1, "most": 3',
                '"min": "3"',
                '"max": null',
                '"multiple_of": [8]',
                '"multiple_of": 0',
            )
        ),
    ],
)
def test_an_unreadable_table_warns_and_means_stock(text, tmp_path):
    if text is not None:
        (tmp_path / "op.json").write_text(text, errors="surrogateescape")
    with pytest.warns(UserWarning, match=r"op\.json is unreadable .*; op runs stock PyTorch") as heard:
        assert tuning.load("op", tmp_path) == ()
    assert heard[0].filename == __file__


def test_a_row_needs_no_reason_and_shipped_tables_are_found(tmp_path):
    (tmp_path / "op.json").write_text('{"rows": [{"engine": "a", "mark": "b", "when": {}}]}')
    assert tuning.load("op", tmp_path)[0].why == ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(tuning.load("rnn")) > 3


# the machine


@pytest.mark.parametrize("value", ["1", "true", "ON", "y", "yes"])
def test_interpreting(value, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert _env.interpreting() is True
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert _env.interpreting() is False
    monkeypatch.delenv("TRITON_INTERPRET")
    assert _env.interpreting() is False


def test_why_no_triton(gpu, monkeypatch):
    assert _env.why_no_triton(CUDA) is None
    gpu((8, 0))
    assert _env.why_no_triton(CUDA) is None
    gpu((7, 5))
    assert "sm_75" in _env.why_no_triton(CUDA)
    assert "start Python with TRITON_INTERPRET=1" in _env.why_no_triton(torch.device("cpu"))
    assert "'meta'" in _env.why_no_triton(torch.device("meta"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert _env.why_no_triton(torch.device("cpu")) is None
    assert _env.why_no_triton(CUDA) is None  # whatever the GPU is, it is not used
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "ROCm" in _env.why_no_triton(CUDA)
    monkeypatch.setattr(_env, "TRITON_INSTALLED", False)
    for device in (CUDA, torch.device("cpu")):
        assert "pip install triton" in _env.why_no_triton(device)


def test_index_of(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert _env.index_of(torch.device("cuda", 1)) == 1
    assert _env.index_of(torch.device("cuda")) == 3


def test_the_environment_overrides_auto_only(monkeypatch):
    allowed = ("auto", "triton", "torch")
    monkeypatch.delenv("FASTOPS_IMPL", raising=False)
    assert [_env.choose_impl(impl, allowed) for impl in allowed] == list(allowed)
    monkeypatch.setenv("FASTOPS_IMPL", "triton")
    assert [_env.choose_impl(impl, allowed) for impl in allowed] == ["triton", "triton", "torch"]
    monkeypatch.setenv("FASTOPS_IMPL", "persistent")  # another op's
    assert [_env.choose_impl(impl, allowed) for impl in allowed] == list(allowed)
    monkeypatch.setenv("FASTOPS_IMPL", "")
    assert _env.choose_impl("auto", allowed) == "auto"
    monkeypatch.setenv("FASTOPS_IMPL", "cuda")
    with pytest.raises(ValueError, match=r"FASTOPS_IMPL must be one of 'auto'.*got 'cuda'"):
        _env.choose_impl("auto", allowed)
    assert _env.choose_impl("torch", allowed) == "torch"
    with pytest.raises(ValueError, match=r"impl must be one of 'auto', 'triton', 'torch', got 'hybrid'"):
        _env.choose_impl("hybrid", allowed)


# layer-normed LSTM, modules, and what `fastops env` shows


def test_which_engine_a_layer_norm_lstm_takes(gpu, monkeypatch):
    seen = []
    monkeypatch.setattr(tuning, "choose", lambda table, facts: [seen.append(facts), tuning.Row("step", "", "", ())][1])

    def choose(hidden, impl="auto", **options):
        return layer_norm_lstm.choose(fake(5, 4, 4 * hidden, **options), hidden, impl)

    assert choose(64) == "step"
    some = ("small", "step", "hidden", "dtype", "gpu")
    assert [seen[0][name] for name in some] == [True, True, 64, "float16", "NVIDIA H100 80GB HBM3"]
    assert choose(layer_norm_lstm.MAX_STEP + 1) == "torch"  # neither can
    assert choose(64, dtype=torch.float64) == "torch"
    assert choose(64, device="cpu") == "torch"
    assert len(seen) == 1
    limit = layer_norm_lstm.MAX_SMALL[torch.float16]
    with pytest.raises(KernelUnavailable, match=f"hidden_size <= {limit}"):
        choose(limit + 1, "small")
    gpu((8, 6))
    elsewhere = min(limit, layer_norm_lstm.MAX_SMALL_ELSEWHERE)
    assert layer_norm_lstm.why_not(fake(5, 4, 4), elsewhere, "small") is None
    assert f"<= {elsewhere} " in layer_norm_lstm.why_not(fake(5, 4, 4), elsewhere + 1, "small")
    assert "fit one program" in layer_norm_lstm.why_not(fake(5, 4, 4), layer_norm_lstm.MAX_STEP + 1, "step")


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_module_asks_the_table_for_its_first_two_layers(gpu, monkeypatch, batch_first):
    module = fastops.nn.LSTM(8, 16, num_layers=3, batch_first=batch_first, device="meta")
    asked = []

    def choose(mode, stand_in, h0, c0, weights, lengths):
        asked.append((tuple(stand_in.shape), lengths is not None))
        return "small" if stand_in.shape[-1] == 16 else "torch"

    monkeypatch.setattr(rnn_modules.ops, "choose", choose)
    x = torch.empty((4, 7, 8) if batch_first else (7, 4, 8), device="meta")
    assert module._wins(x, False)
    assert asked == [((7, 4, 8), False), ((7, 4, 16), False)]
    asked.clear()
    assert module._wins(x[:, 0] if not batch_first else x[0], True)
    assert asked[0] == ((7, 1, 8), True)
    asked.clear()
    assert module._wins(pack_padded_sequence(torch.zeros(7, 2, 8), [7, 3]), False)
    assert asked[0] == ((7, 2, 8), True)
    monkeypatch.setattr(rnn_modules.ops, "choose", lambda *_: "torch")
    assert not module._wins(x, False)


def test_every_op_explains_what_auto_takes():
    choices = _env_cli.engine_choices()
    for choice in choices:
        assert choice["engine"] in _env.KNOWN_IMPLS
        assert choice["example"]
        assert choice["why"]
    tables = {path.stem for path in Path(tuning.__file__).parent.glob("*.json")}
    shown = {choice["op"] for choice in choices}
    assert len(shown) >= len(tables)
    assert {"attention", "conv2d_relu", "conv2d_relu_max_pool2d", "layer_norm_lstm"} <= shown


def test_env_shows_every_gpu(monkeypatch, capsys):
    gpu = {"name": "NVIDIA H100 80GB HBM3", "capability": "sm_90", "multiprocessors": 132, "memory_bytes": 80 * 2**30}
    monkeypatch.setattr(_env, "gpus", lambda: [gpu])
    monkeypatch.setattr(_env_cli, "import_milliseconds", lambda: 12.5)
    monkeypatch.setenv("COLUMNS", "200")
    for flags in ([], ["--json"]):
        assert main(["env", *flags]) == 0
        shown = capsys.readouterr().out
        assert "12.5" in shown
        assert "NVIDIA H100 80GB HBM3" in shown
        assert ("132 SMs, 80 GiB" in shown) != bool(flags)
