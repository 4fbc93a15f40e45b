"""The pointwise half of one recurrent step: LSTM, GRU and vanilla cells, forward and backward.

The two products `x W_ih^T` and `h W_hh^T` are cuBLAS's; what is left is memory traffic, so that everything between the
products and the new state is one kernel: one program computes BLOCK_B rows by BLOCK_H units, reads each product once,
adds the biases in fp32 and writes the new state and the activated gates that the backward kernel needs.

Elements moved per batch row and unit, forward / backward:

    LSTM   4 + 4 products, c -> h, c, 4 gates  = 15     4 gates, c, c', dh, dc -> 4 dgates, dc            = 13
    GRU    3 + 3 products, h -> h, 4 gates     = 12     4 gates, h, dh -> 3 + 3 dgates, dh                = 13
    RNN    1 + 1 products -> h                 =  3     h, dh -> dgate                                    =  3

Shapes: B batch rows, H hidden units, G gates per unit. The products are (B, G*H), states (B, H), biases (G*H).
Formulas are those of torch.nn.LSTMCell, GRUCell and RNNCell, gate orders i,f,g,o and r,z,n.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastops.kernels._common import relu, tanh
from fastops.kernels._static import StaticCase

ELEMENTS = 512  # per program: four per thread, 8-byte loads of half precision
MAX_BLOCK_H = 256
NUM_WARPS = 4


@triton.jit
def _tile(batch, hidden, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):
    """Rows and columns of this program, and which of them exist."""
    blocks_h = tl.cdiv(hidden, BLOCK_H)
    rows = (tl.program_id(0) // blocks_h) * BLOCK_B + tl.arange(0, BLOCK_B)
    columns = (tl.program_id(0) % blocks_h) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = (rows < batch)[:, None] & (columns < hidden)[None, :]
    # full tiles of columns: a bias loaded once per row comes from L1, one row broadcast would go through shared memory
    return rows.to(tl.int64)[:, None], tl.broadcast_to(columns[None, :], (BLOCK_B, BLOCK_H)), inside


@triton.jit
def _preactivation(product_ptr, bias_ptr, gate: tl.constexpr, at, columns, hidden, inside):
    """Gate `gate` of a product, fp32, plus its bias where there is one."""
    value = tl.load(product_ptr + at + gate * hidden, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        value += tl.load(bias_ptr + gate * hidden + columns, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def lstm_cell_forward_kernel(
    product_x_ptr,  # (B, 4H)
    product_h_ptr,  # (B, 4H)
    bias_x_ptr,  # (4H) or None
    bias_h_ptr,  # (4H) or None
    c_ptr,  # (B, H)
    h_out_ptr,  # (B, H)
    c_out_ptr,  # (B, H)
    gates_ptr,  # (B, 4H): i, f, g, o after their non-linearities
    batch,
    hidden,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    rows, columns, inside = _tile(batch, hidden, BLOCK_B, BLOCK_H)
    at = rows * 4 * hidden + columns
    i = tl.sigmoid(
        _preactivation(product_x_ptr, bias_x_ptr, 0, at, columns, hidden, inside)
        + _preactivation(product_h_ptr, bias_h_ptr, 0, at, columns, hidden, inside)
    )
    f = tl.sigmoid(
        _preactivation(product_x_ptr, bias_x_ptr, 1, at, columns, hidden, inside)
        + _preactivation(product_h_ptr, bias_h_ptr, 1, at, columns, hidden, inside)
    )
    g = tanh(
        _preactivation(product_x_ptr, bias_x_ptr, 2, at, columns, hidden, inside)
        + _preactivation(product_h_ptr, bias_h_ptr, 2, at, columns, hidden, inside)
    )
    o = tl.sigmoid(
        _preactivation(product_x_ptr, bias_x_ptr, 3, at, columns, hidden, inside)
        + _preactivation(product_h_ptr, bias_h_ptr, 3, at, columns, hidden, inside)
    )
    state = rows * hidden + columns
    c = f * tl.load(c_ptr + state, mask=inside, other=0.0).to(tl.float32) + i * g
    tl.store(c_out_ptr + state, c.to(c_out_ptr.dtype.element_ty), mask=inside)
    tl.store(h_out_ptr + state, (o * tanh(c)).to(h_out_ptr.dtype.element_ty), mask=inside)
    tl.store(gates_ptr + at, i.to(gates_ptr.dtype.element_ty), mask=inside)
    tl.store(gates_ptr + at + hidden, f.to(gates_ptr.dtype.element_ty), mask=inside)
    tl.store(gates_ptr + at + 2 * hidden, g.to(gates_ptr.dtype.element_ty), mask=inside)
    tl.store(gates_ptr + at + 3 * hidden, o.to(gates_ptr.dtype.element_ty), mask=inside)


@triton.jit
def lstm_cell_backward_kernel(
    grad_h_ptr,  # (B, H) or None
    grad_c_ptr,  # (B, H) or None
    c_ptr,  # (B, H), the cell state before the step
    c_out_ptr,  # (B, H), and after it
    gates_ptr,  # (B, 4H)
    grad_gates_ptr,  # (B, 4H), before the non-linearities
    grad_c_in_ptr,  # (B, H)
    batch,
    hidden,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    rows, columns, inside = _tile(batch, hidden, BLOCK_B, BLOCK_H)
    at = rows * 4 * hidden + columns
    state = rows * hidden + columns
    i = tl.load(gates_ptr + at, mask=inside, other=0.0).to(tl.float32)
    f = tl.load(gates_ptr + at + hidden, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gates_ptr + at + 2 * hidden, mask=inside, other=0.0).to(tl.float32)
    o = tl.load(gates_ptr + at + 3 * hidden, mask=inside, other=0.0).to(tl.float32)
    grad_c = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    grad_o = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    if grad_c_ptr is not None:
        grad_c = tl.load(grad_c_ptr + state, mask=inside, other=0.0).to(tl.float32)
    if grad_h_ptr is not None:
        grad_h = tl.load(grad_h_ptr + state, mask=inside, other=0.0).to(tl.float32)
        tanh_c = tanh(tl.load(c_out_ptr + state, mask=inside, other=0.0).to(tl.float32))
        grad_o = grad_h * tanh_c * o * (1.0 - o)
        grad_c += grad_h * o * (1.0 - tanh_c * tanh_c)
    c = tl.load(c_ptr + state, mask=inside, other=0.0).to(tl.float32)
    grad_i = grad_c * g * i * (1.0 - i)
    grad_f = grad_c * c * f * (1.0 - f)
    grad_g = grad_c * i * (1.0 - g * g)
    tl.store(grad_gates_ptr + at, grad_i.to(grad_gates_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_gates_ptr + at + hidden, grad_f.to(grad_gates_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_gates_ptr + at + 2 * hidden, grad_g.to(grad_gates_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_gates_ptr + at + 3 * hidden, grad_o.to(grad_gates_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_c_in_ptr + state, (grad_c * f).to(grad_c_in_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gru_cell_forward_kernel(
    product_x_ptr,  # (B, 3H)
    product_h_ptr,  # (B, 3H)
    bias_x_ptr,  # (3H) or None
    bias_h_ptr,  # (3H) or None
    h_ptr,  # (B, H)
    h_out_ptr,  # (B, H)
    gates_ptr,  # (B, 4H): r, z, n, and the recurrent half of n before r scales it
    batch,
    hidden,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    rows, columns, inside = _tile(batch, hidden, BLOCK_B, BLOCK_H)
    at = rows * 3 * hidden + columns
    r = tl.sigmoid(
        _preactivation(product_x_ptr, bias_x_ptr, 0, at, columns, hidden, inside)
        + _preactivation(product_h_ptr, bias_h_ptr, 0, at, columns, hidden, inside)
    )
    z = tl.sigmoid(
        _preactivation(product_x_ptr, bias_x_ptr, 1, at, columns, hidden, inside)
        + _preactivation(product_h_ptr, bias_h_ptr, 1, at, columns, hidden, inside)
    )
    recurrent = _preactivation(product_h_ptr, bias_h_ptr, 2, at, columns, hidden, inside)
    n = tanh(_preactivation(product_x_ptr, bias_x_ptr, 2, at, columns, hidden, inside) + r * recurrent)
    state = rows * hidden + columns
    h = tl.load(h_ptr + state, mask=inside, other=0.0).to(tl.float32)
    tl.store(h_out_ptr + state, (n + z * (h - n)).to(h_out_ptr.dtype.element_ty), mask=inside)
    at = rows * 4 * hidden + columns
    tl.store(gates_ptr + at, r.to(gates_ptr.dtype.element_ty), mask=inside)
    tl.store(gates_ptr + at + hidden, z.to(gates_ptr.dtype.element_ty), mask=inside)
    tl.store(gates_ptr + at + 2 * hidden, n.to(gates_ptr.dtype.element_ty), mask=inside)
    tl.store(gates_ptr + at + 3 * hidden, recurrent.to(gates_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gru_cell_backward_kernel(
    grad_ptr,  # (B, H)
    h_ptr,  # (B, H), before the step
    gates_ptr,  # (B, 4H)
    grad_x_ptr,  # (B, 3H), of the input product
    grad_h_ptr,  # (B, 3H), of the recurrent product
    grad_state_ptr,  # (B, H), what reaches h past the product
    batch,
    hidden,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    rows, columns, inside = _tile(batch, hidden, BLOCK_B, BLOCK_H)
    at = rows * 4 * hidden + columns
    state = rows * hidden + columns
    r = tl.load(gates_ptr + at, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(gates_ptr + at + hidden, mask=inside, other=0.0).to(tl.float32)
    n = tl.load(gates_ptr + at + 2 * hidden, mask=inside, other=0.0).to(tl.float32)
    recurrent = tl.load(gates_ptr + at + 3 * hidden, mask=inside, other=0.0).to(tl.float32)
    h = tl.load(h_ptr + state, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + state, mask=inside, other=0.0).to(tl.float32)
    grad_n = grad * (1.0 - z) * (1.0 - n * n)
    grad_r = grad_n * recurrent * r * (1.0 - r)
    grad_z = grad * (h - n) * z * (1.0 - z)
    at = rows * 3 * hidden + columns
    tl.store(grad_x_ptr + at, grad_r.to(grad_x_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_x_ptr + at + hidden, grad_z.to(grad_x_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_x_ptr + at + 2 * hidden, grad_n.to(grad_x_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_h_ptr + at, grad_r.to(grad_h_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_h_ptr + at + hidden, grad_z.to(grad_h_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_h_ptr + at + 2 * hidden, (grad_n * r).to(grad_h_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_state_ptr + state, (grad * z).to(grad_state_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rnn_cell_forward_kernel(
    product_x_ptr,  # (B, H)
    product_h_ptr,  # (B, H)
    bias_x_ptr,  # (H) or None
    bias_h_ptr,  # (H) or None
    h_out_ptr,  # (B, H)
    batch,
    hidden,
    TANH: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    rows, columns, inside = _tile(batch, hidden, BLOCK_B, BLOCK_H)
    at = rows * hidden + columns
    value = _preactivation(product_x_ptr, bias_x_ptr, 0, at, columns, hidden, inside)
    value += _preactivation(product_h_ptr, bias_h_ptr, 0, at, columns, hidden, inside)
    value = tanh(value) if TANH else relu(value)
    tl.store(h_out_ptr + at, value.to(h_out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rnn_cell_backward_kernel(
    grad_ptr,  # (B, H)
    h_out_ptr,  # (B, H)
    grad_gate_ptr,  # (B, H)
    batch,
    hidden,
    TANH: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    rows, columns, inside = _tile(batch, hidden, BLOCK_B, BLOCK_H)
    at = rows * hidden + columns
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    h = tl.load(h_out_ptr + at, mask=inside, other=0.0).to(tl.float32)
    # `h <= 0` and not `h > 0`, so that a NaN state passes its gradient on, as torch.relu's does
    grad = grad * (1.0 - h * h) if TANH else tl.where(h <= 0.0, 0.0, grad)
    tl.store(grad_gate_ptr + at, grad.to(grad_gate_ptr.dtype.element_ty), mask=inside)


def _blocks(batch: int, hidden: int) -> tuple[tuple[int], dict[str, int]]:
    block_h = min(MAX_BLOCK_H, triton.next_power_of_2(hidden))
    block_b = ELEMENTS // block_h
    grid = triton.cdiv(batch, block_b) * triton.cdiv(hidden, block_h)
    return (grid,), {"BLOCK_B": block_b, "BLOCK_H": block_h, "num_warps": NUM_WARPS}


def _contiguous(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def lstm_cell_forward(
    product_x: torch.Tensor,
    product_h: torch.Tensor,
    bias_x: torch.Tensor | None,
    bias_h: torch.Tensor | None,
    c: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """New h, new c and the activated gates."""
    product_x, product_h, bias_x, bias_h, c = _contiguous(product_x, product_h, bias_x, bias_h, c)
    batch, hidden = c.shape
    h_out, c_out, gates = c.new_empty(c.shape), c.new_empty(c.shape), c.new_empty((batch, 4 * hidden))
    if c.numel():
        grid, blocks = _blocks(batch, hidden)
        lstm_cell_forward_kernel[grid](
            product_x, product_h, bias_x, bias_h, c, h_out, c_out, gates, batch, hidden, **blocks
        )
    return h_out, c_out, gates


def lstm_cell_backward(
    grad_h: torch.Tensor | None,
    grad_c: torch.Tensor | None,
    c: torch.Tensor,
    c_out: torch.Tensor,
    gates: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the (equal) products and of c."""
    grad_h, grad_c, c, c_out, gates = _contiguous(grad_h, grad_c, c, c_out, gates)
    batch, hidden = c.shape
    grad_gates, grad_c_in = c.new_empty((batch, 4 * hidden)), c.new_empty(c.shape)
    if c.numel():
        grid, blocks = _blocks(batch, hidden)
        lstm_cell_backward_kernel[grid](grad_h, grad_c, c, c_out, gates, grad_gates, grad_c_in, batch, hidden, **blocks)
    return grad_gates, grad_c_in


