"""Models of transformers: their attention is chosen by name in their configuration, not by class."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

OURS = "fastops"
REPLACED = ("eager", "sdpa")
WAS = "_fastops_attention_was"


def is_pretrained(module: nn.Module) -> bool:
    """Whether this is a model of transformers; does not import it."""
    utils = sys.modules.get("transformers.modeling_utils")
    return utils is not None and isinstance(module, utils.PreTrainedModel)


def why_not(module: Any) -> str | None:
    """Why a model's attention stays what it is, or None."""
    try:
        _register()
    except ImportError as error:  # transformers is too old for it
        return str(error)
    current = module.config._attn_implementation
    if current not in REPLACED:
        return f"its attention was chosen to be {current!r}; fastops replaces {' and '.join(map(repr, REPLACED))}"
    for inner in _configs(module):
        chosen = inner._attn_implementation
        if chosen not in (None, OURS, *REPLACED):
            return f"the attention of its {type(inner).__name__} was chosen to be {chosen!r}"
    if module.config.output_attentions:
        return "output_attentions=True asks for the attention weights"
    if not module._can_set_attn_implementation():
        return "its attention does not go through transformers' AttentionInterface"
    return None


def switch(module: Any) -> None:
    """Set the attention of a model, and of the models inside it, to ours; note what it was on the module."""
    _register()
    module.__dict__[WAS] = [(config, config._attn_implementation) for config in _configs(module)]
    module.set_attn_implementation(OURS)


def switch_back(module: nn.Module) -> None:
    """Undo `switch`, where there was one; what was chosen since stays."""
    for config, implementation in module.__dict__.pop(WAS, ()):
        if config._attn_implementation == OURS:
            config._attn_implementation = implementation


def switched(module: nn.Module) -> bool:
    """Whether `switch` was called on it."""
    return WAS in module.__dict__


def _configs(module: nn.Module) -> list[Any]:
    """Every configuration in a model once, the outer ones first."""
    found: dict[int, Any] = {}
    waiting = [inner.config for inner in module.modules() if is_pretrained(inner)]
    while waiting:
        config: Any = waiting.pop(0)
        if id(config) not in found:
            found[id(config)] = config
            inner_configs = (getattr(config, name, None) for name in config.sub_configs)
            waiting += [inner for inner in inner_configs if inner is not None]
    return list(found.values())


def _register() -> None:
    import fastops.integrations.transformers  # noqa: F401  (registers the name)
