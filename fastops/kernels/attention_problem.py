"""One attention call as its launchers see it: shapes, switches, strides, descriptors, and its configurations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastops import _env
from fastops.kernels._common import dot_precision, interpreted
from fastops.kernels.attention_configs import Config, Form, configuration
from fastops.kernels.attention_keys import attention_keys_kernel

PAD = 128  # rows of lse2, delta and key biases are padded to a multiple of it, which every block divides


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
        self.mask, self.mask_kind, self.key_range = None, 0, None
        if self.attn_mask is not None and not self.empty:
            self.mask, self.mask_kind, self.key_range = self.prepared(self.attn_mask)
        if self.alibi_slopes is not None:
            self.alibi_slopes = self.alibi_slopes.float().expand(self.batch, self.heads)
            if self.alibi_slopes.stride(1) != 1:
                self.alibi_slopes = self.alibi_slopes.contiguous()
        # not allow_tf32: reading that raises once a program has set fp32_precision
        self.precision = dot_precision(self.query.dtype, torch.backends.cuda.matmul.fp32_precision == "tf32")

    @property
    def empty(self) -> bool:
        """No scores to compute: nothing is launched."""
        return self.batch == 0 or self.query.numel() == 0 or self.key.numel() == 0 or not self.q_len or not self.k_len

    def prepared(self, attn_mask: Tensor) -> tuple[Tensor, int, Tensor | None]:
        """The mask as (B, H, Sq, Sk), its MASK, and for a mask of the keys alone their range."""
        is_bool = attn_mask.dtype == torch.bool
        mask = attn_mask.view(torch.uint8) if is_bool else attn_mask
        if attn_mask.shape[2] != 1:
            return mask.expand(self.batch, self.heads, self.q_len, self.k_len), 1 if is_bool else 2, None
        rows, heads = mask.shape[:2]
        padded = triton.cdiv(self.k_len, PAD) * PAD
        bias = mask.new_empty((rows, heads, 1, padded), dtype=torch.float32)
        key_range = mask.new_empty((rows,), dtype=torch.int32)
        stride_b, stride_h, _, stride_n = mask.expand(-1, -1, -1, self.k_len).stride()
        attention_keys_kernel[(rows,)](
            mask,
            stride_b,
            stride_h,
            stride_n,
            bias,
            key_range,
            heads,
            self.k_len,
            padded,
            BOOL=is_bool,
            BLOCK=1024,
            num_warps=4,
        )
        # the kernel of dK and dV throws hidden keys away in the end, if all heads of a program hide the same
        kind = 4 if is_bool and (heads == 1 or self.heads == self.kv_heads) else 3
        return bias.expand(self.batch, self.heads, -1, -1), kind, key_range.expand(self.batch)

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
            "RAGGED": self.k_len % PAD != 0 and self.mask_kind in (1, 2),
            "PRECISION": self.precision,
        }

    def configuration(self, kernel: str, tma: bool) -> Config:
        """The tile sizes for one of the kernels."""
        return configuration(
            kernel,
            block_d(self.head_dim),
            self.query.element_size(),
            sm_of(self.query),
            Form(
                tma=tma,
                dropout=self.dropout_p > 0,
                causal=self.right >= 0,
                grouped=self.heads != self.kv_heads,
                packed=self.cu_q is not None,
                keyed=self.mask_kind >= 3,
                banded=self.alibi_slopes is not None or self.left >= 0,
                scored=self.softcap > 0 or self.mask_kind in (1, 2),
            ),
        )

    def is_wide(self, *tensors: Tensor) -> bool:
        """Whether offsets inside one tile leave 32 bits."""
        mask = 0 if self.mask is None else max(self.mask.stride()[2:])
        return max(mask, *(strides_of(x)[2] for x in (self.query, self.key, self.value, *tensors))) * 256 >= 2**31

    def may_use_tma(self, *tensors: Tensor) -> bool:
        """Whether host descriptors can describe these tensors."""
        cut = self.cu_q is not None or self.query_lengths is not None
        if cut and block_d(self.head_dim) > 128:
            return False  # what a descriptor reads past a sequence is cut off in registers, and those are full
        return self.query.element_size() == 2 and 90 <= sm_of(self.query) < 120 and all(describable(x) for x in tensors)

    def mask_arguments(self) -> list[Any]:
        """The mask and its strides, the key range and its stride."""
        mask = [None, 0, 0, 0, 0] if self.mask is None else [self.mask, *self.mask.stride()]
        return [*mask, None, 0] if self.key_range is None else [*mask, self.key_range, self.key_range.stride(0)]

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
    """Whether a host TMA descriptor can describe these dimensions: 16-byte aligned, no stride of 0."""
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
    if x.dim() == 3:
        x = x.transpose(0, 1)[None]
    strides = [
        stride if size > 1 else unit * x.shape[-1] for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True)
    ]
    block = [1, 1, rows, block_d(x.shape[-1])]
    # the strides beside a descriptor are not read
    return [TensorDescriptor(x, list(x.shape), [*strides, 1], block), 0, 0, 0]
