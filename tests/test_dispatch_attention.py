"""Which engine attention takes, why not, and what its functionals refuse; no kernel."""

import contextlib
import math

import pytest
import torch

from fastops import KernelUnavailable, scaled_dot_product_attention, tuning, varlen_attention
from fastops.ops import attention, attention_checks
from fastops.ops.attention_reference import Options
from tests.pretended_gpu import assert_reason, fake


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
    monkeypatch.setattr(attention, "ROWS", rows)
    choose = tuning.choose
    monkeypatch.setattr(tuning, "choose", lambda table, facts: [seen.append(facts), choose(table, facts)][1])
    assert engine(trio()) == "triton"
    assert engine(trio(2, 4, 8, 32)) == "torch"  # no row
    assert engine(trio(dtype=torch.float64)) == "torch"
    assert engine(trio(), "torch") == "torch"
    assert engine(trio(2, 4, 8, 32), "triton") == "triton"
    assert engine(trio(device="cpu")) == "torch"
    for tensors, words in ((trio(dtype=torch.float64), "float64"), (trio(device="cpu"), "CPU")):
        with pytest.raises(KernelUnavailable, match=rf"scaled_dot_product_attention\(impl='triton'\): .*{words}"):
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
    some = ("capability", "mask", "lengths", "alibi", "grad", "packed", "q_len", "head_dim", "head_dim_mod_8", "dtype")
    assert [tuple(facts[name] for name in some) for facts in seen] == [
        (86, "bool", True, False, False, False, 8, 64, 0, "float16"),
        (86, "float", True, True, True, False, 8, 64, 0, "float16"),
        (86, "none", False, False, False, True, 8, 64, 0, "float16"),
    ]
    assert {facts["gpu"] for facts in seen} == {"NVIDIA H100 80GB HBM3"}


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
    found = attention.facts(
        head_dim=12, q_len=7, dtype=torch.float32, gpu={"gpu": "A", "capability": 90}, options=options
    )
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
        (
            {"key": T(9, 3, 8), "value": T(9, 2, 8)},
            RuntimeError,
            r"Number of heads.*query \(5, 4, 8\), key \(9, 3, 8\), value \(9, 2, 8\)",
        ),
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


def test_no_sequences_at_all():
    none = torch.tensor([0], dtype=torch.int32)
    attention_checks.check_packed(T(0, 4, 8), T(0, 2, 8), T(0, 2, 8), none, none)
    attention_checks.check_offsets(none, "cu_seqlens_q", 0, 0, "max_seqlen_q")
    with pytest.raises(ValueError, match="must start at 0"):
        attention_checks.check_offsets(none + 1, "cu_seqlens_q", 1, 1, "max_seqlen_q")
