"""Module times without kernels: marks on the GPU's timeline, each saying whose turn it is from there on.

Used where CUPTI cannot start. Forward marks come from the module hooks, backward marks from hooks on the autograd nodes
that made the modules' outputs. The pauses of the GPU are in these times.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from fastops.profiling import trace
from fastops.profiling.attribute import OPTIMIZER, OUTSIDE
from fastops.profiling.ranges import in_backward

SEEN = "fastops profile"


class EventClock:
    """`now()` gives a mark and `between(a, b)` the milliseconds from one to the other; CUDA events by default."""

    def __init__(
        self, now: Callable[[], Any] | None = None, between: Callable[[Any, Any], float] | None = None
    ) -> None:
        self._now = now or _record_event
        self._between = between or (lambda first, second: first.elapsed_time(second))
        self._marks: list[tuple[Any, str, bool]] = []
        self._cuts: list[tuple[int, str]] = []
        self._on = False

    def start(self) -> None:
        """Begin here."""
        self._on = True
        self.cut(trace.STEP_MARK)

    def stop(self) -> None:
        """Take no more marks."""
        self._on = False

    def cut(self, kind: str) -> None:
        """A step ends here."""
        self._cuts.append((len(self._marks), kind))
        self.outside()

    def outside(self) -> None:
        """From here on it is no module's turn."""
        self._note(OUTSIDE, False)

    def optimizer(self) -> None:
        """From here on it is the optimizer's turn."""
        self._note(OPTIMIZER, False)

    def enter(self, path: str) -> None:
        """A module's forward begins."""
        self._note(path, in_backward())

    def leave(self, path: str, output: Any, parent: str | None) -> None:
        """It ends; its backward will begin with the node that made its output."""
        for tensor in torch.utils._pytree.tree_leaves(output) if self._on else ():
            node: Any = tensor.grad_fn if isinstance(tensor, torch.Tensor) else None
            # the innermost module keeps the node
            if node is not None and SEEN not in node.metadata:
                node.metadata[SEEN] = path
                node.register_prehook(lambda gradients, path=path: self._note(path, True))
        self._note(parent or OUTSIDE, in_backward())

    def times(self, by_optimizer: bool) -> dict[tuple[str, bool], float]:
        """Milliseconds of each (module path, whether in backward), from the first to the last step mark."""
        cuts = [index for index, kind in self._cuts if not by_optimizer or kind == trace.STEP_MARK]
        spent: dict[tuple[str, bool], float] = defaultdict(float)
        marks = self._marks[cuts[0] : cuts[-1] + 1]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        for (start, path, backward), (stop, _, _) in itertools.pairwise(marks):
            spent[path, backward] += self._between(start, stop)
        return dict(spent)

    def _note(self, path: str, backward: bool) -> None:
        if self._on:
            self._marks.append((self._now(), path, backward))


def _record_event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
