"""The one tolerance: derived from stock's own error, never tuned."""

import torch


def assert_within_rule(ours, stock, truth, what="result"):
    """max|ours - truth| <= 2 max|stock - truth| + eps max|truth|, and the same NaN and Inf in the same places.

    `truth` is computed in float64 from the rounded inputs, `stock` by stock PyTorch in the dtype of `ours`.
    """
    assert ours.shape == truth.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    assert ours.dtype == stock.dtype, f"{what}: dtype {ours.dtype}, expected {stock.dtype}"
    ours64, stock64, truth64 = (
        ours.detach().double().cpu(),
        stock.detach().double().cpu(),
        truth.detach().double().cpu(),
    )
    assert torch.equal(ours64.isnan(), stock64.isnan()), f"{what}: NaN in other places than stock"
    infinite = stock64.isinf() | ours64.isinf()
    assert torch.equal(ours64[infinite], stock64[infinite]), f"{what}: Inf in other places than stock"
    finite = truth64.isfinite() & stock64.isfinite()
    if not finite.any():
        return
    scale = truth64[finite].abs().max()
    error = (ours64 - truth64)[finite].abs().max()
    allowed = 2 * (stock64 - truth64)[finite].abs().max() + torch.finfo(ours.dtype).eps * scale
    assert error <= allowed, f"{what}: max error {error:.3e} > {allowed:.3e} allowed (largest value {scale:.3e})"
