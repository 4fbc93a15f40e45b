"""The pytest-benchmark front end: `pytest bench/` runs the cases of a suite, one test an arm.

Arms of a case are timed together (paired, in shuffled rounds); each test then replays its own arm's samples on a
virtual clock. So `--benchmark-json`, `--benchmark-compare`, `--benchmark-histogram`, groups and sorting work as their
users expect. `--benchmark-disable` checks correctness only, which is what a CI machine without a GPU can do.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bench import cases, ceilings, environment, measure, stats, table, workloads
from bench.case import Case
from bench.run import Options, run_case

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


class VirtualClock:
    """A timer for pytest-benchmark whose time passes only when a sample is replayed."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


CLOCK = VirtualClock()
ROWS: dict[str, dict[str, Any]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of `python -m bench run` that make sense here."""
    group = parser.getgroup("fastops bench")
    group.addoption("--suite", default="quick", choices=cases.SUITES, help="suite of cases (default quick)")
    group.addoption("--bench-op", action="append", default=[], choices=list(workloads.TABLE), help="only this op")
    group.addoption("--case-budget", type=float, default=None, metavar="SECONDS", help="rounds of one case")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for every arm of every case of the suite."""
    if "arm" not in metafunc.fixturenames:
        return
    suite = metafunc.config.getoption("--suite")
    suite = "cpu" if suite == "quick" and DEVICE.type == "cpu" else suite
    found = [
        pytest.param(case, arm.name, id=f"{case.id}-{arm.name}")
        for case in cases.select(suite, metafunc.config.getoption("--bench-op"))
        for arm in workloads.workload(case.op).arms(case, DEVICE)
    ]
    metafunc.parametrize(("case", "arm"), found)


@pytest.fixture
def row(request: pytest.FixtureRequest, case: Case) -> dict[str, Any]:
    """The measured row of a case; all its arms are measured at its first test."""
    if case.id not in ROWS:
        effort = measure.CPU if DEVICE.type == "cpu" else measure.QUICK
        budget = request.config.getoption("--case-budget")
        if budget:
            effort = replace(effort, budget_s=budget, patience=1.0)
        session = getattr(request.config, "_benchmarksession", None)  # also disabled under xdist
        only_right = session is None or session.disabled
        options = Options(DEVICE, effort, seeds=2, gate_only=only_right, ceilings=ceilings.load(DEVICE))
        ROWS[case.id] = run_case(case, workloads.workload(case.op), options)
    return ROWS[case.id]


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """GPU and versions beside what pytest-benchmark records of the CPU."""
    machine_info["fastops"] = environment.record(DEVICE)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_compare_machine_info(
    config: pytest.Config, benchmarksession: Any, machine_info: dict[str, Any], compared_benchmark: dict[str, Any]
) -> None:
    """Refuse to compare times of two machines; pytest-benchmark files its runs by operating system only."""
    before = compared_benchmark.get("machine_info", {}).get("fastops", {}).get("machine")
    now = environment.machine(DEVICE)
    if before != now:
        raise pytest.UsageError(f"the stored run is from {before}, this is {now}: times cannot be compared")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table of ratios, which pytest-benchmark's own cannot show."""
    if not ROWS:
        return
    from bench.cli.common import console

    terminalreporter.section("fastops against the best stock arm")
    rows = list(ROWS.values())
    table.print_rows(console(), [row for row in rows if row["verdict"] != stats.GATE])
    terminalreporter.write_line(table.verdict_line(rows, environment.machine(DEVICE)))
