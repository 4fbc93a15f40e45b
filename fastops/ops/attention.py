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
from torch.nn import functional as F

from fastops import _env, _library, tuning
from fastops.ops import attention_arguments as arguments
from fastops.ops import attention_checks as checks
from fastops.ops.attention_dropout import new_seed
from fastops.ops.attention_ops import Attention
from fastops.ops.attention_reference import Options, packed, padded_inference, reference, stock

IMPLS = ("auto", "triton", "torch")
ROWS = tuning.load("attention")

__all__ = ["explain_auto", "reference", "scaled_dot_product_attention", "varlen_attention", "why_not"]


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
            not spread), nor paid for; those outside 0..Sk are taken for the nearest.
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
    plain = attn_mask is None and window is None and alibi_slopes is None
    # nothing to decide, and on small tensors the checks cost time
    plain = plain and not (softcap or return_lse) and _env.nothing_to_choose(impl, query)
    if plain and _takes_stock(query, key, value):
        if key_lengths is None and query_lengths is None:
            return F.scaled_dot_product_attention(
                query, key, value, None, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if not (dropout_p or is_causal) and _env.may_read_values():
            out = padded_inference(query, key, value, key_lengths, query_lengths, scale)
            if out is not None:
                return out
    tensors = {"query": query, "key": key, "value": value, "attn_mask": attn_mask, "key_lengths": key_lengths}
    tensors |= {"query_lengths": query_lengths, "alibi_slopes": alibi_slopes}
    checks.check_tensors(name, tensors, ("attn_mask", "key_lengths", "query_lengths", "alibi_slopes"))
    dropout_p, scale, softcap = checks.check_numbers(name, dropout_p, scale, softcap)
    checks.check_flags(name, {"is_causal": is_causal, "enable_gqa": enable_gqa, "return_lse": return_lse})
    if query.is_nested:
        extras = (key_lengths, query_lengths, window, alibi_slopes)
        if any(x is not None for x in extras) or softcap or return_lse:
            raise RuntimeError("nested tensors take the arguments of torch alone; packed ones go to varlen_attention")
        if _env.choose_impl(impl, IMPLS) == "triton":
            raise _env.KernelUnavailable(f"{name}(impl='triton'): nested tensors are left to torch")
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    left, right = checks.bounds(window, is_causal)
    query, key, value, attn_mask = arguments.autocast(query, key, value, attn_mask)
    checks.check_dense(query, key, value, attn_mask, enable_gqa, key_lengths, query_lengths, alibi_slopes)
    options = _options(query, scale, left, right, softcap, dropout_p)
    auto = _env.choose_impl(impl, IMPLS) == "auto"
    impl = _engine(
        impl, query, key, value, attn_mask, alibi_slopes, key_lengths, query_lengths, scale, options, packed=False
    )

    def by_torch() -> Any:
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
        if query.dim() == key.dim() == value.dim() == 2:
            out, lse = out.reshape(out.shape[-2:]), None if lse is None else lse.reshape(-1)
        # a value may have leading dimensions that query and key have not
        return (out, lse.expand(out.shape[:-1])) if return_lse and lse is not None else out

    def by_kernels() -> Any:
        batch = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
        shape = (*batch, arguments.heads_of(query, key, value), *query.shape[-2:])
        out, lse = Attention.apply(
            *arguments.four_dimensional(query, key, value, batch, enable_gqa),
            arguments.mask_of(attn_mask, batch),
            arguments.lengths_of(key_lengths),
            arguments.lengths_of(query_lengths),
            arguments.slopes_of(alibi_slopes, shape[-3]),
            None,
            None,
            new_seed(query.device) if dropout_p else None,
            query.shape[-2],
            key.shape[-2],
            options.scale,
            options.left,
            options.right,
            options.softcap,
            options.dropout_p,
            auto,
        )
        out = out.reshape(shape[-2:] if query.dim() == key.dim() == value.dim() == 2 else shape)
        if return_lse:
            return out, lse.reshape(out.shape[:-1])
        return out

    return by_torch() if impl == "torch" else _library.or_stock("attention", auto, by_kernels, by_torch)


def _takes_stock(query: Tensor, key: Any, value: Any) -> bool:
    """Whether torch's own function is right for plain CPU queries: it crashes where there are 0 keys or heads."""
    for tensor in (key, value):
        if type(tensor) is not Tensor or not tensor.is_cpu or tensor.dim() < 3 or not tensor.numel():
            return False
    return query.dim() >= 3 and not query.is_nested


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
        cu_seqlens_q: (sequences + 1,) integers on the device, from 0, ascending, the last at most total_q. Not checked
            on a GPU, which nobody waits for: what lies outside is read.
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

    Raises:
        RuntimeError, TypeError: shapes, dtypes and devices that do not fit.
        ValueError: unknown impl, negative softcap, window below -1; on a CPU also offsets that leave the packed tensor.
        KernelUnavailable: impl="triton" where it cannot run.
    """
    name = "varlen_attention"
    tensors = {"query": query, "key": key, "value": value, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    checks.check_tensors(name, tensors | {"alibi_slopes": alibi_slopes}, ("alibi_slopes",))
    dropout_p, scale, softcap = checks.check_numbers(name, dropout_p, scale, softcap)
    checks.check_flags(name, {"is_causal": is_causal, "return_lse": return_lse})
    left, right = checks.bounds(window, is_causal)
    query, key, value, _ = arguments.autocast(query, key, value, None)
    checks.check_packed(query, key, value, cu_seqlens_q, cu_seqlens_k)
    if alibi_slopes is not None:
        checks.check_slopes(alibi_slopes, query, query.shape[1], (cu_seqlens_q.shape[0] - 1,))
    for label, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if not isinstance(longest, (int, torch.SymInt)) or isinstance(longest, bool):
            raise TypeError(f"{name}(): argument '{label}' must be int, not {type(longest).__name__}")
    checks.check_offsets(cu_seqlens_q, "cu_seqlens_q", query.shape[0], max_seqlen_q, "max_seqlen_q")
    checks.check_offsets(cu_seqlens_k, "cu_seqlens_k", key.shape[0], max_seqlen_k, "max_seqlen_k")
    options = _options(query, scale, left, right, softcap, dropout_p)
    auto = _env.choose_impl(impl, IMPLS) == "auto"
    impl = _engine(impl, query, key, value, None, alibi_slopes, None, None, scale, options, packed=True)

    def by_torch() -> Any:
        out, lse = packed(
            query, key, value, cu_seqlens_q, cu_seqlens_k, options, alibi_slopes=alibi_slopes, return_lse=return_lse
        )
        return (out, lse) if return_lse else out

    def by_kernels() -> Any:
        out, lse = Attention.apply(
            query,
            key,
            value,
            None,
            None,
            None,
            arguments.slopes_of(alibi_slopes, query.shape[1]),
            arguments.lengths_of(cu_seqlens_q),
            arguments.lengths_of(cu_seqlens_k),
            new_seed(query.device) if dropout_p else None,
            max_seqlen_q,
            max_seqlen_k,
            options.scale,
            options.left,
            options.right,
            options.softcap,
            options.dropout_p,
            auto,
        )
        return (out, lse) if return_lse else out

    return by_torch() if impl == "torch" else _library.or_stock("attention", auto, by_kernels, by_torch)


def _options(query: Tensor, scale: float | None, left: int, right: int, softcap: float, dropout_p: float) -> Options:
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1]) if query.shape[-1] else 1.0
    farthest = 2**30  # beyond any length, and sums with it stay in 32 bits
    return Options(float(scale), min(left, farthest), min(right, farthest), float(softcap), float(dropout_p))


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
) -> str | None:
    """Why the Triton kernels cannot compute this call, or None where they can; from metadata alone."""
    reason = _env.why_no_triton(query.device)
    if reason:
        return reason
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the kernels take fp16, bf16 and fp32, not {query.dtype}"
    if query.dtype == torch.bfloat16 and _env.interpreting():
        return "Triton's interpreter computes bf16 wrongly"
    unable = _library.why_not_dense(query=query, key=key, value=value, attn_mask=attn_mask)
    unable = unable or _library.why_no_transform(vmap=False)
    if unable is not None:
        return unable
    if not 1 <= query.shape[-1] <= 256:
        return f"the kernels take head dims 1 to 256, not {query.shape[-1]}"
    if value.shape[-1] != query.shape[-1]:
        return f"the kernels need the head dim of value ({value.shape[-1]}) to be that of query ({query.shape[-1]})"
    if scale is not None and scale <= 0:
        return f"the kernels need a positive scale, not {scale}"
    if alibi_slopes is not None and alibi_slopes.requires_grad and torch.is_grad_enabled():
        return "the kernels give no gradient to alibi_slopes"
    return None


def _engine(
    impl: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    key_lengths: Tensor | None,
    query_lengths: Tensor | None,
    scale: float | None,
    options: Options,
    *,
    packed: bool,
) -> str:
    """The engine, torch or triton; KernelUnavailable where the latter was asked for and cannot run."""
    impl = _env.choose_impl(impl, IMPLS)
    if impl == "torch" or (impl == "auto" and (query.device.type != "cuda" or "attention" in _library.BROKEN)):
        return "torch"
    reason = why_not(query, key, value, attn_mask, alibi_slopes, scale)
    if reason is not None:
        if impl == "triton":
            name = "varlen_attention" if packed else "scaled_dot_product_attention"
            raise _env.KernelUnavailable(f"{name}(impl='triton'): {reason}")
        return "torch"
    if impl == "triton":
        return "triton"
    return tuning.choose(
        ROWS,
        facts(
            head_dim=query.shape[-1],
            q_len=query.shape[-2],
            dtype=query.dtype,
            gpu=_env.gpu_facts(query.device),
            mask="none" if attn_mask is None else "bool" if attn_mask.dtype == torch.bool else "float",
            lengths=key_lengths is not None or query_lengths is not None or _hides_keys_alone(attn_mask, query, key),
            alibi=alibi_slopes is not None,
            grad=_library.wants_grad(query, key, value, attn_mask),
            options=options,
            packed=packed,
        ),
    ).engine


def facts(
    *,
    head_dim: int,
    q_len: int,
    dtype: torch.dtype,
    gpu: dict[str, Any],
    mask: str = "none",
    lengths: bool = False,
    alibi: bool = False,
    grad: bool = False,
    options: Options,
    packed: bool = False,
) -> dict[str, Any]:
    """What the tuning table may ask about a call."""
    return {
        "head_dim": head_dim,
        "head_dim_mod_8": head_dim % 8,
        "q_len": q_len,
        "dtype": str(dtype).removeprefix("torch."),
        **gpu,
        "mask": mask,
        "lengths": lengths,
        "alibi": alibi,
        "grad": grad,
        "causal": options.right == 0 and options.left < 0,
        "window": options.left >= 0 or options.right > 0,
        "softcap": options.softcap > 0,
        "dropout": options.dropout_p > 0,
        "packed": packed,
    }


def _hides_keys_alone(attn_mask: Tensor | None, query: Tensor, key: Tensor) -> bool:
    """Whether the mask is one row of keys for all queries, as padding is: the kernels skip what it hides."""
    if attn_mask is None or attn_mask.dim() < 4 or query.shape[-2] == 1:
        return False
    return attn_mask.shape[-2] == 1 and attn_mask.shape[-1] == key.shape[-2] > 1


# what `fastops env` shows: the call in words, and its facts
_EXAMPLES: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "BERT, D=64, lengths, dropout, training",
        {"lengths": True, "grad": True, "options": Options(0.125, dropout_p=0.1)},
    ),
    ("BERT, D=64, lengths, inference", {"lengths": True}),
    ("D=64, bool mask, dropout, training", {"mask": "bool", "grad": True, "options": Options(0.125, dropout_p=0.1)}),
    ("D=64, bool mask, inference", {"mask": "bool"}),
    ("D=64, S=512, no mask, inference", {}),
    ("D=64, S=4096, no mask", {"q_len": 4096}),
    ("D=128, causal", {"head_dim": 128, "q_len": 4096, "options": Options(0.125, right=0)}),
    ("D=128, window 4096", {"head_dim": 128, "q_len": 8192, "options": Options(0.125, 4096, 0)}),
    ("D=128, softcap, causal", {"head_dim": 128, "options": Options(0.125, right=0, softcap=50.0)}),
    ("D=64, ALiBi", {"alibi": True}),
    ("D=64, packed", {"packed": True}),
    ("D=256, no mask", {"head_dim": 256}),
    ("fp32", {"dtype": torch.float32}),
)


def explain_auto() -> list[dict[str, str]]:
    """What "auto" runs for typical calls, for `fastops env`."""
    usual: dict[str, Any] = {"head_dim": 64, "q_len": 512, "dtype": torch.bfloat16, "options": Options(0.125)}
    usual["gpu"] = _env.shown_gpu_facts()
    return [
        tuning.explained("attention", example, tuning.choose(ROWS, facts(**{**usual, **given})))
        for example, given in _EXAMPLES
    ]
