"""No number for an arm that computes something else: every way to cheat is caught, and says how."""

import pytest
import torch

from bench import clocks, gate, stats
from bench.case import Case, Unavailable
from bench.verdict import judge
from tests import bench_workload as toy
from tests.bench_workload import ours, run


def test_an_honest_arm_passes():
    row = run(ours("honest", toy.honest()))
    assert row["gate"] == "pass"
    assert row["verdict"] in (stats.SAME, stats.FASTER, stats.SLOWER, stats.UNCLEAR)
    assert set(row["providers"]) == {"eager", "eager again", "honest"}


@pytest.mark.parametrize(
    ("cheat", "reason"),
    [
        (toy.cached(), "relative error"),
        (toy.cached_by_content(), "asked again"),
        (toy.zeroes_its_input, "input 'x' was changed"),
        (toy.writes_half, "NaN"),
        (toy.finishes_later, "NaN"),
        (toy.slightly_wrong, "relative error"),
        (toy.one_element_wrong, "error"),
        (lambda t: (t["x"] @ t["w"])[:, :-1], "shape"),
        (lambda t: (t["x"] @ t["w"], t["x"]), "2 outputs, expected 1"),
        (lambda t: t["x"] @ t["w"] + torch.nan, "NaN"),
    ],
    ids=["cached", "by content", "zeroes", "half", "later", "wrong", "one element", "shape", "count", "NaN"],
)
def test_a_cheat_is_wrong_and_gets_no_number(cheat, reason):
    row = run(ours("cheat", cheat))
    provider = row["providers"]["cheat"]
    assert (row["verdict"], row["gate"], row["vs_best"]) == (stats.WRONG, "fail", None)
    assert provider["verdict"] == stats.WRONG
    assert reason in provider["gate_reason"]
    assert "median_s" not in provider
    assert row["providers"]["eager"]["median_s"] > 0


@pytest.mark.parametrize("mode", ["fwd", "train", "bwd"])
def test_gradients_are_graded(mode):
    case = Case("toy", "toy", "fp32", mode, {"size": 32}, ("cpu",))

    def forgets(t):
        return t["x"] @ t["w"] + 0 * t["x"].detach()

    def halves_gradient(t):
        y = t["x"] @ t["w"]
        return y / 2 + (y / 2).detach()

    assert run(ours("right", forgets), case=case)["gate"] == "pass"
    row = run(ours("half", halves_gradient), case=case)
    assert row["verdict"] == (stats.WRONG if mode != "fwd" else row["verdict"])
    assert row["gate"] == ("fail" if mode != "fwd" else "pass")


def test_wrong_only_after_timing_is_caught():
    calls = []

    def goes_bad(t):
        calls.append(1)
        return t["x"] @ t["w"] * (1.0 if len(calls) < 60 else 2.0)

    row = run(ours("bad later", goes_bad), effort=toy.Effort(budget_s=5, min_rounds=80, max_rounds=80, block_s=1e-6))
    assert row["verdict"] == stats.WRONG
    assert row["providers"]["bad later"]["gate_reason"].startswith("after timing")


def test_a_wrong_stock_arm_is_no_baseline():
    fast_but_wrong = toy.Arm("wrong stock", "stock", lambda: toy.Built(lambda t: t["x"]))
    row = run(fast_but_wrong, ours("honest", toy.honest()))
    assert row["providers"]["wrong stock"]["verdict"] == stats.WRONG
    assert row["vs_best"]["best"] == "eager"
    assert row["gate"] == "pass"


def test_the_truth_of_something_else_is_an_error_not_a_yardstick():
    class Other(toy.Toy):
        def truth(self, case, tensors):
            return (tensors["x"].double(),)

    row = toy.run_case(toy.CASE, Other(ours("honest", toy.honest())), toy.Options(toy.CPU, toy.TINY))
    assert row["vs_best"] is None
    assert "float64 truth" in row["providers"]["eager"]["gate_reason"]
    assert "yardstick" in row["providers"]["honest"]["unavailable"]


def test_an_arm_that_cannot_run_leaves_the_others_alone():
    def refuses():
        raise Unavailable("no such engine here")

    def explodes(t):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")

    def breaks():
        raise ValueError("broken\nsecond line")

    row = run(
        toy.Arm("absent", "ours", refuses),
        ours("big", explodes),
        toy.Arm("broken", "ours", breaks),
        ours("honest", toy.honest()),
    )
    assert row["providers"]["absent"]["unavailable"] == "no such engine here"
    assert "out of memory" in row["providers"]["big"]["error"]
    assert row["providers"]["broken"]["error"] == "ValueError: broken"
    assert row["vs_best"]["arm"] == "honest"
    only = run(toy.Arm("absent", "ours", refuses))
    assert (only["verdict"], only["providers"]["eager"]["median_s"] > 0) == (stats.ABSENT, True)
    assert run(ours("big", explodes))["verdict"] == stats.ERROR


