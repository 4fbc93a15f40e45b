"""`fastops env`: what it says of this machine."""

import pytest
import torch

from fastops import _env, _env_cli


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
