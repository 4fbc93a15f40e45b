"""What the static gate and `fastops inspect` compile: every shipped kernel configuration, as data.

Each kernel module has `static_cases() -> list[StaticCase]`; fastops.inspection compiles them, no GPU needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class StaticCase:
    """One kernel configuration as a launcher would compile it.

    Attributes:
        name: "<op>.<kernel>[<configuration>]", e.g. "conv2d.boxes[128x256x64,fp16]"; unique in the library.
        kernel: the `@triton.jit` function.
        signature: type of each run-time argument: "*fp16", "i32", "i64", "fp32", "tensordesc<fp16[1,8,16,64]>".
        constexprs: value of each constexpr argument.
        num_warps: warps per program.
        num_stages: software pipeline depth.
        options: further compile options, e.g. {"launch_cooperative_grid": True, "enable_fp_fusion": True}.
        divisible_by_16: arguments (pointers, sizes, strides) that Triton may assume to be multiples of 16, as its
            specialisation finds for the usual shapes.
        work_per_thread: useful operations (multiply-adds, score elements, ... ) of one thread in one iteration of the
            main loop, for the ratio that limits refer to; None where no ratio is meant.
        targets: compute capabilities it is launched on.
        grid: programs for the sample shape that `sample` names, for waves and tail efficiency; None if unknown.
        sample: the sample shape in words.
        flops: operations of the sample, a multiply-add counting as two, for the roofline floor; None if unknown.
        bytes: the least bytes the sample must move to and from memory, likewise.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)
    divisible_by_16: tuple[str, ...] = ()
    work_per_thread: float | None = None
    targets: tuple[int, ...] = (80, 86, 90, 100)
    grid: int | None = None
    sample: str = ""
    flops: float | None = None
    bytes: float | None = None

    def launched_on(self, capability: int) -> bool:
        """Whether the library launches it there.

        A capability that cases do not name goes by the nearest one below. So does sm_120 only for what names it: else
        by sm_86, as consumer GPUs have tensor cores and memory of that kind.
        """
        if capability >= 120 and 120 not in self.targets:
            capability = 86
        known = {*StaticCase.targets, *self.targets}
        return max((number for number in known if number <= capability), default=0) in self.targets
