"""The shipped configurations of the recurrent kernels as data, for the static gate and `fastops inspect`."""

from __future__ import annotations

from fastops.kernels import rnn_step
from fastops.kernels._static import StaticCase
from fastops.kernels.rnn_backward import backward_kernel
from fastops.kernels.rnn_forward import forward_kernel
from fastops.kernels.rnn_plan import Machine, Plan, persistent, small
from fastops.kernels.rnn_small import small_forward_kernel
from fastops.kernels.rnn_small_backward import small_backward_kernel

BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
MATH = {"fp16": "fast", "bf16": "approx", "fp32": "exact"}
ALIGNED = ("stride_yt", "stride_yb", "stride_dt", "stride_db")
SINGLE = ("cell_ptr", "cells_ptr", "d_state_ptr", "d_cell_ptr")
WHOLE = ("lengths_ptr", "counter_ptr", "error_ptr")

# (engine, mode, hidden, batch, directions, dtype, saves for backward, ragged, targets)
FORWARD = [
    ("persistent", "LSTM", 512, 64, 1, "fp16", False, False, (80, 86, 90, 100)),
    ("persistent", "LSTM", 512, 64, 1, "bf16", True, False, (80, 90)),
    ("persistent", "LSTM", 512, 64, 2, "fp16", True, True, (80, 90, 100)),
    ("persistent", "LSTM", 1024, 64, 1, "fp16", True, False, (90,)),
    ("persistent", "LSTM", 1024, 64, 1, "bf16", True, True, (80, 90, 100)),
    ("persistent", "LSTM", 640, 32, 1, "bf16", True, False, (90,)),
    ("persistent", "LSTM", 200, 64, 1, "fp16", True, False, (80, 90)),
    ("persistent", "LSTM", 512, 64, 1, "fp32", True, False, (80, 90, 100)),
    ("persistent", "GRU", 512, 64, 1, "fp16", True, False, (80, 90)),
    ("persistent", "GRU", 256, 128, 2, "bf16", True, True, (80, 90)),
    ("persistent", "RNN_TANH", 1024, 64, 1, "fp16", True, False, (90,)),
    ("small", "LSTM", 64, 16, 1, "fp16", False, False, (80, 90)),
    ("small", "LSTM", 64, 16, 1, "bf16", False, False, (80, 90)),
    ("small", "LSTM", 128, 64, 1, "fp16", True, False, (90,)),
    ("small", "LSTM", 128, 64, 1, "fp16", True, True, (80, 90)),
    ("small", "GRU", 128, 64, 2, "bf16", True, True, (90,)),
    ("small", "RNN_RELU", 40, 64, 1, "fp32", True, False, (80, 90)),
]
BACKWARD = [
    ("persistent", "LSTM", 512, 64, 1, "fp16", False, (80, 86, 90, 100)),
    ("persistent", "LSTM", 512, 64, 2, "bf16", True, (90,)),
    ("persistent", "LSTM", 1024, 64, 1, "fp16", False, (90,)),
    ("persistent", "LSTM", 1024, 64, 1, "bf16", True, (80, 90, 100)),
    ("persistent", "LSTM", 200, 64, 1, "fp16", False, (80, 90)),
    ("persistent", "LSTM", 512, 64, 1, "fp32", False, (80, 90)),
    ("persistent", "GRU", 512, 64, 2, "fp32", True, (100,)),
    ("persistent", "GRU", 512, 64, 1, "fp16", False, (80, 86, 90)),
    ("persistent", "GRU", 1024, 64, 1, "fp16", True, (100,)),
    ("persistent", "RNN_TANH", 1024, 64, 1, "fp16", False, (90,)),
    ("small", "LSTM", 64, 16, 1, "fp16", False, (80, 90)),
    ("small", "LSTM", 128, 64, 1, "bf16", False, (90,)),
    ("small", "GRU", 128, 64, 2, "bf16", True, (90,)),
]
# (mode, dtype, ragged)
STEP = [
    ("LSTM", "fp16", False),
    ("LSTM", "fp32", True),
    ("GRU", "fp16", False),
    ("GRU", "bf16", True),
    ("RNN_TANH", "fp16", False),
]


def static_cases() -> list[StaticCase]:
    """Forward and backward by engine, mode, hidden size, dtype and GPU, with the tiles that a launch would choose."""
    cases = []
    for engine, mode, hidden, batch, directions, dtype, save, ragged, targets in FORWARD:
        for target in targets:
            plan = _plan(engine, mode, hidden, batch, directions, dtype, target, backward=False)
            cases.append(forward_case(plan, mode, hidden, batch, directions, dtype, save, ragged, target))
    for engine, mode, hidden, batch, directions, dtype, ragged, targets in BACKWARD:
        for target in targets:
            plan = _plan(engine, mode, hidden, batch, directions, dtype, target, backward=True)
            cases.append(backward_case(plan, mode, hidden, batch, directions, dtype, ragged, target))
    return [*cases, *(_step_case(*case, backward) for case in STEP for backward in (False, True))]


