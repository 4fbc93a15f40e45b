"""Arithmetic of one step of the layer-norm LSTM on a tile of whole rows, forward and backward, in fp32.

a = LN(h W_hh^T) gain,  i, f, g, o = x + a
candidate = sigmoid(f) c + sigmoid(i) tanh(g)
h' = sigmoid(o) tanh(LN(candidate) gain_c + bias_c),  c' = candidate
zoneout keeps a part of the old h and c; a row that has ended keeps all of them
"""

import triton
import triton.language as tl

from fastops.kernels._common import tanh


@triton.jit
def clamp_lengths_kernel(lengths_ptr, found_ptr, error_ptr, steps, batch, BLOCK: tl.constexpr):
    """Lengths within 0..steps; 1 + a row whose length was not goes to the second error word."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    given = tl.load(lengths_ptr + rows, mask=rows < batch, other=0)
    found = tl.minimum(tl.maximum(given, 0), steps).to(tl.int32)
    tl.store(found_ptr + rows, found, mask=rows < batch)
    wrong = tl.max(tl.where(given == found, 0, rows + 1), axis=0)
    if wrong > 0:
        tl.store(error_ptr + 1, wrong)


@triton.jit
def place(step, rows, batch, steps, lengths_ptr, RAGGED: tl.constexpr, REVERSE: tl.constexpr):
    """Time index of this step in each row, and whether the row has it. Rows that have ended point at their padding."""
    running = rows < batch
    length = tl.zeros_like(rows) + steps
    if RAGGED:
        length = tl.load(lengths_ptr + rows, mask=running, other=0)
    running = running & (step < length)
    time = tl.zeros_like(rows) + step
    if REVERSE:
        time = tl.where(running, length - 1 - step, step)
    return time.to(tl.int64), running


@triton.jit
def load_gates(pointer, at, hidden, mask):
    """Four tiles of one row of 4 H numbers, fp32."""
    i = tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)
    f = tl.load(pointer + at + hidden, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(pointer + at + 2 * hidden, mask=mask, other=0.0).to(tl.float32)
    o = tl.load(pointer + at + 3 * hidden, mask=mask, other=0.0).to(tl.float32)
    return i, f, g, o


@triton.jit
def store_gates(pointer, at, hidden, i, f, g, o, mask):
    element = pointer.dtype.element_ty
    tl.store(pointer + at, i.to(element), mask=mask)
    tl.store(pointer + at + hidden, f.to(element), mask=mask)
    tl.store(pointer + at + 2 * hidden, g.to(element), mask=mask)
    tl.store(pointer + at + 3 * hidden, o.to(element), mask=mask)


@triton.jit
def normalise_gates(i, f, g, o, hidden, eps, columns):
    """Each row of the four tiles as one vector of 4 H: minus its mean, over its deviation; and 1 / deviation."""
    mean = tl.sum(i + f + g + o, axis=1)[:, None] / (4 * hidden)
    i = tl.where(columns, i - mean, 0.0)
    f = tl.where(columns, f - mean, 0.0)
    g = tl.where(columns, g - mean, 0.0)
    o = tl.where(columns, o - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(i * i + f * f + g * g + o * o, axis=1)[:, None] / (4 * hidden) + eps)
    return i * scale, f * scale, g * scale, o * scale, scale


@triton.jit
def normalise(x, hidden, eps, columns):
    mean = tl.sum(tl.where(columns, x, 0.0), axis=1)[:, None] / hidden
    x = tl.where(columns, x - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=1)[:, None] / hidden + eps)
    return x * scale, scale


@triton.jit
def keep_factor(mask_ptr, keep, at, mask, HAS_MASK: tl.constexpr):
    """How much of a state is new: 1 or 0 from a mask, else `keep` everywhere."""
    if HAS_MASK:
        return tl.load(mask_ptr + at, mask=mask, other=0).to(tl.float32)
    else:
        return tl.zeros_like(at).to(tl.float32) + keep


@triton.jit
def blend(new, old, keep):
    """`keep` of the new and the rest of the old; exactly the old where keep is 0, whatever the new is."""
    return tl.where(keep > 0.0, keep * new + (1.0 - keep) * old, old)


@triton.jit
def row_forward(
    xi, xf, xg, xo, ai, af, ag, ao,  # the input product, normalised, and the recurrent product, raw
    gain_i, gain_f, gain_g, gain_o, gain_c, bias_c,
    h, c, keep_h, keep_c, running, columns, hidden, eps,
):  # fmt: skip
    """H and c after one step, for BLOCK_B rows."""
    ai, af, ag, ao, _ = normalise_gates(ai, af, ag, ao, hidden, eps, columns)
    i = tl.sigmoid(xi + ai * gain_i)
    f = tl.sigmoid(xf + af * gain_f)
    g = tanh(xg + ag * gain_g)
    o = tl.sigmoid(xo + ao * gain_o)
    candidate = f * c + i * g
    normal, _ = normalise(candidate, hidden, eps, columns)
    h_new = o * tanh(normal * gain_c + bias_c)
    h = tl.where(running, blend(h_new, h, keep_h), h)
    c = tl.where(running, blend(candidate, c, keep_c), c)
    return h, c


@triton.jit
def row_backward(
    xi, xf, xg, xo, ai, af, ag, ao,
    gain_i, gain_f, gain_g, gain_o, gain_c, bias_c,
    c, grad_h, grad_c, keep_h, keep_c, running, columns, hidden, eps,
):  # fmt: skip
    """Gradients of one step: of the gates (input side), of the recurrent product, of h and c before the step.

    Also the terms of the gradients of the gains: normalised products, normalised cell and its gradient. `grad_h` comes
    back without the part that goes through the recurrent product.
    """
    ai, af, ag, ao, scale = normalise_gates(ai, af, ag, ao, hidden, eps, columns)
    i = tl.sigmoid(xi + ai * gain_i)
    f = tl.sigmoid(xf + af * gain_f)
    g = tanh(xg + ag * gain_g)
    o = tl.sigmoid(xo + ao * gain_o)
    normal, scale_c = normalise(f * c + i * g, hidden, eps, columns)
    tanh_c = tanh(normal * gain_c + bias_c)
    inside = running & columns
    new_h = tl.where(inside, keep_h * grad_h, 0.0)
    new_c = tl.where(inside, keep_c * grad_c, 0.0)
    grad_normal = new_h * o * (1.0 - tanh_c * tanh_c)
    scaled = grad_normal * gain_c
    mean = tl.sum(scaled, axis=1)[:, None] / hidden
    along = tl.sum(scaled * normal, axis=1)[:, None] / hidden
    grad_candidate = tl.where(inside, scale_c * (scaled - mean - normal * along), 0.0) + new_c
    di = grad_candidate * g * i * (1.0 - i)
    df = grad_candidate * c * f * (1.0 - f)
    dg = grad_candidate * i * (1.0 - g * g)
    do = new_h * tanh_c * o * (1.0 - o)
    si, sf, sg, so = di * gain_i, df * gain_f, dg * gain_g, do * gain_o
    mean = tl.sum(si + sf + sg + so, axis=1)[:, None] / (4 * hidden)
    along = tl.sum(si * ai + sf * af + sg * ag + so * ao, axis=1)[:, None] / (4 * hidden)
    ri = tl.where(inside, scale * (si - mean - ai * along), 0.0)
    rf = tl.where(inside, scale * (sf - mean - af * along), 0.0)
    rg = tl.where(inside, scale * (sg - mean - ag * along), 0.0)
    ro = tl.where(inside, scale * (so - mean - ao * along), 0.0)
    # what the step did not replace passes through; a row that has ended passes everything
    grad_h = tl.where(running, (1.0 - keep_h) * grad_h, grad_h)
    grad_c = tl.where(running, (1.0 - keep_c) * grad_c + grad_candidate * f, grad_c)
    return di, df, dg, do, ri, rf, rg, ro, ai, af, ag, ao, normal, grad_normal, grad_h, grad_c


@triton.jit
def load_gains(gain_ptr, gain_c_ptr, bias_c_ptr, columns, hidden):
    inside = columns < hidden
    i, f, g, o = load_gates(gain_ptr, columns, hidden, inside)
    gain_c = tl.load(gain_c_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    bias_c = tl.load(bias_c_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    return i, f, g, o, gain_c, bias_c


@triton.jit
def add_sums(pointer, columns, hidden, i, f, g, o, normal, bias, FIRST: tl.constexpr):
    """Add to one row of 6 H fp32 sums: four gains, the cell's gain, the cell's bias."""
    inside = columns < hidden
    if not FIRST:
        old_i, old_f, old_g, old_o = load_gates(pointer, columns, hidden, inside)
        i, f, g, o = i + old_i, f + old_f, g + old_g, o + old_o
        normal += tl.load(pointer + 4 * hidden + columns, mask=inside, other=0.0)
        bias += tl.load(pointer + 5 * hidden + columns, mask=inside, other=0.0)
    store_gates(pointer, columns, hidden, i, f, g, o, inside)
    tl.store(pointer + 4 * hidden + columns, normal, mask=inside)
    tl.store(pointer + 5 * hidden + columns, bias, mask=inside)
