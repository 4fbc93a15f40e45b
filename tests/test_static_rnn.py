"""What the compiler makes of the recurrent kernels: figures of the machine code, nothing is run.

The time loop is told from the code by its span: it holds the wait of the barrier, so it is not an innermost loop.
"""

import re

import pytest

pytest.importorskip("triton")

from fastops.inspection import compile_case
from fastops.inspection.gpus import CAPABILITIES
from fastops.kernels.rnn_plan import Machine, Plan, persistent, small
from fastops.kernels.rnn_static import backward_case, forward_case, static_cases

CASES = [case for case in static_cases() if ".step_" not in case.name]
# the others are compiled by the slow sweep
GATE = (
    "rnn.forward[LSTM,H512,D1,fp16,sm_90]",
    "rnn.forward[LSTM,H512,D1,fp16,sm_80]",
    "rnn.small_forward[LSTM,H64,D1,bf16,sm_90]",
    "rnn.forward[GRU,H512,D1,fp16,save,sm_90]",
    "rnn.backward[LSTM,H512,D1,fp16,sm_90]",
    "rnn.small_backward[LSTM,H64,D1,fp16,sm_90]",
)


def time_loop(report):
    """Opcodes with their modifiers, of the widest loop and of what comes before it."""
    code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", report.sass)
    code = [(int(address, 16), re.sub(r"^@!?U?P\w+\s+", "", text)) for address, text in code]
    loops = []
    for address, text in code:
        if text.startswith("BRA") and (target := re.search(r"\b0x([0-9a-f]+)", text)):
            start = int(target.group(1), 16)
            if start < address:
                loops.append((address - start, start, address))
    assert loops, "no loop in the code"
    _, start, end = max(loops)
    body = [text for address, text in code if start <= address <= end]
    return body, [text for address, text in code if address < start]


def count(body, *opcodes):
    return sum(re.split(r"[.\s]", text)[0] in opcodes for text in body)


def check(case):
    (target,) = case.targets
    report = compile_case(case, target)
    assert report.error is None, report.error
    assert report.stack_bytes == 0
    assert not report.spills
    assert report.shared_bytes <= CAPABILITIES[target].shared_bytes_per_block
    body, _ = time_loop(report)
    at_barrier = [i for i, text in enumerate(body) if re.match(r"(RED|REDG|ATOMG|ATOM)\b", text)]
    if not case.constexprs.get("BARRIER"):
        assert not at_barrier
        return report, body
    assert len(at_barrier) == 1, "one release a step"
    before = body[: at_barrier[0]]
    stores = [i for i, text in enumerate(before) if text.startswith("STG")]
    joins = [i for i, text in enumerate(before) if text.startswith("BAR")]
    assert stores, "nothing is published before the release"
    assert max(joins) > max(stores), "the program must join between its last store and the release"
    polls = [i for i, text in enumerate(before) if text.startswith("CCTL.IVALL")]  # part of an acquire
    exchanged = [i for i, text in enumerate(before) if i > polls[0] and re.match(r"LDG\S*\.STRONG\.GPU", text)]
    assert exchanged, "what other programs wrote must be read past L1"
    assert any(polls[0] < i < exchanged[0] for i in joins), "the program must join between the acquire and its loads"
    return report, body


