"""The static gate: budgets of every shipped kernel as a file, and what got worse since it was written.

A file holds the figures of one Triton version, because compilers change registers and spills silently:

    {"triton": "3.7.1", "kernels": {"conv2d.boxes[128x256x64,fp16]": {"sm_90": {"registers": 168, ...}}}}
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastops.inspection.assess import Assessment, first_line
from fastops.inspection.compile import InspectionError, triton_version

Budget = dict[str, Any]
NO_BUDGET = "no budget"


@dataclass(frozen=True)
class Change:
    """One figure of one kernel on one target that is not what the snapshot says.

    Attributes:
        kernel: name of the case.
        target: "sm_90".
        what: the figure in words.
        before: in the snapshot.
        after: now.
        worse: whether it fails the gate.
    """

    kernel: str
    target: str
    what: str
    before: Any
    after: Any
    worse: bool = True

    def __str__(self) -> str:
        return f"{self.kernel} {self.target}: {self.what} {_shown(self.before)} -> {_shown(self.after)}"


def budget_of(assessment: Assessment) -> Budget:
    """The figures that the gate holds."""
    report = assessment.report
    if report.error is not None:
        return {"error": first_line(report.error)}
    assert assessment.occupancy is not None
    loop = report.main_loop
    budget: Budget = {
        "registers": report.registers,
        "spill_bytes": report.spill_bytes,
        "spill_instructions": report.local_loads + report.local_stores,
        "stack_bytes": report.stack_bytes,
        "shared_bytes": report.shared_bytes,
        "blocks": assessment.occupancy.blocks,
        "tensor_core": report.tensor_core,
        "async_copies": sum(report.async_copies.values()),
        "loop": loop.length if loop else 0,
        "loop_tensor_operations": loop.tensor_operations if loop else 0,
        "warnings": report.warning_names,
    }
    return budget


def path_for(place: Path) -> Path:
    """The file itself, or in a folder the file of the installed Triton's version."""
    if place.suffix == ".json":
        return place
    return place / f"triton-{triton_version()}.json"


