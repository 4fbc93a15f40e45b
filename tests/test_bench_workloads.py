"""What the benchmark counts and holds true: formulas against brute force, truths against torch in float64."""

import pytest
import torch
import torch.nn.functional as F

from bench import cases, workloads
from bench.case import Case
from bench.workloads.attention import ATTENTION, VARLEN, lengths_of, visible_pairs
from bench.workloads.conv import CONV, CONV_POOL, taps
from bench.workloads.rnn import RNN
from bench.workloads.rnn import lengths_of as row_lengths

CPU = torch.device("cpu")
MODELS = ("alexnet", "bert", "lstm_model")


def conv_case(mode="infer", dtype="fp32", **shape):
    base = {"batch": 2, "channels": 3, "height": 9, "width": 8, "filters": 5, "kernel": 3, "stride": 2, "padding": 1}
    return Case("conv2d_relu", "tiny", dtype, mode, {**base, **shape})


def attention_case(mode="infer", dtype="fp32", op="attention", **shape):
    base = {"batch": 3, "heads": 4, "kv_heads": 4, "q_len": 10, "k_len": 10, "dim": 8}
    return Case(op, "tiny", dtype, mode, {**base, **shape})


def rnn_case(mode="infer", kind="lstm", **shape):
    base = {"kind": kind, "steps": 5, "batch": 3, "inputs": 4, "hidden": 6, "layers": 2, "bidirectional": False}
    return Case("rnn", "tiny", "fp32", mode, {**base, **shape})


def cell_case(mode, kind):
    return Case("rnn_cell", "tiny", "fp32", mode, {"kind": kind, "batch": 3, "inputs": 4, "hidden": 6})


@pytest.mark.parametrize("size", [5, 6, 13])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_taps_are_those_inside_the_image(size, kernel, stride, padding):
    counted = F.conv1d(torch.ones(1, 1, size), torch.ones(1, 1, kernel), stride=stride, padding=padding).sum()
    assert taps(size, kernel, stride, padding) == int(counted)


def test_conv_flops_without_padding_are_those_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    case = conv_case("train", padding=0)
    tensors = CONV.inputs(case, CPU, 0)
    for name in CONV.wrt:
        tensors[name].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        F.conv2d(tensors["x"], tensors["weight"], tensors["bias"], 2).sum().backward()
    assert CONV.flops(case) == counter.get_total_flops()


def test_conv_bytes():
    case = conv_case(dtype="fp16")
    out = 2 * 5 * 5 * 4
    assert CONV.bytes(case) == 2 * (2 * 3 * 9 * 8 + 5 * 3 * 9 + out)
    pooled = conv_case(dtype="fp16", pool=3, pool_stride=2)
    assert CONV_POOL.bytes(pooled) == CONV.bytes(case) - 2 * (out - 2 * 5 * 2 * 1)


@pytest.mark.parametrize(("causal", "window"), [(False, None), *((True, window) for window in (None, 0, 3, 100))])
@pytest.mark.parametrize("length", [1, 4, 10])
def test_visible_pairs_against_brute_force(causal, window, length):
    case = attention_case(causal=causal, window=window)
    i, j = torch.arange(length)[:, None], torch.arange(length)
    visible = torch.ones(length, length, dtype=torch.bool)
    if causal:
        visible &= j <= i
    if window is not None:
        visible &= i - j <= window
    assert visible_pairs(case, length) == int(visible.sum())


@pytest.mark.parametrize("fill", [0.25, 0.5, 0.75, 1.0])
def test_lengths_fill_as_named(fill):
    case = attention_case(batch=64, q_len=512, k_len=512, fill=fill)
    lengths = lengths_of(case)
    assert sum(lengths) / (64 * 512) == pytest.approx(fill, abs=0.01)
    assert all(1 <= length <= 512 for length in lengths)
    assert lengths == lengths_of(case)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"causal": True},
        {"kv_heads": 2, "causal": True},
        {"fill": 0.5},
        {"causal": True, "window": 3},
        {"alibi": True, "causal": True},
        {"bias": True, "batch": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", ["infer", "train", "bwd"])
def test_attention_truth_and_every_cpu_arm(shape, mode):
    gate(attention_case(mode, **shape))


@pytest.mark.parametrize("shape", [{"fill": 0.5}, {"fill": 0.75, "causal": True, "kv_heads": 2}], ids=str)
@pytest.mark.parametrize("mode", ["infer", "train"])
def test_packed_attention(shape, mode):
    case = attention_case(mode, op="varlen_attention", **shape)
    gate(case)
    assert VARLEN.flops(case) == ATTENTION.flops(case)


@pytest.mark.parametrize("mode", ["infer", "fwd", "train", "bwd"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_conv(mode, dtype):
    gate(conv_case(mode, dtype))


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_conv_with_pool(mode):
    shape = {"height": 13, "width": 13, "pool": 3, "pool_stride": 2, "stride": 1}
    case = conv_case(mode, **shape)
    gate(Case("conv2d_relu_max_pool2d", case.name, case.dtype, case.mode, case.shape))


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("lstm", {}), ("lstm", {"bidirectional": True}), ("gru", {"layers": 1}), ("lstm", {"ragged": True, "layers": 1})],
    ids=str,
)
@pytest.mark.parametrize("mode", ["infer", "train"])
def test_rnn(kind, shape, mode):
    gate(rnn_case(mode, kind, **shape))


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("mode", ["infer", "fwd", "train", "bwd"])
def test_cells(kind, mode):
    gate(cell_case(mode, kind))


def test_cell_formulas():
    work, case = workloads.workload("rnn_cell"), cell_case("infer", "lstm")
    weights = (4 + 6) * 4 * 6
    assert work.flops(case) == 2 * 3 * weights
    assert work.flops(cell_case("train", "lstm")) == 3 * work.flops(case)
    assert work.bytes(case) == 4 * (weights + 3 * 4 + 2 * 2 * 3 * 6)
    assert work.bytes(cell_case("infer", "gru")) == 4 * ((4 + 6) * 3 * 6 + 3 * 4 + 2 * 3 * 6)


@pytest.mark.parametrize("mode", ["infer", "train"])
@pytest.mark.parametrize(
    ("op", "shape"),
    [
        ("bert", {"batch": 2, "length": 12, "fill": 0.5, "layers": 1, "width": 16, "heads": 2}),
        ("lstm_model", {"batch": 2, "length": 5, "hidden": 8, "layers": 2}),
    ],
)
def test_models(op, shape, mode):
    if op == "bert":
        pytest.importorskip("transformers")
    gate(Case(op, "tiny", "fp32", mode, shape))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["infer", "train"])
