"""Launchers of the attention kernels, and their fixed configurations.

Dense tensors are (B, H, S, D) views of any strides whose last is 1, packed ones (total, H, D). Outputs lie in memory as
(B, S, H, D), so that merging the heads afterwards copies nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastops import _env
from fastops.kernels._common import dot_precision, interpreted
from fastops.kernels._static import StaticCase
from fastops.kernels.attention_backward import attention_delta_kernel, attention_dkdv_kernel, attention_dq_kernel
from fastops.kernels.attention_bias import attention_bias_kernel
from fastops.kernels.attention_configs import Config, configuration
from fastops.kernels.attention_forward import attention_forward_kernel
from fastops.kernels.attention_rate import keep_probability, threshold_bits

LOG2E = 1.4426950408889634
PAD = 128  # rows of lse2 and delta are padded to a multiple of it, which every BLOCK_M divides


@dataclass
class Problem:
    """The arguments all kernels share, as the registered ops get them."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    key_lengths: Tensor | None
    query_lengths: Tensor | None
    alibi_slopes: Tensor | None
    cu_q: Tensor | None
    cu_k: Tensor | None
    seed: Tensor | None
    max_q: int
    max_k: int
    scale: float
    left: int
    right: int
    softcap: float
    dropout_p: float

    def __post_init__(self) -> None:
        self.query, self.key, self.value = (unit_stride(x) for x in (self.query, self.key, self.value))
        self.heads = self.query.shape[1]
        self.kv_heads = self.key.shape[1]
        self.head_dim = self.query.shape[-1]
        if self.cu_q is not None:
            self.batch, self.q_len, self.k_len = self.cu_q.shape[0] - 1, self.max_q, self.max_k
        else:
            self.batch, self.q_len, self.k_len = self.query.shape[0], self.query.shape[2], self.key.shape[2]
        self.mask, self.mask_kind = None, 0
        if self.attn_mask is not None and not self.empty:
            self.mask, self.mask_kind = self.prepared(self.attn_mask)
        if self.alibi_slopes is not None:
            self.alibi_slopes = self.alibi_slopes.float().expand(self.batch, self.heads)
            if self.alibi_slopes.stride(1) != 1:
                self.alibi_slopes = self.alibi_slopes.contiguous()
        self.precision = dot_precision(self.query.dtype, torch.backends.cuda.matmul.allow_tf32)

    @property
    def empty(self) -> bool:
        """No scores to compute: nothing is launched."""
        return self.batch == 0 or self.query.numel() == 0 or self.key.numel() == 0 or not self.q_len or not self.k_len

    def prepared(self, attn_mask: Tensor) -> tuple[Tensor, int]:
        """The mask as (B, H, Sq, Sk) and its MASK; one row for all becomes a bias of the keys, which costs no loads."""
        is_bool = attn_mask.dtype == torch.bool
        if attn_mask.shape[2] == 1:
            bias = attn_mask.new_zeros((), dtype=torch.float32)
            bias = torch.where(attn_mask, bias, float("-inf")) if is_bool else attn_mask.float() * LOG2E
            bias = bias.expand(-1, -1, -1, self.k_len)
            bias = torch.nn.functional.pad(bias, (0, -self.k_len % PAD), value=float("-inf"))
            return bias.expand(self.batch, self.heads, -1, -1), 3
        mask = attn_mask.view(torch.uint8) if is_bool else attn_mask
        return mask.expand(self.batch, self.heads, self.q_len, self.k_len), 1 if is_bool else 2

    def flags(self) -> dict[str, Any]:
        """The constexpr switches common to all kernels."""
        return {
            "GROUP": self.heads // self.kv_heads,
            "HEAD_DIM": self.head_dim,
            "BLOCK_D": block_d(self.head_dim),
            "CAUSAL": self.right >= 0,
            "WINDOW": self.left >= 0,
            "HAS_LENGTHS": self.key_lengths is not None,
            "HAS_QUERY_LENGTHS": self.query_lengths is not None,
            "VARLEN": self.cu_q is not None,
            "DROPOUT": self.dropout_p > 0,
            "SOFTCAP": 0 if not self.softcap else 1 if self.query.element_size() == 2 else 2,
            "ALIBI": self.alibi_slopes is not None,
            "MASK": self.mask_kind,
            "MASK_ROWS": self.mask_kind in (1, 2),
            "PRECISION": self.precision,
        }

    def configuration(self, kernel: str, tma: bool) -> Config:
        """The tile sizes for one of the kernels."""
        plain = self.attn_mask is None and self.alibi_slopes is None and not self.softcap and self.left < 0
        return configuration(
            kernel,
            block_d(self.head_dim),
            self.query.element_size(),
            sm=sm_of(self.query),
            plain=plain and self.query_lengths is None and self.cu_q is None,
            dropout=self.dropout_p > 0,
            causal=self.right >= 0,
            tma=tma,
        )

    def is_wide(self, *tensors: Tensor) -> bool:
        """Whether offsets inside one tile leave 32 bits."""
        mask = 0 if self.mask is None else max(self.mask.stride()[2:])
        return max(mask, *(strides_of(x)[2] for x in (self.query, self.key, self.value, *tensors))) * 256 >= 2**31

    def may_use_tma(self, *tensors: Tensor) -> bool:
        """Whether host descriptors can describe these tensors, and nothing needs rows cut off inside a tensor."""
        if self.cu_q is not None or self.query_lengths is not None or self.query.element_size() != 2:
            return False
        return sm_of(self.query) >= 90 and all(describable(x) for x in tensors)

    def mask_arguments(self) -> list[Any]:
        """The mask and its strides."""
        return [None, 0, 0, 0, 0] if self.mask is None else [self.mask, *self.mask.stride()]

    def side_arguments(self) -> list[Any]:
        """Lengths, offsets, slopes and seed."""
        slopes = self.alibi_slopes
        stride = 0 if slopes is None else slopes.stride(0)
        return [self.key_lengths, self.query_lengths, self.cu_q, self.cu_k, slopes, stride, self.seed]


