"""nn.TransformerEncoder, its layer and nn.TransformerDecoderLayer on fastops attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastops._env import may_read_values
from fastops.nn._impl import set_impl, with_impl
from fastops.nn.attention import MultiheadAttention, refuse_triton
from fastops.ops.attention import IMPLS


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer` whose self-attention is `fastops.nn.MultiheadAttention`.

    x = norm1(x + attention(x)); x = norm2(x + feedforward(x)), or with the norms first. Evaluation takes the same way
    as training: torch's fused path for it would not call the attention module. Nested tensors are left to torch.

    Args:
        *args: torch.nn.TransformerEncoderLayer's, as is `**kwargs`.
        impl: see fastops.nn.MultiheadAttention.
    """

    impl: str = "auto"

    def __init__(self, *args: Any, impl: str = "auto", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        set_impl(self, impl, IMPLS)
        take_over(self.self_attn, impl)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """See torch.nn.TransformerEncoderLayer.forward."""
        if src.is_nested:
            refuse_triton(self, "nested tensors are left to torch")
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        x = src
        if self.norm_first:
            x = x + self._sa_block(self.norm1(x), src_mask, src_key_padding_mask, is_causal=is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + self._sa_block(x, src_mask, src_key_padding_mask, is_causal=is_causal))
        return self.norm2(x + self._ff_block(x))

    def extra_repr(self) -> str:
        """What torch shows of the module, and the engine where one is named."""
        return with_impl(self)


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """`torch.nn.TransformerDecoderLayer` whose two attentions are `fastops.nn.MultiheadAttention`.

    Its forward is torch's, which calls the attention modules in training and evaluation alike.

    Args:
        *args: torch.nn.TransformerDecoderLayer's, as is `**kwargs`.
        impl: see fastops.nn.MultiheadAttention.
    """

    impl: str = "auto"

    def __init__(self, *args: Any, impl: str = "auto", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        set_impl(self, impl, IMPLS)
        take_over(self.self_attn, impl)
        take_over(self.multihead_attn, impl)

    def extra_repr(self) -> str:
        """What torch shows of the module, and the engine where one is named."""
        return with_impl(self)


class TransformerEncoder(nn.TransformerEncoder):
    """`torch.nn.TransformerEncoder` that hands its masks to the layers as they are.

    torch makes float masks of bool ones, and in evaluation a nested tensor of a padded batch, after reading the mask on
    the host; the layers then run torch's fused path. Here padded positions keep the values training gives them, where
    the nested path gives zeros.
    """

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """See torch.nn.TransformerEncoder.forward."""
        if is_causal is None:
            is_causal = mask is not None and may_read_values() and holds_causal(mask)
        output = src
        for layer in self.layers:
            output = layer(output, src_mask=mask, is_causal=is_causal, src_key_padding_mask=src_key_padding_mask)
        return output if self.norm is None else self.norm(output)


def holds_causal(mask: Tensor) -> bool:
    """Whether this is the causal mask, read on the host as torch.nn.TransformerEncoder does."""
    if mask.dim() != 2 or mask.shape[0] != mask.shape[1]:
        return False
    hidden = torch.ones_like(mask, dtype=torch.bool).triu(1)
    if mask.dtype != torch.bool:
        return bool((mask == torch.zeros_like(mask).masked_fill(hidden, float("-inf"))).all())
    return bool((mask == hidden).all())


def take_over(attention: nn.MultiheadAttention, impl: str) -> None:
    """Turn torch's module into ours in place: parameters, hooks and state stay."""
    attention.__class__ = MultiheadAttention
    set_impl(attention, impl, IMPLS)
