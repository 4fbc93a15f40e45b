"""The profile as one offline HTML file: icicle of the modules, busy strip, tables, advice. No network, no libraries."""

from __future__ import annotations

import dataclasses
import html
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from fastops.profiling.advice import Advice
from fastops.profiling.summary import ModuleRow, Summary
from fastops.profiling.table import owners

MOST_LEVELS = 40  # deeper modules are in the table

STYLE = """
:root{--ink:#1c2430;--dim:#5b6675;--page:#fbfbfa;--card:#fff;--line:#dfe3e8;--accent:#1f6feb;--busy:#2e9d62;--idle:#e6e9ee}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ee;--dim:#98a3b3;--page:#12161c;--card:#1a2029;--line:#303947;
--accent:#6ea8fe;--busy:#4fc487;--idle:#2a323e}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);margin:0}
main{max-width:1180px;margin:0 auto;padding:24px 20px 60px}
h1{font-size:24px;margin:0 0 4px}h2{font-size:17px;margin:34px 0 10px}
p.dim,td.dim,.note{color:var(--dim)}
.cards{display:flex;flex-wrap:wrap;gap:12px}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 16px;min-width:110px}
.card b{display:block;font-size:20px}.card span{color:var(--dim);font-size:13px}
.verdict{border-left:4px solid var(--accent);padding:8px 14px;background:var(--card);margin:16px 0}
table{border-collapse:collapse;width:100%;font-size:13.5px;background:var(--card)}
th,td{padding:4px 9px;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th{cursor:pointer;position:sticky;top:0;background:var(--card)}
th:first-child,td:first-child,td.text,th.text{text-align:left}td.text{white-space:normal;min-width:9em}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:8px}
.advice{display:grid;grid-template-columns:repeat(auto-fit,minmax(320px,1fr));gap:12px}
.advice .card code{display:block;background:var(--page);padding:6px 9px;border-radius:5px;margin-top:8px;
overflow-x:auto}
svg{display:block;width:100%;background:var(--card);border:1px solid var(--line);border-radius:8px}
svg text{font:12px system-ui,sans-serif;fill:#10151c;pointer-events:none}
rect.module{stroke:var(--card);stroke-width:1}rect.module:hover{filter:brightness(1.12)}
#tip{position:fixed;pointer-events:none;background:var(--ink);color:var(--page);padding:5px 9px;border-radius:5px;
font-size:12.5px;display:none;max-width:460px;white-space:pre-line}
"""

SCRIPT = """
for (const table of document.querySelectorAll('table.sortable')) {
  table.querySelectorAll('th').forEach((head, column) => head.addEventListener('click', () => {
    const body = table.tBodies[0], down = head.dataset.down !== '1';
    table.querySelectorAll('th').forEach(other => delete other.dataset.down);
    head.dataset.down = down ? '1' : '0';
    const key = row => { const cell = row.cells[column]; const n = parseFloat(cell.dataset.value ?? cell.textContent);
      return isNaN(n) ? cell.textContent : n; };
    [...body.rows].sort((a, b) => { const x = key(a), y = key(b);
      const order = typeof x === 'number' && typeof y === 'number' ? x - y : String(x).localeCompare(String(y));
      return down ? -order : order; }).forEach(row => body.append(row));
  }));
}
const tip = document.getElementById('tip');
document.addEventListener('mousemove', event => {
  const text = event.target.dataset && event.target.dataset.tip;
  tip.style.display = text ? 'block' : 'none';
  if (text) { tip.textContent = text;
    tip.style.left = Math.min(event.clientX + 14, innerWidth - 300) + 'px'; tip.style.top = event.clientY + 14 + 'px'; }
});
document.getElementById('save').addEventListener('click', () => {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([document.getElementById('data').textContent], {type: 'application/json'}));
  link.download = 'profile.json'; link.click();
});
"""


def page(
    title: str, summary: Summary, advice: Sequence[Advice], machine: Mapping[str, Any], applied: str | None
) -> str:
    """The whole file as a string."""
    on_gpu = summary.step.source == "kernels"
    sections = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="dim">{_text(_machine_line(machine))}</p>',
        _cards(summary),
        f'<div class="verdict">{_text(summary.step.verdict)}</div>',
        *(f'<p class="note">note: {_text(note)}</p>' for note in summary.notes),
        *([f'<div class="verdict">applied and measured, whole step: {_text(applied)}</div>'] if applied else []),
        "<h2>Modules by time</h2>",
        icicle(summary.modules),
        *(
            [f"<h2>{'GPU' if on_gpu else 'Host'} busy (colour) and idle over the profiled steps</h2>", strip(summary)]
            if summary.strip
            else []
        ),
        "<h2>Advice</h2>",
        _advice(advice, summary),
        "<h2>Modules</h2>",
        _modules(summary),
        f"<h2>{'Kernels' if on_gpu else 'Operators, self time'}</h2>",
        _kernels(summary, on_gpu),
        '<p><button id="save">Save the data as JSON</button></p>',
    ]
    data = json.dumps({"machine": machine, **as_data(summary, advice)}).replace("<", "\\u003c")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{_text(title)}</title><style>{STYLE}</style></head><body><main>{''.join(sections)}</main>"
        f'<div id="tip"></div><script id="data" type="application/json">{data}</script><script>{SCRIPT}</script>'
        "</body></html>"
    )


