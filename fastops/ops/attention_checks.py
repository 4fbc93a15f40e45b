"""What the attention functionals accept: torch's error types, messages that name the argument and the shapes."""

from __future__ import annotations

import itertools
import numbers
from typing import Any

import torch
from torch import Tensor

INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


def check_tensors(function: str, tensors: dict[str, Any], optional: tuple[str, ...] = ()) -> None:
    """TypeError for anything that is not a tensor, as torch's argument parser gives it."""
    for name, tensor in tensors.items():
        if tensor is None and name in optional:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{function}(): argument '{name}' must be Tensor, not {type(tensor).__name__}")


def check_flags(function: str, flags: dict[str, Any]) -> None:
    """TypeError for anything that is not a bool: torch takes no other number for one."""
    for name, flag in flags.items():
        if not isinstance(flag, (bool, torch.SymBool)):
            raise TypeError(f"{function}(): argument '{name}' must be bool, not {type(flag).__name__}")


def check_numbers(function: str, dropout_p: Any, scale: Any, softcap: Any) -> tuple[Any, Any, Any]:
    """The scalar arguments, of right type and range; as in torch a bool or a tensor of no dimensions is a number."""
    found = []
    for name, value in (("dropout_p", dropout_p), ("scale", scale), ("softcap", softcap)):
        if isinstance(value, bool) or (isinstance(value, Tensor) and value.dim() == 0 and not value.requires_grad):
            value = float(value)
        if not isinstance(value, (numbers.Real, torch.SymFloat, torch.SymInt)) and not (
            value is None and name == "scale"
        ):
            raise TypeError(f"{function}(): argument '{name}' must be float, not {type(value).__name__}")
        found.append(value)
    dropout_p, scale, softcap = found
    if not 0.0 <= dropout_p <= 1.0:
        raise RuntimeError(f"dropout probability has to be between 0 and 1, but got dropout_p = {dropout_p}")
    if not 0.0 <= softcap < float("inf"):
        raise ValueError(f"softcap has to be positive and finite, or 0 for none, but got {softcap}")
    return dropout_p, scale, softcap


def bounds(window: Any, is_causal: bool) -> tuple[int, int]:
    """(left, right) of the visible band, -1 for no bound."""
    left, right = -1, -1
    if window is not None:
        try:
            left, right = (-1 if side is None else side for side in window)
        except (TypeError, ValueError):
            raise TypeError(f"window must be a pair (left, right) of integers or None, got {window!r}") from None
        for side in (left, right):
            if not isinstance(side, (int, torch.SymInt)) or isinstance(side, bool):
                raise TypeError(f"window must be a pair (left, right) of integers or None, got {window!r}")
            if side < -1:
                raise ValueError(f"window sides have to be >= 0, or -1 (or None) for no bound, got {window!r}")
    if is_causal:
        right = 0
    return left, right


def check_trio(query: Tensor, key: Tensor, value: Tensor, packed: bool) -> None:
    """Device, dtype and rank of query, key and value."""
    if not (query.device == key.device == value.device):
        raise RuntimeError(
            "Expected query, key, and value to have the same device type, but got "
            f"query.device: {query.device} key.device: {key.device} and value.device: {value.device} instead."
        )
    if not (query.dtype == key.dtype == value.dtype):
        raise RuntimeError(
            "Expected query, key, and value to have the same dtype, but got "
            f"query.dtype: {query.dtype} key.dtype: {key.dtype} and value.dtype: {value.dtype} instead."
        )
    if not query.dtype.is_floating_point:
        error = NotImplementedError if query.dtype.is_complex else RuntimeError
        raise error(f"expected a floating point dtype for query, key and value, got {query.dtype}")
    if packed:
        if not query.dim() == key.dim() == value.dim() == 3:
            raise RuntimeError(
                f"Expected query, key, and value of shape (total, H, D), but got {_three(query, key, value)}"
            )
    elif min(query.dim(), key.dim(), value.dim()) < 2:
        raise RuntimeError(
            "Expected query, key, and value to all be at least 2 dimensional, but got "
            f"query.dim: {query.dim()} key.dim: {key.dim()} and value.dim: {value.dim()} instead."
        )
    if query.shape[-1] != key.shape[-1]:
        raise RuntimeError(f"the head dim of query and key must match, but got {_three(query, key, value)}")
    length = 0 if packed else -2
    if key.shape[length] != value.shape[length]:
        raise RuntimeError(f"key and value must have the same length, but got {_three(query, key, value)}")


