"""Checkpoints: written whole or not at all, read without running code, and enough to go on bit for bit."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
Checkpoint = dict[str, Any]


class CheckpointError(ValueError):
    """A checkpoint that is missing, cut short, of another kind, or of another run; the message names the file."""


def save(path: str | Path, content: Checkpoint) -> None:
    """Write to a temporary file beside `path`, flush it to the disk, then rename it over `path`.

    Whoever reads, or pulls the plug at any moment, finds either the old file or the new one.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save({"format": FORMAT, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(draft, 0o666 & ~_umask())  # mkstemp's files are private
        os.replace(draft, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise
    _flush_folder(target.parent)


def load(path: str | Path) -> Checkpoint:
    """Read a checkpoint to the CPU; `weights_only=True`, so that a file from elsewhere cannot run code.

    Raises:
        CheckpointError: missing, cut short, not a checkpoint of these models, or of a newer format.
    """
    file = Path(path)
    if file.is_dir():
        raise CheckpointError(f"checkpoint {file} is a folder, name the file in it")
    if not file.is_file():
        raise CheckpointError(f"checkpoint {file} is missing")
    if file.stat().st_size == 0:
        raise CheckpointError(f"checkpoint {file} is empty")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen types here, down to pickle's and zipfile's own
        # a KeyError alone says "105"; after its first sentence torch advises what runs code
        summary = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0].split('. ')[0]}".rstrip(": ")
        raise CheckpointError(f"checkpoint {file} cannot be read, it is damaged or no checkpoint: {summary}") from error
    if not isinstance(content, dict) or "format" not in content or "model" not in content:
        raise CheckpointError(f"checkpoint {file} was not written by models.train")
    if content["format"] != FORMAT:
        raise CheckpointError(f"checkpoint {file} has format {content['format']}, this version reads {FORMAT}")
    return content


def random_state() -> dict[str, Any]:
    """The state of torch's generators, on the CPU and on the current GPU."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Go back to a state that `random_state` gave."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush_folder(folder: Path) -> None:
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # no such thing as an open folder on Windows
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
