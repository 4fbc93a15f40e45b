"""Assessments as a table for the terminal, as Markdown and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastops.inspection.assess import Assessment, roofline
from fastops.inspection.gpus import Target
from fastops.inspection.shapes import OpLaunches

# heading, alignment, explanation
COLUMNS = (
    ("kernel", "left", "name of the configuration"),
    ("target", "left", "compute capability, and the GPU where one was named"),
    ("regs", "right", "registers of a thread"),
    ("spills", "right", "bytes of a thread that do not fit in registers (loads + stores), - where none"),
    ("smem KiB", "right", "shared memory of a block, static and dynamic"),
    ("warps", "right", "warps of a block"),
    ("stages", "right", "software pipeline depth"),
    ("blk/SM", "right", "resident blocks of a multiprocessor"),
    ("occ", "right", "occupancy: resident warps of those that could be"),
    ("limited by", "left", "what lets no further block in, and what to save for one more"),
    ("mma", "left", "tensor cores: HMMA (mma.sync), HGMMA (wgmma), UTCMMA (tcgen05)"),
    ("copies", "left", "asynchronous copies: LDGSTS (cp.async), UTMA* (TMA)"),
    ("loop", "right", "instructions of the main loop, and those of them on tensor cores"),
    ("per op", "right", "main-loop instructions of a thread for each of its useful operations"),
    ("waves", "right", "grid / (multiprocessors x blocks)"),
    ("tail", "right", "share of block slots with work, were all blocks equally long"),
    ("floor", "right", "roofline floor of the sample, from the spec sheet: nothing was measured"),
    ("verdict", "left", "fits, or why not; spills and ptxas warnings"),
)
_LIMITS = {"shared memory": "smem", "registers": "regs", "tensor memory": "tmem"}


def cells(assessment: Assessment) -> dict[str, str]:
    """Text of each column; "" where it does not apply."""
    report, found = assessment.report, assessment.occupancy
    texts = dict.fromkeys((heading for heading, _, _ in COLUMNS), "")
    texts |= {"kernel": report.name, "target": assessment.target.label, "verdict": assessment.verdict}
    if not assessment.launched:
        texts["verdict"] += " (not launched there: another configuration is)"
    if found is None:
        return texts
    loop = report.main_loop
    texts |= {
        "regs": str(report.registers),
        "spills": f"{report.spill_bytes}" if report.spill_bytes else ("yes" if report.spills else "-"),
        "smem KiB": f"{report.shared_bytes / 1024:.4g}",
        "warps": str(report.num_warps),
        "stages": str(report.num_stages),
        "blk/SM": str(found.blocks),
        "occ": f"{found.fraction:.0%}",
        "limited by": _limit(assessment),
        "mma": report.tensor_core or "-",
        "copies": " ".join(f"{name} {count}" for name, count in report.async_copies.items()) or "-",
        "loop": "-" if loop is None else f"{loop.length} ({loop.tensor_operations})",
    }
    if report.instructions_per_work is not None:
        texts["per op"] = f"{report.instructions_per_work:.2f}"
    if assessment.waves is not None and found.blocks:
        texts["waves"] = f"{assessment.waves.waves:.2f}"
        texts["tail"] = f"{assessment.waves.tail_efficiency:.0%}"
    if assessment.floor is not None:
        texts["floor"] = f"{duration(assessment.floor.seconds)} {assessment.floor.bound}"
    return texts


def _limit(assessment: Assessment) -> str:
    found = assessment.occupancy
    assert found is not None
    if not found.blocks:
        return "does not fit"
    names = "/".join(_LIMITS.get(name, name) for name in found.limiter.split("/"))
    more = assessment.more
    for name, short in _LIMITS.items():
        more = more.replace(name, short)
    return f"{names} ({more})" if more else names


def floor_note(op: OpLaunches, dtype: str, target: Target) -> str:
    """The roofline floor of a whole op in a sentence."""
    found = roofline(op.flops, op.bytes, dtype, target)
    work = f"{op.bytes / 1e6:,.0f} MB" + ("" if op.flops is None else f", {op.flops / 1e9:,.4g} GFLOP")
    if found is None:
        return f"{op.name} on {target.label}: {work}"
    gpu = target.gpu.name if target.gpu else ""
    return (
        f"{op.name} on {target.label}: {work}; floor {duration(found.seconds)} ({found.bound}), from {gpu}'s spec sheet"
    )


def duration(seconds: float) -> str:
    """A time with three digits and its unit."""
    unit, size = next((each for each in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)) if seconds >= each[1]), ("ns", 1e-9))
    value = seconds / size
    return f"{value:.0f} {unit}" if 999.5 <= value < 1000 else f"{value:.3g} {unit}"  # not 1e+03


def _used(rows: Sequence[dict[str, str]]) -> list[tuple[str, str, str]]:
    return [column for column in COLUMNS if any(row[column[0]] for row in rows)]


def table(assessments: Sequence[Assessment]) -> Any:
    """A rich table, columns without any entry left out."""
    from rich.table import Table
    from rich.text import Text

    rows = [cells(assessment) for assessment in assessments]
    columns = _used(rows)
    made = Table(box=None, pad_edge=False, header_style="bold", row_styles=["", "dim"] if len(rows) > 12 else None)
    for heading, alignment, _ in columns:
        made.add_column(
            heading,
            justify="right" if alignment == "right" else "left",
            overflow="fold",
            no_wrap=heading in ("target", "mma"),
        )
    previous = None
    for assessment, row in zip(assessments, rows, strict=True):
        texts = [Text(row[heading]) for heading, _, _ in columns]
        if row["kernel"] == previous:
            texts[0] = Text("")
        previous = row["kernel"]
        if not assessment.fits:
            texts[-1].stylize("bold red")
        elif assessment.report.spills or assessment.report.warnings:
            texts[-1].stylize("yellow")
        made.add_row(*texts)
    return made


def markdown(assessments: Sequence[Assessment]) -> str:
    """The same table in Markdown, for a pull request or a CI summary."""
    rows = [cells(assessment) for assessment in assessments]
    columns = _used(rows)
    lines = [
        "| " + " | ".join(heading for heading, _, _ in columns) + " |",
        "|" + "|".join(" ---: " if alignment == "right" else " --- " for _, alignment, _ in columns) + "|",
    ]
    for row in rows:
        texts = [row[heading].replace("|", "\\|").replace("*", "\\*") for heading, _, _ in columns]
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def to_json(assessments: Sequence[Assessment], triton: str) -> dict[str, Any]:
    """Everything, machine-readable."""
    return {
        "schema": 1,
        "triton": triton,
        "note": "compiled, not run; floors are from the spec sheet",
        "kernels": [assessment.to_json() for assessment in assessments],
    }