def test_out_of_memory_while_making_inputs_ends_in_the_row():
    class Big(toy.Toy):
        def inputs(self, case, device, seed):
            raise torch.OutOfMemoryError("CUDA out of memory")

    row = toy.run_case(toy.CASE, Big(), toy.Options(toy.CPU, toy.TINY))
    assert (row["verdict"], row["error"]) == (stats.ERROR, "OutOfMemoryError: CUDA out of memory")


def test_random_outputs_must_be_as_random_as_stock():
    truths = [(torch.zeros(1000, dtype=torch.float64) + 1,)]
    exam = gate.Exam([{}], truths, torch.float32, randomised=True, stock=[[gate.Error(0.33, 1.0, 0)]])
    dropped = (torch.rand(1000) > 0.1) / 0.9
    assert exam.grade(0, (dropped.float(),)) is None
    assert "undropped" in exam.grade(0, (torch.ones(1000),))
    assert "undropped" in exam.grade(0, (torch.zeros(1000),))


def test_half_precision_gate_accepts_stock_and_refuses_sloppy():
    case = Case("toy", "toy", "bf16", "infer", {"size": 64}, ("cpu",))
    row = run(ours("honest", toy.honest()), ours("sloppy", lambda t: (t["x"] @ t["w"]) * 1.02), case=case)
    assert row["providers"]["honest"]["gate"] == "pass"
    assert row["providers"]["sloppy"]["verdict"] == stats.WRONG


@pytest.mark.parametrize(("seconds", "verdict"), [(2e-4, stats.IMPOSSIBLE), (1.4e-3, stats.FASTER)])
def test_faster_than_the_machine_is_impossible(monkeypatch, seconds, verdict):
    """An 8192 cubed product in fp16 takes an H100 at least 1.1 ms at its data-sheet peak."""
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    case = Case("toy", "toy", "fp16", "infer", {"size": 8192})
    work = toy.Toy()
    times = {"eager": ("stock", 1.6e-3), "again": ("control", 1.6e-3), "fastops": ("ours", seconds)}
    row = {"flops": work.flops(case), "bytes": work.bytes(case), "cold_bytes": work.bytes(case), "clock": "cuda-graph"}
    row["providers"] = {
        name: {"role": role, "headline": role == "ours", "median_s": s, "samples_s": [s] * 40}
        for name, (role, s) in times.items()
    }
    ceilings = {"source": "measured", "fp16": 720.0, "gbps": 3000.0}
    judge(row, case, work, torch.device("cuda"), ceilings)
    assert row["verdict"] == verdict
    assert (row["vs_best"] is None) == (verdict == stats.IMPOSSIBLE)


@pytest.mark.gpu
@pytest.mark.alone
class TestOnGpu:
    def run(self, *arms, **options):
        device = torch.device("cuda")
        case = Case("toy", "toy", "fp16", "infer", {"size": 2048}, ("full",))
        ceilings = {"source": "test", "fp16": 1000.0, "gbps": 3000.0}
        return toy.run_case(
            case, toy.Toy(*arms), toy.Options(device, toy.Effort(budget_s=1), ceilings=ceilings, **options)
        )

    def test_honest_on_a_graph(self):
        row = self.run(ours("honest", toy.honest()))
        assert (row["clock"], row["gate"]) == ("cuda-graph", "pass")
        assert row["providers"]["honest"]["launches"] == 1
        assert row["providers"]["honest"]["peak_bytes"] >= 2 * 2048 * 2048

    @pytest.mark.parametrize("waits", [False, True])
    def test_work_on_another_stream(self, waits):
        stream = torch.cuda.Stream()

        def elsewhere(t):
            if waits:
                stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(20):
                    y = t["x"] @ t["w"]
            return y

        row = self.run(ours("elsewhere", elsewhere))
        assert row["verdict"] in (stats.WRONG, stats.IMPOSSIBLE)

    def test_not_capturable_falls_back_for_all(self):
        def synchronises(t):
            y = t["x"] @ t["w"]
            torch.cuda.synchronize()
            return y

        row = self.run(ours("synchronises", synchronises))
        assert row["clock"] == "cuda-event"
        assert all(p["median_s"] > 0 for p in row["providers"].values())
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        torch.randn(1, device="cuda")  # raises while the generator is in capture mode

    def test_faster_than_the_machine_is_impossible(self):
        kept = {}

        def remembers(t):
            key = (t["x"].data_ptr(), t["x"]._version, t["w"]._version)
            if key not in kept:
                kept[key] = t["x"] @ t["w"]
            return kept[key].clone()

        row = self.run(ours("remembers", remembers), clock="device")
        assert row["verdict"] in (stats.WRONG, stats.IMPOSSIBLE)


