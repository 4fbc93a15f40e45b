"""The terminal: a table, one line a row as it is measured, and a last line that is the verdict."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench import environment, stats
from fastops.inspection.render import duration

STYLES = {
    stats.FASTER: "bold green",
    stats.SAME: "",
    stats.SLOWER: "bold red",
    stats.UNCLEAR: "yellow",
    stats.WRONG: "bold white on red",
    stats.IMPOSSIBLE: "bold white on red",
    stats.ABSENT: "dim",
    stats.ERROR: "magenta",
}

COLUMNS = (
    ("case", "left"),
    ("mode", "left"),
    ("best stock", "left"),
    ("time", "right"),
    ("fastops", "left"),
    ("time", "right"),
    ("speed of fastops [95 %]", "right"),
    ("noise", "right"),
    ("TFLOP/s", "right"),
    ("% ceiling", "right"),
    ("memory", "right"),
    ("verdict", "left"),
)
ARM_COLUMNS = (
    ("arm", "left"),
    *((name, "right") for name in ("time", "speed", "TFLOP/s", "% ceiling", "memory", "launches", "cold")),
    ("verdict, or why there is no time", "left"),
)


def header(console: Console, env: dict[str, Any], ceilings: dict[str, Any] | None) -> None:
    """The machine, before any number."""
    console.print(environment.one_line(env), style="bold", highlight=False)
    if ceilings:
        rates = ", ".join(
            f"{name} {ceilings[name]:.0f}" for name in ("fp16", "bf16", "tf32", "fp32") if name in ceilings
        )
        console.print(
            f"ceilings ({ceilings['source']}): {rates} TFLOP/s; copy {ceilings['gbps']:.0f} GB/s", style="dim"
        )


def print_rows(console: Console, rows: list[dict[str, Any]], every_arm: bool = False) -> None:
    """One line a case; with `every_arm`, then a table of all arms for each."""
    if not rows:
        return
    print_table(console, COLUMNS, [_cells(row) for row in rows])
    if every_arm:
        for row in rows:
            print_arms(console, row)


def print_table(
    console: Console, columns: tuple[tuple[str, str], ...], rows: list[list[str]], title: str | None = None
) -> None:
    """The columns (name, justification) in which any row has something."""
    kept = filled(rows, len(columns))
    table = Table(title=title, title_justify="left", header_style="bold", pad_edge=False, show_edge=False)
    for index in kept:
        name, justify = columns[index]
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*(row[index] for index in kept))
    console.print(table)


def filled(rows: list[list[str]], columns: int) -> list[int]:
    """Which columns have something in any row (a CPU has no ceiling and counts no memory); all where there is none."""
    return [i for i in range(columns) if not rows or any(row[i] not in ("", "-") for row in rows)]


def _cells(row: dict[str, Any]) -> list[str]:
    versus = row.get("vs_best")
    style = STYLES.get(row["verdict"], "")
    verdict = f"[{style}]{row['verdict']}[/]" if style else row["verdict"]
    case = escape(f"{row['name']} {row['dtype']}")
    if not versus:
        return [case, row["mode"], escape(explain(row)), *[""] * 8, verdict]
    ours, best = row["providers"][versus["arm"]], row["providers"][versus["best"]]
    percent = ours.get("ceiling_pct")
    return [
        case,
        row["mode"],
        escape(versus["best"]),
        duration(best["median_s"]),
        escape(versus["arm"]),
        duration(ours["median_s"]),
        f"{versus['ratio']:.3f}x [{versus['lo']:.3f}-{versus['hi']:.3f}]".replace("[", r"\["),
        f"±{100 * row['noise']['floor']:.1f} %",
        f"{ours['tflops']:.3g}",
        f"{percent:.0f} %" if percent is not None else "-",
        memory(ours.get("peak_bytes"), best.get("peak_bytes")),
        verdict,
    ]


def print_arms(console: Console, row: dict[str, Any]) -> None:
    """Every arm of a case, those without a time with the reason."""
    rows = []
    for name, provider in row["providers"].items():
        versus, percent = provider.get("vs_best"), provider.get("ceiling_pct")
        seconds, cold = provider.get("median_s"), provider.get("cold_s")
        rows.append(
            [
                escape(name),
                duration(seconds) if seconds is not None else "",
                f"{versus['ratio']:.3f}x" if versus else "best" if seconds is not None else "",
                f"{provider['tflops']:.3g}" if seconds is not None else "",
                f"{percent:.0f} %" if percent is not None else "",
                memory(provider.get("peak_bytes"), None) if seconds is not None else "",
                str(provider.get("launches") or ""),
                duration(cold) if cold is not None else "",
                provider.get("verdict", provider["role"]) if seconds is not None else escape(why(provider)),
            ]
        )
    console.print()
    print_table(console, ARM_COLUMNS, rows, escape(row["case"]))


def why(provider: dict[str, Any]) -> str:
    """Why an arm has no time."""
    for key in ("gate_reason", "error", "unavailable"):
        if provider.get(key):
            return str(provider[key])
    return "not timed"


def explain(row: dict[str, Any]) -> str:
    """Why a row has no ratio."""
    if row.get("error"):
        return str(row["error"])
    found = [(name, p) for name, p in row["providers"].items() if p["role"] == "ours" or p.get("verdict")]
    bad = [(n, p) for n, p in found if p.get("verdict") in (stats.WRONG, stats.IMPOSSIBLE) or p.get("error")]
    for name, provider in bad or found:
        return f"{name}: {why(provider)}"
    return "no fastops arm"


def progress_line(row: dict[str, Any]) -> str:
    """One line for a finished case."""
    versus = row.get("vs_best")
    if not versus:
        return (
            f"{row['case']}: {row['verdict']} ({explain(row)})"
            if row["verdict"] != stats.GATE
            else f"{row['case']}: right"
        )
    return (
        f"{row['case']}: {versus['arm']} {versus['ratio']:.3f}x [{versus['lo']:.3f}-{versus['hi']:.3f}] "
        f"of {versus['best']}, {row['verdict']}"
    )


def verdict_line(rows: list[dict[str, Any]], machine: str) -> str:
    """Counts, geometric mean and every loss by name; never a bare maximum."""
    counts = Counter(row["verdict"] for row in rows)
    counted = ", ".join(f"{counts[name]} {name}" for name in (*stats.VERDICTS, stats.GATE) if counts[name])
    mean = stats.geomean([row["vs_best"]["ratio"] for row in rows if row.get("vs_best")])
    line = f"{len(rows)} case{'s' if len(rows) != 1 else ''}: {counted or 'nothing measured'}"
    if not math.isnan(mean):
        line += f"; geometric mean {mean:.3f}x the best stock arm"
    line += f" on {machine}"
    lost = (stats.SLOWER, stats.WRONG, stats.IMPOSSIBLE, stats.ERROR)
    losses = [row["case"] for row in rows if row["verdict"] in lost]
    if losses:
        return f"{line}; losses: {', '.join(losses)}"
    return line if math.isnan(mean) else f"{line}; no losses"


def memory(peak: float | None, other: float | None) -> str:
    """Peak memory, and the difference from another arm's."""
    if peak is None:
        return "-"
    text = f"{peak / 2**20:.0f} MiB"
    if other is not None and peak != other:
        text += f" ({(peak - other) / 2**20:+.0f})"
    return text
