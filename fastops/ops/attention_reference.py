"""Attention in plain torch: the formula with every option, and the best call of stock PyTorch for it.

`reference` is the formula of fastops.ops.attention in a few lines of torch. `stock` computes the same through
`torch.nn.functional.scaled_dot_product_attention`, and through `reference` for what that has no argument for.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastops import _env, _library

MODERATE = 1e9  # a norm; fp32 ends at 3e38
WORTH_A_CALL = 8_000_000  # multiply-adds saved on a CPU that pay for one more call of stock attention


@dataclass(frozen=True)
class Options:
    """Everything about one attention that is not a tensor.

    Query i sees key j where i + shift - left <= j <= i + shift + right; -1 stands for no bound.
    """

    scale: float
    left: int = -1
    right: int = -1
    softcap: float = 0.0
    dropout_p: float = 0.0


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    options: Options,
    *,
    key_lengths: Tensor | None = None,
    query_lengths: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    keep: Tensor | None = None,
    shift: int = 0,
) -> tuple[Tensor, Tensor]:
    """Output and LSE of (..., H, S, D) tensors, accumulated in fp32 or wider.

    Rows without a visible key give 0, LSE -inf and zero gradients. `keep` is the dropout mask to use; without it, torch
    draws one. Keys past `key_lengths` are never read as numbers: NaN there does not spread.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    q, k, v = query.to(wide), key.to(wide), value.to(wide)
    if key_lengths is not None:
        k, v = _until(key_lengths, k, v)
    if query_lengths is not None:
        (q,) = _until(query_lengths, q)
    k, v = _grouped(k, q), _grouped(v, q)
    scores = q @ k.mT * options.scale
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if alibi_slopes is not None:
        scores = scores + alibi_bias(alibi_slopes.to(wide), query.shape[-2], key.shape[-2], shift)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores = scores + attn_mask
    visible = visible_keys(query.shape[-2], key.shape[-2], query.device, options, key_lengths, query_lengths, shift)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        visible = attn_mask if visible is None else attn_mask & visible
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    if scores.shape[-1] == 0:
        row_max = scores.new_zeros((*scores.shape[:-1], 1))
    else:
        row_max = scores.detach().amax(-1, keepdim=True)
        row_max = row_max.masked_fill(row_max == float("-inf"), 0.0)
    weights = torch.exp(scores - row_max)
    total = weights.sum(-1, keepdim=True)
    dead_rows = total == 0
    safe_total = total.masked_fill(dead_rows, 1.0)
    probability = weights / safe_total
    if keep is not None:
        probability = probability * keep * (1.0 / (1.0 - options.dropout_p) if options.dropout_p < 1 else 0.0)
    elif options.dropout_p:
        probability = F.dropout(probability, options.dropout_p)
    lse = (row_max + torch.log(safe_total)).masked_fill(dead_rows, float("-inf")).squeeze(-1)
    out = (probability @ v).to(query.dtype)
    return out if query_lengths is None else _until(query_lengths, out)[0], lse.to(
        torch.float32 if wide == torch.float32 else wide
    )


