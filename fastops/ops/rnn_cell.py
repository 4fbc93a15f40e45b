"""One step of an LSTM, GRU or vanilla recurrent net: torch.lstm_cell and its kin with one fused pointwise kernel.

    LSTM   i, f, g, o = W_ih x + b_ih + W_hh h + b_hh
           c' = sigmoid(f) c + sigmoid(i) tanh(g)            h' = sigmoid(o) tanh(c')
    GRU    r, z = sigmoid(W_i(rz) x + b_i(rz) + W_h(rz) h + b_h(rz))
           n = tanh(W_in x + b_in + r (W_hn h + b_hn))       h' = (1 - z) n + z h
    RNN    h' = tanh or relu of W_ih x + b_ih + W_hh h + b_hh

Shapes: x (B, I), h and c (B, H), w_ih (G*H, I), w_hh (G*H, H), biases (G*H), with G = 4, 3, 1.
dtypes: fp16, bf16, fp32, all arguments alike; under CUDA autocast all are cast to its dtype, as torch does for these
functions. The products are torch's (cuBLAS, TF32 where `torch.backends.cuda.matmul` allows it); the rest is fp32.
Error bound: at most twice that of torch's own cell in the same dtype.

References: Hochreiter & Schmidhuber 1997; Cho et al. 2014 (arXiv 1406.1078), in the variant of torch.nn.GRUCell.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastops import _env, _library, tuning
from fastops.ops.rnn_cell_autograd import GRUStep, LSTMStep, RNNStep

__all__ = ["choose", "gru_cell", "lstm_cell", "rnn_relu_cell", "rnn_tanh_cell"]

IMPLS = ("auto", "triton", "torch")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
GATES = {"lstm_cell": 4, "gru_cell": 3, "rnn_tanh_cell": 1, "rnn_relu_cell": 1}
STOCK: dict[str, Any] = {
    "lstm_cell": torch.lstm_cell,
    "gru_cell": torch.gru_cell,
    "rnn_tanh_cell": torch.rnn_tanh_cell,
    "rnn_relu_cell": torch.rnn_relu_cell,
}
ROWS = tuning.load("rnn_cell")


def why_not(input: Tensor) -> str | None:
    """Why the kernels cannot run on tensors like these, or None where they can."""
    reason = _env.why_no_triton(input.device)
    if reason is not None:
        return reason
    if input.dtype not in DTYPES:
        return f"the kernels take fp16, bf16 and fp32, not {input.dtype}"
    return _library.why_not_dense(input=input) or _library.why_no_transform()


def _check(
    name: str,
    input: Tensor,
    states: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> None:
    gates = GATES[name]
    if input.dim() != 2:
        kind = IndexError if input.dim() < 2 else RuntimeError  # torch's
        raise kind(f"{name}: expected a 2-D input (batch, input_size), got {tuple(input.shape)}")
    if w_ih.dim() != 2 or w_hh.dim() != 2:
        raise RuntimeError(f"{name}: expected 2-D weights, got w_ih {tuple(w_ih.shape)} and w_hh {tuple(w_hh.shape)}")
    if input.shape[1] != w_ih.shape[1]:
        raise RuntimeError(f"input has inconsistent input_size: got {input.shape[1]} expected {w_ih.shape[1]}")
    hidden = w_hh.shape[1]
    for k, state in enumerate(states):
        if state.dim() != 2:
            raise RuntimeError(f"{name}: expected hidden{k} to be (batch, hidden_size), got {tuple(state.shape)}")
        if state.shape[0] != input.shape[0]:
            raise RuntimeError(f"Input batch size {input.shape[0]} doesn't match hidden{k} batch size {state.shape[0]}")
        if state.shape[1] != hidden:
            raise RuntimeError(f"hidden{k} has inconsistent hidden_size: got {state.shape[1]}, expected {hidden}")
    for what, weight in (("weight_ih", w_ih), ("weight_hh", w_hh)):
        if weight.shape[0] != gates * hidden:
            raise RuntimeError(
                f"{what} first dim must be {gates} * hidden_size = {gates * hidden}, but got {weight.shape[0]}"
            )
    for what, bias in (("bias_ih", b_ih), ("bias_hh", b_hh)):
        if bias is not None and bias.shape != (gates * hidden,):
            raise RuntimeError(f"{what} must have shape ({gates * hidden},), but got {tuple(bias.shape)}")
    others = {"hx": states[0], "cx": states[-1], "weight_ih": w_ih, "weight_hh": w_hh, "bias_ih": b_ih, "bias_hh": b_hh}
    for what, tensor in others.items():
        if tensor is not None and tensor.dtype != input.dtype:
            # torch promotes c on the CPU, and refuses it as we do on a GPU
            kind = _env.KernelUnavailable if what == "cx" else RuntimeError
            raise kind(f"{name}: input is {input.dtype}, {what} is {tensor.dtype}; they must be the same")
        if tensor is not None and tensor.device != input.device:
            raise RuntimeError(f"{name}: input is on {input.device}, {what} is on {tensor.device}")


def _autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Arguments in the dtype of CUDA autocast, which lists torch's cells as lower precision; CPU autocast does not."""
    device = next(tensor.device for tensor in tensors if tensor is not None)
    dtype = _env.autocast_dtype(device) if device.type == "cuda" else None
    return tensors if dtype is None else tuple(_env.autocast(x, dtype) for x in tensors)


