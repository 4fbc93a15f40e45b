"""Proof, by a symbolic trace, that the only one to see a convolution's output in a model's forward is a ReLU."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

import fastops.nn
from fastops._accelerate import swap
from fastops.nn.sequential import FusedReLU, why_not_plain

RELUS = (F.relu, F.relu_, torch.relu, torch.relu_)


@dataclass(frozen=True)
class Proof:
    """A convolution is followed by a ReLU alone, in training and in evaluation."""

    relu_name: str
    relu: nn.Module | None  # the module, where it serves this convolution alone

    @property
    def note(self) -> str:
        if self.relu is None:
            return "the ReLU in forward stays and changes nothing: relu(relu(x)) = relu(x)"
        return "the ReLU module becomes fastops.nn.FusedReLU"

    def apply(self, convolution: nn.Module) -> None:
        swap.swap(convolution, fastops.nn.Conv2dReLU)
        if self.relu is not None:
            swap.swap(self.relu, FusedReLU)


def prove(model: nn.Module) -> dict[str, Proof | str]:
    """For the path of every convolution in the trace: the proof, or why there is none."""
    training = {module: module.training for module in model.modules()}
    try:
        found = []
        for mode in (True, False):
            for module in training:  # not train(): a model's own may do more than set the mode, as merging LoRA does
                module.training = mode
            found.append(_prove(model))
    except Exception as error:  # whatever a user's forward does with a proxy
        first_line = (str(error).splitlines() or [""])[0]
        reason = f"its forward cannot be traced ({type(error).__name__}: {first_line})"
        return {path: reason for path, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    finally:
        for module, mode in training.items():
            module.training = mode
    first, second = found
    return {path: _both(first.get(path), second.get(path)) for path in first.keys() | second.keys()}


def _both(first: Proof | str | None, second: Proof | str | None) -> Proof | str:
    if isinstance(first, Proof) and isinstance(second, Proof):
        return first if first == second else Proof(first.relu_name, None)
    for answer in (first, second):
        if isinstance(answer, str):
            return answer
    return "it is called in training only, or in evaluation only"


class _Tracer(fx.Tracer):
    """Looks into Sequentials and into the user's own modules, not into torch's or fastops' own."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, nn.Sequential):
            return False
        return type(m).__module__.startswith("fastops.") or super().is_leaf_module(m, module_qualified_name)


def _prove(model: nn.Module) -> dict[str, Proof | str]:
    graph = _Tracer().trace(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    calls: dict[nn.Module, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == "call_module":
            calls[modules[str(node.target)]].append(node)
    found: dict[str, Proof | str] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            found[path] = _judge(module, calls, modules)
    return found


def _judge(module: nn.Module, calls: dict[nn.Module, list[fx.Node]], modules: dict[str, nn.Module]) -> Proof | str:
    reason = why_not_plain(module, nn.Conv2d)
    if reason is not None:
        return reason
    if not calls[module]:
        return "forward does not call it"
    relus = []
    for call in calls[module]:
        if len(call.users) != 1:
            return f"{len(call.users)} operations use its output, not one ReLU"
        (user,) = call.users
        if not _is_relu(user, call, modules):
            return f"{_describe(user, modules)} follows it, not a ReLU"
        relus.append(user)
    names = sorted({_describe(relu, modules) for relu in relus})
    owners = {modules[str(relu.target)] if relu.op == "call_module" else None for relu in relus}
    (owner, *others) = owners
    alone = owner is not None and not others and all(node in relus for node in calls[owner])
    if not alone and any(_in_place(relu, modules) for relu in relus):
        return (
            "the ReLU after it works in place, on what the convolution would keep for backward (inplace=False: taken)"
        )
    return Proof(" or ".join(names), owner if alone else None)


def _is_relu(node: fx.Node, source: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if not node.args or node.args[0] is not source:
        return False
    if node.op == "call_module":
        return why_not_plain(modules[str(node.target)], nn.ReLU) is None
    if node.op == "call_method":
        return node.target in ("relu", "relu_")
    return node.op == "call_function" and node.target in RELUS


def _in_place(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a ReLU writes into what it is given."""
    if node.op == "call_module":
        return bool(modules[str(node.target)].inplace)
    if node.target in ("relu_", F.relu_, torch.relu_):
        return True
    return bool(node.kwargs.get("inplace", node.args[1] if len(node.args) > 1 else False))


def _describe(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    if node.op == "call_module":
        return type(modules[str(node.target)]).__name__
    if node.op == "output":
        return "the output of forward"
    target: Any = node.target
    return f"{target}()" if isinstance(target, str) else f"{getattr(target, '__name__', target)}()"
