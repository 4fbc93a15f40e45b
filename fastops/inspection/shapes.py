"""`--shape`: the kernels an op would launch for a shape on a GPU, in the configurations its launcher chooses there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastops.inspection import _source
from fastops.inspection.compile import InspectionError, triton_version
from fastops.inspection.gpus import Target
from fastops.kernels._static import StaticCase


@dataclass(frozen=True)
class Example:
    """An op that can be asked for by shape.

    Attributes:
        needed: letters that --shape must give.
        optional: letters it may give.
        engines: the first that runs there is shown.
        meaning: of the letters.
    """

    needed: tuple[str, ...]
    optional: tuple[str, ...]
    engines: tuple[str, ...]
    meaning: str


_RECURRENT = Example(
    ("T", "B", "H"), ("I",), ("triton", "step"), "T steps, B rows, H hidden units, I inputs (default H)"
)
EXAMPLES = {
    "attention": Example(
        ("B", "H", "S", "D"),
        ("SK", "HK", "CAUSAL"),
        ("triton",),
        "B batch, H heads, S queries, D head size, SK keys (default S), HK key heads (default H), CAUSAL=1",
    ),
    "conv2d": Example(
        ("N", "C", "H", "K", "R"),
        ("W", "S", "STRIDE", "PADDING"),
        ("triton",),
        "N images of C channels, H x W (default H), K filters of R x S (default R), STRIDE=1, PADDING=0",
    ),
    "lstm": _RECURRENT,
    "gru": _RECURRENT,
    "rnn": _RECURRENT,
}


@dataclass(frozen=True)
class OpLaunches:
    """One op of the example and the kernels it launches.

    Attributes:
        name: of the op, e.g. "attention_forward".
        cases: one for each kernel configuration.
        counts: how often each is launched.
        flops: operations of the op; None where it has no formula.
        bytes: of its arguments and results, each counted once.
    """

    name: str
    cases: tuple[StaticCase, ...]
    counts: tuple[int, ...]
    flops: float | None
    bytes: float


def parse_shape(op: str, text: str) -> dict[str, int]:
    """{"B": 4, ...} of "B=4,H=16,S=4096,D=256", or of "4,16,4096,256" in the order of the op's letters.

    Raises:
        InspectionError: the op takes no shape, or a letter is missing, unknown or not a size.
    """
    if op not in EXAMPLES:
        raise InspectionError(f"--shape needs one op of {', '.join(EXAMPLES)}; got {op!r}")
    example = EXAMPLES[op]
    usage = f"{op} takes {', '.join(example.needed)} [{', '.join(example.optional)}]: {example.meaning}"
    between = r"[\s,]+" if "=" in text else r"[\s,]+|(?<=\d)x(?=\d)"
    parts = [part for part in re.split(between, text.strip()) if part]
    if all("=" not in part for part in parts):
        if odd := [part for part in parts if not part.lstrip("-").isdigit()]:
            raise InspectionError(f"--shape {text!r}: {odd[0]!r} is not a size; {usage}")
        if len(parts) != len(example.needed):
            raise InspectionError(f"--shape {text!r} has {len(parts)} sizes; {usage}")
        parts = [f"{letter}={size}" for letter, size in zip(example.needed, parts, strict=True)]
    shape: dict[str, int] = {}
    for part in parts:
        letter, _, size = part.partition("=")
        letter = letter.strip().upper()
        if letter not in (*example.needed, *example.optional):
            raise InspectionError(f"--shape {text!r}: {op} has no {letter!r}; {usage}")
        if not size.isdigit() or (int(size) < 1 and letter not in ("PADDING", "CAUSAL")):
            raise InspectionError(f"--shape {text!r}: {letter}={size!r} is not a size")
        shape[letter] = int(size)
    if missing := [letter for letter in example.needed if letter not in shape]:
        raise InspectionError(f"--shape {text!r} lacks {', '.join(missing)}; {usage}")
    return shape


def launches(
    op: str, shape: dict[str, int], dtype: str, targets: Sequence[Target], backward: bool = True
) -> list[list[OpLaunches]]:
    """What the op would launch on each target, forward and backward.

    Raises:
        InspectionError: the op cannot run there; the message is the op's own.
    """
    triton_version()
    if dtype not in ("fp16", "bf16", "fp32"):
        raise InspectionError(f"--dtype {dtype}: --shape knows fp16, bf16 and fp32")
    common = {"op": op, "shape": shape, "dtype": dtype, "backward": backward, "engines": EXAMPLES[op].engines}
    requests = [
        common
        | {
            "target": target.capability.number,
            "multiprocessors": target.gpu.multiprocessors if target.gpu else 1,
            "device_name": f"NVIDIA {target.gpu.name}" if target.gpu else target.capability.name,
        }
        for target in targets
    ]
    sample = " ".join(f"{letter}={size}" for letter, size in shape.items())
    results = []
    for target, answer in zip(targets, _ask(requests), strict=True):
        if "failed" in answer:
            raise InspectionError(f"{op} {sample} {dtype} on {target.label}: {answer['failed']}")
        results.append([_op(found, sample, target) for found in answer["ops"]])
    return results


def _ask(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "fastops.inspection._capture"],
        input=json.dumps(requests),
        capture_output=True,
        text=True,
        env=environment,
    )
    if not done.stdout:
        last = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise InspectionError(f"the launches cannot be found:\n{last}")
    return list(json.loads(done.stdout))


def _op(found: dict[str, Any], sample: str, target: Target) -> OpLaunches:
    counted: dict[str, int] = {}
    for launch in found["launches"]:
        key = json.dumps(launch, sort_keys=True)
        counted[key] = counted.get(key, 0) + 1
    alone = len(counted) == 1 and set(counted.values()) == {1}
    cases = []
    for key, count in counted.items():
        launch = json.loads(key)
        tiles = {name: value for name, value in launch["constexprs"].items() if name.startswith(("BLOCK", "BOX"))}
        label = ",".join(f"{name}={value}" for name, value in tiles.items())
        times = f" x{count}" if count > 1 else ""
        cases.append(
            StaticCase(
                name=f"{launch['kernel']['name']}[{label}]{times}",
                kernel=_source.find(launch["kernel"]),
                signature=launch["signature"],
                constexprs={name: _source.decode(value) for name, value in launch["constexprs"].items()},
                num_warps=launch["num_warps"],
                num_stages=launch["num_stages"],
                options=launch["options"],
                divisible_by_16=tuple(launch["divisible_by_16"]),
                targets=(target.capability.number,),
                grid=launch["grid"],
                sample=sample,
                flops=found["flops"] if alone else None,
                bytes=found["bytes"] if alone else None,
            )
        )
    return OpLaunches(found["name"], tuple(cases), tuple(counted.values()), found["flops"], found["bytes"])
