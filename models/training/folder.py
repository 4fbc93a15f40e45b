"""The folder that a run's checkpoints go to: whose it is, and that no other run writes there meanwhile."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from models.training import checkpoint
from models.training.options import BEST, LAST, OptionError, Options, check_files, holds_a_run

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def claimed(options: Options) -> Iterator[Options]:
    """The options with the run's folder in `out`; until the end no other run of this machine gets it.

    A folder that was named must be free of other runs' checkpoints, and of a run that has not saved yet; without a name
    the first such of runs/MODEL, runs/MODEL-2 ... is taken.

    Raises:
        OptionError: the folder is another run's, or cannot be written to.
    """
    with contextlib.ExitStack() as stack:
        if os.environ.get("RANK", "0") != "0":  # of several processes the first one writes
            yield replace(options, out=options.folder)
            return
        named = options.out or options.resume
        for number in itertools.count(1):
            folder = options.folder + (f"-{number}" if number > 1 else "")
            if named:
                _check_owner(options, folder)
            elif holds_a_run(folder):
                continue
            stack.enter_context(_unmade_if_refused(folder))
            check_files(folder, metrics=options.metrics, plot=options.plot)
            free = stack.enter_context(_locked(folder))
            if named and not free:
                raise OptionError(f"--out {folder}: another training is running there; give another folder")
            if named or (free and not holds_a_run(folder)):  # it may have been another's between the two looks
                break
        yield replace(options, out=folder)


def _check_owner(options: Options, folder: str) -> None:
    """Refuse to write over checkpoints that are not those this run goes on from."""
    if not holds_a_run(folder):
        return
    last, best = Path(folder) / LAST, Path(folder) / BEST
    source = Path(options.resume) if options.resume else None
    if source is None or not any(_same(source, file) for file in (last, best)):
        raise OptionError(
            f"--out {folder}: an earlier run's checkpoints are there; go on with --resume {folder}/{LAST}, or give "
            "another folder"
        )
    if not _same(source, last) and last.exists():
        steps = [checkpoint.load(file)["progress"]["step"] for file in (source, last)]
        if steps[1] > steps[0]:
            raise OptionError(
                f"--resume {source}: {last} is further on, by {steps[1] - steps[0]} steps, and would be written over; "
                "give another folder with --out"
            )


@contextlib.contextmanager
def _unmade_if_refused(folder: str) -> Iterator[None]:
    """Where a run ends before it has written anything, the folders made for it go again."""
    missing = [path for path in (Path(folder), *Path(folder).parents) if not path.exists()]
    try:
        yield
    except BaseException:  # Ctrl-C too
        with contextlib.suppress(OSError):  # one that is not empty stays, and with it those above
            for path in missing:
                path.rmdir()
        raise


def _same(a: Path, b: Path) -> bool:
    return a.exists() and b.exists() and a.samefile(b)


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[bool]:
    """Whether this process has the folder for itself from now on; whatever ends the process, it is free again."""
    if fcntl is None:
        yield True
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:  # a file system without locks
            pass
        yield True
    finally:
        os.close(handle)
