"""Helpers that several kernels share."""

import functools

import torch
import triton
import triton.language as tl


@functools.cache
def interpreted() -> bool:
    """Whether `triton.jit` made interpreted functions in this process (decided when triton was imported)."""
    from triton.runtime.jit import JITFunction

    return not isinstance(relu, JITFunction)


@triton.jit
def relu(x):
    """max(x, 0) that lets NaN through, as torch.relu does."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def tanh(x):
    """Hyperbolic tangent of an fp32 tensor to about one unit in the last place, also where Triton is interpreted.

    A polynomial (Cephes) below 0.625, where the formula with exp would cancel.
    """
    # of the negative magnitude, so that nothing overflows
    e = tl.exp(-2.0 * tl.abs(x))
    large = 1.0 - 2.0 * e / (1.0 + e)
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = (p * z - 5.37397155531e-2) * z + 1.33314422036e-1
    small = (p * z - 3.33332819422e-1) * z * x + x
    return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0.0, -large, large))


def dot_precision(dtype: torch.dtype, tf32_allowed: bool) -> str:
    """`input_precision` of tl.dot: fp32 operands are rounded to TF32 only where torch allows it."""
    return "tf32" if dtype == torch.float32 and tf32_allowed else "ieee"
