"""No number for an arm that computes something else.

Several seeds go through the same input buffers, so an answer remembered from the last call is a wrong answer. The rule
is derived, not tuned: against float64, an arm may err twice as much as stock PyTorch in the same dtype (root mean
square over each output; of the yardstick arms, the one that errs most), and no single element by more than four times
stock's worst. One eps is allowed on top: of the dtype, or of TF32 where PyTorch allows that for fp32 on a GPU, since
stock may use a kernel without it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from bench.case import Case, Tensors
from bench.clocks import warnings_off
from bench.modes import Step
from bench.verdict import tf32_allowed

RMS_FACTOR = 2.0
MAX_FACTOR = 4.0
RANDOM_FACTOR = 1.5  # dropout: how far the size of the random part may be from stock's
NEGLIGIBLE = 1e-3  # of the largest output: what is smaller (a gradient that cancels to 0) is measured against that
TF32_EPS = 2.0**-10  # ten bits of mantissa, as many as fp16 has
HOPELESS_RMS = 0.2  # an error of stock itself beyond this means that the truth is of something else
LATE_CYCLES = 20_000_000  # about 10 ms: inputs arrive this late on the current stream

Outputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Error:
    """Distance of one output from the truth."""

    rms: float  # relative to the root mean square of the truth
    worst: float
    nans: int
    squares: float = 0.0  # sum of squared differences


@dataclass
class Exam:
    """Questions and answers of one case: the inputs of each seed, their float64 outputs, and stock's own errors.

    With `randomised` (dropout), outputs are compared with the truth without randomness, and the distance must be of
    stock's size, neither larger nor smaller.
    """

    contents: list[Tensors]
    truths: list[Outputs]
    dtype: torch.dtype
    randomised: bool = False
    relevant: Callable[[Outputs], Outputs] = lambda outputs: outputs
    eps: float | None = None  # None: of the dtype
    stock: list[list[Error]] | None = None
    _floors: dict[int, float] = field(default_factory=dict, repr=False)

    def grade(self, seed: int, outputs: Outputs, judge: bool = True) -> str | None:
        """What is wrong with these outputs, or None. Without `judge`, errors of any size pass."""
        truth = self.truths[seed]
        if len(outputs) != len(truth):
            return f"{len(outputs)} outputs, expected {len(truth)}"
        outputs = self.relevant(outputs)
        for index, (ours, right) in enumerate(zip(outputs, truth, strict=True)):
            if ours.shape != right.shape:
                return f"output {index} has shape {tuple(ours.shape)}, expected {tuple(right.shape)}"
            error = distance(ours, right, self.floor(seed))
            if error.nans:
                return (
                    f"output {index}: {error.nans} of {ours.numel()} elements are NaN (never written, or garbage read)"
                )
            reason = self._too_far(error, index, seed, right) if judge else None
            if reason:
                return f"seed {seed}, output {index}: {reason}"
        return None

    def floor(self, seed: int) -> float:
        """The size below which an output is negligible beside the others of a step."""
        if seed not in self._floors:
            truths = [x for x in self.truths[seed] if x.numel() > 1] or list(self.truths[seed])
            self._floors[seed] = NEGLIGIBLE * max((root_mean_square(x) for x in truths), default=0.0)
        return self._floors[seed]

    def _too_far(self, error: Error, index: int, seed: int, right: torch.Tensor) -> str | None:
        assert self.stock is not None, "no yardstick was set"
        stock, eps = self.stock[seed][index], self.eps or torch.finfo(self.dtype).eps
        if self.randomised:
            if stock.rms / RANDOM_FACTOR - eps <= error.rms <= stock.rms * RANDOM_FACTOR + eps:
                return None
            return f"differs from the undropped result by {error.rms:.2g}, stock by {stock.rms:.2g}"
        allowed = RMS_FACTOR * stock.rms + eps
        if error.rms > allowed:
            return f"relative error {error.rms:.2g}, allowed {allowed:.2g} (twice stock's)"
        largest = max(float(right.abs().max()), self.floor(seed)) if right.numel() else 0.0
        allowed = MAX_FACTOR * (stock.worst + eps * largest)
        if error.worst > allowed:
            return f"largest error {error.worst:.2g}, allowed {allowed:.2g} (four times stock's)"
        return None


def eps_of(case: Case, device: torch.device) -> float:
    """eps of the arithmetic that PyTorch allows for a case: of its dtype, or of TF32."""
    if device.type == "cuda" and case.dtype == "fp32" and tf32_allowed(case.op, case.shape.get("kind", "")):
        return TF32_EPS
    return torch.finfo(case.torch_dtype).eps


def distance(ours: torch.Tensor, right: torch.Tensor, floor: float = 0.0) -> Error:
    """How far an output is from the truth, relative to the truth's root mean square or `floor`, if that is larger."""
    difference = ours.detach().to(torch.float64) - right
    nans = int((difference.isnan() & ~right.isnan()).sum())
    difference = difference.nan_to_num_(nan=0.0)
    if not difference.numel():
        return Error(0.0, 0.0, nans)
    scale = max(root_mean_square(right), floor)
    error = root_mean_square(difference)
    relative = error / scale if scale else float(error > 0)
    return Error(relative, float(difference.abs().max()), nans, error**2 * difference.numel())


