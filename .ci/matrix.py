"""`make matrix`: the tests under other versions of torch, Triton, numpy and Python, and where there are no kernels.

Each cell has an environment of its own below $MATRIX (default .venv-matrix), made once. CELLS="triton-3.6.0 no-triton"
runs only those, FULL=1 all fast tests instead of a sample. The environments with a PyTorch of their own take some 5 GB
each (much less where pip's settings name PyTorch's index of CPU builds). Exit code 1 where a test failed, 2 where
a cell could not run and no test failed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MATRIX = Path(os.environ.get("MATRIX") or ROOT / ".venv-matrix").resolve()
JOBS = os.environ.get("JOBS", "2")
SAMPLE = 20  # one test in so many, others in each cell
EXTRAS = "bench,hf,examples,dev"
ROOM_GB = 8  # an environment with PyTorch's CUDA libraries, and its downloads
TIMEOUT_S = 3600


class CannotRun(Exception):
    """A cell has no environment here; the message says why."""


@dataclass(frozen=True)
class Place:
    """What a cell's tests run in."""

    python: Path
    paths: tuple[Path, ...] = ()  # before all others on the module path


@dataclass(frozen=True)
class Cell:
    """One row of the table."""

    name: str
    about: str
    place: Callable[[], Place]
    variables: dict[str, str] = field(default_factory=dict)
    tests: tuple[str, ...] = ()  # these, whole, in place of the sample


def here() -> Place:
    """The environment that `make test` uses."""
    return Place(Path(sys.executable))


def beside(*requirements: str) -> Callable[[], Place]:
    """That environment with these packages laid over it, each in a folder of its own."""

    def place() -> Place:
        return Place(Path(sys.executable), tuple(_folder(requirement) for requirement in requirements))

    return place


def without(*packages: str) -> Callable[[], Place]:
    """A copy, made of links, of that environment without these packages."""

    def place() -> Place:
        sys.path.insert(0, str(ROOT))
        from tests import environments

        folder = MATRIX / ("without-" + "-".join(packages))
        return Place(environments.make(folder, environments.everything_but(*packages)))

    return place


def venv(name: str, python: str | None = None, *requirements: str) -> Callable[[], Place]:
    """An environment with all extras at the versions of constraints.txt, but for these requirements."""

    def place() -> Place:
        folder = MATRIX / name
        if not (folder / ".installed").exists():
            interpreter = find_python(python) if python else Path(sys.executable)
            _enough_room()
            shutil.rmtree(folder, ignore_errors=True)
            _call([interpreter, "-m", "venv", folder], "python -m venv")
            constraints = folder / "constraints.txt"
            constraints.write_text(_constraints(requirements), encoding="utf-8")
            what = ["-e", f"{ROOT}[{EXTRAS}]", *requirements, "-c", constraints]
            _call([folder / "bin" / "python", "-m", "pip", "install", "-q", *what], "pip install")
            (folder / ".installed").touch()
        return Place(folder / "bin" / "python")

    return place


CELLS = (
    Cell("default", "the versions of constraints.txt", here),
    Cell("no-kernels", "the same without TRITON_INTERPRET: stock PyTorch only", here, {"FASTOPS_TEST_KERNELS": "0"}),
    Cell("no-triton", "triton is not installed", without("triton"), {"FASTOPS_TEST_KERNELS": "0"}),
    Cell("triton-3.6.0", "Triton 3.6.0, whose interpreter needs numpy < 2.4", beside("triton==3.6.0", "numpy==2.3.5")),
    Cell("triton-3.9.0", "Triton 3.9.0", beside("triton==3.9.0")),
    Cell("torch-2.11", "the oldest PyTorch, with its Triton", venv("torch-2.11", None, "torch==2.11.*", "numpy<2.4")),
    Cell("python-3.10", "Python 3.10", venv("python-3.10", "3.10")),
    Cell("python-3.11", "Python 3.11", venv("python-3.11", "3.11")),
    Cell("python-3.12", "Python 3.12", venv("python-3.12", "3.12")),
    Cell("python-3.13", "Python 3.13", venv("python-3.13", "3.13")),
    Cell("wheel", "sdist and wheel, installed from the index too", here, tests=("tests/test_packaging.py",)),
)


