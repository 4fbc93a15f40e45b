"""Which engine runs and what is refused: the tables' reader, the machine's limits and `why_not`, without any kernel.

CUDA tensors here are fake ones: decisions read metadata alone, so they can be tested where there is no GPU.
"""

import contextlib
import json
import math
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pack_padded_sequence

import fastops
from fastops import KernelUnavailable, _env, _env_cli, scaled_dot_product_attention, tuning, varlen_attention
from fastops.__main__ import main
from fastops.nn import rnn as rnn_modules
from fastops.nn.rnn_sequences import Packing, check_lengths
from fastops.ops import attention, attention_checks, conv2d_relu, layer_norm_lstm, rnn, rnn_check
from fastops.ops.attention_reference import Options
from fastops.ops.conv2d_arguments import Pool, Window

CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """A machine with an H100, as far as decisions can see; call it to have another one."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("FASTOPS_IMPL", raising=False)
    monkeypatch.setattr(_env, "TRITON_INSTALLED", True)
    monkeypatch.setattr(torch.version, "hip", None)

    def choose(capability=(9, 0), name="NVIDIA H100 80GB HBM3", multiprocessors=132):
        monkeypatch.setattr(_env, "capability", lambda index: capability)
        monkeypatch.setattr(_env, "device_name", lambda index: name)
        monkeypatch.setattr(_env, "multiprocessors", lambda index: multiprocessors)

    choose()
    return choose


def fake(*sizes, dtype=torch.float16, device=CUDA):
    with FakeTensorMode(allow_non_fake_inputs=True):
        return torch.empty(sizes, dtype=dtype, device=device)


def assert_reason(found, pattern):
    if pattern is None:
        assert found is None
    else:
        assert re.search(pattern, found), found


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
    [None, "", "{", "[]", "{}", '{"rows": 3}', '{"rows": [{}]}', '{"rows": [{"engine": "a", "mark": "b", "when": 3}]}'],
)
def test_an_unreadable_table_warns_and_means_stock(text, tmp_path):
    if text is not None:
        (tmp_path / "op.json").write_text(text)
    with pytest.warns(UserWarning, match="op runs stock PyTorch") as heard:
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


# attention


def trio(*sizes, value=None, **options):
    sizes = sizes or (2, 4, 8, 64)
    last = sizes if value is None else (*sizes[:-1], value)
    return fake(*sizes, **options), fake(*sizes, **options), fake(*last, **options)


@pytest.mark.parametrize(
    ("tensors", "options", "reason"),
    [
        (lambda: trio(), {}, None),
        (lambda: trio(dtype=torch.bfloat16), {}, None),
        (lambda: trio(dtype=torch.float32), {"scale": 0.5}, None),
        (lambda: trio(dtype=torch.float64), {}, "float64"),
        (lambda: trio(2, 4, 8, 1), {}, None),
        (lambda: trio(2, 4, 8, 256), {}, None),
        (lambda: trio(2, 4, 8, 0), {}, "head dims 1 to 256, not 0"),
        (lambda: trio(2, 4, 8, 257), {}, "head dims 1 to 256, not 257"),
        (lambda: trio(value=32), {}, r"head dim of value \(32\)"),
        (lambda: trio(), {"scale": 0.0}, "positive scale"),
        (lambda: trio(), {"scale": -1}, "positive scale"),
        (lambda: trio(device="meta"), {}, "'meta'"),
    ],
)
def test_why_no_attention_kernel(gpu, tensors, options, reason):
    found = attention.why_not(*tensors(), **options)
    assert_reason(found, reason)


def test_why_no_attention_kernel_for_slopes_and_bf16(gpu, monkeypatch):
    slopes = torch.ones(4, requires_grad=True)
    assert "no gradient to alibi_slopes" in attention.why_not(*trio(), alibi_slopes=slopes)
    assert attention.why_not(*trio(), alibi_slopes=slopes.detach()) is None
    with torch.no_grad():
        assert attention.why_not(*trio(), alibi_slopes=slopes) is None
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "bf16" in attention.why_not(*trio(dtype=torch.bfloat16))
    assert attention.why_not(*trio(dtype=torch.float16)) is None


def engine(tensors, impl="auto", mask=None, options=None, lengths=(None, None), slopes=None, packed=False):
    options = options or Options(0.125)
    return attention._engine(impl, *tensors, mask, slopes, *lengths, None, options, packed=packed)


def test_which_engine_attention_takes(gpu, monkeypatch):
    seen = []
    rows = (tuning.Row("triton", "", "", (("head_dim", 64),)),)
    monkeypatch.setattr(attention, "_TABLE", rows)
    choose = tuning.choose
    monkeypatch.setattr(tuning, "choose", lambda table, facts: [seen.append(facts), choose(table, facts)][1])
    assert engine(trio()) == "triton"
    assert engine(trio(2, 4, 8, 32)) == "torch"  # no row
    assert engine(trio(dtype=torch.float64)) == "torch"
    assert engine(trio(), "torch") == "torch"
    assert engine(trio(2, 4, 8, 32), "triton") == "triton"
    assert engine(trio(device="cpu")) == "torch"
    for tensors, words in ((trio(dtype=torch.float64), "float64"), (trio(device="cpu"), "CPU")):
        with pytest.raises(KernelUnavailable, match=f"attention with impl='triton': .*{words}"):
            engine(tensors, "triton")
    monkeypatch.setenv("FASTOPS_IMPL", "triton")
    assert engine(trio(2, 4, 8, 32)) == "triton"
    with pytest.raises(KernelUnavailable, match="float64"):
        engine(trio(dtype=torch.float64))
    monkeypatch.delenv("FASTOPS_IMPL")
    seen.clear()
    gpu((8, 6))
    q, k, v = trio()
    engine((q, k, v), mask=fake(8, 8, dtype=torch.bool), lengths=(fake(2, dtype=torch.int32), None))
    engine((q.requires_grad_(), k, v), mask=fake(8, 8), lengths=(None, fake(2, dtype=torch.int32)), slopes=fake(4))
    with torch.no_grad():
        engine((q, k, v), packed=True)
    some = ("sm", "mask", "lengths", "alibi", "grad", "packed", "q_len", "head_dim", "head_dim_mod_8", "dtype")
    assert [tuple(facts[name] for name in some) for facts in seen] == [
        (86, "bool", True, False, False, False, 8, 64, 0, "float16"),
        (86, "float", True, True, True, False, 8, 64, 0, "float16"),
        (86, "none", False, False, False, True, 8, 64, 0, "float16"),
    ]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (Options(1.0), ()),
        (Options(1.0, -1, 0), ("causal",)),
        (Options(1.0, 0, 0), ("window",)),
        (Options(1.0, 3, 0), ("window",)),
        (Options(1.0, -1, 1), ("window",)),
        (Options(1.0, softcap=1.0), ("softcap",)),
        (Options(1.0, dropout_p=0.5), ("dropout",)),
    ],
    ids=str,
)
def test_facts_of_the_options(options, expected):
    found = attention.facts(head_dim=12, q_len=7, dtype=torch.float32, sm=90, options=options)
    switches = ("causal", "window", "softcap", "dropout", "lengths", "alibi", "grad", "packed")
    assert tuple(name for name in switches if found[name]) == expected
    assert (found["mask"], found["head_dim_mod_8"], found["q_len"]) == ("none", 4, 7)


@pytest.mark.parametrize(
    ("window", "causal", "expected"),
    [
        (None, False, (-1, -1)),
        (None, True, (-1, 0)),
        ((3, 2), False, (3, 2)),
        ((3, 2), True, (3, 0)),
        ((None, 0), False, (-1, 0)),
        ((-1, None), False, (-1, -1)),
        ([0, 0], False, (0, 0)),
    ],
)
def test_bounds(window, causal, expected):
    assert attention_checks.bounds(window, causal) == expected


@pytest.mark.parametrize("window", [3, (1,), (1, 2, 3), (1.0, 2), (True, 2), (1, "a")])
def test_bounds_of_no_pair(window):
    with pytest.raises(TypeError, match="window must be a pair"):
        attention_checks.bounds(window, False)


@pytest.mark.parametrize("window", [(-2, 0), (0, -2)])
def test_bounds_below_none(window):
    with pytest.raises(ValueError, match="window sides have to be >= 0"):
        attention_checks.bounds(window, True)


def test_numbers_at_their_limits():
    numbers = attention_checks.check_numbers
    assert numbers("f", 0, None, 0) == (0, None, 0)
    assert numbers("f", 1.0, 2, 3.5) == (1.0, 2, 3.5)
    assert numbers("f", True, torch.tensor(0.5), False) == (1.0, 0.5, 0.0)
    for given, error in (
        ((None, None, 0), TypeError),
        ((0, None, None), TypeError),
        ((torch.zeros(1), None, 0), TypeError),
        ((torch.tensor(0.5, requires_grad=True), None, 0), TypeError),
        ((1.01, None, 0), RuntimeError),
        ((-0.01, None, 0), RuntimeError),
        ((0, None, math.inf), ValueError),
        ((0, None, -0.01), ValueError),
    ):
        with pytest.raises(error):
            numbers("f", *given)


T = torch.zeros


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"key_lengths": T(2, 1, dtype=torch.int32)}, r"key_lengths must have shape \(2,\)"),
        ({"query_lengths": T(3, dtype=torch.int64)}, r"query_lengths must have shape \(2,\)"),
        ({"query_lengths": T(2, dtype=torch.int64, device="meta")}, "Expected query_lengths on the device of query"),
        ({"key_lengths": T(2, dtype=torch.bool)}, "key_lengths must be an integer tensor"),
        ({"attn_mask": T(5, 7, device="meta")}, "Expected attn_mask on the device of query"),
        ({"attn_mask": T(2, 3, 5, 6)}, "does not broadcast"),
        ({"attn_mask": T(1, 1, 3, 5, 7)}, "does not broadcast"),
        ({"alibi_slopes": T(2)}, r"alibi_slopes must have shape \(3,\) or \(2, 3\)"),
        ({"alibi_slopes": T(3, 2)}, "alibi_slopes must have shape"),
        ({"alibi_slopes": T(3, dtype=torch.int64)}, "floating point"),
        ({"alibi_slopes": T(3, device="meta")}, "Expected alibi_slopes on the device"),
        ({"key": T(2, 3, 7, 8), "value": T(2, 3, 6, 8)}, "same length"),
        ({"key": T(2, 3, 7, 9)}, "head dim of query and key"),
        ({"key": T(2, 2, 7, 8)}, "enable_gqa=True lets"),
        ({"query": T(8)}, "at least 2 dimensional"),
        ({"key": T(8)}, "at least 2 dimensional"),
        ({"value": T(8)}, "at least 2 dimensional"),
        ({"key": T(2, 3, 7, 8).half()}, "same dtype"),
        ({"value": T(2, 3, 7, 8).half()}, "same dtype"),
        ({"key": T(2, 3, 7, 8, device="meta")}, "same device"),
        ({"value": T(2, 3, 7, 8, device="meta")}, "same device"),
        ({"enable_gqa": True, "key": T(2, 2, 7, 8)}, "Number of heads in key must divide"),
        ({"enable_gqa": True, "value": T(2, 2, 7, 8)}, "Number of heads in value must divide"),
        ({"enable_gqa": True, "key": T(2, 0, 7, 8)}, "Number of heads in key must divide"),
        ({"enable_gqa": True, "key": T(3, 3, 7, 8), "value": T(3, 3, 7, 8)}, r"must match, but got (?!.*enable_gqa)"),
    ],
    ids=str,
)
def test_what_dense_attention_refuses(changes, words):
    given = {"query": T(2, 3, 5, 8), "key": T(2, 3, 7, 8), "value": T(2, 3, 7, 8), "enable_gqa": False}
    given |= dict.fromkeys(("attn_mask", "key_lengths", "query_lengths", "alibi_slopes"))
    attention_checks.check_dense(**given)
    with pytest.raises(RuntimeError, match=words):
        attention_checks.check_dense(**{**given, **changes})


def test_no_heads_are_an_error_not_a_crash():
    """torch divides by the number of heads, without looking, in a process that does not survive it."""
    q, k = T(2, 4, 5, 8), T(2, 0, 5, 8)
    with pytest.raises(RuntimeError, match="Number of heads in key must divide"):
        scaled_dot_product_attention(q, k, k, enable_gqa=True)
    assert scaled_dot_product_attention(k, k, k).shape == k.shape


@pytest.mark.parametrize(
    ("sizes", "changes"),
    [
        ((2, 3, 5, 8), {"key_lengths": torch.tensor([1, 2]), "query_lengths": torch.tensor([1, 2], dtype=torch.uint8)}),
        ((2, 3, 5, 8), {"alibi_slopes": T(3)}),
        ((2, 3, 5, 8), {"alibi_slopes": T(2, 3)}),
        ((2, 3, 5, 8), {"attn_mask": T(5, 5)}),
        ((2, 3, 5, 8), {"attn_mask": T(1, 3, 1, 5, dtype=torch.bool)}),
        ((3, 5, 8), {"attn_mask": T(3, 5, 5), "alibi_slopes": T(3)}),
        ((3, 5, 8), {"key_lengths": torch.tensor(2)}),
        ((5, 8), {"attn_mask": T(5, 5), "alibi_slopes": T(1)}),
        ((2, 4, 3, 5, 8), {"key_lengths": T(2, 4, dtype=torch.int64), "attn_mask": T(2, 1, 3, 5, 5)}),
        ((2, 3, 5, 8), {"enable_gqa": True, "key": T(2, 1, 7, 8), "value": T(2, 3, 7, 8), "attn_mask": T(2, 3, 5, 7)}),
        ((3, 5, 8), {"enable_gqa": True, "attn_mask": T(3, 5, 5)}),
        ((2, 0, 5, 8), {}),
    ],
    ids=str,
)
def test_what_dense_attention_takes(sizes, changes):
    given = {"query": T(sizes), "key": T(sizes), "value": T(sizes)} | changes
    assert scaled_dot_product_attention(**given).shape == sizes


def test_a_mask_of_one_dimension_is_taken_only_where_torch_takes_it():
    q, mask = T(2, 3, 5, 8), T(5, requires_grad=True)
    assert scaled_dot_product_attention(q, q, q, mask).shape == q.shape
    for given in (mask.detach(), mask):
        with torch.no_grad() if given is mask else contextlib.nullcontext(), pytest.raises(IndexError, match="2 dim"):
            scaled_dot_product_attention(q, q, q, given)
    for tensors in ((T(5, 8),) * 3, (q, T(5, 8), q), (q, q, T(5, 8))):
        with pytest.raises(IndexError, match="enable_gqa needs"):
            scaled_dot_product_attention(*tensors, enable_gqa=True)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"key": T(9, 3, 8), "value": T(9, 2, 8)}, RuntimeError, "Number of heads"),
        ({"key": T(9, 0, 8), "value": T(9, 0, 8)}, RuntimeError, "Number of heads"),
        ({"value": T(8, 2, 8)}, RuntimeError, "same length"),
        ({"cu_seqlens_q": T((), dtype=torch.int32)}, RuntimeError, r"cu_seqlens_q must have shape \(sequences"),
        ({"cu_seqlens_k": T(0, dtype=torch.int32)}, RuntimeError, r"cu_seqlens_k must have shape \(sequences"),
        ({"cu_seqlens_k": T(2, 1, dtype=torch.int32)}, RuntimeError, r"cu_seqlens_k must have shape \(sequences"),
        ({"cu_seqlens_k": T(3, dtype=torch.int32)}, RuntimeError, "same shape"),
        ({"cu_seqlens_k": T(2, dtype=torch.int32, device="meta")}, RuntimeError, "Expected cu_seqlens_k on the device"),
        ({"key": T(9, 16)}, RuntimeError, "total, H, D"),
        ({"max_seqlen_k": True}, TypeError, "max_seqlen_k"),
        ({"alibi_slopes": T(2, 4)}, RuntimeError, r"\(4,\) or \(1, 4\)"),
        ({"query": [1]}, TypeError, "'query' must be Tensor, not list"),
    ],
    ids=str,
)
def test_what_packed_attention_refuses(changes, error, words):
    given = {"query": T(5, 4, 8), "key": T(9, 2, 8), "value": T(9, 2, 8), "max_seqlen_q": 5, "max_seqlen_k": 9}
    given |= {"cu_seqlens_q": torch.tensor([0, 5]), "cu_seqlens_k": torch.tensor([0, 9])}
    assert varlen_attention(**given, alibi_slopes=T(1, 4)).shape == (5, 4, 8)
    with pytest.raises(error, match=words):
        varlen_attention(**{**given, **changes})
    with pytest.raises(TypeError, match="alibi_slopes"):
        varlen_attention(**given, alibi_slopes=[1.0])


# recurrent layers


def weights_of(mode, inputs, hidden, directions=1, bias=True, **options):
    rows = {"LSTM": 4, "GRU": 3}.get(mode, 1) * hidden
    make = lambda *sizes: fake(*sizes, **options)  # noqa: E731
    biases = (make(rows), make(rows)) if bias else (None, None)
    return [(make(rows, inputs), make(rows, hidden), *biases)] * directions


def rnn_reason(hidden, batch=4, mode="LSTM", engine="triton", batch_first=False, directions=1, **options):
    x = fake(*((batch, 5, 8) if batch_first else (5, batch, 8)), **options)
    return rnn.why_not(
        mode, x, None, None, weights_of(mode, 8, hidden, directions, **options), None, batch_first, engine
    )


def test_why_no_recurrent_kernel(gpu, monkeypatch):
    assert rnn_reason(128, engine="small") is None
    assert "at most 128, got 129" in rnn_reason(129, engine="small")
    assert "divisible by 8" in rnn_reason(132, engine="persistent")
    assert rnn_reason(1024, engine="persistent") is None
    assert "at most 1024" in rnn_reason(1032, engine="persistent")
    assert rnn_reason(128) is None  # small
    assert rnn_reason(512) is None  # persistent
    both = rnn_reason(1032)
    assert "at most 128" in both
    assert "at most 1024" in both
    for engine_name in ("auto", "torch"):
        assert rnn_reason(5000, engine=engine_name, dtype=torch.float64) is None
    for engine_name in ("triton", "small", "persistent", "step"):
        assert "float64" in rnn_reason(64, engine=engine_name, dtype=torch.float64)
        assert rnn_reason(64, engine=engine_name, dtype=torch.float64).count("float64") == 1
        assert "empty" in rnn_reason(64, batch=0, engine=engine_name)
        assert "CPU" in rnn_reason(64, engine=engine_name, device="cpu")
    assert rnn_reason(5000, engine="step") is None
    assert rnn_reason(64, dtype=torch.bfloat16) is None
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "bf16" in rnn_reason(64, dtype=torch.bfloat16, device="cpu")
    assert rnn_reason(64, dtype=torch.float16, device="cpu") is None
    assert rnn_reason(64, dtype=torch.float32, device="cpu") is None


def test_why_no_recurrent_kernel_in_fp32(gpu, monkeypatch):
    monkeypatch.setattr(rnn, "_tf32_allowed", lambda: False)
    limit = rnn.IEEE_HIDDEN
    assert rnn_reason(limit, engine="small", dtype=torch.float32) is None
    assert "without TF32" in rnn_reason(limit + 8, engine="small", dtype=torch.float32)
    assert rnn_reason(limit + 8, engine="small", dtype=torch.float16) is None
    assert rnn_reason(limit + 8, engine="step", dtype=torch.float32) is None
    monkeypatch.setattr(rnn, "_tf32_allowed", lambda: True)
    assert rnn_reason(limit + 8, engine="small", dtype=torch.float32) is None


def test_which_engine_a_recurrent_layer_takes(gpu, monkeypatch):
    def choose(hidden=512, impl="auto", batch_first=False, lengths=None, **options):
        sizes = (64, 128, 80) if batch_first else (128, 64, 80)
        weights = weights_of("LSTM", 80, hidden, **options)
        return rnn.choose("LSTM", fake(*sizes, **options), None, None, weights, lengths, batch_first, impl)

    seen = []
    monkeypatch.setattr(tuning, "choose", lambda table, facts: [seen.append(facts), table[0]][1])
    monkeypatch.setattr(rnn, "ROWS", (tuning.Row("persistent", "", "", ()),))
    assert choose() == "persistent"
    assert choose(batch_first=True, lengths=fake(64, dtype=torch.int64)) == "persistent"
    assert choose(1100) == "torch"  # the table names what cannot run
    assert choose(device="cpu") == "torch"
    assert choose(dtype=torch.float64) == "torch"
    some = ("mode", "dtype", "hidden", "input_size", "steps", "batch", "directions", "ragged", "capability", "gpu")
    first, second = ([facts[name] for name in some] for facts in seen[:2])
    assert first == ["LSTM", "float16", 512, 80, 128, 64, 1, False, 90, "NVIDIA H100 80GB HBM3"]
    assert second == [*first[:7], True, *first[8:]]
    assert [choose(hidden, "triton") for hidden in (64, 512)] == ["small", "persistent"]
    assert [choose(64, impl) for impl in ("small", "persistent", "step", "torch")] == [
        "small", "persistent", "step", "torch",
    ]  # fmt: skip
    with pytest.raises(KernelUnavailable, match=r"recurrent_layer\(impl='small'\): .*at most 128, got 512"):
        choose(512, "small")


NO_BIAS = (None, None)


def check_rnn(**changes):
    given = {"mode": "LSTM", "input": T(2, 3, 4), "h0": T(1, 3, 6), "c0": T(1, 3, 6), "lengths": None}
    given |= {"weights": [(T(24, 4), T(24, 6), T(24), T(24))], "batch_first": False}
    rnn_check.check(**{**given, **changes})


def test_what_a_recurrent_layer_takes():
    check_rnn()
    check_rnn(h0=None, c0=None)
    check_rnn(lengths=torch.tensor([0, 1, 2]))
    check_rnn(input=T(3, 2, 4), batch_first=True, lengths=torch.tensor([2, 2, 0], dtype=torch.uint8))
    check_rnn(mode="GRU", c0=None, weights=[(T(18, 4), T(18, 6), None, None)])
    check_rnn(weights=[(T(24, 4), T(24, 6), T(24), T(24))] * 2, h0=T(2, 3, 6), c0=T(2, 3, 6))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"input": T(0, 3, 4)}, RuntimeError, "sequence length"),
        ({"input": T(3, 0, 4), "batch_first": True}, RuntimeError, "sequence length"),
        ({"weights": []}, ValueError, "one or two directions, got 0"),
        ({"weights": [(T(24, 4), T(24, 6), None, None)] * 3}, ValueError, "one or two directions, got 3"),
        ({"weights": [(T(18, 4), T(24, 6), None, None)]}, RuntimeError, r"w_ih of direction 0 must be \(24, input"),
        ({"weights": [(T(24), T(24, 6), None, None)]}, RuntimeError, "w_ih of direction 0"),
        (
            {"weights": [(T(24, 4), T(24, 6), None, None), (T(24, 4), T(18, 6), None, None)]},
            RuntimeError,
            "w_hh of direction 1",
        ),
        ({"weights": [(T(24, 4), T(24, 6), T(24), None)]}, ValueError, "biases must be given"),
        ({"weights": [(T(24, 4), T(24, 6), None, T(24))]}, ValueError, "biases must be given"),
        ({"weights": [(T(24, 4), T(24, 6), T(23), T(24))]}, RuntimeError, "b_ih of direction 0"),
        ({"weights": [(T(24, 4), T(24, 6), T(24), T(24, 1))]}, RuntimeError, "b_hh of direction 0"),
        ({"mode": "GRU", "weights": [(T(18, 4), T(18, 6), None, None)]}, ValueError, "c0 is for an LSTM"),
        ({"h0": T(2, 3, 6)}, RuntimeError, "Expected hidden size"),
        ({"c0": T(1, 3, 6, device="meta")}, RuntimeError, "c0 tensor at meta"),
        ({"weights": [(T(24, 4), T(24, 6), T(24), T(24, device="meta"))]}, RuntimeError, "b_hh tensor at meta"),
        ({"c0": T(1, 3, 6).half()}, RuntimeError, "c0 with torch.float16"),
        ({"weights": [(T(24, 4), T(24, 6).half(), T(24), T(24))]}, ValueError, "does not match w_hh dtype"),
        ({"lengths": torch.tensor([0, 1, 3])}, ValueError, r"lengths\[2\] must be between 0 and T = 2, got 3"),
        ({"lengths": torch.tensor([0, -1, 2])}, ValueError, r"lengths\[1\]"),
        ({"lengths": torch.zeros(3, 1, dtype=torch.int32)}, ValueError, r"shape \(3,\)"),
        ({"lengths": torch.zeros(3, dtype=torch.int32, device="meta")}, ValueError, "device cpu, got meta"),
    ],
    ids=str,
)
def test_what_a_recurrent_layer_refuses(changes, error, words):
    with pytest.raises(error, match=words):
        check_rnn(**changes)


def test_lengths_become_int64():
    found = check_lengths(torch.tensor([1, 2], dtype=torch.int16), 2, 2, torch.device("cpu"))
    assert found.dtype == torch.int64
    assert found.tolist() == [1, 2]
    with pytest.raises(TypeError, match="lengths must be an integer tensor, got list"):
        check_lengths([1, 2], 2, 2, torch.device("cpu"))


@pytest.mark.parametrize("lengths", [[3, 3, 1], [4], [2, 1, 1, 1]])
def test_packing_goes_there_and_back(lengths):
    x = torch.randn(max(lengths), len(lengths), 2)
    packed = pack_padded_sequence(x, lengths)
    packing = Packing(packed)
    assert (packing.steps, packing.batch, packing.lengths.tolist()) == (max(lengths), len(lengths), lengths)
    padded = packing.pad(packed.data)
    inside = torch.arange(max(lengths))[:, None] < torch.tensor(lengths)
    assert torch.equal(padded, x * inside[..., None])
    assert torch.equal(packing.pack(padded), packed.data)


# convolutions


def conv_reason(x=(2, 64, 8, 8), w=(64, 64, 3, 3), impl="triton", groups=1, pool=None, dtype=torch.float16, **window):
    window = Window(**{"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "extra": (0, 0)} | window)
    tensors = [fake(*sizes, dtype=dtype) for sizes in (x, w, w[:1])]
    return conv2d_relu.why_not(*tensors, window, groups, pool, impl=impl)


@pytest.mark.parametrize("impl", ["triton", "hybrid"])
def test_why_no_convolution_kernel(gpu, impl, monkeypatch):
    assert conv_reason(impl=impl) is None
    assert conv_reason(impl=impl, dtype=torch.bfloat16) is None
    assert "float64" in conv_reason(impl=impl, dtype=torch.float64)
    pool = Pool((15, 17), (2, 2), (0, 0))
    assert conv_reason((2, 64, 40, 40), impl=impl, pool=pool) is None
    assert "255" in conv_reason((2, 64, 40, 40), impl=impl, pool=pool._replace(size=(16, 16)))
    limit = conv2d_relu.MAX_STEP
    assert conv_reason(impl=impl, stride=(limit, 1)) is None
    for window in ({"stride": (1, limit + 1)}, {"padding": (limit + 1, 1)}):
        assert re.search("larger than|pixels", conv_reason(impl=impl, **window))
    assert "larger than" in conv_reason(impl=impl, pool=pool._replace(size=(2, 2), stride=(1, limit + 1)))
    batch = conv2d_relu.MAX_PIXELS // 64
    assert conv_reason((batch, 64, 8, 8), impl=impl) is None
    assert "pixels" in conv_reason((batch + 1, 64, 8, 8), impl=impl)
    assert "pixels" in conv_reason((batch + 1, 64, 8, 8), impl=impl, padding=(0, 0))  # the input counts too
    assert "pixels" in conv_reason((batch, 64, 8, 8), impl=impl, padding=(2, 2))  # and the output
    dilated = {"x": (1, 64, 1, 8), "w": (64, 64, 1, 3)}
    assert "larger than" in conv_reason(**dilated, impl=impl, dilation=(limit + 1, 1))
    assert conv_reason(**dilated, impl=impl, dilation=(limit, 1)) is None
    with torch.autograd.forward_ad.dual_level():
        assert "forward-mode" in conv_reason(impl=impl)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "bfloat16" in conv_reason(impl=impl, dtype=torch.bfloat16)
    assert conv_reason(impl=impl) is None


def test_limits_of_the_triton_convolution_alone(gpu):
    for changes, words in (({"groups": 2, "w": (64, 32, 3, 3)}, "groups=1"), ({"w": (64, 64, 1, 32)}, "31 rows")):
        padded = {"x": (2, 64, 40, 40), "padding": (0, 0)}
        assert words in conv_reason(**padded, **changes)
        assert conv_reason(**padded, **changes, impl="hybrid") is None
    assert conv_reason((2, 64, 40, 40), (64, 64, 31, 31)) is None


def test_sparse_and_quantised_tensors_have_no_kernel(gpu):
    x, w, b = fake(2, 64, 8, 8), fake(64, 64, 3, 3), fake(64)
    window = Window((1, 1), (1, 1), (1, 1), (0, 0))
    sparse = torch.zeros(64).to_sparse()
    assert "bias is not a dense tensor" in conv2d_relu.why_not(x, w, sparse, window)
    assert conv2d_relu.why_not(x, w, None, window) is None
    assert conv2d_relu.why_not(x, w, b, window) is None


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
