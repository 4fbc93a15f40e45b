"""Markdown for pull requests and job summaries."""

from __future__ import annotations

from typing import Any

from bench import environment, table
from fastops.inspection.render import duration

COLUMNS = ("case", "mode", "best stock", "time", "fastops", "time", "speed of fastops [95 %]", "% ceiling", "verdict")
RULES = ("---", "---", "---", "---:", "---", "---:", "---:", "---:", "---")


def render(document: dict[str, Any]) -> str:
    """The verdict, the machine and one line a case."""
    env, rows = document["env"], document["rows"]
    lines = [
        f"**{_cell(table.verdict_line(rows, env.get('machine', 'an unnamed machine')))}**",
        "",
        f"{_cell(environment.one_line(env))}; {env.get('date', 'no date')}, commit {env.get('commit') or 'unknown'}"
        + (" with local changes" if env.get("dirty") else ""),
        "",
    ]
    table_rows = [_row(row) for row in rows]
    kept = table.filled(table_rows, len(COLUMNS))
    lines += [f"| {' | '.join(COLUMNS[i] for i in kept)} |", f"|{'|'.join(RULES[i] for i in kept)}|"]
    lines += [f"| {' | '.join(_cell(cells[i]) for i in kept)} |" for cells in table_rows]
    return "\n".join(lines) + "\n"


def _row(row: dict[str, Any]) -> list[str]:
    name = f"{row.get('name', row['case'])} {row['dtype']}"
    versus = row.get("vs_best")
    if not versus:
        return [name, row["mode"], table.explain(row), "", "", "", "", "", row["verdict"]]
    ours, best = row["providers"][versus["arm"]], row["providers"][versus["best"]]
    percent = ours.get("ceiling_pct")
    return [
        name,
        row["mode"],
        versus["best"],
        duration(best["median_s"]),
        versus["arm"],
        duration(ours["median_s"]),
        f"{versus['ratio']:.3f}x [{versus['lo']:.3f}-{versus['hi']:.3f}]",
        f"{percent:.0f} %" if percent is not None else "-",
        row["verdict"],
    ]


def _cell(text: str) -> str:
    """Text that stays in its cell."""
    for character, escaped in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("\n", " "), ("\r", " ")):
        text = text.replace(character, escaped)
    return text
