"""What Proton would be told of our ops: it needs a GPU, so a recorder stands in for its scopes."""

from contextlib import contextmanager

import torch

import fastops
from fastops import _library
from fastops.profiling import proton


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
