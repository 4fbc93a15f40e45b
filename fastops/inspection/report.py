"""What one compiled kernel needs: plain data, JSON in and out."""

from __future__ import annotations

import contextlib
import gzip
import re
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Loop:
    """An innermost loop of the machine code.

    Attributes:
        length: instructions of one iteration as compiled (the compiler may have unrolled the source's loop).
        instructions: count by opcode, without modifiers ("HGMMA", "LDSM", "FADD", ...).
        tensor_operations: how many of them run on the tensor cores.
    """

    length: int
    instructions: Counter[str]
    tensor_operations: int

    def count(self, *opcodes: str) -> int:
        """How many instructions have one of these opcodes."""
        return sum(self.instructions[opcode] for opcode in opcodes)


@dataclass(frozen=True)
class KernelReport:
    """One kernel configuration compiled for one target; figures of the compiler, nothing was run.

    Attributes:
        name: of the case.
        target: compute capability, 90 for sm_90.
        triton: version that compiled it.
        registers: per thread.
        stack_bytes: stack frame per thread; not zero where registers spilled or an array is indexed.
        local_loads: LDL instructions in the code.
        local_stores: STL instructions in the code.
        shared_bytes: shared memory of a block, static and dynamic, without what the driver reserves.
        num_warps: warps of a block as launched (warp specialisation adds some).
        num_stages: software pipeline depth asked for.
        num_ctas: blocks of a cluster.
        spill_bytes: bytes that ptxas says it spills, stores and loads of a thread together.
        barriers: named barriers of a block.
        tensor_memory_columns: of a block, on GPUs with tcgen05.
        instructions: count by opcode over the whole kernel.
        loops: the innermost loops that use tensor cores; in a kernel without tensor cores, all innermost loops.
        main_loop: the one with the most tensor-core instructions, of equals the shortest; without tensor cores the
            longest.
        tensor_core: "HMMA" (mma.sync), "HGMMA" (wgmma), "UTCMMA" (tcgen05): the newest kind used; None without.
        async_copies: LDGSTS (cp.async), UTMALDG / UTMASTG / UTMAREDG and other asynchronous copies, where used.
        warnings: lines that ptxas marked, e.g. C7510 "wgmma serialized".
        error: why it does not compile; all figures are then zero.
        work_per_thread: see StaticCase.
        grid: see StaticCase.
        sample: see StaticCase.
        flops: see StaticCase.
        bytes: see StaticCase.
        dtype: of the first pointer or descriptor among the arguments.
        artifacts: path without suffix of the cached SASS and PTX.
    """

    name: str
    target: int
    triton: str
    registers: int = 0
    stack_bytes: int = 0
    local_loads: int = 0
    local_stores: int = 0
    shared_bytes: int = 0
    num_warps: int = 0
    num_stages: int = 0
    num_ctas: int = 1
    spill_bytes: int = 0
    barriers: int = 0
    tensor_memory_columns: int = 0
    instructions: Counter[str] = field(default_factory=Counter)
    loops: tuple[Loop, ...] = ()
    main_loop: Loop | None = None
    tensor_core: str | None = None
    async_copies: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    error: str | None = None
    work_per_thread: float | None = None
    grid: int | None = None
    sample: str = ""
    flops: float | None = None
    bytes: float | None = None
    dtype: str = ""
    artifacts: str = field(default="", repr=False, compare=False)

    @property
    def spills(self) -> bool:
        """Whether registers overflowed into local memory."""
        return bool(self.local_loads or self.local_stores)

    @property
    def warning_names(self) -> list[str]:
        """The distinct warnings in short: ["wgmma serialised (C7510)"]."""
        names = []
        for line in self.warnings:
            code = next(iter(re.findall(r"\((C7\d{3})\)", line)), line)
            names.append(f"wgmma serialised ({code})" if "serialized" in line else f"ptxas {code}")
        return sorted(set(names))

    @property
    def sass(self) -> str:
        """The machine code as cuobjdump prints it."""
        return self._text("sass")

    @property
    def ptx(self) -> str:
        """The PTX that ptxas was given."""
        return self._text("ptx")

    @property
    def instructions_per_work(self) -> float | None:
        """Main-loop instructions of a thread for each of its useful operations; None where no work was named."""
        if self.main_loop is None or not self.work_per_thread:
            return None
        return self.main_loop.length / self.work_per_thread

    def _text(self, kind: str) -> str:
        if self.error is not None:
            raise ValueError(f"{self.name} does not compile for sm_{self.target}: there is no {kind.upper()}")
        path = Path(f"{self.artifacts}.{kind}.gz")
        try:
            content = path.read_bytes()
            if not content:
                raise EOFError("empty")  # to gzip an empty text
            return gzip.decompress(content).decode()
        except (OSError, EOFError, ValueError, zlib.error) as error:
            with contextlib.suppress(OSError):
                path.with_name(f"{Path(self.artifacts).name}.json").unlink()  # without it the entry counts for nothing
            raise ValueError(
                f"the cached {kind.upper()} of {self.name} is damaged ({path}: {error}); inspect it again"
            ) from error

    def to_json(self) -> dict[str, Any]:
        """All fields but the artifacts, as json.dump takes them; `from_json` reads them back."""
        plain = {name: getattr(self, name) for name in _PLAIN}
        return plain | {
            "instructions": dict(self.instructions),
            "loops": [_loop_to_json(loop) for loop in self.loops],
            "main_loop": None if self.main_loop is None else self.loops.index(self.main_loop),
            "async_copies": dict(self.async_copies),
            "warnings": list(self.warnings),
        }

    @staticmethod
    def from_json(stored: Mapping[str, Any], artifacts: str = "") -> KernelReport:
        """The report that `to_json` wrote."""
        loops = tuple(_loop_from_json(loop) for loop in stored["loops"])
        return KernelReport(
            **{name: stored[name] for name in _PLAIN},
            instructions=Counter(stored["instructions"]),
            loops=loops,
            main_loop=None if stored["main_loop"] is None else loops[stored["main_loop"]],
            async_copies=dict(stored["async_copies"]),
            warnings=tuple(stored["warnings"]),
            artifacts=artifacts,
        )


# what a case says about itself and no compiler changes
LABELS = ("name", "work_per_thread", "grid", "sample", "flops", "bytes", "dtype")
_PLAIN = (
    *LABELS,
    *("target", "triton", "registers", "stack_bytes", "local_loads", "local_stores", "spill_bytes", "shared_bytes"),
    *("num_warps", "num_stages", "num_ctas", "barriers", "tensor_memory_columns", "tensor_core", "error"),
)


def _loop_to_json(loop: Loop) -> dict[str, Any]:
    return {
        "length": loop.length,
        "instructions": dict(loop.instructions),
        "tensor_operations": loop.tensor_operations,
    }


def _loop_from_json(stored: Mapping[str, Any]) -> Loop:
    return Loop(stored["length"], Counter(stored["instructions"]), stored["tensor_operations"])
