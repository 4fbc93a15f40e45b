"""Launchers of the attention kernels.

Dense tensors are (B, H, S, D) views of any strides whose last is 1, packed ones (total, H, D). Outputs lie in memory as
(B, S, H, D), so that merging the heads afterwards copies nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from fastops.kernels._static import StaticCase
from fastops.kernels.attention_backward import attention_delta_kernel, attention_dkdv_kernel
from fastops.kernels.attention_bias import attention_bias_kernel
from fastops.kernels.attention_configs import Config
from fastops.kernels.attention_dq import attention_dq_kernel
from fastops.kernels.attention_forward import attention_forward_kernel
from fastops.kernels.attention_problem import PAD, Problem, block_d, source, strides_of, unit_stride
from fastops.kernels.attention_rate import keep_probability, threshold_bits


def like_rows(x: Tensor, sequence_first: bool) -> Tensor:
    """An output of the shape of x whose memory is (B, S, H, D), or (total, H, D)."""
    if sequence_first:
        return x.new_zeros(x.shape)
    B, H, S, D = x.shape
    return x.new_empty((B, S, H, D)).transpose(1, 2)


def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Output and LSE: (B, H, Sq, D) and (B, H, Sq), packed (total, H, D) and (total, H)."""
    p = Problem(*arguments)
    packed = p.cu_q is not None
    out = like_rows(p.query, packed)
    lse = p.query.new_empty(p.query.shape[:-1], dtype=torch.float32)
    if packed or p.empty:
        lse.fill_(float("-inf"))
    if p.empty:
        out.zero_()
        return out, lse
    tma = p.may_use_tma(p.query, p.key, p.value, out)
    config = p.configuration("forward", tma)
    tiles_m = triton.cdiv(p.q_len, config.block_m)
    keep = keep_probability(p.dropout_p)
    lse_strides = (0, lse.stride(1), lse.stride(0)) if packed else lse.stride()
    attention_forward_kernel[(tiles_m * p.batch * p.heads,)](
        *source(p.query, config.block_m, tma),
        *source(p.key, config.block_n, tma),
        *source(p.value, config.block_n, tma),
        *source(out, config.block_m, tma and not packed),
        lse,
        *lse_strides,
        *p.mask_arguments(),
        *p.side_arguments(),
        tiles_m,
        p.heads,
        p.q_len,
        p.k_len,
        p.scale,
        p.softcap,
        p.left,
        p.right,
        threshold_bits(p.dropout_p),
        1.0 / keep if keep else 0.0,
        **p.flags(),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        TMA=tma,
        WIDE=p.is_wide(),
        LAG=config.lag,
        LEAN=config.lean,
        ALIGNED_DIAGONAL=not packed and config.block_n % config.block_m == 0 and p.right % config.block_n == 0,
        **config.options(),
    )
    return out, lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, mask_grad: bool, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and (where asked for, else empty) of the float mask."""
    p = Problem(*arguments)
    packed = p.cu_q is not None
    grad_out = unit_stride(grad_out)
    dq, dk, dv = (like_rows(x, packed) for x in (p.query, p.key, p.value))
    dmask = p.query.new_empty(p.attn_mask.shape if mask_grad else (0,), dtype=mask_dtype(p.attn_mask, mask_grad))
    if p.empty:
        for x in (dq, dk, dv, dmask):
            x.zero_()
        return dq, dk, dv, dmask
    keep = keep_probability(p.dropout_p)
    if not keep:  # nothing of the output is left, and the gradient is that of the LSE alone
        grad_out, keep = torch.zeros_like(grad_out), 1.0
    lse2, delta, row_pad = row_terms(p, grad_out, grad_lse, out, lse, keep)
    shared = {**p.flags(), "WIDE": p.is_wide(grad_out)}
    inputs = (p.query, p.key, p.value, grad_out)
    tma = p.may_use_tma(*inputs)
    value_scale = 1.0 / keep
    tail = (p.softcap, p.left, p.right, threshold_bits(p.dropout_p))

    config = p.configuration("dkdv", tma)
    tiles_n = triton.cdiv(p.k_len, config.block_n)
    for want_dk, want_dv in ((True, False), (False, True)) if config.split else ((True, True),):
        attention_dkdv_kernel[(tiles_n * p.batch * p.kv_heads,)](
            *sources(inputs, config, tma),
            dk,
            *strides_of(dk),
            dv,
            *strides_of(dv),
            lse2,
            delta,
            *p.mask_arguments(),
            *p.side_arguments(),
            tiles_n,
            p.heads,
            p.q_len,
            row_pad,
            p.k_len,
            p.scale,
            p.scale * value_scale,
            value_scale,
            *tail,
            **shared,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            TMA=tma,
            LEAN=config.lean,
            WANT_DK=want_dk,
            WANT_DV=want_dv,
            **config.options(),
        )
    config = p.configuration("dq", tma)
    tiles_m = triton.cdiv(p.q_len, config.block_m)
    attention_dq_kernel[(tiles_m * p.batch * p.heads,)](
        *sources(inputs, config, tma),
        dq,
        *strides_of(dq),
        lse2,
        delta,
        *p.mask_arguments(),
        *p.side_arguments(),
        tiles_m,
        p.heads,
        p.q_len,
        row_pad,
        p.k_len,
        p.scale,
        p.scale * value_scale,
        *tail,
        **shared,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        TMA=tma,
        LEAN=config.lean,
        **config.options(),
    )
    if mask_grad:
        dmask.copy_(mask_gradient(p, grad_out, lse2, delta, row_pad, value_scale, shared))
    return dq, dk, dv, dmask


def mask_dtype(attn_mask: Tensor | None, mask_grad: bool) -> torch.dtype:
    """The dtype of the mask's gradient; of nothing where there is none."""
    return attn_mask.dtype if mask_grad and attn_mask is not None else torch.float32


