"""`python -m bench`: what a new user types, right and wrong."""

import json

import pytest

from bench import cases, environment, results, runner, stats, workloads
from bench.__main__ import main
from bench.case import Case
from tests import bench_workload as toy
from tests.bench_document import document

TOYS = [Case("toy", name, "fp32", "infer", {"size": 16}, ("cpu",)) for name in ("one", "two/2", "three")]


@pytest.fixture
def toys(monkeypatch, tmp_path):
    """A table of three quick cases; returns the workload, whose arms a test may add to."""
    work = toy.Toy(toy.ours("fastops", toy.honest()))
    monkeypatch.setitem(workloads.TABLE, "toy", "tests:none")
    monkeypatch.setattr(workloads, "workload", lambda op: work)
    monkeypatch.setattr(cases, "all_cases", lambda: list(TOYS))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path)
    return work


def run(*arguments):
    return main(["run", "--suite", "cpu", "--op", "toy", "--case-budget", "0.05", *arguments])


def test_run_writes_json_and_ends_with_the_verdict(toys, tmp_path, capsys):
    assert run("--json", "r.json") == 0
    document = results.read(tmp_path / "r.json")
    assert [row["case"] for row in document["rows"]] == [case.id for case in TOYS]
    assert document["running"] is None
    for row in document["rows"]:
        assert row["gate"] == "pass"
        assert set(row["vs_best"]) == {"ratio", "lo", "hi", "best", "arm"}
        for provider in row["providers"].values():
            assert len(provider["samples_s"]) == row["rounds"]
            assert provider["median_s"] > 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("3 cases: ")
    assert "geometric mean" in last
    assert environment.machine(toy.CPU) in last
    assert "\x1b[" not in last


def test_run_is_what_no_command_means(toys, tmp_path):
    assert main(["--suite", "cpu", "--op", "toy", "--case-budget", "0.05", "--json", "r.json"]) == 0
    assert (tmp_path / "r.json").exists()


def test_a_wrong_arm_fails_the_run_and_is_named(toys, capsys):
    toys.extra = (toy.ours("fastops", toy.slightly_wrong),)
    assert run("--json", "r.json") == 3
    out = capsys.readouterr().out
    assert "3 WRONG" in out.splitlines()[-1]
    assert "losses: toy/one/fp32/infer" in out.splitlines()[-1]
    assert "relative error" in out


def test_one_broken_case_leaves_the_rest(toys, tmp_path, monkeypatch, capsys):
    honest_inputs = toys.inputs

    def inputs(case, device, seed):
        if case.name == "one":
            raise toy.torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")
        return honest_inputs(case, device, seed)

    monkeypatch.setattr(toys, "inputs", inputs)
    assert run("--json", "r.json") == 0
    rows = results.read(tmp_path / "r.json")["rows"]
    assert [row["verdict"] == stats.ERROR for row in rows] == [True, False, False]
    assert "out of memory" in capsys.readouterr().out
    assert run("-k", "one", "--json", "r.json") == 3, "nothing could be measured"


def test_resume_keeps_what_is_there_and_skips_what_killed_the_process(toys, tmp_path, capsys):
    assert run("-k", "one", "--json", "r.json") == 0
    first = results.read(tmp_path / "r.json")
    first["running"] = TOYS[1].id
    (tmp_path / "r.json").write_text(results.dump(first))
    assert run("--json", "r.json", "--resume") == 0
    rows = {row["case"]: row for row in results.read(tmp_path / "r.json")["rows"]}
    assert set(rows) == {case.id for case in TOYS}
    assert rows[TOYS[0].id] == first["rows"][0]
    assert rows[TOYS[1].id]["name"] == "two/2"
    assert "process died" in rows[TOYS[1].id]["error"]
    assert rows[TOYS[2].id]["verdict"] != stats.ERROR
    assert run("--json", "r.json", "--resume") == 0
    assert "3 of 3 cases are there already" in capsys.readouterr().out


