"""`make gpu`: whatever a stage does, the whole ends in time and what was measured stays."""

import json
import os
import subprocess
import sys
import time

import pytest

from bench import cases, gpu
from bench.gpu import Stage


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(gpu, "GRACE_S", 0.5)
    monkeypatch.setattr(gpu, "FEWEST_S", 0.3)


def stage(name, code, share, **more):
    return Stage(name, ("-c", code), share, "log.txt", **more)


def test_a_hang_is_stopped_and_the_next_stage_runs(tmp_path):
    plan = [
        stage("hangs", "import time; print('begun', flush=True); time.sleep(600)", 1.5),
        stage("ignores signals", "import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(600)", 1.5),
        stage(
            "leaves a child",
            "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])",
            1.5,
        ),
        stage("works", "print('done')", 5.0),
    ]
    start = time.monotonic()
    done = gpu.run_all(plan, tmp_path, total_s=12.0)
    assert time.monotonic() - start < 12.0
    assert [one["ended"] for one in done] == ["deadline"] * 3 + ["done"]
    assert done[3]["exit_code"] == 0
    log = (tmp_path / "log.txt").read_text()
    assert "begun" in log
    assert "stopped at its deadline" in log
    assert json.loads((tmp_path / "summary.json").read_text()) == done


def test_a_stage_that_dies_is_started_again_and_told_to_resume(tmp_path):
    count = tmp_path / "count"
    code = f"""
import os, pathlib, sys
count = pathlib.Path({str(count)!r})
starts = int(count.read_text()) if count.exists() else 0
count.write_text(str(starts + 1))
sys.exit(0) if starts == 2 and "--resume" in sys.argv else os.abort()
"""
    found = gpu.run_stage(stage("dies", code, 20.0, resumes=True), tmp_path, 20.0)
    assert (found["exit_code"], found["starts"]) == (0, 3)
    count.unlink()
    once = gpu.run_stage(stage("dies", code, 20.0), tmp_path, 20.0)
    assert once["starts"] == 1
    assert once["exit_code"] not in (0, None)


def test_no_time_left_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "FEWEST_S", 5.0)
    plan = [stage("long", "import time; time.sleep(600)", 5.1), stage("late", "print(1)", 5.0)]
    done = gpu.run_all(plan, tmp_path, total_s=5.2)
    assert done[1]["ended"] == "no time left"


def test_the_real_plan_fits_nine_minutes_and_eight_files(tmp_path):
    plan = gpu.stages(tmp_path)
    assert plan[0].name == "tests"
    assert sum(one.share for one in plan) <= gpu.TOTAL_S <= 9 * 60 - 10
    jsons = {one.arguments[one.arguments.index("--json") + 1] for one in plan if "--json" in one.arguments}
    files = jsons | {one.log for one in plan} | {"summary.json", "report.html"}
    assert len(files) <= 8


def test_every_stage_begins_with_cheap_rows_and_reaches_its_model_early(tmp_path):
    for one in gpu.stages(tmp_path)[2:]:
        ops = [one.arguments[i + 1] for i, argument in enumerate(one.arguments) if argument == "--op"]
        order = cases.select("full", ops)
        whole = [case.op in ("alexnet", "bert", "lstm_model") for case in order]
        assert not whole[0]
        assert "quick" in order[0].suites
        assert sum(whole[:6]) >= 2


def test_gpu_tests_take_turns_so_that_a_cut_misses_none_of_them():
    from types import SimpleNamespace

    from tests.conftest import in_turns

    names = ["a.py::one[1]", "a.py::one[2]", "a.py::one[x[3]]", "a.py::two", "b.py::one[1]", "b.py::one[2]"]
    found = [item.nodeid for item in in_turns([SimpleNamespace(nodeid=name) for name in names])]
    assert found == [names[i] for i in (0, 3, 4, 1, 5, 2)]


def test_a_test_file_that_cannot_be_imported_stops_no_other(tmp_path):
    assert "--continue-on-collection-errors" in gpu.stages(tmp_path)[0].arguments


