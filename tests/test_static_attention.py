"""The static gate of attention: what the compiler makes of the shipped configurations. Nothing is run."""

import functools
import itertools

import pytest

pytest.importorskip("triton")

import triton

from fastops.inspection import compile_cases
from fastops.inspection.gpus import CAPABILITIES
from fastops.kernels.attention import static_cases
from fastops.kernels.attention_configs import Form, configuration
from fastops.kernels.attention_problem import PAD

NEWEST = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 9)
CASES = {case.name.removeprefix("attention."): case for case in static_cases()}

# instructions of the main loop for each score element and thread; the Triton tutorial's forward has 8.05 and 7.67
LIMITS = {
    "forward[64,fp16,dense,descriptors]": 6.95,
    "forward[64,fp16,lengths,descriptors]": 6.95,
    "forward[64,fp16,causal,descriptors]": 6.95,
    "forward[64,fp16,padded,descriptors]": 6.95,
    "forward[128,fp16,dense,descriptors]": 7.75,
    "forward[128,fp16,lengths,descriptors]": 7.82,  # wanted 7.75: cutting V off at the length costs 8 instructions
    "forward[128,fp16,causal,descriptors]": 7.75,
    "forward[64,fp16,lengths,dropout,descriptors]": 12.6,
    "forward[128,fp16,lengths,dropout,descriptors]": 13.4,
    "dq[64,fp16,lengths,descriptors]": 6.4,
    "dq[64,fp16,causal,descriptors]": 6.4,
    "dq[64,fp16,padded,descriptors]": 6.4,
    "dq[128,fp16,lengths,descriptors]": 7.3,
    "dq[128,fp16,causal,descriptors]": 7.3,
    "dq[64,fp16,lengths,dropout,descriptors]": 10.9,
    "dq[128,fp16,lengths,dropout,descriptors]": 14.5,
    "dkdv[64,fp16,lengths,descriptors]": 10.4,
    "dkdv[64,fp16,causal,descriptors]": 10.4,
    "dkdv[64,fp16,padded,descriptors]": 10.4,
    "dkdv[128,fp16,lengths,descriptors]": 11.3,
    "dkdv[128,fp16,causal,descriptors]": 13.0,
    "dkdv[64,fp16,lengths,dropout,descriptors]": 18.2,
    "dkdv[128,fp16,lengths,dropout,descriptors]": 24.8,
}
TWO_BLOCKS = [name for name in LIMITS if name.startswith("forward[64")]  # 2 blocks on a multiprocessor
FAST = {
    "forward[64,fp16,lengths,descriptors]",
    "forward[64,fp16,lengths,dropout,descriptors]",
    "dq[64,fp16,lengths,descriptors]",
    "dkdv[64,fp16,lengths,descriptors]",
}
LAUNCHES = [(name, target) for name, case in CASES.items() for target in case.targets]


def parameters(names):
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in names]


@functools.cache
def compiled(fast, target=90):
    """The reports of the fast or of all cases, from one pool of compilers."""
    names = [name for name, case in CASES.items() if (name in FAST if fast else target in case.targets)]
    return dict(zip(names, compile_cases([CASES[name] for name in names], [target]), strict=True))


def report_of(name):
    return compiled(name in FAST)[name]


@pytest.mark.parametrize("name", parameters(LIMITS))
def test_main_loop(name):
    report = report_of(name)
    assert report.error is None
    loop = report.main_loop
    assert report.tensor_core == "HGMMA"
    # each wait for a copy has a retry out of line: as many instructions as there are SYNCS, run only where data is late
    executed = loop.length - loop.count("SYNCS")
    slack = (0.8 if name.startswith("dkdv") else 0.35) if NEWEST else 0.0
    assert executed / report.work_per_thread <= LIMITS[name] + slack


@pytest.mark.parametrize("name", parameters(TWO_BLOCKS))
def test_two_blocks_fit_on_a_multiprocessor(name):
    report = report_of(name)
    assert report.registers <= 232
    assert 2 * (report.shared_bytes + 1024) <= 228 * 1024
    assert 2 * report.registers * 32 * report.num_warps <= 65536


def clean(name, target, report):
    assert report.error is None
    assert report.stack_bytes == report.local_loads == report.local_stores == 0, "registers spill"
    assert report.shared_bytes <= CAPABILITIES[target].shared_bytes_per_block
    small = "[256" in name and "pointers" in name
    products = "PRECISION" in CASES[name].constexprs
    if target == 90 and products and not small:
        assert report.tensor_core == "HGMMA"
        waits = report.main_loop.count("WARPGROUP")
        assert waits <= report.main_loop.tensor_operations / 2, "the tensor cores are waited for one by one"


@pytest.mark.parametrize("name", sorted(FAST))
def test_nothing_spills(name):
    clean(name, 90, report_of(name))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "target"), LAUNCHES)
def test_nothing_spills_anywhere(name, target):
    clean(name, target, compiled(False, target)[name])


FORMS = [Form(*switches) for switches in itertools.product([False, True], repeat=8)]
SMALL = 99 * 1024  # of a block, the least of all GPUs from sm_80


@pytest.mark.parametrize("sm", [80, 86, 87, 89, 90, 100, 103, 110, 120, 121])
def test_operands_fit_in_shared_memory(sm):
    """What must lie there whatever the compiler does: two tiles for the whole program, two for each stage."""
    room = 227 * 1024 if sm in (90, 100, 103, 110) else SMALL
    for kernel, block_d, size, form in itertools.product(
        ("forward", "dkdv", "dq", "bias"), (16, 32, 64, 128, 256), (2, 4), FORMS
    ):
        config = configuration(kernel, block_d, size, sm, form)
        kept, walked = (config.block_n, config.block_m) if kernel == "dkdv" else (config.block_m, config.block_n)
        kept_tiles = 1 if kernel == "forward" or config.split else 2
        assert (kept_tiles * kept + 2 * walked * config.stages) * block_d * size <= room, (kernel, block_d, form)
        assert PAD % config.block_m == PAD % config.block_n == 0
