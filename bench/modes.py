"""Turns an arm's forward into the step that a mode times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.case import Built, Tensors

Step = Callable[[], tuple[torch.Tensor, ...]]


def bind(built: Built, tensors: Tensors, mode: str, wrt: Sequence[str]) -> Step:
    """A step over these tensors, without arguments.

    It returns the outputs; for "train" the first output and then the gradients of `wrt` and of the arm's parameters;
    for "bwd" the gradients. The gradient fed in is prepared beforehand, outside the timed region.
    """
    if mode == "infer":
        return _infer(built, tensors)
    leaves = [tensors[name].requires_grad_() for name in wrt if name in tensors] + list(built.parameters)
    if mode == "fwd":
        return lambda: tuple(output.detach() for output in as_tuple(built.forward(tensors)))
    if mode == "train":
        return _train(built, tensors, leaves)
    if mode == "bwd":
        output = as_tuple(built.forward(tensors))[0]
        grad = tensors.get("grad")
        return lambda: torch.autograd.grad(output, leaves, grad, retain_graph=True)
    raise ValueError(f"unknown mode {mode!r}")


def _infer(built: Built, tensors: Tensors) -> Step:
    def step() -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return as_tuple(built.forward(tensors))

    return step


def _train(built: Built, tensors: Tensors, leaves: list[torch.Tensor]) -> Step:
    grad = tensors.get("grad")
    parameters = list(built.parameters)

    def step() -> tuple[torch.Tensor, ...]:
        output = as_tuple(built.forward(tensors))[0]
        grads = torch.autograd.grad(output, leaves, grad)
        if built.update:
            with torch.no_grad():
                torch._foreach_add_(parameters, list(grads[-len(parameters) :]), alpha=0.0)
        return (output.detach(), *grads)

    return step


def as_tuple(outputs: Any) -> tuple[torch.Tensor, ...]:
    """All tensors of a possibly nested result, in order."""
    if isinstance(outputs, torch.Tensor):
        return (outputs,)
    return tuple(tensor for part in outputs for tensor in as_tuple(part))