def test_gpu_tests_run_together_but_for_those_that_measure_time(tmp_path):
    together, alone = gpu.stages(tmp_path)[:2]
    marks = [one.arguments[one.arguments.index("-m", 2) + 1] for one in (together, alone)]
    assert marks == ["gpu and not alone", "gpu and alone"]
    assert together.tests
    assert alone.tests
    assert "-n" not in alone.arguments
    assert not any(argument.startswith("--maxfail") for argument in together.arguments)
    files = [{x for x in one.arguments if x.startswith("tests/")} for one in (together, alone)]
    assert {"tests/test_rnn_gpu.py", "tests/test_contracts.py", "tests/test_profiling.py"} <= files[0]
    assert "tests/test_house.py" not in files[0]
    assert {"tests/test_bench_gate.py", "tests/test_profiling.py"} <= files[1] < files[0]


PRINTS_AS_PYTEST = """
import os, time
if float(os.environ["FASTOPS_TESTS_UNTIL"]) < time.time():
    print("3 failed, 4 passed in 1.2s")
else:
    print("not reached, out of time: 4")
    print("SKIPPED [4] tests/conftest.py:59: out of time")
    print("12 passed, 5 skipped in 130.12s (0:02:10)")
"""


def test_tests_that_there_was_no_time_for_are_counted_and_no_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LAST_TEST_S", 3.0)
    (tmp_path / "log.txt").write_text("1 failed, 2 passed in 3.4s\n")  # of an earlier run
    done = gpu.run_stage(stage("tests", PRINTS_AS_PYTEST, 20.0, tests=True), tmp_path, 20.0)
    counts = (done["tests_passed"], done["tests_failed"], done["tests_not_reached"])
    assert (done["exit_code"], *counts) == (0, 12, 0, 4)
    assert gpu.failed(done) == 0


def test_what_counts_as_failed_tests():
    for output, code, expected in (
        ("12 passed, 5 skipped in 3.10s", 0, 0),
        ("no tests ran in 2.00s", 5, 0),
        ("1 failed, 11 passed in 3.10s", 1, 1),
        ("11 passed, 1 error in 3.10s", 1, 1),
        ("!!!! KeyboardInterrupt !!!!\n11 passed in 3.10s\n[stopped at its deadline, 130 s]", None, 0),
        ("!!!! KeyboardInterrupt !!!!\n1 failed, 11 passed in 3.10s", None, 1),
        ("..........", None, 1),  # killed: nobody knows
        ("..........", -9, 1),
        ("12 passed in 3.10s", 3, 1),
    ):
        done = {"stage": "tests", "exit_code": code, "ended": "done", **gpu.tests_of(output)}
        assert gpu.failed(done) == expected, output
    assert gpu.failed({"stage": "tests alone", "exit_code": None, "ended": "no time left"}) == 0
    assert gpu.failed({"stage": "conv", "exit_code": 3, "ended": "done"}) == 0  # told by its rows


def test_pytest_begins_no_test_after_the_time_it_was_given():
    environment = {**os.environ, "FASTOPS_TESTS_UNTIL": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_rule.py"]
    found = subprocess.run(command, cwd=gpu.ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stdout
    counts = gpu.tests_of(found.stdout)
    assert (counts["tests_passed"], counts["tests_failed"]) == (0, 0)
    assert counts["tests_not_reached"] > 5


def test_results_are_gathered_from_all_files(tmp_path, capsys):
    from tests.bench_document import document

    made = document(rows=6)
    for name, rows in (("conv", made["rows"][:2]), ("rnn", made["rows"][2:])):
        (tmp_path / f"{name}.json").write_text(json.dumps({**made, "rows": rows}))
    (tmp_path / "attention.json.part").write_text("{")
    (tmp_path / "summary.json").write_text("[]")
    (tmp_path / "tests.txt").write_text("12 passed")
    assert gpu.print_results(tmp_path) == 0
    out = capsys.readouterr().out
    assert "12 passed" in out
    assert out.splitlines()[-1].startswith("6 cases")
    gpu.write_page(tmp_path)
    assert "fastops benchmark" in (tmp_path / "report.html").read_text()
    assert not list(tmp_path.glob("*.part"))


def test_without_a_gpu_one_clear_line(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main() == 2
    assert "sees no GPU" in capsys.readouterr().err
