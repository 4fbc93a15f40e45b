"""`attn_implementation="fastops"` for Hugging Face transformers; importing this module registers it.

    import fastops.integrations.transformers
    model = AutoModel.from_pretrained(path, attn_implementation="fastops")

transformers makes one mask a forward for every layer. Ours says by its number of dimensions what it means, so
that padding, causality and windows reach the kernel as such, without a dense mask and without a host sync:

    None    no padding; causal if the module is
    2       (B, Sk) bool, True at real tokens; causal if the module is, and queries and keys are equally many
    4       (B or 1, H or 1, Sq or 1, Sk) bool (True attends) or float (added): the whole truth, nothing else applies
    5       (B, left + 1, right + 1, 1, Sk or 0): a window, and padding unless the last size is 0. Expanded, it costs no
            memory; a layer need not tell the window, and one that tells another is not believed

Queries past the last real token of their sequence are skipped where they are surely padding: their attention output is
0, as under "flash_attention_2". Rows that see no key (left padding) give 0, too.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from fastops._env import KernelUnavailable, choose_impl
from fastops.nn.attention import attention_and_weights, lengths_of
from fastops.ops.attention import IMPLS, scaled_dot_product_attention
from fastops.ops.attention_reference import Options, visible_keys

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.masking_utils import (
        bidirectional_mask_function,
        causal_mask_function,
        eager_mask,
        sdpa_mask,
        sliding_window_bidirectional_mask_function,
        sliding_window_causal_mask_function,
    )
except ImportError as error:
    raise ImportError(
        f"fastops.integrations.transformers needs transformers >= 5.17 (pip install 'fastops-triton[hf]'): {error}"
    ) from error

NAME = "fastops"
# what some models ask of their attention and this one does not do
UNSUPPORTED = {
    "sinks": "attention sinks",
    "cache": "a paged cache (continuous batching)",
    "indices": "sparse attention",
    "block_indices": "sparse attention",
    "head_mask": "a head mask",
}
# arguments of an attention module whose keys and values come from the same tokens as its queries
SELF_ATTENTION_ARGUMENTS = {
    "self",
    "hidden_states",
    "attention_mask",
    "past_key_values",
    "position_embeddings",
    "position_ids",
    "cache_position",
    "output_attentions",
    "use_cache",
    "kwargs",
}
LENGTHS = "_fastops_lengths"
_MANNERS: dict[type, tuple[bool, bool]] = {}


def fastops_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function of transformers: query (B, H, Sq, D), key and value (B, Hk, Sk, D) to (B, Sq, H, Dv).

    Args:
        module: the attention module; its `is_causal` counts where `is_causal` is None.
        query: any strides, as key and value.
        key: Hk divides H.
        value: see key.
        attention_mask: see the module's docstring.
        dropout: probability to drop a weight.
        scaling: factor of the scores, 1 / sqrt(D) where None.
        is_causal: overrides the module.
        softcap: c tanh(scores / c).
        position_bias: added to the scores, broadcastable to (B, H, Sq, Sk).
        s_aux: (H,) attention sinks: each adds exp(s) to the sum its head's weights are divided by.
        output_attentions: also return the weights, (B, H, Sq, Sk), which takes torch and memory for all of them.
        **kwargs: what else the model passes. `sliding_window` is in the mask already; what would change the result and
            is not supported raises.

    Raises:
        ValueError: a paged cache, a head mask or sparse attention is asked for, or the mask has a shape that means
            nothing here.
        KernelUnavailable: FASTOPS_IMPL=triton where the kernel cannot run.
    """
    for name, what in UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise ValueError(f'attn_implementation="{NAME}" does not support {what} ({name}); use "eager"')
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    q_len, k_len = query.shape[2], key.shape[2]
    causal = bool(is_causal) and q_len > 1
    mask, window, lengths, queries = attention_mask, None, None, None
    if mask is not None and mask.dim() == 5:
        causal = False
        window = (mask.shape[1] - 1, mask.shape[2] - 1)
        mask = mask[:, 0, 0, 0] if mask.shape[4] else None
    elif mask is not None and mask.dim() == 4:
        causal = False
        if mask.dtype == torch.bool and mask.shape[1] == mask.shape[2] == 1:
            mask = mask[:, 0, 0]
    elif mask is not None and mask.dim() == 2:
        causal = causal and q_len == k_len
    elif mask is not None:
        raise ValueError(f'attn_implementation="{NAME}" got an attention mask of shape {tuple(mask.shape)}')
    if mask is not None and mask.dim() == 2:
        mask = mask.to(torch.bool).expand(query.shape[0], k_len)
        lengths = getattr(attention_mask, LENGTHS, None)
        if lengths is None or lengths.shape[0] != query.shape[0]:
            lengths = lengths_of(mask)
        if q_len == k_len and (causal or window is not None or attends_to_itself(type(module))):
            queries = lengths
        mask = mask[:, None, None]
    if position_bias is not None:
        mask = joined(position_bias, mask)
    if output_attentions:
        out, weights = attention_with_weights(query, key, value, mask, dropout, causal, scaling, window, softcap, s_aux)
        return out.transpose(1, 2).contiguous(), weights
    out = scaled_dot_product_attention(
        query,
        key,
        value,
        mask,
        dropout,
        causal,
        scaling,
        query.shape[1] != key.shape[1],
        key_lengths=lengths,
        query_lengths=queries,
        window=window,
        softcap=softcap or 0.0,
        return_lse=s_aux is not None,
    )
    if s_aux is not None:
        out, lse = out
        out = out * sink_share(lse, s_aux).to(out.dtype)
    return out.transpose(1, 2).contiguous(), None


