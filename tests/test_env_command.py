"""`fastops env`: what it says of this machine; and what commands do whose output is cut off."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastops import _env, _env_cli

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("gpu", [None, (9, 0), (7, 5)], ids=str)
def test_env_says_what_auto_takes_on_this_machine(gpu, monkeypatch):
    """On a CPU, or on a GPU that is too old, that is stock PyTorch; what an H100 would run is said to be that."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(_env, "TRITON_INSTALLED", True)
    monkeypatch.setattr(_env, "capability", lambda index: gpu)
    monkeypatch.setattr(_env, "device_name", lambda index: "a GPU")
    choices = _env_cli.engine_choices()
    if gpu == (9, 0):
        assert {"torch", "triton", "persistent", "hybrid", "small"} <= {choice["engine"] for choice in choices}
        return
    assert {choice["engine"] for choice in choices} == {"torch"}
    reason = "no GPU here" if gpu is None else "the GPU is sm_75"
    assert all(choice["why"].startswith(reason) and "; on an H100: " in choice["why"] for choice in choices)


@pytest.mark.parametrize(
    "command", [["fastops", "inspect", "--explain"], ["fastops", "env"], ["bench", "list"]], ids=" ".join
)
def test_a_reader_that_has_seen_enough_is_no_error(command):
    writer = subprocess.Popen(
        [sys.executable, "-m", *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    writer.stdout.close()
    assert writer.stderr.read() == b""
    assert writer.wait() == 0
