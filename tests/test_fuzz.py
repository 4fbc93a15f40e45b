"""A few random calls of every public op and module, always the same ones; `make fuzz` runs as many as you like."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("hypothesis")

from tests.conftest import KERNELS
from tests.fuzz import everything  # noqa: F401
from tests.fuzz.deep import main
from tests.fuzz.engine import PROPERTIES, compare, run

EXAMPLES = 30
KERNEL_EXAMPLES = 5  # in the interpreter


@pytest.mark.parametrize("name", PROPERTIES)
def test_random_calls_agree_with_stock(name):
    slow_oracle = name == "layer_norm_lstm"
    kernels = slow_oracle or name.endswith("kernels") or name in ("sequential", "conv2d_modules")
    ends = run(name, KERNEL_EXAMPLES if kernels else EXAMPLES, seed=0)
    if name.endswith("kernels") and not KERNELS:
        assert not ends.get("same"), f"without kernels an engine chosen by name must be refused: {ends}"
        return
    assert ends.get("same"), f"no case of {name} computed anything: {ends}"


@pytest.mark.parametrize(("option", "wrong"), [("--examples", "0"), ("--examples", "many"), ("--jobs", "-1")])
def test_numbers_of_the_command_are_positive(option, wrong, capsys):
    with pytest.raises(SystemExit) as stop:
        main([option, wrong])
    assert stop.value.code == 2
    assert f"argument {option}: expected a whole number" in capsys.readouterr().err


def test_a_damaged_record_is_named_and_left_alone(tmp_path, capsys):
    state = tmp_path / "state.json"
    state.write_text('{"a')
    assert main(["conv2d", "--state", str(state)]) == 2
    assert f"{state} is no record of an earlier run" in capsys.readouterr().err
    assert state.read_text() == '{"a'


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are looked up in Linux's /proc")
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda s: s.name)
def test_a_run_that_is_stopped_leaves_no_process_behind(stop, tmp_path):
    command = ["-m", "tests.fuzz", "conv2d", "--examples", "100000", "--jobs", "2", "--state", str(tmp_path / "s.json")]

    def hear_ctrl_c():  # which a shell's background jobs, of which this test may be one, do not
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    run = subprocess.Popen(
        [sys.executable, *command],
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        preexec_fn=hear_ctrl_c,
    )
    run.stdout.readline()  # of the first chunk
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    assert len(children) >= 2
    run.send_signal(stop)
    run.wait(30)
    if stop == signal.SIGINT:
        assert run.returncode == 130
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    record = json.loads((tmp_path / "s.json").read_text())
    assert record["conv2d"]


def test_a_result_that_vanishes_may_be_off_by_a_rounding_of_its_terms():
    """And by no more: what float64 leaves of terms that cancel is no scale for the error."""
    kept, of_double = torch.tensor([1.0]), torch.tensor([1e-16], dtype=torch.float64)
    terms = 10.0
    size = torch.finfo(torch.float32).eps * terms

    def compared(error, terms):
        compare([kept, torch.tensor([error])], [kept, torch.tensor([0.0])], [kept.double(), of_double], terms=terms)

    compared(0.9 * size, terms)
    for error, of in ((1.1 * size, terms), (0.9 * size, 0.0)):
        with pytest.raises(AssertionError, match="allowed"):
            compared(error, of)
