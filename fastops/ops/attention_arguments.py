"""Arguments of the attention functionals, checked by then, as the registered op takes them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastops import _env


def heads_of(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Heads of the result, over which queries, or keys and values, may broadcast."""
    return max(x.shape[-3] if x.dim() > 2 else 1 for x in (query, key, value))


def four_dimensional(
    query: Tensor, key: Tensor, value: Tensor, batch: tuple[int, ...], enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, H, S, D) of each, without a copy where one leading dimension is all there is."""
    heads = heads_of(query, key, value)
    kv_heads = max(x.shape[-3] if x.dim() > 2 else 1 for x in (key, value))
    groups = {x.shape[-3] for x in (key, value) if x.dim() > 2 and x.shape[-3] != 1}
    if (not enable_gqa and kv_heads not in (1, heads)) or len(groups) > 1:
        kv_heads = heads

    def flat(x: Tensor, wanted: int) -> Tensor:
        while x.dim() < 3:
            x = x[None]
        if x.shape[-3] != wanted:
            x = (
                x.expand(*x.shape[:-3], wanted, *x.shape[-2:])
                if x.shape[-3] == 1
                else x.repeat_interleave(wanted // x.shape[-3], -3)
            )
        x = x.expand(*batch, *x.shape[-3:])
        if len(batch) == 1:
            return x
        return x[None] if not batch else x.flatten(0, len(batch) - 1)

    return flat(query, heads), flat(key, kv_heads), flat(value, kv_heads)


def mask_of(attn_mask: Tensor | None, batch: tuple[int, ...]) -> Tensor | None:
    """The mask with four dimensions, those it broadcasts over kept at 1."""
    if attn_mask is None:
        return None
    while attn_mask.dim() < max(4, len(batch) + 3):
        attn_mask = attn_mask[None]
    if attn_mask.dim() > 4:
        if all(size == 1 for size in attn_mask.shape[:-3]):
            return attn_mask.flatten(0, -4)
        attn_mask = attn_mask.expand(*batch, *attn_mask.shape[-3:]).flatten(0, -4)
    return attn_mask


def lengths_of(lengths: Tensor | None) -> Tensor | None:
    """One contiguous row of int32 or int64."""
    if lengths is None:
        return None
    if lengths.dtype not in (torch.int32, torch.int64):
        lengths = lengths.to(torch.int32)
    return lengths.reshape(-1).contiguous()


def slopes_of(slopes: Tensor | None, heads: int) -> Tensor | None:
    """One row of slopes for all, or one for each sequence."""
    return None if slopes is None else slopes.detach().reshape(-1, heads)


def autocast(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The casts autocast gives `scaled_dot_product_attention`."""
    dtype = _env.autocast_dtype(query.device)
    if dtype is None:
        return query, key, value, attn_mask
    query, key, value = (_env.autocast(x, dtype) for x in (query, key, value))
    return query, key, value, _env.autocast(attn_mask, dtype)
