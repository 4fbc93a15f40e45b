"""What `fastops profile` makes of a trace: a GPU trace written by hand, ceilings, advice, ratios."""

import io
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from bench import ceilings as measured
from bench.verdict import tf32_allowed
from fastops.profiling import ceilings as read
from fastops.profiling import html, table, work
from fastops.profiling.advice import Advice, Replacement, advise
from fastops.profiling.attribute import OPTIMIZER
from fastops.profiling.ceilings import Ceilings
from fastops.profiling.paired import from_pairs
from fastops.profiling.proton import launch_metadata
from fastops.profiling.summary import KernelRow, ModuleRow, StepSummary, Summary, short_name, summarise
from fastops.profiling.trace import MODULE_RANGE, STEP_MARK, parse


def ceilings(**options):
    tflops = {"fp16": 400.0, "bf16": 400.0, "tf32": 100.0, "fp32": 20.0}
    return Ceilings("A GPU", "data sheet", tflops, 1000.0, **options)


def test_percent_of_the_ceiling_and_what_binds():
    trace = gpu_trace()
    products = {"Input Dims": [[500, 1000], [1000, 200]], "Input type": ["float", "float"]}
    products["Concrete Inputs"] = ["", ""]
    for step in range(2):
        at = 32 + 1000 * step  # inside the convolution
        trace.append(event("cpu_op", "aten::mm", at, 5, **products))
    summary = summarise(parse(trace), KINDS, [], ceilings())
    rows = {row.path: row for row in summary.modules}
    flops, moved = 2 * 500 * 1000 * 200, 4 * (500 * 1000 + 1000 * 200 + 500 * 1000)
    assert rows["Net.conv"].compute_ms == pytest.approx(flops / 20e12 * 1e3)
    assert rows["Net.conv"].memory_ms == pytest.approx(moved / 1e12 * 1e3)
    assert rows["Net.conv"].ceiling_percent == pytest.approx(100 * 0.01 / 0.33)
    assert rows["Net"].floor_ms == rows["Net.conv"].floor_ms
    assert rows["Net.conv"].bound_by == "neither"
    assert rows["Net.relu"].ceiling_percent is None
    assert summary.step.ceilings == "A GPU, data sheet"
    console = Console(file=io.StringIO(), width=200)
    console.print(table.screen(summary, []))
    assert "% of ceiling" in console.file.getvalue()
    assert "A GPU, data sheet" in console.file.getvalue()


def test_rounding_to_tf32_raises_the_ceiling_of_what_may_round():
    plain, rounding = ceilings(tf32_convolutions=False), ceilings(tf32_products=True)
    assert plain.compute_ms(1e9, "aten::convolution", "fp32") == pytest.approx(0.05)
    assert rounding.compute_ms(1e9, "aten::convolution", "fp32") == pytest.approx(0.01)
    assert rounding.compute_ms(1e9, "aten::mm", "fp32") == pytest.approx(0.01)
    assert rounding.compute_ms(1e9, "aten::mm", "fp64") == 0


def test_what_may_round_to_tf32_is_read_where_fp32_precision_was_set(fp32_precision):
    """After that the older allow_tf32 cannot be read any more."""
    fp32_precision(torch.backends.cuda.matmul, "tf32")
    fp32_precision(torch.backends.cudnn.conv, "ieee")
    fp32_precision(torch.backends.cudnn.rnn, "tf32")
    found = read.data_sheet("NVIDIA GeForce RTX 3090")
    assert (found.tf32_convolutions, found.tf32_products) == (False, True)
    allowed = {op: tf32_allowed(op) for op in ("attention", "conv2d_relu", "rnn")}
    assert allowed == {"attention": True, "conv2d_relu": False, "rnn": True}


