"""Operands of TF32 products: rounded to nearest as cuBLAS and cuDNN do, where a tensor core would cut them off."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from fastops.inspection import compile_cases
from fastops.kernels import _common
from fastops.kernels._common import nearest_tf32, weight_operand
from fastops.kernels.conv2d_static import static_cases


def cut_off(x):
    """What a tensor core makes of an fp32 operand."""
    return (x.view(torch.int32) & -0x2000).view(torch.float32)


def test_rounds_to_the_nearest_number_of_11_bits_and_ties_away_from_zero():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10000, generator=generator) * torch.logspace(-30, 30, 10000)
    x = torch.cat([x, torch.tensor([1.0 + 2**-11, -1.0 - 2**-11, 1.0 + 2**-11 - 2**-20, 0.0, -0.0, 3e-39, -3e-39])])
    mantissa, exponent = np.frexp(x.double().numpy())
    wanted = np.ldexp(np.copysign(np.floor(np.abs(mantissa) * 2.0**11 + 0.5), mantissa), exponent - 11)
    normal = np.abs(x.numpy()) >= 2.0**-126
    assert (nearest_tf32(x).double().numpy()[normal] == wanted[normal]).all()
    step = 2.0**-136  # subnormal numbers lie evenly
    small = np.trunc(x.double().numpy() / step + np.copysign(0.5, x.numpy())) * step
    assert (nearest_tf32(x).double().numpy()[~normal] == small[~normal]).all()
    assert torch.equal(torch.signbit(nearest_tf32(x)), torch.signbit(x))
    assert torch.equal(cut_off(nearest_tf32(x)), nearest_tf32(x))


def test_nan_stays_nan_and_infinity_stays_infinity():
    bits = [0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF, -0x800000, -0x7FFFFF, -0x400000, -1]
    x = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    rounded = nearest_tf32(x)
    assert torch.equal(rounded.isnan(), x.isnan())
    assert rounded[0] == float("inf")
    assert rounded[4] == -float("inf")
    assert nearest_tf32(torch.tensor([torch.finfo(torch.float32).max])).isinf()  # as the instruction does


@pytest.mark.parametrize("shape", [(64, 64), (512, 64), (2048, 32)])
def test_one_rounded_operand_keeps_the_error_within_twice_that_of_two(shape):
    """Products of either sign with both operands rounded (stock), one and none, against float64: rms and largest."""
    inner, side = shape
    generator = torch.Generator().manual_seed(1)
    ratios, largest = ({"one": [], "none": []} for _ in range(2))
    for _ in range(16):
        x = torch.randn(side, inner, generator=generator)
        w = torch.randn(inner, side, generator=generator) / inner**0.5
        exact = x.double() @ w.double()

        def error(a, b, exact=exact):
            return a.double() @ b.double() - exact

        stock = error(nearest_tf32(x), nearest_tf32(w))
        for name, ours in (("one", error(cut_off(x), nearest_tf32(w))), ("none", error(cut_off(x), cut_off(w)))):
            ratios[name].append(float(ours.square().mean().sqrt() / stock.square().mean().sqrt()))
            largest[name].append(float(ours.abs().max() / stock.abs().max()))
    assert 1.4 < np.mean(ratios["one"]) < 1.7
    assert max(largest["one"]) < 2.0
    assert np.mean(ratios["none"]) > 2.0
    assert np.mean(largest["none"]) > 2.0


def test_a_weight_is_rounded_where_it_goes_to_tensor_cores(monkeypatch):
    weight = torch.randn(8, 8)
    monkeypatch.setattr(_common, "interpreted", lambda: False)
    assert torch.equal(weight_operand(weight, "tf32"), nearest_tf32(weight))
    assert weight_operand(weight, "ieee") is weight
    monkeypatch.setattr(_common, "interpreted", lambda: True)  # the interpreter multiplies whole numbers
    assert weight_operand(weight, "tf32") is weight


def test_the_weight_gradient_rounds_what_passes_through_registers():
    (case,) = [case for case in static_cases() if case.name.startswith("conv2d.weight_grad") and "tf32" in case.name]
    (report,) = compile_cases([case], [90], jobs=1)
    assert "cvt.rna.tf32.f32" in report.ptx
    assert report.tensor_core == "HGMMA"
    assert report.spill_bytes == report.stack_bytes == 0
