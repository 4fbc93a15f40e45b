"""The one tolerance: derived from stock's own error and the arithmetic that torch allows, never tuned."""

import os
import re

import torch

TF32_EPS = 2.0**-10  # ten bits of mantissa, as many as fp16 has
# whose products a test is about, by its name; the first that matches
SWITCHES = (
    (r"cell|layer_?norm|attention", torch.backends.cuda.matmul),
    (r"conv", torch.backends.cudnn.conv),
    (r"rnn|lstm|gru", torch.backends.cudnn.rnn),
    (r"", torch.backends.cuda.matmul),
)


def rounding(x):
    """eps of the arithmetic that torch allows for the op of the running test: of TF32 for fp32 on a GPU where torch
    lets that op round to it, else of the dtype. The CPU has no TF32.

    Torch allows it, but need not do it: stock may take a kernel without TF32 for one shape, and then the error of stock
    says nothing of what ours, which does round, is entitled to.
    """
    if x.is_cuda and x.dtype == torch.float32:
        test = os.environ.get("PYTEST_CURRENT_TEST", "")
        switch = next(switch for words, switch in SWITCHES if re.search(words, test, re.IGNORECASE))
        if switch.fp32_precision == "tf32":
            return TF32_EPS
    return torch.finfo(x.dtype).eps


def assert_within_rule(ours, stock, truth, what="result"):
    """max|ours - truth| <= 2 max|stock - truth| + eps max|truth|, and the same NaN and Inf in the same places.

    `truth` is computed in float64 from the rounded inputs, `stock` by stock PyTorch in the dtype of `ours`; eps is that
    of this dtype, or of TF32 on a GPU where torch allows it for the op (`rounding`).
    """
    assert ours.shape == truth.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    assert ours.dtype == stock.dtype, f"{what}: dtype {ours.dtype}, expected {stock.dtype}"
    ours64, stock64, truth64 = (x.detach().double().to(ours.device) for x in (ours, stock, truth))
    assert torch.equal(ours64.isnan(), stock64.isnan()), f"{what}: NaN in other places than stock"
    infinite = stock64.isinf() | ours64.isinf()
    assert torch.equal(ours64[infinite], stock64[infinite]), f"{what}: Inf in other places than stock"
    finite = truth64.isfinite() & stock64.isfinite()
    if not finite.any():
        return
    scale = truth64[finite].abs().max()
    error = (ours64 - truth64)[finite].abs().max()
    allowed = 2 * (stock64 - truth64)[finite].abs().max() + rounding(ours) * scale
    assert error <= allowed, f"{what}: max error {error:.3e} > {allowed:.3e} allowed (largest value {scale:.3e})"
