"""One layer of a recurrent net, in one or both directions, over whole sequences: torch's LSTM, GRU and RNN.

LSTM (gates i, f, g, o):  c' = sigmoid(f) c + sigmoid(i) tanh(g),  h' = sigmoid(o) tanh(c')
GRU (gates r, z, n):      n = tanh(x_n + sigmoid(r) (h W_hn^T + b_hn)),  h' = (1 - sigmoid(z)) n + sigmoid(z) h
RNN:                      h' = tanh or relu of x W_ih^T + b_ih + h W_hh^T + b_hh

Engines. "small" (H <= 128, less for some dtypes and GPUs) keeps W_hh and h of a batch tile in one program for all time
steps. "persistent" (H <= 1024, where the GPU can hold it) spreads a batch tile over several programs that hold a slice
of W_hh each and meet at a barrier every step. "step" runs a GEMM and one fused kernel per time step, for any H. "torch"
is stock PyTorch. All directions run in one launch; rows of different lengths are masked inside it; the input product
and the weight gradients are one GEMM each.

fp16, bf16 and fp32, accumulated in fp32, c and its gradient kept in fp32 from the first step to the last. fp32 products
are rounded to TF32 where `torch.backends.cudnn.rnn` allows it; where not, "small" and "persistent" refuse H > 32. fp64
goes to stock PyTorch. Error against fp64: at most twice stock's own in the same dtype. No float atomics: results repeat
bit for bit.

Saved for backward, per time step and row, besides input and output: 4 H slots in the input's dtype (LSTM, GRU; they
take the place of the input product), H fp32 of c (LSTM), and H of the state before the step. That is 14 H, 10 H and 2 H
bytes for LSTM, GRU and RNN in fp16, per direction.

Persistent recurrence: Diamos et al., "Persistent RNNs: Stashing Recurrent Weights On-Chip", ICML 2016. Hoisted products
and fused pointwise part: Appleyard et al., "Optimizing Performance of Recurrent Neural Networks on GPUs", 2016.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastops import _env, _library, tuning
from fastops.ops import rnn_launch
from fastops.ops.rnn_check import check, lengths_of
from fastops.ops.rnn_launch import split
from fastops.ops.rnn_reference import Weights, reference, stock

__all__ = ["IMPLS", "choose", "explain_auto", "recurrent_layer", "reference", "why_not"]

IMPLS = ("auto", "triton", "persistent", "small", "step", "torch")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
IEEE_HIDDEN = 32
MAX_STEP_BATCH = 4 * 65535  # four rows a program along the second axis of a CUDA grid
ROWS = tuning.load("rnn")


def why_not(
    mode: str,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Weights],
    lengths: Tensor | None = None,
    batch_first: bool = False,
    engine: str = "triton",
) -> str | None:
    """Why `engine` cannot run this call, or None where it can. Reads metadata only."""
    if engine in ("auto", "torch"):
        return None
    if engine == "triton":
        small = why_not(mode, input, h0, c0, weights, lengths, batch_first, "small")
        if small is None:
            return None
        persistent = why_not(mode, input, h0, c0, weights, lengths, batch_first, "persistent")
        if persistent is None or persistent == small:
            return persistent
        return f"{small}; {persistent}"
    reason = _env.why_no_triton(input.device)
    if reason is not None:
        return reason
    if input.dtype not in DTYPES:
        return f"the dtype is {input.dtype}, the kernels take fp16, bf16 and fp32"
    if input.dtype == torch.bfloat16 and _env.interpreting():
        return "Triton's interpreter computes bf16 products wrongly"
    unable = _library.why_not_dense(input=input, h0=h0, c0=c0) or _library.why_no_transform()
    if unable is not None:
        return unable
    if _env.jit_tracing():
        return "torch.jit.trace records sizes as tensors, of which no tile sizes follow"
    if input.numel() == 0:
        return f"the input is empty: {tuple(input.shape)}"
    batch = input.shape[0 if batch_first else 1]
    if engine == "step":
        if batch > MAX_STEP_BATCH:
            return f"the step engine takes at most {MAX_STEP_BATCH} rows, got {batch}"
        return None
    hidden = weights[0][1].shape[1]
    if input.dtype == torch.float32 and hidden > IEEE_HIDDEN and input.device.type == "cuda" and not _tf32_allowed():
        return (
            f"fp32 without TF32 (torch.backends.cudnn.rnn.fp32_precision) needs a hidden size of at most "
            f"{IEEE_HIDDEN}, got {hidden}: the recurrent product would run without tensor cores"
        )
    from fastops.kernels import rnn_plan

    machine = rnn_plan.Machine.at(input.device)
    return _why_no_plan(engine, mode, hidden, batch, len(weights), input.element_size(), machine)


def _why_no_plan(
    engine: str, mode: str, hidden: int, batch: int, directions: int, itemsize: int, machine: Any
) -> str | None:
    """Why a GPU has no room for "small" or "persistent", forward or backward."""
    from fastops.kernels import rnn_plan

    for backward in (False, True):
        if engine == "small":
            plan = rnn_plan.small(mode, hidden, itemsize, machine, backward)
        else:
            plan = rnn_plan.persistent(mode, hidden, batch, directions, itemsize, machine, backward)
        if isinstance(plan, str):
            return plan
    return None


def _tf32_allowed() -> bool:
    return torch._C._get_fp32_precision_getter("cuda", "rnn") == "tf32"


# what torch.compiler.assume_constant_result sets; calling that would import torch._dynamo, and with it triton
_tf32_allowed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _forward_fake(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    lengths: Tensor | None,
    mode: str,
    batch_first: bool,
    batch_rows: bool,
    engine: str,
    save: bool,
) -> tuple[Tensor, ...]:
    directions = len(split(weights))
    hidden = weights[1].shape[1]
    first, second, _ = input.shape
    batch = first if batch_first else second
    saved = (directions, first * second)
    on = save and engine != "torch"
    slots = 4 * hidden if mode in ("LSTM", "GRU") and on else 0
    h_n = input.new_empty((directions, batch, hidden))
    return (
        input.new_empty((first, second, directions * hidden)),
        h_n,
        input.new_empty(h_n.shape) if mode == "LSTM" else input.new_empty(0),
        input.new_empty((*saved, slots) if slots else 0),
        input.new_empty((*saved, hidden) if on else 0),
        input.new_empty((*saved, hidden) if on and mode == "LSTM" else 0, dtype=torch.float32),
    )


def _backward_fake(
    d_output: Tensor | None,
    d_h_n: Tensor | None,
    d_c_n: Tensor | None,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    lengths: Tensor | None,
    output: Tensor,
    gates: Tensor,
    before: Tensor,
    cells: Tensor,
    mode: str,
    batch_first: bool,
    batch_rows: bool,
    engine: str,
    needs: list[bool],
) -> list[Tensor]:
    first, second, size = input.shape
    d_input = input.new_empty((first, second, size))
    if batch_rows != batch_first:
        d_input = input.new_empty((second, first, size)).transpose(0, 1)
    batch = first if batch_first else second
    state = input.new_empty((len(split(weights)), batch, weights[1].shape[1]))
    shapes = [d_input, state, input.new_empty(state.shape), *(w.new_empty(w.shape) for w in weights)]
    return [x if needed else input.new_empty(0) for x, needed in zip(shapes, needs, strict=True)]


def _forward_flops(input: Any, h0: Any, c0: Any, weights: Any, *_: Any, **__: Any) -> int:
    """2 T B (I + H) G H of each direction: the products; the pointwise part is not counted, as for torch's own."""
    products = sum(w[0] * w[1] for w in weights if len(w) == 2)
    return 2 * input[0] * input[1] * int(products)


