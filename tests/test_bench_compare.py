"""`compare`: planted regressions, other machines, invalid results, broken files: each has its exit code."""

import copy
import json

import pytest

from bench.__main__ import main
from bench.compare import parse_rule


def provider(ratio, width=0.01, role="ours", **further):
    versus = {"ratio": ratio, "lo": ratio - width, "hi": ratio + width, "best": "eager"}
    return {"role": role, "median_s": 1e-3 / ratio, "samples_s": [1e-3 / ratio], "vs_best": versus, **further}


def row(case="op/shape/fp16/infer", ratio=1.2, width=0.01, verdict="FASTER"):
    op, name, dtype, mode = case.split("/")
    providers = {"eager": {"role": "stock", "median_s": 1e-3, "samples_s": [1e-3]}, "fastops": provider(ratio, width)}
    return {
        "case": case,
        "op": op,
        "name": name,
        "dtype": dtype,
        "mode": mode,
        "gate": "pass",
        "providers": providers,
        "vs_best": {**providers["fastops"]["vs_best"], "arm": "fastops"},
        "verdict": verdict,
    }


def document(*rows, **env):
    machine = {"machine": "NVIDIA H100 80GB HBM3", "device": "cuda", "torch": "2.11.0", "triton": "3.6.0"}
    return {"schema": 1, "env": machine | env, "rows": list(rows)}


@pytest.fixture
def save(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


def compare(*arguments):
    return main(["compare", *arguments])


@pytest.mark.parametrize(
    ("before", "after", "code"),
    [
        (1.20, 1.20, 0),
        (1.20, 1.17, 0),  # 2.5 % is tolerated
        (1.20, 1.08, 1),  # 10 % is not
        (1.20, 1.40, 0),
        (0.95, 0.95, 0),  # slower than stock before and after is no change
    ],
)
def test_two_files(save, capsys, before, after, code):
    a, b = save("a.json", document(row(ratio=before))), save("b.json", document(row(ratio=after)))
    assert compare(a, b) == code
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("REGRESSION: 1 regressed: op/shape/fp16/infer (fastops)" if code else "ok")


def test_a_wide_interval_is_unclear_not_a_regression(save, capsys):
    a, b = save("a.json", document(row(ratio=1.2, width=0.2))), save("b.json", document(row(ratio=1.08, width=0.2)))
    assert compare(a, b) == 0
    assert "1 unclear" in capsys.readouterr().out


def test_the_rule_sets_what_is_tolerated(save):
    a, b = save("a.json", document(row(ratio=1.20))), save("b.json", document(row(ratio=1.08)))
    assert compare(a, b, "--fail", "slower:15%") == 0
    assert compare(a, b, "--fail", "slower:2.5%") == 1


def test_one_file_is_held_against_stock(save, capsys):
    good, bad = row("op/good/fp16/infer", 1.3), row("op/bad/fp16/infer", 0.8, verdict="SLOWER")
    assert compare(save("a.json", document(good))) == 0
    assert compare(save("b.json", document(good, bad))) == 1
    assert "op/bad/fp16/infer" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("verdict", ["WRONG", "IMPOSSIBLE"])
def test_invalid_beats_everything(save, verdict):
    broken = row("op/broken/fp16/infer", verdict=verdict)
    broken["vs_best"] = None
    broken["providers"]["fastops"]["verdict"] = verdict
    a = save("a.json", document(row(), row("op/broken/fp16/infer")))
    b = save("b.json", document(row(ratio=0.5), broken, machine="another"))
    assert compare(a, b) == 3
    assert compare(b) == 3


@pytest.mark.parametrize("key", ["machine", "torch", "triton", "driver", "cudnn"])
def test_other_machine_or_versions(save, capsys, key):
    a, b = save("a.json", document(row())), save("b.json", document(row(ratio=0.5), **{key: "another"}))
    assert compare(a, b) == 2
    assert f"differs: {key}" in capsys.readouterr().out
    assert compare(a, b, "--any-machine") == 1


def test_nothing_in_common(save, capsys):
    a, b = save("a.json", document(row("op/x/fp16/infer"))), save("b.json", document(row("op/y/fp16/infer")))
    assert compare(a, b) == 2
    assert "no case in common" in capsys.readouterr().out


def test_an_arm_that_vanished_is_a_regression(save, capsys):
    after = copy.deepcopy(row())
    after["providers"]["fastops"] = {"role": "ours", "error": "OutOfMemoryError"}
    after["vs_best"], after["verdict"] = None, "ERROR"
    assert compare(save("a.json", document(row())), save("b.json", document(after))) == 1
    assert "gone" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{ not json", "not JSON"),
        ("[1, 2]", "not a result file"),
        ('{"benchmarks": []}', "not a result file"),
        ('{"schema": 99, "rows": []}', "schema 99"),
        ('{"schema": 1, "rows": []}', "environment is missing"),
        ('{"schema": 1, "env": {}, "rows": [{"case": "x"}]}', "row 0 lacks"),
        ('{"schema": 1, "env": {}, "rows": ["x"]}', "row 0 lacks"),
        ('{"schema": 1, "env": {}, "rows": [], "running": 5}', "running is 5"),
        ("", "not JSON"),
    ],
)
def test_foreign_and_broken_files(save, capsys, content, words):
    good = save("good.json", document(row()))
    for arguments in ((save("bad.json", content),), (good, save("bad.json", content))):
        assert compare(*arguments) == 2
        error = capsys.readouterr().err
        assert words in error
        assert "bad.json" in error
        assert error.count("\n") == 1


