"""Fake CUDA tensors: which engine runs, and why not, is read from metadata alone. The fixture `gpu` is the machine."""

import re

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

CUDA = torch.device("cuda", 0)


def fake(*sizes, dtype=torch.float16, device=CUDA):
    with FakeTensorMode(allow_non_fake_inputs=True):
        return torch.empty(sizes, dtype=dtype, device=device)


def assert_reason(found, pattern):
    if pattern is None:
        assert found is None
    else:
        assert re.search(pattern, found), found
