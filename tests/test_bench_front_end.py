"""`pytest bench/`: pytest-benchmark's own features work on the paired samples."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark")
ROOT = Path(__file__).resolve().parent.parent
SELECT = ["--bench-op", "rnn", "-k", "infer and (eager or fastops) and not small and not persistent and not step"]


def pytest_bench(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):  # it is a session of its own
        environment.pop(name, None)
    command = [sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider", *SELECT, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("front") / "first.json"
    done = pytest_bench("--case-budget", "0.5", f"--benchmark-json={path}")
    assert done.returncode == 0, done.stdout + done.stderr
    return path, done.stdout


def test_json_holds_the_paired_samples(saved):
    path, out = saved
    stored = json.loads(path.read_text())
    rounds = {bench["group"]: set() for bench in stored["benchmarks"]}
    for bench in stored["benchmarks"]:
        rounds[bench["group"]].add(bench["stats"]["rounds"])
        assert bench["extra_info"]["clock"] == "cpu"
    assert all(len(counts) == 1 for counts in rounds.values())  # every arm, every round
    ours = [b for b in stored["benchmarks"] if b["extra_info"]["role"] == "ours"]
    assert ours
    assert all({"ratio", "lo", "hi", "best"} <= set(b["extra_info"]["vs_best"]) for b in ours)
    assert stored["machine_info"]["fastops"]["torch"]
    assert "fastops against the best stock arm" in out


@pytest.mark.slow
def test_compare_and_disable(saved):
    path, _ = saved
    again = pytest_bench("--case-budget", "0.3", f"--benchmark-compare={path}")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "(now)" in again.stdout.lower()
    stored = json.loads(path.read_text())
    stored["machine_info"]["fastops"]["machine"] = "another GPU"
    path.write_text(json.dumps(stored))
    refused = pytest_bench("--case-budget", "0.3", f"--benchmark-compare={path}")
    assert refused.returncode != 0
    assert "cannot be compared" in refused.stdout + refused.stderr
    only_right = pytest_bench("--benchmark-disable")
    assert only_right.returncode == 0
    assert "GATE" in only_right.stdout
