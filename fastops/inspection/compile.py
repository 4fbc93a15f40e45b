"""Compiles kernels for GPUs that need not be here, in parallel, with a cache on disk."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import queue
import re
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastops.inspection import _source
from fastops.inspection._pool import Worker, lease
from fastops.inspection.report import LABELS, KernelReport
from fastops.kernels._static import StaticCase

FORMAT = 2  # of a cached report; raise it when a figure is counted in another way


class InspectionError(ValueError):
    """What was asked for cannot be inspected; the message says why."""


def compile_case(case: StaticCase, target: int = 90) -> KernelReport:
    """Compile one case for one compute capability; see `compile_cases`."""
    return compile_cases([case], [target])[0]


def compile_cases(
    cases: Sequence[StaticCase],
    targets: Iterable[int] | None = None,
    *,
    jobs: int | None = None,
    progress: Callable[[KernelReport], None] | None = None,
) -> list[KernelReport]:
    """Compile every case for every target, or where None is given for the targets that each case names.

    Works in a process that interprets kernels: compilation runs in worker processes, one a core. Results are cached
    under $FASTOPS_CACHE, $XDG_CACHE_HOME/fastops or ~/.cache/fastops by the kernel's source (with the functions it
    calls), its configuration, the target and Triton's version.

    Args:
        cases: what to compile.
        targets: compute capabilities, e.g. [80, 90].
        jobs: worker processes; all cores by default.
        progress: called with each report as it is ready, in any order.

    Returns:
        Reports in the order of cases, then targets. A kernel that does not compile has its `error` set.

    Raises:
        InspectionError: a case is not well formed, or triton is missing.
    """
    wanted = None if targets is None else list(targets)
    tasks = [_task(case, target) for case in cases for target in (case.targets if wanted is None else wanted)]
    reports: dict[int, KernelReport] = {}
    first: dict[str, int] = {}  # "sm_86" and "RTX 3090" are the same work
    missing = []
    folder = cache_folder()
    for index, task in enumerate(tasks):
        if first.setdefault(task["key"], index) != index:
            continue
        cached = _read(folder, task)
        if cached is None:
            missing.append(index)
            continue
        reports[index] = cached
        if progress:
            progress(cached)
    if missing:
        _compile_missing(tasks, missing, folder, reports, jobs or _cores(), progress)
    return [_labelled(reports[first[task["key"]]], task) for task in tasks]


def triton_version() -> str:
    """Version of the installed triton; InspectionError where there is none."""
    try:
        import triton
    except ImportError as error:
        raise InspectionError(f"inspection needs triton: pip install triton (Linux only) [{error}]") from error
    return str(triton.__version__)


def _task(case: StaticCase, target: int) -> dict[str, Any]:
    """The case as JSON, with the key of its cache entry. Names that the kernel does not have are refused here."""
    parameters = parameters_of(case.kernel)
    given = set(case.signature) | set(case.constexprs)
    what = f"case {case.name!r}"
    if unknown := sorted((given | set(case.divisible_by_16)) - set(parameters)):
        raise InspectionError(
            f"{what}: the kernel has no argument {', '.join(unknown)}; it has {', '.join(parameters)}"
        )
    if absent := [name for name in parameters if name not in given]:
        raise InspectionError(f"{what}: neither signature nor constexprs name {', '.join(absent)}")
    if twice := sorted(set(case.signature) & set(case.constexprs)):
        raise InspectionError(f"{what}: both signature and constexprs name {', '.join(twice)}")
    try:
        kernel = _source.address(case.kernel)
        constexprs = {name: _source.encode(name, value) for name, value in case.constexprs.items()}
        digest = _source.digest(case.kernel, case.constexprs)
    except (TypeError, ValueError, OSError) as error:
        raise InspectionError(f"{what}: {error}") from error
    compiled_from = {
        "signature": dict(case.signature),
        "constexprs": constexprs,
        "num_warps": case.num_warps,
        "num_stages": case.num_stages,
        "options": dict(case.options),
        "divisible_by_16": sorted(case.divisible_by_16),
        "target": target,
    }
    key = [FORMAT, triton_version(), kernel["module"], kernel["name"], digest, compiled_from, compiler_settings()]
    labels = {name: getattr(case, name) for name in LABELS if name != "dtype"} | {"dtype": dtype_of(case)}
    hashed = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return compiled_from | labels | {"kernel": kernel, "digest": digest, "key": hashed}


def dtype_of(case: StaticCase) -> str:
    """Element type of the first pointer or descriptor among the arguments; "" where there is none."""
    for kind in case.signature.values():
        if match := re.match(r"(?:\*k?|tensordesc<)([a-z]+\d+\w*)", kind):
            return match.group(1)
    return ""


def parameters_of(kernel: Any) -> list[str]:
    """Names of the arguments of a kernel, in order."""
    import inspect

    try:
        return list(inspect.signature(_source.function_of(kernel)).parameters)
    except TypeError as error:
        raise InspectionError(str(error)) from error


def compiler_settings() -> dict[str, str]:
    """Environment variables that change what the compiler makes, or where it finds its tools."""
    places = {"TRITON_INTERPRET", "TRITON_CACHE_DIR", "TRITON_HOME", "TRITON_DUMP_DIR", "TRITON_ALWAYS_COMPILE"}
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if (name.startswith("TRITON_") or name in ("PTXAS_OPTIONS", "DISABLE_PTXAS_OPT")) and name not in places
    }


def cache_folder() -> Path:
    """Where reports are kept; a folder that lives as long as this process where no other can be written."""
    base = os.environ.get("FASTOPS_CACHE")
    if base:
        folder = Path(base) / "inspect"
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "fastops" / "inspect"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError:
        return Path(_temporary_folder().name)
    return folder


@functools.cache
def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fastops-inspect-")


def _read(folder: Path, task: dict[str, Any]) -> KernelReport | None:
    """The cached report with the labels of this task; None where there is none that can be read."""
    path = folder / f"{task['key']}.json"
    try:
        report = KernelReport.from_json(json.loads(path.read_text(encoding="utf-8")), str(path.with_suffix("")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None
    if report.error is None and not all(path.with_suffix(suffix).exists() for suffix in (".sass.gz", ".ptx.gz")):
        return None
    return _labelled(report, task)


def _labelled(report: KernelReport, task: dict[str, Any]) -> KernelReport:
    return replace(report, **{label: task[label] for label in LABELS})


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _compile_missing(
    tasks: list[dict[str, Any]],
    missing: list[int],
    folder: Path,
    reports: dict[int, KernelReport],
    jobs: int,
    progress: Callable[[KernelReport], None] | None,
) -> None:
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in missing:
        waiting.put(index)
    lock = threading.Lock()
    failures: list[BaseException] = []

    def serve() -> None:
        with lease(compiler_settings()) as worker:
            while not failures:
                try:
                    index = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    report = _compile_one(worker, tasks[index], folder)
                except Exception as error:
                    failures.append(error)
                    return
                with lock:
                    reports[index] = report
                    if progress:
                        progress(report)

    threads = [threading.Thread(target=serve, daemon=True) for _ in range(min(jobs, len(missing)))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException as error:  # Ctrl-C: let no thread take a further kernel
        failures.append(error)
        raise
    if failures:
        raise failures[0]


def _compile_one(worker: Worker, task: dict[str, Any], folder: Path) -> KernelReport:
    reply = worker.ask(task)
    if reply.get("digest") != task["digest"] and not worker.fresh:
        worker.close()  # it imported the module before the source changed
        reply = worker.ask(task)
    if "crashed" in reply:
        return KernelReport(
            **{name: task[name] for name in (*LABELS, "target", "num_stages")},
            triton=triton_version(),
            error=reply["crashed"],
        )
    if "failed" in reply:
        raise InspectionError(f"case {task['name']!r}: {reply['failed']}")
    # the source was edited since this process imported it: true, but not for this key
    home = folder if reply["digest"] == task["digest"] else Path(_temporary_folder().name)
    artifacts = worker.path(task["key"])
    try:
        return _keep(reply["report"], artifacts, home / task["key"])
    except OSError:  # the disk is full, or another user owns the folder
        return _keep(reply["report"], artifacts, Path(_temporary_folder().name) / task["key"])


def _keep(report: dict[str, Any], artifacts: str, home: Path) -> KernelReport:
    """Move a report and its texts into the cache; the report last, because it makes the entry valid."""
    if report["error"] is None:
        for suffix in (".sass.gz", ".ptx.gz"):
            text = Path(artifacts + suffix)
            _write(text.read_bytes(), home.with_suffix(suffix))
    _write(json.dumps(report).encode(), home.with_suffix(".json"))
    return KernelReport.from_json(report, str(home))


def _write(content: bytes, path: Path) -> None:
    descriptor, name = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
