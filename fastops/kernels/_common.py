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
    """Hyperbolic tangent of an fp32 tensor; libdevice's is not there in the interpreter."""
    # of the negative magnitude, so that nothing overflows and small arguments lose the fewest bits
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0.0, -t, t)


def dot_precision(dtype: torch.dtype, tf32_allowed: bool) -> str:
    """`input_precision` of tl.dot: fp32 operands are rounded to TF32 only where torch allows it."""
    return "tf32" if dtype == torch.float32 and tf32_allowed else "ieee"
