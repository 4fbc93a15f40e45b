"""`python -m bench run`."""

from __future__ import annotations

import argparse
import datetime
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from bench import cases, ceilings, environment, measure, table, workloads
from bench.case import Case
from bench.cli import common
from bench.results import SCHEMA, Unreadable
from bench.run import Options
from bench.runner import EXIT_BROKEN, exit_code, run_suite
from fastops import _env

DEFAULT_FOLDER = Path("bench-results")
CPU_SUITE_S = 120.0  # for all cases of suite cpu together, unless --budget says otherwise


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("--suite", default="quick", help=f"one of {', '.join(cases.SUITES)}; default quick")
    add("--op", dest="ops", action="append", default=[], metavar="OP", help="only the cases of this op (repeatable)")
    add("-k", dest="words", action="append", default=[], metavar="WORD", help="only cases with this word in their name")
    add("--providers", help="only these arms, comma separated; the first stock arm and the control stay")
    add("--quick", action="store_true", help="less time a case and two seeds: suite quick in under 60 s on a GPU")
    add("--slow-builds", action="store_true", help="also arms that take minutes to build (max-autotune)")
    add("--clock", choices=("device", "host"), default="device", help="host: end to end, launches included")
    add("--device", help="cpu or cuda; default: the GPU if there is one")
    add("--budget", type=_seconds, metavar="SECONDS", help="start no case after this long")
    add("--case-budget", type=_seconds, metavar="SECONDS", help="the rounds of one case take at most this long")
    add("--json", type=Path, metavar="FILE", help=f"results; default {DEFAULT_FOLDER}/<date>-<suite>.json")
    add("--resume", action="store_true", help="keep the rows that FILE has, run the others")
    add("--html", type=Path, metavar="FILE", help="also write the report page")
    add("--list", action="store_true", help="print the chosen cases and stop")
    add("-v", "--verbose", action="store_true", help="a line for every arm")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, got {text!r}")
    return seconds


def run(arguments: argparse.Namespace) -> int:
    """Measure; exit 0, 2 where it cannot be done, 3 as `runner.exit_code` says, 4 on a broken context."""
    try:
        return _run(arguments)
    except (common.CannotError, Unreadable, ValueError) as error:
        return common.fail(error)


def _run(arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    device = common.device(arguments.device)
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # on a shared machine, a second thread mostly waits for the first
    chosen = _select(arguments, device.type)
    if arguments.list:
        print("\n".join(case.id for case in chosen))
        return 0
    _env.choose_impl("auto", _env.KNOWN_IMPLS)  # a FASTOPS_IMPL that is none would be an error of every case
    options = _options(arguments, device, chosen)
    console = common.console()
    if arguments.resume and not arguments.json:
        raise common.CannotError("--resume needs --json FILE")
    suite = "cpu" if device.type == "cpu" and arguments.suite == "quick" else arguments.suite
    path = arguments.json or DEFAULT_FOLDER / f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{suite}.json"
    for option, place in (("--json", path), ("--html", arguments.html)):
        if place is not None:
            common.check_place(option, place)
    if not arguments.resume:  # which reads the file itself, and needs it whole
        common.check_results("--json", path)
    budget = arguments.budget or (CPU_SUITE_S if suite == "cpu" else None)
    table.header(console, environment.record(device), options.ceilings)
    if device.type == "cpu":
        console.print(
            'timed on the CPU, where fastops "auto" is stock PyTorch: off 1.00 is noise, or padding not paid for',
            style="dim",
        )
    results, rows = run_suite(chosen, options, path, console, suite, resume=arguments.resume, budget_s=budget)
    console.print()
    table.print_rows(console, rows, arguments.verbose)
    if arguments.html:
        from bench.report import html

        html.write({"schema": SCHEMA, "env": results.env, "rows": results.rows}, arguments.html)
    if device.type == "cpu" and arguments.suite == "quick" and not arguments.words and not arguments.ops:
        from bench import without_gpu

        without_gpu.show(console)
    if "cut_off" in results.env:
        console.print(results.env["cut_off"], style="yellow")
    console.print(f"{path}, {time.monotonic() - started:.0f} s", style="dim", highlight=False)
    print(table.verdict_line(rows, results.env["machine"]))
    sys.stdout.flush()
    return EXIT_BROKEN if "broken" in results.env else exit_code(rows)


def _select(arguments: argparse.Namespace, device: str) -> list[Case]:
    if arguments.suite not in cases.SUITES:
        raise common.unknown("suite", arguments.suite, cases.SUITES)
    for op in arguments.ops:
        if op not in workloads.TABLE:
            raise common.unknown("op", op, workloads.TABLE)
    suite = "cpu" if device == "cpu" and arguments.suite == "quick" else arguments.suite
    chosen = cases.select(suite, arguments.ops, arguments.words)
    if not chosen:
        where = f"suite {suite!r}" + (f", op {' or '.join(arguments.ops)}" if arguments.ops else "")
        if arguments.words:
            ids = [case.id for case in cases.all_cases() if case.op in (arguments.ops or workloads.TABLE)]
            raise common.unknown(f"case (in {where})", " ".join(arguments.words), ids)
        raise common.CannotError(f"{where} has no cases")
    return chosen


def _options(arguments: argparse.Namespace, device: torch.device, chosen: list[Case]) -> Options:
    effort = measure.CPU if device.type == "cpu" else measure.NORMAL
    if arguments.quick:
        effort = replace(measure.QUICK, block_s=effort.block_s, patience=effort.patience)
    if arguments.case_budget:
        effort = replace(effort, budget_s=arguments.case_budget, patience=1.0)
    providers = [name.strip() for name in arguments.providers.split(",")] if arguments.providers else None
    if providers:
        known = {arm.name for case in chosen for arm in workloads.workload(case.op).arms(case, device)}
        for name in providers:
            if name not in known:
                raise common.unknown("provider", name, sorted(known))
    return Options(
        device,
        effort,
        seeds=2 if arguments.quick or device.type == "cpu" else 3,
        clock=arguments.clock,
        providers=providers,
        slow_builds=arguments.slow_builds,
        ceilings=ceilings.load(device),
    )
