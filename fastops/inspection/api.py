"""`inspect`: from a kernel's name, or a kernel, to what it needs on each GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastops.inspection import catalog
from fastops.inspection.assess import Assessment, assess
from fastops.inspection.compile import InspectionError, compile_cases
from fastops.inspection.gpus import CAPABILITIES, Target, find_target
from fastops.inspection.report import KernelReport
from fastops.kernels._static import StaticCase


def inspect(
    kernel: str | StaticCase | Any,
    targets: Iterable[str | int] | None = None,
    *,
    dtype: str | None = None,
    signature: str | Sequence[str] | Mapping[str, str] | None = None,
    constexprs: Mapping[str, Any] | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
    options: Mapping[str, Any] | None = None,
    jobs: int | None = None,
) -> list[KernelReport]:
    """Compile a kernel for GPUs that need not be here.

    Args:
        kernel: part of the name of a kernel that fastops ships ("attention", "conv2d.boxes*fp16*"), "file.py:kernel" or
            "module:kernel", a `@triton.jit` function, or a StaticCase.
        targets: e.g. ["sm_80", 90, "RTX 3090"]; by default those a shipped kernel is launched on, for a kernel of your
            own sm_80, 86, 89, 90, 100 and 120.
        dtype: only shipped kernels on this element type.
        signature: for a kernel of your own, the types of the arguments that are not constexpr: "*fp16,*fp16,i32:16", or
            by name {"x_ptr": "*fp16", "n": "i32"}.
        constexprs: likewise, values of the constexpr arguments.
        num_warps: likewise, as in the launch.
        num_stages: likewise.
        options: likewise, further compile options.
        jobs: compiling processes; all cores by default.

    Returns:
        One report for each configuration and target; where it does not compile its `error` says why. `assess` puts the
        rules of a GPU on it: occupancy, whether it fits, waves, floor.

    Raises:
        InspectionError: the kernel, target or signature is not one, or triton is missing.
    """
    found = cases_of(
        kernel,
        dtype=dtype,
        signature=signature,
        constexprs=constexprs,
        num_warps=num_warps,
        num_stages=num_stages,
        options=options,
    )
    wanted = None
    if targets is not None:
        try:
            wanted = [find_target(str(target)) for target in ([targets] if isinstance(targets, str) else targets)]
        except ValueError as error:
            raise InspectionError(str(error)) from error
    return [assessment.report for assessment in inspect_cases(found, wanted, jobs=jobs)]


def cases_of(
    kernel: str | StaticCase | Any,
    *,
    dtype: str | None = None,
    signature: str | Sequence[str] | Mapping[str, str] | None = None,
    constexprs: Mapping[str, Any] | None = None,
    **launch: Any,
) -> list[StaticCase]:
    """The cases that `inspect` compiles."""
    if isinstance(kernel, StaticCase):
        return [kernel]
    if isinstance(kernel, str) and ":" not in kernel:
        return catalog.select(catalog.library_cases(), [kernel], dtype)
    if signature is None:
        raise InspectionError("a kernel of your own needs a signature, e.g. '*fp16,*fp16,i32:16'")
    where = kernel if isinstance(kernel, str) else "the kernel"
    function = None if isinstance(kernel, str) else kernel
    return catalog.user_cases(where, signature, constexprs or {}, kernel=function, **launch)


def inspect_cases(
    cases: Sequence[StaticCase],
    targets: Sequence[Target] | None = None,
    *,
    jobs: int | None = None,
    progress: Callable[[KernelReport], None] | None = None,
) -> list[Assessment]:
    """Compile cases for targets, or each for the capabilities it is launched on, and assess them."""
    if targets is None:
        wanted = [[_target_of(number) for number in case.targets] for case in cases]
    else:
        wanted = [list(targets)] * len(cases)
    return inspect_each(cases, wanted, jobs=jobs, progress=progress)


def inspect_each(
    cases: Sequence[StaticCase],
    targets: Sequence[Sequence[Target]],
    *,
    jobs: int | None = None,
    progress: Callable[[KernelReport], None] | None = None,
) -> list[Assessment]:
    """Compile each case for its own targets, and assess them."""
    numbered = [
        replace(case, targets=tuple(target.capability.number for target in own))
        for case, own in zip(cases, targets, strict=True)
    ]
    reports = iter(compile_cases(numbered, jobs=jobs, progress=progress))
    return [
        assess(next(reports), target, launched=case.launched_on(target.capability.number))
        for case, own in zip(cases, targets, strict=True)
        for target in own
    ]


def _target_of(number: int) -> Target:
    if number not in CAPABILITIES:
        raise InspectionError(f"no limits are known for sm_{number}")
    return find_target(f"sm_{number}")
