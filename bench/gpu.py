"""`make gpu`: the GPU tests, then the GPU suite, most valuable first, inside a hard time budget.

Everything goes to $OUT (default bench-results/) as it is measured, in at most eight files; with RESUME=1, rows that are
there already are kept. Each stage is a process of its own with its own deadline: a hang, a crash or a kill costs that
stage's rest and nothing else.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
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
    """

    name: str
    arguments: tuple[str, ...]
    share: float
    log: str
    resumes: bool = False


def stages(out: Path) -> list[Stage]:
    """Tests first: a number of a wrong kernel is worth nothing. Then the ops; cases are in order of value."""
    tests = ["-m", "pytest", "-m", "gpu", "-q", "--maxfail=20", "-p", "no:cacheprovider", "tests"]
    tests += ["--continue-on-collection-errors"]  # a file that lacks a package takes no other with it
    if importlib.util.find_spec("xdist"):
        # most of a GPU test's time is compiling; each process also holds half a gigabyte of the GPU
        tests += ["-n", str(max(2, min(12, (os.cpu_count() or 2) - 2)))]
    found = [Stage("tests", tuple(tests), 150.0, "tests.txt")]
    for name, ops, share in (
        ("conv", ("alexnet", "conv2d_relu", "conv2d_relu_max_pool2d"), 150.0),
        ("attention", ("attention", "varlen_attention", "bert"), 110.0),
        ("rnn", ("rnn", "lstm_model"), 110.0),
    ):
        arguments = ["-m", "bench", "run", "--suite", "full", "--quick", "--device", "cuda"]
        arguments += ["--json", str(out / f"{name}.json")]
        for op in ops:
            arguments += ["--op", op]
        found.append(Stage(name, tuple(arguments), share, "bench.txt", resumes=True))
    return found


def run_stage(stage: Stage, out: Path, seconds: float) -> dict[str, object]:
    """Run one stage to its end or its deadline; a process that died is started again where that makes sense."""
    deadline = time.monotonic() + seconds
    started = time.monotonic()
    attempts, code = 0, None
    while attempts <= (RESTARTS if stage.resumes else 0):
        left = deadline - time.monotonic()
        if left < FEWEST_S and attempts:
            break
        attempts += 1
        arguments = [sys.executable, *stage.arguments]
        if stage.resumes:
            if attempts > 1 or os.environ.get("RESUME"):
                arguments.append("--resume")
            arguments += ["--budget", f"{max(left - 2 * GRACE_S, 1):.0f}"]
        code = _run(arguments, out / stage.log, left)
        if code in (0, 2, 3, None):  # done, refused, found something wrong, or out of time
            break
    return {
        "stage": stage.name,
        "exit_code": code,
        "ended": "deadline" if code is None else "done",
        "seconds": round(time.monotonic() - started, 1),
        "starts": attempts,
    }


def _run(arguments: list[str], log: Path, seconds: float) -> int | None:
    """Exit code, or None where the deadline came first. The whole process group is stopped."""
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n$ {' '.join(arguments[1:])}\n")
        file.flush()
        process = subprocess.Popen(arguments, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
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
        print(f"         {found['ended']}, exit code {found['exit_code']}, {found['seconds']} s", flush=True)
    return done


def print_results(out: Path) -> int:
    """The tail of the tests, one table of all rows, the verdict. The worst exit code."""
    from bench import results, runner, table
    from bench.cli.common import console

    terminal = console()
    log = out / "tests.txt"
    if log.exists():
        terminal.print("\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]), markup=False)
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
    tests = done[0]["exit_code"]
    return code or (1 if tests not in (0, 5) else 0)


if __name__ == "__main__":
    sys.exit(main())
