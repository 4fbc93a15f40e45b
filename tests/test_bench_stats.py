"""The statistics: intervals that cover, verdicts that hold, a stop rule that does not look at the answer."""

import math
import random

import numpy as np
import pytest

from bench import stats
from bench.measure import Effort, measure
from bench.stats import FASTER, SAME, SLOWER, UNCLEAR, Ratio

ROLES = {"eager": "stock", "again": "control", "ours": "ours"}


class NoisyMachine:
    """A clock without time: durations with drift, two machine modes, and heavy-tailed interruptions, all seeded."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.now = 0.0
        self.blocks = 0

    def arm(self, seconds):
        machine = self

        class Arm:
            def block(self, launches):
                machine.blocks += 1
                drift = 1 + 0.15 * math.sin(machine.blocks / 400)
                mode = 1.25 if (machine.blocks // 700) % 2 else 1.0
                took = seconds * drift * mode * machine.random.lognormvariate(0, 0.04)
                if machine.random.random() < 0.2:
                    took += machine.random.expovariate(1 / (3 * seconds))
                machine.now += took * launches
                return took

        return Arm()


def judge(seed, factor):
    machine = NoisyMachine(seed)
    arms = {name: machine.arm(1e-3 * (factor if name == "ours" else 1)) for name in ROLES}
    rounds = measure(arms, dict.fromkeys(arms, 1), Effort(budget_s=8.0), ROLES, now=lambda: machine.now, seed=seed)
    samples = rounds.samples
    noise = stats.noise_floor(stats.paired_ratio(samples["eager"], samples["again"]))
    return stats.verdict(stats.paired_ratio(samples["eager"], samples["ours"]), noise), rounds


@pytest.mark.parametrize(("factor", "expected"), [(1.1, SLOWER), (1.0, SAME), (0.9, FASTER)])
def test_twenty_of_twenty_on_a_noisy_machine(factor, expected):
    assert [judge(seed, factor)[0] for seed in range(20)] == [expected] * 20


def test_sequential_medians_would_be_fooled():
    """What pairing is for: on the same machine, timing one arm after the other is wrong by more than 10 %."""
    machine = NoisyMachine(0)
    first, second = (np.median([machine.arm(1e-3).block(1) for _ in range(700)]) for _ in range(2))
    assert abs(second / first - 1) > 0.1


def test_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(1)
    inside = 0
    for _ in range(300):
        lo, hi = stats.median_interval(generator.lognormal(0, 0.1, 60), 500)
        inside += lo <= 1.0 <= hi
    assert 0.89 <= inside / 300 <= 0.99


def test_same_samples_same_interval():
    values = np.random.default_rng(2).normal(1, 0.1, 50)
    assert stats.median_interval(values) == stats.median_interval(values)


@pytest.mark.parametrize(
    ("ratio", "noise", "expected"),
    [
        (Ratio(1.10, 1.08, 1.12), 0.01, FASTER),
        (Ratio(0.91, 0.90, 0.92), 0.01, SLOWER),
        (Ratio(1.00, 0.99, 1.01), 0.01, SAME),
        (Ratio(1.02, 1.015, 1.025), 0.02, SAME),  # beyond 1, but not beyond the noise
        (Ratio(1.02, 0.95, 1.10), 0.01, UNCLEAR),
        (Ratio(1.10, 1.02, 1.20), 0.05, UNCLEAR),
        (Ratio(0.96, 0.955, 0.965), 0.05, UNCLEAR),  # within the noise, but too far from 1 to promise SAME
    ],
)
def test_verdict(ratio, noise, expected):
    assert stats.verdict(ratio, noise) == expected


def test_noise_floor_is_what_the_control_shows_and_never_nothing():
    assert stats.noise_floor(None) == stats.LEAST_NOISE
    assert stats.noise_floor(Ratio(1.0, 0.999, 1.001)) == stats.LEAST_NOISE
    assert stats.noise_floor(Ratio(1.0, 0.93, 1.01)) == pytest.approx(0.07)


def test_outliers_are_kept_and_harmless():
    samples = [1.0] * 99 + [1000.0]
    assert stats.summary(samples)["median_s"] == 1.0
    machine = NoisyMachine(3)
    arms = {name: machine.arm(1e-3) for name in ROLES}
    rounds = measure(arms, dict.fromkeys(arms, 1), Effort(budget_s=1.0), ROLES, now=lambda: machine.now)
    counts = {len(values) for values in rounds.samples.values()}
    assert len(counts) == 1
    assert machine.blocks == sum(len(values) for values in rounds.samples.values())


def test_every_arm_runs_once_a_round_and_the_order_changes():
    order = []

    class Arm:
        def __init__(self, name):
            self.name = name

        def block(self, launches):
            order.append(self.name)
            return 1.0

    arms = {name: Arm(name) for name in ROLES}
    measure(arms, dict.fromkeys(arms, 1), Effort(max_rounds=24, min_rounds=24, precision=0.0), ROLES)
    rounds = [tuple(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert all(sorted(r) == sorted(ROLES) for r in rounds)
    assert len(set(rounds)) == 6


def test_stops_when_narrow_or_when_time_is_up():
    class Steady:
        def block(self, launches):
            return 1.0

    arms = {name: Steady() for name in ROLES}
    launches = dict.fromkeys(arms, 1)
    rounds = measure(arms, launches, Effort(min_rounds=31, budget_s=100), ROLES)
    assert (rounds.stopped, len(rounds.samples["ours"])) == ("precision", 31)
    ticks = iter(range(10**6))
    late = measure(arms, launches, Effort(min_rounds=31, budget_s=5, patience=1), ROLES, now=lambda: float(next(ticks)))
    assert late.stopped == "budget"
    assert len(late.samples["ours"]) < 31
    endless = measure(arms, launches, Effort(min_rounds=4, max_rounds=9, precision=-1.0), ROLES)
    assert (endless.stopped, len(endless.samples["ours"])) == ("max rounds", 9)


def test_geomean():
    assert stats.geomean([0.5, 2.0]) == pytest.approx(1.0)
    assert math.isnan(stats.geomean([]))
