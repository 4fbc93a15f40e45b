"""What the benchmark measures: a case, and the arms that compete on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

Tensors = dict[str, torch.Tensor]
MODES = {
    "infer": "forward under no_grad",
    "fwd": "forward that records for backward",
    "bwd": "backward alone, of a forward done before",
    "train": "forward and backward (a model: also loss and SGD update)",
}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


class Unavailable(Exception):
    """This arm cannot run here; the message says why."""


@dataclass(frozen=True)
class Case:
    """One op at one shape, dtype and mode.

    Attributes:
        op: name of its workload, e.g. "conv2d_relu".
        name: what people call the shape, e.g. "alexnet.conv2 b256".
        dtype: "fp16", "bf16" or "fp32".
        mode: one of MODES.
        shape: the numbers that the workload needs.
        suites: the named suites it belongs to.
    """

    op: str
    name: str
    dtype: str
    mode: str
    shape: Mapping[str, Any] = field(hash=False)
    suites: tuple[str, ...] = ("full",)

    @property
    def id(self) -> str:
        """Unique name, also what `-k` and the JSON use."""
        return f"{self.op}/{self.name}/{self.dtype}/{self.mode}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype of inputs and weights."""
        return DTYPES[self.dtype]


@dataclass
class Built:
    """An arm ready to run.

    Attributes:
        forward: maps the named input tensors to the output, or a tuple whose first element is differentiated.
        parameters: leaves that the arm owns (a module's weights).
        update: whether "train" ends with an SGD update of the parameters (at learning rate 0, so that every step does
            the same work on the same numbers).
    """

    forward: Callable[[Tensors], Any]
    parameters: list[torch.Tensor] = field(default_factory=list)
    update: bool = False


@dataclass(frozen=True)
class Arm:
    """One way to compute a case.

    Attributes:
        name: short name, a column of the results.
        role: "stock" competes for best stock, "ours" is judged against it, "control" is stock once more (the noise).
        build: imports what it needs and prepares; raises Unavailable (or anything) where it cannot.
        how: what it calls, in one line.
        layout: "contiguous" or "channels_last" inputs; converting them is not timed.
        headline: whether it may stand for fastops in the row's verdict (what a user gets by default).
        slow_build: left out unless asked for, because building it takes minutes.
        yardstick: whether it is plain stock PyTorch, whose errors say what the others are allowed.
    """

    name: str
    role: str
    build: Callable[[], Built]
    how: str = ""
    layout: str = "contiguous"
    headline: bool = False
    slow_build: bool = False
    yardstick: bool = False


class Workload(Protocol):
    """One op as the benchmark sees it.

    Two methods are optional: `randomised(case)`, whether outputs are random (dropout), and `relevant(case, outputs)`,
    the outputs with everything blanked that no caller may look at.
    """

    wrt: tuple[str, ...]

    def flops(self, case: Case) -> float:
        """Useful operations of one step, a multiply-add as two; padding and recomputation do not count."""

    def bytes(self, case: Case) -> float:
        """Least device memory traffic of one step: each input read once, each output written once."""

    def algebra(self, case: Case) -> float:
        """By how much a clever algorithm (Winograd) can cut `flops`; 1 where none is known."""

    def inputs(self, case: Case, device: torch.device, seed: int) -> Tensors:
        """Random inputs; "grad" is the gradient of the first output where the mode needs one."""

    def truth(self, case: Case, tensors: Tensors) -> tuple[torch.Tensor, ...]:
        """The outputs of a step (and gradients, in the order of `bind`) in float64 from the rounded inputs."""

    def arms(self, case: Case, device: torch.device) -> list[Arm]:
        """Every arm, also those that cannot run here, yardsticks first."""


def control_of(arm: Arm, name: str = "eager again") -> Arm:
    """The same arm once more: what differs between the two is noise."""
    return Arm(name, "control", arm.build, f"{arm.how}, built and timed a second time: A/A control", arm.layout)