def read(place: Path) -> dict[str, dict[str, Budget]]:
    """Budgets by kernel and target.

    Raises:
        InspectionError: the file is missing or not a snapshot.
    """
    path = path_for(place)
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        kernels = stored["kernels"]
        if not all(isinstance(targets, dict) for targets in kernels.values()):
            raise ValueError("its kernels are not objects")
    except FileNotFoundError:
        there = ", ".join(sorted(file.name for file in path.parent.glob("triton-*.json"))) or "none"
        raise InspectionError(
            f"there is no snapshot {path} (found: {there}); `fastops inspect --update {place}` writes it"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InspectionError(f"snapshot {path} cannot be read: {error}") from error
    return dict(kernels)


def check_writable(place: Path) -> None:
    """Before anything compiles.

    Raises:
        InspectionError: `write` could not write there.
    """
    path = path_for(place)
    folder = next(folder for folder in path.absolute().parents if folder.exists())  # `write` makes those below it
    if path.is_dir() or not folder.is_dir():
        what = f"{path} is a folder" if path.is_dir() else f"{folder} is not a folder"
        raise InspectionError(f"snapshot {path} cannot be written: {what}")
    if not os.access(folder, os.W_OK):
        raise InspectionError(f"snapshot {path} cannot be written: nothing can be written into {folder}")


def write(place: Path, assessments: Iterable[Assessment], keep: bool) -> Path:
    """Write the budgets; with `keep`, those of the file that were not compiled now stay.

    Raises:
        InspectionError: the file cannot be written.
    """
    path = path_for(place)
    kernels: dict[str, dict[str, Budget]] = {}
    if keep and path.exists():
        kernels = read(path)
    for assessment in assessments:
        kernels.setdefault(assessment.report.name, {})[assessment.target.capability.name] = budget_of(assessment)
    lines = []
    for name in sorted(kernels):
        # a line for each target: a diff then shows what changed, and where
        targets = sorted(kernels[name].items(), key=lambda item: int(item[0].removeprefix("sm_")))
        rows = ",\n".join(f"      {json.dumps(target)}: {json.dumps(budget)}" for target, budget in targets)
        lines.append(f"    {json.dumps(name)}: {{\n{rows}\n    }}")
    text = f'{{\n  "triton": {json.dumps(triton_version())},\n  "kernels": {{\n' + ",\n".join(lines) + "\n  }\n}\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise InspectionError(f"snapshot {path} cannot be written: {error}") from error
    return path


def compare(
    kernels: dict[str, dict[str, Budget]], assessments: Sequence[Assessment], whole_library: bool
) -> list[Change]:
    """What differs, the worse first. With `whole_library`, kernels that only the snapshot has are reported."""
    changes: list[Change] = []
    for assessment in assessments:
        name, target = assessment.report.name, assessment.target.capability.name
        now = budget_of(assessment)
        before = kernels.get(name, {}).get(target)
        if before is None:
            changes.append(Change(name, target, "is not in the snapshot,", NO_BUDGET, _summary(now)))
        else:
            changes.extend(_compare_one(name, target, before, now))
    if whole_library:
        present = {assessment.report.name for assessment in assessments}
        for name in kernels:
            if name not in present:
                changes.append(Change(name, "", "is in the snapshot only,", "a budget", "no such kernel"))
    return sorted(changes, key=lambda change: not change.worse)


def _compare_one(name: str, target: str, before: Budget, now: Budget) -> list[Change]:
    def change(what: str, old: Any, new: Any, worse: bool) -> None:
        changes.append(Change(name, target, what, old, new, worse))

    changes: list[Change] = []
    if "error" in before or "error" in now:
        if ("error" in before) != ("error" in now):
            change("compiles", before.get("error", "yes"), now.get("error", "yes"), "error" in now)
        return changes

    for key, what in _MORE_IS_WORSE.items():
        if now[key] != before[key]:
            change(what, before[key], now[key], now[key] > before[key])
    if now["blocks"] != before["blocks"]:
        what = "does not fit any more, blocks a multiprocessor" if now["blocks"] == 0 else "blocks a multiprocessor"
        change(what, before["blocks"], now["blocks"], now["blocks"] < before["blocks"])
    if now["tensor_core"] != before["tensor_core"]:
        worse = _GENERATION[now["tensor_core"]] < _GENERATION[before["tensor_core"]]
        change("lost" if worse else "tensor cores", before["tensor_core"], now["tensor_core"], worse)
    if bool(now["async_copies"]) != bool(before["async_copies"]):
        change("asynchronous copies", before["async_copies"], now["async_copies"], not now["async_copies"])
    _compare_loops(before, now, change)
    gained = sorted(set(now["warnings"]) - set(before["warnings"]))
    lost = sorted(set(before["warnings"]) - set(now["warnings"]))
    if gained or lost:
        change("warnings", before["warnings"], now["warnings"], bool(gained))
    return changes


def _compare_loops(before: Budget, now: Budget, change: Any) -> None:
    """Lengths as they are where both do the same work, else the length for each tensor-core instruction."""
    old, new = before["loop"], now["loop"]
    old_work, new_work = before["loop_tensor_operations"], now["loop_tensor_operations"]
    if old_work == new_work:
        if old != new:
            change("main loop instructions", old, new, new > old)
    elif not old_work or not new_work:
        change("tensor-core instructions in the main loop", old_work, new_work, new_work < old_work)
    else:
        each_before, each_now = round(old / old_work, 2), round(new / new_work, 2)
        if each_before != each_now:
            change("main loop instructions for each tensor-core one", each_before, each_now, each_now > each_before)


_MORE_IS_WORSE = {
    "registers": "registers",
    "spill_bytes": "spilled bytes",
    "spill_instructions": "spill instructions",
    "stack_bytes": "stack bytes",
}
_GENERATION = {None: 0, "HMMA": 1, "HGMMA": 2, "UTCMMA": 3}


def _summary(budget: Budget) -> str:
    if "error" in budget:
        return f"does not compile: {budget['error']}"
    spills = f", spills {budget['spill_bytes']} bytes" if budget["spill_instructions"] else ""
    return f"{budget['registers']} registers{spills}"


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)
