"""`fastops env`: versions, GPUs, and per op which engine would run and why."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import torch

from fastops import _env


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `fastops env`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Print the report; always exit code 0."""
    facts = _env.report()
    facts["import_ms"] = import_milliseconds()
    engines = engine_choices()
    if arguments.json:
        print(json.dumps({**facts, "engines": engines}, indent=2))
        return 0
    from rich.console import Console
    from rich.table import Column, Table

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 200)  # a file has no edge to fold at
    table = Table("what", "value", title="fastops env", title_justify="left")
    for name, value in facts.items():
        if name == "gpus":
            continue
        table.add_row(name, "-" if value is None else str(value))
    for gpu in _env.gpus():
        memory = int(gpu["memory_bytes"]) / 2**30
        table.add_row("GPU", f"{gpu['name']}, {gpu['capability']}, {gpu['multiprocessors']} SMs, {memory:.0f} GiB")
    if not facts["gpus"]:
        table.add_row("GPU", "none that PyTorch sees")
    console.print(table)
    ops = Table(
        Column("op", overflow="fold"), "example", "engine", "why", title='impl="auto" here', title_justify="left"
    )
    for choice in engines:
        ops.add_row(choice["op"], choice["example"], choice["engine"], choice["why"])
    console.print(ops)
    return 0


def engine_choices() -> list[dict[str, str]]:
    """What "auto" picks on this machine for typical cases of every op; FASTOPS_IMPL, where it is set, decides."""
    from fastops import ops

    choices = []
    for module in ops.modules():
        choices += [_forced(choice, module.IMPLS) or _here(choice) for choice in module.explain_auto()]
    return choices


def _here(choice: dict[str, str]) -> dict[str, str]:
    reason: str | None = "no GPU here"
    if torch.cuda.is_available():
        reason = _env.why_no_triton(torch.device("cuda"))
    if reason is None:
        return choice
    return {**choice, "engine": "torch", "why": f"{reason}; on an H100: {choice['engine']}, {choice['why']}"}


def _forced(choice: dict[str, str], allowed: tuple[str, ...]) -> dict[str, str] | None:
    """The choice that FASTOPS_IMPL makes, or None where it makes none for this op."""
    try:
        engine = _env.choose_impl("auto", allowed)
    except ValueError as error:
        return {**choice, "engine": "none", "why": f"every such call raises ValueError: {error}"}
    if engine == "auto":
        return None
    reason = None
    if engine != "torch":
        reason = _env.why_no_triton(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if engine == "torch":
        why = "FASTOPS_IMPL"
    elif reason is None:
        why = "FASTOPS_IMPL; a call that this engine cannot run raises KernelUnavailable"
    else:
        why = f"FASTOPS_IMPL; such a call raises KernelUnavailable: {reason}"
    return {**choice, "engine": engine, "why": why}


def import_milliseconds() -> float:
    """Milliseconds that `import fastops` takes beyond `import torch`, in a fresh process."""
    code = "import time, torch; t = time.perf_counter(); import fastops; print((time.perf_counter() - t) * 1e3)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return round(float(result.stdout), 1)
