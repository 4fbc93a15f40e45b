"""The JSON file: written after every row, so that a kill loses nothing measured; read with checks.

Schema 1: {"schema": 1, "env": {...}, "rows": [{"case", "op", "name", "mode", "dtype", "shape", "gate": "pass"|"fail",
"providers": {arm: {"role", "how", "median_s", "samples_s", "vs_best", "verdict", ...}}, "vs_best": {"ratio", "lo",
"hi", "best", "arm"}, "verdict", ...}], "running": case or null}. Times are seconds; ratios above 1 mean faster.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import environment, stats

SCHEMA = 1
RATED = (stats.FASTER, stats.SAME, stats.SLOWER, stats.UNCLEAR)  # the verdicts that come from a ratio
Row = dict[str, Any]


class Unreadable(Exception):
    """Not a result file of this benchmark; the message says which file and why."""


class Results:
    """A result file being written.

    `running` names the case in hand. If the process dies in it, the next `--resume` finds the name, writes a row that
    says so, and does not run that case again.

    With `rows`, those that the file has from an earlier run, the commands of that run stay in the file too.
    """

    def __init__(self, path: Path, env: dict[str, Any], rows: list[Row] | None = None):
        self.path = path
        self.env = env
        if rows is not None and path.exists():
            environment.keep_commands(env, read(path)["env"])
        self.rows: list[Row] = rows or []
        self.running: str | None = None

    def start(self, case: str) -> None:
        """Note on disk that this case is being run."""
        self.running = case
        self.write()

    def append(self, row: Row) -> None:
        """Add a finished row and write the file."""
        self.rows.append(row)
        self.running = None
        self.write()

    def write(self) -> None:
        """Replace the file in one step."""
        document = {"schema": SCHEMA, "env": self.env, "rows": self.rows, "running": self.running}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".part")
        partial.write_text(dump(document), encoding="utf-8")
        os.replace(partial, self.path)


def dump(document: Any) -> str:
    """JSON with one row a line, strict (no NaN)."""
    rows = document.get("rows", [])
    head = {key: value for key, value in document.items() if key != "rows"}
    text = json.dumps(head, allow_nan=False)
    body = ",\n".join(json.dumps(row, allow_nan=False, separators=(",", ":")) for row in rows)
    return f'{text[:-1]},\n"rows": [\n{body}\n]}}\n'


def read(path: str | Path) -> dict[str, Any]:
    """A result file, checked."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise Unreadable(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise Unreadable(f"{path}: not JSON ({error})") from error
    if not isinstance(document, dict) or "schema" not in document or not isinstance(document.get("rows"), list):
        raise Unreadable(f"{path}: JSON, but not a result file of `python -m bench`")
    if document["schema"] != SCHEMA:
        raise Unreadable(f"{path}: schema {document['schema']}, this version reads schema {SCHEMA}")
    if not isinstance(document.get("env"), dict):
        raise Unreadable(f"{path}: the environment is missing")
    if not isinstance(document.get("running"), (str, type(None))):
        raise Unreadable(f"{path}: running is {_short(document['running'])}, not the name of a case")
    if "machine" in document["env"]:
        document["env"]["machine"] = environment.in_words(document["env"]["machine"])
    for index, row in enumerate(document["rows"]):
        missing = {"case", "op", "mode", "dtype", "providers", "verdict"} - set(row if isinstance(row, dict) else ())
        if missing:
            raise Unreadable(f"{path}: row {index} lacks {', '.join(sorted(missing))}")
        problem = _damage(row)
        if problem:
            raise Unreadable(f"{path}: row {index}: {problem}")
    counts = Counter(row["case"] for row in document["rows"])
    twice = [case for case, count in counts.items() if count > 1]
    if twice:  # which of the two counts, nobody could say
        raise Unreadable(f"{path}: more than one row of {', '.join(twice)}")
    return document


def _damage(row: Row) -> str | None:
    """What is wrong with a row that has all its keys: what reads it later relies on all that is asked here."""
    for key in ("case", "op", "name", "mode", "dtype"):
        if not isinstance(row.get(key, ""), str):
            return f"{key} is {_short(row[key])}, not a text"
    verdict, providers = row["verdict"], row["providers"]
    if verdict not in (*stats.VERDICTS, stats.GATE):
        return f"verdict is {_short(verdict)}, none of this benchmark"
    if not isinstance(providers, dict):
        return f"providers is {_short(providers)}, not a table of arms"
    for name, provider in providers.items():
        problem = _damage_of_arm(provider)
        if problem:
            return f"arm {_short(name)}: {problem}"
    noise = row.get("noise")
    if noise and not (isinstance(noise, dict) and _is_number(noise.get("floor"))):
        return f"noise is {_short(noise)}, without a floor"
    versus = row.get("vs_best")
    if versus is None:  # must not go past a gate on ratios as if there were none to judge
        return f"vs_best is missing, and the verdict is {verdict}" if verdict in RATED else None
    if not _is_ratio(versus):
        return f"vs_best is {_short(versus)}, not a ratio with its interval"
    for key in ("arm", "best"):
        name = versus.get(key)
        if not isinstance(name, str) or providers.get(name, {}).get("median_s") is None:
            return f"vs_best names {_short(name)} as its {key}, which is no arm with a time"
    return None


def _damage_of_arm(provider: Any) -> str | None:
    if not isinstance(provider, dict) or not isinstance(provider.get("role"), str):
        return f"{_short(provider)} has no role"
    for key in ("median_s", "cold_s", "tflops", "ceiling_pct", "peak_bytes"):
        if provider.get(key) is not None and not _is_number(provider[key]):
            return f"{key} is {_short(provider[key])}, not a number"
    versus = provider.get("vs_best")
    return (
        None if versus is None or _is_ratio(versus) else f"vs_best is {_short(versus)}, not a ratio with its interval"
    )


def _is_ratio(value: Any) -> bool:
    """A ratio with both ends of its interval, none of them 0: `compare` divides by them."""
    return isinstance(value, dict) and all(_is_number(value.get(k)) and value[k] > 0 for k in ("ratio", "lo", "hi"))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: Any) -> str:
    """A damaged value, short enough for one line."""
    return reprlib.repr(value)


def timed_providers(row: Row, role: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Arms of a row that have a time."""
    for name, provider in row["providers"].items():
        if provider.get("median_s") is not None and role in (None, provider.get("role")):
            yield name, provider


def newest_on_gpu(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The most recent readable result file in a folder that was measured on a GPU."""
    found = []
    for path in folder.glob("*.json"):
        try:
            document = read(path)
        except Unreadable:
            continue
        if document["env"].get("device") == "cuda" and document["rows"]:
            found.append((str(document["env"].get("date", "")), path, document))
    if not found:
        return None
    _, path, document = max(found, key=lambda item: item[:2])
    return path, document
