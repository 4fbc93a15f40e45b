"""What to do about it: each rule looks at the figures, and speaks only where something can be gained.

A saving is predicted from the trace itself, says what it rests on, and is replaced by a measurement under `--apply`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from fastops.profiling.attribute import DATA, OPTIMIZER
from fastops.profiling.summary import KernelRow, ModuleRow, Summary

CELLS = {"LSTMCell": "LSTM", "GRUCell": "GRU", "RNNCell": "RNN"}
SMALL_US = 20.0
WORTH_PERCENT = 2.0  # smaller savings are not worth a reader's time


@dataclass
class Advice:
    """One card."""

    what: str
    why: str
    edit: str
    confidence: str  # "high", "medium", "low": how well the trace supports the saving
    saved_ms: float | None = None  # per step; None where only a measurement can tell
    modules: list[str] = field(default_factory=list)
    accelerates: bool = False  # whether `--apply` does it
    measured: str | None = None  # what `--apply` found, in place of the prediction

    def saving(self, wall_ms: float) -> str:
        """The saving in words, as a share of the step."""
        if self.measured:
            return f"measured, whole step: {self.measured}"
        if self.saved_ms is None:
            return "measure it: --apply" if self.accelerates else "unknown"
        return f"up to {self.saved_ms:.3f} ms ({100 * self.saved_ms / (wall_ms or 1.0):.0f} %) per step"


@dataclass(frozen=True)
class Replacement:
    """What `fastops.accelerate` would make of a module."""

    path: str
    kind: str
    becomes: str
    op: str


def advise(summary: Summary, replacements: Sequence[Replacement] = ()) -> list[Advice]:
    """The cards for a profile, largest predicted saving first."""
    found = [
        *_replace(summary, replacements),
        *_cells(summary),
        *_launches(summary),
        *_transposes(summary),
        *_waits(summary),
        *_loading(summary),
        *_optimizer(summary),
    ]
    wall = summary.step.wall_ms
    worth = [a for a in found if a.saved_ms is None or 100 * a.saved_ms / wall >= WORTH_PERCENT]
    return sorted(worth, key=lambda advice: -(advice.saved_ms or 0.0))


def _replace(summary: Summary, replacements: Sequence[Replacement]) -> Iterator[Advice]:
    """Modules of fastops, where the time is the GPU's: on a CPU "auto" is stock PyTorch and nothing is gained."""
    if summary.step.device != "cuda":
        return
    rows = {row.path: row for row in summary.modules}
    for op in sorted({replacement.op for replacement in replacements}):
        group = [r for r in replacements if r.op == op and r.path in rows and rows[r.path].total_ms > 0]
        spent = sum(rows[r.path].total_ms for r in group)
        if not group or 100 * spent / summary.step.wall_ms < WORTH_PERCENT:
            continue
        kinds = sorted({f"{r.kind} -> {r.becomes}" for r in group})
        yield Advice(
            f"fastops for {len(group)} module(s): {', '.join(kinds)}",
            f"they take {spent:.3f} ms, {100 * spent / summary.step.wall_ms:.0f} % of the step",
            f'fastops.accelerate(model, only={{"{op}"}})',
            "low",
            _elementwise_passes(group, rows) if op == "conv2d_relu" else None,
            [r.path for r in group],
            accelerates=True,
        )


def _elementwise_passes(group: Sequence[Replacement], rows: dict[str, ModuleRow]) -> float:
    """Bias, ReLU and pool run as passes of their own over memory; fused, one of them is left."""
    paths = {r.path for r in group}
    saved = 0.0
    for row in rows.values():
        if row.kind in ("ReLU", "MaxPool2d") and row.path.rpartition(".")[0] in {p.rpartition(".")[0] for p in paths}:
            saved += row.own_ms if row.kind == "ReLU" else row.own_ms / 2
    return saved


