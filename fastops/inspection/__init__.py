"""What a Triton kernel needs on a GPU that is not here: registers, spills, shared memory, occupancy, floor time.

    from fastops.inspection import inspect
    for report in inspect("attention", targets=["sm_90", "RTX 3090"]):
        print(report.name, report.registers, report.spills)

Kernels are compiled, never run; importing this imports neither triton nor CUDA.
"""

from fastops.inspection.compile import InspectionError, compile_case, compile_cases
from fastops.inspection.report import KernelReport, Loop

__all__ = ["InspectionError", "KernelReport", "Loop", "compile_case", "compile_cases"]
