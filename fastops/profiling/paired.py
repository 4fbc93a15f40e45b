"""Before and after, measured side by side: rounds of both arms in turn, the ratio of each round, its interval."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastops.profiling.capture import synchronize

LEAST_NOISE = 0.01  # no clock here tells 1 % apart for certain, however narrow its interval
RESAMPLES = 2000  # of the bootstrap
RESOLUTION = 0.03  # SAME promises that a difference, if any, is smaller than this


@dataclass
class Comparison:
    """How many times faster `after` is: median of the per-round ratios, with a 95 % bootstrap interval."""

    ratio: float
    low: float
    high: float
    before_ms: float
    after_ms: float
    rounds: int

    @property
    def verdict(self) -> str:
        """FASTER or SLOWER where the interval lies beyond 1 %, SAME where it lies within 3 %, else UNCLEAR."""
        if self.low > 1 + LEAST_NOISE:
            return "FASTER"
        if self.high < 1 - LEAST_NOISE:
            return "SLOWER"
        return "SAME" if self.low > 1 - RESOLUTION and self.high < 1 + RESOLUTION else "UNCLEAR"

    def __str__(self) -> str:
        return (
            f"{self.ratio:.2f}x [{self.low:.2f}, {self.high:.2f}] {self.verdict}: "
            f"{self.before_ms:.3f} ms before, {self.after_ms:.3f} ms after, {self.rounds} paired rounds"
        )


def compare(
    step: Callable[[], object], switch: Callable[[bool], object], *, rounds: int = 15, warmup: int = 2
) -> Comparison:
    """Time a step before and after a change, in alternating order; only the step is timed.

    Args:
        step: one step, which may launch GPU work.
        switch: makes the change (True) or takes it back (False); it is taken back at the end.
        rounds: pairs to measure.
        warmup: untimed steps of each arm at the start; later one follows each switch.
    """
    pairs = []
    try:
        for index in range(rounds + 1):
            seconds = {}
            for changed in (False, True) if index % 2 else (True, False):
                switch(changed)
                for _ in range(1 if index else max(1, warmup)):
                    step()
                seconds[changed] = _seconds(step)
            if index:  # the first round warms up
                pairs.append((seconds[False], seconds[True]))
    finally:
        switch(False)
    return from_pairs(pairs)


def from_pairs(pairs: Sequence[tuple[float, float]], *, seed: int = 0) -> Comparison:
    """The comparison for measured (before, after) seconds, one pair a round."""
    if not pairs:
        raise ValueError("no rounds were measured")
    ratios = [before / after for before, after in pairs]
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    return Comparison(
        statistics.median(ratios),
        medians[int(0.025 * RESAMPLES)],
        medians[int(0.975 * RESAMPLES) - 1],
        1e3 * statistics.median(before for before, _ in pairs),
        1e3 * statistics.median(after for _, after in pairs),
        len(pairs),
    )


def _seconds(step: Callable[[], object]) -> float:
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - start
