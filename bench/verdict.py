"""What the times of a row mean: ratios, rates, and the verdict on fastops' default against the best stock arm."""

from __future__ import annotations

from typing import Any

import torch

from bench import ceilings as roof
from bench import stats
from bench.case import Case, Workload
from bench.results import Row


def judge(
    row: Row, case: Case, workload: Workload, device: torch.device, ceilings: dict[str, Any] | None = None
) -> None:
    """Ratios, verdicts, rates, and the row's headline: fastops' default against the best stock arm."""
    providers = row["providers"]
    timed = {name: p for name, p in providers.items() if p.get("median_s") is not None}
    _rates(row, timed, case, workload, device, ceilings)
    timed = {name: p for name, p in timed.items() if p.get("verdict") != stats.IMPOSSIBLE}
    stock = {name: p["median_s"] for name, p in timed.items() if p["role"] == "stock"}
    best = stats.best(stock)
    if best is None:
        row["error"] = "no stock arm has a time"
    else:
        _compare(row, timed, best, next(iter(stock)))
    row["verdict"], row["vs_best"] = headline(providers)


def _compare(row: Row, timed: dict[str, Row], best: str, first: str) -> None:
    control = next((p for p in timed.values() if p["role"] == "control"), None)
    noise = stats.paired_ratio(timed[first]["samples_s"], control["samples_s"]) if control else None
    floor = stats.noise_floor(noise)
    row["noise"] = {"floor": significant(floor), **(noise.as_dict() if noise else {})}
    for name, provider in timed.items():
        if name != best:
            ratio = stats.paired_ratio(timed[best]["samples_s"], provider["samples_s"])
            provider["vs_best"] = {**ratio.as_dict(), "best": best}
            if provider["role"] == "ours":
                provider["verdict"] = stats.verdict(ratio, floor)
        if name != first:
            ratio = stats.paired_ratio(timed[first]["samples_s"], provider["samples_s"])
            provider["vs_first"] = {**ratio.as_dict(), "first": first}


def headline(providers: dict[str, Row]) -> tuple[str, Row | None]:
    """The verdict of the row: an invalid arm of ours first, else the fastest default arm of ours."""
    ours = {name: p for name, p in providers.items() if p["role"] == "ours"}
    for bad in (stats.IMPOSSIBLE, stats.WRONG):
        if any(p.get("verdict") == bad for p in (providers if bad == stats.IMPOSSIBLE else ours).values()):
            return bad, None
    timed = {name: p["median_s"] for name, p in ours.items() if p.get("vs_best")}
    defaults = {name: seconds for name, seconds in timed.items() if ours[name]["headline"]}
    chosen = stats.best(defaults or timed)
    if chosen is None:
        broken = any("error" in p for p in ours.values()) or not any("unavailable" in p for p in ours.values())
        return (stats.ERROR if broken else stats.ABSENT), None
    return ours[chosen]["verdict"], {**ours[chosen]["vs_best"], "arm": chosen}


def _rates(
    row: Row,
    timed: dict[str, Row],
    case: Case,
    workload: Workload,
    device: torch.device,
    limits: dict[str, Any] | None,
) -> None:
    least = 0.0
    peak = roof.peak_name(case.dtype, tf32_allowed(case.op, case.shape.get("kind", "")))
    if limits:
        floor, bound = roof.floor_seconds(row["flops"], row["bytes"], peak, limits)
        row["floor_s"], row["bound"], row["peak"] = significant(floor), bound, f"{peak}, {limits['source']}"
        if row["clock"] != "host":
            gpu = torch.cuda.get_device_name(device)
            fastest = roof.peak_name(case.dtype, tf32=True)
            least = roof.impossible_below(row["flops"], row["cold_bytes"], workload.algebra(case), fastest, limits, gpu)
    for provider in timed.values():
        seconds = provider["median_s"]
        provider["tflops"] = significant(row["flops"] / seconds / 1e12)
        provider["gbps"] = significant(row["bytes"] / seconds / 1e9)
        if limits:
            provider["ceiling_pct"] = significant(100 * row["floor_s"] / seconds)
        if seconds < least:
            provider["verdict"] = stats.IMPOSSIBLE
            provider["gate_reason"] = f"{seconds:.3g} s is below {least:.3g} s, what this GPU needs at its peak"


def tf32_allowed(op: str, kind: str = "") -> bool:
    """Whether PyTorch may round the fp32 products of an op to TF32; cuDNN has switches of its own, on by default."""
    if op in ("attention", "varlen_attention", "bert") or kind == "layernorm_lstm":
        return torch.backends.cuda.matmul.fp32_precision == "tf32"
    cudnn = torch.backends.cudnn.rnn if op in ("rnn", "lstm_model") else torch.backends.cudnn.conv
    return cudnn.fp32_precision == "tf32"


def significant(value: float) -> float:
    """Six significant digits: more than any clock here has."""
    return float(f"{value:.6g}")
