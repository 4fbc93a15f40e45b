"""Compiling processes: started when needed, kept for the next kernel, restarted after a crash."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

SECONDS_PER_KERNEL = 600.0

_idle: list[Worker] = []
_lock = threading.Lock()


@contextlib.contextmanager
def lease(settings: dict[str, str]) -> Iterator[Worker]:
    """A worker of one's own. Importing torch and triton takes seconds, so an idle one is taken where there is one.

    Args:
        settings: environment variables that change what the compiler makes; a worker started under others is no use.
    """
    identity = (os.getpid(), tuple(settings.items()), tuple(sys.path))
    with _lock:
        found = next((worker for worker in _idle if worker.identity == identity), None)
        if found is not None:
            _idle.remove(found)
    worker = found or Worker(identity)
    try:
        yield worker
    except BaseException:
        worker.close()
        raise
    with _lock:
        _idle.append(worker)


@atexit.register
def close_all() -> None:
    """End the idle workers."""
    with _lock:
        while _idle:
            worker = _idle.pop()
            if worker.identity[0] == os.getpid():
                worker.close()


class Worker:
    """One compiling process.

    Attributes:
        identity: of the process and the settings it was made under.
        fresh: whether the last answer was the first of its process.
    """

    def __init__(self, identity: tuple[Any, ...]) -> None:
        self.identity = identity
        self.fresh = True
        self._folder = tempfile.TemporaryDirectory(prefix="fastops-compile-")
        self._process: subprocess.Popen[str] | None = None

    def path(self, key: str) -> str:
        """Where the worker leaves SASS and PTX of a task, without suffix."""
        return os.path.join(self._folder.name, key)

    def ask(self, task: dict[str, Any]) -> dict[str, Any]:
        """The answer to a task; {"crashed": reason} where the process died of it."""
        if self._process is not None and self._process.poll() is not None:
            self.close()  # idle for long
        self.fresh = self._process is None
        process = self._process = self._process or self._start()
        line = self._exchange(process, json.dumps(task | {"artifacts": self.path(task["key"])}) + "\n")
        if line:
            return dict(json.loads(line))
        code = process.wait()
        if code == 0 and not self.fresh:  # it went to sleep while we were writing
            self.close()
            return self.ask(task)
        words = self._last_words()
        self.close()
        death = f"signal {-code}" if code < 0 else f"exit code {code}"
        return {"crashed": f"the compiling process died ({death})\n{words}".strip()}

    def close(self) -> None:
        """End the process; the next task starts another."""
        process, self._process = self._process, None
        if process is None:
            return
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        process.wait()

    @staticmethod
    def _exchange(process: subprocess.Popen[str], line: str) -> str:
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(SECONDS_PER_KERNEL, process.kill)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            return process.stdout.readline()
        except (BrokenPipeError, ValueError):
            return ""
        finally:
            timer.cancel()

    def _start(self) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {
            "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
            "TRITON_CACHE_DIR": os.path.join(self._folder.name, "triton"),
            "TRITON_ALWAYS_COMPILE": "1",  # a hit in Triton's cache brings no log of ptxas
            "OMP_NUM_THREADS": "1",
        }
        with open(os.path.join(self._folder.name, "stderr"), "w", encoding="utf-8") as errors:
            return subprocess.Popen(
                [sys.executable, "-m", "fastops.inspection._worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )

    def _last_words(self) -> str:
        try:
            with open(os.path.join(self._folder.name, "stderr"), encoding="utf-8", errors="replace") as errors:
                return "\n".join(errors.read().splitlines()[-12:])
        except OSError:
            return ""
