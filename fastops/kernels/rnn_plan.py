"""Which tile sizes a recurrent layer runs with: a short rule without tuning runs, blind to T, and B only has to fit.

Shared memory holds the program's slice of W_hh and one tile of h. All programs of a persistent launch meet at a
barrier, so they must be resident together: at most one per multiprocessor is launched, and a batch with more tiles than
that takes several launches.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastops import _env

SLOTS = {"LSTM": 4, "GRU": 4, "RNN_TANH": 1, "RNN_RELU": 1}
GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
SMALL_HIDDEN = 128
PERSISTENT_HIDDEN = 1024

# bytes a block may use, by compute capability, and multiprocessors to plan with where there is no GPU to ask
SHARED_BYTES = {80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376}
TENSOR_MEMORY = (100, 103)
ASSUMED_MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148}


@dataclass(frozen=True)
class Machine:
    """What a plan needs to know of a GPU."""

    target: int
    shared_bytes: int
    multiprocessors: int

    @staticmethod
    def of(target: int, multiprocessors: int | None = None) -> Machine:
        """A GPU of this compute capability (90 for sm_90); an unknown one is taken for the smallest known."""
        shared = SHARED_BYTES.get(target, min(SHARED_BYTES.values()))
        return Machine(target, shared, multiprocessors or ASSUMED_MULTIPROCESSORS.get(target, 1))

    @staticmethod
    def at(device) -> Machine:
        """The GPU of a tensor; an H100 while interpreting."""
        if device.type != "cuda":
            return Machine.of(90)
        index = _env.index_of(device)
        major, minor = _env.capability(index)
        return Machine.of(10 * major + minor, _env.multiprocessors(index))


@dataclass(frozen=True)
class Plan:
    """Tile sizes of one kernel; `tiles` programs share a batch tile, `batch_tiles` of them fit in one launch."""

    block_h: int
    block_b: int
    block_k: int
    tiles: int
    batch_tiles: int
    num_warps: int
    split: int = 1  # parts of the inner dimension, backward
    group: int = 1  # pieces of the gradients on their way to one product, backward
    alone: bool = False  # planned to have a multiprocessor to itself
    stages: int = 1  # of the pipeline that fetches what the next step reads, small engine

    @property
    def options(self) -> dict[str, int | bool]:
        """What Triton is told beyond the sizes.

        The assembler does not know when a program has a multiprocessor to itself, and would rather spill than use more
        than half of its registers.
        """
        options: dict[str, int | bool] = {"num_warps": self.num_warps, "num_stages": 1}
        if self.alone:
            options["maxnreg"] = 65536 // (32 * self.num_warps) - 1
        if self.tiles > 1:
            options["launch_cooperative_grid"] = True
        return options


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n and at least 16, the least side of a tl.dot."""
    return max(16, 1 << (n - 1).bit_length())


