"""Bytes for language models: the running Python's own standard library, or any folder of text."""

from __future__ import annotations

import os
import random
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.data.errors import DataError

NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "_bundled", "__pycache__"}
TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".c", ".h", ".cpp", ".js", ".html", ".csv", ".json", ".tex", ""}
ONE_IN = 10  # files held out


@dataclass(frozen=True)
class ByteWindows:
    """A stream of bytes cut into windows of `length` + 1: each byte is predicted from those before it in its window."""

    stream: Tensor  # (N,) uint8
    length: int

    def __post_init__(self) -> None:
        if len(self) < 1:
            raise DataError(f"the text has {len(self.stream):,} bytes, one window needs {self.length + 1:,}")

    def __len__(self) -> int:
        return (len(self.stream) - 1) // self.length

    def batch(self, indices: Tensor, device: torch.device) -> dict[str, Tensor]:
        """{"tokens": (N, length) int64, "target": (N, length) int64, the same one byte on}."""
        positions = indices.unsqueeze(1) * self.length + torch.arange(self.length + 1)
        windows = self.stream[positions].to(device, torch.int64)
        return {"tokens": windows[:, :-1], "target": windows[:, 1:]}


def standard_library_files() -> list[tuple[str, Path]]:
    """(relative path, path) of the sources of the running Python's standard library, without tests, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in NOT_LIBRARY]  # site-packages may be huge: not even looked at
        found = (Path(folder, name) for name in names if name.endswith(".py"))
        files += [(path.relative_to(root).as_posix(), path) for path in found]
    files.sort()
    if len(files) < 2 * ONE_IN:
        raise DataError(f"this Python keeps no sources of its standard library in {root}: use --data text --root DIR")
    return files


def standard_library(length: int, *, limit: int | None = None, train: bool = True) -> ByteWindows:
    """The standard library as bytes, cut to at most `limit` of them; one file in ten is held out, whole."""
    return ByteWindows(_stream(standard_library_files(), limit, train), length)


def text_folder(root: str | Path, length: int, *, limit: int | None = None, train: bool = True) -> ByteWindows:
    """The text files of a folder and those below as bytes: one file in ten held out, or of few files each one's end.

    Raises:
        DataError: no such folder, or no text in it.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise DataError(f"text: {folder} is not a folder")
    files = [
        (path.relative_to(folder).as_posix(), path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix.lower() in TEXT_SUFFIXES and path.stat().st_size
    ]
    if not files:
        raise DataError(f"text: {folder} holds no text file ({', '.join(sorted(TEXT_SUFFIXES - {''}))} or no suffix)")
    if len(files) >= 2 * ONE_IN:
        return ByteWindows(_stream(files, limit, train), length)
    stream = bytearray()
    for _, path in files:
        content = path.read_bytes()
        cut = len(content) - len(content) // ONE_IN
        stream += content[:cut] if train else content[cut:]
    return ByteWindows(_tensor(stream[:limit]), length)


def held_out(name: str) -> bool:
    """Whether a file is in the held-out tenth: decided by its name alone, so that no run depends on the others."""
    return zlib.crc32(name.encode()) % ONE_IN == 0


def _stream(files: list[tuple[str, Path]], limit: int | None, train: bool) -> Tensor:
    chosen = [(name, path) for name, path in files if held_out(name) != train]
    random.Random(0).shuffle(chosen)  # so that a limited stream is not one package alone
    stream = bytearray()
    for content in _contents(path for _, path in chosen):
        stream += content
        if limit is not None and len(stream) >= limit:
            break
    return _tensor(stream[:limit])


def _contents(paths: Iterator[Path]) -> Iterator[bytes]:
    for path in paths:
        try:
            yield path.read_bytes()
        except OSError as error:
            raise DataError(f"text: {path} cannot be read: {error.strerror}") from error


def _tensor(stream: bytearray) -> Tensor:
    if not stream:
        raise DataError("text: nothing is left to learn from or to hold out; give more text")
    return torch.frombuffer(stream, dtype=torch.uint8)