class FailingCapture:
    """torch.cuda.graph on a machine without a GPU: what its parts do is recorded, and each may fail."""

    def __init__(self, monkeypatch):
        self.done, self.fails = [], set()
        set_attribute = monkeypatch.setattr
        for name in ("synchronize", "empty_cache"):
            set_attribute(torch.cuda, name, lambda: None)
        set_attribute(torch.cuda, "CUDAGraph", lambda: "graph")
        set_attribute(torch.cuda, "graph_pool_handle", lambda: (0, 7))
        set_attribute(torch.cuda, "current_device", lambda: 1)
        set_attribute(torch.cuda, "Stream", lambda: "new stream")
        set_attribute(torch.cuda, "current_stream", lambda: "old stream")
        set_attribute(torch.cuda, "set_stream", lambda stream: self.did("set", stream))
        set_attribute(torch._C, "_cuda_endAllocateToPool", lambda *pool: self.did("end", *pool), raising=False)
        set_attribute(torch._C, "_cuda_releasePool", lambda *pool: self.did("release", *pool), raising=False)
        set_attribute(torch, "zeros", lambda *size, device: None)
        set_attribute(
            clocks._TorchsCapture, "__init__", lambda capture, graph, pool=None, **more: self.init(capture, pool)
        )
        set_attribute(clocks._TorchsCapture, "__enter__", lambda capture: self.did("begin", *capture.pool))
        set_attribute(clocks._TorchsCapture, "__exit__", lambda capture, *error: self.did("finish", *capture.pool))

    @staticmethod
    def init(capture, pool):
        capture.pool = () if pool is None else (pool,)

    def did(self, what, *arguments):
        self.done.append((what, *arguments))
        if what in self.fails:
            self.fails.remove(what)
            raise RuntimeError(f"{what} failed")

    def capture(self, body=lambda: None):
        with clocks.Capture("graph", stream="side stream"):
            body()


POOL = (0, 7)
BACK = [("set", "old stream"), ("end", 1, POOL), ("release", 1, POOL), ("begin",), ("finish",), ("set", "old stream")]


def test_a_capture_that_succeeds_has_a_pool_of_its_own_and_is_left_to_torch(monkeypatch):
    made = FailingCapture(monkeypatch)
    made.capture()
    assert made.done == [("begin", POOL), ("finish", POOL)]


@pytest.mark.parametrize("where", ["begin", "finish"])
def test_a_capture_that_fails_leaves_nothing_behind(monkeypatch, where):
    """Not its stream, its memory pool or the generator in capture mode; that one needs a capture that succeeds."""
    made = FailingCapture(monkeypatch)
    made.fails = {where}
    with pytest.raises(RuntimeError, match=f"{where} failed"):
        made.capture()
    began = [("begin", POOL), ("finish", POOL)][: 1 if where == "begin" else 2]
    assert made.done == began + BACK


def test_of_a_spoiled_capture_the_step_says_why(monkeypatch):
    made = FailingCapture(monkeypatch)
    made.fails = {"finish"}

    def body():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        made.capture(body)
    assert made.done[2:] == BACK
    made.done.clear()
    with pytest.raises(ZeroDivisionError):
        made.capture(body)  # an error of the step alone: the capture ended well
    assert made.done == [("begin", POOL), ("finish", POOL)]


def test_a_pool_that_the_graph_still_holds_is_not_released(monkeypatch):
    made = FailingCapture(monkeypatch)
    made.fails = {"finish", "end"}  # torch took the allocator out of the pool, and failed after that
    with pytest.raises(RuntimeError, match="finish failed"):
        made.capture()
    assert "release" not in [what for what, *_ in made.done]
    made.done.clear()
    made.fails = {"finish", "release"}
    with pytest.raises(RuntimeError, match="finish failed"):
        made.capture()
    assert made.done[2:] == BACK
