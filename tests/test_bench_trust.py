"""Real arms, real time, whatever else this machine is doing: 1.10x slower is SLOWER, the same is SAME."""

from collections import Counter

import pytest

from bench import stats
from bench.case import Case
from bench.measure import CPU, Effort
from tests.bench_workload import honest, ours, run

CASE = Case("toy", "toy", "fp32", "infer", {"size": 96}, ("cpu",))
WORK = 10  # products an honest arm computes; one more makes it 1.10 times slower


def race(effort):
    row = run(ours("same", honest(WORK)), ours("slower", honest(WORK + 1)), case=CASE, effort=effort, repeats=WORK)
    return {name: row["providers"][name]["verdict"] for name in ("same", "slower")}


@pytest.mark.slow
def test_twenty_of_twenty():
    found = Counter(tuple(race(CPU).items()) for _ in range(20))
    assert found == {(("same", stats.SAME), ("slower", stats.SLOWER)): 20}


def test_never_the_opposite():
    """The short version: with a tenth of the time a verdict may be UNCLEAR, but not wrong."""
    found = race(Effort(budget_s=1.0, patience=1.0, block_s=CPU.block_s))
    assert found["same"] in (stats.SAME, stats.UNCLEAR)
    assert found["slower"] in (stats.SLOWER, stats.UNCLEAR)