def damaged(**changes):
    return {**row(), **changes}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([damaged(vs_best="x")], "row 0: vs_best is 'x'"),
        ([damaged(vs_best={"ratio": 1.2})], "row 0: vs_best is {'ratio': 1.2}"),
        ([damaged(vs_best={**row()["vs_best"], "lo": 0})], "not a ratio with its interval"),
        ([damaged(vs_best={**row()["vs_best"], "arm": "none"})], "names 'none' as its arm"),
        ([row("op/y/fp16/infer"), damaged(vs_best=None, verdict="SAME")], "row 1: vs_best is missing"),
        ([damaged(verdict=["SAME"])], "row 0: verdict is ['SAME']"),
        ([damaged(case=["op"])], "row 0: case is ['op']"),
        ([damaged(providers=[1, 2])], "row 0: providers is [1, 2]"),
        ([damaged(providers={"fastops": 1})], "row 0: arm 'fastops': 1 has no role"),
        ([damaged(providers={"fastops": provider(1.2) | {"median_s": "1"}})], "median_s is '1'"),
        ([damaged(providers={"fastops": provider(1.2) | {"vs_best": 1.2}})], "arm 'fastops': vs_best is 1.2"),
        ([damaged(noise=0.01)], "noise is 0.01"),
        ([row(), row()], "more than one row of op/shape/fp16/infer"),
    ],
)
def test_damaged_rows(save, capsys, tmp_path, rows, words):
    good, bad = save("good.json", document(row())), save("bad.json", document(*rows))
    for arguments in (["compare", bad], ["compare", good, bad], ["compare", bad, good], ["report", bad]):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert words in error
        assert "bad.json" in error
        assert error.count("\n") == 1
    assert not (tmp_path / "bad.html").exists()


def test_a_missing_file_and_a_binary_one(capsys, tmp_path):
    assert compare(str(tmp_path / "none.json")) == 2
    assert "No such file" in capsys.readouterr().err
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    assert compare(str(tmp_path / "binary.json")) == 2
    assert "not JSON" in capsys.readouterr().err
    assert compare(str(tmp_path)) == 2


@pytest.mark.parametrize("rule", ["5%", "slower:5", "slower:-5%", "slower:100%", "faster:5%", ""])
def test_a_bad_rule(save, capsys, rule):
    assert compare(save("a.json", document(row())), "--fail", rule) == 2
    assert "expected slower:" in capsys.readouterr().err


def test_rule():
    assert parse_rule("slower:5%") == 0.05
    assert parse_rule(" slower:2.5% ") == 0.025


def test_one_file_with_an_error_in_place_of_a_time_fails(save, capsys):
    broken = row("op/other/fp16/infer")
    broken["vs_best"], broken["verdict"], broken["error"] = None, "ERROR", "RuntimeError: no"
    assert compare(save("r.json", document(row(), broken))) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "REGRESSION: 1 improved, 1 broken: op/other/fp16/infer (?)"
