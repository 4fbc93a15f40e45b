"""The registered attention ops, their fakes and FLOP formulas, and the autograd.Function over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastops import _library
from fastops.ops.attention_dropout import keep_mask
from fastops.ops.attention_reference import Options, packed, reference

SHARED = (
    "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? key_lengths, Tensor? query_lengths, "
    "Tensor? alibi_slopes, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seed, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k, float scale, SymInt left, SymInt right, float softcap, float dropout_p"
)
LAUNCHERS = "fastops.kernels.attention"


def _like_rows(x: Tensor, sequence_first: bool) -> Tensor:
    if sequence_first:
        return x.new_empty(x.shape)
    B, H, S, D = x.shape
    return x.new_empty((B, S, H, D)).transpose(1, 2)


def _forward_fake(query: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    cu_seqlens_q = arguments[6]
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    return _like_rows(query, cu_seqlens_q is not None), lse


def _backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    mask_grad: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sequence_first = arguments[3] is not None
    dq, dk, dv = (_like_rows(x, sequence_first) for x in (query, key, value))
    if mask_grad and attn_mask is not None:
        return dq, dk, dv, query.new_empty(attn_mask.shape, dtype=attn_mask.dtype)
    return dq, dk, dv, query.new_empty((0,), dtype=torch.float32)


def _forward_flops(query: Any, key: Any, value: Any, *arguments: Any, **_: Any) -> int:
    """4 B H Sq Sk D as torch counts its own attention: nothing is taken off for masks, causality or lengths.

    Packed sequences count as if each had the greatest length.
    """
    cu_seqlens_q, max_q, max_k = arguments[4], arguments[7], arguments[8]
    if cu_seqlens_q is not None:
        _, heads, head_dim = query
        return 4 * (cu_seqlens_q[0] - 1) * heads * max_q * max_k * head_dim
    batch, heads, q_len, head_dim = query
    return 4 * batch * heads * q_len * key[2] * head_dim


def _backward_flops(grad_out: Any, grad_lse: Any, out: Any, lse: Any, mask_grad: Any, *arguments: Any, **_: Any) -> int:
    """Five products where the forward has two, as torch counts its own."""
    return _forward_flops(*arguments) * 5 // 2


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_lengths: Tensor | None,
    query_lengths: Tensor | None,
    alibi_slopes: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    seed: Tensor | None,
    max_q: int,
    max_k: int,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """The op in torch, with the very mask the kernels drop by."""
    options = Options(scale, left, right, softcap, dropout_p)
    heads = query.shape[1]
    if cu_q is None or cu_k is None:
        keep = None
        if seed is not None:
            shape = (query.shape[0], heads, query.shape[2], key.shape[2])
            keep = keep_mask(seed, shape[0] * heads, shape[2], shape[3], dropout_p).view(shape)
        return reference(
            query,
            key,
            value,
            attn_mask,
            options,
            key_lengths=key_lengths,
            query_lengths=query_lengths,
            alibi_slopes=alibi_slopes,
            keep=keep,
        )
    keeps = None
    if seed is not None:
        count = cu_q.shape[0] - 1
        every = keep_mask(seed, count * heads, max_q, max_k, dropout_p).view(count, heads, max_q, max_k)
        sizes = zip(cu_q.diff().tolist(), cu_k.diff().tolist(), strict=True)
        keeps = [every[i, :, :rows, :keys] for i, (rows, keys) in enumerate(sizes)]
    out, lse = packed(query, key, value, cu_q, cu_k, options, alibi_slopes=alibi_slopes, keeps=keeps, exact=True)
    assert lse is not None
    return out, lse


def _stock_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    mask_grad: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor | None, ...]:
    return _library.gradients_alone(
        lambda *four: _reference(*four, *arguments),
        (query, key, value, attn_mask),
        (True, True, True, mask_grad),
        (grad_out, grad_lse),
    )


forward_op = _library.define(
    "attention_forward",
    f"({SHARED}) -> (Tensor, Tensor)",
    f"{LAUNCHERS}:forward",
    _forward_fake,
    _forward_flops,
    ("attention", _reference),
)
backward_op = _library.define(
    "attention_backward",
    f"(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, bool mask_grad, {SHARED})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    f"{LAUNCHERS}:backward",
    _backward_fake,
    _backward_flops,
    ("attention", _stock_backward),
)


class Attention(torch.autograd.Function):
    """Output and LSE by the kernels; takes the arguments of the registered op."""

    generate_vmap_rule = True  # one launch for each element

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        key_lengths: Tensor | None,
        query_lengths: Tensor | None,
        alibi_slopes: Tensor | None,
        cu_q: Tensor | None,
        cu_k: Tensor | None,
        seed: Tensor | None,
        max_q: int,
        max_k: int,
        scale: float,
        left: int,
        right: int,
        softcap: float,
        dropout_p: float,
        auto: bool,
    ) -> Any:
        # spelled out: torch.compile without gradients takes the first of *arguments for a context
        return _library.for_graph(forward_op, auto)(
            query,
            key,
            value,
            attn_mask,
            key_lengths,
            query_lengths,
            alibi_slopes,
            cu_q,
            cu_k,
            seed,
            max_q,
            max_k,
            scale,
            left,
            right,
            softcap,
            dropout_p,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:10], *output)
        ctx.numbers, ctx.auto = inputs[10:17], inputs[17]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
        *inputs, out, lse = ctx.saved_tensors
        nothing = (None,) * (7 + len(ctx.numbers))
        if grad_out is None and grad_lse is None:
            return (None, None, None, None, *nothing)

        def stock(again: bool = False) -> Any:
            return _library.reference_gradients(
                lambda *trio: _reference(*trio, *inputs[4:], *ctx.numbers),
                inputs[:4],
                ctx.needs_input_grad[:4],
                (grad_out, grad_lse),
                again,
            )

        def kernels() -> Any:
            mask_grad = ctx.needs_input_grad[3]
            known = torch.zeros_like(out) if grad_out is None else grad_out
            launch = _library.for_graph(backward_op, ctx.auto)
            dq, dk, dv, dmask = launch(known, grad_lse, out, lse, mask_grad, *inputs, *ctx.numbers)
            return dq, dk, dv, dmask if mask_grad else None

        if _library.differentiable_again():
            return (*stock(again=True), *nothing)
        return (*_library.or_stock("attention", ctx.auto, kernels, stock), *nothing)
