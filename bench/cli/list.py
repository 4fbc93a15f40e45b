"""`python -m bench list`."""

from __future__ import annotations

import argparse

from rich.markup import escape
from rich.table import Table

from bench import cases, workloads
from bench.case import MODES
from bench.cli import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--suite", choices=cases.SUITES, help="only this suite")
    parser.add_argument("--op", help="only this op")
    parser.add_argument("--arms", action="store_true", help="also every arm of each op and how it computes")


def run(arguments: argparse.Namespace) -> int:
    """Print the tables."""
    if arguments.op and arguments.op not in workloads.TABLE:
        return common.fail(common.unknown("op", arguments.op, workloads.TABLE))
    console = common.console()
    chosen = cases.select(arguments.suite) if arguments.suite else cases.all_cases()
    found = [case for case in chosen if not arguments.op or case.op == arguments.op]
    table = Table("case", "suites", "shape", header_style="bold", show_edge=False)
    for case in found:
        table.add_row(
            escape(case.id), " ".join(case.suites), escape(" ".join(f"{k}={v}" for k, v in case.shape.items()))
        )
    console.print(table)
    if arguments.arms:
        _print_arms(console, found)
    console.print(f"{len(found)} cases; modes: " + "; ".join(f"{name}: {what}" for name, what in MODES.items()))
    return 0


def _print_arms(console: common.Console, found: list[cases.Case]) -> None:
    table = Table("op", "arm", "role", "how", header_style="bold", show_edge=False)
    seen = set()
    for case in found:
        for arm in workloads.workload(case.op).arms(case, common.device(None)):
            if (case.op, arm.name) not in seen:
                seen.add((case.op, arm.name))
                table.add_row(case.op, escape(arm.name), arm.role, escape(arm.how))
    console.print(table)
