"""The shipped attention configurations as data, for the static gate and `fastops inspect`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import triton

from fastops.kernels._static import StaticCase
from fastops.kernels.attention_backward import attention_delta_kernel, attention_dkdv_kernel
from fastops.kernels.attention_bias import attention_bias_kernel
from fastops.kernels.attention_configs import Config, Form, configuration
from fastops.kernels.attention_dq import attention_dq_kernel
from fastops.kernels.attention_forward import attention_forward_kernel
from fastops.kernels.attention_keys import attention_keys_kernel
from fastops.kernels.attention_problem import PAD

KERNELS = {
    "forward": attention_forward_kernel,
    "dkdv": attention_dkdv_kernel,
    "dq": attention_dq_kernel,
    "bias": attention_bias_kernel,
}
OFF = {
    "GROUP": 1, "CAUSAL": False, "WINDOW": False, "HAS_LENGTHS": False, "HAS_QUERY_LENGTHS": False, "VARLEN": False,
    "DROPOUT": False, "SOFTCAP": 0, "ALIBI": False, "MASK": 0, "RAGGED": False, "WIDE": False,
    "PRECISION": "ieee", "SPLIT": 1, "WANT_DK": True, "WANT_DV": True, "OVER_M": False, "OVER_N": False,
}  # fmt: skip
# the forms of a call: its switches
FORMS: dict[str, dict[str, Any]] = {
    "": {},
    "lengths": {"HAS_LENGTHS": True},
    "causal": {"CAUSAL": True},
    "lengths,dropout": {"HAS_LENGTHS": True, "DROPOUT": True},
    "causal,dropout": {"CAUSAL": True, "DROPOUT": True},
    "gqa,causal": {"CAUSAL": True, "GROUP": 4},
    "padded": {"HAS_LENGTHS": True, "HAS_QUERY_LENGTHS": True, "MASK": 4},
    "padded,dropout": {"HAS_LENGTHS": True, "HAS_QUERY_LENGTHS": True, "MASK": 4, "DROPOUT": True},
    "float key mask": {"MASK": 3},
    "packed": {"VARLEN": True},
    "packed,causal": {"VARLEN": True, "CAUSAL": True},
    "window": {"CAUSAL": True, "WINDOW": True},
    "softcap": {"CAUSAL": True, "SOFTCAP": 1},
    "alibi": {"CAUSAL": True, "ALIBI": True},
    "float mask": {"MASK": 2},
    "bool mask,dropout": {"MASK": 1, "DROPOUT": True},
    "ragged mask": {"MASK": 2, "RAGGED": True},
}
COMMON = ("lengths", "causal", "lengths,dropout", "causal,dropout")  # compiled for all GPUs of a family
POINTERS = ("lengths", "lengths,dropout", "padded,dropout", "packed,causal", "float mask")
SMALL = ("lengths", "causal", "causal,dropout", "padded,dropout", "packed,causal", "float mask")
INTEGERS = ("key_range_ptr", "key_lengths_ptr", "query_lengths_ptr", "cu_q_ptr", "cu_k_ptr")
SUMS = ("lse_ptr", "slopes_ptr", "lse2_ptr", "delta_ptr", "partial_ptr")
REALS = ("scale", "softcap", "keep_scale", "grad_scale", "value_scale", "keep_probability")
BITS = {"fp16": 16, "bf16": 16, "fp32": 32}


def static_cases() -> list[StaticCase]:
    """Forward, dK/dV and dQ by head dim and form; on Hopper with descriptors and pointers, elsewhere with pointers."""
    cases = []
    for kernel in ("forward", "dkdv", "dq"):
        for head_dim in (64, 128):
            cases += _cases(kernel, head_dim, "fp16", FORMS, sm=90, tma=True)
            cases += _cases(kernel, head_dim, "fp16", POINTERS, sm=90, tma=False)
            cases += _cases(kernel, head_dim, "fp16", SMALL, sm=80, tma=False)
        cases += _cases(kernel, 64, "bf16", ("lengths,dropout",), sm=90, tma=True)
        cases += _cases(kernel, 256, "fp16", ("causal", "lengths,dropout"), sm=90, tma=True)
        cases += _cases(kernel, 256, "fp16", ("packed,causal", "padded,dropout"), sm=90, tma=False)
        cases += _cases(kernel, 256, "fp16", ("padded,dropout",), sm=80, tma=False)
        for head_dim in (64, 128):
            cases += _cases(kernel, head_dim, "fp32", ("lengths,dropout",), sm=80, tma=False)
    for head_dim in (64, 128, 256):
        for sm in (80, 90):
            cases += _cases("bias", head_dim, "fp16", ("float mask",), sm=sm, tma=False)
    for head_dim, dtype, form in ((64, "fp16", ""), (128, "bf16", "packed"), (256, "fp16", "padded"), (64, "fp32", "")):
        cases.append(_delta_case(head_dim, dtype, form))
    return [*cases, *(_keys_case(dtype) for dtype in ("bool", "fp16", "fp32"))]


def _delta_case(head_dim: int, dtype: str, form: str) -> StaticCase:
    flags = {**OFF, **FORMS[form]}
    constexprs: dict[str, Any] = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "BLOCK_M": PAD,
        "HAS_GRAD_LSE": dtype == "fp32",
        "HAS_QUERY_LENGTHS": flags["HAS_QUERY_LENGTHS"],
        "VARLEN": flags["VARLEN"],
        "WIDE": False,
    }
    if not flags["VARLEN"]:
        constexprs["stride_ls"] = 1
    return _row_case(
        f"attention.delta[{head_dim},{dtype},{form or 'dense'}]", attention_delta_kernel, dtype, constexprs,
        8 if head_dim >= 64 else 4, 64 * 12 * 512 // PAD, f"B=64 H=12 S=512 D={head_dim}",
    )  # fmt: skip


def _keys_case(dtype: str) -> StaticCase:
    constexprs = {"stride_mn": 1, "BOOL": dtype == "bool", "BLOCK": 1024}
    kind = "u8" if dtype == "bool" else dtype
    return _row_case(
        f"attention.keys[{dtype}]", attention_keys_kernel, kind, constexprs, 4, 64, "B=64 S=512, one row for all heads"
    )


def _row_case(
    name: str, function: Any, dtype: str, constexprs: dict[str, Any], num_warps: int, grid: int, sample: str
) -> StaticCase:
    """A kernel without products, in the one configuration that every GPU runs."""
    signature = {}
    for argument in function.arg_names:
        if argument in constexprs:
            continue
        if argument in (*SUMS, "grad_lse_ptr", "bias_ptr"):
            signature[argument] = "*fp32"
        elif argument in (*INTEGERS, "range_ptr"):
            signature[argument] = "*i32"
        elif argument.endswith("_ptr"):
            signature[argument] = f"*{dtype}"
        else:
            signature[argument] = "fp32" if argument in REALS else "i32"
    aligned = [n for n in signature if n.endswith("_ptr") or n.startswith("stride_") or n == "Sq_pad"]
    return StaticCase(
        name=name,
        kernel=function,
        signature=signature,
        constexprs=constexprs,
        num_warps=num_warps,
        divisible_by_16=tuple(aligned),
        grid=grid,
        sample=sample,
    )


def _cases(kernel: str, head_dim: int, dtype: str, forms: Iterable[str], *, sm: int, tma: bool) -> list[StaticCase]:
    found = []
    for form in forms:
        flags = {**OFF, **FORMS[form]}
        needs = Form(
            tma=tma,
            dropout=flags["DROPOUT"],
            causal=flags["CAUSAL"],
            grouped=flags["GROUP"] > 1,
            packed=flags["VARLEN"],
            keyed=flags["MASK"] >= 3,
            banded=flags["WINDOW"] or flags["ALIBI"],
            scored=bool(flags["SOFTCAP"] or flags["MASK"] in (1, 2)),
        )
        targets: tuple[int, ...] = (sm,)
        if form in COMMON and tma is (sm >= 90):
            targets = (80, 86, 120) if sm < 90 else (90, 100)
        shared: dict[Config, list[int]] = {}  # capabilities by the configuration they run
        for target in targets:
            shared.setdefault(configuration(kernel, head_dim, BITS[dtype] // 8, target, needs), []).append(target)
        for config, own in shared.items():
            parts = {"dk": {"WANT_DV": False}, "dv": {"WANT_DK": False}} if config.split else {kernel: {}}
            for name, part in parts.items():
                found.append(_case(name, KERNELS[kernel], head_dim, dtype, form, flags | part, config, own, tma))
    return found


def _case(
    kernel: str,
    function: Any,
    head_dim: int,
    dtype: str,
    form: str,
    flags: dict[str, Any],
    config: Config,
    targets: list[int],
    tma: bool,
) -> StaticCase:
    flags |= {
        "HEAD_DIM": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "TMA": tma,
        "LAG": config.lag,
        "LEAN": config.lean,
        "ALIGNED_DIAGONAL": config.block_n % config.block_m == 0 and not flags["VARLEN"],
        "stride_mn": 1,
    }
    if not flags["VARLEN"]:
        flags["stride_ls"] = 1
    flags = {name: value for name, value in flags.items() if name in function.arg_names}
    signature: dict[str, str] = {}
    divisible = []
    for name in function.arg_names:
        if name in flags:
            continue
        if name.endswith("_source"):
            rows = config.block_n if name[0] in "kv" else config.block_m
            described = tma and not (name == "o_source" and flags.get("VARLEN"))
            signature[name] = f"tensordesc<{dtype}[1,1,{rows},{flags['BLOCK_D']}]>" if described else f"*{dtype}"
        elif name in SUMS:
            signature[name] = "*fp32"
        elif name in INTEGERS:
            signature[name] = "*i32"
        elif name == "seed_ptr":
            signature[name] = "*i64"
        elif name == "mask_ptr":
            signature[name] = "*fp32" if flags.get("MASK", 0) >= 3 else f"*{dtype}"
        elif name.endswith("_ptr"):
            signature[name] = f"*{dtype}"
        else:
            signature[name] = "fp32" if name in REALS else "i32"
        if (name.endswith(("_ptr", "_source")) and not signature[name].startswith("tensordesc")) or (
            (name.startswith("stride_") and name != "stride_slope") or name == "Sq_pad"
        ):
            divisible.append(name)
    how = "descriptors" if tma else "pointers"
    where = "" if targets[0] == 90 else f",sm_{targets[0]}"
    tiles = 512 // (config.block_n if kernel in ("dkdv", "dk", "dv") else config.block_m)
    return StaticCase(
        name=f"attention.{kernel}[{head_dim},{dtype},{form or 'dense'},{how}{where}]",
        kernel=function,
        signature=signature,
        constexprs=flags,
        num_warps=config.warps,
        num_stages=config.stages,
        options={"enable_fp_fusion": True},
        divisible_by_16=tuple(divisible),
        work_per_thread=config.block_m * config.block_n / (32 * config.warps),
        targets=tuple(targets),
        grid=64 * 12 * tiles,
        sample=f"B=64 H=12 S=512 D={head_dim}",
    )
