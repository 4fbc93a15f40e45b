"""Attention, dense and packed: out = softmax(scale Q K^T + bias) V.

With S = scale Q K^T (softcap: S = c tanh(S / c)), minus slope |i - j| with ALiBi, plus a float mask; hidden keys get
-inf. LSE_i = log sum_j exp S_ij, out_i = sum_j exp(S_ij - LSE_i) V_j; with dropout each exp(S_ij - LSE_i) is kept with
probability 1 - p and divided by it. A row that sees no key gives 0, LSE = -inf and zero gradients.

Q is (B, H, Sq, D), K and V are (B, Hk, Sk, D), Hk divides H; packed: (total, H, D). fp16, bf16, fp32; scores,
softmax and sums are fp32. Error promised: at most twice that of stock PyTorch in the same dtype, plus one ulp.

FlashAttention-2 (Dao 2023, arXiv:2307.08691); ALiBi (Press 2021, arXiv:2108.12409); Philox (Salmon 2011).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastops import _env, tuning
from fastops.ops import attention_checks as checks
from fastops.ops.attention_reference import Options, packed, reference, stock

IMPLS = ("auto", "triton", "torch")
_TABLE = tuning.load("attention")

__all__ = ["Options", "explain_auto", "reference", "scaled_dot_product_attention", "varlen_attention"]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    key_lengths: Tensor | None = None,
    query_lengths: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Any:
    """`torch.nn.functional.scaled_dot_product_attention`, and what it lacks: lengths, windows, softcap, ALiBi, LSE.

    softmax(scale Q K^T + mask) V. Positions are counted from the start of queries and keys (torch's top-left causal).
    A row that sees no key gives 0, LSE -inf and zero gradients.

    Args:
        query: (..., H, Sq, D), any leading dimensions.
        key: (..., H, Sk, D), fewer heads with `enable_gqa`.
        value: (..., H, Sk, Dv).
        attn_mask: broadcastable to (..., H, Sq, Sk). bool: True attends; float: added to the scores, differentiable.
        dropout_p: probability to drop an attention weight; applied whenever it is not 0, as in torch.
        is_causal: query i sees keys j <= i. Given together with attn_mask, both hold.
        scale: factor of the scores, 1 / sqrt(D) by default.
        enable_gqa: H of query may be a multiple of H of key and value.
        key_lengths: (...) integers on the device, keys at or past it are not seen, nor read as numbers (NaN there does
            not spread), nor paid for.
        query_lengths: (...) integers, rows at or past it give 0 and are not paid for.
        window: (left, right), query i sees keys i - left <= j <= i + right; -1 or None for no bound.
        softcap: c > 0 replaces the scaled scores by c tanh(scores / c), before masks.
        alibi_slopes: (H,) or (..., H), subtracts slope |i - j| from the scores.
        return_lse: also return the log-sum-exp of each row, (..., H, Sq) fp32.
        impl: "auto" (the tuning table decides), "triton" or "torch".

    Returns:
        (..., H, Sq, Dv), and the LSE if asked for.

    Raises:
        RuntimeError, TypeError, IndexError: as torch does, naming the argument and the shapes.
        ValueError: unknown impl, negative softcap, window below -1.
        KernelUnavailable: impl="triton" where it cannot run; the message says why.
    """
    name = "scaled_dot_product_attention"
    tensors = {"query": query, "key": key, "value": value, "attn_mask": attn_mask, "key_lengths": key_lengths}
    tensors |= {"query_lengths": query_lengths, "alibi_slopes": alibi_slopes}
    checks.check_tensors(name, tensors, ("attn_mask", "key_lengths", "query_lengths", "alibi_slopes"))
    checks.check_numbers(name, dropout_p, scale, softcap)
    left, right = checks.bounds(window, is_causal)
    query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
    checks.check_dense(query, key, value, attn_mask, enable_gqa, key_lengths, query_lengths, alibi_slopes)
    impl = _env.choose_impl(impl, IMPLS)
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1]) if query.shape[-1] else 1.0
    options = Options(scale, left, right, softcap, dropout_p)
    out, lse = stock(
        query,
        key,
        value,
        attn_mask,
        options,
        key_lengths=key_lengths,
        query_lengths=query_lengths,
        alibi_slopes=alibi_slopes,
        enable_gqa=enable_gqa,
        return_lse=return_lse,
    )
    return (out, lse) if return_lse else out


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Any:
    """Attention of sequences packed one after another, without padding and without a host sync.

    Sequence i has queries cu_seqlens_q[i] : cu_seqlens_q[i + 1] and the keys so given. Where a sequence has fewer
    queries than keys, the last query stands at the last key (bottom-right), as in torch.nn.attention.varlen and
    flash-attn: causal means j <= i + (keys - queries).

    Args:
        query: (total_q, H, D).
        key: (total_k, Hk, D), Hk divides H.
        value: (total_k, Hk, D).
        cu_seqlens_q: (sequences + 1,) integers on the device, from 0, ascending.
        cu_seqlens_k: likewise for keys.
        max_seqlen_q: at least the longest query sequence (longer ones would be cut off).
        max_seqlen_k: at least the longest key sequence.
        dropout_p: probability to drop an attention weight.
        is_causal: see above.
        scale: factor of the scores, 1 / sqrt(D) by default.
        window: (left, right) around the query's position; -1 or None for no bound.
        softcap: c > 0 replaces the scaled scores by c tanh(scores / c).
        alibi_slopes: (H,) or (sequences, H).
        return_lse: also return the log-sum-exp of each row, (total_q, H) fp32.
        impl: "auto", "triton" or "torch" (one stock call a sequence; reads the offsets on the host).

    Returns:
        (total_q, H, D), and the LSE if asked for.
    """
    name = "varlen_attention"
    tensors = {"query": query, "key": key, "value": value, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    checks.check_tensors(name, tensors | {"alibi_slopes": alibi_slopes}, ("alibi_slopes",))
    checks.check_numbers(name, dropout_p, scale, softcap)
    left, right = checks.bounds(window, is_causal)
    query, key, value, _ = _autocast(query, key, value, None)
    checks.check_packed(query, key, value, cu_seqlens_q, cu_seqlens_k)
    if alibi_slopes is not None:
        checks.check_slopes(alibi_slopes, query, query.shape[1], (cu_seqlens_q.shape[0] - 1,))
    for label, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if not isinstance(longest, (int, torch.SymInt)) or isinstance(longest, bool):
            raise TypeError(f"{name}(): argument '{label}' must be int, not {type(longest).__name__}")
    impl = _env.choose_impl(impl, IMPLS)
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1]) if query.shape[-1] else 1.0
    options = Options(scale, left, right, softcap, dropout_p)
    out, lse = packed(
        query, key, value, cu_seqlens_q, cu_seqlens_k, options, alibi_slopes=alibi_slopes, return_lse=return_lse
    )
    return (out, lse) if return_lse else out


def _autocast(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The casts autocast gives `scaled_dot_product_attention`."""
    device = query.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return query, key, value, attn_mask
    dtype = torch.get_autocast_dtype(device)

    def cast(x: Tensor) -> Tensor:
        return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x

    return cast(query), cast(key), cast(value), None if attn_mask is None else cast(attn_mask)


def explain_auto() -> list[dict[str, str]]:
    """What "auto" does with typical calls on a GPU, and why."""
    return []