def choose(impl: str, input: Tensor) -> str:
    """The engine that runs this call: "triton" or "torch"; "auto" follows the table."""
    engine = _env.choose_impl(impl, IMPLS)
    if engine != "auto":
        return engine
    if input.device.type != "cuda" or "rnn_cell" in _library.BROKEN or why_not(input) is not None:
        return "torch"
    facts = {"dtype": str(input.dtype).removeprefix("torch."), **_env.gpu_facts(input.device)}
    return tuning.choose(ROWS, facts).engine


def _cell(
    name: str,
    impl: str,
    input: Tensor,
    hx: Any,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> Any:
    if not isinstance(input, Tensor):
        raise TypeError(f"{name}(): argument 'input' must be Tensor, not {type(input).__name__}")
    if choose(impl, input) == "torch":
        return STOCK[name](input, hx, w_ih, w_hh, b_ih, b_hh)
    states = hx if name == "lstm_cell" else (hx,)
    if name == "lstm_cell" and not isinstance(hx, tuple | list):
        raise TypeError(f"{name}(): argument 'hx' must be tuple of Tensors, not {type(hx).__name__}")
    if name == "lstm_cell" and len(hx) != 2:
        raise RuntimeError("lstm_cell expects two hidden states")
    input, w_ih, w_hh, b_ih, b_hh, *states = _autocast(input, w_ih, w_hh, b_ih, b_hh, *states)
    _check(name, input, states, w_ih, w_hh, b_ih, b_hh)
    reason = why_not(input)
    if reason is not None:
        raise _env.KernelUnavailable(f"{name}(impl='triton'): {reason}")
    auto = _env.choose_impl(impl, IMPLS) == "auto"

    def kernels() -> Any:
        product_x, product_h = F.linear(input, w_ih), F.linear(states[0], w_hh)
        if name == "lstm_cell":
            return LSTMStep.apply(product_x, product_h, b_ih, b_hh, states[1], auto)[:2]
        if name == "gru_cell":
            return GRUStep.apply(product_x, product_h, b_ih, b_hh, states[0], auto)[0]
        return RNNStep.apply(product_x, product_h, b_ih, b_hh, name == "rnn_tanh_cell", auto)

    return _library.or_stock("rnn_cell", auto, kernels, lambda: STOCK[name](input, hx, w_ih, w_hh, b_ih, b_hh))


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One LSTM step, as torch.lstm_cell: two matrix products and one fused kernel, forward and backward.

    Args:
        input: (B, I).
        hx: (h, c), each (B, H).
        w_ih: (4H, I), gates in the order i, f, g, o.
        w_hh: (4H, H).
        b_ih: (4H) or None.
        b_hh: (4H) or None.
        impl: "auto" (stock PyTorch: its table has no other row yet), "triton" or "torch".

    Returns:
        (h', c'), each (B, H).

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, as torch.lstm_cell.
        KernelUnavailable: impl="triton" and the kernels cannot run on these tensors.
    """
    return _cell("lstm_cell", impl, input, hx, w_ih, w_hh, b_ih, b_hh)


def gru_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """One GRU step, as torch.gru_cell; gates in the order r, z, n. Arguments and errors as `lstm_cell`, hx (B, H)."""
    return _cell("gru_cell", impl, input, hx, w_ih, w_hh, b_ih, b_hh)


def rnn_tanh_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """One tanh RNN step, as torch.rnn_tanh_cell. Arguments and errors as `lstm_cell`, hx (B, H)."""
    return _cell("rnn_tanh_cell", impl, input, hx, w_ih, w_hh, b_ih, b_hh)


def rnn_relu_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """One relu RNN step, as torch.rnn_relu_cell. Arguments and errors as `lstm_cell`, hx (B, H)."""
    return _cell("rnn_relu_cell", impl, input, hx, w_ih, w_hh, b_ih, b_hh)


def explain_auto() -> list[dict[str, str]]:
    """What "auto" runs for a typical step, for `fastops env`."""
    facts = {"dtype": "float16", **_env.shown_gpu_facts()}
    return [tuning.explained("lstm_cell", "B=64 H=512 fp16", tuning.choose(ROWS, facts))]
