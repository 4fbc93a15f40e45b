"""`impl`, the engine that a module runs: a class attribute, "auto", until one is named for an instance.

So a module whose `__class__` was swapped has it too.
"""

from __future__ import annotations

from torch import nn

from fastops._env import choose_impl

WAS = "_fastops_was"  # where a module that fastops.accelerate changed has noted what it was


def set_impl(module: nn.Module, impl: str, allowed: tuple[str, ...]) -> None:
    """Give a module an engine; ValueError where there is none of that name."""
    choose_impl(impl, allowed)
    if impl != "auto":
        module.impl = impl  # type: ignore[assignment]


def with_impl(module: nn.Module, shown: str = "") -> str:
    """What a repr shows of a module, and its engine unless that is "auto"."""
    return ", ".join(filter(None, (shown, "" if module.impl == "auto" else f"impl={module.impl!r}")))
