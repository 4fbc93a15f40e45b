"""What a run is told: the same fields as the command line of `models.train`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

# a resumed run must have these as the run had that wrote the checkpoint; everything else may change
DEFINING = ("model", "task", "preset", "data", "fold", "batch", "learning_rate", "limit", "seed", "amp", "freeze")


class OptionError(ValueError):
    """Options that do not go together, or cannot be had here."""


@dataclass(frozen=True)
class Options:
    """A whole run. None means: what the preset says."""

    model: str
    task: str | None = None
    preset: str = "small"
    data: str | None = None
    root: str | None = None
    fold: int = 0
    text_column: str = "text"
    label_column: str = "label"
    epochs: int | None = None
    batch: int | None = None
    learning_rate: float | None = None
    limit: int | None = None
    seed: int = 0
    accelerate: bool = True
    amp: str = "off"
    compile: bool = False
    deterministic: bool = False
    device: str | None = None
    resume: str | None = None
    init_from: str | None = None
    freeze: tuple[str, ...] = ()
    early_stop: int | None = None
    save_every: int | None = None
    out: str | None = None
    metrics: str | None = None
    plot: str | None = None
    compare: bool = False

    @property
    def folder(self) -> str:
        """Where checkpoints go."""
        return self.out or f"runs/{self.model}"

    def defining(self) -> dict[str, Any]:
        """The fields that a resumed run must repeat."""
        return {name: value for name, value in asdict(self).items() if name in DEFINING}


def names() -> set[str]:
    """All fields."""
    return {field.name for field in fields(Options)}
