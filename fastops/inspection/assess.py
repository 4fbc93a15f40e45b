"""What a report means on a GPU: does it fit, what limits it, how full are its waves, how fast could it ever be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastops.inspection.gpus import Target
from fastops.inspection.occupancy import Occupancy, Waves, next_step, occupancy, waves
from fastops.inspection.report import KernelReport


@dataclass(frozen=True)
class Floor:
    """No launch of the sample can be faster than this; from the spec sheet, nothing was measured.

    Attributes:
        seconds: the larger of operations / peak and bytes / bandwidth.
        bound: "compute" or "memory".
    """

    seconds: float
    bound: str


@dataclass(frozen=True)
class Assessment:
    """One report on one GPU.

    Attributes:
        report: the compiler's figures.
        target: the GPU.
        launched: whether the library launches this configuration on this capability.
        occupancy: resident blocks; None where the kernel does not compile.
        more: what to save for one more block, e.g. "-14 registers".
        waves: of the sample's grid, where the case names one.
        floor: of the sample, where the case names its operations or bytes.
    """

    report: KernelReport
    target: Target
    launched: bool
    occupancy: Occupancy | None
    more: str
    waves: Waves | None
    floor: Floor | None

    @property
    def fits(self) -> bool:
        """Whether the kernel compiles and can be launched."""
        return self.occupancy is not None and self.occupancy.blocks > 0

    @property
    def verdict(self) -> str:
        """What a reader should know first, in words."""
        if self.occupancy is None:
            return f"does not compile: {first_line(self.report.error or '')}"
        if self.occupancy.reason is not None:
            return f"does not fit: {self.occupancy.reason}"
        words = []
        if self.report.spills:
            words.append(f"spills {self.report.spill_bytes or self.report.stack_bytes:,} bytes a thread")
        words.extend(self.report.warning_names)
        return "; ".join(words) or "fits"

    def to_json(self) -> dict[str, Any]:
        """The report with the figures that depend on the GPU."""
        found = self.occupancy
        return self.report.to_json() | {
            "capability": self.target.capability.name,
            "gpu": self.target.gpu.name if self.target.gpu else None,
            "launched": self.launched,
            "fits": self.fits,
            "verdict": self.verdict,
            "occupancy": None
            if found is None
            else {
                "blocks_per_multiprocessor": found.blocks,
                "warps_per_multiprocessor": found.warps,
                "fraction": found.fraction,
                "limiter": found.limiter,
                "limits": found.limits,
                "one_more_block": self.more,
            },
            "waves": None
            if self.waves is None
            else {"waves": self.waves.waves, "tail_efficiency": self.waves.tail_efficiency},
            "floor_from_spec_sheet": None
            if self.floor is None
            else {"seconds": self.floor.seconds, "bound": self.floor.bound},
        }


def assess(report: KernelReport, target: Target, launched: bool = True) -> Assessment:
    """Put the rules of the GPU on the figures of the compiler."""
    if report.error is not None:
        return Assessment(report, target, launched, None, "", None, None)
    capability = target.capability
    found = occupancy(
        capability,
        report.registers,
        report.num_warps,
        report.shared_bytes,
        report.barriers,
        report.tensor_memory_columns,
    )
    more = next_step(capability, report.registers, report.num_warps, report.shared_bytes, found) if found.blocks else ""
    spread = None
    if report.grid is not None and target.gpu is not None:
        spread = waves(report.grid * report.num_ctas, found.blocks, target.gpu.multiprocessors)
    return Assessment(report, target, launched, found, more, spread, floor_of(report, target))


def floor_of(report: KernelReport, target: Target) -> Floor | None:
    """Roofline floor of the sample; None where the case names neither operations nor bytes, or no GPU is known."""
    kind = "tf32" if report.dtype == "fp32" and report.tensor_core else report.dtype
    return roofline(report.flops, report.bytes, kind, target)


def roofline(flops: float | None, bytes: float | None, dtype: str, target: Target) -> Floor | None:
    """The larger of operations / peak and bytes / bandwidth, for operands of "fp16", "bf16", "tf32" or "fp32"."""
    if target.gpu is None or (flops is None and bytes is None):
        return None
    compute = 0.0
    if flops is not None and dtype in ("fp16", "bf16", "tf32", "fp32"):
        compute = flops / (target.gpu.tflops(dtype) * 1e12)
    memory = (bytes or 0.0) / (target.gpu.gbytes_per_second * 1e9)
    return Floor(max(compute, memory), "compute" if compute >= memory else "memory")


def first_line(text: str) -> str:
    """The one line of a compiler's error that says most."""
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if set(line) - {"^", "~"} and not line.startswith("Repro command")]
    from_ptxas = [line for line in lines if line.startswith("ptxas") and "error" in line]
    return (from_ptxas or lines[-1:] or [""])[0]
