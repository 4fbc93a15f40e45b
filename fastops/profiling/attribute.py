"""Whose time it was: every host event and kernel gets the module it ran for, in forward or in backward.

Forward: the innermost module range around the event. Backward: an autograd node carries the sequence number of the
forward operator that made it, so its work belongs to that operator's module. What no module asked for is named.
"""

from __future__ import annotations

from fastops.profiling.trace import MODULE_RANGE, HostEvent, Trace

OUTSIDE = "(outside modules)"
ACCUMULATION = "(gradient accumulation)"
OPTIMIZER = "(optimizer)"
DATA = "(data loading)"
PYTHON = "(Python between operators)"
BACKWARD_NODE = "autograd::engine::evaluate_function: "


def attribute(trace: Trace) -> None:
    """Set `module` and `backward` of every host event of the trace."""
    made_by: dict[int, str] = {}  # sequence number -> module; the last event before the node was made is its maker
    for event in trace.host:
        parent = event.parent
        event.module = parent.module if parent else OUTSIDE
        event.backward = parent.backward if parent else False
        sequence = event.arguments.get("Sequence number", -1)
        if event.name.startswith(MODULE_RANGE):
            event.module = event.name[len(MODULE_RANGE) :]
        elif event.name.startswith(BACKWARD_NODE):
            event.backward = True
            if "AccumulateGrad" in event.name:
                event.module = ACCUMULATION
            else:
                event.module = made_by.get(sequence, event.module)
        elif event.name.startswith("Optimizer."):
            event.module = OPTIMIZER
        elif event.name.startswith("enumerate(DataLoader)"):
            event.module = DATA
        elif sequence >= 0 and not event.backward:
            made_by[sequence] = event.module


def operator_of(event: HostEvent) -> HostEvent:
    """The operator that a launch call ran in, or the event itself."""
    if event.category == "cpu_op":
        return event
    return next((ancestor for ancestor in event.ancestors() if ancestor.category == "cpu_op"), event)