def _grouped(x: Tensor, query: Tensor) -> Tensor:
    """Key or value heads repeated to the query's, where there are fewer."""
    if min(x.dim(), query.dim()) < 3 or x.shape[-3] in (1, query.shape[-3]) or query.shape[-3] == 1:
        return x
    return x.repeat_interleave(query.shape[-3] // x.shape[-3], -3)


def _until(lengths: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """(..., H, S, D) tensors of one S with zeros at and past the length: no number there is read."""
    dead = past(lengths, tensors[0].shape[-2])[..., None, :, None]
    return tuple(x.masked_fill(dead, 0.0) for x in tensors)


def past(lengths: Tensor, size: int) -> Tensor:
    """True (..., size) at positions at or past the length."""
    return torch.arange(size, device=lengths.device) >= lengths[..., None]


def visible_keys(
    q_len: int,
    k_len: int,
    device: torch.device,
    options: Options,
    key_lengths: Tensor | None = None,
    query_lengths: Tensor | None = None,
    shift: int = 0,
) -> Tensor | None:
    """True where a query may see a key, broadcastable to (..., H, Sq, Sk); None where nothing is hidden."""
    visible = None
    if options.left >= 0 or options.right >= 0:
        distance = torch.arange(k_len, device=device) - torch.arange(q_len, device=device)[:, None] - shift
        visible = torch.ones_like(distance, dtype=torch.bool)
        if options.left >= 0:
            visible &= distance >= -options.left
        if options.right >= 0:
            visible &= distance <= options.right
    if key_lengths is not None:
        alive = ~past(key_lengths, k_len)[..., None, None, :]
        visible = alive if visible is None else visible & alive
    if query_lengths is not None:
        alive = ~past(query_lengths, q_len)[..., None, :, None]
        visible = alive if visible is None else visible & alive
    return visible


def alibi_bias(slopes: Tensor, q_len: int, k_len: int, shift: int = 0) -> Tensor:
    """-slope |i + shift - j|, of shape (..., H, Sq, Sk)."""
    rows = torch.arange(q_len, device=slopes.device)[:, None] + shift
    return -slopes[..., None, None] * (rows - torch.arange(k_len, device=slopes.device)).abs()


def stock(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    options: Options,
    *,
    key_lengths: Tensor | None = None,
    query_lengths: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    shift: int = 0,
    enable_gqa: bool = False,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Output, and LSE where asked for, by what stock PyTorch does best."""
    if options.softcap or return_lse:
        return reference(
            query,
            key,
            value,
            attn_mask,
            options,
            key_lengths=key_lengths,
            query_lengths=query_lengths,
            alibi_slopes=alibi_slopes,
            shift=shift,
        )
    causal = options.right == 0 and options.left < 0 and shift == 0 and attn_mask is None and alibi_slopes is None
    lengths_given = key_lengths is not None or query_lengths is not None
    can_slice = lengths_given and query.dim() == 4 and query.device.type == "cpu" and _env.may_read_values()
    if can_slice and (key_lengths is None or key_lengths.device.type == "cpu"):
        out = _sliced(query, key, value, attn_mask, options, key_lengths, query_lengths, alibi_slopes, enable_gqa)
        if out is not None:
            return out, None
    # 0 x NaN is NaN, and 0 times what overflows as well: nothing past a length may be read as a number. Where no
    # gradient will show it, it shows in the output, which is the smallest thing to look at
    inference = not _needs_grad(query, key, value, attn_mask)
    looked_at = can_slice and not options.dropout_p and inference
    harmless = looked_at
    if can_slice and not looked_at and not _library.has_tangents():
        harmless = _moderate(key, value) if query_lengths is None else _moderate(query, key, value)

    def attend(mask: Tensor | None, is_causal: bool = False) -> Tensor:
        out = _sdpa(query, key, value, mask, options, is_causal, enable_gqa)
        return _with_rows_ended(out, query_lengths, looked_at)

    # what a row past its length computes is read by nobody but gradients
    hidden_rows = None if inference else query_lengths
    if not harmless:
        if hidden_rows is not None:
            (query,) = _until(hidden_rows, query)
        if key_lengths is not None:
            key, value = _until(key_lengths, key, value)
    elif attn_mask is None or attn_mask.dtype == torch.bool:
        hidden_rows = None
    if causal and key_lengths is None and hidden_rows is None:
        return attend(None, True), None
    mask = visible_keys(query.shape[-2], key.shape[-2], query.device, options, key_lengths, hidden_rows, shift)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        mask = attn_mask if mask is None else attn_mask & mask
    bias = attn_mask if attn_mask is not None and attn_mask.dtype != torch.bool else None
    if alibi_slopes is not None:
        alibi = alibi_bias(alibi_slopes.to(query.dtype), query.shape[-2], key.shape[-2], shift)
        if query.dim() == key.dim() == value.dim() == 2:  # one head, without a dimension of its own
            alibi = alibi[0]
        bias = alibi if bias is None else bias + alibi
    if bias is not None:
        mask = bias if mask is None else torch.where(mask, bias, float("-inf"))
    out = attend(mask)
    if key_lengths is not None and looked_at and not _moderate(out):
        key, value = _until(key_lengths, key, value)
        out = attend(mask)
    return out, None


def _with_rows_ended(out: Tensor, query_lengths: Tensor | None, in_place: bool) -> Tensor:
    """Zeros in rows at or past their length; `in_place` for an output that nobody else has, on a CPU."""
    if query_lengths is None:
        return out
    lengths = _read(query_lengths, out.shape[-2]) if in_place and query_lengths.shape == out.shape[:-3] else None
    if lengths is None or out.dim() != 4:
        return _until(query_lengths, out)[0]
    for item, length in zip(out.unbind(), lengths, strict=True):
        item[:, length:].zero_()  # less than masked_fill's time: only what has ended is written
    return out


def _read(lengths: Tensor, size: int) -> list[int] | None:
    """Lengths within 0..size as numbers; None where there are none to read: fake tensors, those of vmap."""
    try:
        return lengths.clamp(0, size).tolist()
    except RuntimeError:
        return None


def _needs_grad(*tensors: Tensor | None) -> bool:
    return _library.has_tangents() or _library.wants_grad(*tensors)


def padded_inference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    query_lengths: Tensor | None,
    scale: float | None,
) -> Tensor | None:
    """The plainest padded call on a CPU, too small for slices to pay and for many checks; None where it is not that."""
    if not query.dim() == key.dim() == value.dim() == 4 or _needs_grad(query, key, value):
        return None
    batch, heads, q_len, head_dim = query.shape
    k_len = key.shape[2]
    if query.dtype not in (torch.float32, torch.bfloat16):
        return None
    for lengths in (key_lengths, query_lengths):
        if lengths is not None and (
            type(lengths) is not Tensor
            or lengths.dtype not in (torch.int32, torch.int64)
            or lengths.shape != (batch,)
            or lengths.device != query.device
        ):
            return None
    if key.shape != (batch, heads, k_len, head_dim) or value.shape[:3] != key.shape[:3]:
        return None
    if not (q_len and k_len and head_dim) or heads * head_dim * q_len * k_len > 2 * WORTH_A_CALL:
        return None
    mask = None
    if key_lengths is not None:
        positions = torch.arange(k_len, dtype=key_lengths.dtype, device=key_lengths.device)
        mask = positions < key_lengths[:, None, None, None]
    out = F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    out = _with_rows_ended(out, query_lengths, in_place=True)
    if key_lengths is None:
        return out
    try:  # 0 x NaN is NaN: a dead key or value that is not finite shows in the output
        return out if math.isfinite(out.sum().item()) else None
    except RuntimeError:  # fake tensors and those of vmap have no values to read
        return None


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: Options, is_causal: bool, enable_gqa: bool
) -> Tensor:
    if mask is not None:
        if mask.dtype != torch.bool and (query.device.type != "cpu" or query.dtype == torch.float64):
            # cuDNN reads an fp32 mask beside fp16 queries as fp16 bits in some releases, and the CPU one beside fp64
            # as fp64 bits
            mask = mask.to(query.dtype)
        if mask.dim() < 2:
            mask = mask.expand(query.shape[-2], key.shape[-2])
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        mask,
        options.dropout_p,
        is_causal,
        scale=options.scale,
        enable_gqa=enable_gqa,
    )
    if mask is not None and query.device.type != "cpu":
        # cuDNN gives such rows the mean of the values
        alive = mask if mask.dtype == torch.bool else mask > float("-inf")
        out = out.masked_fill(~alive.any(-1, keepdim=True), 0.0)
    return out


def _sliced(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    options: Options,
    key_lengths: Tensor | None,
    query_lengths: Tensor | None,
    alibi_slopes: Tensor | None,
    enable_gqa: bool,
) -> Tensor | None:
    """One call per run of equal lengths, on the keys and queries that exist; None where that does not apply."""
    batch, _, q_len, _ = query.shape
    k_len = key.shape[-2]
    if key.shape[:1] != query.shape[:1] or value.shape[:1] != query.shape[:1]:
        return None
    rows_of = [q_len] * batch if query_lengths is None else _read(query_lengths, q_len)
    keys_of = [k_len] * batch if key_lengths is None else _read(key_lengths, k_len)
    if rows_of is None or keys_of is None:
        return None
    pairs = list(zip(rows_of, keys_of, strict=True))
    if not any(a and b for a, b in pairs):
        return None
    saved = query.shape[1] * query.shape[-1] * (batch * q_len * k_len - sum(a * b for a, b in pairs))
    if saved < WORTH_A_CALL * len(list(itertools.groupby(pairs))):
        return None
    if attn_mask is not None:
        while attn_mask.dim() < 4:
            attn_mask = attn_mask[None]
        attn_mask = attn_mask.expand(batch, -1, -1, -1)
    runs = [(pair, len(list(same))) for pair, same in itertools.groupby(pairs)]
    # split, not sliced: the gradient of a slice is as large as the whole
    pieces = zip(*(x.split([count for _, count in runs]) for x in (query, key, value)), strict=True)
    parts = []  # (B, S, H, D), as stock lays them out: joined by plain copies
    start = 0
    for ((rows, keys), count), (q, k, v) in zip(runs, pieces, strict=True):
        here = slice(start, start + count)
        start += count
        if rows == 0 or keys == 0:
            parts.append(query.new_zeros((count, q_len, query.shape[1], value.shape[-1])))
            continue
        mask = None
        if attn_mask is not None:
            mask = attn_mask[here]
            mask = mask if mask.shape[-2] == 1 else mask[..., :rows, :]
            mask = mask if mask.shape[-1] == 1 else mask[..., :keys]
        slopes = alibi_slopes
        if slopes is not None and slopes.dim() > 1:
            slopes = slopes[here] if slopes.shape[0] > 1 else slopes
        part, _ = stock(
            q[:, :, :rows],
            k[:, :, :keys],
            v[:, :, :keys],
            mask,
            options,
            alibi_slopes=slopes,
            enable_gqa=enable_gqa,
        )
        part = part.transpose(1, 2)
        parts.append(F.pad(part, (0, 0, 0, 0, 0, q_len - rows)) if rows < q_len else part)
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).transpose(1, 2)


def _moderate(*tensors: Tensor) -> bool:
    """Whether their norms are far from overflow, even times what a query or a gradient may hold.

    Read on the host; False where there is nothing to read.
    """
    try:
        return all(
            bool(torch.linalg.vector_norm(x.detach(), dtype=torch.promote_types(x.dtype, torch.float32)) < MODERATE)
            for x in tensors
        )
    except RuntimeError:
        return False


def packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    options: Options,
    *,
    alibi_slopes: Tensor | None = None,
    keeps: list[Tensor] | None = None,
    return_lse: bool = False,
    exact: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention of packed (total, H, D) sequences, one call of stock PyTorch each; `exact` means `reference`.

    Positions are aligned at the ends of a sequence's queries and keys. Reads the offsets on the host.
    """
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    outs, lses = [query.new_zeros((0, query.shape[1], value.shape[-1]))], []
    if len(ends_q) == 1:  # no sequence, but a graph: all gradients are 0
        outs[0] = outs[0] + (query[:0].sum() + key[:0].sum() + value[:0].sum())
    for i in range(len(ends_q) - 1):
        q = query[ends_q[i] : ends_q[i + 1]].transpose(0, 1)
        k = key[ends_k[i] : ends_k[i + 1]].transpose(0, 1)
        v = value[ends_k[i] : ends_k[i + 1]].transpose(0, 1)
        slopes = alibi_slopes[i] if alibi_slopes is not None and alibi_slopes.dim() > 1 else alibi_slopes
        shift = k.shape[1] - q.shape[1]
        lse: Tensor | None
        if exact:
            out, lse = reference(
                q, k, v, None, options, alibi_slopes=slopes, keep=keeps[i] if keeps else None, shift=shift
            )
        else:
            out, lse = stock(
                q[None],
                k[None],
                v[None],
                None,
                options,
                alibi_slopes=slopes,
                shift=shift,
                enable_gqa=bool(q.shape[0] != k.shape[0]),  # a tensor while torch.jit traces
                return_lse=return_lse,
            )
            out, lse = out[0], None if lse is None else lse[0]
        outs.append(out.transpose(0, 1))
        if lse is not None:
            lses.append(lse.transpose(0, 1))
    covered = ends_q[-1] if ends_q else 0
    if covered < query.shape[0]:
        outs.append(query.new_zeros((query.shape[0] - covered, *outs[0].shape[1:])))
        if lses:
            lses.append(lses[0].new_full((query.shape[0] - covered, query.shape[1]), float("-inf")))
    if (return_lse or exact) and not lses:
        lses.append(query.new_zeros((query.shape[0], query.shape[1]), dtype=torch.float32))
    return torch.cat(outs), torch.cat(lses) if lses else None
