"""When a step ends, in a loop that nobody has marked.

Training: when the optimizers have stepped, each at least once (a GAN has two). Without an optimizer: when the model's
next forward begins, or a forward under `torch.no_grad()` ends.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from typing import Any

import torch

ASLEEP = 32  # an optimizer that let another one step so often alone is not waited for
LOOKS = 3  # for an optimizer; each walks over all objects
ANOTHER_MODEL = 20  # calls of another model, without one of the first, before that one is taken to be the model


class StepFinder:
    """Says at each event whether it ended a step.

    Args:
        model: whose forwards count; without it, the first outermost module that has parameters.
        script: whether a whole script is watched, where inference beside a living optimizer is validation.
    """

    def __init__(self, model: torch.nn.Module | None = None, script: bool = False):
        self.model = model
        self.script = script
        self.training = False  # an optimizer has stepped, or somebody marks by hand
        self.pending = False  # a forward has begun that no step has ended yet
        self._anchor: weakref.ref[torch.nn.Module] | None = None
        self._others: Counter[int] = Counter()
        self._turns: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._has_optimizer = False
        self._looked = 0

    def forward_begins(self, module: torch.nn.Module) -> bool:
        """Whether the step before this forward is over."""
        if self.training or not self._is_anchor(module):
            return False
        over = self.pending and not self._waits_for_optimizer(module)
        self.pending = True
        return over

    def forward_ends(self, module: torch.nn.Module) -> bool:
        """Whether this forward was a whole step."""
        if self.training or torch.is_grad_enabled() or not self.pending or not self._is_anchor(module, count=False):
            return False
        if self._waits_for_optimizer(module):
            return False
        self.pending = False
        return True

    def optimizer_stepped(self, optimizer: Any) -> bool:
        """Whether all optimizers in use have had their turn."""
        self.training = True
        self.pending = False
        self._turns[optimizer] = self._turns.get(optimizer, 0) + 1
        if self._turns[optimizer] >= ASLEEP:
            for other in [other for other, turns in self._turns.items() if turns == 0]:
                del self._turns[other]
        if 0 in self._turns.values():
            return False
        for known in list(self._turns):
            self._turns[known] = 0
        return True

    def marked_by_hand(self) -> None:
        """From now on the user says where steps end."""
        self.training = True
        self.pending = False

    def _is_anchor(self, module: torch.nn.Module, count: bool = True) -> bool:
        anchor = self._anchor() if self._anchor else None
        if anchor is module:
            self._others.clear()
            return True
        if anchor is not None and anchor is self.model:
            return False
        is_model = self.model is not None and any(part is self.model for part in module.modules())
        if not is_model and anchor is not None:
            self._others[id(module)] += count
            if self._others[id(module)] < ANOTHER_MODEL:
                return False
        if next(module.parameters(), None) is None and not is_model:
            return False
        self._anchor = weakref.ref(module)
        self._others.clear()
        return True

    def _waits_for_optimizer(self, module: torch.nn.Module) -> bool:
        """Whether an optimizer holds parameters of the module: gradients are accumulated, or it is validated."""
        if not torch.is_grad_enabled() and not self.script:
            return False
        if not self._has_optimizer and self._looked < LOOKS:
            self._looked += 1
            self._has_optimizer = has_optimizer(module)
        return self._has_optimizer


def has_optimizer(module: torch.nn.Module) -> bool:
    """Whether an optimizer is alive that holds a parameter of the module."""
    parameters = {id(parameter) for parameter in module.parameters()}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.optim.Optimizer):
            groups = getattr(thing, "param_groups", ())
            if any(id(parameter) in parameters for group in groups for parameter in group["params"]):
                return True
    return False