def as_data(summary: Summary, advice: Sequence[Advice]) -> dict[str, Any]:
    """The profile as JSON-able data."""
    step = {
        **dataclasses.asdict(summary.step),
        "busy_percent": summary.step.busy_percent,
        "verdict": summary.step.verdict,
    }
    return {
        "schema": 1,
        "step": step,
        "modules": [
            {**dataclasses.asdict(row), "ceiling_percent": row.ceiling_percent, "bound_by": row.bound_by}
            for row in summary.modules
        ],
        "kernels": [dataclasses.asdict(row) for row in summary.kernels],
        "advice": [dataclasses.asdict(item) for item in advice],
        "notes": summary.notes,
    }


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _machine_line(machine: Mapping[str, Any]) -> str:
    gpus = ", ".join(gpu["name"] for gpu in machine.get("gpus", [])) or "no GPU"
    return f"{gpus} | torch {machine.get('torch')} | triton {machine.get('triton')} | fastops {machine.get('fastops')}"


def _cards(summary: Summary) -> str:
    step = summary.step
    figures = [(f"{step.wall_ms:.3f} ms", f"per step, average of {step.steps}")]
    if step.source == "kernels":
        figures += [
            (f"{step.busy_percent:.0f} %", "GPU busy"),
            (f"{step.idle_micro_ms:.3f} ms", "idle in pauses under 10 us"),
            (f"{step.idle_macro_ms:.3f} ms", "idle in longer pauses"),
            (f"{step.launches:.0f}", "launches per step"),
        ]
    figures.append(
        (
            f"{step.attributed_percent:.1f} %",
            f"of the {'GPU' if step.device == 'cuda' else 'operator'} time has an owner",
        )
    )
    cards = "".join(f'<div class="card"><b>{_text(a)}</b><span>{_text(b)}</span></div>' for a, b in figures)
    return f'<div class="cards">{cards}</div>'


def icicle(rows: Sequence[ModuleRow]) -> str:
    """Nested bars: width is time with children, a level down is a child."""
    width, height = 1140.0, 24
    known = {row.path: row for row in rows}
    roots = [row for row in rows if "." not in row.path or row.path.rpartition(".")[0] not in known]
    children: dict[str, list[ModuleRow]] = defaultdict(list)
    for row in rows:
        children[row.path.rpartition(".")[0]].append(row)
    total = sum(row.total_ms for row in roots) or 1.0
    bars: list[str] = []
    deepest = 0

    def draw(row: ModuleRow, left: float, level: int, span: float) -> None:
        nonlocal deepest
        if span < 0.5 or level >= MOST_LEVELS:
            return
        deepest = max(deepest, level)
        hue = sum(map(ord, row.kind or row.path)) * 37 % 360
        tip = (
            f"{row.path} ({row.kind})\n{row.total_ms:.3f} ms, {row.percent:.1f} %\n"
            f"forward {row.forward_ms:.3f} ms, backward {row.backward_ms:.3f} ms"
        )
        y = level * height
        bars.append(
            f'<rect class="module" x="{left:.1f}" y="{y}" width="{span:.1f}" height="{height - 1}" rx="2" '
            f'fill="hsl({hue} 55% 70%)" data-tip="{_text(tip)}"/>'
        )
        name = row.path.rpartition(".")[2]
        # a colon, because names are numbers too: "3 5 %" reads as 35 %
        share = f"{row.percent:.0f} %"
        labels = (f"{f'{name} {row.kind}'.rstrip()}: {share}", f"{name}: {share}", name)
        label = next((label for label in labels if len(label) <= (span - 8) / 6.6), None)
        if label:
            bars.append(f'<text x="{left + 5:.1f}" y="{y + 16}">{_text(label)}</text>')
        at = left
        for child in children[row.path]:
            child_span = span * child.total_ms / row.total_ms if row.total_ms else 0.0
            draw(child, at, level + 1, child_span)
            at += child_span

    at = 0.0
    for row in roots:
        span = width * row.total_ms / total
        draw(row, at, 0, span)
        at += span
    return f'<svg viewBox="0 0 {width:.0f} {(deepest + 1) * height}" role="img">{"".join(bars)}</svg>'


