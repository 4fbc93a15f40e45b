"""`fastops env`: what it says of this machine; and what commands do whose output is cut off."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastops import _env, _env_cli
from fastops.__main__ import until_cut_off

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
    monkeypatch.setattr(_env, "multiprocessors", lambda index: 132)
    choices = _env_cli.engine_choices()
    if gpu == (9, 0):
        assert {"torch", "triton", "persistent", "hybrid", "small"} <= {choice["engine"] for choice in choices}
        return
    assert {choice["engine"] for choice in choices} == {"torch"}
    reason = "no GPU here" if gpu is None else "the GPU is sm_75"
    assert all(choice["why"].startswith(reason) and "; on an H100: " in choice["why"] for choice in choices)


def test_env_knows_a_gpu_with_too_little_room(monkeypatch):
    """The table names an engine, and the launcher then has no plan: stock PyTorch runs, and the reason is told."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(_env, "TRITON_INSTALLED", True)
    monkeypatch.setattr(_env, "capability", lambda index: (8, 6))
    monkeypatch.setattr(_env, "device_name", lambda index: "a GPU")
    monkeypatch.setattr(_env, "multiprocessors", lambda index: 28)
    (found,) = (one for one in _env_cli.engine_choices() if one["example"] == "LSTM bf16 H=512 B=64")
    assert found["engine"] == "torch"
    assert "28 multiprocessors (persistent: " in found["why"]


@pytest.mark.parametrize("gpu", [None, (9, 0)], ids=str)
def test_env_says_what_fastops_impl_makes_of_it(gpu, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(_env, "TRITON_INSTALLED", True)
    monkeypatch.setattr(_env, "capability", lambda index: gpu)
    monkeypatch.setattr(_env, "device_name", lambda index: "a GPU")
    monkeypatch.setattr(_env, "multiprocessors", lambda index: 132)
    for forced, whose in (("hybrid", "conv2d"), ("step", ("recurrent", "layer_norm")), ("torch", "")):
        untouched = {choice["example"]: choice for choice in _env_cli.engine_choices()}
        monkeypatch.setenv("FASTOPS_IMPL", forced)
        for choice in _env_cli.engine_choices():
            if choice["op"].startswith(whose):
                assert choice["engine"] == forced
                assert choice["why"].startswith("FASTOPS_IMPL")
                assert ("raises KernelUnavailable: the tensors are on the CPU" in choice["why"]) == (
                    gpu is None and forced != "torch"
                )
            else:
                assert choice == untouched[choice["example"]]
        monkeypatch.delenv("FASTOPS_IMPL")
    monkeypatch.setenv("FASTOPS_IMPL", "tritn")
    assert {choice["engine"] for choice in _env_cli.engine_choices()} == {"none"}
    assert all("FASTOPS_IMPL must be one of" in choice["why"] for choice in _env_cli.engine_choices())


def test_a_terminal_of_few_letters(monkeypatch):
    paper = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(paper, encoding="ascii"))
    assert until_cut_off(lambda: print("└ ü.html") or 3) == 3
    assert paper.getvalue() == b"? ?.html\n"


def test_a_full_disk_is_one_line(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert until_cut_off(lambda: print("report") or 0) == 1
    assert capsys.readouterr().err == "the output could not be written: No space left on device\n"
    monkeypatch.undo()
    with pytest.raises(OSError, match="elsewhere"):
        until_cut_off(lambda: len(os.listdir("/elsewhere")))


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
