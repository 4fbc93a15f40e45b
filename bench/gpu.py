"""`make gpu`: the GPU tests, then the GPU suite, most valuable first, inside a hard time budget.

Everything goes to $OUT (default bench-results/) as it is measured, in at most eight files; with RESUME=1, rows that are
there already are kept. Each stage is a process of its own with its own deadline: a hang, a crash or a kill costs that
stage's rest and nothing else. Tests that there was no time for are counted and are no failure.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

TOTAL_S = 525.0  # of nine minutes, the rest is for starting and for writing the last file
GRACE_S = 5.0  # between asking a stage to stop and killing it
FEWEST_S = 10.0  # a stage that could run for less than this is not started
RESTARTS = 3  # of a stage whose process died in one case
LAST_TEST_S = 15.0  # a test that began may take this long, then pytest still says what failed
ONE_TEST_S = 90  # compiling included; what takes longer hangs
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Stage:
    """One process.

    Attributes:
        name: in the summary.
        arguments: after the interpreter.
        share: seconds it may take when all stages before it used up theirs; time left over goes to the next ones.
        log: file that its output goes to.
        resumes: whether it goes on where it stopped when it is started again.
        tests: whether it is pytest, which is told when to begin no further test (tests/conftest.py).
    """

    name: str
    arguments: tuple[str, ...]
    share: float
    log: str
    resumes: bool = False
    tests: bool = False


def stages(out: Path) -> list[Stage]:
    """Tests first: a number of a wrong kernel is worth nothing. Then the ops; cases are in order of value."""
    together: tuple[str, ...] = ()
    if importlib.util.find_spec("xdist"):
        # most of a GPU test's time is compiling; each process also holds half a gigabyte of the GPU
        together = ("-n", str(max(2, min(12, (os.cpu_count() or 2) - 2))))
    found = [
        Stage("tests", pytest_arguments("gpu and not alone", *together), 130.0, "tests.txt", tests=True),
        Stage("tests alone", pytest_arguments("gpu and alone"), 35.0, "tests_alone.txt", tests=True),
    ]
    for name, ops, share in (
        ("conv", ("alexnet", "conv2d_relu", "conv2d_relu_max_pool2d"), 140.0),
        ("attention", ("attention", "varlen_attention", "bert"), 110.0),
        ("rnn", ("rnn", "rnn_cell", "lstm_model"), 110.0),
    ):
        arguments = ["-m", "bench", "run", "--suite", "full", "--quick", "--device", "cuda"]
        arguments += ["--json", str(out / f"{name}.json")]
        for op in ops:
            arguments += ["--op", op]
        found.append(Stage(name, tuple(arguments), share, "bench.txt", resumes=True))
    return found


def pytest_arguments(marks: str, *more: str) -> tuple[str, ...]:
    """pytest over the files that have GPU tests."""
    arguments = ["-m", "pytest", "-m", marks, "-q", "--tb=short", "-p", "no:cacheprovider"]
    arguments += ["--continue-on-collection-errors"]  # a file that lacks a package takes no other with it
    if importlib.util.find_spec("pytest_timeout"):
        arguments += [f"--timeout={ONE_TEST_S}", "--timeout-method=thread"]
    files = sorted(path for path in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in path.read_text("utf-8"))
    if "alone" in marks.replace("not alone", ""):
        files = [path for path in files if "mark.alone" in path.read_text("utf-8")]
    return (*arguments, *more, *(str(path.relative_to(ROOT)) for path in files))


def run_stage(stage: Stage, out: Path, seconds: float) -> dict[str, object]:
    """Run one stage to its end or its deadline; a process that died is started again where that makes sense."""
    deadline = time.monotonic() + seconds
    started = time.monotonic()
    attempts, code = 0, None
    log = out / stage.log
    before = log.stat().st_size if log.exists() else 0
    while attempts <= (RESTARTS if stage.resumes else 0):
        left = deadline - time.monotonic()
        if left < FEWEST_S and attempts:
            break
        attempts += 1
        arguments = [sys.executable, *stage.arguments]
        environment = dict(os.environ)
        if stage.resumes:
            if attempts > 1 or os.environ.get("RESUME"):
                arguments.append("--resume")
            arguments += ["--budget", f"{max(left - 2 * GRACE_S, 1):.0f}"]
        if stage.tests:
            environment["FASTOPS_TESTS_UNTIL"] = str(time.time() + max(left - LAST_TEST_S, 0.0))
        code = _run(arguments, log, left, environment)
        if code in (0, 2, 3, None):  # done, refused, found something wrong, or out of time
            break
    found: dict[str, object] = {
        "stage": stage.name,
        "exit_code": code,
        "ended": "deadline" if code is None else "done",
        "seconds": round(time.monotonic() - started, 1),
        "starts": attempts,
    }
    if stage.tests:
        with log.open(encoding="utf-8", errors="replace") as file:
            file.seek(before)
            found |= tests_of(file.read())
    return found


def tests_of(output: str) -> dict[str, int]:
    """How many tests passed, failed or were not reached in the time, from what pytest printed; nothing where it was
    killed before it could say.
    """
    ends = re.findall(r"^.*\b(?:passed|failed|errors?|skipped|deselected|no tests ran)\b.* in [\d.]+s.*$", output, re.M)
    if not ends:
        return {}
    counted = {word.rstrip("s"): int(count) for count, word in re.findall(r"(\d+) (passed|failed|errors?)\b", ends[-1])}
    late = re.findall(r"^not reached, out of time: (\d+)$", output, re.M)
    return {
        "tests_passed": counted.get("passed", 0),
        "tests_failed": counted.get("failed", 0) + counted.get("error", 0),
        "tests_not_reached": int(late[-1]) if late else 0,
    }


def _run(arguments: list[str], log: Path, seconds: float, environment: dict[str, str]) -> int | None:
    """Exit code, or None where the deadline came first. The whole process group is stopped."""
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n$ {' '.join(arguments[1:])}\n")
        file.flush()
        process = subprocess.Popen(
            arguments, cwd=ROOT, stdout=file, stderr=file, env=environment, start_new_session=True
        )
        try:
            return process.wait(timeout=max(seconds - GRACE_S, 0.1))
        except subprocess.TimeoutExpired:
            for signal_number, patience in ((signal.SIGINT, GRACE_S), (signal.SIGKILL, 2.0)):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal_number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=patience)
                    break
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            file.write(f"\n[stopped at its deadline, {seconds:.0f} s]\n")
            return None


def run_all(plan: list[Stage], out: Path, total_s: float = TOTAL_S) -> list[dict]:
    """Run the stages in order; the summary is rewritten after each."""
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + total_s
    spare = total_s - sum(stage.share for stage in plan)
    done: list[dict] = []
    for stage in plan:
        left = min(stage.share + max(spare, 0.0), end - time.monotonic())
        if left < FEWEST_S:
            done.append({"stage": stage.name, "exit_code": None, "ended": "no time left", "seconds": 0.0, "starts": 0})
            continue
        print(f"[{total_s - (end - time.monotonic()):4.0f} s] {stage.name}: up to {left:.0f} s", flush=True)
        found = run_stage(stage, out, left)
        spare += stage.share - float(str(found["seconds"]))
        done.append(found)
        (out / "summary.json").write_text(json.dumps(done, indent=1), encoding="utf-8")
        more = "".join(f", {name.replace('_', ' ')} {found[name]}" for name in found if name.startswith("tests_"))
        print(f"         {found['ended']}, exit code {found['exit_code']}, {found['seconds']} s{more}", flush=True)
    return done


def print_results(out: Path) -> int:
    """The ends of the tests, one table of all rows, the verdict. The worst exit code."""
    from bench import results, runner, table
    from bench.cli.common import console

    terminal = console()
    for log in (out / "tests.txt", out / "tests_alone.txt"):
        if log.exists():
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            terminal.print("\n".join(lines[-15:]), markup=False, highlight=False)
    rows: dict[str, dict] = {}
    machine = "no GPU result"
    for path in out.glob("*.part"):  # of a process killed while it wrote
        path.unlink()
    for path in sorted(out.glob("*.json")):
        with contextlib.suppress(results.Unreadable):
            document = results.read(path)
            machine = document["env"].get("machine", machine)
            rows |= {row["case"]: row for row in document["rows"]}
    table.print_rows(terminal, list(rows.values()))
    print(table.verdict_line(list(rows.values()), machine), flush=True)
    return runner.exit_code(list(rows.values()))


def write_page(out: Path) -> None:
    """One report page over all result files."""
    from bench import results
    from bench.report import html

    documents = []
    for path in sorted(out.glob("*.json")):
        with contextlib.suppress(results.Unreadable):
            documents.append(results.read(path))
    if documents:
        rows = [row for document in documents for row in document["rows"]]
        html.write({"schema": results.SCHEMA, "env": documents[0]["env"], "rows": rows}, out / "report.html")


def failed(done: dict) -> int:
    """1 where tests of this stage failed, or it was killed and nobody knows; not where it ran out of time."""
    if not done["stage"].startswith("tests") or done["ended"] == "no time left":
        return 0
    unknown = done["exit_code"] is None and "tests_failed" not in done
    return int(unknown or done.get("tests_failed", 0) > 0 or done["exit_code"] not in (0, 5, None))


def main() -> int:
    """Run everything; exit 0, 1 where tests failed, 2 without a GPU, 3 where an arm is wrong or impossibly fast."""
    import torch

    if not torch.cuda.is_available():
        print(f"make gpu: PyTorch {torch.__version__} sees no GPU here (make bench runs without one)", file=sys.stderr)
        return 2
    out = Path(os.environ.get("OUT") or "bench-results").resolve()
    budget = min(float(os.environ.get("BUDGET", TOTAL_S)), TOTAL_S)
    done = run_all(stages(out), out, budget)
    code = print_results(out)
    with contextlib.suppress(Exception):  # the page is a courtesy, the JSON files are the result
        write_page(out)
    return code or max(map(failed, done), default=0)


if __name__ == "__main__":
    sys.exit(main())