def strip(summary: Summary) -> str:
    """One bar over the profiled time: where something ran."""
    width, total = 1140.0, summary.step.wall_ms * summary.step.steps or 1.0
    columns = [0.0] * int(width)
    for start, stop in summary.strip:
        first, last = start / total * width, stop / total * width
        for column in range(max(0, int(first)), min(int(width), int(last) + 1)):
            columns[column] += max(0.0, min(last, column + 1) - max(first, column))
    bars = "".join(
        f'<rect x="{i}" y="0" width="1" height="28" fill="var(--busy)" fill-opacity="{min(1.0, share):.2f}"/>'
        for i, share in enumerate(columns)
        if share > 0.01
    )
    dim = 'y="46" style="fill:var(--dim)"'
    return (
        f'<svg viewBox="0 0 {width:.0f} 52" shape-rendering="crispEdges">'
        f'<rect width="{width:.0f}" height="28" fill="var(--idle)"/>{bars}'
        f'<text x="2" {dim}>0</text><text x="{width - 90}" {dim}>{total:.1f} ms</text></svg>'
    )


def _advice(advice: Sequence[Advice], summary: Summary) -> str:
    if not advice:
        return '<p class="dim">None: nothing here that fastops knows how to make faster.</p>'
    cards = "".join(
        f'<div class="card"><b>{_text(item.what)}</b>{_text(item.why)}<br>'
        f"<span>saves {_text(item.saving(summary.step.wall_ms))}, confidence {_text(item.confidence)}</span>"
        f"<code>{_text(item.edit)}</code></div>"
        for item in advice
    )
    return f'<div class="advice">{cards}</div>'


def _table(heads: Sequence[str], rows: Sequence[Sequence[tuple[str, float | None]]]) -> str:
    words = {"module", "class", "name", "for module", "bound by"}
    head = "".join(f'<th class="{"text" if name in words else ""}">{_text(name)}</th>' for name in heads)
    body = []
    for row in rows:
        cells = []
        for shown, value in row:
            attribute = 'class="text"' if value is None else f'data-value="{value}"'
            # a line may end after a dot or :: of a name, never within a word
            text = _text(shown) if value is not None else re.sub(r"(\.|::)", r"\1<wbr>", _text(shown))
            cells.append(f"<td {attribute}>{text}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    table = f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
    return f'<div class="scroll"><table class="sortable">{table}</table></div>'


def _number(value: float | None, form: str = ".3f") -> tuple[str, float]:
    return (format(value, form), float(value)) if value else ("", 0.0)


def _modules(summary: Summary) -> str:
    on_gpu = summary.step.device == "cuda"
    rows = [
        [
            (row.path, None),
            (row.kind, None),
            _number(row.forward_ms),
            _number(row.backward_ms),
            _number(row.total_ms),
            _number(row.percent, ".1f"),
            _number(row.own_ms),
            _number(row.calls, ".0f"),
            _number(row.tflops_per_s * (1 if on_gpu else 1e3), ".1f"),
            _number(row.gb_per_s, ".1f"),
            *([_number(row.ceiling_percent, ".0f"), (row.bound_by, None)] if summary.step.ceilings else []),
        ]
        for row in summary.modules
    ]
    times = ("forward ms", "backward ms", "total ms", "%", "own ms", "calls")
    heads = ["module", "class", *times, "TFLOP/s" if on_gpu else "GFLOP/s", "GB/s >="]
    if summary.step.ceilings:
        heads += ["% of ceiling", "bound by"]
        where = f'<p class="dim">Ceilings of {_text(summary.step.ceilings)}.</p>'
    else:
        where = ""
    return where + _table(heads, rows)


def _kernels(summary: Summary, on_gpu: bool) -> str:
    heads = ["name", "calls", "total ms", "%", "average us"]
    if on_gpu:
        heads += ["registers", "shared B", "occupancy %"]
    rows = []
    for row in summary.kernels[:200]:
        cells: list[tuple[str, float | None]] = [
            (row.name, None),
            _number(row.calls, ".0f"),
            _number(row.total_ms),
            _number(row.percent, ".1f"),
            _number(row.average_us, ".1f"),
        ]
        if on_gpu:
            cells += [_number(value, ".0f") for value in (row.registers, row.shared_bytes, row.occupancy_percent)]
        rows.append([*cells, (owners(row), None)])
    return _table([*heads, "for module"], rows)