def test_resume_keeps_the_commands_that_measured_the_other_rows(toys, tmp_path, monkeypatch):
    for word in ("one", "two", "two", "three"):
        monkeypatch.setattr("sys.argv", ["__main__.py", "run", "-k", word])
        assert run("-k", word, "--json", "r.json", *(["--resume"] if word != "one" else [])) == 0
    env = results.read(tmp_path / "r.json")["env"]
    assert [argv[-1] for argv in env["earlier_argv"]] == ["one", "two"]
    assert env["argv"][-1] == "three"
    assert run("-k", "three", "--json", "r.json") == 0, "and a new start has no earlier commands"
    assert "earlier_argv" not in results.read(tmp_path / "r.json")["env"]


@pytest.mark.parametrize(("threads", "words"), [(1, ", 1 thread"), (2, ", 2 threads")])
def test_threads_are_counted_in_words(monkeypatch, threads, words):
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    assert environment.machine(toy.CPU).endswith(words)


def test_a_result_that_says_1_threads_is_of_the_same_machine(toys, tmp_path):
    assert run("-k", "one", "--json", "r.json") == 0
    older = results.read(tmp_path / "r.json")
    machine = older["env"]["machine"]
    assert machine.endswith(", 1 thread")
    older["env"]["machine"] = machine + "s"
    (tmp_path / "older.json").write_text(results.dump(older))
    assert main(["compare", "older.json", "r.json", "--fail", "slower:99%"]) == 0
    assert run("-k", "two", "--json", "older.json", "--resume") == 0
    assert main(["report", "older.json", "-o", "r.md"]) == 0
    assert "1 threads" not in (tmp_path / "r.md").read_text()


def test_resume_refuses_another_machine(toys, tmp_path, capsys):
    (tmp_path / "r.json").write_text(json.dumps(document(rows=1)))
    assert run("--json", "r.json", "--resume") == 2
    assert "was measured on Made-up GPU" in capsys.readouterr().err
    (tmp_path / "r.json").write_text("{")
    assert run("--json", "r.json", "--resume") == 2
    assert run("--resume") == 2


@pytest.mark.parametrize("content", ['{"name": "package"}', "notes, not JSON", '{"schema": 1, "rows": [], "env": 1}'])
def test_a_file_of_another_kind_is_not_overwritten(toys, tmp_path, capsys, content):
    path = tmp_path / "r.json"
    path.write_text(content)
    assert run("--json", "r.json") == 2
    seen = capsys.readouterr()
    assert "--json: r.json: " in seen.err
    assert seen.err.count("\n") == 1
    assert seen.out == ""
    assert path.read_text() == content


def test_a_device_is_not_replaced_by_a_file(toys, tmp_path, capsys):
    (tmp_path / "r.json").symlink_to("/dev/null")
    assert run("--json", "r.json") == 2
    assert "r.json is no ordinary file" in capsys.readouterr().err


@pytest.mark.parametrize("content", [json.dumps(document(rows=1)), ""])
def test_an_older_result_or_an_empty_file_is_overwritten(toys, tmp_path, content):
    (tmp_path / "r.json").write_text(content)
    assert run("-k", "one", "--json", "r.json") == 0
    assert [row["case"] for row in results.read(tmp_path / "r.json")["rows"]] == [TOYS[0].id]


def test_rows_are_on_disk_as_they_come(toys, tmp_path, monkeypatch):
    seen = []

    def killed(case, *rest, real=runner.run_case):
        seen.append(json.loads((tmp_path / "r.json").read_text()))
        if case.name == "three":
            raise KeyboardInterrupt
        return real(case, *rest)

    monkeypatch.setattr(runner, "run_case", killed)
    assert run("--json", "r.json") == 130
    assert [(len(d["rows"]), d["running"]) for d in seen] == [(i, case.id) for i, case in enumerate(TOYS)]
    assert len(results.read(tmp_path / "r.json")["rows"]) == 2