def _backward_flops(
    d_output: Any, d_h_n: Any, d_c_n: Any, input: Any, h0: Any, c0: Any, weights: Any, *_: Any, **__: Any
) -> int:
    """Twice the forward pass: gradients of what was multiplied, on both sides."""
    return 2 * _forward_flops(input, h0, c0, weights)


_forward_op = _library.define(
    "rnn_forward",
    "(Tensor input, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? lengths, str mode, bool batch_first, "
    "bool batch_rows, str engine, bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "fastops.ops.rnn_launch:forward",
    _forward_fake,
    _forward_flops,
    ("rnn", rnn_launch.stock_forward),
)
_backward_op = _library.define(
    "rnn_backward",
    "(Tensor? d_output, Tensor? d_h_n, Tensor? d_c_n, Tensor input, Tensor? h0, Tensor? c0, Tensor[] weights, "
    "Tensor? lengths, Tensor output, Tensor gates, Tensor before, Tensor cells, str mode, bool batch_first, "
    "bool batch_rows, str engine, bool[] needs) -> Tensor[]",
    "fastops.ops.rnn_launch:backward",
    _backward_fake,
    _backward_flops,
    ("rnn", rnn_launch.stock_backward),
)


MOST_WEIGHTS = 8  # four of each direction


class _RecurrentLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        input: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        lengths: Tensor | None,
        mode: str,
        batch_first: bool,
        batch_rows: bool,
        engine: str,
        save: bool,
        auto: bool,
        weight_0: Tensor,
        weight_1: Tensor,
        weight_2: Tensor | None,
        weight_3: Tensor | None,
        weight_4: Tensor | None,
        weight_5: Tensor | None,
        weight_6: Tensor | None,
        weight_7: Tensor | None,
    ) -> tuple[Tensor, ...]:
        # spelled out: torch.compile without gradients takes the first of *weights for a context
        padded = (weight_0, weight_1, weight_2, weight_3, weight_4, weight_5, weight_6, weight_7)
        weights = [w for w in padded if w is not None]
        launch = _library.for_graph(_forward_op, auto)
        return launch(input, h0, c0, weights, lengths, mode, batch_first, batch_rows, engine, save)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, h0, c0, lengths, mode, batch_first, batch_rows, engine, _, ctx.auto, *padded = inputs
        weights = [w for w in padded if w is not None]
        ctx.save_for_backward(input, h0, c0, lengths, output[0], *output[3:], *weights)
        ctx.mark_non_differentiable(*output[3:], *(() if mode == "LSTM" else output[2:3]))
        ctx.set_materialize_grads(False)
        ctx.options = (mode, batch_first, batch_rows, engine)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:  # type: ignore[override]
        input, h0, c0, lengths, output, gates, before, cells, *weights = ctx.saved_tensors
        mode, batch_first, batch_rows, engine = ctx.options
        d_output, d_h_n, d_c_n = gradients[:3]
        needs = [ctx.needs_input_grad[i] for i in (0, 1, 2)] + list(ctx.needs_input_grad[10 : 10 + len(weights)])

        def by_torch(again: bool = False) -> list[Tensor | None]:
            def formula(input: Tensor, h0: Tensor | None, c0: Tensor | None, *weights: Tensor) -> tuple[Tensor, ...]:
                results = reference(mode, input, h0, c0, split(list(weights)), lengths, batch_first)
                return tuple(x for x in results if x is not None)

            wanted = [d_output, d_h_n, d_c_n] if mode == "LSTM" else [d_output, d_h_n]
            return list(_library.reference_gradients(formula, [input, h0, c0, *weights], needs, wanted, again))

        def by_kernels() -> list[Tensor | None]:
            results = _library.for_graph(_backward_op, ctx.auto)(
                d_output,
                d_h_n,
                d_c_n,
                input,
                h0,
                c0,
                weights,
                lengths,
                output,
                gates,
                before,
                cells,
                mode,
                batch_first,
                batch_rows,
                engine,
                needs,
            )
            return [x if needed else None for x, needed in zip(results, needs, strict=True)]

        if _library.differentiable_again(gradients[:3]):
            found = by_torch(again=True)
        elif d_output is None and d_h_n is None and d_c_n is None:
            found = [None] * len(needs)
        else:
            found = _library.or_stock("rnn", ctx.auto, by_kernels, by_torch)
        return *found[:3], *[None] * 7, *found[3:], *[None] * (MOST_WEIGHTS - len(weights))