def check_dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    enable_gqa: bool,
    key_lengths: Tensor | None,
    query_lengths: Tensor | None,
    alibi_slopes: Tensor | None,
) -> None:
    """Shapes of the dense functional; RuntimeError as torch raises it."""
    check_trio(query, key, value, packed=False)
    shapes = _three(query, key, value)
    if enable_gqa:
        if min(query.dim(), key.dim(), value.dim()) < 3:
            raise IndexError(f"enable_gqa needs query, key and value with heads (..., H, S, D), but got {shapes}")
        heads = query.shape[-3]
        for name, tensor in (("key", key), ("value", value)):
            if heads % tensor.shape[-3] if tensor.shape[-3] else heads:
                raise RuntimeError(
                    f"Number of heads in {name} must divide the number of heads in query, but got {shapes}"
                )
        leading = [tuple(x.shape[:-3]) for x in (query, key, value)]
    else:
        leading = [tuple(x.shape[:-2]) for x in (query, key, value)]
    try:
        joint = torch.broadcast_shapes(*leading)
    except RuntimeError:
        hint = "" if enable_gqa else " (enable_gqa=True lets key and value have fewer heads)"
        raise RuntimeError(
            f"the leading dimensions of query, key and value must match, but got {shapes}{hint}"
        ) from None
    batch = joint if enable_gqa else joint[:-1]
    heads = query.shape[-3] if enable_gqa else (joint[-1] if joint else 1)
    if attn_mask is not None:
        if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
            raise RuntimeError(
                "Expected attn_mask dtype to be bool or float or to match query dtype, but got "
                f"attn_mask.dtype: {attn_mask.dtype} and query.dtype: {query.dtype} instead."
            )
        _same_device(attn_mask, "attn_mask", query)
        if attn_mask.dim() < 2 and not (attn_mask.requires_grad and torch.is_grad_enabled()):
            # torch takes fewer where it must differentiate by the mask
            raise IndexError(f"attn_mask needs at least 2 dimensions (Sq, Sk), but got shape {tuple(attn_mask.shape)}")
        scores = (
            *batch,
            *((heads,) if max(len(s) for s in leading) or enable_gqa else ()),
            query.shape[-2],
            key.shape[-2],
        )
        if not _broadcasts_to(tuple(attn_mask.shape), scores):
            raise RuntimeError(
                f"attn_mask of shape {tuple(attn_mask.shape)} does not broadcast to the scores {scores} of {shapes}"
            )
    for name, lengths in (("key_lengths", key_lengths), ("query_lengths", query_lengths)):
        if lengths is not None:
            check_integers(lengths, name, query)
            if tuple(lengths.shape) != tuple(batch):
                raise RuntimeError(
                    f"{name} must have shape {tuple(batch)}, one length a sequence, but got {tuple(lengths.shape)}"
                )
    if alibi_slopes is not None:
        check_slopes(alibi_slopes, query, heads, tuple(batch))


def check_packed(query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> None:
    """Shapes of the packed functional."""
    check_trio(query, key, value, packed=True)
    if key.shape[1] != value.shape[1] or key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise RuntimeError(
            f"Number of heads in key and value must divide that of query, but got {_three(query, key, value)}"
        )
    for name, offsets in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_integers(offsets, name, query)
        if offsets.dim() != 1 or offsets.shape[0] < 1:
            raise RuntimeError(f"{name} must have shape (sequences + 1,), but got {tuple(offsets.shape)}")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise RuntimeError(
            "cu_seqlens_q and cu_seqlens_k must have the same shape, but got "
            f"{tuple(cu_seqlens_q.shape)} and {tuple(cu_seqlens_k.shape)}"
        )


def check_offsets(offsets: Tensor, name: str, total: int, longest: Any, longest_name: str) -> None:
    """ValueError for offsets that leave the packed tensor; on a CPU alone, a GPU is not waited for."""
    if offsets.device.type != "cpu" or torch.compiler.is_compiling():
        return
    try:
        values = offsets.tolist()
    except RuntimeError:  # fake tensors and those of vmap have no values to read
        return
    if values[0] != 0 or values[-1] > total or any(end < start for start, end in itertools.pairwise(values)):
        raise ValueError(f"{name} must start at 0, ascend and end at {total} tokens or before, but got {values}")
    sizes = [end - start for start, end in itertools.pairwise(values)]
    if max(sizes, default=0) > longest:
        raise ValueError(f"{longest_name} must be at least {max(sizes)}, the longest of {name}, but got {longest}")


def check_integers(tensor: Tensor, name: str, query: Tensor) -> None:
    """An integer tensor on the device of query."""
    if tensor.dtype not in INTEGERS:
        raise RuntimeError(f"{name} must be an integer tensor, but got dtype {tensor.dtype}")
    _same_device(tensor, name, query)


def check_slopes(slopes: Tensor, query: Tensor, heads: int, batch: tuple[int, ...]) -> None:
    """ALiBi slopes: floating, (H,) or (batch, H)."""
    if not slopes.dtype.is_floating_point:
        raise RuntimeError(f"alibi_slopes must be a floating point tensor, but got dtype {slopes.dtype}")
    _same_device(slopes, "alibi_slopes", query)
    if tuple(slopes.shape) not in ((heads,), (*batch, heads)):
        raise RuntimeError(
            f"alibi_slopes must have shape {(heads,)} or {(*batch, heads)}, but got {tuple(slopes.shape)}"
        )


def _same_device(tensor: Tensor, name: str, query: Tensor) -> None:
    if tensor.device != query.device:
        raise RuntimeError(
            f"Expected {name} on the device of query, {query.device}, but got {name}.device: {tensor.device}"
        )


def _broadcasts_to(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    if len(shape) > len(target):
        return False
    return all(a == b or a == 1 for a, b in zip(reversed(shape), reversed(target), strict=False))


def _three(query: Tensor, key: Tensor, value: Tensor) -> str:
    return f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
