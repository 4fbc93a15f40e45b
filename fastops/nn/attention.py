"""nn.MultiheadAttention on fastops attention: same constructor, parameters, call forms and errors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastops._env import KernelUnavailable, choose_impl
from fastops.nn._impl import set_impl, with_impl
from fastops.ops.attention import IMPLS, scaled_dot_product_attention

NEED_WEIGHTS = "need_weights=True asks for the attention weights, which the kernel never stores (pass False)"


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` with another forward: concat(head_1 .. head_h) W_o, head_i = attention of Q, K, V.

    `need_weights=False` takes `fastops.scaled_dot_product_attention`; it reads the projections as strided views,
    without copies. `need_weights=True`, torch's default, forms the weights as torch does. `add_bias_kv`,
    `add_zero_attn` and nested tensors are left to torch. A query that may see no key gets 0 (and then the bias of
    `out_proj`) and zero gradients, where torch gives NaN.

    A `key_padding_mask` is handed on as a mask (B, 1, 1, S), of which the kernels find out on the device how far it
    reaches and whether it hides anything before that: keys past it are never visited, and padding at the end alone
    costs the main loop no mask. Beside an `attn_mask`, and on a CPU, it is handed on as lengths, too.

    `is_causal=True` with `need_weights=False` says that `attn_mask` is the causal mask, as in torch; the mask is then
    not read, also beside a `key_padding_mask`.

    Args:
        *args: torch.nn.MultiheadAttention's, as is `**kwargs`.
        impl: "auto", "triton" (raises KernelUnavailable where the kernel cannot run) or "torch".
    """

    impl: str = "auto"

    def __init__(self, *args: Any, impl: str = "auto", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        set_impl(self, impl, IMPLS)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See torch.nn.MultiheadAttention.forward."""
        why_torch = self._why_torch(query, key, value)
        if why_torch or need_weights:
            refuse_triton(self, why_torch or NEED_WEIGHTS)
        if why_torch:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        self._check(query, key, value, key_padding_mask, attn_mask, is_causal)
        batched = query.dim() == 3
        q, k, v = self._project(query, key, value)
        if not batched:
            q, k, v = (x.unsqueeze(0) for x in (q, k, v))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        batch_first = self.batch_first or not batched
        order = (0, 2, 1, 3) if batch_first else (1, 2, 0, 3)
        q, k, v = (x.permute(order) for x in (q, k, v))  # (B, H, S, D)
        if is_causal and not need_weights:
            attn_mask = None
        else:
            is_causal = False
        mask, lengths = attention_masks(key_padding_mask, attn_mask, q)
        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            out, weights = attention_and_weights(q, k, v, mask, dropout_p, average_attn_weights)
            weights = weights if batched else weights.squeeze(0)
        else:
            out = scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal, key_lengths=lengths, impl=self.impl)
        out = out.permute((0, 2, 1, 3) if batch_first else (2, 0, 1, 3)).flatten(2)
        out = F.linear(out, self.out_proj.weight, self.out_proj.bias)
        return (out if batched else out.squeeze(0)), weights

    def extra_repr(self) -> str:
        """What torch shows of the module, and the engine where one is named."""
        return with_impl(self)

    def _why_torch(self, query: Tensor, key: Tensor, value: Tensor) -> str | None:
        if self.bias_k is not None:
            return "add_bias_kv=True is left to torch"
        if self.add_zero_attn:
            return "add_zero_attn=True is left to torch"
        if query.is_nested or key.is_nested or value.is_nested:
            return "nested tensors are left to torch"
        return None

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> None:
        """The errors of torch's forward, of the same types, naming shapes."""
        shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
            raise AssertionError(f"expected query, key and value all 3-D, or all 2-D for one sequence, got {shapes}")
        for name, mask, dims in (
            ("key_padding_mask", key_padding_mask, (query.dim() - 1,)),
            ("attn_mask", attn_mask, (2, 3)),
        ):
            if mask is not None and not isinstance(mask, Tensor):
                raise TypeError(f"{name} must be a Tensor or None, not {type(mask).__name__}")
            if mask is not None and mask.dim() not in dims:
                raise AssertionError(
                    f"expected {name} of {' or '.join(map(str, dims))} dimensions for a {query.dim()}-D query, "
                    f"got {tuple(mask.shape)}"
                )
            if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
                raise AssertionError(f"only bool and floating types of {name} are supported, got {mask.dtype}")
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint: it says that attn_mask is causal")
        if self._qkv_same_embed_dim and key.shape != value.shape:
            raise AssertionError(f"key and value must be of one shape: {shapes}")
        for name, x, width in (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim)):
            if x.shape[-1] != width:
                kind = AssertionError if name == "query" else RuntimeError
                raise kind(f"was expecting {name} of embedding dimension {width}, but got {shapes}")
        if key.shape[:-1] != value.shape[:-1]:
            raise AssertionError(f"key's sequence and batch dims do not match value's: {shapes}")
        length_dim = 0 if query.dim() == 2 or not self.batch_first else 1
        q_len, k_len = query.shape[length_dim], key.shape[length_dim]
        batch = 1 if query.dim() == 2 else query.shape[1 - length_dim]
        if query.dim() == 3 and key.shape[1 - length_dim] != batch:
            raise RuntimeError(f"the batch sizes of query and key do not match: {shapes}")
        if key_padding_mask is not None:
            padded = (k_len,) if query.dim() == 2 else (batch, k_len)
            if tuple(key_padding_mask.shape) != padded:
                raise AssertionError(
                    f"Expected key_padding_mask of shape {padded}, but got {tuple(key_padding_mask.shape)}"
                )
        if attn_mask is not None:
            expected = (q_len, k_len) if attn_mask.dim() == 2 else (batch * self.num_heads, q_len, k_len)
            if tuple(attn_mask.shape) != expected:
                raise RuntimeError(
                    f"The shape of the {attn_mask.dim()}D attn_mask is {tuple(attn_mask.shape)}, "
                    f"but should be {expected}."
                )

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value after their projections, each (..., heads, head_dim), as views of what `linear` gave."""
        heads = (self.num_heads, self.head_dim)
        bias = self.in_proj_bias
        if self._qkv_same_embed_dim and key is value:
            weight = self.in_proj_weight
            if query is key:
                q, k, v = F.linear(query, weight, bias).unflatten(-1, (3, *heads)).unbind(-3)
                return q, k, v
            sizes = [self.embed_dim, 2 * self.embed_dim]
            q_weight, kv_weight = weight.split(sizes)
            q_bias, kv_bias = (None, None) if bias is None else bias.split(sizes)
            k, v = F.linear(key, kv_weight, kv_bias).unflatten(-1, (2, *heads)).unbind(-3)
            return F.linear(query, q_weight, q_bias).unflatten(-1, heads), k, v
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        q, k, v = (
            F.linear(x, w, b).unflatten(-1, heads) for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        return q, k, v


def attention_masks(
    key_padding_mask: Tensor | None, attn_mask: Tensor | None, query: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """torch.nn's two masks (True or -inf hides) as one mask of `scaled_dot_product_attention`, and key lengths.

    Args:
        key_padding_mask: (B, S), bool or float.
        attn_mask: (L, S) or (B * H, L, S), bool or float.
        query: (B, H, L, D).
    """
    bias: Tensor | None = None  # added
    visible: Tensor | None = None  # True attends
    lengths = None
    if key_padding_mask is not None:
        alive = _visible(key_padding_mask)
        if attn_mask is not None or query.device.type == "cpu":
            lengths = lengths_of(alive)
        if key_padding_mask.dtype == torch.bool:
            visible = alive[:, None, None]
        else:
            bias = _float_mask(key_padding_mask[:, None, None], query)
    if attn_mask is not None:
        attn_mask = attn_mask.unflatten(0, query.shape[:2]) if attn_mask.dim() == 3 else attn_mask[None, None]
        if attn_mask.dtype == torch.bool:
            visible = ~attn_mask if visible is None else visible & ~attn_mask
        else:
            attn_mask = _float_mask(attn_mask, query)
            bias = attn_mask if bias is None else bias + attn_mask
    if bias is not None and visible is not None:
        return torch.where(visible, bias, float("-inf")), lengths
    return (visible if bias is None else bias), lengths


def lengths_of(alive: Tensor) -> Tensor | None:
    """Index of the last True, plus one, in each row of (B, S), int32, without a host sync; None where S is 0."""
    size = alive.shape[-1]
    if size == 0:
        return None
    positions = torch.arange(1, size + 1, dtype=torch.int32, device=alive.device)
    return (positions * alive).amax(-1)


def attention_and_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    average: bool = False,
    scale: float | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """softmax(scale Q K^T + mask) V, and the weights after dropout, as torch returns them; 0 in dead rows."""
    batch, heads = query.shape[:2]
    query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
    key = key.transpose(-2, -1)
    dead = None
    if mask is None or softcap:
        scores = query @ key
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(~mask, float("-inf"))
        dead = (mask == float("-inf")).all(-1, keepdim=True)
        # a softmax over -inf alone is NaN, and so is its gradient
        mask = mask.masked_fill(dead, 0.0).to(query.dtype).expand(batch, heads, -1, -1).flatten(0, 1)
        if softcap:
            scores = scores + mask.unflatten(0, (batch, heads))
        else:
            scores = torch.baddbmm(mask, query.flatten(0, 1), key.flatten(0, 1)).unflatten(0, (batch, heads))
    weights = scores.softmax(-1)
    if dead is not None and (dead.shape[1] > 1 or not average):
        weights, dead = weights.masked_fill(dead, 0.0), None
    weights = F.dropout(weights, dropout_p) if dropout_p else weights
    out = weights.to(value.dtype) @ value
    weights = weights.mean(1) if average else weights
    if dead is not None:  # the same rows of every head: cheaper after the heads are averaged
        out, weights = out.masked_fill(dead, 0.0), weights.masked_fill(dead[:, 0], 0.0)
    return out, weights


def _visible(mask: Tensor) -> Tensor:
    return ~mask if mask.dtype == torch.bool else mask != float("-inf")


def _float_mask(mask: Tensor, query: Tensor) -> Tensor:
    return mask if mask.dtype in (torch.float32, query.dtype) else mask.to(query.dtype)


def refuse_triton(module: nn.Module, reason: str) -> None:
    """KernelUnavailable where the kernel was asked for by name."""
    if choose_impl(module.impl, IMPLS) == "triton":  # type: ignore[arg-type]
        raise KernelUnavailable(f"{type(module).__name__}: {reason}")
