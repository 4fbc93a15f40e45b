"""`fastops profile` as a user runs it: a process of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastops.__main__ import main

ROOT = Path(__file__).parent.parent

SCRIPT = """
import sys, torch
assert __name__ == "__main__"
print("arguments", sys.argv[1:])
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(int(sys.argv[1])):
    model(torch.randn(4, 8)).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def profile(*arguments, cwd):
    command = [sys.executable, "-m", "fastops", "profile", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=240)


def write(tmp_path, text):
    path = tmp_path / "train.py"
    path.write_text(text)
    return path


def test_a_script_runs_unchanged_with_its_own_arguments_and_exit_code(tmp_path):
    script = write(tmp_path, SCRIPT + "sys.exit(7)")
    result = profile(
        "--steps", 2, "--warmup", 1, "--json", tmp_path / "p.json", script, 6, "--steps", "x", cwd=tmp_path
    )
    assert result.returncode == 7, result.stderr
    assert "arguments ['6', '--steps', 'x']" in result.stdout
    assert "Sequential" in result.stdout
    assert json.loads((tmp_path / "p.json").read_text())["step"]["steps"] == 2


def test_a_script_that_raises_shows_its_traceback_and_the_report(tmp_path):
    script = write(tmp_path, SCRIPT + "raise ValueError('the user made a mistake')")
    result = profile("--steps", 2, "--warmup", 1, script, 5, cwd=tmp_path)
    assert result.returncode == 1
    assert "the user made a mistake" in result.stderr
    assert "train.py" in result.stderr
    assert "modules" in result.stdout


def test_too_few_steps_say_what_to_do(tmp_path):
    result = profile("--warmup", 5, write(tmp_path, SCRIPT), 2, cwd=tmp_path)
    assert result.returncode == 1
    assert "--warmup 0" in result.stderr


def test_a_model_by_name(tmp_path):
    arguments = ("--model", "torch.nn:Tanhshrink", "--input", "4x8", "--steps", 2, "--warmup", 1)
    result = profile(*arguments, "--html", tmp_path / "p.html", "--trace", tmp_path / "t.json.gz", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Tanhshrink" in result.stdout
    assert (tmp_path / "t.json.gz").stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "either a script or --model"),
        (("missing.py",), "no script 'missing.py'"),
        (("--model", "torch.nn:Nothing", "--input", "1x2"), "has no 'Nothing'"),
        (("--model", "no_such_module:f", "--input", "1x2"), "cannot import"),
        (("--model", "torch.nn", "--input", "1x2"), "pkg.module:factory"),
        (("--model", "torch.nn:ReLU"), "at least one --input"),
        (("--model", "torch.nn:ReLU", "--input", "1xtwo"), "must look like"),
        (("--model", "torch.nn:ReLU", "--input", "1x2:int5"), "dtype must be one of"),
        (("--model", "torch.nn:Linear", "--input", "1x2"), "raised TypeError"),
        (("--model", "torch:tensor", "--input", "1x2"), "raised TypeError"),
        (("--model", "torch.nn:ReLU", "--input", "2", "--steps", "0"), "--steps must be >= 1"),
        (("--model", "torch.nn:ReLU", "--input", "2", "--html", "no/such/folder/p.html"), "no folder"),
        (("--model", "torch.nn:ReLU", "--input", "2", "--backend", "proton"), "roton"),
    ],
)
def test_bad_requests_are_one_clear_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["profile", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_input_the_model_refuses(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text("import torch\ndef net(): return torch.nn.Linear(3, 4)\n")
    monkeypatch.chdir(tmp_path)
    assert main(["profile", "--model", "mine:net", "--input", "2x5"]) == 2
    assert "does not accept input 2x5" in capsys.readouterr().err


def test_apply_measures_before_and_after(tmp_path):
    script = write(tmp_path, SCRIPT)
    result = profile("--steps", 1, "--warmup", 1, "--apply", script, 60, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "applied and measured" in result.stdout


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
def test_the_page_works_in_a_browser(tmp_path):
    arguments = ("--model", "torch.nn:Softplus", "--input", "64x64", "--html", tmp_path / "p.html", "--steps", 2)
    assert profile(*arguments, cwd=tmp_path).returncode == 0
    page = tmp_path / "p.html"
    probe = "document.querySelector('th').click(); document.title = document.querySelectorAll('tr').length + ' rows'"
    page.write_text(page.read_text().replace("</body>", f"<script>{probe}</script></body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom"]
    result = subprocess.run([CHROMIUM, *flags, page.as_uri()], capture_output=True, text=True, timeout=120)
    rows = int(result.stdout.split("<title>")[1].split(" rows")[0])
    assert rows >= 4
