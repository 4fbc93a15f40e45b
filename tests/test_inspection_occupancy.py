"""Occupancy against NVIDIA's own rules: a table made with cuda_occupancy.h, and the header itself where cc is there."""

import json
import random
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from fastops.inspection.gpus import CAPABILITIES, GPUS, find_target
from fastops.inspection.occupancy import next_step, occupancy, waves

STATIC = Path(__file__).parent / "static"
TABLE = STATIC / "occupancy.json"


def samples(count, seed):
    chance = random.Random(seed)
    for capability in CAPABILITIES.values():
        most = capability.shared_bytes
        for _ in range(count):
            registers = chance.choice([chance.randint(1, 257), chance.choice([32, 64, 128, 168, 255])])
            num_warps = chance.choice([chance.randint(1, 33), chance.choice([1, 2, 4, 8, 16, 32])])
            shared = chance.choice([0, chance.randint(0, most + 3000), chance.randint(0, 20000), most - 1024])
            barriers = chance.choice([1, 1, 1, 2, 3, 5, 16])
            yield capability.number, registers, num_warps, shared, barriers


def test_blocks_are_those_of_the_published_rules():
    rows = json.loads(TABLE.read_text())["rows"]
    assert {row[0] for row in rows} == set(CAPABILITIES)
    for row in rows:
        number, registers, num_warps, shared, barriers, blocks = row
        assert occupancy(CAPABILITIES[number], registers, num_warps, shared, barriers).blocks == blocks, row


def from_header(rows, folder):
    """Blocks as cuda_occupancy.h computes them; the header is inside Triton's wheel."""
    spec = find_spec("triton")
    if spec is None or shutil.which("cc") is None:
        pytest.skip("needs triton's wheel and a C compiler")
    include = Path(spec.origin).parent / "backends" / "nvidia" / "include"
    program = folder / "occupancy"
    subprocess.run(["cc", "-w", "-I", include, STATIC / "occupancy.c", "-o", program], check=True)
    lines = []
    for number, registers, num_warps, shared, barriers in rows:
        capability = CAPABILITIES[number]
        lines.append(
            f"{number} {capability.warps} {capability.shared_bytes} {registers} {num_warps} {shared} {barriers}"
        )
    done = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True, check=True)
    return [max(0, int(blocks)) for blocks in done.stdout.split()]


def test_blocks_are_those_of_the_header(tmp_path):
    rows = list(samples(3000, seed=1))
    expected = from_header(rows, tmp_path)
    assert len(expected) == len(rows)
    for row, blocks in zip(rows, expected, strict=True):
        number, registers, num_warps, shared, barriers = row
        assert occupancy(CAPABILITIES[number], registers, num_warps, shared, barriers).blocks == blocks, row


@pytest.mark.parametrize(
    ("number", "warps", "blocks", "shared_kib"),
    [  # CUDA C++ Programming Guide, technical specifications per compute capability
        *((80, 64, 32, 164), (86, 48, 16, 100), (87, 48, 16, 164), (89, 48, 24, 100), (90, 64, 32, 228)),
        *((100, 64, 32, 228), (120, 48, 24, 100)),
    ],
)
def test_limits_of_each_capability(number, warps, blocks, shared_kib):
    capability = CAPABILITIES[number]
    assert (capability.warps, capability.blocks, capability.shared_bytes) == (warps, blocks, shared_kib * 1024)
    assert capability.shared_bytes_per_block == (shared_kib - 1) * 1024


def test_known_kernels():
    # 128 threads of 255 registers: two warps a sub-partition, so two blocks of four warps
    assert occupancy(CAPABILITIES[90], 255, 4, 0).blocks == 2
    found = occupancy(CAPABILITIES[90], 168, 8, 98304)
    assert (found.blocks, found.limiter) == (1, "registers")
    too_much = occupancy(CAPABILITIES[86], 128, 8, 131072)
    assert too_much.blocks == 0
    assert too_much.reason == "131,072 bytes of shared memory a block, sm_86 allows 101,376"
    tensor_memory = occupancy(CAPABILITIES[100], 64, 4, 1024, tensor_memory_columns=256)
    assert (tensor_memory.blocks, tensor_memory.limiter) == (2, "tensor memory")