def loads_allowed(case):
    """Global loads of one step and thread: tiles of h or d_sums, slots, states and the barrier's poll, but no W_hh."""
    size = {"fp16": 2, "bf16": 2, "fp32": 4}[case.signature["w_hh_ptr"][1:]]
    given = case.constexprs
    threads = 32 * case.num_warps
    slots = 4 if given["MODE"] in ("LSTM", "GRU") else 1
    block = given["BLOCK_B"]
    block_k = given.get("BLOCK_K", given["BLOCK_H"])
    tile = -(-given["H"] // block_k) * block_k * block * size
    if "FINISH" in given:
        tile *= {"LSTM": 4, "GRU": 3}.get(given["MODE"], 1)
    own = -(-given["BLOCK_H"] * block // threads) * (slots + 3)
    return (tile // (16 * threads) if given.get("BARRIER") else 0) + own + 1


@pytest.mark.parametrize("case", [case for case in CASES if case.name in GATE], ids=lambda case: case.name)
def test_no_spill_no_weight_in_the_loop_and_a_join_before_the_release(case):
    _, body = check(case)
    if case.constexprs["H"] % 16 == 0:
        assert count(body, "LDG") <= loads_allowed(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case.name not in GATE], ids=lambda case: case.name)
def test_the_other_configurations(case):
    _, body = check(case)
    if case.constexprs["H"] % 128 == 0:
        assert count(body, "LDG") <= loads_allowed(case)


def forward_report(engine, hidden, dtype, target=90, save=False):
    size = 4 if dtype == "fp32" else 2
    machine = Machine.of(target)
    plan = (
        small("LSTM", hidden, size, machine, False)
        if engine == "small"
        else persistent("LSTM", hidden, 64, 1, size, machine, False)
    )
    return check(forward_case(plan, "LSTM", hidden, 64, 1, dtype, save, False, target))


def test_persistent_step_is_short_and_runs_on_warp_group_products():
    report, body = forward_report("persistent", 512, "fp16")
    assert report.tensor_core == "HGMMA"
    assert len(body) <= 255  # 247 with Triton 3.7.1
    assert count(body, "LDG") == 9  # four of h, four of the input product, one of the barrier


@pytest.mark.parametrize(("dtype", "instructions"), [("fp16", 190), ("bf16", 157)])  # 185 and 152
def test_small_step_is_short_and_fetches_the_next_input_product(dtype, instructions):
    report, body = forward_report("small", 64, dtype)
    assert report.tensor_core == "HMMA"  # 16 rows of the batch
    assert len(body) <= instructions
    assert count(body, "HMMA") == 16  # none twice: 16 x 256 x 64 over 8 warps
    assert count(body, "LDGSTS") == 2
    assert count(body, "LDG") == 0
    assert count(body, "BAR") == 4


def test_small_backward_step_is_short_and_fetches_what_the_next_one_reads():
    plan = small("LSTM", 64, 2, Machine.of(90), True)
    _, body = check(backward_case(plan, "LSTM", 64, 64, 1, "fp16", False, 90))
    assert len(body) <= 295  # 277 with Triton 3.7.1, 287 with 3.6.0
    assert count(body, "HMMA") == 16
    assert count(body, "LDGSTS") == 4
    assert count(body, "LDG") == 0
    assert count(body, "BAR") == 8


def test_backward_runs_on_products_of_16_rows_by_choice():
    plan = persistent("LSTM", 512, 64, 1, 2, Machine.of(90), True)
    report, body = check(backward_case(plan, "LSTM", 512, 64, 1, "fp16", False, 90))
    assert plan.block_h == 16
    assert report.tensor_core == "HMMA"
    assert len(body) <= 600  # 497 with Triton 3.7.1, 594 with 3.6.0
    assert count(body, "HMMA") == 32  # none twice: 16 x 2048 x 16 over 8 warps
    assert count(body, "LDG") == 24


def test_what_tensor_memory_cannot_hold_is_refused_by_name():
    blackwell = Machine.of(100)
    assert "tensor memory" in persistent("RNN_TANH", 1024, 16, 1, 2, blackwell, False)
    assert persistent("LSTM", 1024, 64, 1, 2, blackwell, False).num_warps == 16
    assert persistent("LSTM", 512, 64, 1, 2, blackwell, False).num_warps == 8


def test_every_plan_has_products_that_compile():
    """Each warp's part of an inner side has at least 16 columns, the least of a tl.dot, in every dtype and tile."""
    for target in (80, 86, 90, 100):
        for itemsize in (2, 4):
            for hidden in range(136, 1025, 8):
                for mode in ("LSTM", "GRU", "RNN_TANH"):
                    for batch in (16, 64, 1000):
                        plan = persistent(mode, hidden, batch, 1, itemsize, Machine.of(target), True)
                        assert isinstance(plan, str) or plan.block_k // plan.split >= 16


def test_every_size_that_is_promised_has_a_plan():
    for backward in (False, True):
        for hidden in range(136, 1025, 8):
            assert isinstance(persistent("LSTM", hidden, 64, 1, 2, Machine.of(90), backward), Plan), hidden
        for hidden in range(1, 129):
            assert isinstance(small("GRU", hidden, 2, Machine.of(90), backward), Plan), hidden
    # 99 KB of shared memory hold less, and an unknown GPU is not trusted with more
    assert isinstance(persistent("LSTM", 512, 16, 1, 2, Machine.of(86), False), Plan)
    assert "bytes of shared memory" in persistent("LSTM", 1024, 16, 1, 2, Machine.of(86), False)
    assert "resident" in persistent("LSTM", 512, 16, 1, 2, Machine.of(77), False)


def test_a_launch_never_exceeds_the_multiprocessors():
    for hidden in (200, 256, 512, 1024):
        for batch in (1, 16, 64, 100, 1000):
            for directions in (1, 2):
                for backward in (False, True):
                    plan = persistent("LSTM", hidden, batch, directions, 2, Machine.of(90), backward)
                    assert isinstance(plan, Plan)
                    assert plan.tiles * plan.batch_tiles * directions <= 132


def test_plans_count_on_the_shared_memory_the_inspector_knows():
    for number, capability in CAPABILITIES.items():
        planned = Machine.of(number).shared_bytes
        assert planned == capability.shared_bytes_per_block, number