def forward_case(
    plan: Plan,
    mode: str,
    hidden: int,
    batch: int,
    directions: int,
    dtype: str,
    save: bool,
    ragged: bool,
    target: int,
) -> StaticCase:
    """One forward launch."""
    constexprs = _constexprs(plan, mode, hidden, dtype, ragged) | {"SAVE": save}
    words = ",".join(word for word, there in (("save", save), ("ragged", ragged)) if there)
    kernel, name = forward_kernel, "forward"
    if plan.tiles == 1:
        kernel, name = small_forward_kernel, "small_forward"
        constexprs = _alone(plan, constexprs)
    return _case(kernel, name, plan, constexprs, mode, hidden, batch, directions, dtype, words, target)


def backward_case(
    plan: Plan, mode: str, hidden: int, batch: int, directions: int, dtype: str, ragged: bool, target: int
) -> StaticCase:
    """One backward launch."""
    constexprs = _constexprs(plan, mode, hidden, dtype, ragged)
    kernel, name = backward_kernel, "backward"
    if plan.tiles == 1:
        kernel, name = small_backward_kernel, "small_backward"
        constexprs = _alone(plan, constexprs)
    else:
        constexprs |= {"SPLIT": plan.split, "GROUP": plan.group, "FINISH": True}
    words = "ragged" if ragged else ""
    return _case(kernel, name, plan, constexprs, mode, hidden, batch, directions, dtype, words, target)


def _alone(plan: Plan, constexprs: dict[str, object]) -> dict[str, object]:
    """What a small kernel takes of them."""
    return {k: v for k, v in constexprs.items() if k not in ("BLOCK_K", "BARRIER")} | {"STAGES": plan.stages}


def _plan(
    engine: str, mode: str, hidden: int, batch: int, directions: int, dtype: str, target: int, backward: bool
) -> Plan:
    machine = Machine.of(target)
    if engine == "small":
        plan = small(mode, hidden, BYTES[dtype], machine, backward)
    else:
        plan = persistent(mode, hidden, batch, directions, BYTES[dtype], machine, backward)
    assert isinstance(plan, Plan), f"{mode} {hidden} {dtype} sm_{target}: {plan}"
    return plan


def _constexprs(plan: Plan, mode: str, hidden: int, dtype: str, ragged: bool) -> dict[str, object]:
    return {
        "MODE": mode,
        "H": hidden,
        "BLOCK_H": plan.block_h,
        "BLOCK_B": plan.block_b,
        "BLOCK_K": plan.block_k,
        "RAGGED": ragged,
        "BARRIER": plan.tiles > 1,
        "PRECISION": "tf32" if dtype == "fp32" else "ieee",
        "MATH": MATH[dtype],
    }


def _case(
    kernel,
    name: str,
    plan: Plan,
    constexprs: dict[str, object],
    mode: str,
    hidden: int,
    batch: int,
    directions: int,
    dtype: str,
    words: str,
    target: int,
) -> StaticCase:
    signature = _signature(kernel, constexprs, dtype)
    tiles = min(plan.batch_tiles, -(-batch // plan.block_b))
    label = ",".join(word for word in (mode, f"H{hidden}", f"D{directions}", dtype, words, f"sm_{target}") if word)
    return StaticCase(
        name=f"rnn.{name}[{label}]",
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=plan.num_warps,
        num_stages=1,
        options={name: value for name, value in plan.options.items() if name not in ("num_warps", "num_stages")},
        divisible_by_16=_aligned(signature),
        targets=(target,),
        grid=plan.tiles * tiles * directions,
        sample=f"B={batch}, {directions} direction(s)",
    )


def _signature(kernel, constexprs: dict[str, object], dtype: str) -> dict[str, str]:
    types = dict.fromkeys(SINGLE, "*fp32") | dict.fromkeys(WHOLE, "*i32")
    names = [name for name in kernel.arg_names if name not in constexprs]
    return {name: types.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32") for name in names}


def _aligned(signature: dict[str, str]) -> tuple[str, ...]:
    return tuple(name for name in signature if name.endswith("_ptr") or name in ALIGNED)


def _step_case(mode: str, dtype: str, ragged: bool, backward: bool) -> StaticCase:
    hidden, batch = 2048, 64
    kernel = rnn_step.step_backward_kernel if backward else rnn_step.step_forward_kernel
    constexprs = {
        "MODE": mode,
        "H": hidden,
        "BLOCK_B": rnn_step.BLOCK_B,
        "BLOCK_H": rnn_step.BLOCK_H,
        "RAGGED": ragged,
        "MATH": MATH[dtype],
    }
    if not backward:
        constexprs["SAVE"] = True
    signature = _signature(kernel, constexprs, dtype)
    label = ",".join((mode, f"H{hidden}", dtype, *(["ragged"] if ragged else [])))
    return StaticCase(
        name=f"rnn.step_{'backward' if backward else 'forward'}[{label}]",
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=4,
        divisible_by_16=_aligned(signature),
        targets=(80, 90),
        grid=-(-hidden // rnn_step.BLOCK_H) * -(-batch // rnn_step.BLOCK_B),
        sample=f"B={batch}",
    )
