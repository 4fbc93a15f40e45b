"""One direction of a layer-norm LSTM with zoneout, over whole sequences.

    i, f, g, o = LN(x_t W_ih^T) gain_ih + b_ih + LN(h_{t-1} W_hh^T) gain_hh + b_hh      LN over all 4 H numbers
    candidate  = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g)
    output     = sigmoid(o) tanh(LN(candidate) gain_c + bias_c)                         LN over H numbers
    c_t = z_c c_{t-1} + (1 - z_c) candidate,    h_t = z_h h_{t-1} + (1 - z_h) output

LN(v) = (v - mean(v)) / sqrt(var(v) + eps). The cell state is carried unnormalised, as in Ba et al. In training z_c and
z_h are masks, 1 with the zoneout rate, drawn for each step, row and unit; in evaluation they are the rates themselves.

The input half, with its normalisation and both biases, is computed by PyTorch for all steps at once and arrives here as
`gates`. Shapes: gates (T, B, 4H) or (B, T, 4H), w_hh (4H, H), gain_hh (4H), gain_c and bias_c (H), h0 and c0 (B, H),
masks of what is replaced (T, B, H) by steps, lengths (B). dtypes: fp16, bf16, fp32, one for all; arithmetic in fp32, h
rounded to the dtype at every step, c not. Error bound: over many rows at most twice PyTorch's with the same formula,
as a root mean square in units of what a rounding of the inputs does to each row. Not in every single row: where a
candidate is nearly constant, LN multiplies its rounding by up to 1 / sqrt(eps) a step, so that the largest error of a
few rows is a matter of chance, in PyTorch as here.

All steps run in one launch where W_hh fits one program, which normalises whole rows: 8 H^2 bytes in half precision are
128 KiB at H = 128 and 512 KiB, more than any GPU has on chip, at 256. Backward, W_hh of 128 leaves too few registers
for the sums of the gains: it takes two launches a step above H = 64. So does a forward pass above H = 64
with masks that saves nothing.

References: Ba, Kiros & Hinton 2016 (arXiv 1607.06450), equations 20 to 22; Krueger et al. 2016 (arXiv 1606.01305).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastops import _env, _library, tuning
from fastops.ops.layer_norm_lstm_reference import reference, stock_backward, stock_forward
from fastops.ops.rnn_check import check_lengths, lengths_of
from fastops.ops.rnn_lengths import note_lengths

__all__ = ["layer_norm_lstm"]

IMPLS = ("auto", "triton", "small", "step", "torch")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_SMALL = {torch.float16: 128, torch.bfloat16: 128, torch.float32: 32}
MAX_SMALL_ELSEWHERE = 64  # W_hh of 128 units is 128 KiB, more than consumer GPUs have
LARGE_SHARED_MEMORY = ((8, 0), (8, 7), (9, 0), (10, 0), (10, 3))
MAX_STEP = 1024
ROWS = tuning.load("layer_norm_lstm")


def why_not(gates: Tensor, hidden: int, engine: str = "triton") -> str | None:
    """Why `engine` cannot run this call, or None where it can. "triton" is whichever of the two can."""
    reason = _env.why_no_triton(gates.device)
    if reason is not None:
        return reason
    if gates.dtype not in DTYPES:
        return f"the kernels take fp16, bf16 and fp32, not {gates.dtype}"
    if gates.dtype == torch.bfloat16 and _env.interpreting():
        return "Triton's interpreter computes bf16 products wrongly"
    transform = _library.why_no_transform()
    if transform is not None:
        return transform
    if engine == "small":
        limit = MAX_SMALL[gates.dtype]
        if gates.device.type == "cuda" and _env.capability(_env.index_of(gates.device)) not in LARGE_SHARED_MEMORY:
            limit = min(limit, MAX_SMALL_ELSEWHERE)
        if hidden > limit:
            return f"all steps in one launch need hidden_size <= {limit} for {gates.dtype} here, got {hidden}"
    elif hidden > MAX_STEP:
        return f"a row of gates must fit one program: hidden_size <= {MAX_STEP}, got {hidden}"
    return None


def choose(gates: Tensor, hidden: int, impl: str) -> str:
    """The engine to run: "small", "step" or "torch"."""
    engine = _env.choose_impl(impl, IMPLS)
    if engine == "auto":
        if gates.device.type != "cuda" or "layer_norm_lstm" in _library.BROKEN:
            return "torch"
        able = {name: why_not(gates, hidden, name) is None for name in ("small", "step")}
        facts = {**able, "hidden": hidden, "dtype": str(gates.dtype).removeprefix("torch.")}
        if not any(able.values()):
            return "torch"
        return tuning.choose(ROWS, {**facts, **_env.gpu_facts(gates.device)}).engine
    if engine == "torch":
        return engine
    reason = why_not(gates, hidden, engine)
    if reason is not None:
        raise _env.KernelUnavailable(f"layer_norm_lstm(impl={engine!r}): {reason}")
    if engine == "triton":
        return "small" if why_not(gates, hidden, "small") is None else "step"
    return engine


def _forward_fake(
    gates: Tensor,
    w_hh: Tensor,
    gain_hh: Tensor,
    gain_c: Tensor,
    bias_c: Tensor,
    h0: Tensor,
    c0: Tensor,
    mask_h: Tensor | None,
    mask_c: Tensor | None,
    lengths: Tensor | None,
    keep_h: float,
    keep_c: float,
    eps: float,
    reverse: bool,
    batch_first: bool,
    save: bool,
    engine: str,
) -> tuple[Tensor, ...]:
    steps, batch = (gates.shape[1], gates.shape[0]) if batch_first else (gates.shape[0], gates.shape[1])
    hidden = gates.shape[2] // 4
    slabs, rows = (steps + 1, batch) if save else (0, 0)
    return (
        gates.new_empty((gates.shape[0], gates.shape[1], hidden)),
        gates.new_empty((batch, hidden)),
        gates.new_empty((batch, hidden)),
        gates.new_empty((slabs, rows, hidden)),
        gates.new_empty((slabs, rows, hidden), dtype=torch.float32),
        gates.new_empty((steps if save else 0, rows, 4 * hidden)),
    )


def _backward_fake(
    grad_output: Tensor | None, grad_h_n: Tensor | None, grad_c_n: Tensor | None, gates: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    batch_first = rest[-2]
    steps, batch = (gates.shape[1], gates.shape[0]) if batch_first else (gates.shape[0], gates.shape[1])
    hidden = gates.shape[2] // 4
    return (
        gates.new_empty(gates.shape),
        gates.new_empty((steps, batch, 4 * hidden)),
        gates.new_empty((batch, hidden)),
        gates.new_empty((batch, hidden)),
        gates.new_empty((6 * hidden,), dtype=torch.float32),
    )


def _flops(gates: Any, w_hh: Any) -> int:
    """2 T B H 4H: the recurrent product, or the product that gives the gradient of h."""
    return 2 * int(gates[0] * gates[1] * w_hh[0] * w_hh[1])


def _forward_flops(gates: Any, w_hh: Any, *_: Any, **__: Any) -> int:
    return _flops(gates, w_hh)


def _backward_flops(grad_output: Any, grad_h_n: Any, grad_c_n: Any, gates: Any, w_hh: Any, *_: Any, **__: Any) -> int:
    """The gradient of w_hh is a product of its own, and counted there."""
    return _flops(gates, w_hh)


_OPTIONS = "float keep_h, float keep_c, float eps, bool reverse, bool batch_first"
_MASKS = "Tensor? mask_h, Tensor? mask_c, Tensor? lengths"
_forward = _library.define(
    "layer_norm_lstm_forward",
    f"(Tensor gates, Tensor w_hh, Tensor gain_hh, Tensor gain_c, Tensor bias_c, Tensor h0, Tensor c0, {_MASKS}, "
    f"{_OPTIONS}, bool save, str engine) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "fastops.kernels.layer_norm_lstm:forward",
    _forward_fake,
    _forward_flops,
    ("layer_norm_lstm", stock_forward),
)
_backward = _library.define(
    "layer_norm_lstm_backward",
    "(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor gates, Tensor w_hh, Tensor gain_hh, "
    f"Tensor gain_c, Tensor bias_c, Tensor c, Tensor product, {_MASKS}, {_OPTIONS}, str engine) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "fastops.kernels.layer_norm_lstm:backward",
    _backward_fake,
    _backward_flops,
    ("layer_norm_lstm", stock_backward),
)


class _LayerNormLSTM(torch.autograd.Function):
    @staticmethod
    def forward(
        gates: Tensor,
        w_hh: Tensor,
        gain_hh: Tensor,
        gain_c: Tensor,
        bias_c: Tensor,
        h0: Tensor,
        c0: Tensor,
        mask_h: Tensor | None,
        mask_c: Tensor | None,
        lengths: Tensor | None,
        keep_h: float,
        keep_c: float,
        eps: float,
        reverse: bool,
        batch_first: bool,
        save: bool,
        engine: str,
        auto: bool,
    ) -> Any:
        # spelled out: torch.compile without gradients takes the first of *arguments for a context
        tensors = (gates, w_hh, gain_hh, gain_c, bias_c, h0, c0, mask_h, mask_c, lengths)
        return _library.for_graph(_forward, auto)(*tensors, keep_h, keep_c, eps, reverse, batch_first, save, engine)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[3:])
        ctx.options, ctx.engine, ctx.auto = inputs[10:15], inputs[16], inputs[17]
        ctx.save_for_backward(*inputs[:10], *output[3:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        *inputs, h, c, product = ctx.saved_tensors
        rest = (None,) * 11
        if all(grad is None for grad in grads[:3]):
            return *(None,) * 7, *rest

        def stock(again: bool = False) -> Any:
            def formula(*tensors: Any) -> Any:
                return reference(*tensors, *inputs[7:], *ctx.options)

            return _library.reference_gradients(formula, inputs[:7], ctx.needs_input_grad[:7], grads[:3], again)

        def kernels() -> Any:
            gates, w_hh, gain_hh, gain_c, bias_c = inputs[:5]
            grad_gates, grad_product, grad_h0, grad_c0, sums = _library.for_graph(_backward, ctx.auto)(
                *grads[:3], gates, w_hh, gain_hh, gain_c, bias_c, c, product, *inputs[7:], *ctx.options, ctx.engine
            )
            hidden = w_hh.shape[1]
            grad_w = grad_product.flatten(0, 1).t() @ h[:-1].flatten(0, 1)
            grad_gain, grad_gain_c, grad_bias_c = sums.to(gain_hh.dtype).split((4 * hidden, hidden, hidden))
            return grad_gates, grad_w, grad_gain, grad_gain_c, grad_bias_c, grad_h0, grad_c0

        if _library.differentiable_again(grads[:3]):
            return *stock(again=True), *rest
        return *_library.or_stock("layer_norm_lstm", ctx.auto, kernels, stock), *rest


def layer_norm_lstm(
    gates: Tensor,
    w_hh: Tensor,
    gain_hh: Tensor,
    gain_c: Tensor,
    bias_c: Tensor,
    h0: Tensor,
    c0: Tensor,
    *,
    mask_h: Tensor | None = None,
    mask_c: Tensor | None = None,
    lengths: Tensor | None = None,
    keep_h: float = 1.0,
    keep_c: float = 1.0,
    eps: float = 1e-5,
    reverse: bool = False,
    batch_first: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one direction of a layer-norm LSTM; the module's docstring has the formula.

    Args:
        gates: (T, B, 4H) or (B, T, 4H), the input half of the gates, normalised, with biases; order i, f, g, o.
        w_hh: (4H, H).
        gain_hh: (4H).
        gain_c: (H).
        bias_c: (H).
        h0: (B, H).
        c0: (B, H).
        mask_h: (T, B, H) bool, in the order in which steps are run, True where h is replaced; with mask_c.
        mask_c: the same for c.
        lengths: (B,) integers in [0, T] on the same device, or None. On a GPU nothing waits to look at them: they are
            clamped, and one out of range raises ValueError in a later call of the kernels.
        keep_h: how much of h is replaced where there is no mask.
        keep_c: the same for c.
        eps: of the normalisations.
        reverse: run from the last step to the first.
        batch_first: whether gates and output are (B, T, ...).
        impl: "auto", "triton" (whichever of the next two can), "small" (all steps in one launch, small H), "step" (two
            launches a step) or "torch".

    Returns:
        output as gates, but with H features; h_n and c_n (B, H).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        KernelUnavailable: an engine asked for by name cannot run here.
    """
    if gates.dim() != 3 or w_hh.dim() != 2 or gates.shape[2] != 4 * w_hh.shape[1] or w_hh.shape[0] != gates.shape[2]:
        raise ValueError(f"gates {tuple(gates.shape)} and w_hh {tuple(w_hh.shape)} must be (T, B, 4H) and (4H, H)")
    steps, batch = (gates.shape[1], gates.shape[0]) if batch_first else (gates.shape[0], gates.shape[1])
    hidden = w_hh.shape[1]
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "w_hh": (w_hh, (4 * hidden, hidden)),
        "gain_hh": (gain_hh, (4 * hidden,)),
        "gain_c": (gain_c, (hidden,)),
        "bias_c": (bias_c, (hidden,)),
        "h0": (h0, (batch, hidden)),
        "c0": (c0, (batch, hidden)),
        "mask_h": (mask_h, (steps, batch, hidden)),
        "mask_c": (mask_c, (steps, batch, hidden)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.device != gates.device:
            raise ValueError(f"{name} is on {tensor.device}, gates are on {gates.device}")
        if name not in ("mask_h", "mask_c") and tensor.dtype != gates.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, gates are {gates.dtype}; they must be the same")
    if (mask_h is None) != (mask_c is None):
        raise ValueError("mask_h and mask_c go together")
    for name, mask in (("mask_h", mask_h), ("mask_c", mask_c)):
        if mask is not None and mask.dtype != torch.bool:
            raise ValueError(f"{name} must be bool, got {mask.dtype}")
    if lengths is not None:
        check_lengths(lengths, batch, steps, gates.device)
        lengths = lengths_of(lengths)
    tensors = (gates, w_hh, gain_hh, gain_c, bias_c, h0, c0)
    rest: Any = (mask_h, mask_c, lengths, keep_h, keep_c, eps, reverse, batch_first)
    engine = choose(gates, hidden, impl)
    if engine == "torch":
        if lengths is not None:
            note_lengths(lengths, steps)
        return reference(*tensors, *rest)
    save = _library.wants_grad(*tensors)
    auto = _env.choose_impl(impl, IMPLS) == "auto"
    return _library.or_stock(
        "layer_norm_lstm",
        auto,
        lambda: _LayerNormLSTM.apply(*tensors, *rest, save, engine, auto)[:3],
        lambda: reference(*tensors, *rest),
    )


def explain_auto() -> list[dict[str, str]]:
    """What "auto" runs for typical calls, for `fastops env`."""
    common = {"step": True, "dtype": "float16", **_env.shown_gpu_facts()}
    return [
        tuning.explained("layer_norm_lstm", f"H={hidden} fp16", tuning.choose(ROWS, {**common, **facts}))
        for hidden, facts in ((64, {"hidden": 64, "small": True}), (512, {"hidden": 512, "small": False}))
    ]
