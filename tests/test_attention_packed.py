"""Packed attention: numbers against one dense float64 attention a sequence."""

import math
import warnings

import pytest
import torch

import fastops
from fastops.ops import attention_dropout
from tests.rule import assert_within_rule
from tests.test_attention import attention
from tests.test_attention_dropout import seed_of_next_call

LENGTHS_Q = [3, 70, 0, 1, 20]
LENGTHS_K = [3, 130, 5, 0, 90]


def offsets(lengths, device, dtype=torch.int32):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device=device, dtype=dtype)


def packed(device, D=16, H=4, Hk=2, dtype=torch.float16, lengths_q=LENGTHS_Q, lengths_k=LENGTHS_K):
    sizes = ((sum(lengths_q), H), (sum(lengths_k), Hk), (sum(lengths_k), Hk), (sum(lengths_q), H))
    return [torch.randn(total, heads, D, device=device).to(dtype) for total, heads in sizes]


def from_the_last_key(q_len, k_len):
    """How far each key stands behind each query, the last of both at one place."""
    return torch.arange(k_len) - torch.arange(q_len)[:, None] - (k_len - q_len)


def bottom_right(q_len, k_len, *, causal=False, window=None):
    """The dense mask whose last query stands at the last key."""
    distance = from_the_last_key(q_len, k_len)
    seen = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        seen &= distance <= 0
    if window is not None:
        seen &= distance >= -window[0]
        seen &= distance <= window[1]
    return seen


def check(
    device, *, masks=None, dropout_p=0.0, is_causal=False, window=None, alibi_slopes=None, impl="triton", **options
):
    q, k, v, g = packed(device)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    keeps = masks() if masks else None
    cu_q, cu_k = offsets(LENGTHS_Q, device), offsets(LENGTHS_K, device, torch.int64)
    out, lse = fastops.varlen_attention(
        *leaves, cu_q, cu_k, max(LENGTHS_Q), max(LENGTHS_K), dropout_p, is_causal,
        window=window, alibi_slopes=alibi_slopes, return_lse=True, impl=impl, **options,
    )  # fmt: skip
    ours = [out, lse, *torch.autograd.grad((out * g).sum(), leaves)]
    results = []
    for dtype in (q.dtype, torch.float64):
        parts = []
        for i, (n, m) in enumerate(zip(LENGTHS_Q, LENGTHS_K, strict=True)):
            rows, keys = slice(cu_q[i], cu_q[i] + n), slice(cu_k[i], cu_k[i] + m)
            if n == 0 or m == 0:
                shapes = ((4, n, 16), (4, n), (4, n, 16), (2, m, 16), (2, m, 16))
                fill = [0.0, -math.inf, 0.0, 0.0, 0.0]
                parts.append([torch.full(s, f, dtype=dtype) for s, f in zip(shapes, fill, strict=True)])
                continue
            trio = [
                x.detach().cpu().to(dtype)[s].transpose(0, 1)[None]
                for x, s in ((q, rows), (k, keys), (v, keys), (g, rows))
            ]
            none = {"key_lengths": None, "query_lengths": None, "window": None, "alibi_slopes": None}
            mask = bottom_right(n, m, causal=is_causal, window=window)
            if alibi_slopes is not None:
                bias = -alibi_slopes[i, :, None, None].cpu() * from_the_last_key(n, m).abs()
                mask = torch.where(mask, bias, -math.inf).to(dtype)
            found = attention(
                *trio, attn_mask=mask, is_causal=False,
                keep=None if keeps is None else keeps[i], dropout_p=dropout_p, **{**none, **options},
            )  # fmt: skip
            parts.append([x[0] for x in found[:5]])
        results.append([torch.cat([p[i] for p in parts], 1).transpose(0, 1) for i in range(5)])
    for name, a, stock, truth in zip(("out", "lse", "dq", "dk", "dv"), ours, *results, strict=True):
        assert_within_rule(a.cpu(), stock.to(a.dtype), truth, name)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_numbers(causal, impl, device):
    check(device, is_causal=causal, impl=impl)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_window(impl, device):
    check(device, window=(15, 4), impl=impl)


def test_softcap(device):
    check(device, softcap=3.0, is_causal=True)


