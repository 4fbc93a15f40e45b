"""Runs a suite: one case after another into one JSON file, with a budget, resuming and a progress bar."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import environment, stats, table
from bench import workloads as ops
from bench.case import Case
from bench.results import Results, read
from bench.run import Options, fatal, run_case
from bench.telemetry import Telemetry, summarise

EXIT_OK, EXIT_INVALID = 0, 3
EXIT_BROKEN = 4  # the CUDA context is gone: run again with --resume


def run_suite(
    cases: Sequence[Case],
    options: Options,
    path: Path,
    console: Console,
    suite: str,
    resume: bool = False,
    budget_s: float | None = None,
) -> tuple[Results, list[dict[str, Any]]]:
    """Run the cases that the file does not have yet. Returns the file and the rows of these cases."""
    results = _open(path, options, suite, resume)
    done = {row["case"] for row in results.rows}
    todo = [case for case in cases if case.id not in done]
    if resume and done:
        console.print(f"{path}: {len(cases) - len(todo)} of {len(cases)} cases are there already", style="dim")
    deadline = time.monotonic() + budget_s if budget_s else None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Telemetry(options.device) as telemetry,
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task("", total=len(todo))
        for index, case in enumerate(todo):
            if deadline and time.monotonic() > deadline:
                results.env["cut_off"] = f"time budget of {budget_s:.0f} s spent: {len(todo) - index} cases not run"
                break
            results.start(case.id)
            effort = options.effort
            if deadline:
                effort = effort.within((deadline - time.monotonic()) / (len(todo) - index))
            hooks = replace(
                options,
                effort=effort,
                telemetry=telemetry,
                on_stage=lambda what, name=case.id: progress.update(task, description=f"{name}: {what}"),
            )
            row = run_case(case, ops.workload(case.op), hooks)
            results.env["telemetry"] = telemetry.samples or telemetry.problem
            results.append(row)
            progress.advance(task)
            progress.console.print(table.progress_line(row), highlight=False, markup=False, soft_wrap=True)
            if row.get("error") and fatal(RuntimeError(row["error"])):
                results.env["broken"] = case.id
                results.env["cut_off"] = f"{case.id} broke the CUDA context; run again with --resume for the rest"
                break
        results.env["telemetry"] = telemetry.samples or telemetry.problem
        results.write()
    _warn_of_throttling(console, telemetry)
    wanted = {case.id for case in cases}
    return results, [row for row in results.rows if row["case"] in wanted]


def _open(path: Path, options: Options, suite: str, resume: bool) -> Results:
    env = {**environment.record(options.device), "suite": suite, "ceilings": options.ceilings}
    if not (resume and path.exists()):
        return Results(path, env)
    document = read(path)
    if document["env"].get("machine") != env["machine"]:
        raise ValueError(f"{path} was measured on {document['env'].get('machine')}, this is {env['machine']}")
    results = Results(path, env, document["rows"])
    for key in ("torch", "triton", "commit"):
        if document["env"].get(key) != env[key]:
            env.setdefault("mixed", []).append(f"{key}: some rows are from {document['env'].get(key)}")
    if document.get("running"):
        results.append(_died(document["running"]))
    return results


def _died(case: str) -> dict[str, Any]:
    op, _, rest = case.partition("/")
    name, dtype, mode = rest.rsplit("/", 2)
    return {
        "case": case,
        "op": op,
        "name": name,
        "mode": mode,
        "dtype": dtype,
        "shape": {},
        "gate": "fail",
        "providers": {},
        "vs_best": None,
        "verdict": stats.ERROR,
        "error": "the process died or was killed while this case ran",
    }


def _warn_of_throttling(console: Console, telemetry: Telemetry) -> None:
    seen = summarise(telemetry.samples)
    if seen and seen["throttle"]:
        console.print(
            f"warning: the GPU throttled ({', '.join(seen['throttle'])}); ratios are paired and stand, "
            "absolute times are of a throttled GPU",
            style="yellow",
        )


def exit_code(rows: Sequence[dict[str, Any]]) -> int:
    """3 where an arm of ours is wrong, any arm is impossibly fast, or every case broke off."""
    verdicts = [row["verdict"] for row in rows]
    bad = stats.WRONG in verdicts or stats.IMPOSSIBLE in verdicts or set(verdicts) == {stats.ERROR}
    return EXIT_INVALID if bad else EXIT_OK
