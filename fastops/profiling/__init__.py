"""GPU hotspots by module and kernel, and what to do about them.

with fastops.profile(model) as p:
    for batch in batches:
        train_step(model, batch)
print(p.table())
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fastops.profiling.advice import Advice
    from fastops.profiling.capture import Recorder
    from fastops.profiling.paired import Comparison
    from fastops.profiling.summary import KernelRow, ModuleRow, Summary


class profile:
    """Context manager that records what runs inside and says where the time went.

    Steps are found by themselves: one ends when the optimizers have stepped, each at least once, or, without one, when
    the next forward of the model begins or an inference forward ends. After a first `mark()` only that ends steps. The
    model is left as it was. A profile is used once.

    Args:
        model: names the modules; without it, every outermost module called inside is a root.
        warmup: steps that run before recording begins.
        steps: steps to record; None records until the end, 200 at most.
        script: count inference beside a living optimizer as validation, part of the training step it precedes.

    Raises:
        ValueError: a negative warmup or no steps.
        RuntimeError: from the report methods, when not one whole step was recorded.
    """

    def __init__(
        self,
        model: torch.nn.Module | None = None,
        *,
        warmup: int = 0,
        steps: int | None = None,
        script: bool = False,
    ):
        from fastops.profiling.capture import Recorder

        if model is not None and not isinstance(model, torch.nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.recorder: Recorder = Recorder(model, warmup=warmup, steps=steps, script=script)
        self.applied: Comparison | None = None
        self._summary: Summary | None = None
        self._advice: list[Advice] | None = None

    def __enter__(self) -> profile:
        self.recorder.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.recorder.__exit__(kind, error, trace)

    def mark(self) -> None:
        """End a step here, where there is neither an optimizer nor an outermost forward to tell."""
        self.recorder.mark()

    @property
    def summary(self) -> Summary:
        """All figures."""
        if self._summary is None:
            self._summary = self.recorder.summary()
        return self._summary

    def modules(self) -> list[ModuleRow]:
        """One row a module, in the order of the model; the rest is named in parentheses."""
        return self.summary.modules

    def kernels(self) -> list[KernelRow]:
        """One row a kernel (an operator, where there is no GPU), largest first."""
        return self.summary.kernels

    def advice(self) -> list[Advice]:
        """What would make it faster, largest predicted saving first; empty where nothing is known."""
        if self._advice is None:
            from fastops.profiling.advice import advise, replacements_of

            ranges = self.recorder.ranges
            replacements = [
                found
                for name, root in zip(ranges.root_names, ranges.roots, strict=True)
                for found in replacements_of(root, name)
            ]
            self._advice = advise(self.summary, replacements)
        if self.applied is not None:
            for card in self._advice:
                if card.accelerates:
                    card.measured = str(self.applied)
        return self._advice

    def overhead_percent(self) -> float | None:
        """How much longer the recorded steps were than those after the recording; None where none are known."""
        import statistics

        recorder = self.recorder
        inside = recorder.profiled_walls
        outside = recorder.step_walls[recorder.warmup + len(inside) + 1 :]  # warm-up steps are slow for other reasons
        if not inside or len(outside) < 2:
            return None
        return 100 * (statistics.median(inside) / statistics.median(outside) - 1)

    def table(self, top: int = 15) -> str:
        """The one-screen report as text."""
        from io import StringIO

        from rich.console import Console

        console = Console(file=StringIO(), width=160, color_system=None)
        self.show(console, top=top)
        return console.file.getvalue()  # type: ignore[attr-defined]

    def show(self, console: Any = None, *, top: int = 15) -> None:
        """Print the one-screen report with rich."""
        from rich.console import Console

        from fastops.profiling.table import screen

        overhead = self.overhead_percent()
        if console is None:
            console = Console()
            if not console.is_terminal:
                console.width = max(console.width, 160)  # a file has no edge to fold at
        parts = screen(self.summary, self.advice(), top=top, overhead_percent=overhead, applied=self.applied)
        console.print(parts)

    def html(self, path: str | Path, title: str | None = None) -> None:
        """Write the report as one offline HTML file."""
        from fastops import _env
        from fastops.profiling.html import page

        ranges = self.recorder.ranges
        names = ", ".join(dict.fromkeys(ranges.root_names[:4])) or "operators"
        applied = None if self.applied is None else str(self.applied)
        text = page(title or f"Profile of {names}", self.summary, self.advice(), _env.report(), applied)
        Path(path).write_text(text, encoding="utf-8", errors="replace")

    def json(self, path: str | Path) -> None:
        """Write all figures as JSON."""
        import dataclasses
        import json

        from fastops import _env
        from fastops.profiling.html import as_data

        data = {"machine": _env.report(), **as_data(self.summary, self.advice())}
        data["applied"] = None if self.applied is None else dataclasses.asdict(self.applied)
        Path(path).write_text(json.dumps(data, indent=1), encoding="utf-8")

    def trace(self, path: str | Path) -> None:
        """Write the trace for Perfetto; a name that ends in .gz is compressed."""
        import gzip
        import json

        from fastops.profiling.trace import load

        source = self.recorder.trace_path
        if source is None:
            raise RuntimeError("nothing was profiled, there is no trace")
        opener: Any = gzip.open if str(path).endswith(".gz") else open
        with opener(path, "wt", encoding="utf-8") as writer:
            json.dump(load(source), writer)


__all__ = ["profile"]
