"""What a Triton kernel needs on a GPU that is not here: registers, spills, shared memory, occupancy, floor time.

    from fastops.inspection import inspect
    for report in inspect("attention", targets=["sm_90", "RTX 3090"]):
        print(report.name, report.registers, report.spills)

Kernels are compiled, never run; importing this imports neither triton nor CUDA.
"""

from fastops.inspection.api import inspect
from fastops.inspection.assess import Assessment, assess
from fastops.inspection.compile import InspectionError, compile_case, compile_cases
from fastops.inspection.gpus import find_target
from fastops.inspection.report import KernelReport, Loop

__all__ = [
    "Assessment",
    "InspectionError",
    "KernelReport",
    "Loop",
    "assess",
    "compile_case",
    "compile_cases",
    "find_target",
    "inspect",
]
