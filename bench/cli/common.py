"""What several commands need."""

from __future__ import annotations

import difflib
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.console import Console

from bench.results import Unreadable, read

EXIT_CANNOT = 2


class CannotError(Exception):
    """The command cannot be carried out; the message is for the user."""


def console() -> Console:
    """A console that keeps tables whole in a log, and obeys NO_COLOR."""
    made = Console()
    if not made.is_terminal:
        made.width = 160
    return made


def device(name: str | None) -> torch.device:
    """The device to measure: CUDA where there is one."""
    if name is None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise CannotError("--device cuda: PyTorch sees no GPU here")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise CannotError(f"--device {name}: cpu or cuda, or cuda:1")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise CannotError(f"--device {name}: {error}") from error


def check_place(option: str, path: Path) -> None:
    """Make the folder of a file that is to be written, before anything is measured.

    Raises:
        CannotError: nothing can be written there.
    """
    if path.is_dir():
        raise CannotError(f"{option}: {path} is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise CannotError(f"{option}: cannot write into {path.parent}: {error.strerror}") from error


def check_results(option: str, path: Path) -> None:
    """Refuse to write results over a file of another kind: it would be gone without a word.

    Raises:
        CannotError: the file is there, and is neither a result of this benchmark nor empty.
    """
    if not path.exists():
        return
    if not path.is_file():  # a device or a pipe: reading it may never end, and it would be replaced by a file
        raise CannotError(f"{option}: {path} is no ordinary file")
    try:
        if path.stat().st_size:
            read(path)
    except Unreadable as error:
        raise CannotError(f"{option}: {error}; it is left as it is, give another name") from error


def unknown(kind: str, name: str, known: Iterable[str]) -> CannotError:
    """An error that repeats what was asked for and offers what is near."""
    known = list(known)
    near = difflib.get_close_matches(name, known, 3, 0.4)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    listed = f" (known: {', '.join(known)})" if len(known) <= 30 else " (python -m bench list shows all)"
    return CannotError(f"unknown {kind} {name!r}{hint}{listed if not near or len(known) <= 12 else ''}")


def fail(error: Exception) -> int:
    """One line on stderr, exit code 2."""
    print(f"bench: {error}", file=sys.stderr)
    return EXIT_CANNOT
