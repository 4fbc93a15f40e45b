"""`fastops profile` as a user runs it; once in a process of its own, else in this one, which is faster."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.modules import module

import fastops
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


def write(tmp_path, text):
    path = tmp_path / "train.py"
    path.write_text(text)
    return path


@pytest.fixture
def profile(capsys, monkeypatch, tmp_path):
    """Run `fastops profile` with these arguments; gives exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = main(["profile", *map(str, arguments)])
        captured = capsys.readouterr()
        assert not module._global_forward_hooks
        return code, captured.out, captured.err

    return run


def test_a_script_runs_unchanged_with_its_own_arguments_and_exit_code(tmp_path):
    script = write(tmp_path, SCRIPT + "sys.exit(7)")
    options = ["--steps", "2", "--warmup", "1", "--json", str(tmp_path / "p.json")]
    command = [sys.executable, "-m", "fastops", "profile", *options, str(script), "6", "--steps", "x"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=240)
    assert result.returncode == 7, result.stderr
    assert "arguments ['6', '--steps', 'x']" in result.stdout
    assert "Sequential" in result.stdout
    assert json.loads((tmp_path / "p.json").read_text())["step"]["steps"] == 2


def test_a_script_that_raises_shows_its_traceback_and_the_report(profile, tmp_path):
    script = write(tmp_path, SCRIPT + "raise ValueError('the user made a mistake')")
    code, out, err = profile("--steps", 2, "--warmup", 1, script, 5)
    assert code == 1
    assert "the user made a mistake" in err
    assert "train.py" in err
    assert "runpy" not in err  # the traceback begins with the script
    assert "modules" in out


def test_a_message_as_exit_code(profile, tmp_path):
    code, _, err = profile("--warmup", 1, write(tmp_path, SCRIPT + "sys.exit('no more data')"), 4)
    assert code == 1
    assert "no more data" in err


def test_an_interrupted_script_reports_what_ran(profile, tmp_path):
    # a process started in the background by a shell has the signal ignored: the script asks for it
    stop = "import os, signal, time; signal.signal(signal.SIGINT, signal.default_int_handler);"
    stop += "os.kill(os.getpid(), signal.SIGINT); time.sleep(5)"
    code, out, err = profile("--warmup", 1, write(tmp_path, SCRIPT + stop), 4)
    assert code == 130
    assert "interrupted" in err
    assert "modules" in out


def test_a_script_that_runs_a_profiler_of_its_own(profile, tmp_path):
    loop = """
def train():
    model(torch.randn(4, 8)).mean().backward()
    optimizer.step()
schedule = torch.profiler.schedule(wait=1, warmup=2, active=2, repeat=1)
with torch.profiler.profile(schedule=schedule) as its:
    for _ in range(8):
        train()
        its.step()
assert len(its.events()) > 20
for _ in range(8):
    train()
"""
    code, out, err = profile("--warmup", 3, "--steps", 2, write(tmp_path, SCRIPT + loop), 1)
    assert code == 0, err
    assert "Another torch profiler" in out
    assert "average of" in out


def test_a_module_with_relative_imports(profile, tmp_path):
    package = tmp_path / "pkg_of_a_test"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "net.py").write_text("import torch\nmodel = torch.nn.Linear(8, 1)\n")
    (package / "train.py").write_text(
        "import sys, torch\nfrom .net import model\nprint('got', sys.argv[1:], __name__)\n"
        "for _ in range(4): model(torch.randn(2, 8)).sum().backward()\n"
    )
    code, out, _ = profile("--warmup", 1, "-m", "pkg_of_a_test.train", "--epochs", 1, "--", "x")
    assert code == 0
    assert "got ['--epochs', '1', '--', 'x'] __main__" in out
    assert "Linear" in out


def test_too_few_steps_say_what_to_do(profile, tmp_path):
    code, _, err = profile("--warmup", 5, write(tmp_path, SCRIPT), 2)
    assert code == 1
    assert "--warmup 0" in err


def test_a_model_by_name(profile, tmp_path):
    arguments = ("--model", "torch.nn:Tanhshrink", "--input", "4x8", "--steps", 2, "--warmup", 1)
    code, out, err = profile(*arguments, "--html", tmp_path / "p.html", "--trace", tmp_path / "t.json.gz")
    assert code == 0, err
    assert "Tanhshrink" in out
    assert (tmp_path / "t.json.gz").stat().st_size > 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_costs_that_file_and_nothing_else(profile, tmp_path):
    arguments = ("--model", "torch.nn:ReLU", "--input", "4x8", "--steps", 1, "--warmup", 0)
    code, out, err = profile(*arguments, "--html", "/dev/full", "--json", tmp_path / "p.json")
    assert code == 1
    assert "--html" in err
    assert "No space left" in err
    assert "operators" in out
    assert json.loads((tmp_path / "p.json").read_text())["schema"] == 1


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
        (("--model", "torch.nn:ReLU", "--input", "2", "--html", "."), "is a folder"),
        (("--model", "torch.nn:ReLU", "--input", "2", "--json", "-"), "give it a name"),
        (("--model", "torch.nn:ReLU", "--input", "2", "--json", "a", "--html", "a"), "would write the same file"),
        (("--model", "torch.nn:ReLU", "--input", "2", "--top", "0"), "--top must be >= 1"),
        (("--model", "torch.nn:ReLU", "--input", "9999999x9999999999"), "--input 9999999x9999999999: "),
        (("-m",), "needs the name of a module"),
        (("-m", "no.such.module"), "no module 'no.such.module'"),
        (("--model", "torch.nn:ReLU", "--input", "2", "--backend", "proton"), "roton"),
    ],
)
def test_bad_requests_are_one_clear_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["profile", *arguments]) == 2
    assert message in capsys.readouterr().err


