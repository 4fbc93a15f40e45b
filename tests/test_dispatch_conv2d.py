"""Why a convolution has no kernel; no kernel."""

import re

import pytest
import torch

from fastops.ops import conv2d_relu
from fastops.ops.conv2d_arguments import Pool, Window
from tests.pretended_gpu import fake


def conv_reason(x=(2, 64, 8, 8), w=(64, 64, 3, 3), impl="triton", groups=1, pool=None, dtype=torch.float16, **window):
    window = Window(**{"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "extra": (0, 0)} | window)
    tensors = [fake(*sizes, dtype=dtype) for sizes in (x, w, w[:1])]
    return conv2d_relu.why_not(*tensors, window, groups, pool, impl=impl)


@pytest.mark.parametrize("impl", ["triton", "hybrid"])
def test_why_no_convolution_kernel(gpu, impl, monkeypatch):
    assert conv_reason(impl=impl) is None
    assert conv_reason(impl=impl, dtype=torch.bfloat16) is None
    assert "float64" in conv_reason(impl=impl, dtype=torch.float64)
    pool = Pool((15, 17), (2, 2), (0, 0))
    assert conv_reason((2, 64, 40, 40), impl=impl, pool=pool) is None
    assert conv_reason((2, 64, 40, 40), impl=impl, pool=pool._replace(size=(17, 15))) is None
    for size in ((16, 16), (15, 18), (18, 15)):
        assert "255" in conv_reason((2, 64, 40, 40), impl=impl, pool=pool._replace(size=size))
    limit = conv2d_relu.MAX_STEP
    assert conv_reason(impl=impl, stride=(limit, 1)) is None
    for window in ({"stride": (1, limit + 1)}, {"padding": (limit + 1, 1)}):
        assert re.search("larger than|pixels", conv_reason(impl=impl, **window))
    assert "larger than" in conv_reason(impl=impl, pool=pool._replace(size=(2, 2), stride=(1, limit + 1)))
    batch = conv2d_relu.MAX_PIXELS // 64
    assert conv_reason((batch, 64, 8, 8), impl=impl) is None
    assert "pixels" in conv_reason((batch + 1, 64, 8, 8), impl=impl)
    assert "pixels" in conv_reason((batch + 1, 64, 8, 8), impl=impl, padding=(0, 0))  # the input counts too
    assert "pixels" in conv_reason((batch, 64, 8, 8), impl=impl, padding=(2, 2))  # and the output
    for sizes, grown in (((4, 16), (2, 1)), ((16, 4), (1, 2))):
        assert conv_reason((batch, 64, *sizes), impl=impl) is None
        assert "pixels" in conv_reason((batch + 1, 64, *sizes), impl=impl, padding=(0, 0))
        assert "pixels" in conv_reason((batch, 64, *sizes), impl=impl, padding=grown)
    dilated = {"x": (1, 64, 1, 8), "w": (64, 64, 1, 3)}
    assert "larger than" in conv_reason(**dilated, impl=impl, dilation=(limit + 1, 1))
    assert conv_reason(**dilated, impl=impl, dilation=(limit, 1)) is None
    with torch.autograd.forward_ad.dual_level():
        assert "forward-mode" in conv_reason(impl=impl)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "bfloat16" in conv_reason(impl=impl, dtype=torch.bfloat16)
    assert conv_reason(impl=impl) is None


def test_limits_of_the_triton_convolution_alone(gpu):
    wide, high = {"w": (64, 64, 1, 32)}, {"w": (64, 64, 32, 1)}
    for changes, words in (({"groups": 2, "w": (64, 32, 3, 3)}, "groups=1"), (wide, "31 rows"), (high, "31 rows")):
        padded = {"x": (2, 64, 40, 40), "padding": (0, 0)}
        assert words in conv_reason(**padded, **changes)
        assert conv_reason(**padded, **changes, impl="hybrid") is None
    assert conv_reason((2, 64, 40, 40), (64, 64, 31, 31)) is None


def test_sparse_and_quantised_tensors_have_no_kernel(gpu):
    x, w, b = fake(2, 64, 8, 8), fake(64, 64, 3, 3), fake(64)
    window = Window((1, 1), (1, 1), (1, 1), (0, 0))
    sparse = torch.zeros(64).to_sparse()
    assert "bias is not a dense tensor" in conv2d_relu.why_not(x, w, sparse, window)
    assert conv2d_relu.why_not(x, w, None, window) is None
    assert conv2d_relu.why_not(x, w, b, window) is None
    assert "CPU" in conv2d_relu.why_not(*(fake(*t.shape, device="cpu") for t in (x, w, b)), window)
