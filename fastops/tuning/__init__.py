"""Which engine wins where: data, one JSON file an op, and its one reader.

A file holds rows, tried in order; the first whose conditions all hold names the engine:

    {"op": "lstm", "rows": [
        {"engine": "persistent", "mark": "estimated", "why": "cuDNN runs per-step kernels for bf16",
         "when": {"dtype": ["bfloat16"], "hidden": {"min": 193, "max": 1024, "multiple_of": 16}}},
        {"engine": "torch", "mark": "measured on NVIDIA H100 80GB HBM3, commit abc1234", "when": {}}]}

A condition is a value, a list of values, or a range with any of "min", "max", "multiple_of". `gpu` is a fact like any
other. Each row is marked "estimated", or "measured on <GPU>, commit <hash>".
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Condition = Any


@dataclass(frozen=True)
class Row:
    """One rule of a table."""

    engine: str
    mark: str
    why: str
    when: tuple[tuple[str, Condition], ...]

    def matches(self, facts: dict[str, Any]) -> bool:
        """Whether all conditions hold for these facts. A fact that is missing matches no condition on it."""
        return all(name in facts and _holds(condition, facts[name]) for name, condition in self.when)


def _holds(condition: Condition, value: Any) -> bool:
    if isinstance(condition, dict):
        if "min" in condition and value < condition["min"]:
            return False
        if "max" in condition and value > condition["max"]:
            return False
        return not ("multiple_of" in condition and value % condition["multiple_of"])
    if isinstance(condition, list):
        return value in condition
    return bool(value == condition)


STOCK = Row("torch", "no table", "no row of the tuning table matches", ())


def load(op: str, folder: Path | None = None) -> tuple[Row, ...]:
    """The rows for an op, read once when its module is imported. An unreadable file warns and means stock PyTorch."""
    path = (folder or Path(__file__).parent) / f"{op}.json"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return tuple(
            Row(row["engine"], row["mark"], row.get("why", ""), tuple(map(_checked, sorted(row["when"].items()))))
            for row in rows
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"fastops: tuning table {path} is unreadable ({error!r}); {op} runs stock PyTorch", stacklevel=2)
        return ()


def _checked(item: tuple[str, Condition]) -> tuple[str, Condition]:
    """A condition as it is; a range that is none would be noticed by a call on a GPU only, or by nobody."""
    name, condition = item
    if isinstance(condition, dict):
        for bound, number in condition.items():
            bounds = number >= 1 if bound == "multiple_of" else bound in ("min", "max")
            if type(number) is not int or not bounds:
                raise ValueError(f"{name}: {bound} {number!r} bounds nothing")
    return item


def explained(op: str, example: str, row: Row) -> dict[str, str]:
    """One line of `fastops env`: what a row says of an example."""
    return {"op": op, "example": example, "engine": row.engine, "why": f"{row.why} ({row.mark})"}


def choose(rows: tuple[Row, ...], facts: dict[str, Any]) -> Row:
    """The first row that matches; stock PyTorch where none does."""
    for row in rows:
        if row.matches(facts):
            return row
    return STOCK