def recurrent_layer(
    mode: str,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Weights],
    lengths: Tensor | None = None,
    batch_first: bool = False,
    *,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run one recurrent layer over a batch of sequences: torch's formulas, gate orders and results.

    Args:
        mode: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU".
        input: (T, B, I), or (B, T, I) with `batch_first`; any strides.
        h0: (directions, B, H) initial hidden state, or None for zeros.
        c0: (directions, B, H) initial cell state of an LSTM, or None for zeros; None for other modes.
        weights: for each direction (w_ih (G H, I), w_hh (G H, H), b_ih (G H) or None, b_hh or None), G gates in
            torch's order. A second direction runs backwards in time.
        lengths: (B,) integer tensor on the input's device, or None where all rows have T steps. A row stops at its
            length: its outputs after that are 0, h_n and c_n are its states at its last step, and the reverse direction
            starts at that step, as with a PackedSequence. Nothing waits for the GPU; there the values are checked by
            the kernel, and one out of range raises ValueError in a later call. A length of 0 leaves the initial state.
        batch_first: whether input and output are (B, T, ...).
        impl: "auto", "triton" (small or persistent by H), "persistent", "small", "step" or "torch".

    Returns:
        output (T, B, directions H) or (B, T, directions H), h_n (directions, B, H), and c_n likewise for an LSTM, else
        None. Under autocast all in autocast's dtype; but a GRU's on the CPU, which autocast does not know there, in the
        dtype its sums with the initial state have: that of `h0`, without it that of `input`, promoted.

    Raises:
        ValueError, RuntimeError: a bad mode, shape, dtype or device; the message names the argument.
        KernelUnavailable: the engine asked for cannot run this call; the message says why.
    """
    engine = _env.choose_impl(impl, IMPLS)
    dtype = _env.autocast_dtype(input.device)
    if dtype is not None and input.dtype in DTYPES:
        if mode == "GRU" and input.device.type == "cpu":
            dtype = torch.promote_types(dtype, (input if h0 is None else h0).dtype)
        input, h0, c0 = (_env.autocast(x, dtype) for x in (input, h0, c0))
        weights = [tuple(_env.autocast(w, dtype) for w in each) for each in weights]  # type: ignore[misc]
        with torch.autocast(input.device.type, enabled=False):
            return _run(mode, input, h0, c0, weights, lengths, batch_first, engine)
    return _run(mode, input, h0, c0, weights, lengths, batch_first, engine)


def _run(
    mode: str,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Weights],
    lengths: Tensor | None,
    batch_first: bool,
    engine: str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    check(mode, input, h0, c0, weights, lengths, batch_first)
    auto = engine == "auto"
    engine = choose(mode, input, h0, c0, weights, lengths, batch_first, engine)
    if engine == "torch" and not torch.compiler.is_compiling():
        return stock(mode, input, h0, c0, weights, lengths, batch_first)
    flat = [w for each in weights for w in each if w is not None]
    differentiated = [x for x in (input, h0, c0, *flat) if x is not None and x.requires_grad]
    time = input.transpose(0, 1) if batch_first else input

    def by_kernels() -> tuple[Tensor, Tensor, Tensor | None]:
        output, h_n, c_n, *_ = _RecurrentLayer.apply(
            input,
            h0,
            c0,
            lengths_of(lengths),
            mode,
            batch_first,
            time.stride(0) < time.stride(1),
            engine,
            torch.is_grad_enabled() and len(differentiated) > 0,  # torch 2.11 cannot trace bool() of a list
            auto,
            *flat,
            *[None] * (MOST_WEIGHTS - len(flat)),
        )
        return output, h_n, c_n if mode == "LSTM" else None

    def by_torch() -> tuple[Tensor, Tensor, Tensor | None]:
        return stock(mode, input, h0, c0, weights, lengths, batch_first)

    return _library.or_stock("rnn", auto, by_kernels, by_torch)


def choose(
    mode: str,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Weights],
    lengths: Tensor | None = None,
    batch_first: bool = False,
    impl: str = "auto",
) -> str:
    """The engine that runs this call: "small", "persistent", "step" or "torch". Reads metadata only.

    For "auto" it is the one the table names, where it can run, else stock PyTorch. "triton" is small, else persistent.
    An engine asked for by name that cannot run raises KernelUnavailable.
    """
    engine = _env.choose_impl(impl, IMPLS)
    call = (mode, input, h0, c0, weights, lengths, batch_first)
    if engine == "auto":
        engine = _from_table(mode, input, weights, lengths, batch_first)
        return engine if why_not(*call, engine) is None else "torch"
    reason = why_not(*call, engine)
    if reason is not None:
        raise _env.KernelUnavailable(f"recurrent_layer(impl={engine!r}): {reason}")
    if engine == "triton":
        return "small" if why_not(*call, "small") is None else "persistent"
    return engine


def _from_table(mode: str, input: Tensor, weights: Sequence[Weights], lengths: Tensor | None, batch_first: bool) -> str:
    if input.device.type != "cuda" or input.numel() == 0 or "rnn" in _library.BROKEN:
        return "torch"
    steps, batch = (input.shape[1], input.shape[0]) if batch_first else (input.shape[0], input.shape[1])
    facts = {
        "mode": mode,
        "dtype": str(input.dtype).removeprefix("torch."),
        "hidden": weights[0][1].shape[1],
        "input_size": input.shape[-1],
        "steps": steps,
        "batch": batch,
        "directions": len(weights),
        "ragged": lengths is not None,
        **_env.gpu_facts(input.device),
    }
    return tuning.choose(ROWS, facts).engine


def explain_auto() -> list[dict[str, str]]:
    """What "auto" runs for typical calls, for `fastops env`."""
    common = {"mode": "LSTM", "directions": 1, "ragged": False, "steps": 128, **_env.shown_gpu_facts()}
    examples: list[tuple[str, dict[str, Any]]] = [
        ("LSTM bf16 H=512 B=64", {"dtype": "bfloat16", "hidden": 512, "input_size": 512, "batch": 64}),
        ("LSTM fp16 H=512 B=64", {"dtype": "float16", "hidden": 512, "input_size": 512, "batch": 64}),
        ("LSTM fp16 H=512 B=64, I=80", {"dtype": "float16", "hidden": 512, "input_size": 80, "batch": 64}),
        (
            "LSTM fp16 H=512 B=64, rows of different lengths",
            {"dtype": "float16", "hidden": 512, "input_size": 512, "batch": 64, "ragged": True},
        ),
        ("GRU fp16 H=512 B=64", {"mode": "GRU", "dtype": "float16", "hidden": 512, "input_size": 512, "batch": 64}),
        ("LSTM fp32 H=64 B=8", {"dtype": "float32", "hidden": 64, "input_size": 64, "batch": 8}),
        ("LSTM fp16 H=2048 B=64", {"dtype": "float16", "hidden": 2048, "input_size": 2048, "batch": 64}),
    ]
    return [_explained(name, common | facts) for name, facts in examples]


def _explained(example: str, facts: dict[str, Any]) -> dict[str, str]:
    row = tuning.choose(ROWS, facts)
    told = tuning.explained("recurrent_layer", example, row)
    if row.engine not in ("small", "persistent"):
        return told
    from fastops.kernels.rnn_plan import Machine

    gpu = _env.able_gpu()
    machine = Machine.of(facts["capability"]) if gpu is None else Machine.at(gpu)
    size = 4 if facts["dtype"] == "float32" else 2
    call = facts["mode"], facts["hidden"], facts["batch"], facts["directions"], size
    reason = _why_no_plan(row.engine, *call, machine)
    return told if reason is None else {**told, "engine": "torch", "why": f"{reason} ({row.engine}: {told['why']})"}
