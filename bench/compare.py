"""Gate on ratios measured in the same run: absolute times of two days are not comparable, ratios to stock are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from bench import stats
from bench.results import timed_providers

OK, REGRESSION, INCOMPARABLE, INVALID = 0, 1, 2, 3
SAME_MACHINE = ("machine", "torch", "triton", "cuda", "cudnn", "driver")  # what ratios may depend on
DEFAULT_RULE = "slower:5%"


@dataclass(frozen=True)
class Change:
    """One arm of ours in one case.

    Attributes:
        case: its id.
        arm: which arm.
        before: speed over the best stock arm in A (1 where there is only one file).
        after: the same in B.
        change: after / before.
        lo: lower end of its 95 % interval.
        hi: upper end.
        state: "regressed", "improved", "same", "unclear", "gone", "broken" (an error in place of a time) or a verdict
            that makes a result invalid.
    """

    case: str
    arm: str
    before: float | None
    after: float | None
    change: float | None
    lo: float | None
    hi: float | None
    state: str


@dataclass
class Comparison:
    """All changes, and what cannot be compared."""

    changes: list[Change] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    only_before: list[str] = field(default_factory=list)
    only_after: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """3 invalid, 2 not comparable, 1 regression, 0 ok; the first that holds."""
        states = {change.state for change in self.changes}
        if states & {stats.WRONG, stats.IMPOSSIBLE}:
            return INVALID
        if self.differences or not self.changes:
            return INCOMPARABLE
        return REGRESSION if states & {"regressed", "gone", "broken"} else OK


def parse_rule(text: str) -> float:
    """The tolerated loss of "slower:5%", as a fraction; ValueError otherwise."""
    match = re.fullmatch(r"slower:(\d+(?:\.\d+)?)%", text.strip())
    if not match or not 0 <= float(match.group(1)) < 100:
        raise ValueError(f"--fail {text!r}: expected slower:<percent>%, e.g. {DEFAULT_RULE}")
    return float(match.group(1)) / 100


def within(document: dict[str, Any], tolerated: float) -> Comparison:
    """One file: is any arm of ours slower than the best stock arm of the same run by more than is tolerated?

    Only the arm that a row is judged by counts: an engine that exists but is not the default may be slow.
    """
    found = Comparison()
    for row in document["rows"]:
        invalid = _invalid(row)
        if invalid:
            found.changes.append(invalid)
            continue
        versus = row.get("vs_best")
        if versus is None:
            if row["verdict"] == stats.ERROR:
                found.changes.append(Change(row["case"], "?", None, None, None, None, None, "broken"))
            continue
        state = _state(versus["ratio"], versus["lo"], versus["hi"], tolerated)
        values = (versus["ratio"], versus["ratio"], versus["lo"], versus["hi"])
        found.changes.append(Change(row["case"], versus["arm"], 1.0, *values, state))
    return found


def between(before: dict[str, Any], after: dict[str, Any], tolerated: float, any_machine: bool = False) -> Comparison:
    """Two files: did the speed of any arm of ours over stock fall by more than is tolerated?"""
    found = Comparison()
    if not any_machine:
        for key in SAME_MACHINE:
            old, new = before["env"].get(key), after["env"].get(key)
            if old != new:
                found.differences.append(f"{key}: {old} before, {new} after")
    rows = {row["case"]: row for row in after["rows"]}
    found.only_before = [row["case"] for row in before["rows"] if row["case"] not in rows]
    known = {row["case"] for row in before["rows"]}
    found.only_after = [case for case in rows if case not in known]
    for row in before["rows"]:
        if row["case"] in rows:
            found.changes.extend(_changes(row, rows[row["case"]], tolerated))
    return found


def _changes(before: dict[str, Any], after: dict[str, Any], tolerated: float) -> Iterator[Change]:
    invalid = _invalid(after)
    if invalid:
        yield invalid
        return
    now = dict(timed_providers(after, "ours"))
    for arm, old in timed_providers(before, "ours"):
        if not old.get("vs_best"):
            continue
        a = old["vs_best"]
        if arm not in now or not now[arm].get("vs_best"):
            yield Change(before["case"], arm, a["ratio"], None, None, None, None, "gone")
            continue
        b = now[arm]["vs_best"]
        change, lo, hi = b["ratio"] / a["ratio"], b["lo"] / a["hi"], b["hi"] / a["lo"]
        yield Change(before["case"], arm, a["ratio"], b["ratio"], change, lo, hi, _state(change, lo, hi, tolerated))


def _state(change: float, lo: float, hi: float, tolerated: float) -> str:
    """A regression needs both: the estimate beyond what is tolerated, and the whole interval below 1."""
    if change < 1 - tolerated:
        return "regressed" if hi < 1 else "unclear"
    if change > 1 + tolerated:
        return "improved" if lo > 1 else "unclear"
    return "same"


def _invalid(row: dict[str, Any]) -> Change | None:
    if row["verdict"] not in (stats.WRONG, stats.IMPOSSIBLE):
        return None
    arm = next((name for name, p in row["providers"].items() if p.get("verdict") == row["verdict"]), "?")
    return Change(row["case"], arm, None, None, None, None, None, row["verdict"])
