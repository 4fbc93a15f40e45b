"""One case into one row: every arm gated, timed in rounds with the others, and checked once more."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from bench import clocks, gate, launched, stats
from bench.case import Arm, Case, Tensors, Unavailable, Workload
from bench.clocks import first_line
from bench.measure import Effort, measure
from bench.modes import Step, bind
from bench.results import Row
from bench.telemetry import Telemetry
from bench.verdict import judge, significant

CUDNN_BENCHMARK = True  # an untuned cuDNN is no baseline


@dataclass
class Options:
    """What the caller chose."""

    device: torch.device
    effort: Effort
    seeds: int = 3
    clock: str = "device"  # "device" or "host"
    providers: Sequence[str] | None = None
    slow_builds: bool = False
    gate_only: bool = False
    ceilings: dict[str, Any] | None = None
    telemetry: Telemetry | None = None
    on_round: Callable[[int], None] = lambda count: None
    on_stage: Callable[[str], None] = lambda what: None


@dataclass
class Contestant:
    """An arm that passed the gate, with all that was learned on the way."""

    arm: Arm
    tensors: list[Tensors]
    make_step: Callable[[Tensors], Step]
    facts: dict[str, Any] = field(default_factory=dict)
    timed: clocks.Timed | None = None


def run_case(case: Case, workload: Workload, options: Options) -> Row:
    """Gate every arm, time those that pass, judge fastops against the best stock arm. Errors end in the row."""
    started = time.perf_counter()
    row: Row = {
        "case": case.id,
        "op": case.op,
        "name": case.name,
        "mode": case.mode,
        "dtype": case.dtype,
        "shape": dict(case.shape),
        "gate": "fail",
        "providers": {},
        "vs_best": None,
        "verdict": stats.ERROR,
    }
    try:
        with cudnn_benchmark(CUDNN_BENCHMARK):
            _fill(row, case, workload, options)
    except Unavailable as error:
        row["error"], row["verdict"] = str(error), stats.ABSENT
    except Exception as error:  # one case never stops the others
        row["error"] = first_line(error)
    finally:
        row["seconds"] = round(time.perf_counter() - started, 2)
        free_memory(options.device)
    return row


def _fill(row: Row, case: Case, workload: Workload, options: Options) -> None:
    device = options.device
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # what the last case compiled is of no use, and counts against a limit
    flops, moved = workload.flops(case), workload.bytes(case)
    row["flops"], row["bytes"] = flops, moved
    arms = chosen(workload.arms(case, device), options.providers)
    row["providers"] = {arm.name: {"role": arm.role, "how": arm.how, "headline": arm.headline} for arm in arms}
    options.on_stage("truth")
    contents = [workload.inputs(case, device, seed) for seed in range(options.seeds)]
    exam = gate.Exam(
        contents,
        [workload.truth(case, content) for content in contents],
        case.torch_dtype,
        randomised=workload.randomised(case) if hasattr(workload, "randomised") else False,
        relevant=partial(workload.relevant, case) if hasattr(workload, "relevant") else lambda outputs: outputs,
        eps=gate.eps_of(case, device),
    )
    own = sum(x.numel() * x.element_size() for x in contents[0].values())
    per_set = own + sum(x.numel() * case.torch_dtype.itemsize for x in exam.truths[0])
    count = clocks.input_sets(per_set, device)
    row["input_sets"] = count
    # what must come from and go to memory at least once; nothing is certain where the sets fit into the cache
    row["cold_bytes"] = min(moved, per_set) if clocks.is_cold(per_set * count, device) else 0
    sets = _Sets(case, workload, device, contents[0], count)
    contestants = _gate_all(arms, row, case, workload, exam, sets, options)
    passed = [c for c in contestants if c.facts["gate"] == "pass"]
    judged = [p for p in row["providers"].values() if p["role"] == "ours"]
    wrong = [p for p in row["providers"].values() if p.get("gate") == "fail"]
    row["gate"] = "fail" if any(p["role"] == "ours" for p in wrong) or not passed else "pass"
    if options.gate_only:
        row["verdict"] = stats.WRONG if row["gate"] == "fail" and judged else stats.GATE
        return
    _time_all(passed, row, case, exam, options)
    judge(row, case, workload, device, options.ceilings)


def chosen(arms: list[Arm], names: Sequence[str] | None) -> list[Arm]:
    """The arms asked for; the first stock arm and the control stay, for without them there is nothing to compare."""
    return [arm for arm in arms if names is None or arm.name in names or arm.role == "control" or arm is arms[0]]


class _Sets:
    """Input sets per memory layout, shared by the arms of that layout."""

    def __init__(self, case: Case, workload: Workload, device: torch.device, first: Tensors, count: int):
        self.made: dict[str, list[Tensors]] = {}
        self.new = lambda seed: first if seed == 0 else workload.inputs(case, device, 1000 + seed)
        self.count = count

    def of(self, layout: str) -> list[Tensors]:
        """Buffers of a layout; the first holds the content of seed 0."""
        if layout not in self.made:
            self.made[layout] = [place(self.new(i), layout) for i in range(self.count)]
        return self.made[layout]


def place(tensors: Tensors, layout: str) -> Tensors:
    """Copies in a memory layout; channels_last concerns tensors of four dimensions."""
    nhwc = layout == "channels_last"
    return {
        name: x.detach().clone(memory_format=torch.channels_last if nhwc and x.dim() == 4 else torch.contiguous_format)
        for name, x in tensors.items()
    }


def _gate_all(
    arms: list[Arm], row: Row, case: Case, workload: Workload, exam: gate.Exam, sets: _Sets, options: Options
) -> list[Contestant]:
    contestants = []
    for arm in arms:
        facts = row["providers"][arm.name]
        if arm.slow_build and not options.slow_builds and not (options.providers and arm.name in options.providers):
            facts["unavailable"] = "left out: takes minutes to build (--slow-builds)"
            continue
        if exam.stock is None and not arm.yardstick:
            facts["unavailable"] = "no stock arm ran that could be the yardstick of accuracy"
            continue
        options.on_stage(f"gate {arm.name}")
        try:
            contestants.append(_gate_one(arm, facts, case, workload, exam, sets, options))
        except Unavailable as error:
            facts["unavailable"] = str(error)
        except Exception as error:
            problem = first_line(error)
            facts["unavailable" if type(error).__name__ == "KernelUnavailable" else "error"] = problem
            free_memory(options.device)
            if fatal(error):
                raise
    return contestants


def _gate_one(
    arm: Arm, facts: Row, case: Case, workload: Workload, exam: gate.Exam, sets: _Sets, options: Options
) -> Contestant:
    buffers = sets.of(arm.layout)
    start = time.perf_counter()
    built = arm.build()

    def make_step(tensors: Tensors) -> Step:
        return bind(built, tensors, case.mode, workload.wrt)

    gate.refresh(buffers[0], exam.contents[0])
    step = make_step(buffers[0])
    step()
    synchronize(options.device)
    facts["cold_s"] = round(time.perf_counter() - start, 4)
    reusable = case.mode != "bwd"
    reason = None
    if arm.yardstick:
        reason = gate.set_yardstick(exam, buffers[0], lambda: make_step(buffers[0]))
    reason = reason or gate.check(exam, buffers[0], lambda: make_step(buffers[0]), reusable)
    facts["gate"] = "fail" if reason else "pass"
    if reason:
        facts["gate_reason"] = reason
        facts["verdict"] = stats.WRONG
        gate.refresh(buffers[0], exam.contents[0])  # a wrong arm may have written into its inputs
    elif options.device.type == "cuda":
        facts["peak_bytes"] = peak_bytes(step)
        if not options.gate_only and (arm.role == "ours" or arm.yardstick):
            facts["launches"] = launched.launches(step)
            facts["kernels"] = launched.triton_kernels(step) if arm.role == "ours" else []
    return Contestant(arm, buffers, make_step, facts)


def _time_all(passed: list[Contestant], row: Row, case: Case, exam: gate.Exam, options: Options) -> None:
    device, effort = options.device, options.effort
    reusable = case.mode != "bwd"
    row["clock"] = choose_clock(passed, options)
    row["cache"] = clocks.CACHE[row["clock"]]
    if row["clock"] == "cuda-graph" and not row["cold_bytes"]:
        row["cache"] = "inputs rotated, too small to be cold"
    timed, launches, roles = {}, {}, {}
    for contestant in passed:
        name = contestant.arm.name
        options.on_stage(f"warm {name}")
        try:
            if contestant.timed is None:
                steps = [contestant.make_step(tensors) for tensors in contestant.tensors]
                contestant.timed = clocks.CLOCKS[row["clock"]](steps)
            launches[name] = clocks.launches_for(contestant.timed, effort.block_s)
        except Exception as error:
            contestant.facts["error"] = first_line(error)
            if fatal(error):
                raise
            continue
        timed[name], roles[name] = contestant.timed, contestant.arm.role
    options.on_stage("time")
    mark = options.telemetry.mark() if options.telemetry else 0
    rounds = measure(timed, launches, effort, roles, seed=hash_of(case.id), after_round=options.on_round)
    row["rounds"] = len(next(iter(rounds.samples.values()), []))
    row["stopped"] = rounds.stopped
    if options.telemetry:
        row["telemetry"] = options.telemetry.since(mark)
    for contestant in passed:
        name = contestant.arm.name
        if name not in timed:
            continue
        facts = contestant.facts
        options.on_stage(f"check {name} again")
        reason = gate.check_again(exam, contestant.tensors[0], options.seeds - 1, _replay(contestant), reusable)
        if reason:
            facts["gate"], facts["gate_reason"], facts["verdict"] = "fail", reason, stats.WRONG
            row["gate"] = "fail" if contestant.arm.role == "ours" else row["gate"]
            continue
        facts.update({k: significant(v) for k, v in stats.summary(rounds.samples[name]).items()})
        facts["samples_s"] = [significant(value) for value in rounds.samples[name]]
        facts["launches_per_block"] = launches[name]
    synchronize(device)


def _replay(contestant: Contestant) -> Callable[[], gate.Outputs]:
    timed = contestant.timed
    if isinstance(timed, clocks.GraphTimed):

        def replay() -> gate.Outputs:
            timed.graph.replay()
            torch.cuda.synchronize()
            return tuple(timed.outputs[0])

        return replay
    assert timed is not None
    return timed.steps[0]  # type: ignore[attr-defined, no-any-return]


def choose_clock(passed: list[Contestant], options: Options) -> str:
    """One clock for all arms of a case: a graph if every arm can be captured, events otherwise."""
    if options.device.type != "cuda":
        return "cpu"
    if options.clock == "host":
        return "host"
    for contestant in passed:
        options.on_stage(f"capture {contestant.arm.name}")
        steps = [contestant.make_step(tensors) for tensors in contestant.tensors]
        try:
            contestant.timed = clocks.GraphTimed(steps)
        except clocks.NotCapturable as error:
            contestant.facts["not_capturable"] = str(error)
            for other in passed:
                other.timed = None
            return "cuda-event"
        except torch.OutOfMemoryError as error:
            contestant.facts["error"] = first_line(error)
            free_memory(options.device)
    return "cuda-graph"


def peak_bytes(step: Step) -> int:
    """Peak device memory of a step above what was live before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = step()
    torch.cuda.synchronize()
    del outputs
    return torch.cuda.max_memory_allocated() - before


class cudnn_benchmark:
    """cuDNN's own search on, as the baselines deserve."""

    def __init__(self, on: bool):
        self.on = on

    def __enter__(self) -> None:
        self.before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = self.on

    def __exit__(self, *_: object) -> None:
        torch.backends.cudnn.benchmark = self.before


def fatal(error: BaseException) -> bool:
    """Whether the CUDA context is gone, so that nothing can be measured in this process any more."""
    text = str(error)
    marks = ("illegal memory access", "device-side assert", "misaligned address", "unspecified launch failure")
    return any(mark in text for mark in (*marks, "illegal instruction", "an illegal"))


def free_memory(device: torch.device) -> None:
    """Give cached blocks back between cases."""
    import gc

    gc.collect()
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # the context may be gone; the caller knows
            torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    """Wait for the device; nothing to wait for on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def hash_of(text: str) -> int:
    """A seed that is the same in every process."""
    import zlib

    return zlib.crc32(text.encode())
