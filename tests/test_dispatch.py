"""Which engine runs: the tables' reader, the machine's limits, and what `fastops env` shows; no kernel."""

import json
import warnings
from pathlib import Path

import pytest
import torch

from fastops import _env, _env_cli, tuning
from fastops.__main__ import main
from tests.pretended_gpu import CUDA

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
        ({"n": {"multiple_of": 1, "min": 2}}, [2, 3], [1]),
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


def test_rows_ask_only_for_what_their_op_tells(monkeypatch):
    """A condition on a fact that no call has would never hold, and nobody would notice."""
    from fastops import ops

    told = []
    monkeypatch.setattr(tuning, "choose", lambda rows, facts: [told.append(set(facts)), tuning.STOCK][1])
    for module in ops.modules():
        told.clear()
        module.explain_auto()
        rows = module.ROWS
        assert {name for row in rows for name, _ in row.when} <= set.union(*told)
        assert {row.engine for row in rows} <= set(module.IMPLS) - {"auto"}
        assert all({"gpu", "capability"} <= facts for facts in told)


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


# what `fastops env` shows


def test_every_op_explains_what_auto_takes():
    choices = _env_cli.engine_choices()
    for choice in choices:
        assert choice["engine"] in _env.KNOWN_IMPLS
        assert choice["example"]
        assert choice["why"]
    tables = {path.stem for path in Path(tuning.__file__).parent.glob("*.json")}
    shown = {choice["op"] for choice in choices}
    assert tables == {"attention", "conv2d_relu", "layer_norm_lstm", "rnn", "rnn_cell"}
    recurrent = {"lstm_cell", "layer_norm_lstm", "recurrent_layer"}
    assert shown == {"attention", "conv2d_relu", "conv2d_relu_max_pool2d", *recurrent}


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