REFUSING = """
import torch
def net(): return torch.nn.Linear(3, 4)
class Asserting(torch.nn.Module):
    def forward(self, x): assert x.shape[1] == 3
class Silent(torch.nn.Linear):
    def __init__(self): super().__init__(5, 5)
    def forward(self, x): pass
"""


def test_an_input_the_model_refuses(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(REFUSING)
    monkeypatch.chdir(tmp_path)
    for name in ("net", "Asserting"):
        assert main(["profile", "--model", f"mine:{name}", "--input", "2x5"]) == 2
        assert "does not accept input 2x5" in capsys.readouterr().err
    assert main(["profile", "--model", "mine:Silent", "--input", "2x5", "--train"]) == 2
    assert "the model returned NoneType without a floating tensor" in capsys.readouterr().err


CONVOLUTIONS = """
import torch
model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(50):
    model(torch.randn(1, 3, 8, 8)).mean().backward()
    optimizer.step()
"""


def test_apply_measures_in_the_loop_of_the_script_and_restores_the_model(profile, tmp_path):
    code, out, err = profile("--steps", 1, "--warmup", 1, "--apply", write(tmp_path, CONVOLUTIONS))
    assert code == 0, err
    assert "applied and measured" in out
    found = re.search(r"measured, whole step: ([\d.]+)x", out)
    assert 0.3 < float(found[1]) < 3  # on a CPU accelerate chooses stock PyTorch


@pytest.mark.parametrize("accelerated_before", [None, "rnn"])
def test_apply_leaves_the_model_as_it_was(accelerated_before):
    from fastops.profiling import cli, profile

    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.LSTM(6, 5))
    if accelerated_before:
        fastops.accelerate(model, only=accelerated_before)
    before = [type(part) for part in model.modules()], list(model.state_dict())
    x, during = torch.randn(1, 3, 8, 8), set()

    def step():
        during.add(tuple(type(part) for part in model.modules()))
        model[1](model[0](x))

    profiler = profile(model)
    cli._apply(profiler, model, step)
    assert profiler.applied.rounds == 15
    assert len(during) == 2  # before, accelerated
    assert ([type(part) for part in model.modules()], list(model.state_dict())) == before


NET = """
import torch
class Net(torch.nn.Module):
    calls = 0
    def __init__(self):
        super().__init__()
        self.picture, self.rest = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()), torch.nn.LSTM(6, 5)
    def forward(self, x):
        self.calls += 1
        if self.calls == 9:
            raise KeyboardInterrupt
        return self.rest(self.picture(x)[0])
"""


def test_ctrl_c_while_before_and_after_are_measured_keeps_the_profile(profile, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "interrupted.py").write_text(NET)  # after one call to try and five in the profile
    arguments = ("--model", "interrupted:Net", "--input", "1x3x8x8", "--steps", 1, "--warmup", 1, "--apply")
    code, out, err = profile(*arguments, "--json", tmp_path / "p.json")
    assert code == 130
    assert "interrupted; the report has the profile, without --apply\n" in err
    assert "modules" in out
    assert "--apply: interrupted" in out
    assert json.loads((tmp_path / "p.json").read_text())["modules"]


def test_ctrl_c_in_a_script_while_before_and_after_are_measured(profile, tmp_path, monkeypatch):
    """The report stands, and of the model stays accelerated what the script had accelerated itself."""
    kept = []
    monkeypatch.setattr(torch, "kept", kept, raising=False)
    script = f"""{NET}
import fastops
model = fastops.accelerate(Net(), only="rnn")
torch.kept.append(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
while True:
    model(torch.randn(1, 3, 8, 8))[0].mean().backward()
    optimizer.step()
"""
    code, out, err = profile("--steps", 1, "--warmup", 1, "--apply", write(tmp_path, script))
    assert code == 130
    assert "interrupted; the report covers what ran\n" in err
    assert "before enough steps could be compared for --apply" in out
    assert type(kept[0].rest) is fastops.nn.LSTM
    assert type(kept[0].picture) is torch.nn.Sequential


def test_apply_says_where_there_is_nothing_to_apply(profile, tmp_path):
    code, out, _ = profile("--steps", 1, "--warmup", 1, "--apply", write(tmp_path, SCRIPT), 9)
    assert code == 0
    assert "nothing here that fastops.accelerate would change" in out


def test_what_was_profiled_outlives_an_accelerated_step_that_fails(monkeypatch):
    from fastops.profiling import cli, profile

    def fails():
        raise fastops.KernelUnavailable("not here")

    monkeypatch.setattr("fastops.profiling.script.would_change", lambda roots: True)
    profiler = profile(torch.nn.ReLU())
    cli._apply(profiler, torch.nn.ReLU(), fails)
    assert profiler.recorder.notes == ["--apply: the accelerated step failed: KernelUnavailable: not here"]


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
def test_the_page_works_in_a_browser(profile, tmp_path):
    arguments = ("--model", "torch.nn:Softplus", "--input", "64x64", "--html", tmp_path / "p.html", "--steps", 2)
    assert profile(*arguments)[0] == 0
    page = tmp_path / "p.html"
    probe = "document.querySelector('th').click(); document.title = document.querySelectorAll('tr').length + ' rows'"
    page.write_text(page.read_text().replace("</body>", f"<script>{probe}</script></body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom"]
    result = subprocess.run([CHROMIUM, *flags, page.as_uri()], capture_output=True, text=True, timeout=120)
    rows = int(result.stdout.split("<title>")[1].split(" rows")[0])
    assert rows >= 4
