"""How many blocks of a kernel fit on a multiprocessor, what limits them, and how full the last wave is.

The rules are those of NVIDIA's cuda_occupancy.h for compute capability 8.0 and newer: registers are allocated to warps
in units of 256 and each of the four sub-partitions holds a quarter of them; shared memory is allocated in units of 128
bytes, and the driver keeps 1 KiB of it for each block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastops.inspection.gpus import RESERVED_SHARED_BYTES, Capability

REGISTER_UNIT = 256
SHARED_UNIT = 128
SUB_PARTITIONS = 4
MAX_WARPS_PER_BLOCK = 32


@dataclass(frozen=True)
class Occupancy:
    """How much of a multiprocessor a kernel fills.

    Attributes:
        blocks: resident blocks; 0 where the kernel cannot be launched.
        warps: resident warps.
        fraction: of the warps that could be resident.
        limits: blocks that each resource alone would allow, the scarcest first.
        reason: why it cannot be launched, or None.
    """

    blocks: int
    warps: int
    fraction: float
    limits: dict[str, int]
    reason: str | None

    @property
    def limiter(self) -> str:
        """The resource, or resources, that allow no further block."""
        return "/".join(name for name, blocks in self.limits.items() if blocks == self.blocks)


def occupancy(
    capability: Capability,
    registers: int,
    num_warps: int,
    shared_bytes: int,
    barriers: int = 1,
    tensor_memory_columns: int = 0,
) -> Occupancy:
    """Resident blocks of a kernel.

    Args:
        capability: of the GPU.
        registers: of a thread.
        num_warps: of a block.
        shared_bytes: of a block, static and dynamic.
        barriers: named barriers of a block.
        tensor_memory_columns: of a block (tcgen05).
    """
    registers_per_warp = _round_up(registers * 32, REGISTER_UNIT)
    shared = _round_up(shared_bytes + RESERVED_SHARED_BYTES, SHARED_UNIT)
    reasons = []
    if num_warps > MAX_WARPS_PER_BLOCK:
        reasons.append(f"{num_warps} warps a block, {MAX_WARPS_PER_BLOCK} are allowed")
    if shared > capability.shared_bytes:
        reasons.append(
            f"{shared_bytes:,} bytes of shared memory a block, {capability.name} allows "
            f"{capability.shared_bytes_per_block:,}"
        )
    if registers > capability.registers_per_thread:
        reasons.append(f"{registers} registers a thread, {capability.registers_per_thread} are allowed")
    elif registers_per_warp * _round_up(num_warps, SUB_PARTITIONS) > capability.registers:
        reasons.append(f"{num_warps} warps of {registers} registers need more than {capability.registers:,} registers")
    if tensor_memory_columns > capability.tensor_memory_columns:
        reasons.append(
            f"{tensor_memory_columns} columns of tensor memory, {capability.name} has "
            f"{capability.tensor_memory_columns}"
        )
    if reasons:
        return Occupancy(0, 0, 0.0, {}, "; ".join(reasons))
    limits = {"warps": capability.warps // num_warps, "blocks": capability.blocks}
    if registers:
        warps = capability.registers // SUB_PARTITIONS // registers_per_warp * SUB_PARTITIONS
        limits["registers"] = warps // num_warps
    limits["shared memory"] = capability.shared_bytes // shared
    if capability.barriers is not None and barriers:
        limits["barriers"] = capability.barriers // barriers
    if tensor_memory_columns:
        limits["tensor memory"] = capability.tensor_memory_columns // tensor_memory_columns
    blocks = min(limits.values())
    reason = None if blocks else f"{barriers} barriers a block"
    ordered = dict(sorted(limits.items(), key=lambda item: item[1]))
    return Occupancy(blocks, blocks * num_warps, blocks * num_warps / capability.warps, ordered, reason)


def next_step(capability: Capability, registers: int, num_warps: int, shared_bytes: int, now: Occupancy) -> str:
    """The smallest saving of the scarce resources that lets one more block in, e.g. "-14 registers"; "" if none."""
    wanted = now.blocks + 1
    needs = []
    for name in now.limiter.split("/"):
        if name == "registers":
            per_sub_partition = math.ceil(wanted * num_warps / SUB_PARTITIONS)
            allowed = capability.registers // SUB_PARTITIONS // per_sub_partition // REGISTER_UNIT * REGISTER_UNIT // 32
            if allowed < 1 or wanted * num_warps > capability.warps:
                return ""
            needs.append(f"-{registers - allowed} registers")
        elif name == "shared memory":
            allowed = capability.shared_bytes // wanted // SHARED_UNIT * SHARED_UNIT - RESERVED_SHARED_BYTES
            if allowed < 0:
                return ""
            needs.append(f"-{shared_bytes - allowed:,} bytes of shared memory")
        else:
            return ""
    return " and ".join(needs)


@dataclass(frozen=True)
class Waves:
    """How a grid spreads over the GPU.

    Attributes:
        waves: grid / (multiprocessors x blocks), e.g. 2.3.
        tail_efficiency: waves / ceil(waves): the share of block slots that have work, were all blocks equally long.
    """

    waves: float
    tail_efficiency: float


def waves(grid: int, blocks: int, multiprocessors: int) -> Waves:
    """Waves of a grid of equally long blocks."""
    if grid < 1 or blocks < 1:
        return Waves(0.0, 0.0)
    count = grid / (blocks * multiprocessors)
    return Waves(count, count / math.ceil(count))


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