def sources(inputs: tuple[Tensor, ...], config: Config, tma: bool) -> list[Any]:
    """query, key, value and the gradient of the output, as the backward kernels take them."""
    rows = (config.block_m, config.block_n, config.block_n, config.block_m)
    return [argument for x, size in zip(inputs, rows, strict=True) for argument in source(x, size, tma)]


def row_terms(
    p: Problem, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, keep: float
) -> tuple[Tensor, Tensor, int]:
    """lse2 and delta with padded rows, and the length of a padded row."""
    packed = p.cu_q is not None
    if packed:
        row_pad = (p.query.shape[0] + PAD * p.batch) // PAD * PAD
        shape: tuple[int, ...] = (p.heads, row_pad)
        tiles_m = triton.cdiv(p.q_len, PAD)
    else:
        row_pad = triton.cdiv(p.q_len, PAD) * PAD
        shape = (p.batch, p.heads, row_pad)
        tiles_m = row_pad // PAD
    lse2, delta = lse.new_empty(shape), lse.new_empty(shape)

    def row_strides(x: Tensor | None) -> tuple[int, ...]:
        if x is None:
            return (0, 0, 0)
        return (0, x.stride(1), x.stride(0)) if packed else x.stride()

    attention_delta_kernel[(tiles_m * p.batch * p.heads,)](
        out,
        *strides_of(out),
        grad_out,
        *strides_of(grad_out),
        lse,
        *row_strides(lse),
        grad_lse,
        *row_strides(grad_lse),
        lse2,
        delta,
        p.query_lengths,
        p.cu_q,
        tiles_m,
        p.heads,
        p.q_len,
        row_pad,
        keep,
        HEAD_DIM=p.head_dim,
        BLOCK_D=block_d(p.head_dim),
        BLOCK_M=PAD,
        HAS_GRAD_LSE=grad_lse is not None,
        HAS_QUERY_LENGTHS=p.query_lengths is not None,
        VARLEN=packed,
        WIDE=p.is_wide(out, grad_out),
        num_warps=8 if p.head_dim >= 64 else 4,  # four spill on sm_100 at 64
    )
    return lse2, delta, row_pad


def mask_gradient(
    p: Problem, grad_out: Tensor, lse2: Tensor, delta: Tensor, row_pad: int, value_scale: float, shared: dict[str, Any]
) -> Tensor:
    """The gradient of the float mask in fp32, summed over what it broadcasts over."""
    assert p.attn_mask is not None
    mask_b, mask_h, mask_m, mask_n = p.attn_mask.shape
    config = p.configuration("bias", False)
    tiles_m, tiles_n = triton.cdiv(p.q_len, config.block_m), triton.cdiv(p.k_len, config.block_n)
    over_m, over_n = mask_m == 1 and p.q_len > 1, mask_n == 1 and p.k_len > 1
    own = mask_b * mask_h * (1 if over_m else tiles_m) * (1 if over_n else tiles_n)
    steps = p.batch * p.heads * tiles_m * tiles_n // own
    split = 1
    while own * split < 512 and split * 2 <= steps:
        split *= 2
    partial = p.query.new_empty((split, *p.attn_mask.shape), dtype=torch.float32)
    flags = {name: value for name, value in shared.items() if name not in ("VARLEN", "MASK")}
    flags["RAGGED"] = p.k_len % PAD != 0
    mask = p.attn_mask.expand(p.batch, p.heads, p.q_len, p.k_len)
    lengths, query_lengths, _, _, slopes, stride_slope, seed = p.side_arguments()
    attention_bias_kernel[(own * split,)](
        *(argument for x in (p.query, p.key, p.value, grad_out) for argument in source(x, 0, False)),
        lse2,
        delta,
        mask,
        *mask.stride(),
        partial,
        lengths,
        query_lengths,
        slopes,
        stride_slope,
        seed,
        p.batch,
        p.heads,
        p.q_len,
        row_pad,
        p.k_len,
        mask_b,
        mask_h,
        tiles_m,
        tiles_n,
        p.scale,
        value_scale,
        p.softcap,
        p.left,
        p.right,
        threshold_bits(p.dropout_p),
        SPLIT=split,
        OVER_M=over_m,
        OVER_N=over_n,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        **flags,
        **config.options(),
    )
    return partial.sum(0)


def static_cases() -> list[StaticCase]:
    """Every shipped configuration, for the static gate."""
    from fastops.kernels.attention_static import static_cases as cases

    return cases()
