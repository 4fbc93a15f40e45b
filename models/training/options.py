"""What a run is told: the same fields as the command line of `models.train`."""

from __future__ import annotations

import os
import shlex
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

# a resumed run must have these as the run had that wrote the checkpoint; everything else may change
DEFINING = ("model", "task", "preset", "data", "fold", "batch", "learning_rate", "limit", "seed", "amp", "freeze")


LAST, BEST = "last.pt", "best.pt"


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
        """Where checkpoints go: `out`, or beside the one that is resumed, or runs/MODEL; see `folder.claimed`."""
        if self.out:
            return self.out
        return str(Path(self.resume).parent) if self.resume else f"runs/{self.model}"

    def command_to_resume(self, checkpoint: Path, processes: int = 1) -> str:
        """The command that goes on from `checkpoint`, which keeps what defines the run; the rest is said again."""
        launcher = ["python"] if processes == 1 else ["torchrun", f"--nproc-per-node={processes}"]
        words = [*launcher, "-m", "models.train", self.model, "--resume", str(checkpoint)]
        for field in fields(self):
            value, flag = getattr(self, field.name), f"--{field.name.replace('_', '-')}"
            if field.name in (*DEFINING, "resume", "init_from", "out") or value == field.default:
                continue
            if isinstance(value, bool):
                words.append(flag if value else f"--no-{flag[2:]}")
            else:
                words += [flag, str(value)]
        return shlex.join(words)

    def defining(self) -> dict[str, Any]:
        """The fields that a resumed run must repeat."""
        return {name: value for name, value in asdict(self).items() if name in DEFINING}


def holds_a_run(folder: str) -> bool:
    """Whether an earlier run's checkpoints are in a folder."""
    return any((Path(folder) / name).exists() for name in (LAST, BEST))


def check_files(folder: str | None = None, **files: str | None) -> None:
    """Make the folders that results go into, before anything runs: an epoch's work is not to end nowhere.

    Raises:
        OptionError: a folder cannot be made or written to, or a file of that name cannot be.
    """
    folders = {} if folder is None else {"out": Path(folder)}
    folders |= {option: Path(name).parent for option, name in files.items() if name is not None}
    for option, place in folders.items():
        try:
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:
            raise OptionError(f"--{option}: cannot write into {place}: {error.strerror}") from error
    for option, name in files.items():
        if name is not None and (Path(name).is_dir() or (Path(name).exists() and not os.access(name, os.W_OK))):
            raise OptionError(f"--{option} {name}: {'is a folder' if Path(name).is_dir() else 'cannot be written'}")


def names() -> set[str]:
    """All fields."""
    return {field.name for field in fields(Options)}
