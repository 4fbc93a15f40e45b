"""What Proton would be told of our ops: it needs a GPU, so a recorder stands in for its scopes."""

import argparse
import sys
from contextlib import contextmanager, nullcontext
from types import ModuleType

import pytest
import torch

import fastops
from fastops import _library
from fastops.profiling import proton
from fastops.profiling.script import BadRequest, scalar_of


def test_ops_run_in_scopes_that_carry_their_flops(monkeypatch, device):
    seen = []

    @contextmanager
    def scope(name, metrics):
        seen.append((name, metrics))
        yield

    monkeypatch.setattr(_library, "LAUNCHERS", dict(_library.LAUNCHERS))
    proton.scope_ops(scope)
    x, w = torch.randn(2, 4, 6, 6, device=device), torch.randn(8, 4, 3, 3, device=device)
    y = fastops.conv2d_relu(x, w, impl="triton")
    assert torch.allclose(y, torch.relu(torch.nn.functional.conv2d(x, w)), atol=1e-4)
    assert seen == [("fastops::conv2d_relu_forward", {"flops32": 2 * y.numel() * 4 * 9})]


OPTIONS = argparse.Namespace(script=None, arguments=[], model="torch.nn:Flatten", input=["2x3x4"], train=False, steps=2)
vars(OPTIONS).update(module=None, html=None, json=None, trace=None, apply=False)


def test_a_run_opens_and_closes_a_session(monkeypatch, capsys):
    said = []
    recorder = ModuleType("triton.profiler")
    recorder.scope = lambda name, metrics: nullcontext()
    recorder.start = lambda name, hook: said.append((name, hook)) or 7
    recorder.finalize = said.append
    pytest.importorskip("triton")
    import triton

    monkeypatch.setitem(sys.modules, "triton.profiler", recorder)
    monkeypatch.setattr(triton, "profiler", recorder, raising=False)
    before = dict(_library.LAUNCHERS)
    assert proton.run_proton(OPTIONS) == 0
    assert said == [("fastops", "triton"), 7]
    assert before == _library.LAUNCHERS
    assert "proton-viewer" in capsys.readouterr().err

    def no_gpu(name, hook):
        raise RuntimeError("no driver.")

    module = {**vars(OPTIONS), "model": None, "script": "this", "arguments": ["-c"], "module": ["this", "-c"]}
    assert proton.run_proton(argparse.Namespace(**module)) == 0  # python -m this
    assert "Beautiful is better than ugly" in capsys.readouterr().out
    for name in ("html", "json", "trace", "apply"):
        with pytest.raises(BadRequest, match=f"--{name} is of the torch backend"):
            proton.run_proton(argparse.Namespace(**{**vars(OPTIONS), name: "r.html"}))
    recorder.start = no_gpu
    with pytest.raises(BadRequest, match=r"Proton cannot start here: no driver; it needs an NVIDIA GPU"):
        proton.run_proton(OPTIONS)


def test_the_number_to_differentiate():
    ones = torch.ones(2)
    for output in (ones, (torch.ones(1, dtype=torch.int64), ones), {"a": None, "b": ones}, iter([ones])):
        assert scalar_of(output) == 1
    with pytest.raises(BadRequest, match="returned list without a floating tensor"):
        scalar_of([torch.ones(1, dtype=torch.int64), "text"])