def sink_share(lse: Tensor, sinks: Tensor) -> Tensor:
    """exp(lse) / (exp(lse) + exp(sink)), (B, H, Sq, 1): what a softmax with a sink keeps of one without."""
    return torch.sigmoid(lse - sinks.reshape(1, -1, 1))[..., None]


def attention_with_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scaling: float | None,
    window: tuple[int, int] | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The same in torch, forming the weights."""
    if choose_impl("auto", IMPLS) == "triton":
        raise KernelUnavailable("attention with FASTOPS_IMPL=triton: output_attentions asks for what it never stores")
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) if group > 1 else x for x in (key, value))
    left, right = window or (-1, 0 if causal else -1)
    band = visible_keys(query.shape[2], key.shape[2], query.device, Options(1.0, left, right))
    if band is not None:
        mask = band if mask is None else joined(mask, band) if mask.dtype != torch.bool else mask & band
    out, weights = attention_and_weights(query, key, value, mask, dropout, scale=scaling, softcap=softcap or 0.0)
    if sinks is None:
        return out, weights
    _, lse = scaled_dot_product_attention(
        query, key, value, mask, 0.0, scale=scaling, softcap=softcap or 0.0, return_lse=True
    )
    share = sink_share(lse, sinks)
    return out * share.to(out.dtype), weights * share.to(weights.dtype)


def fastops_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """The mask function of transformers: the smallest mask that says it all, see the module's docstring.

    Causal and windowed masks stay small for a whole sequence (equally many queries and keys) and for one query after a
    growing cache; anything else becomes the 4-D mask of `sdpa_mask`. No value is read on the host.

    Raises:
        ValueError: the model computes attention itself and would make of such a mask something else.
    """
    uses_interface, tells_causality = manners(type(kwargs.get("config")))
    dense = functools.partial(
        sdpa_mask if tells_causality else eager_mask,  # parts of the others may add the mask themselves
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        **kwargs,
    )
    if not uses_interface:
        model = type(kwargs["config"]).__name__.removesuffix("Config")
        raise ValueError(
            f'attn_implementation="{NAME}": models of {model} compute attention themselves, not through transformers\' '
            'AttentionInterface; use "eager"'
        )
    if attention_mask is not None and attention_mask.dim() == 5:
        return attention_mask  # generate() makes masks before it calls the model, which makes them again
    if not tells_causality or kv_offset != 0 or (attention_mask is not None and attention_mask.dim() != 2):
        return dense()
    padding = attention_mask
    if padding is not None:
        padding = nn.functional.pad(padding, (0, max(0, kv_length - padding.shape[1])))[:, :kv_length]
        if not torch.compiler.is_compiling():
            # once for all layers; compiled, Inductor sees that they compute the same
            setattr(padding, LENGTHS, lengths_of(padding))
    if mask_function is bidirectional_mask_function:
        return padding if allow_is_bidirectional_skip else dense()
    if not (allow_is_causal_skip or allow_is_bidirectional_skip) or not isinstance(q_offset, (int, torch.SymInt)):
        return dense()
    whole = q_length == kv_length and q_offset == 0
    last = q_length == 1 and q_offset == kv_length - 1
    if mask_function is causal_mask_function:
        return padding if whole or last else dense()
    window = window_of(mask_function)
    if window is None or not whole:
        return padding if window is not None and last and kv_length <= window[0] + 1 else dense()
    left, right = window
    if padding is None:
        empty = torch.empty((1, 1, 1, 1, 0), dtype=torch.bool, device=kwargs.get("device", "cpu"))
        return empty.expand(batch_size, left + 1, right + 1, 1, 0)
    windowed = padding[:, None, None, None].expand(-1, left + 1, right + 1, 1, -1)
    if not torch.compiler.is_compiling():
        setattr(windowed, LENGTHS, getattr(padding, LENGTHS))
    return windowed


def window_of(mask_function: Callable[..., Any]) -> tuple[int, int] | None:
    """(left, right) of a sliding window as transformers makes it, None for any other function."""
    if torch.compiler.is_compiling():
        return None  # a traced function shows no closure
    found = captured(mask_function, sliding_window_causal_mask_function(1))
    if found is not None and len(found) == 1:
        return found[0] - 1, 0
    found = captured(mask_function, sliding_window_bidirectional_mask_function(1))
    if found is not None and len(found) == 1:
        return found[0], found[0]
    return None


def captured(function: Any, pattern: Any) -> list[int] | None:
    """The integers `function` closes over where it is `pattern` but for their values, else None."""
    if function is pattern:
        return []
    if isinstance(pattern, int) and type(function) is int:
        return [function]
    if isinstance(pattern, tuple) and isinstance(function, tuple) and len(function) == len(pattern):
        parts = [captured(a, b) for a, b in zip(function, pattern, strict=True)]
    elif isinstance(pattern, FunctionType) and isinstance(function, FunctionType):
        if function.__code__ is not pattern.__code__:
            return None
        cells = zip(function.__closure__ or (), pattern.__closure__ or (), strict=True)
        parts = [captured(a.cell_contents, b.cell_contents) for a, b in cells]
    else:
        return None
    return None if any(part is None for part in parts) else [number for part in parts for number in part or ()]


@torch.compiler.assume_constant_result
def manners(config_class: type) -> tuple[bool, bool]:
    """Whether models of such a configuration call the attention function chosen for them, and whether its modules tell
    rightly by `is_causal` what they are: that only "sdpa" and like backends ask, so it is wrong in models without them.
    """
    if config_class not in _MANNERS:
        name = config_class.__module__.replace("configuration_", "modeling_")
        known = vars(sys.modules[name]).values() if name in sys.modules else ()
        models = [m for m in known if isinstance(m, type) and issubclass(m, PreTrainedModel) and m.__module__ == name]
        _MANNERS[config_class] = (
            not models or models[0]._can_set_attn_implementation(),
            not models or any(m._supports_sdpa or m._supports_attention_backend for m in models),
        )
    return _MANNERS[config_class]


@torch.compiler.assume_constant_result
def attends_to_itself(module_class: type[nn.Module]) -> bool:
    """Whether such a module can only take keys from the tokens its queries come from, by its forward's arguments."""
    return set(inspect.signature(module_class.forward).parameters) <= SELF_ATTENTION_ARGUMENTS


def joined(bias: Tensor, mask: Tensor | None) -> Tensor:
    """One additive mask of a bias and a bool or additive mask."""
    if mask is None:
        return bias
    return torch.where(mask, bias, float("-inf")) if mask.dtype == torch.bool else bias + mask


AttentionInterface.register(NAME, fastops_attention)
AttentionMaskInterface.register(NAME, fastops_mask)
