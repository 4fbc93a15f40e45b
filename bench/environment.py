"""The machine that a number belongs to. No number goes anywhere without it."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from fastops import _env

ROOT = Path(__file__).resolve().parent.parent


def record(device: torch.device) -> dict[str, Any]:
    """Versions, machine, flags and source revision."""
    facts = dict(_env.report())
    facts.pop("platform", None)
    facts["device"] = device.type
    facts["machine"] = machine(device)
    facts["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    facts["cpu"] = cpu_name()
    facts["cpu_count"] = os.cpu_count()
    facts["threads"] = torch.get_num_threads()
    facts["system"] = f"{platform.system()} {platform.machine()}"
    facts["argv"] = [Path(sys.argv[0]).name, *sys.argv[1:]]
    facts["commit"], facts["dirty"] = revision()
    facts["flags"] = {
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
        "cudnn.conv.fp32_precision": torch.backends.cudnn.conv.fp32_precision,
        "cudnn.rnn.fp32_precision": torch.backends.cudnn.rnn.fp32_precision,
        "matmul.fp32_precision": torch.backends.cuda.matmul.fp32_precision,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = {
            "name": properties.name,
            "uuid": str(getattr(properties, "uuid", "")),
            "capability": f"sm_{properties.major}{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
        }
    return facts


def machine(device: torch.device) -> str:
    """One name for the device that was measured."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return in_words(f"{cpu_name()}, {torch.get_num_threads()} threads")


def in_words(name: Any) -> Any:
    """The name of a machine as it is written today: older result files say "1 threads", and mean the same machine."""
    return re.sub(r", 1 threads$", ", 1 thread", name) if isinstance(name, str) else name


def keep_commands(env: dict[str, Any], earlier: dict[str, Any]) -> None:
    """Note in the environment of a resumed run the commands that measured the rows it found, oldest first."""
    known = earlier.get("earlier_argv")
    commands = [*(known if isinstance(known, list) else []), earlier.get("argv")]
    kept: list[Any] = []
    for command in commands:
        if command and command != env.get("argv") and command not in kept:
            kept.append(command)
    if kept:
        env["earlier_argv"] = kept


def cpu_name() -> str:
    """Model name of the CPU."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def revision() -> tuple[str | None, bool | None]:
    """Commit of the source tree, and whether it has uncommitted changes; None outside git."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        return commit, bool(_git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=10)
    return result.stdout.strip()


def one_line(env: dict[str, Any]) -> str:
    """The machine and versions of a result, for a header."""
    versions = [f"{name} {env[key]}" for name, key in VERSIONS if env.get(key)]
    return " | ".join([str(env.get("machine", "unknown machine")), *versions])


VERSIONS = (("driver", "driver"), ("torch", "torch"), ("CUDA", "cuda"), ("cuDNN", "cudnn"), ("triton", "triton"))
