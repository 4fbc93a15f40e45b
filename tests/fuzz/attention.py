"""scaled_dot_product_attention and varlen_attention."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

import fastops
from tests.fuzz.engine import FLOATS, KERNEL_FLOATS, ROUNDED_FLOATS, Spec, agree, fuzzed, rarely, specs

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


@st.composite
def dense(draw: Any, impls: tuple[str, ...], dtypes: Any, sizes: int, more: bool) -> Dense:
    mistake = draw(st.sampled_from(MISTAKES))
    dtype = draw(dtypes)
    batch = draw(st.sampled_from([(1,), (2,), (), (2, 1)]))
    heads = draw(st.sampled_from([1, 2, 4]))
    q_len, k_len = draw(st.integers(0 if mistake == "none" else 1, sizes)), draw(st.integers(1, sizes))
    width = draw(st.sampled_from([1, 3, 8, 9, 16]))
    groups = draw(st.sampled_from([1, 1, 2])) if heads > 1 else 1
    shapes = [(*batch, heads, q_len, width), *[(*batch, heads // groups, k_len, width)] * 2]
    if draw(st.integers(0, 9)) == 9:
        shapes[2] = (*shapes[2][:-1], width + 1)
    flat = not batch and heads == 1 and draw(st.booleans())
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
        plain["dropout_p"] = draw(st.sampled_from([1.5, "0", None]))
    options: dict[str, Any] = {}
    slopes = None
    if more and mistake == "none" and not flat and len(batch) < 2:
        size = len(batch)

        def lengths(longest: int) -> Tensor:
            numbers = [draw(st.integers(0, longest + 1)) for _ in range(math.prod(batch))]
            return torch.tensor(numbers, dtype=draw(st.sampled_from([torch.int32, torch.int64]))).view(batch)

        if draw(st.booleans()):
            options["key_lengths"] = lengths(k_len)
        if draw(st.booleans()):
            options["query_lengths"] = lengths(q_len)
        side = st.one_of(st.none(), st.integers(-1, sizes))
        if draw(st.booleans()):
            options["window"] = (draw(side), draw(side))
        if draw(st.booleans()):
            options["softcap"] = draw(st.sampled_from([0.5, 3.0]))
        if draw(st.booleans()):
            shape = draw(st.sampled_from([(heads,), (*batch, heads)])) if size else (heads,)
            slopes = draw(specs(shape, torch.float32, grad=False))
        if draw(st.booleans()):
            options["return_lse"] = True
    return Dense(*trio, mask, plain, options, slopes, draw(st.sampled_from(impls)))


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
) -> Any:
    """Attention as its page says, in the dtype given; a row that sees nothing gives 0."""
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
    out = weights @ value
    if not return_lse:
        return out
    lse = scores.masked_fill(dead, 0.0).logsumexp(-1).masked_fill(dead.squeeze(-1), float("-inf"))
    return out, lse if lse.dtype == torch.float64 and query.dtype == torch.float64 else lse.float()


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

    def stock(query: Any, key: Any, value: Any, mask: Any, slopes: Any) -> Any:
        if not case.more and slopes is None:
            if isinstance(mask, Tensor) and isinstance(query, Tensor) and query.dtype == torch.float64:
                mask = mask.to(torch.float64) if mask.is_floating_point() else mask
            return F.scaled_dot_product_attention(query, key, value, mask, **case.plain)
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(query.dtype)
        return formula(query, key, value, mask, slopes, **case.plain, **case.more)

    arguments = [case.query, case.key, case.value, case.mask, case.slopes]
    return agree(ours, stock, arguments, explicit=case.impl == "triton", terms=score_terms(case.plain.get("scale")))


@fuzzed(dense(("auto", "torch"), FLOATS, 7, more=False))
def attention(case: Dense) -> str:
    return dense_call(case)


@fuzzed(dense(("auto", "torch"), ROUNDED_FLOATS, 7, more=True))
def attention_more(case: Dense) -> str:
    return dense_call(case)


@fuzzed(dense(("triton",), KERNEL_FLOATS, 7, more=True))
def attention_kernels(case: Dense) -> str:
    return dense_call(case)


@dataclass(frozen=True)
class Packed:
    trio: tuple[Spec, Spec, Spec]
    q_lens: list[int]
    k_lens: list[int]
    options: dict[str, Any]
    slopes: Any
    mistake: str
    impl: str


@st.composite
def packed(draw: Any, impls: tuple[str, ...], dtypes: Any) -> Packed:
    dtype, heads = draw(dtypes), draw(st.sampled_from([1, 2]))
    kv_heads = draw(st.sampled_from([1, heads]))
    pairs = draw(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=3))
    q_lens, k_lens = [a for a, _ in pairs], [b for _, b in pairs]
    width = draw(st.sampled_from([1, 8, 5]))
    names = ("rank", "dtype", "heads", "offsets dtype", "offsets shape", "max", "value")
    mistake = draw(rarely(st.just("none"), st.sampled_from(names)))
    shapes = [(sum(q_lens), heads, width), *[(sum(k_lens), kv_heads, width)] * 2]
    if mistake == "rank":
        shapes[0] = (1, *shapes[0])
    if mistake == "heads":
        shapes[1] = (sum(k_lens), heads + 1, width)
    if mistake == "value":
        shapes[2] = (sum(k_lens) + 1, kv_heads, width)
    kinds = [dtype, torch.int64 if mistake == "dtype" else dtype, dtype]
    trio = tuple(draw(specs(shape, kind)) for shape, kind in zip(shapes, kinds, strict=True))
    options: dict[str, Any] = {"is_causal": draw(st.booleans())}
    side = st.one_of(st.none(), st.integers(-1, 4))
    if draw(st.booleans()):
        options["window"] = (draw(side), draw(side))
    if draw(st.booleans()):
        options["softcap"] = 2.0
    if draw(st.booleans()):
        options["scale"] = 0.7
    if draw(st.booleans()):
        options["return_lse"] = True
    slopes = draw(st.one_of(st.none(), specs((heads,), torch.float32, grad=False)))
    return Packed(trio, q_lens, k_lens, options, slopes, mistake, draw(st.sampled_from(impls)))


def packed_call(case: Packed) -> str:
    offsets = [torch.tensor([0, *torch.tensor(x).cumsum(0).tolist()]) for x in (case.q_lens, case.k_lens)]
    longest: list[Any] = [max(case.q_lens), max(case.k_lens)]
    given = list(offsets)
    if case.mistake == "offsets dtype":
        given[0] = offsets[0].float()
    if case.mistake == "offsets shape":
        given[1] = offsets[1][1:]
    if case.mistake == "max":
        longest[0] = float(longest[0])

    def ours(query: Any, key: Any, value: Any, slopes: Any) -> Any:
        return fastops.varlen_attention(
            query, key, value, *given, *longest, **case.options, alibi_slopes=slopes, impl=case.impl
        )

    def stock(query: Any, key: Any, value: Any, slopes: Any) -> Any:
        if case.mistake == "max":
            raise TypeError
        if case.mistake != "none":
            raise RuntimeError
        found = []
        for q, k, v in zip(query.split(case.q_lens), key.split(case.k_lens), value.split(case.k_lens), strict=True):
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
            shift = k.shape[1] - q.shape[1]
            found.append(formula(q, k, v, None, slopes, **case.options, shift=shift, enable_gqa=True))
        if case.options.get("return_lse"):
            outs, lses = zip(*found, strict=True)
            return torch.cat([x.transpose(0, 1) for x in outs]), torch.cat([x.mT for x in lses])
        return torch.cat([x.transpose(0, 1) for x in found])

    explicit, terms = case.impl == "triton", score_terms(case.options.get("scale"))
    return agree(ours, stock, [*case.trio, case.slopes], explicit=explicit, terms=terms)


@fuzzed(packed(("auto", "torch"), ROUNDED_FLOATS))
def attention_packed(case: Packed) -> str:
    return packed_call(case)


@fuzzed(packed(("triton",), KERNEL_FLOATS))
def attention_packed_kernels(case: Packed) -> str:
    return packed_call(case)
