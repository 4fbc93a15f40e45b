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


COMPILED = tl.constexpr(not interpreted())


@triton.jit
def rounded(x, PRECISION: tl.constexpr):
    """An operand of tl.dot, rounded to nearest where that is TF32, as cuBLAS and cuDNN do.

    Tensor cores ignore the last 13 bits of an fp32 number, which would cut it off: an error twice as large, and always
    towards zero. The interpreter multiplies whole fp32 numbers.
    """
    if PRECISION == "tf32" and COMPILED:
        x = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    return x


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


def nearest_tf32(x: torch.Tensor) -> torch.Tensor:
    """What `rounded` makes of an fp32 tensor, for an operand that a kernel does not pass through registers."""
    bits = (x.view(torch.int32) + 0x1000).bitwise_and_(-0x2000)
    return torch.where(x.isnan(), x, bits.view(torch.float32))


def weight_operand(weight: torch.Tensor, precision: str) -> torch.Tensor:
    """A dense weight as tensor cores should multiply it, rounded once a launch where that is in TF32.

    The other operand goes to them as it is: rounding it at every step or tap takes registers that there are not. With
    one operand rounded the error is 1.6 times that with both where products have either sign, with none 2.6 times.
    Where all have one sign, what is cut off adds up, and the error can be larger than twice stock's.
    """
    return nearest_tf32(weight) if precision == "tf32" and not interpreted() else weight


def dot_precision(dtype: torch.dtype, tf32_allowed: bool) -> str:
    """`input_precision` of tl.dot: fp32 operands are rounded to TF32 only where torch allows it."""
    return "tf32" if dtype == torch.float32 and tf32_allowed else "ieee"