def test_alexnet(mode):
    case = Case("alexnet", "b1", "fp32", mode, {"batch": 1, "side": 224, "classes": 10})
    gate(case)


def test_alexnet_flops_are_torchs_without_the_taps_on_padding():
    from torch.utils.flop_counter import FlopCounterMode

    case = Case("alexnet", "b1", "fp32", "infer", {"batch": 1, "side": 224, "classes": 1000})
    work = workloads.workload("alexnet")
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        work.make(case)(torch.empty(1, 3, 224, 224))
    assert 0.85 * counter.get_total_flops() < work.flops(case) < counter.get_total_flops()


def gate(case):
    """Every arm that can run here agrees with the truth, fastops' default among them."""
    from bench.measure import CPU as EFFORT
    from bench.run import Options, run_case

    work = workloads.workload(case.op)
    # while kernels are interpreted, engines by name would run here, very slowly; the ops' own tests cover them
    names = [arm.name for arm in work.arms(case, CPU) if arm.role == "stock" or arm.headline]
    row = run_case(case, work, Options(CPU, EFFORT, seeds=2, gate_only=True, providers=names))
    reasons = {name: p.get("gate_reason") or p.get("error") for name, p in row["providers"].items()}
    assert row["gate"] == "pass", (row.get("error"), reasons)
    assert row["providers"]["fastops"]["gate"] == "pass"
    assert not any(reasons.values()), reasons


def test_rnn_flops():
    case = rnn_case(bidirectional=True)
    per_step = 2 * 4 * 6 * ((4 + 6) + (12 + 6)) * 2
    assert RNN.flops(case) == per_step * 5 * 3
    assert RNN.flops(rnn_case("train", bidirectional=True)) == 3 * RNN.flops(case)
    ragged = rnn_case(ragged=True)
    assert RNN.flops(ragged) == RNN.flops(rnn_case()) * sum(row_lengths(ragged)) / 15


def test_inputs_are_the_same_for_the_same_seed_and_never_degenerate():
    for case in cases.select("cpu"):
        work = workloads.workload(case.op)
        a, b, c = (work.inputs(case, CPU, seed) for seed in (0, 0, 1))
        for name, tensor in a.items():
            assert torch.equal(tensor, b[name])
            if tensor.is_floating_point():
                assert not torch.equal(tensor, c[name])
                assert tensor.min() < 0 < tensor.max()


def test_every_case_has_a_workload_whose_formulas_give_numbers():
    for case in cases.all_cases():
        work = workloads.workload(case.op)
        assert work.flops(case) > 0
        if case.op not in MODELS:  # builds the model to count its weights
            assert work.bytes(case) > 0
        assert work.algebra(case) >= 1
        arms = [arm.name for arm in work.arms(case, CPU)]
        assert len(arms) == len(set(arms))
        assert "fastops" in arms


def test_suites():
    quick, full, cpu = cases.select("quick"), cases.select("full"), cases.select("cpu")
    assert {case.op for case in quick} >= {"alexnet", "conv2d_relu", "conv2d_relu_max_pool2d", "attention", "rnn"}
    assert {case.id for case in quick} <= {case.id for case in full}
    assert not {case.id for case in cpu} & {case.id for case in full}
    layers = {(case.name, case.dtype, case.mode) for case in full if case.name.startswith("alexnet.conv")}
    assert len(layers) == 8 * 2 * 3 * 2  # layers, batches, dtypes, modes
