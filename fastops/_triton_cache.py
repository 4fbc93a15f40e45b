"""Damaged entries of Triton's cache on disk: told from other failures, and compiled anew.

Triton stops where a file of an entry is truncated or garbage, as a crash or a full disk leaves it; 3.6 also where the
list of an entry's files is.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import FrameType

READERS = {("triton.compiler.compiler", "__init__"), ("triton.runtime.cache", "get_group")}
# what the driver says of machine code that is none
INVALID_IMAGE = "kernel image is invalid"


def damaged(error: BaseException) -> bool:
    """Whether Triton raised this while it read an entry of its cache, or the GPU refused what was in it."""
    return INVALID_IMAGE in str(error) or any(_place(frame) in READERS for frame in _frames(error))


@contextlib.contextmanager
def compiling_anew(error: BaseException) -> Iterator[None]:
    """Let the kernel that failed be compiled, and its entry be written, again."""
    from triton import knobs

    for frame in _frames(error):
        if _place(frame) in READERS and "grp_filepath" in frame.f_locals:
            with contextlib.suppress(OSError):
                os.unlink(frame.f_locals["grp_filepath"])
        loaded = getattr(frame.f_locals.get("self"), "device_caches", None)
        if loaded is not None:
            loaded.clear()  # the kernel whose machine code was refused is in memory by now
    with knobs.compilation.scope():
        knobs.compilation.always_compile = True
        yield


def _frames(error: BaseException) -> Iterator[FrameType]:
    place = error.__traceback__
    while place is not None:
        yield place.tb_frame
        place = place.tb_next


def _place(frame: FrameType) -> tuple[str, str]:
    return frame.f_globals.get("__name__", ""), frame.f_code.co_name
