"""Reads the machine code that cuobjdump prints: opcodes, innermost loops, tensor-core and copy instructions."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from fastops.inspection.report import Loop

_FUNCTION = re.compile(r"^\s*Function : (\S+)")
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_TARGET = re.compile(r"\b0x([0-9a-f]+)\b")
_BARRIER = re.compile(r"\b(B\d+), (?:.*\b)?0x([0-9a-f]+)")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")

# opcode -> kind; longest prefix first, because "HGMMA" would also match a test for "MMA"
_TENSOR_CORE = (
    (re.compile(r"^UTC[A-Z]*MMA$"), "UTCMMA"),
    (re.compile(r"^[A-Z]GMMA$"), "HGMMA"),
    (re.compile(r"^O?[A-Z]MMA$"), "HMMA"),
)
_NEWEST_FIRST = ("UTCMMA", "HGMMA", "HMMA")
_ASYNC_COPY = re.compile(r"^(LDGSTS|UTMALDG|UTMASTG|UTMAREDG|UTMACCTL|UBLKCP|UBLKRED|UTMAPF)$")
# these end a basic block and have no target that the text names
_NO_SUCCESSOR = frozenset({"EXIT", "RET", "BRX", "JMX", "KILL", "BPT"})


@dataclass(frozen=True)
class Instruction:
    """One machine instruction: its address, opcode with and without modifiers, and predicate."""

    address: int
    opcode: str
    predicated: bool
    text: str

    @property
    def root(self) -> str:
        """Opcode without modifiers: "HGMMA" of "HGMMA.64x128x16.F32"."""
        return self.opcode.partition(".")[0]


def parse(listing: str) -> list[list[Instruction]]:
    """Instructions of each function of a listing, kernel first as cuobjdump prints it."""
    functions: list[list[Instruction]] = []
    for line in listing.splitlines():
        if _FUNCTION.match(line):
            functions.append([])
        elif functions and (match := _INSTRUCTION.match(line)):
            text = match.group(2)
            words = text.split()
            predicated = words[0].startswith("@")
            opcode = words[1] if predicated and len(words) > 1 else words[0]
            functions[-1].append(Instruction(int(match.group(1), 16), opcode, predicated, text))
    return functions


def resources(listing: str) -> tuple[int, int, int]:
    """Registers, stack bytes and static shared bytes of the kernel, from `cuobjdump -res-usage`."""
    found = _RESOURCES.search(listing)
    if found is None:
        raise ValueError("cuobjdump printed no resource usage")
    registers, stack, shared = (int(number) for number in found.groups())
    return registers, stack, shared


def tensor_core_kind(opcode_root: str) -> str | None:
    """The kind of a tensor-core instruction, "HMMA", "HGMMA" or "UTCMMA"; None for any other."""
    return next((kind for pattern, kind in _TENSOR_CORE if pattern.match(opcode_root)), None)


def tensor_core(instructions: Counter[str]) -> str | None:
    """The newest kind of tensor-core instruction that occurs."""
    kinds = {tensor_core_kind(root) for root in instructions}
    return next((kind for kind in _NEWEST_FIRST if kind in kinds), None)


def async_copies(instructions: Counter[str]) -> dict[str, int]:
    """Asynchronous copies by opcode."""
    return {root: count for root, count in sorted(instructions.items()) if _ASYNC_COPY.match(root)}


def loops(instructions: list[Instruction]) -> tuple[Loop, ...]:
    """The innermost loops that use tensor cores, or where none does all innermost loops, in order of address."""
    bodies = _natural_loops(instructions)
    counted = []
    for body in bodies:
        roots = Counter(instruction.root for index in sorted(body) for instruction in [instructions[index]])
        tensor_operations = sum(count for root, count in roots.items() if tensor_core_kind(root))
        counted.append((body, Loop(sum(roots.values()), roots, tensor_operations)))
    if any(loop.tensor_operations for _, loop in counted):
        counted = [(body, loop) for body, loop in counted if loop.tensor_operations]
    innermost = [
        (body, loop) for body, loop in counted if not any(other < body for other, _ in counted if other is not body)
    ]
    return tuple(loop for _, loop in sorted(innermost, key=lambda pair: min(pair[0])))


def main_loop(found: tuple[Loop, ...]) -> Loop | None:
    """The loop with the most tensor-core instructions, of equals the shortest; without tensor cores the longest."""
    if not found:
        return None
    if any(loop.tensor_operations for loop in found):
        return max(found, key=lambda loop: (loop.tensor_operations, -loop.length))
    return max(found, key=lambda loop: loop.length)


def _natural_loops(instructions: list[Instruction]) -> list[frozenset[int]]:
    """Bodies of the natural loops as sets of instruction indices, loops with the same header joined.

    A plain "backward branch" test is not enough: waits on a barrier are moved behind the kernel's end and jump back
    into the middle of the loop, which would make the whole tail look like a loop.
    """
    starts, successors = _blocks(instructions)
    if not starts:
        return []
    dominators = _dominators(successors)
    predecessors: list[list[int]] = [[] for _ in starts]
    for block, targets in enumerate(successors):
        for target in targets:
            predecessors[target].append(block)
    members: dict[int, set[int]] = {}
    for block, targets in enumerate(successors):
        for header in targets:
            if not dominators[block] >> header & 1:
                continue
            body = members.setdefault(header, {header})
            waiting = [block]
            while waiting:
                current = waiting.pop()
                if current not in body:
                    body.add(current)
                    waiting.extend(predecessors[current])
    ends = [*starts[1:], len(instructions)]
    return [
        frozenset(index for block in body for index in range(starts[block], ends[block]))
        for header, body in sorted(members.items())
        if not (len(body) == 1 and ends[header] - starts[header] == 1)  # "BRA ." behind the last EXIT
    ]


def _blocks(instructions: list[Instruction]) -> tuple[list[int], list[list[int]]]:
    index_of = {instruction.address: index for index, instruction in enumerate(instructions)}
    branches: dict[int, tuple[int | None, bool]] = {}  # index -> (target, falls through)
    reconvergence: dict[str, int | None] = {}  # "BSSY B0, 0x40" names where "BSYNC B0" continues
    for index, instruction in enumerate(instructions):
        if instruction.root == "BSSY" and (found := _BARRIER.search(instruction.text)):
            reconvergence[found.group(1)] = index_of.get(int(found.group(2), 16))
        elif instruction.root == "BSYNC":
            target = reconvergence.get(instruction.text.split()[-1])
            branches[index] = (target, instruction.predicated or target is None)
        elif instruction.root == "BRA":
            addresses = _TARGET.findall(instruction.text)
            target = index_of.get(int(addresses[-1], 16)) if addresses else None
            # "@!P0 BRA 0x40", "BRA P1, 0x40", "BRA.U UP0, 0x40", "BRA.DIV UR4, 0x40" may fall through
            operands = instruction.text.partition(instruction.opcode)[2]
            conditional = instruction.predicated or "," in operands or "DIV" in instruction.opcode
            branches[index] = (target, conditional)
        elif instruction.root in _NO_SUCCESSOR:
            branches[index] = (None, instruction.predicated)
    leaders = {0} if instructions else set()
    for index, (target, _) in branches.items():
        leaders.add(index + 1)
        if target is not None:
            leaders.add(target)
    starts = sorted(leader for leader in leaders if leader < len(instructions))
    block_of = {start: block for block, start in enumerate(starts)}
    successors: list[list[int]] = []
    for end in [*starts[1:], len(instructions)]:
        target, falls_through = branches.get(end - 1, (None, True))
        following = [block_of[target]] if target is not None else []
        if falls_through and end < len(instructions):
            following.append(block_of[end])
        successors.append(following)
    return starts, successors


def _dominators(successors: list[list[int]]) -> list[int]:
    """Bit set of the dominators of each block; blocks out of reach are dominated by all and start no loop."""
    count = len(successors)
    order: list[int] = []
    seen = {0}
    stack = [(0, iter(successors[0]))]
    while stack:
        block, remaining = stack[-1]
        target = next((target for target in remaining if target not in seen), None)
        if target is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(target)
            stack.append((target, iter(successors[target])))
    order.reverse()
    predecessors: list[list[int]] = [[] for _ in range(count)]
    for block in order:
        for target in successors[block]:
            predecessors[target].append(block)
    everything = (1 << count) - 1
    dominators = [everything if block in seen else 0 for block in range(count)]
    dominators[0] = 1
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            common = everything
            for predecessor in predecessors[block]:
                common &= dominators[predecessor]
            common |= 1 << block
            if common != dominators[block]:
                dominators[block] = common
                changed = True
    return dominators