def test_dropout(device):
    def masks():
        every = attention_dropout.keep_mask(seed_of_next_call(device), 20, 70, 130, 0.3).view(5, 4, 70, 130)
        return [every[i, :, :n, :m] for i, (n, m) in enumerate(zip(LENGTHS_Q, LENGTHS_K, strict=True))]

    check(device, dropout_p=0.3, masks=masks)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_alibi_is_measured_from_the_last_key(impl, device):
    check(device, alibi_slopes=torch.rand(5, 4, device=device), is_causal=True, impl=impl)


def test_tokens_after_the_last_sequence_get_zeros(device):
    q, k, v, g = packed(device)
    q = torch.cat([q, torch.full((9, 4, 16), math.nan, device=device).half()]).requires_grad_()
    cu_q, cu_k = offsets(LENGTHS_Q, device), offsets(LENGTHS_K, device)
    for impl in ("triton", "torch"):
        out, lse = fastops.varlen_attention(q, k, v, cu_q, cu_k, 70, 130, return_lse=True, impl=impl)
        assert (out[-9:] == 0).all()
        assert (lse[-9:] == -math.inf).all()
        (dq,) = torch.autograd.grad((out[:-9] * g).sum(), q)
        assert (dq[-9:] == 0).all()


def test_one_sequence_does_not_see_the_next(device):
    q, k, v, _ = packed(device)
    cu_q, cu_k = offsets(LENGTHS_Q, device), offsets(LENGTHS_K, device)
    clean = fastops.varlen_attention(q, k, v, cu_q, cu_k, 70, 130, impl="triton")
    bad = k.index_fill(0, torch.arange(3, 133, device=device), math.nan)
    dirty = fastops.varlen_attention(q, bad, v, cu_q, cu_k, 70, 130, impl="triton")
    assert torch.equal(clean[:3], dirty[:3])
    assert torch.equal(clean[73:], dirty[73:])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"cu_seqlens_k": torch.zeros(3, dtype=torch.int32)}, RuntimeError, "same shape"),
        ({"cu_seqlens_q": torch.zeros(6)}, RuntimeError, "cu_seqlens_q must be an integer"),
        ({"cu_seqlens_q": [0, 1]}, TypeError, "cu_seqlens_q"),
        ({"max_seqlen_q": 3.0}, TypeError, "max_seqlen_q"),
        ({"query": torch.zeros(94, 4, 8).half()}, RuntimeError, "head dim"),
        ({"query": torch.zeros(94, 3, 16).half()}, RuntimeError, "Number of heads"),
        ({"query": torch.zeros(1, 94, 4, 16).half()}, RuntimeError, "total, H, D"),
        ({"cu_seqlens_q": torch.tensor([0, 3, 73, 73, 90, 95])}, ValueError, "cu_seqlens_q must start at 0"),
        ({"cu_seqlens_k": torch.tensor([2, 3, 133, 135, 135, 144])}, ValueError, "cu_seqlens_k must start at 0"),
        ({"cu_seqlens_q": torch.tensor([0, 73, 3, 73, 90, 94])}, ValueError, "cu_seqlens_q must start at 0"),
        ({"max_seqlen_k": 129}, ValueError, "max_seqlen_k must be at least 130"),
    ],
)
@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_bad_arguments(change, error, words, impl):
    q, k, v, _ = packed("cpu")
    given = {"query": q, "key": k, "value": v, "cu_seqlens_q": offsets(LENGTHS_Q, "cpu")}
    given |= {"cu_seqlens_k": offsets(LENGTHS_K, "cpu"), "max_seqlen_q": 70, "max_seqlen_k": 130}
    with pytest.raises(error, match=words):
        fastops.varlen_attention(**{**given, **change}, impl=impl)


def test_a_trace_by_torch_jit():
    q, offsets = torch.randn(6, 2, 8), torch.tensor([0, 2, 6], dtype=torch.int32)

    def call(q):
        return fastops.varlen_attention(q, q, q, offsets, offsets, 4, 4)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the offsets are read, as documented
        traced = torch.jit.trace(call, q)
    assert torch.equal(traced(2 * q), call(2 * q))


@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize("return_lse", [False, True])
def test_no_sequence_gives_zero_gradients(impl, return_lse):
    q, none = torch.randn(4, 2, 8, requires_grad=True), torch.tensor([0], dtype=torch.int32)
    out = fastops.varlen_attention(q, q, q, none, none, 4, 4, return_lse=return_lse, impl=impl)
    out = out[0] if return_lse else out
    assert not out.any()
    assert not torch.autograd.grad(out.sum(), q)[0].any()
