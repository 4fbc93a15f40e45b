"""Every arm of every case of the suite, see conftest.py."""

from __future__ import annotations

from typing import Any

import pytest

from bench import stats
from bench.case import Case
from bench.conftest import CLOCK

EXTRA = ("role", "how", "vs_best", "verdict", "tflops", "gbps", "ceiling_pct", "peak_bytes", "launches", "cold_s")


@pytest.mark.benchmark(timer=CLOCK, disable_gc=False)
def test_arm(benchmark: Any, case: Case, arm: str, row: dict[str, Any]) -> None:
    """Right first; then the samples that were measured beside all other arms."""
    provider = row["providers"].get(arm, {})
    if "unavailable" in provider:
        pytest.skip(provider["unavailable"])
    if row["verdict"] == stats.ABSENT and "error" in row:
        pytest.skip(row["error"])
    assert "error" not in row, row["error"]
    assert "error" not in provider, provider["error"]
    assert provider.get("gate") == "pass", provider.get("gate_reason", "not checked")
    assert provider.get("verdict") not in (stats.WRONG, stats.IMPOSSIBLE), provider["gate_reason"]
    benchmark.group = case.id
    if not benchmark.enabled:
        benchmark.pedantic(lambda: None)
        return
    samples = iter(provider["samples_s"])
    for key in EXTRA:
        if provider.get(key) is not None:
            benchmark.extra_info[key] = provider[key]
    benchmark.extra_info |= {"clock": row["clock"], "noise": row.get("noise"), "shape": row["shape"]}
    benchmark.pedantic(lambda: CLOCK.advance(next(samples)), rounds=len(provider["samples_s"]), iterations=1)