def unit_stride(x: Tensor) -> Tensor:
    """X itself, or a copy where its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def block_d(head_dim: int) -> int:
    """The power of two that holds a head, at least what an MMA takes."""
    return max(16, triton.next_power_of_2(head_dim))


def sm_of(x: Tensor) -> int:
    """Compute capability as two digits; the interpreter stands for Hopper."""
    if interpreted():
        return 90
    major, minor = _env.capability(_env.index_of(x.device))
    return 10 * major + minor


def describable(x: Tensor) -> bool:
    """Whether a host TMA descriptor can describe a (B, H, S, D) view: 16-byte aligned, no stride of 0."""
    unit = 16 // x.element_size()
    strides = [stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    return x.data_ptr() % 16 == 0 and all(stride > 0 and stride % unit == 0 for stride in strides)


def strides_of(x: Tensor) -> tuple[int, int, int]:
    """Strides along batch, heads, sequence; a packed tensor has no batch."""
    if x.dim() == 3:
        return 0, x.stride(1), x.stride(0)
    return x.stride(0), x.stride(1), x.stride(2)


def source(x: Tensor, rows: int, tma: bool) -> list[Any]:
    """A tensor as a kernel takes it: descriptor or pointer, and its strides."""
    if not tma:
        return [x, *strides_of(x)]
    unit = 16 // x.element_size()
    strides = [
        stride if size > 1 else unit * x.shape[-1] for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True)
    ]
    block = [1, 1, rows, block_d(x.shape[-1])]
    # the strides beside a descriptor are not read
    return [TensorDescriptor(x, list(x.shape), [*strides, 1], block), 0, 0, 0]


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
        *source(out, config.block_m, tma),
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
    lse2, delta, row_pad = row_terms(p, grad_out, grad_lse, out, lse, keep)
    shared = {**p.flags(), "WIDE": p.is_wide(grad_out)}
    inputs = (p.query, p.key, p.value, grad_out)
    tma = p.may_use_tma(*inputs)
    value_scale = 1.0 / keep if keep else 0.0
    tail = (p.softcap, p.left, p.right, threshold_bits(p.dropout_p))

    config = p.configuration("dkdv", tma)
    tiles_n = triton.cdiv(p.k_len, config.block_n)
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
        num_warps=8 if p.head_dim > 64 else 4,
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
    flags["MASK_ROWS"] = True
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
