"""One offline page: the data as JSON inside a template that draws it. No text from the data becomes markup."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench import environment, stats, table

TEMPLATE = Path(__file__).with_name("page.html")
MOST_BYTES = 1_000_000
PLACE = "/*DATA*/null"
MOST_TELEMETRY = 1500


def write(document: dict[str, Any], path: Path) -> None:
    """Render into a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(document), encoding="utf-8")


def render(document: dict[str, Any]) -> str:
    """The page, under 1 MB. Samples are left out from the longest on where they would not fit, and the page says so."""
    template = TEMPLATE.read_text(encoding="utf-8")
    room = MOST_BYTES - len(template.encode())
    rows, left_out = [dict(row) for row in document["rows"]], 0
    data = {"document": {**document, "rows": rows, "env": _thin(document["env"])}, **_texts(document)}
    text = script_json(data)
    if len(text.encode()) > room:
        left_out = sum(len(p.get("samples_s", ())) for row in rows for p in row["providers"].values())
        for row in rows:
            row["providers"] = {
                name: {key: value for key, value in provider.items() if key != "samples_s"}
                for name, provider in row["providers"].items()
            }
        text = script_json({**data, "left_out": left_out})
    while len(text.encode()) > room and rows:
        del rows[len(rows) * 3 // 4 :]
        text = script_json({**data, "left_out": left_out, "cut": len(document["rows"]) - len(rows)})
    return template.replace(PLACE, text)


def script_json(data: Any) -> str:
    """JSON that cannot end its script element or start a comment in it."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026").replace("\u2028", "\\u2028")


def _texts(document: dict[str, Any]) -> dict[str, Any]:
    env = document["env"]
    return {
        "verdict": table.verdict_line(document["rows"], env.get("machine", "an unnamed machine")),
        "machine": environment.one_line(env),
        "why": {row["case"]: table.explain(row) for row in document["rows"] if not row.get("vs_best")},
        "least_noise": stats.LEAST_NOISE,
        "left_out": 0,
        "cut": 0,
    }


def _thin(env: dict[str, Any]) -> dict[str, Any]:
    """Every k-th telemetry sample, where there are too many to draw."""
    samples = env.get("telemetry")
    if not isinstance(samples, list) or len(samples) <= MOST_TELEMETRY:
        return env
    return {**env, "telemetry": samples[:: len(samples) // MOST_TELEMETRY + 1]}