def test_ceilings_measured_by_the_benchmark_come_before_the_data_sheet(monkeypatch, tmp_path):
    gpu = SimpleNamespace(name="NVIDIA GeForce RTX 3090", uuid="0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: gpu.name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: gpu)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert read.load().source == "data sheet"
    assert read.load().gbytes_per_second == 936
    found = {"source": "measured", "fp16": 1.0, "bf16": 2.0, "tf32": 3.0, "fp32": 4.0, "gbps": 5.0}
    measured.store(measured.cache_path(torch.device("cuda")), found)
    assert read.load().source == "measured"
    assert read.load().tflops["tf32"] == 3.0


def event(category, name, ts, dur, tid=1, **arguments):
    return {"ph": "X", "cat": category, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": arguments}


def gpu_trace():
    """Two steps of conv + relu, forward and backward, 20 us apart."""
    events = [event("user_annotation", STEP_MARK, 0, 1)]
    correlation = 0
    for step in range(2):
        t = 10 + step * 1000
        if step:
            events += [event("user_annotation", STEP_MARK, t - 5, 1)]

        def launch(name, at, duration, host_at, tid=1):
            nonlocal correlation
            correlation += 1
            return [
                event("cuda_runtime", "cudaLaunchKernel", host_at, 2, tid, correlation=correlation),
                event("kernel", name, at, duration, 7, correlation=correlation, **{"registers per thread": 90}),
            ]

        sequence = 5 * step
        names = {"Sequence number": sequence, "External id": 1 + step}
        events += [event("user_annotation", MODULE_RANGE + "Net", t, 200)]
        events += [event("user_annotation", MODULE_RANGE + "Net.conv", t + 5, 80)]
        events += [event("cpu_op", "aten::conv2d", t + 10, 60, **names)]
        events += launch("void cudnn::nchwToNhwcKernel<float>(int)", t + 100, 40, t + 20)
        events += launch("sm90_xmma_fprop<128>", t + 150, 200, t + 30)
        events += [event("user_annotation", MODULE_RANGE + "Net.relu", t + 100, 50)]
        names = {"Sequence number": sequence + 1, "External id": 9 + step}
        events += [event("cpu_op", "aten::relu", t + 105, 40, **names)]
        events += launch("void at::native::vectorized_elementwise_kernel<4>(int)", t + 353, 100, t + 110)
        backward = "autograd::engine::evaluate_function: "
        for offset, node, seq in ((300, "ReluBackward0", sequence + 1), (400, "ConvolutionBackward0", sequence)):
            events += [
                event("cpu_op", backward + node, t + offset, 60, 2, **{"Sequence number": seq, "Fwd thread id": 1})
            ]
            events += [
                event("cpu_op", "aten::x_backward", t + offset + 5, 50, 2, **{"External id": 20 + offset + step})
            ]
            events += launch(f"bwd_{node}", t + 200 + offset, 90, t + offset + 10, 2)
        # overhead records inherit correlation ids; they must not claim time
        events += [event("overhead", "Lazy Function Loading", t + 1, 500, 1, correlation=correlation)]
    return [*events, event("user_annotation", STEP_MARK, 2010, 1)]


KINDS = {"Net": "Net", "Net.conv": "Conv2d", "Net.relu": "ReLU"}


def test_gpu_time_is_the_sum_of_kernels_and_lands_on_modules():
    summary = summarise(parse(gpu_trace()), KINDS, [])
    rows = {row.path: row for row in summary.modules}
    assert summary.step.device == "cuda"
    assert rows["Net.conv"].forward_ms == pytest.approx(0.240)
    assert rows["Net.conv"].backward_ms == pytest.approx(0.090)
    assert rows["Net.relu"].forward_ms == pytest.approx(0.100)
    assert rows["Net.relu"].backward_ms == pytest.approx(0.090)
    assert rows["Net"].total_ms == pytest.approx(0.520)
    assert sum(row.total_ms for row in summary.kernels) == pytest.approx(0.520)
    assert summary.step.attributed_percent == pytest.approx(100)
    assert summary.kernels[0].registers == 90
    assert summary.step.launches == 5


def test_gpu_idle_splits_into_launch_latency_and_waiting():
    step = summarise(parse(gpu_trace()), KINDS, []).step
    assert step.wall_ms == pytest.approx(1.005, abs=1e-3)
    assert step.busy_ms == pytest.approx(0.520)
    assert step.idle_micro_ms == pytest.approx(0.003)
    assert step.busy_ms + step.idle_micro_ms + step.idle_macro_ms == pytest.approx(step.wall_ms)
    assert step.verdict.startswith("host-bound")


def test_gpu_advice_names_the_edit_and_the_saving():
    summary = summarise(parse(gpu_trace()), KINDS, [])
    replacements = [Replacement("Net.conv", "Conv2d", "fastops.nn.Conv2dReLU", "conv2d_relu")]
    advice = {a.what: a for a in advise(summary, replacements)}
    transposes = advice["channels_last memory format"]
    assert transposes.saved_ms == pytest.approx(0.040)
    fused = next(a for a in advice.values() if a.accelerates)
    assert 'only={"conv2d_relu"}' in fused.edit
    assert fused.saved_ms == pytest.approx(0.190)  # the ReLU's own passes, forward and backward
    assert "%" in fused.saving(summary.step.wall_ms)


def test_the_tree_is_shown_depth_first():
    kinds = {"Net": "Net", "Net.relu": "ReLU", "Net.conv": "Conv2d", "Other": "Other", "Net.relu.late": "Late"}
    trace = [*gpu_trace(), event("user_annotation", MODULE_RANGE + "Net.relu.late", 115, 5)]
    shown = [row.path for row in summarise(parse(trace), kinds, []).modules]
    assert shown == ["Net", "Net.relu", "Net.relu.late", "Net.conv"]


@pytest.mark.parametrize(("average_us", "advised"), [(5, True), (2000, False)])
def test_only_small_optimizer_operations_are_worth_fusing(average_us, advised):
    total = 30 * average_us / 1e3
    kernels = [KernelRow("aten::add_", "aten::add_", 30, total, 50.0, modules=[OPTIMIZER])]
    rows = [ModuleRow(OPTIMIZER, "", 0, total_ms=total)]
    step = StepSummary("cpu", 3, 2 * total, total, 0.0, 0.0, 0.0, 100.0, "host")
    found = advise(Summary(step, rows, kernels, [], []))
    assert any("fused" in advice.what for advice in found) == advised


def test_launches_tell_proton_their_bytes():
    x, y = torch.zeros(4, 4), torch.zeros(2, dtype=torch.int64)
    found = launch_metadata((1, 1, 1), SimpleNamespace(name="kernel"), {"x": x, "again": x, "y": y, "n": 3, "p": None})
    assert found == {"name": "kernel", "bytes": 64 + 16}


def test_every_kernel_that_is_compiled_tells_its_bytes():
    """In a process of its own: what the interpreter makes of kernels has no metadata."""
    pytest.importorskip("triton")
    code = (
        "from fastops.profiling.proton import annotate_kernels, launch_metadata\n"
        "from fastops.kernels.epilogue import bias_relu_kernel\n"
        "assert annotate_kernels() > 10\n"
        "assert bias_relu_kernel.launch_metadata is launch_metadata"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("full", "short"),
    [
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>(int)",
            "vectorized_elementwise_kernel",
        ),
        ("conv_boxes_kernel", "conv_boxes_kernel"),
        ("aten::mm", "aten::mm"),
        ("void (anonymous namespace)::softmax<float>(float*)", "softmax"),
    ],
)
def test_short_names(full, short):
    assert short_name(full) == short


def test_paired_comparison():
    slower = from_pairs([(1.0, 0.5 + 0.001 * i) for i in range(12)])
    assert slower.verdict == "FASTER"
    assert slower.ratio == pytest.approx(1.98, abs=0.02)
    assert from_pairs([(1.0, 1.0)] * 8).verdict == "SAME"
    assert from_pairs([(1.0, 0.7), (1.0, 1.4)] * 4).verdict == "UNCLEAR"
    assert from_pairs([(1.0, 1.2)] * 8).verdict == "SLOWER"
    assert from_pairs([(1.005, 1.0)] * 8).verdict == from_pairs([(1.0, 1.005)] * 8).verdict == "SAME"


def test_views_move_no_bytes():
    [view] = parse([event("cpu_op", "aten::view", 0, 1, **{"Input Dims": [[4, 4]], "Input type": ["float"]})]).host
    [add] = parse(
        [event("cpu_op", "aten::add", 0, 1, **{"Input Dims": [[4, 4], [4, 4]], "Input type": ["float", "float"]})]
    ).host
    assert work.bytes_of(view) == 0
    assert work.bytes_of(add) == 3 * 64


def test_advice_is_a_table_with_what_it_saves():
    console = Console(width=160, record=True, file=io.StringIO())
    summary = SimpleNamespace(step=SimpleNamespace(wall_ms=10.0))
    console.print(table._advice([Advice("fuse it", "two kernels", "accelerate(model)", "high", 2.5)], summary))
    console.print(table._advice([Advice("swap it", "slow", "accelerate(model)", "low", accelerates=True)], summary))
    console.print(table._advice([], summary))
    text = console.export_text()
    for words in ("fuse it", "two kernels", "up to 2.500 ms (25 %) per step", "measure it: --apply", "advice: none"):
        assert words in text


def test_names_on_the_page_are_not_read_with_their_figures_and_break_at_dots():
    rows = [ModuleRow("3", "", 0, total_ms=1.0, percent=5.0), ModuleRow("4", "Linear", 0, total_ms=9.0, percent=95.0)]
    assert re.findall(r"<text[^>]*>([^<]*)", html.icicle(rows)) == ["3: 5 %", "4 Linear: 95 %"]
    narrow = html.icicle([ModuleRow("3", "A" * 300, 0, total_ms=1.0, percent=5.0)])
    assert ">3: 5 %<" in narrow
    cells = html._table(["name", "ms"], [[("encoder.0.<b>", None), ("1.5", 1.5)], [("aten::mm", None), ("2", 2.0)]])
    assert "encoder.<wbr>0.<wbr>&lt;b&gt;</td>" in cells
    assert "aten::<wbr>mm</td>" in cells
    assert ">1.5</td>" in cells
    assert "break-word" not in html.STYLE
