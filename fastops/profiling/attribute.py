"""Whose time it was: every host event and kernel gets the module it ran for, in forward or in backward.

Forward: the innermost module range around the event. Backward: an autograd node carries the sequence number of the
forward operator that made it, so its work belongs to that operator's module. What no module asked for is named.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from fastops.profiling.trace import MODULE_RANGE, HostEvent, Trace

OUTSIDE = "(outside modules)"
ACCUMULATION = "(gradient accumulation)"
OPTIMIZER = "(optimizer)"
COMMUNICATION = "(communication)"
DATA = "(data loading)"
PYTHON = "(Python between operators)"
BACKWARD_NODE = "autograd::engine::evaluate_function: "


def attribute(trace: Trace) -> None:
    """Set `module` and `backward` of every host event of the trace."""
    made, remade = _Makers(), _Makers()  # by forwards; inside backward: recomputed, or to be differentiated again
    for event in trace.host:
        parent = event.parent
        event.module = parent.module if parent else OUTSIDE
        event.backward = parent.backward if parent else False
        sequence = event.arguments.get("Sequence number", -1)
        if event.name.startswith(MODULE_RANGE):
            event.module = event.name[len(MODULE_RANGE) :]
        elif event.name.startswith(BACKWARD_NODE):
            tables = (remade, made) if event.backward else (made, remade)  # reentrant checkpoints nest
            makers = (table.find(event.thread, sequence) for table in tables)
            found = ACCUMULATION if "AccumulateGrad" in event.name else next(filter(None, makers), None)
            event.module = found or event.module
            event.backward = True
        elif event.name.startswith("Optimizer."):
            event.module = OPTIMIZER
        elif event.name.startswith("enumerate(DataLoader)"):
            event.module = DATA
        elif event.name.startswith(("c10d::", "nccl:", "gloo:")) and event.module in (OUTSIDE, ACCUMULATION):
            event.module = COMMUNICATION  # of gradients
        elif sequence >= 0 and not (parent and parent.name.startswith(BACKWARD_NODE)):
            (remade if event.backward else made).threads[event.thread][sequence] = event.module


class _Makers:
    """Thread -> sequence number -> module; threads count for themselves, the last event of a number made the node."""

    def __init__(self) -> None:
        self.threads: dict[Any, dict[int, str]] = defaultdict(dict)

    def find(self, thread: Any, sequence: int) -> str | None:
        """On a CPU a node runs in the thread of its forward; for a GPU in one of the engine's."""
        own = self.threads[thread].get(sequence) if thread in self.threads else None
        others = (numbers[sequence] for numbers in self.threads.values() if sequence in numbers)
        return own or next(others, None)


def operator_of(event: HostEvent) -> HostEvent:
    """The operator that a launch call ran in, or the event itself."""
    if event.category == "cpu_op":
        return event
    return next((ancestor for ancestor in event.ancestors() if ancestor.category == "cpu_op"), event)
