"""The deep run: `python -m tests.fuzz [PATTERN ...]`, or `make fuzz`. Goes on where an earlier one was stopped.

Examples are drawn in chunks, each with a seed of its own, by as many processes as asked for. What is done is kept in a
file; a failure is printed as the smallest case that shows it, and its chunk is run again next time.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path

import tests.interpreter  # noqa: F401  what its import does

CHUNK = 250
Done = dict[str, dict[str, dict[str, int]]]  # property -> seed of a chunk -> how its cases ended


def follow_parent() -> None:
    """End this process with the one that started it, in the middle of a chunk too."""
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def chunk(name: str, seed: int, examples: int) -> tuple[dict[str, int], str]:
    """How the cases of one chunk ended, and what failed."""
    import torch

    torch.set_num_threads(1)
    from tests.fuzz import everything  # noqa: F401
    from tests.fuzz.engine import run

    try:
        return run(name, examples, seed), ""
    except Exception as error:
        return {}, describe(error)


def describe(error: BaseException) -> str:
    """A failure of hypothesis in few lines: what was wrong, and the smallest case."""
    lines = []
    for one in getattr(error, "exceptions", [error]):
        case = " ".join(getattr(one, "__notes__", []))
        case = re.sub(r"\s*# or any other generated value", "", case).split("Explanation:")[0]
        lines.append(f"{type(one).__name__}: {one}\n    {' '.join(case.split())}")
    return "\n".join(lines)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    """0 where nothing failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("patterns", nargs="*", default=["*"], help="names of properties, with wildcards")
    parser.add_argument("--examples", type=_positive, default=10_000, help="of each property (%(default)s)")
    parser.add_argument("--jobs", type=_positive, default=os.cpu_count(), help="processes (%(default)s)")
    parser.add_argument("--state", type=Path, default=Path(".hypothesis/fuzz.json"), help="what is done: %(default)s")
    parser.add_argument("--list", action="store_true", help="print the names and leave")
    options = parser.parse_args(arguments)
    from tests.fuzz import everything  # noqa: F401
    from tests.fuzz.engine import PROPERTIES

    names = [n for n in PROPERTIES if any(fnmatch.fnmatch(n, p) for p in options.patterns)]
    if options.list or not names:
        print("\n".join(PROPERTIES) if options.list else f"no property is named like {' '.join(options.patterns)}")
        return 0 if options.list else 2
    return fuzz(names, options.examples, options.jobs, options.state)


def fuzz(names: list[str], examples: int, jobs: int, state: Path) -> int:
    """Run what is missing of each property; returns the exit status."""
    try:
        done: Done = json.loads(state.read_text()) if state.exists() else {}
    except (OSError, ValueError) as error:
        print(f"{state} is no record of an earlier run, delete it to begin anew: {error}", file=sys.stderr)
        return 2
    size = min(CHUNK, examples)
    seeds = range(-(-examples // size))
    wanted = [(n, seed) for seed in seeds for n in names if str(seed) not in done.get(n, {})]
    failures: dict[str, str] = {}
    started = time.monotonic()
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=follow_parent)
    running = {pool.submit(chunk, name, seed, size): (name, seed) for name, seed in wanted}
    try:
        for count, future in enumerate(as_completed(running), 1):
            name, seed = running[future]
            ends, failure = future.result()
            if failure:
                failures.setdefault(name, failure)
                print(failure, flush=True)
            else:
                done.setdefault(name, {})[str(seed)] = ends
                write(state, json.dumps(done))
            what = "FAILED" if failure else ", ".join(f"{n} {end}" for end, n in sorted(ends.items()))
            print(f"[{count}/{len(wanted)} {time.monotonic() - started:.0f} s] {name} seed {seed}: {what}", flush=True)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here")
        return 130
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in active_children():
            process.terminate()
    for name in names:
        ends = done.get(name, {}).values()
        total = {end: sum(e.get(end, 0) for e in ends) for end in ("same", "error", "refused")}
        print(f"{name}: {sum(total.values())} cases, {total}")
    if failures:
        print(f"failed: {', '.join(failures)}")
    return 1 if failures else 0


def write(state: Path, text: str) -> None:
    """Whole or not at all."""
    state.parent.mkdir(parents=True, exist_ok=True)
    draft = state.with_name(state.name + ".part")
    draft.write_text(text)
    os.replace(draft, state)