def find_python(version: str) -> Path:
    """An interpreter of this minor version, from the PATH or pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    candidates = [shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python"))]
    for candidate in filter(None, candidates):
        code = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
        found = subprocess.run([str(candidate), "-c", code], capture_output=True, text=True)
        if found.returncode == 0 and found.stdout.strip() == version:
            return Path(candidate)
    raise CannotRun(f"no python{version} with venv on the PATH or in pyenv")


def _folder(requirement: str) -> Path:
    folder = MATRIX / requirement.replace("==", "-")
    if not (folder / ".installed").exists():
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, requirement]
        _call(command, f"pip install {requirement}")
        (folder / ".installed").touch()
    return folder


def _enough_room() -> None:
    MATRIX.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(MATRIX).free / 2**30
    if free < ROOM_GB:
        raise CannotRun(f"{free:.1f} GB are free below {MATRIX.name}, {ROOM_GB} may be needed")


def _constraints(requirements: Sequence[str]) -> str:
    """constraints.txt without what the requirements settle; another torch brings its own triton."""
    settled = {re.match(r"[\w-]+", requirement).group() for requirement in requirements}  # type: ignore[union-attr]
    if "torch" in settled:
        settled.add("triton")
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if re.split("[=;]", line)[0].strip() not in settled) + "\n"


def _call(command: Sequence[object], what: str) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise CannotRun(f"{what} failed: {errors[0][:300] if errors else f'exit code {done.returncode}'}")


VERSIONS = """
import importlib.metadata as m, sys
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return "-"
print(sys.version.split()[0], *map(version, ("torch", "triton", "numpy")))
"""


def run(cell: Cell, full: bool) -> tuple[str, str, str]:
    """Versions, result and time of one cell."""
    start = time.monotonic()
    try:
        place = cell.place()
    except (CannotRun, OSError) as error:
        return "", f"CANNOT RUN: {error}", ""
    environment = {
        name: value for name, value in os.environ.items() if name not in {"TRITON_INTERPRET", "FASTOPS_IMPL"}
    }
    paths = [*place.paths, ROOT, ROOT / ".ci"]
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, paths)), **cell.variables}
    command = [
        str(place.python),
        "-m",
        "pytest",
        "-q",
        "--tb=short",
        "--show-capture=no",
        "-p",
        "no:cacheprovider",
        "-p",
        "cell",
        "-n",
        JOBS,
    ]
    command += ["--timeout", "900", "-m", "not gpu" if cell.tests else "not gpu and not slow", *cell.tests]
    if not full and not cell.tests:
        command += ["--sample", str(SAMPLE), "--sample-name", cell.name]
    versions = subprocess.run(
        [str(place.python), "-c", VERSIONS], env=environment, capture_output=True, text=True
    ).stdout
    print(f"== {cell.name}: {cell.about}", flush=True)
    log = MATRIX / f"{cell.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=file, stderr=file, timeout=TIMEOUT_S
            ).returncode
        except subprocess.TimeoutExpired:
            return versions, f"FAILED: not done after {TIMEOUT_S} s, see {log}", _minutes(start)
    text = log.read_text(encoding="utf-8", errors="replace")
    summary = next((line for line in reversed(text.splitlines()) if re.search(r"\d+ (passed|failed|error)", line)), "")
    if code:
        print(text, flush=True)
        return versions, f"FAILED: {summary.strip(' =') or f'exit code {code}'}", _minutes(start)
    return versions, re.sub(r",? *(\d+ warnings?)? in .*", "", summary.strip(" =")), _minutes(start)


def _minutes(start: float) -> str:
    return f"{(time.monotonic() - start) / 60:.1f} min"


def main() -> int:
    """Run the cells, print one table."""
    usage = argparse.ArgumentParser(
        usage="make matrix [CELLS=...] [FULL=1]",
        description=__doc__,
        epilog="cells:\n" + "\n".join(f"  {cell.name:14s}{cell.about}" for cell in CELLS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    usage.parse_args()  # there are no arguments, but hours are not to begin where help is asked for
    wanted = os.environ.get("CELLS", "").split() or [cell.name for cell in CELLS if cell.name != _own_version()]
    unknown = set(wanted) - {cell.name for cell in CELLS}
    if unknown:
        names = ", ".join(cell.name for cell in CELLS)
        print(f"make matrix: no cell {', '.join(sorted(unknown))}; there are {names}", file=sys.stderr)
        return 2
    full = os.environ.get("FULL", "") not in {"", "0"}
    rows = [(cell.name, *run(cell, full)) for cell in CELLS if cell.name in wanted]
    what = "all fast tests" if full else f"one fast test in {SAMPLE}, others in each cell"
    print(f"\n{what}; logs in {MATRIX}\n")
    print(f"{'cell':14s}{'python torch triton numpy':38s}{'time':10s}result")
    for name, versions, result, minutes in rows:
        print(f"{name:14s}{versions.strip():38s}{minutes:10s}{result}")
    results = [result for _, _, result, _ in rows]
    if any(result.startswith("FAILED") for result in results):
        return 1
    return 2 if any(result.startswith("CANNOT") for result in results) else 0


def _own_version() -> str:
    """The Python cell that the default cell stands for."""
    return "python-{}.{}".format(*sys.version_info)


if __name__ == "__main__":
    sys.exit(main())