def root_mean_square(x: torch.Tensor) -> float:
    """Of all elements; 0 of none."""
    return float(torch.linalg.vector_norm(x)) / x.numel() ** 0.5 if x.numel() else 0.0


def set_yardstick(exam: Exam, tensors: Tensors, make_step: Callable[[], Step]) -> str | None:
    """Record stock's own errors beside those of earlier yardsticks. Returns why it cannot serve, if so."""
    errors: list[list[Error]] = []
    for seed, content in enumerate(exam.contents):
        refresh(tensors, content)
        outputs = make_step()()
        reason = exam.grade(seed, outputs, judge=False)
        outputs = exam.relevant(outputs)
        truth, floor = exam.truths[seed], exam.floor(seed)
        found = [distance(ours, right, floor) for ours, right in zip(outputs, truth, strict=False)]
        if reason is None and not exam.randomised:
            whole = sum(root_mean_square(right) ** 2 * right.numel() for right in truth)
            far = (sum(error.squares for error in found) / whole) ** 0.5 if whole else 0.0
            if far > HOPELESS_RMS:
                reason = f"stock itself is {far:.2g} off the float64 truth"
        if reason:
            return reason
        errors.append(found)
    if exam.stock is None:
        exam.stock = errors
    else:
        exam.stock = [
            [Error(max(a.rms, b.rms), max(a.worst, b.worst), 0) for a, b in zip(old, new, strict=True)]
            for old, new in zip(exam.stock, errors, strict=True)
        ]
    return None


def check(exam: Exam, tensors: Tensors, make_step: Callable[[], Step], reusable: bool) -> str | None:
    """Why this arm is wrong, or None. Leaves the first seed's content in `tensors`.

    Args:
        exam: questions, answers and the yardstick.
        tensors: the arm's own input buffers.
        make_step: gives a step over `tensors` as they are now.
        reusable: whether one step may be run again after its inputs changed (not so in mode "bwd").
    """
    device = next(iter(tensors.values())).device
    step = None
    for seed in [*range(1, len(exam.contents)), 0]:
        content = exam.contents[seed]
        late = device.type == "cuda" and reusable and step is not None
        if late:
            arrive_late(tensors, content)
        else:
            refresh(tensors, content)
        step = step if step is not None and reusable else make_step()
        with poisoned(device, exam.truths[seed], exam.dtype):
            outputs = step()
        snapshot = tuple(output.clone() for output in outputs)  # in stream order: unfinished work on others shows
        reason = (
            exam.grade(seed, snapshot)
            or changed(tensors, content)
            or remembers(exam, seed, step, outputs)
            or changed(tensors, content)
        )
        if reason:
            return reason
    return None


def check_again(exam: Exam, tensors: Tensors, seed: int, replay: Callable[[], Outputs], reusable: bool) -> str | None:
    """After timing: the very thing that was timed must still be right, on other numbers where that is possible."""
    if reusable:
        refresh(tensors, exam.contents[seed])
    reason = exam.grade(seed if reusable else 0, replay())
    return f"after timing: {reason}" if reason else None


def remembers(exam: Exam, seed: int, step: Step, outputs: Outputs) -> str | None:
    """Spoil the outputs and ask again: an arm that hands out an old result hands out the spoiled one."""
    for output in outputs:
        with torch.no_grad():
            output.detach().fill_(torch.nan)
    reason = exam.grade(seed, step())
    return f"asked again: {reason}" if reason else None


def changed(tensors: Tensors, content: Tensors) -> str | None:
    """Which input is no longer what it was."""
    for name, tensor in tensors.items():
        if not torch.equal(tensor.detach(), content[name]):
            return f"input '{name}' was changed"
    return None


def refresh(tensors: Tensors, content: Tensors) -> None:
    """New numbers in the same buffers."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(content[name])


def arrive_late(tensors: Tensors, content: Tensors) -> None:
    """Let inputs arrive late on the current stream: work on a stream that does not wait for it reads NaN."""
    with torch.no_grad():
        for tensor in tensors.values():
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
    torch.cuda.synchronize()
    torch.cuda._sleep(LATE_CYCLES)
    refresh(tensors, content)


@contextlib.contextmanager
def poisoned(device: torch.device, like: Sequence[torch.Tensor], dtype: torch.dtype) -> Iterator[None]:
    """Memory that an arm allocates here holds NaN until written."""
    if device.type == "cuda":
        blocks = [torch.full(x.shape, torch.nan, dtype=dtype, device=device) for x in like for _ in range(2)]
        del blocks  # back to the caching allocator, which hands them out again
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings_off(), warnings.catch_warnings():
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