def _cells(summary: Summary) -> Iterator[Advice]:
    for row in summary.modules:
        if row.kind in CELLS and row.calls >= 8:
            whole = CELLS[row.kind]
            yield Advice(
                f"{row.path}: one nn.{whole} over the sequence for {row.calls:.0f} calls of {row.kind}",
                f"a step at a time costs {row.total_ms:.3f} ms; the input product of all steps can be one GEMM",
                f"torch.nn.{whole}(input_size, hidden_size), or fastops.nn.{whole} on a GPU",
                "medium",
                0.5 * row.total_ms,
                [row.path],
            )


def _launches(summary: Summary) -> Iterator[Advice]:
    step = summary.step
    if step.device == "cuda" and step.verdict.startswith("launch-bound"):
        yield Advice(
            "launch less: CUDA graphs",
            f"{step.launches:.0f} launches a step leave the GPU idle {step.idle_micro_ms:.3f} ms in pauses under 10 us",
            'model = torch.compile(model, mode="reduce-overhead")',
            "medium",
            step.idle_micro_ms,
        )


def _transposes(summary: Summary) -> Iterator[Advice]:
    rows = [row for row in summary.kernels if "nchwtonhwc" in row.full_name.lower().replace("_", "")]
    rows += [row for row in summary.kernels if "nhwctonchw" in row.full_name.lower().replace("_", "")]
    if rows:
        yield Advice(
            "channels_last memory format",
            f"cuDNN transposes between NCHW and NHWC: {_count(rows)} launches a step",
            "model.to(memory_format=torch.channels_last); images likewise",
            "high",
            sum(row.total_ms for row in rows),
            sorted({module for row in rows for module in row.modules}),
        )


def _waits(summary: Summary) -> Iterator[Advice]:
    if summary.step.device != "cuda":
        return
    reads = [row for row in summary.kernels if "dtoh" in row.full_name.lower().replace(" ", "")]
    if reads and _count(reads) >= 2 and summary.step.idle_macro_ms > 0:
        yield Advice(
            "read results less often",
            f"{_count(reads)} copies from the GPU a step (.item(), .cpu(), prints) make the host wait",
            "keep losses on the GPU and read them every N steps",
            "low",
            summary.step.idle_macro_ms,
        )


def _loading(summary: Summary) -> Iterator[Advice]:
    row = next((row for row in summary.modules if row.path == DATA), None)
    if summary.step.device == "cpu" and row is not None:
        yield Advice(
            "load data in other processes",
            f"the DataLoader takes {row.total_ms:.3f} ms of the step on the main thread",
            "DataLoader(..., num_workers=N, pin_memory=True, persistent_workers=True)",
            "medium",
            row.total_ms,
        )


def _optimizer(summary: Summary) -> Iterator[Advice]:
    row = next((row for row in summary.modules if row.path == OPTIMIZER), None)
    launched = [kernel for kernel in summary.kernels if kernel.modules == [OPTIMIZER]]
    # long operations wait for memory, which the fused form must read and write as well
    small = [kernel for kernel in launched if kernel.average_us < SMALL_US]
    if row is not None and _count(small) > 20 and not any("fused" in k.full_name.lower() for k in launched):
        yield Advice(
            "the optimizer's fused form",
            f"its step has {_count(small)} operations under {SMALL_US:.0f} us, and takes {row.total_ms:.3f} ms",
            "torch.optim.AdamW(..., fused=True) (Adam, AdamW, SGD and Adagrad have it)",
            "medium",
            0.5 * sum(kernel.total_ms for kernel in small),
        )


def _count(rows: Sequence[KernelRow]) -> int:
    return round(sum(row.calls for row in rows))


def replacements_of(model: torch.nn.Module, root_path: str) -> list[Replacement]:
    """What `fastops.accelerate(model)` would replace and may win by, with the paths of the profile."""
    from fastops import explain
    from fastops.ops import rnn_cell

    hopeless = set(CELLS) if all(row.engine == "torch" for row in rnn_cell.ROWS) else set()
    found = []
    for row in explain(model).rows:
        if row.becomes and not row.done and row.kind not in hopeless:
            path = f"{root_path}.{row.path}" if row.path else root_path
            found.append(Replacement(path, row.kind, row.becomes, row.op))
    return found
