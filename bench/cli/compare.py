"""`python -m bench compare`."""

from __future__ import annotations

import argparse
from collections import Counter

from rich.markup import escape
from rich.table import Table

from bench import compare, environment
from bench.cli import common
from bench.results import Unreadable, read

BAD = ("regressed", "gone", "broken", "WRONG", "IMPOSSIBLE")
STYLES = {
    "regressed": "bold red",
    "gone": "bold red",
    "broken": "bold red",
    "improved": "bold green",
    "unclear": "yellow",
}
WORDS = {compare.OK: "ok", compare.REGRESSION: "REGRESSION", compare.INCOMPARABLE: "NOT COMPARABLE"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("before", metavar="A.json", help="alone: its fastops arms against its best stock arms")
    parser.add_argument("after", metavar="B.json", nargs="?", help="speeds over stock are compared with those of A")
    parser.add_argument("--fail", default=compare.DEFAULT_RULE, metavar="RULE", help="slower:<percent>%%, default 5")
    parser.add_argument("--any-machine", action="store_true", help="compare although GPU or versions differ")
    parser.add_argument("--all", action="store_true", help="also print what stayed the same")


def run(arguments: argparse.Namespace) -> int:
    """Exit 0 ok, 1 regression, 2 not comparable, 3 wrong or impossible."""
    try:
        tolerated = compare.parse_rule(arguments.fail)
        before = read(arguments.before)
        after = read(arguments.after) if arguments.after else None
    except (ValueError, Unreadable) as error:
        return common.fail(error)
    console = common.console()
    console.print(f"A: {environment.one_line(before['env'])}", highlight=False, markup=False)
    if after is None:
        found = compare.within(before, tolerated)
    else:
        console.print(f"B: {environment.one_line(after['env'])}", highlight=False, markup=False)
        found = compare.between(before, after, tolerated, arguments.any_machine)
    _print(console, found, arguments.all)
    for text in found.differences:
        console.print(f"differs: {text} (--any-machine compares all the same)", style="yellow", markup=False)
    for label, names in (("only in A", found.only_before), ("only in B", found.only_after)):
        if names:
            console.print(f"{label}: {', '.join(names)}", style="dim", markup=False)
    counts = Counter(change.state for change in found.changes)
    counted = ", ".join(f"{count} {state}" for state, count in counts.items()) or "no case in common"
    named = [f"{c.case} ({c.arm})" for c in found.changes if c.state in BAD]
    print(f"{WORDS.get(found.exit_code, 'INVALID')}: {counted}" + (f": {', '.join(named)}" if named else ""))
    return found.exit_code


def _print(console: common.Console, found: compare.Comparison, everything: bool) -> None:
    shown = [change for change in found.changes if everything or change.state != "same"]
    if not shown:
        return
    table = Table(header_style="bold", show_edge=False, pad_edge=False)
    table.add_column("case")
    table.add_column("arm")
    for name in ("speed over stock, before", "after", "change [95 %]"):
        table.add_column(name, justify="right")
    table.add_column("state")
    for change in shown:
        style = STYLES.get(change.state, "bold white on red" if change.state.isupper() else "")
        interval = ""
        if change.change is not None:
            interval = escape(f"{change.change:.3f} [{change.lo:.3f}-{change.hi:.3f}]")
        table.add_row(
            escape(change.case),
            escape(change.arm),
            f"{change.before:.3f}x" if change.before is not None else "-",
            f"{change.after:.3f}x" if change.after is not None else "-",
            interval,
            f"[{style}]{change.state}[/]" if style else change.state,
        )
    console.print(table)
