"""Rounds: every arm once per round, in shuffled order, until the intervals are narrow or time is up."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from bench import stats
from bench.clocks import Timed


@dataclass(frozen=True)
class Effort:
    """How long to measure one case.

    Attributes:
        precision: stop when every interval that a verdict rests on has at most this relative half width.
        budget_s: after this many seconds, `enough` will do.
        enough: the half width that still tells SAME from 3 % off.
        patience: stop after this many budgets, however wide the intervals.
        min_rounds: never judge fewer rounds than this, unless the budget is spent.
        max_rounds: never take more.
        block_s: about how long one arm runs per round.
    """

    budget_s: float = 8.0
    precision: float = 0.005
    enough: float = 0.012
    patience: float = 2.0
    min_rounds: int = 31
    max_rounds: int = 2000
    block_s: float = 1e-3

    def within(self, seconds: float) -> Effort:
        """The same, but done after about this long."""
        budget = min(self.budget_s, seconds)
        return replace(self, budget_s=budget, patience=max(1.0, min(self.patience, seconds / max(budget, 1e-9))))


QUICK = Effort(budget_s=1.5, max_rounds=400, patience=1.5)
NORMAL = Effort(budget_s=4.0)
# far shorter than a scheduler's time slice: on a busy machine most blocks run undisturbed, and the median finds those
# (a true 1.10 was found in 8 of 8 runs with blocks of 0.5 ms, in 1 of 8 with blocks of 2 ms: two cores, load 4)
CPU = Effort(budget_s=8.0, patience=5.0, max_rounds=10000, block_s=5e-4)


@dataclass
class Rounds:
    """Seconds per launch of every arm in every round, in the order of the rounds."""

    samples: dict[str, list[float]]
    stopped: str  # "precision", "budget" or "max rounds"
    seconds: float


def measure(
    arms: Mapping[str, Timed],
    launches: Mapping[str, int],
    effort: Effort,
    roles: Mapping[str, str],
    now: Callable[[], float] = time.perf_counter,
    seed: int = 0,
    after_round: Callable[[int], None] = lambda count: None,
) -> Rounds:
    """Time all arms together.

    The stop rule looks at the width of the intervals only, never at which side of 1 they lie: a rule that stops when
    it likes the answer finds answers it likes.
    """
    shuffle = random.Random(seed).shuffle
    samples: dict[str, list[float]] = {name: [] for name in arms}
    order = list(arms)
    start = now()
    next_look = effort.min_rounds
    for count in range(1, effort.max_rounds + 1):
        shuffle(order)
        for name in order:
            samples[name].append(arms[name].block(launches[name]))
        after_round(count)
        spent = now() - start
        if spent > effort.budget_s * effort.patience:
            return Rounds(samples, "budget", spent)
        if count >= next_look:
            if narrow(samples, roles, effort.precision):
                return Rounds(samples, "precision", spent)
            if spent > effort.budget_s and narrow(samples, roles, effort.enough):
                return Rounds(samples, "budget", spent)
            next_look = count + max(8, count // 6)
    return Rounds(samples, "max rounds", now() - start)


def narrow(samples: Mapping[str, list[float]], roles: Mapping[str, str], precision: float) -> bool:
    """Whether every arm that is judged, and the control, has a narrow interval against its baseline."""
    medians = {name: stats.summary(values)["median_s"] for name, values in samples.items()}
    best = stats.best({name: medians[name] for name in samples if roles[name] == "stock"})
    if best is None:
        return True
    first = next(name for name in samples if roles[name] == "stock")
    for name, values in samples.items():
        if roles[name] == "stock":
            continue
        baseline = samples[first if roles[name] == "control" else best]
        if stats.paired_ratio(baseline, values, resamples=300).half_width > precision:
            return False
    return True
