"""scaled_dot_product_attention and varlen_attention."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

import fastops
from fastops.ops import attention_reference
from fastops.ops.attention_dropout import keep_mask, new_seed
from tests.fuzz.engine import (
    FLOATS,
    KERNEL_FLOATS,
    ROUNDED_FLOATS,
    SEEDED_DROPOUT,
    SEEDS,
    Spec,
    agree,
    fuzzed,
    rarely,
    refuses,
    seeded,
    specs,
)

MISTAKES = (
    *("none",) * 24,
    "key width",
    "heads",
    "batch",
    "key dtype",
    "integers",
    "rank",
    "no tensor",
    "mask shape",
    "mask dtype",
    "dropout_p",
    "scale",
)

# of arguments that torch has not
MORE_MISTAKES = ("lengths shape", "lengths dtype", "no lengths", "window", "softcap", "slopes shape", "slopes dtype")
WRONG_WINDOWS = ((-2, 0), (None, -3), (0,), (1, 1, 1), (), 3, (1.0, 0), ("1", 0), (True, 0), "ab")
WRONG_SOFTCAPS = (-1.0, -1, float("inf"), float("nan"), "1", None, [1.0])
# of dropout
RATES = (0.0, 0.0, 0.5 if SEEDED_DROPOUT else 1.0, 1.0)


@dataclass(frozen=True)
class Dense:
    query: Any
    key: Any
    value: Any
    mask: Any
    plain: dict[str, Any]  # arguments of torch's function
    more: dict[str, Any] = field(default_factory=dict)  # arguments of ours alone
    slopes: Any = None
    impl: str = "auto"
    seed: int = 0  # of what is dropped
    illegal: str = ""  # the wrong argument, of those that torch has not


@st.composite
def dense(draw: Any, impls: tuple[str, ...], dtypes: Any, sizes: int, more: bool) -> Dense:
    mistake = draw(st.sampled_from((*MISTAKES, *MORE_MISTAKES, *("none",) * 16) if more else MISTAKES))
    wrong = mistake in MORE_MISTAKES
    dtype = draw(dtypes)
    batch = draw(st.sampled_from([(1,), (2,), (), (2, 1)]))
    heads = draw(st.sampled_from([1, 2, 4]))
    q_len, k_len = draw(st.integers(0 if mistake == "none" else 1, sizes)), draw(st.integers(1, sizes))
    width = draw(st.sampled_from([1, 3, 8, 9, 16]))
    groups = draw(st.sampled_from([1, 1, 2])) if heads > 1 else 1
    shapes = [(*batch, heads, q_len, width), *[(*batch, heads // groups, k_len, width)] * 2]
    if draw(st.integers(0, 9)) == 9:
        shapes[2] = (*shapes[2][:-1], width + 1)
    flat = not batch and heads == 1 and not wrong and draw(st.booleans())
    if flat:
        shapes = [shape[1:] for shape in shapes]
    kinds = [dtype] * 3
    if mistake == "key width":
        shapes[1] = (*shapes[1][:-1], width + 1)
    if mistake == "heads" and not flat:
        shapes[1] = shapes[2] = (*batch, heads + 1, k_len, width)
    if mistake == "batch" and batch:
        shapes[1] = shapes[2] = (batch[0] + 2, *shapes[1][1:])
    if mistake == "key dtype":
        kinds[1] = draw(FLOATS)
    if mistake == "integers":
        kinds = [torch.int64] * 3
    if mistake == "rank":
        shapes[draw(st.integers(0, 2))] = draw(st.sampled_from([(), (width,)]))
    trio = [draw(specs(shape, kind)) for shape, kind in zip(shapes, kinds, strict=True)]
    if mistake == "no tensor":
        trio[draw(st.integers(0, 2))] = draw(st.sampled_from([None, 1.0]))
    mask = None
    if draw(st.booleans()) or "mask" in mistake:
        shape = [*batch, heads, q_len, k_len] if not flat else [q_len, k_len]
        shape = shape[draw(st.integers(0, len(shape) - 2)) :]
        shape = [1 if draw(st.integers(0, 3)) == 3 else size for size in shape]
        kind = draw(st.sampled_from([torch.bool, dtype, torch.float32]))
        if mistake == "mask shape":
            shape[-1] += 2
        if mistake == "mask dtype":
            kind = draw(st.sampled_from([torch.int64, torch.float64, torch.float16]))
        mask = draw(specs(tuple(shape), kind))
    plain: dict[str, Any] = {"is_causal": draw(st.booleans()) and mask is None, "enable_gqa": groups > 1}
    if draw(st.booleans()):
        plain["scale"] = draw(rarely(st.sampled_from([1.0, 0.3, 2]), st.sampled_from([0.0, -0.5])))
    if mistake == "scale":
        plain["scale"] = draw(st.sampled_from(["1", [1.0], 1j]))
    if mistake == "dropout_p":
        plain["dropout_p"] = draw(st.sampled_from([1.5, -0.5, float("nan"), "0", None]))
    elif mistake == "none":
        plain["dropout_p"] = draw(st.sampled_from(RATES))
    options: dict[str, Any] = {}
    slopes = None
    illegal = ""
    if more and (mistake == "none" or wrong) and not flat and len(batch) < 2:

        def lengths(longest: int) -> Tensor:
            numbers = [draw(st.integers(0, longest + 1)) for _ in range(math.prod(batch))]
            kind = draw(rarely(st.sampled_from([torch.int32, torch.int64]), st.sampled_from([torch.int8, torch.uint8])))
            return torch.tensor(numbers, dtype=kind).view(batch)

        if draw(st.booleans()):
            options["key_lengths"] = lengths(k_len)
        if draw(st.booleans()):
            options["query_lengths"] = lengths(q_len)
        side = rarely(st.one_of(st.none(), st.integers(-1, sizes)), st.sampled_from([2**31, 2**40]))
        if draw(st.booleans()):
            options["window"] = (draw(side), draw(side))
        if draw(st.booleans()):
            options["softcap"] = draw(st.sampled_from([0.5, 3.0]))
        if draw(st.booleans()):
            shape = draw(st.sampled_from([(heads,), (*batch, heads)]))
            kind = draw(rarely(st.just(torch.float32), st.sampled_from([torch.float16, torch.float64])))
            slopes = draw(specs(shape, kind, grad=draw(rarely(st.just(False), st.just(True)))))
        if draw(st.booleans()):
            options["return_lse"] = True
    if wrong and len(batch) < 2:
        if "lengths" in mistake:
            illegal = draw(st.sampled_from(["key_lengths", "query_lengths"]))
            right = torch.ones(batch, dtype=torch.int64)
            odd = {
                "lengths shape": (right[None], right[..., None], torch.ones(3, dtype=torch.int64)),
                "lengths dtype": (right.float(), right.bool(), right.double()),
                "no lengths": (right.tolist(), 1, (1,), "1"),
            }
            options[illegal] = draw(st.sampled_from(odd[mistake]))
        if "slopes" in mistake:
            illegal, kind = "alibi_slopes", torch.int64 if mistake == "slopes dtype" else torch.float32
            odd_shapes = ((heads + 1,), (3, heads), (heads, 1, 1), ()) if mistake == "slopes shape" else ((heads,),)
            slopes = draw(specs(draw(st.sampled_from(odd_shapes)), kind, grad=False))
        if mistake in ("window", "softcap"):
            illegal = mistake
            options[illegal] = draw(st.sampled_from(WRONG_WINDOWS if mistake == "window" else WRONG_SOFTCAPS))
    return Dense(*trio, mask, plain, options, slopes, draw(st.sampled_from(impls)), draw(SEEDS), illegal)


def formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    slopes: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_lengths: Tensor | None = None,
    query_lengths: Tensor | None = None,
    window: Any = None,
    softcap: float = 0.0,
    return_lse: bool = False,
    shift: int = 0,
    dropout_p: float = 0.0,
    keep: Tensor | None = None,
) -> Any:
    """Attention as its page says, in the dtype given; a row that sees nothing gives 0.

    What is dropped is where `keep` is False, or without it what torch draws.
    """
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    q_len, k_len = query.shape[-2], key.shape[-2]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query * scale) @ key.mT
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    rows, columns = torch.arange(q_len)[:, None] + shift, torch.arange(k_len)
    if slopes is not None:
        scores = scores - slopes.to(scores.dtype)[..., None, None] * (rows - columns).abs()
    visible = torch.ones(q_len, k_len, dtype=torch.bool)
    left, right = (-1 if side is None else side for side in window or (None, None))
    if left >= 0:
        visible = visible & (columns >= rows - left)
    if right >= 0:
        visible = visible & (columns <= rows + right)
    if is_causal:
        visible = visible & (columns <= rows)
    if key_lengths is not None:
        visible = visible & (columns < key_lengths[..., None, None, None])
    if query_lengths is not None:
        visible = visible & (torch.arange(q_len)[:, None] < query_lengths[..., None, None, None])
    if mask is not None and mask.dtype == torch.bool:
        visible = visible & mask
    elif mask is not None:
        scores = scores + mask
    scores = scores.masked_fill(~visible, float("-inf"))
    dead = (scores == float("-inf")).all(-1, keepdim=True)
    weights = scores.masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0).to(value.dtype)
    if keep is None:
        weights = F.dropout(weights, dropout_p)
    else:
        weights = weights * keep * (1 / (1 - dropout_p) if dropout_p < 1 else 0.0)
    out = weights @ value
    if not return_lse:
        return out
    lse = scores.masked_fill(dead, 0.0).logsumexp(-1).masked_fill(dead.squeeze(-1), float("-inf"))
    return out, lse if lse.dtype == torch.float64 and query.dtype == torch.float64 else lse.float()


# the kernels work with powers of 2: a score is multiplied by log2(e) on the way there, and the LSE by ln(2) on the way
# back, each time by a rounded number, and the product is rounded too; half a unit in the last place each
BASE_TWO = 2


def score_terms(scale: float | None) -> Any:
    """What gradients of scores are differences of (dO V^T and its mean in a row), times what multiplies them.

    That is the scaled query or key for those, and nothing for a mask that is added.
    """

    def size(given: Any, upstream: Any) -> float:
        query, key, value = (x.detach().double() for x in given[:3])
        if not (query.numel() and key.numel() and value.numel()):
            return 0.0
        products = float(upstream[0].double().norm(dim=-1).max() * value.norm(dim=-1).max())
        factor = query.shape[-1] ** -0.5 if scale is None else abs(scale)
        return products * max(1.0, factor * float(max(query.abs().max(), key.abs().max())))

    return size


def dense_call(case: Dense) -> str:
    def ours(query: Any, key: Any, value: Any, mask: Any, slopes: Any) -> Any:
        more = dict(case.more, alibi_slopes=slopes) if slopes is not None else case.more
        return fastops.scaled_dot_product_attention(query, key, value, mask, **case.plain, **more, impl=case.impl)

    arguments = [case.query, case.key, case.value, case.mask, case.slopes]
    if case.illegal:
        return refuses(ours, arguments, case.illegal)
    explicit, dropout_p = case.impl == "triton", case.plain.get("dropout_p")
    drops = isinstance(dropout_p, float) and 0 < dropout_p <= 1
    handed_on = case.impl == "auto" and case.mask is None and case.slopes is None and not case.more
    if isinstance(dropout_p, float) and not 0 <= dropout_p <= 1 and not handed_on:
        return refuses(ours, arguments, "dropout_p")  # one of torch's ways takes -0.5 for 0

    def stock(query: Any, key: Any, value: Any, mask: Any, slopes: Any) -> Any:
        if not case.more and slopes is None and not (explicit and drops):
            if isinstance(mask, Tensor) and isinstance(query, Tensor) and query.dtype == torch.float64:
                mask = mask.to(torch.float64) if mask.dtype == torch.float32 else mask
            return F.scaled_dot_product_attention(query, key, value, mask, **case.plain)
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(query.dtype)
        keep = None
        if explicit and drops:
            shape = (*query.shape[:-1], key.shape[-2])
            keep = keep_mask(new_seed(query.device), math.prod(shape[:-2]), *shape[-2:], dropout_p).view(shape)
        return formula(query, key, value, mask, slopes, **case.plain, **case.more, keep=keep)

    return agree(
        seeded(ours, case.seed),
        seeded(stock, case.seed),
        arguments,
        explicit=explicit,
        terms=score_terms(case.plain.get("scale")),
        roundings=BASE_TWO if explicit and case.more.get("return_lse") else 0,
    )


@fuzzed(dense(("auto", "torch"), FLOATS, 7, more=False))
def attention(case: Dense) -> str:
    return dense_call(case)


@fuzzed(dense(("auto", "torch"), ROUNDED_FLOATS, 7, more=True))
def attention_more(case: Dense) -> str:
    return dense_call(case)


@fuzzed(dense(("auto", "torch"), ROUNDED_FLOATS, 7, more=True))
def attention_sliced(case: Dense) -> str:
    """As on a CPU with sequences long enough for that."""
    if case.plain.get("dropout_p") in RATES:  # other calls drop other weights
        case = dataclasses.replace(case, plain={**case.plain, "dropout_p": round(case.plain["dropout_p"])})
    with mock.patch.object(attention_reference, "WORTH_A_CALL", 0):
        return dense_call(case)


@fuzzed(dense(("triton",), KERNEL_FLOATS, 7, more=True))
def attention_kernels(case: Dense) -> str:
    return dense_call(case)


@dataclass(frozen=True)
class Packed:
    trio: tuple[Spec, Spec, Spec]
    offsets: tuple[Any, Any]
    longest: tuple[Any, Any]
    options: dict[str, Any]
    slopes: Any
    illegal: tuple[str, ...]  # names of the wrong argument, one of which the error has
    impl: str
    seed: int


PACKED_MISTAKES = {
    "rank": ("query",),
    "dtype": ("query",),
    "heads": ("heads",),
    "value": ("value",),
    "offsets dtype": ("cu_seqlens_q",),
    "offsets shape": ("cu_seqlens_k",),
    "no offsets": ("cu_seqlens_k",),
    "descending": ("cu_seqlens_q", "cu_seqlens_k"),
    "outside": ("cu_seqlens_q", "cu_seqlens_k"),
    "not from 0": ("cu_seqlens_q", "cu_seqlens_k"),
    "max": ("max_seqlen_q",),
    "max too small": ("max_seqlen_k",),
    "window": ("window",),
    "softcap": ("softcap",),
    "slopes shape": ("alibi_slopes",),
    "slopes dtype": ("alibi_slopes",),
    "dropout_p": ("dropout",),
}


@st.composite
def packed(draw: Any, impls: tuple[str, ...], dtypes: Any) -> Packed:
    dtype, heads = draw(dtypes), draw(st.sampled_from([1, 2]))
    kv_heads = draw(st.sampled_from([1, heads]))
    mistake = draw(rarely(st.just("none"), st.sampled_from(sorted(PACKED_MISTAKES))))
    numbers = st.tuples(st.integers(0, 5), st.integers(0, 5))
    fewest = 0 if mistake == "none" and draw(st.integers(0, 15)) == 15 else 1
    pairs = draw(st.lists(numbers, min_size=fewest, max_size=3))
    lens = [[a for a, _ in pairs], [b for _, b in pairs]]
    if mistake == "max too small":
        lens[1][0] += 1
    width = draw(st.sampled_from([1, 8, 5]))
    spare = [draw(rarely(st.just(0), st.integers(1, 2))) for _ in range(2)]  # rows of no sequence
    totals = [sum(each) + more for each, more in zip(lens, spare, strict=True)]
    shapes = [(totals[0], heads, width), *[(totals[1], kv_heads, width)] * 2]
    if mistake == "rank":
        shapes[0] = (1, *shapes[0])
    if mistake == "heads":
        shapes[1] = (totals[1], heads + 1, width)
    if mistake == "value":
        shapes[2] = (totals[1] + 1, kv_heads, width)
    kinds = [dtype, torch.int64 if mistake == "dtype" else dtype, dtype]
    trio = tuple(draw(specs(shape, kind)) for shape, kind in zip(shapes, kinds, strict=True))
    integers = rarely(st.sampled_from([torch.int32, torch.int64]), st.sampled_from([torch.int16, torch.uint8]))
    kind = draw(integers)
    offsets: list[Any] = [torch.tensor([0, *torch.tensor(x).cumsum(0).tolist()], dtype=kind) for x in lens]
    longest: list[Any] = [max(x, default=0) + draw(rarely(st.just(0), st.integers(1, 3))) for x in lens]
    which = draw(st.integers(0, 1))
    if mistake == "descending":
        offsets[which] = torch.tensor([0, *offsets[which].long()[1:-1].tolist(), -1])
    if mistake == "outside":
        offsets[which] = offsets[which].long()
        offsets[which][-1] = totals[which] + draw(st.sampled_from([1, 2**32]))
    if mistake == "not from 0":
        offsets[which] = offsets[which].long()
        offsets[which][0] = draw(st.sampled_from([-1, -(2**32)]))
    if mistake == "offsets dtype":
        offsets[0] = draw(st.sampled_from([offsets[0].float(), offsets[0].bool()]))
    if mistake == "offsets shape":
        offsets[1] = draw(st.sampled_from([offsets[1][1:], offsets[1][None], offsets[1][0]]))
    if mistake == "no offsets":
        offsets[1] = draw(st.sampled_from([None, offsets[1].tolist(), totals[1]]))
    if mistake == "max":
        longest[0] = draw(st.sampled_from([float(longest[0]), None, "5", True]))
    if mistake == "max too small":
        longest[1] = draw(st.sampled_from([max(lens[1]) - 1, 0, -1]))
    options: dict[str, Any] = {"is_causal": draw(st.booleans())}
    side = rarely(st.one_of(st.none(), st.integers(-1, 4)), st.sampled_from([2**31, 2**40]))
    if draw(st.booleans()):
        options["window"] = (draw(side), draw(side))
    if draw(st.booleans()):
        options["softcap"] = 2.0
    if draw(st.booleans()):
        options["scale"] = 0.7
    if draw(st.booleans()):
        options["return_lse"] = True
    options["dropout_p"] = draw(st.sampled_from(RATES))
    wrong = {"window": WRONG_WINDOWS, "softcap": WRONG_SOFTCAPS, "dropout_p": (1.5, -0.5, float("nan"), "0", None)}
    if mistake in wrong:
        options[mistake] = draw(st.sampled_from(wrong[mistake]))
    shapes_of = (
        [(heads,), (len(pairs), heads)] if mistake != "slopes shape" else [(heads + 1,), (len(pairs) + 1, heads)]
    )
    slopes = specs(st.sampled_from(shapes_of), torch.int64 if mistake == "slopes dtype" else torch.float32, grad=False)
    slopes = draw(slopes if "slopes" in mistake else st.one_of(st.none(), slopes))
    names, impl = PACKED_MISTAKES.get(mistake, ()), draw(st.sampled_from(impls))
    return Packed(trio, tuple(offsets), tuple(longest), options, slopes, names, impl, draw(SEEDS))  # type: ignore[arg-type]


def packed_call(case: Packed) -> str:
    def ours(query: Any, key: Any, value: Any, slopes: Any) -> Any:
        return fastops.varlen_attention(
            query, key, value, *case.offsets, *case.longest, **case.options, alibi_slopes=slopes, impl=case.impl
        )

    arguments = [*case.trio, case.slopes]
    if case.illegal:
        return refuses(ours, arguments, *case.illegal)
    explicit, dropout_p = case.impl == "triton", case.options["dropout_p"]

    def stock(query: Any, key: Any, value: Any, slopes: Any) -> Any:
        ends_q, ends_k = (offsets.tolist() for offsets in case.offsets)
        count, heads = len(ends_q) - 1, query.shape[1]
        keeps = None
        if explicit and dropout_p:
            shape = (count, heads, *case.longest)
            keeps = keep_mask(new_seed(query.device), count * heads, *case.longest, dropout_p).view(shape)
        # rows of no sequence
        out, lse = query * 0 + 0 * key.sum() + 0 * value.sum(), torch.full(query.shape[:2], float("-inf"))
        outs, lses = [], []
        for i in range(count):
            q = query[ends_q[i] : ends_q[i + 1]].transpose(0, 1)
            k, v = (x[ends_k[i] : ends_k[i + 1]].transpose(0, 1) for x in (key, value))
            sizes = q.shape[1], k.shape[1]
            found = formula(
                q,
                k,
                v,
                None,
                slopes[i] if slopes is not None and slopes.dim() > 1 else slopes,
                **{**case.options, "return_lse": True},
                shift=sizes[1] - sizes[0],
                enable_gqa=True,
                keep=None if keeps is None else keeps[i, :, : sizes[0], : sizes[1]],
            )
            outs.append(found[0].transpose(0, 1))
            lses.append(found[1].mT)
        out, lse = (
            torch.cat([*outs, out[ends_q[-1] :]]),
            torch.cat([*lses, lse.to(query.dtype if query.dtype == torch.float64 else torch.float32)[ends_q[-1] :]]),
        )
        return (out, lse) if case.options.get("return_lse") else out

    return agree(
        seeded(ours, case.seed),
        seeded(stock, case.seed),
        arguments,
        explicit=explicit,
        terms=score_terms(case.options.get("scale")),
        roundings=BASE_TWO if explicit and case.options.get("return_lse") else 0,
    )


@fuzzed(packed(("auto", "torch"), ROUNDED_FLOATS))
def attention_packed(case: Packed) -> str:
    return packed_call(case)


@fuzzed(packed(("triton",), KERNEL_FLOATS))
def attention_packed_kernels(case: Packed) -> str:
    return packed_call(case)
