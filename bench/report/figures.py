"""PNG and SVG figures for a README, light and dark. Every figure names its machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.stats import LEAST_NOISE

KEYS = ("text", "back", "grid", "win", "loss", "tie")
THEMES = {
    "light": dict(zip(KEYS, ("#1f2328", "#ffffff", "#d1d9e0", "#0a7d4b", "#c62f2f", "#6b7280"), strict=True)),
    "dark": dict(zip(KEYS, ("#e6edf3", "#0d1117", "#30363d", "#3fb97f", "#f07167", "#9aa4b1"), strict=True)),
}
MOST_ROWS = 40


def write(document: dict[str, Any], folder: Path) -> list[Path]:
    """speedup-light.svg, speedup-dark.svg and the same as .png."""
    rows = [row for row in document["rows"] if row.get("vs_best")][:MOST_ROWS]
    if not rows:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    return [
        _speedup(rows, document["env"], folder / f"speedup-{theme}.{kind}", colours)
        for theme, colours in THEMES.items()
        for kind in ("svg", "png")
    ]


def _speedup(rows: list[dict[str, Any]], env: dict[str, Any], path: Path, colours: dict[str, str]) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.3 + 0.3 * len(rows)), facecolor=colours["back"], layout="constrained")
    axes = figure.add_subplot(facecolor=colours["back"])
    axes.axvline(1, color=colours["text"], lw=1)
    for y, row in enumerate(reversed(rows)):
        versus = row["vs_best"]
        noise = row["noise"]["floor"] if row.get("noise") else LEAST_NOISE
        axes.barh(y, 2 * noise, left=1 - noise, height=1, color=colours["grid"], alpha=0.5, lw=0)
        colour = {"FASTER": colours["win"], "SLOWER": colours["loss"]}.get(row["verdict"], colours["tie"])
        axes.plot([versus["lo"], versus["hi"]], [y, y], color=colour, lw=2, solid_capstyle="round")
        axes.plot(versus["ratio"], y, "o", color=colour, ms=6)
    axes.set_yticks(range(len(rows)), [_label(row) for row in reversed(rows)], parse_math=False)
    axes.set_xlabel("speed over the best stock arm (above 1: fastops is faster), 95 % interval; band: noise of the row")
    machine = f"{env.get('machine', 'an unnamed machine')}, torch {env.get('torch', '?')}"
    axes.set_title(machine, loc="left", parse_math=False, fontsize=10, color=colours["text"])
    axes.grid(axis="x", color=colours["grid"], lw=0.6)
    axes.set_axisbelow(True)
    axes.use_sticky_edges = False
    axes.tick_params(colors=colours["text"], length=0, labelsize=9)
    axes.xaxis.label.set_color(colours["text"])
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.savefig(path, dpi=160)
    return path


def _label(row: dict[str, Any]) -> str:
    return f"{row.get('name', row['case'])} {row['dtype']} {row['mode']}"