def gru_cell_forward(
    product_x: torch.Tensor,
    product_h: torch.Tensor,
    bias_x: torch.Tensor | None,
    bias_h: torch.Tensor | None,
    h: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """New h, and r, z, n with the recurrent half of n."""
    product_x, product_h, bias_x, bias_h, h = _contiguous(product_x, product_h, bias_x, bias_h, h)
    batch, hidden = h.shape
    h_out, gates = h.new_empty(h.shape), h.new_empty((batch, 4 * hidden))
    if h.numel():
        grid, blocks = _blocks(batch, hidden)
        gru_cell_forward_kernel[grid](product_x, product_h, bias_x, bias_h, h, h_out, gates, batch, hidden, **blocks)
    return h_out, gates


def gru_cell_backward(
    grad: torch.Tensor, h: torch.Tensor, gates: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the input product, of the recurrent product, and of h past the product."""
    grad, h, gates = _contiguous(grad, h, gates)
    batch, hidden = h.shape
    grad_x, grad_h = h.new_empty((batch, 3 * hidden)), h.new_empty((batch, 3 * hidden))
    grad_state = h.new_empty(h.shape)
    if h.numel():
        grid, blocks = _blocks(batch, hidden)
        gru_cell_backward_kernel[grid](grad, h, gates, grad_x, grad_h, grad_state, batch, hidden, **blocks)
    return grad_x, grad_h, grad_state


def rnn_cell_forward(
    product_x: torch.Tensor,
    product_h: torch.Tensor,
    bias_x: torch.Tensor | None,
    bias_h: torch.Tensor | None,
    tanh: bool,
) -> torch.Tensor:
    """New h."""
    product_x, product_h, bias_x, bias_h = _contiguous(product_x, product_h, bias_x, bias_h)
    batch, hidden = product_x.shape
    h_out = product_x.new_empty(product_x.shape)
    if h_out.numel():
        grid, blocks = _blocks(batch, hidden)
        rnn_cell_forward_kernel[grid](product_x, product_h, bias_x, bias_h, h_out, batch, hidden, TANH=tanh, **blocks)
    return h_out


def rnn_cell_backward(grad: torch.Tensor, h_out: torch.Tensor, tanh: bool) -> torch.Tensor:
    """Gradient of the (equal) products."""
    grad, h_out = _contiguous(grad, h_out)
    batch, hidden = h_out.shape
    grad_gate = h_out.new_empty(h_out.shape)
    if grad_gate.numel():
        grid, blocks = _blocks(batch, hidden)
        rnn_cell_backward_kernel[grid](grad, h_out, grad_gate, batch, hidden, TANH=tanh, **blocks)
    return grad_gate


def static_cases() -> list[StaticCase]:
    """The kernels as launched for 64 rows of 512 units, fp16."""
    batch, hidden = 64, 512
    (programs,), blocks = _blocks(batch, hidden)
    warps = blocks.pop("num_warps")
    cases = []
    for kernel, extra in (
        (lstm_cell_forward_kernel, {}),
        (lstm_cell_backward_kernel, {}),
        (gru_cell_forward_kernel, {}),
        (gru_cell_backward_kernel, {}),
        (rnn_cell_forward_kernel, {"TANH": True}),
        (rnn_cell_backward_kernel, {"TANH": True}),
    ):
        pointers = {name: "*fp16" for name in kernel.arg_names if name.endswith("_ptr")}
        cases.append(
            StaticCase(
                name=f"rnn_cell.{kernel.__name__.removesuffix('_kernel')}[fp16]",
                kernel=kernel,
                signature={**pointers, "batch": "i32", "hidden": "i32"},
                constexprs={**blocks, **extra},
                num_warps=warps,
                divisible_by_16=(*pointers, "batch", "hidden"),
                grid=programs,
                sample=f"B={batch}, H={hidden}",
            )
        )
    return cases
