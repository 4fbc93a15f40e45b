"""The static gate of the convolution: every shipped configuration compiled for GPUs that are not here."""

import pytest

pytest.importorskip("triton")

from fastops.inspection import compile_cases
from fastops.inspection.gpus import CAPABILITIES
from fastops.kernels.conv2d_static import static_cases

# main-loop instructions for each four HGMMA; one of 64x256x16 does the work of two of 64x128x16 and counts as two
LOOP_LIMIT = {"boxes": 84, "batch": 84, "gather": 120}
CASES = {case.name: case for case in static_cases()}
# the fp16 of each kernel and width in every run, all in the long one
QUICK = [name for name in CASES if name.startswith("conv2d.") and ",fp16]" in name]


def check(case, target):
    (report,) = compile_cases([case], [target], jobs=1)
    assert report.error is None, report.error
    assert report.stack_bytes == 0
    assert (report.local_loads, report.local_stores) == (0, 0)
    assert not report.warnings
    assert report.shared_bytes <= CAPABILITIES[target].shared_bytes_per_block
    form = case.name.partition("[")[0].partition(".")[2]
    if target != 90 or not case.name.startswith("conv2d.") or "ieee" in case.name:
        return
    assert report.tensor_core == "HGMMA"
    if form in ("boxes", "batch"):
        assert report.main_loop.count("LDSM") == 0
        assert report.main_loop.count("UTMALDG") >= 2
    if form in LOOP_LIMIT and ("fp16" in case.name or "bf16" in case.name):
        hgmma = report.main_loop.count("HGMMA")
        columns = case.work_per_thread * 32 * case.num_warps / (hgmma * 64 * 16)
        assert columns in (64, 128, 256)
        assert report.main_loop.length * 4 / (hgmma * max(1, columns / 128)) <= LOOP_LIMIT[form]


@pytest.mark.parametrize("name", QUICK)
def test_main_configurations_on_sm_90(name):
    check(CASES[name], 90)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "target"), [(name, target) for name, case in CASES.items() for target in case.targets]
)
def test_every_configuration_on_every_target_that_has_it(name, target):
    check(CASES[name], target)


def test_tma_configurations_are_offered_only_where_there_is_tma():
    for case in CASES.values():
        uses_tma = any(kind.startswith("tensordesc") for kind in case.signature.values())
        assert (80 in case.targets) != uses_tma
        assert case.num_warps == 4  # eight are known to be miscompiled on H100
