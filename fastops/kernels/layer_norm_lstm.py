"""Layer-norm LSTM with zoneout over whole sequences, forward and backward.

What cuBLAS and PyTorch do well stays theirs: the input product for all steps with its normalisation, and the weight
gradient after the backward pass, one product each. Here is the recurrence, in two forms that share their arithmetic:

- all steps in one launch (H <= 128, backward H <= 64): a program owns BLOCK_B rows of the batch and keeps W_hh on chip;
  nothing is shared between programs, so there is no barrier;
- one launch a step (H <= 1024, so that a row fits the registers): cuBLAS computes h W_hh^T, the kernel normalises it
  and applies gates and state.

One row of gates is 4 H numbers and lives in one program, so both normalisations are row reductions and no statistic
is saved. Saved per step and row, in the tensors' dtype: the recurrent product (4H) and h (H); c (H) in fp32:
14 H bytes in half precision, 24 H in fp32. Backward recomputes the gates from them.

Steps are counted in the order in which they are run: step s of row b is time s, or lengths[b] - 1 - s in the reverse
direction. Buffers with index s are in that order; gates and output are in the order of time.

Ba, Kiros & Hinton 2016 (arXiv 1607.06450); Krueger et al. 2016 (arXiv 1606.01305).
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from fastops.kernels._common import dot_precision, weight_operand
from fastops.kernels._static import StaticCase
from fastops.kernels.layer_norm_lstm_row import clamp_lengths_kernel
from fastops.kernels.layer_norm_lstm_small import small_backward_kernel, small_forward_kernel
from fastops.kernels.layer_norm_lstm_step import step_backward_kernel, step_forward_kernel
from fastops.kernels.rnn import errors_of

BLOCK_B = 16  # the tensor core's smallest side
MAX_HIDDEN_SMALL_BACKWARD = 64
MAX_STEP_PROGRAMS = 512  # each accumulates the gradients of the gains over its rows and over time


def _block_h(hidden: int) -> int:
    return max(16, triton.next_power_of_2(hidden))


def _step_warps(block_h: int) -> int:
    return min(16, max(1, block_h // 128))


def _small_options(block_h: int, itemsize: int, backward: bool, plain: bool = True) -> dict[str, int]:
    # one stage: loads kept in flight would need the shared memory that W_hh is in
    if block_h > 64 and plain:  # masks and lengths would spill the half of the registers that 16 warps have each
        return {"num_warps": 16, "num_stages": 1}
    options = {"num_warps": 8 if block_h > (32 if backward else 64) else 4, "num_stages": 1}
    if itemsize == 4 and not plain:  # the assembler would rather spill than let fewer programs share a multiprocessor
        options["maxnreg"] = 255
    return options


def _precision(dtype: torch.dtype) -> str:
    return dot_precision(dtype, torch.backends.cuda.matmul.fp32_precision == "tf32")


def _time_and_batch(x: torch.Tensor | None, batch_first: bool) -> tuple[int, int]:
    """Strides of time and batch."""
    if x is None:
        return 0, 0
    return (x.stride(1), x.stride(0)) if batch_first else (x.stride(0), x.stride(1))


def _sizes(gates: torch.Tensor, batch_first: bool) -> tuple[int, int, int]:
    steps, batch = (gates.shape[1], gates.shape[0]) if batch_first else (gates.shape[0], gates.shape[1])
    return steps, batch, gates.shape[2] // 4


def _dense(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """Without gaps: kernels take no strides of these."""
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def clamped(lengths: torch.Tensor | None, steps: int) -> torch.Tensor | None:
    """Lengths within 0..T, int32; the kernel notes a row out of range, and a later call raises."""
    if lengths is None or lengths.numel() == 0:
        return lengths
    found = torch.empty_like(lengths, dtype=torch.int32)
    batch = lengths.shape[0]
    grid = (triton.cdiv(batch, 1024),)
    clamp_lengths_kernel[grid](lengths.contiguous(), found, errors_of(lengths.device), steps, batch, BLOCK=1024)
    return found


def forward(
    gates: torch.Tensor,
    w_hh: torch.Tensor,
    gain: torch.Tensor,
    gain_c: torch.Tensor,
    bias_c: torch.Tensor,
    h0: torch.Tensor,
    c0: torch.Tensor,
    mask_h: torch.Tensor | None,
    mask_c: torch.Tensor | None,
    lengths: torch.Tensor | None,
    keep_h: float,
    keep_c: float,
    eps: float,
    reverse: bool,
    batch_first: bool,
    save: bool,
    engine: str,
) -> tuple[torch.Tensor, ...]:
    """Output (as gates), h_n, c_n (B, H) and, with `save`, h (T+1, B, H), c (T+1, B, H) fp32 and product (T, B, 4H)."""
    steps, batch, hidden = _sizes(gates, batch_first)
    lengths = clamped(lengths, steps)
    gates, w_hh, h0, c0, mask_h, mask_c = _dense(gates, w_hh, h0, c0, mask_h, mask_c)
    gain, gain_c, bias_c = _dense(gain, gain_c, bias_c)
    output = gates.new_empty((*gates.shape[:2], hidden))
    saved = (steps, batch) if save else (0, 0)
    h = gates.new_empty((saved[0] + 1 if save else 0, saved[1], hidden))
    c = gates.new_empty((saved[0] + 1 if save else 0, saved[1], hidden), dtype=torch.float32)
    product = gates.new_empty((*saved, 4 * hidden))
    h_n, c_n = gates.new_empty((batch, hidden)), gates.new_empty((batch, hidden))
    if batch == 0 or steps == 0:
        if save:
            h[0], c[0] = h0, c0
        return output, h_n.copy_(h0), c_n.copy_(c0), h, c, product
    options: dict[str, Any] = {
        "HAS_MASKS": mask_h is not None,
        "RAGGED": lengths is not None,
        "REVERSE": reverse,
        "BLOCK_H": _block_h(hidden),
    }
    gates_at, output_at = _time_and_batch(gates, batch_first), _time_and_batch(output, batch_first)
    # with masks, wide tiles keep their registers only where each step's states are written: a call that saves nothing,
    # training without gradients, goes step by step
    if engine == "small" and (save or mask_h is None or options["BLOCK_H"] <= 64):
        w_hh = weight_operand(w_hh, _precision(gates.dtype))
        small_forward_kernel[(triton.cdiv(batch, BLOCK_B),)](
            gates, *gates_at, w_hh, gain, gain_c, bias_c, h0, c0, output, *output_at, h_n, c_n, h, c, product,
            mask_h, mask_c, lengths, keep_h, keep_c, eps, steps, batch, hidden,
            SAVE=save, PRECISION=_precision(gates.dtype), BLOCK_B=BLOCK_B, **options,
            **_small_options(options["BLOCK_H"], gates.element_size(), False, mask_h is None and lengths is None),
        )  # fmt: skip
        return output, h_n, c_n, h, c, product
    # without a backward pass to come, two slabs of states take turns and one holds the product
    slabs = steps + 1 if save else 2
    all_h = h if save else gates.new_empty((2, batch, hidden))
    all_c = c if save else gates.new_empty((2, batch, hidden), dtype=torch.float32)
    products = product if save else gates.new_empty((1, batch, 4 * hidden))
    all_h[0], all_c[0] = h0, c0
    transposed = w_hh.t()
    for step in range(steps):
        before, after = step % slabs, (step + 1) % slabs
        own = products[step] if save else products[0]
        torch.mm(all_h[before], transposed, out=own)
        step_forward_kernel[(batch,)](
            gates, *gates_at, own, gain, gain_c, bias_c, all_h[before], all_c[before], all_h[after], all_c[after],
            output, *output_at, None if mask_h is None else mask_h[step], None if mask_c is None else mask_c[step],
            lengths, keep_h, keep_c, eps, step, steps, batch, hidden,
            **options, num_warps=_step_warps(options["BLOCK_H"]),
        )  # fmt: skip
    return output, h_n.copy_(all_h[steps % slabs]), c_n.copy_(all_c[steps % slabs]), h, c, product


def backward(
    grad_output: torch.Tensor | None,
    grad_h_n: torch.Tensor | None,
    grad_c_n: torch.Tensor | None,
    gates: torch.Tensor,
    w_hh: torch.Tensor,
    gain: torch.Tensor,
    gain_c: torch.Tensor,
    bias_c: torch.Tensor,
    c: torch.Tensor,
    product: torch.Tensor,
    mask_h: torch.Tensor | None,
    mask_c: torch.Tensor | None,
    lengths: torch.Tensor | None,
    keep_h: float,
    keep_c: float,
    eps: float,
    reverse: bool,
    batch_first: bool,
    engine: str,
) -> tuple[torch.Tensor, ...]:
    """Gradients of gates, of the products by steps (T, B, 4H), of h0 and c0 (B, H), and (6H) fp32 of gains and bias."""
    steps, batch, hidden = _sizes(gates, batch_first)
    lengths = None if lengths is None else lengths.clamp(0, steps).to(torch.int32)
    gates, w_hh, grad_output, mask_h, mask_c = _dense(gates, w_hh, grad_output, mask_h, mask_c)
    gain, gain_c, bias_c = _dense(gain, gain_c, bias_c)
    grad_gates, grad_product = gates.new_empty(gates.shape), gates.new_empty((steps, batch, 4 * hidden))
    grad_h = gates.new_zeros((batch, hidden), dtype=torch.float32)
    grad_c = gates.new_zeros((batch, hidden), dtype=torch.float32)
    if grad_h_n is not None:
        grad_h.copy_(grad_h_n)
    if grad_c_n is not None:
        grad_c.copy_(grad_c_n)
    # beyond it tiles and sums together spill, with 8 warps and with 16: the backward pass goes step by step
    small = engine == "small" and hidden <= MAX_HIDDEN_SMALL_BACKWARD
    programs = triton.cdiv(batch, BLOCK_B) if small else min(batch, MAX_STEP_PROGRAMS)
    sums = gates.new_zeros((programs, 6 * hidden), dtype=torch.float32)
    if batch == 0 or steps == 0:
        return grad_gates, grad_product, grad_h.to(gates.dtype), grad_c.to(gates.dtype), sums.sum(0)
    options: dict[str, Any] = {
        "HAS_MASKS": mask_h is not None,
        "RAGGED": lengths is not None,
        "REVERSE": reverse,
        "BLOCK_H": _block_h(hidden),
    }
    gates_at, given_at = _time_and_batch(gates, batch_first), _time_and_batch(grad_output, batch_first)
    if small:
        w_hh = weight_operand(w_hh, _precision(gates.dtype))
        small_backward_kernel[(programs,)](
            gates, *gates_at, w_hh, gain, gain_c, bias_c, c, product, grad_output, *given_at, mask_h, mask_c, lengths,
            grad_gates, *gates_at, grad_product, grad_h, grad_c, sums, keep_h, keep_c, eps, steps, batch, hidden,
            PRECISION=_precision(gates.dtype), BLOCK_B=BLOCK_B, **options,
            **_small_options(options["BLOCK_H"], gates.element_size(), True),
        )  # fmt: skip
        return grad_gates, grad_product, grad_h.to(gates.dtype), grad_c.to(gates.dtype), sums.sum(0)
    through = gates.new_empty((batch, hidden))
    for step in reversed(range(steps)):
        step_backward_kernel[(programs,)](
            gates, *gates_at, product[step], gain, gain_c, bias_c, c[step], grad_output, *given_at,
            None if mask_h is None else mask_h[step], None if mask_c is None else mask_c[step], lengths,
            grad_gates, *gates_at, grad_product[step], through, grad_h, grad_c, sums,
            keep_h, keep_c, eps, step, steps, batch, hidden,
            FIRST=step == steps - 1, **options, num_warps=_step_warps(options["BLOCK_H"]),
        )  # fmt: skip
        torch.mm(grad_product[step], w_hh, out=through)
    return grad_gates, grad_product, (grad_h + through).to(gates.dtype), grad_c.to(gates.dtype), sums.sum(0)


# (kernels, hidden, dtype, words): "masks" in training, "ragged" with lengths, "reverse", "save" for backward, "tf32"
STATIC = [
    *((small_forward_kernel, hidden, "fp16", "save") for hidden in (32, 64, 128)),
    *((small_backward_kernel, hidden, "fp16", "") for hidden in (32, 64)),
    (small_forward_kernel, 32, "fp32", "save"),
    (small_backward_kernel, 32, "fp32", ""),
    *((kernel, hidden, "fp16", "") for kernel in (step_forward_kernel, step_backward_kernel) for hidden in (512, 1024)),
    *((kernel, 1024, "fp32", "") for kernel in (step_forward_kernel, step_backward_kernel)),
    (small_forward_kernel, 64, "fp16", "save masks ragged reverse"),
    (small_forward_kernel, 128, "fp16", "save masks ragged reverse"),
    (small_forward_kernel, 128, "bf16", "save masks ragged reverse"),
    (small_forward_kernel, 128, "fp16", "save masks"),
    (small_forward_kernel, 128, "fp16", "ragged reverse"),
    (small_forward_kernel, 32, "fp32", "save tf32 masks ragged reverse"),
    (small_backward_kernel, 64, "fp16", "masks ragged reverse"),
    (small_backward_kernel, 64, "bf16", "masks ragged reverse"),
    (small_backward_kernel, 32, "fp32", "tf32 masks ragged reverse"),
    *((kernel, 1024, "fp16", "masks ragged reverse") for kernel in (step_forward_kernel, step_backward_kernel)),
    *((kernel, 1024, "fp32", "masks ragged reverse") for kernel in (step_forward_kernel, step_backward_kernel)),
]
SINGLE = ("c_ptr", "c_out_ptr", "grad_h_ptr", "grad_c_ptr", "sums_ptr")


def static_cases() -> list[StaticCase]:
    """Both forms at the sizes where they change shape, plain and with all that a call may add."""
    return [*(_case(*row) for row in STATIC), _lengths_case()]


def _case(kernel: Any, hidden: int, dtype: str, words: str) -> StaticCase:
    small, block_h = "small" in kernel.__name__, _block_h(hidden)
    masks, ragged = "masks" in words, "ragged" in words
    constexprs: dict[str, Any] = {
        "HAS_MASKS": masks,
        "RAGGED": ragged,
        "REVERSE": "reverse" in words,
        "SAVE": "save" in words,
        "FIRST": False,
        "PRECISION": "tf32" if "tf32" in words else "ieee",
        "BLOCK_B": BLOCK_B,
        "BLOCK_H": block_h,
    }
    if not masks:
        constexprs |= {"mask_h_ptr": None, "mask_c_ptr": None}
    if not ragged:
        constexprs["lengths_ptr"] = None
    constexprs = {name: value for name, value in constexprs.items() if name in kernel.arg_names}
    types = dict.fromkeys(SINGLE, "*fp32") | dict.fromkeys(("mask_h_ptr", "mask_c_ptr"), "*i1")
    types |= {"lengths_ptr": "*i32"} | dict.fromkeys(("keep_h", "keep_c", "eps"), "fp32")
    signature = {
        name: types.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
        if name not in constexprs
    }
    aligned = [n for n in signature if n.endswith("_ptr") or n.startswith("stride_") or n in ("hidden", "batch")]
    options = {"num_warps": _step_warps(block_h)}
    if small:
        backward = "backward" in kernel.__name__
        plain = backward or not (masks or ragged)
        options = _small_options(block_h, 4 if dtype == "fp32" else 2, backward, plain)
    # a call that saves is the usual one, so that is not said
    more = ["no save"] if "SAVE" in constexprs and "save" not in words else []
    label = ",".join([f"H{hidden}", dtype, *more, *(word for word in words.split() if word != "save")])
    return StaticCase(
        name=f"layer_norm_lstm.{kernel.__name__.removesuffix('_kernel')}[{label}]",
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=options.pop("num_warps"),
        num_stages=options.pop("num_stages", 3),
        options=options,
        divisible_by_16=tuple(aligned),
        targets=(80, 90, 100) if small and block_h > 64 else (80, 86, 90, 100),
        grid=4 if small else 64,
        sample=f"B=64, H={hidden}",
    )


def _lengths_case() -> StaticCase:
    pointers = {"lengths_ptr": "*i64", "found_ptr": "*i32", "error_ptr": "*i32"}
    return StaticCase(
        name="layer_norm_lstm.clamp_lengths[i64]",
        kernel=clamp_lengths_kernel,
        signature={**pointers, "steps": "i32", "batch": "i32"},
        constexprs={"BLOCK": 1024},
        divisible_by_16=tuple(pointers),
        grid=1,
        sample="B=64",
    )
