"""Statistics of paired rounds: median of per-round ratios, bootstrap interval, verdict.

Nothing is dropped: an outlier is a sample. The median and its interval are what make one harmless.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from fastops.profiling.paired import LEAST_NOISE, RESOLUTION

FASTER, SLOWER, SAME, UNCLEAR = "FASTER", "SLOWER", "SAME", "UNCLEAR"
WRONG, IMPOSSIBLE = "WRONG", "IMPOSSIBLE"
ABSENT, ERROR = "ABSENT", "ERROR"  # no arm of ours runs here; something broke
GATE = "GATE"  # right, and not timed because only that was asked
VERDICTS = (FASTER, SAME, SLOWER, UNCLEAR, WRONG, IMPOSSIBLE, ABSENT, ERROR)


@dataclass(frozen=True)
class Ratio:
    """How many times faster than the baseline: median of per-round ratios, with its 95 % interval."""

    ratio: float
    lo: float
    hi: float

    @property
    def half_width(self) -> float:
        """Half the width of the interval, relative to the ratio."""
        return (self.hi - self.lo) / 2 / self.ratio

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return {name: float(f"{value:.5g}") for name, value in asdict(self).items()}


def paired_ratio(baseline_s: Sequence[float], arm_s: Sequence[float], resamples: int = 2000) -> Ratio:
    """Speed of an arm over a baseline, from samples taken in the same rounds; above 1 the arm is faster."""
    ratios = np.asarray(baseline_s, dtype=np.float64) / np.asarray(arm_s, dtype=np.float64)
    lo, hi = median_interval(ratios, resamples)
    return Ratio(float(np.median(ratios)), lo, hi)


def median_interval(values: np.ndarray, resamples: int = 2000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the median, with a fixed seed: the same samples give the same interval."""
    random = np.random.default_rng(0)
    medians = np.median(values[random.integers(0, len(values), (resamples, len(values)))], axis=1)
    lo, hi = np.quantile(medians, (0.025, 0.975))
    return float(lo), float(hi)


def noise_floor(control: Ratio | None) -> float:
    """The smallest difference worth the name: what the A/A control shows, and never under 1 %."""
    if control is None:
        return LEAST_NOISE
    return max(LEAST_NOISE, abs(control.lo - 1), abs(control.hi - 1))


def verdict(ratio: Ratio, noise: float) -> str:
    """FASTER or SLOWER beyond the noise, SAME within the resolution, UNCLEAR where the interval does not tell."""
    if ratio.lo > 1 + noise:
        return FASTER
    if ratio.hi < 1 - noise:
        return SLOWER
    if ratio.lo > 1 - RESOLUTION and ratio.hi < 1 + RESOLUTION:
        return SAME
    return UNCLEAR


def best(medians: Mapping[str, float]) -> str | None:
    """The arm with the smallest median."""
    return min(medians, key=lambda name: medians[name]) if medians else None


def geomean(ratios: Sequence[float]) -> float:
    """Geometric mean; NaN of nothing."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else math.nan


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median and the 20th and 80th percentile, in seconds."""
    p20, median, p80 = (float(value) for value in np.quantile(samples, (0.2, 0.5, 0.8)))
    return {"median_s": median, "p20_s": p20, "p80_s": p80}