def small(mode: str, hidden: int, itemsize: int, machine: Machine, backward: bool) -> Plan | str:
    """One program per batch tile with all of W_hh on chip, or why not."""
    if hidden > SMALL_HIDDEN:
        return f"the small engine takes a hidden size of at most {SMALL_HIDDEN}, got {hidden}"
    side = power_of_two(hidden)
    slots, gates = SLOTS[mode], GATES[mode]
    least = 0
    for stages in (2, 1):  # with two, what the next step reads is on its way during a step
        if backward:
            held, scratch = gates, itemsize * (gates + slots)
            fetched = itemsize * (slots + 1) + 4
        else:
            held, scratch, fetched = slots, itemsize * slots, itemsize * slots
        least = itemsize * held * side * side + 16 * side * (scratch + (stages - 1) * fetched)
        if least <= machine.shared_bytes:
            # a warp for every 8 units has all slots of a unit in one thread
            return Plan(side, 16, side, 1, 1 << 30, side // 8, alone=side >= 64, stages=stages)
    return (
        f"W_hh of hidden size {hidden} needs {least} bytes of shared memory, sm_{machine.target} has "
        f"{machine.shared_bytes} a block"
    )


def persistent(
    mode: str, hidden: int, batch: int, directions: int, itemsize: int, machine: Machine, backward: bool
) -> Plan | str:
    """Several programs per batch tile, each with a slice of W_hh on chip, or why not."""
    if hidden > PERSISTENT_HIDDEN or hidden % 8:
        return f"the persistent engine takes hidden sizes of at most {PERSISTENT_HIDDEN} divisible by 8, got {hidden}"
    if machine.target in TENSOR_MEMORY and itemsize * hidden > 1024 and GATES[mode] == 1:
        return (
            f"with tensor memory (sm_{machine.target}) a plain RNN runs persistently up to a hidden size of "
            f"{1024 // itemsize} in this dtype, got {hidden}"
        )
    plans = list((_backward_plans if backward else _forward_plans)(mode, hidden, directions, itemsize, machine))
    fitting = [plan for plan, needed in plans if needed <= machine.shared_bytes and plan.batch_tiles >= 1]
    for plan in fitting:
        if -(-batch // plan.block_b) <= plan.batch_tiles:
            return plan
    if fitting:
        return fitting[-1]
    sizes = f"hidden size {hidden} in {directions} direction(s)"
    least = min(needed for _, needed in plans)
    if least > machine.shared_bytes:
        return f"{sizes} needs {least} bytes of shared memory a block, sm_{machine.target} has {machine.shared_bytes}"
    return (
        f"{sizes} needs {directions * plans[0][0].tiles} programs that are resident together, this GPU has "
        f"{machine.multiprocessors} multiprocessors"
    )


def _forward_plans(mode: str, hidden: int, directions: int, itemsize: int, machine: Machine):
    block_h = 64 // SLOTS[mode]  # 64 rows: the long side of a tensor-core instruction
    tiles = -(-hidden // block_h)
    # tensor memory takes an address in registers for every 32 bytes along the inner side, too many of a long one;
    # the compiler uses it with 4 or 8 warps only
    warps = 16 if machine.target in TENSOR_MEMORY and itemsize * hidden > 1024 else 8
    for block_b in (16, 32, 64) if warps == 8 else (32,):
        # where all warps take part in a product, the compiler fetches a whole chunk of W_hh ahead: short ones fit
        longest = 1024 if machine.target == 90 else 16384 // max(32, block_b)
        sizes = (k for k in (1024, 512, 256, 128, 64, 32, 16) if k <= longest)
        block_k = next(k for k in sizes if -(-hidden // k) * k <= 1.15 * hidden or k == 16)
        padded = -(-hidden // block_k) * block_k
        fits = machine.multiprocessors // (tiles * directions)
        needed = itemsize * padded * (64 + block_b) + 2048
        yield Plan(block_h, block_b, block_k, tiles, fits, warps, alone=True), needed


def _backward_plans(mode: str, hidden: int, directions: int, itemsize: int, machine: Machine):
    """Tiles of `dh[block_h, block_b] = W_slice^T[block_h, G H] @ d_sums^T[G H, block_b]`, G H over the warps.

    These are products of 16 rows on all warps, not of 64 rows on warp groups, by choice. 64 units of
    an LSTM with H = 512 need 262,144 bytes of W_hh in fp16, more than a block may use, and 32 units, padded to 64,
    spilled 3,312 bytes. With the batch as the long side each program would read the gradients of 64 rows a step, 256
    KiB from L2 in place of 64, and that is what a step waits for. 16 units hold 65,536 bytes of W_hh, each read once a
    step; the step is 498 instructions, 32 of them products of a warp (compiled by Triton 3.7.1 for sm_90, not timed).
    """
    gates = GATES[mode]
    warps = 8
    block_h = 16 if gates > 1 else 32
    tiles = -(-hidden // block_h)
    least = 16 * warps  # the shortest inner side of a product, for each warp
    for block_b in (16, 32):
        fits = machine.multiprocessors // (tiles * directions)
        # many long pieces of 32 rows spill under Triton 3.6, but with tensor memory short ones do so more
        roomy = block_b == 16 or machine.target in TENSOR_MEMORY
        longest = 16384 // block_b if roomy else 256
        # gradients on their way to one product: the more, the fewer joins of the program a step
        for staged in (65536, 32768, 16384) if roomy else (32768, 16384):
            sizes = (k for k in (1024, 512, 256, 128) if k <= longest and itemsize * k * block_b <= staged)
            block_k = next((k for k in sizes if -(-hidden // k) * k <= 1.15 * hidden), least)
            pieces = gates * -(-hidden // block_k)
            slice_bytes = itemsize * pieces * block_k * block_h
            piece_bytes = itemsize * block_k * block_b
            group = max(1, min(pieces, staged // piece_bytes))
            needed = slice_bytes + group * piece_bytes + 2048
            if needed <= machine.shared_bytes:
                break
        yield Plan(block_h, block_b, block_k, tiles, fits, warps, split=warps, group=group, alone=tiles > 1), needed