def test_budget_cuts_off_and_says_so(toys, tmp_path, capsys):
    assert run("--json", "r.json", "--budget", "0.000001") == 0
    assert "3 cases not run" in capsys.readouterr().out
    assert results.read(tmp_path / "r.json")["rows"] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--suite", "quik"], "unknown suite 'quik'; did you mean quick"),
        (["--op", "conv2drelu"], "unknown op 'conv2drelu'; did you mean conv2d_relu"),
        (["-k", "alexnet.conv9"], "unknown case"),
        (["--op", "rnn_cell", "-k", "gru 64 bf16 infer"], "did you mean rnn_cell/gru 64x512x512/bf16/infer"),
        (
            ["--suite", "cpu", "--op", "attention", "--providers", "fastop"],
            "unknown provider 'fastop'; did you mean fastops",
        ),
        (["--device", "cuda"], "sees no GPU"),
        (["--device", "gpu"], "--device gpu: cpu or cuda"),
        (["--device", "cpu:x"], "--device cpu:x: "),
        (["--json", "/"], "--json: / is a folder"),
        (["--json", "/dev/null/r.json"], "--json: cannot write into /dev/null: "),
        (["--html", "/dev/null/r.html"], "--html: cannot write into /dev/null: "),
    ],
)
def test_what_cannot_be_done_is_one_clear_line(arguments, words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["run", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_an_engine_that_is_none(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTOPS_IMPL", "tritn")
    assert main(["run", "--device", "cpu", "--json", str(tmp_path / "r.json")]) == 2
    assert capsys.readouterr().err.startswith("bench: FASTOPS_IMPL must be one of")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("budget", ["0", "-1", "nan", "soon"])
def test_a_budget_is_a_time(budget, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["run", "--budget", budget])
    assert stop.value.code == 2
    assert "expected a positive number of seconds" in capsys.readouterr().err


def test_list_and_env(capsys):
    assert main(["run", "--suite", "models", "--list", "--device", "cpu"]) == 0
    assert "alexnet/alexnet b256/fp16/train" in capsys.readouterr().out.splitlines()
    assert main(["list", "--suite", "quick", "--arms", "--op", "rnn"]) == 0
    out = capsys.readouterr().out
    assert "fastops.nn.LSTM" in out
    assert main(["env", "--device", "cpu"]) == 0
    env = json.loads(capsys.readouterr().out)
    assert {"torch", "triton", "machine", "commit", "flags", "date"} <= set(env)
    assert main(["list", "--op", "nothing"]) == 2


def test_ceilings_need_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["ceilings"]) == 2
    assert "GPU" in capsys.readouterr().err


def test_help_of_every_command(capsys):
    for command in ("run", "compare", "report", "ceilings", "env", "list"):
        with pytest.raises(SystemExit) as done:
            main([command, "--help"])
        assert done.value.code == 0
        assert "usage: python -m bench" in capsys.readouterr().out


def test_newest_on_gpu(tmp_path):
    assert results.newest_on_gpu(tmp_path) is None
    for name, date, device in (("a", "2026-02-01", "cuda"), ("b", "2026-01-01", "cuda"), ("c", "2026-03-01", "cpu")):
        made = document(rows=1)
        made["env"] |= {"date": date, "device": device}
        (tmp_path / f"{name}.json").write_text(json.dumps(made))
    (tmp_path / "broken.json").write_text("{")
    assert results.newest_on_gpu(tmp_path)[0].name == "a.json"


def test_without_gpu_shows_committed_results_or_says_none_yet(tmp_path, capsys):
    from bench import without_gpu
    from bench.cli.common import console

    without_gpu.show_newest(console(), tmp_path)
    assert "none yet" in capsys.readouterr().out
    (tmp_path / "r.json").write_text(json.dumps(document(rows=3)))
    without_gpu.show_newest(console(), tmp_path)
    out = capsys.readouterr().out
    assert "Made-up GPU" in out
    assert "3 cases" in out