def test_the_advised_saving_lets_one_more_block_in_and_less_does_not():
    tried = 0
    for number, registers, num_warps, shared, _ in samples(400, seed=2):
        capability = CAPABILITIES[number]
        now = occupancy(capability, registers, num_warps, shared)
        if not now.blocks:
            continue
        advice = next_step(capability, registers, num_warps, shared, now)
        if not advice:
            continue
        words = advice.replace(",", "").split()
        fewer = {word: -int(amount) for amount, word in zip(words, [*words[1:], ""], strict=True) if amount[0] == "-"}
        less_registers, less_shared = fewer.get("registers", 0), fewer.get("bytes", 0)
        after = occupancy(capability, registers - less_registers, num_warps, shared - less_shared)
        assert after.blocks > now.blocks, (number, registers, num_warps, shared, advice)
        if less_registers:
            tried += 1
            almost = occupancy(capability, registers - less_registers + 1, num_warps, shared - less_shared)
            assert almost.blocks == now.blocks, (number, registers, num_warps, shared, advice)
        if less_shared:
            tried += 1
            almost = occupancy(capability, registers - less_registers, num_warps, shared - less_shared + 1)
            assert almost.blocks == now.blocks, (number, registers, num_warps, shared, advice)
    assert tried > 100


def test_waves_and_tail():
    spread = waves(grid=300, blocks=2, multiprocessors=100)
    assert spread.waves == 1.5
    assert spread.tail_efficiency == 0.75
    assert waves(grid=200, blocks=2, multiprocessors=100).tail_efficiency == 1.0


@pytest.mark.parametrize(
    ("text", "number", "name"),
    [
        *(("sm_86", 86, "RTX 3090"), ("86", 86, "RTX 3090"), ("8.6", 86, "RTX 3090"), ("sm_90a", 90, "H100")),
        *(("RTX 3090", 86, "RTX 3090"), ("rtx3090", 86, "RTX 3090"), ("3090", 86, "RTX 3090"), ("h100", 90, "H100")),
        *(("NVIDIA GeForce RTX 3090", 86, "RTX 3090"), ("NVIDIA H100 80GB HBM3", 90, "H100")),
        *(("NVIDIA H100 PCIe", 90, "H100 PCIe"), ("A100-SXM4-80GB", 80, "A100"), ("3090 ti", 86, "RTX 3090 Ti")),
        *(("A100-SXM4-40GB", 80, "A100 40GB"), ("NVIDIA A100-PCIE-40GB", 80, "A100 40GB")),
        *(("NVIDIA A100 80GB PCIe", 80, "A100"), ("NVIDIA GH200 480GB", 90, "GH200")),
        *(("NVIDIA RTX 6000 Ada Generation", 89, "RTX 6000 Ada"), ("NVIDIA H100 NVL", 90, "H100 NVL")),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 120, "RTX PRO 6000"),
        *(("NVIDIA L40S", 89, "L40S"), ("sm_120", 120, "RTX 5090"), ("10.0", 100, "B200"), ("L4", 89, "L4")),
    ],
)
def test_targets_as_people_write_them(text, number, name):
    target = find_target(text)
    assert target.capability.number == number
    assert target.gpu is not None
    assert target.gpu.name == name


@pytest.mark.parametrize("text", ["sm_70", "sm_999", "GTX 1080", "", "TPU", "3091"])
def test_unknown_targets_are_refused_by_name(text):
    with pytest.raises(ValueError, match="target"):
        find_target(text)


def test_every_gpu_has_limits():
    assert all(gpu.capability in CAPABILITIES for gpu in GPUS)
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)
