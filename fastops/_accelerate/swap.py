"""Swapping a module's class, and undoing it. The module stays the same object, its parameters stay the same tensors.

What it was is written on the module itself, so that a copy, a pickle or a file of it can be restored too.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fastops.nn._impl import WAS
from fastops.nn.sequential import Sequential

_rewrapped: dict[tuple[type, type], type] = {}
_derived: dict[type, type] = {}


def swap(module: nn.Module, new: type[nn.Module], **attributes: Any) -> None:
    """Make a module an instance of `new`; `attributes` are set on it, and go when it is restored."""
    module.__dict__[WAS] = (plain_class(module), tuple(attributes))
    module.__dict__.update(attributes)
    _set_class(module, new)


def note(module: nn.Module, **attributes: Any) -> None:
    """Set attributes of a module of ours; where it was swapped, they go when it is restored. No trace of defaults."""
    for name, value in attributes.items():
        if value == getattr(module, name):
            continue
        module.__dict__[name] = value
        if WAS in module.__dict__:
            old, names = module.__dict__[WAS]
            module.__dict__[WAS] = (old, (*names, name))


def unswap(module: nn.Module) -> None:
    """Undo `swap`, where there was one."""
    was = module.__dict__.pop(WAS, None)
    if was is not None:
        old, attributes = was
        for name in attributes:
            module.__dict__.pop(name, None)
        _set_class(module, old)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """A module's class; where FSDP2 or composable DDP put one of their own in front of it, the one behind that."""
    cls = type(module)
    return cls.__bases__[1] if _wrapped(cls) else cls


def _wrapped(cls: type) -> bool:
    return len(cls.__bases__) == 2 and cls.__bases__[0].__module__.startswith("torch.distributed.")


def _set_class(module: nn.Module, new: type) -> None:
    cls = type(module)
    if "parametrizations" in module._modules and cls.__name__.startswith("Parametrized"):
        # as torch.nn.utils.parametrize makes them: a class ParametrizedLinear(Linear) with properties
        own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__", "__doc__")}
        module.__class__ = type(f"Parametrized{new.__name__}", (new,), own)
        return
    if not _wrapped(cls):
        module.__class__ = new
        return
    # as fully_shard makes them: a class FSDPLinear(FSDPModule, Linear)
    if (cls, new) not in _rewrapped:
        prefix = cls.__name__.removesuffix(cls.__bases__[1].__name__)
        namespace = {name: value for name, value in vars(cls).items() if name in ("__deepcopy__", "__module__")}
        _rewrapped[cls, new] = type(prefix + new.__name__, (cls.__bases__[0], new), namespace)
    module.__class__ = _rewrapped[cls, new]


def why_no_class_of(cls: type) -> str | None:
    """Why no class can be made of a user's class of Sequential, or None: that would run, or bypass, code of theirs."""
    if type(cls) is not type:
        return f"{cls.__name__} has a metaclass, {type(cls).__name__}"
    theirs = [c for c in cls.__mro__ if c not in nn.Sequential.__mro__]
    special = ("__init_subclass__", "__new__", "__reduce__", "__reduce_ex__", "__getnewargs__", "__getnewargs_ex__")
    found = next((name for name in special if any(name in vars(c) for c in theirs)), None)
    return found and f"{cls.__name__} has a {found} of its own"


def sequential_class(cls: Any) -> type[nn.Module]:
    """fastops.nn.Sequential, in front of a subclass of nn.Sequential that has no forward of its own."""
    if cls is nn.Sequential:
        return Sequential
    if cls not in _derived:
        _derived[cls] = type(
            f"Fused{cls.__name__}", (Sequential, cls), {"__init__": cls.__init__, "__reduce_ex__": _reduce}
        )
    return _derived[cls]


def _reduce(self: Any, protocol: Any) -> Any:
    """Pickle by the class in front of which ours was put: ours has no name that a module holds."""
    behind = next(behind for behind, ours in _derived.items() if isinstance(self, ours))
    reduced: Any = object.__reduce_ex__(self, protocol)
    return _rebuild, (behind,), *reduced[2:]


def _rebuild(behind: type[nn.Sequential]) -> nn.Module:
    cls = sequential_class(behind)
    return cls.__new__(cls)


def sharded(module: nn.Module) -> bool:
    """Whether FSDP2 gathers this module's parameters before its forward."""
    return bool(getattr(module, "_is_fsdp_managed_module", False))
