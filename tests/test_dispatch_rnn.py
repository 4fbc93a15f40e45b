"""Which engine recurrent layers take, why not, and what they refuse; no kernel."""

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fastops
from fastops import KernelUnavailable, _library, tuning
from fastops.nn import rnn as rnn_modules
from fastops.nn.rnn_sequences import Packing, check_lengths
from fastops.ops import layer_norm_lstm, rnn, rnn_cell, rnn_check
from tests.pretended_gpu import fake

T = torch.zeros


def weights_of(mode, inputs, hidden, directions=1, bias=True, **options):
    rows = {"LSTM": 4, "GRU": 3}.get(mode, 1) * hidden
    make = lambda *sizes: fake(*sizes, **options)  # noqa: E731
    biases = (make(rows), make(rows)) if bias else (None, None)
    return [(make(rows, inputs), make(rows, hidden), *biases)] * directions


def rnn_reason(hidden, batch=4, mode="LSTM", engine="triton", batch_first=False, directions=1, **options):
    x = fake(*((batch, 5, 8) if batch_first else (5, batch, 8)), **options)
    return rnn.why_not(
        mode, x, None, None, weights_of(mode, 8, hidden, directions, **options), None, batch_first, engine
    )


def test_why_no_recurrent_kernel(gpu, monkeypatch):
    assert rnn_reason(128, engine="small") is None
    assert "at most 128, got 129" in rnn_reason(129, engine="small")
    assert "divisible by 8" in rnn_reason(132, engine="persistent")
    assert rnn_reason(1024, engine="persistent") is None
    assert "at most 1024" in rnn_reason(1032, engine="persistent")
    assert rnn_reason(128) is None  # small
    assert rnn_reason(512) is None  # persistent
    both = rnn_reason(1032)
    assert "at most 128" in both
    assert "at most 1024" in both
    for engine_name in ("auto", "torch"):
        assert rnn_reason(5000, engine=engine_name, dtype=torch.float64) is None
    for engine_name in ("triton", "small", "persistent", "step"):
        assert "float64" in rnn_reason(64, engine=engine_name, dtype=torch.float64)
        assert rnn_reason(64, engine=engine_name, dtype=torch.float64).count("float64") == 1
        assert "empty" in rnn_reason(64, batch=0, engine=engine_name)
        assert "CPU" in rnn_reason(64, engine=engine_name, device="cpu")
    assert rnn_reason(5000, engine="step") is None
    assert rnn_reason(64, dtype=torch.bfloat16) is None
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "bf16" in rnn_reason(64, dtype=torch.bfloat16, device="cpu")
    assert rnn_reason(64, dtype=torch.float16, device="cpu") is None
    assert rnn_reason(64, dtype=torch.float32, device="cpu") is None


def test_rows_of_the_step_engine_are_those_of_the_batch(gpu):
    most = rnn.MAX_STEP_BATCH
    for batch_first in (False, True):
        assert rnn_reason(8, most, engine="step", batch_first=batch_first) is None
        reason = rnn_reason(8, most + 1, engine="step", batch_first=batch_first)
        assert f"at most {most} rows, got {most + 1}" in reason
    weights = weights_of("LSTM", 8, 8)
    long, wide = fake(most + 1, 2, 8), fake(2, most + 1, 8)  # (T, B, I) where nothing is said
    assert rnn.why_not("LSTM", long, None, None, weights, engine="step") is None
    assert "rows" in rnn.why_not("LSTM", wide, None, None, weights, engine="step")
    assert rnn.choose("LSTM", long, None, None, weights, impl="step") == "step"
    with pytest.raises(KernelUnavailable, match="rows"):
        rnn.choose("LSTM", wide, None, None, weights, impl="step")


@pytest.mark.parametrize("without", [False, True])
@pytest.mark.parametrize("engine_name", ["small", "persistent"])
def test_both_passes_need_a_plan(gpu, monkeypatch, engine_name, without):
    from fastops.kernels import rnn_plan

    monkeypatch.setattr(rnn_plan, engine_name, lambda *facts: "no room" if facts[-1] is without else object())
    assert rnn_reason(64, engine=engine_name) == "no room"


def test_why_no_recurrent_kernel_in_fp32(gpu, monkeypatch):
    monkeypatch.setattr(rnn, "_tf32_allowed", lambda: False)
    limit = rnn.IEEE_HIDDEN
    assert rnn_reason(limit, engine="small", dtype=torch.float32) is None
    assert "without TF32" in rnn_reason(limit + 8, engine="small", dtype=torch.float32)
    assert rnn_reason(limit + 8, engine="small", dtype=torch.float16) is None
    assert rnn_reason(limit + 8, engine="step", dtype=torch.float32) is None
    monkeypatch.setattr(rnn, "_tf32_allowed", lambda: True)
    assert rnn_reason(limit + 8, engine="small", dtype=torch.float32) is None


def test_which_engine_a_recurrent_layer_takes(gpu, monkeypatch):
    def choose(hidden=512, impl="auto", batch_first=False, lengths=None, **options):
        sizes = (64, 128, 80) if batch_first else (128, 64, 80)
        weights = weights_of("LSTM", 80, hidden, **options)
        return rnn.choose("LSTM", fake(*sizes, **options), None, None, weights, lengths, batch_first, impl)

    seen = []
    monkeypatch.setattr(tuning, "choose", lambda table, facts: [seen.append(facts), table[0]][1])
    monkeypatch.setattr(rnn, "ROWS", (tuning.Row("persistent", "", "", ()),))
    assert choose() == "persistent"
    assert choose(batch_first=True, lengths=fake(64, dtype=torch.int64)) == "persistent"
    assert choose(1100) == "torch"  # the table names what cannot run
    assert choose(device="cpu") == "torch"
    assert choose(dtype=torch.float64) == "torch"
    some = ("mode", "dtype", "hidden", "input_size", "steps", "batch", "directions", "ragged", "capability", "gpu")
    first, second = ([facts[name] for name in some] for facts in seen[:2])
    assert first == ["LSTM", "float16", 512, 80, 128, 64, 1, False, 90, "NVIDIA H100 80GB HBM3"]
    assert second == [*first[:7], True, *first[8:]]
    assert [choose(hidden, "triton") for hidden in (64, 512)] == ["small", "persistent"]
    assert [choose(64, impl) for impl in ("small", "persistent", "step", "torch")] == [
        "small", "persistent", "step", "torch",
    ]  # fmt: skip
    with pytest.raises(KernelUnavailable, match=r"recurrent_layer\(impl='small'\): .*at most 128, got 512"):
        choose(512, "small")


def check_rnn(**changes):
    given = {"mode": "LSTM", "input": T(2, 3, 4), "h0": T(1, 3, 6), "c0": T(1, 3, 6), "lengths": None}
    given |= {"weights": [(T(24, 4), T(24, 6), T(24), T(24))], "batch_first": False}
    rnn_check.check(**{**given, **changes})


def test_what_a_recurrent_layer_takes():
    check_rnn()
    check_rnn(h0=None, c0=None)
    check_rnn(lengths=torch.tensor([0, 1, 2]))
    check_rnn(input=T(3, 2, 4), batch_first=True, lengths=torch.tensor([2, 2, 0], dtype=torch.uint8))
    check_rnn(mode="GRU", c0=None, weights=[(T(18, 4), T(18, 6), None, None)])
    check_rnn(weights=[(T(24, 4), T(24, 6), T(24), T(24))] * 2, h0=T(2, 3, 6), c0=T(2, 3, 6))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"input": T(0, 3, 4)}, RuntimeError, "sequence length"),
        ({"input": T(3, 0, 4), "batch_first": True}, RuntimeError, "sequence length"),
        ({"weights": []}, ValueError, "one or two directions, got 0"),
        ({"weights": [(T(24, 4), T(24, 6), None, None)] * 3}, ValueError, "one or two directions, got 3"),
        ({"weights": [(T(18, 4), T(24, 6), None, None)]}, RuntimeError, r"w_ih of direction 0 must be \(24, input"),
        ({"weights": [(T(24), T(24, 6), None, None)]}, RuntimeError, "w_ih of direction 0"),
        (
            {"weights": [(T(24, 4), T(24, 6), None, None), (T(24, 4), T(18, 6), None, None)]},
            RuntimeError,
            "w_hh of direction 1",
        ),
        ({"weights": [(T(24, 4), T(24, 6), T(24), None)]}, ValueError, "biases must be given"),
        ({"weights": [(T(24, 4), T(24, 6), None, T(24))]}, ValueError, "biases must be given"),
        ({"weights": [(T(24, 4), T(24, 6), T(23), T(24))]}, RuntimeError, "b_ih of direction 0"),
        ({"weights": [(T(24, 4), T(24, 6), T(24), T(24, 1))]}, RuntimeError, "b_hh of direction 0"),
        ({"mode": "GRU", "weights": [(T(18, 4), T(18, 6), None, None)]}, ValueError, "c0 is for an LSTM"),
        ({"h0": T(2, 3, 6)}, RuntimeError, "Expected hidden size"),
        ({"c0": T(1, 3, 6, device="meta")}, RuntimeError, "c0 tensor at meta"),
        ({"weights": [(T(24, 4), T(24, 6), T(24), T(24, device="meta"))]}, RuntimeError, "b_hh tensor at meta"),
        ({"c0": T(1, 3, 6).half()}, RuntimeError, "c0 with torch.float16"),
        ({"weights": [(T(24, 4), T(24, 6).half(), T(24), T(24))]}, ValueError, "does not match w_hh dtype"),
        ({"lengths": torch.tensor([0, 1, 3])}, ValueError, r"lengths\[2\] must be between 0 and T = 2, got 3"),
        ({"lengths": torch.tensor([0, -1, 2])}, ValueError, r"lengths\[1\]"),
        ({"lengths": torch.zeros(3, 1, dtype=torch.int32)}, ValueError, r"shape \(3,\)"),
        ({"lengths": torch.zeros(3, dtype=torch.int32, device="meta")}, ValueError, "device cpu, got meta"),
    ],
    ids=str,
)
def test_what_a_recurrent_layer_refuses(changes, error, words):
    with pytest.raises(error, match=words):
        check_rnn(**changes)


def test_which_engine_a_layer_norm_lstm_takes(gpu, monkeypatch):
    seen = []
    monkeypatch.setattr(tuning, "choose", lambda table, facts: [seen.append(facts), tuning.Row("step", "", "", ())][1])

    def choose(hidden, impl="auto", **options):
        return layer_norm_lstm.choose(fake(5, 4, 4 * hidden, **options), hidden, impl)

    assert choose(64) == "step"
    assert choose(64, "triton") == "small"
    assert choose(64, "torch", dtype=torch.float64) == "torch"
    some = ("small", "step", "hidden", "dtype", "gpu")
    assert [seen[0][name] for name in some] == [True, True, 64, "float16", "NVIDIA H100 80GB HBM3"]
    assert choose(layer_norm_lstm.MAX_STEP + 1) == "torch"  # neither can
    assert choose(64, dtype=torch.float64) == "torch"
    assert choose(64, device="cpu") == "torch"
    assert len(seen) == 1
    limit = layer_norm_lstm.MAX_SMALL[torch.float16]
    with pytest.raises(KernelUnavailable, match=f"hidden_size <= {limit}"):
        choose(limit + 1, "small")
    assert choose(limit + 1, "triton") == "step"
    monkeypatch.setitem(_library.BROKEN, "layer_norm_lstm", "it fell over")
    assert choose(64) == "torch"
    gpu((8, 6))
    elsewhere = min(limit, layer_norm_lstm.MAX_SMALL_ELSEWHERE)
    assert layer_norm_lstm.why_not(fake(5, 4, 4), elsewhere, "small") is None
    assert f"<= {elsewhere} " in layer_norm_lstm.why_not(fake(5, 4, 4), elsewhere + 1, "small")
    assert layer_norm_lstm.why_not(fake(5, 4, 4), layer_norm_lstm.MAX_STEP, "step") is None
    assert "fit one program" in layer_norm_lstm.why_not(fake(5, 4, 4), layer_norm_lstm.MAX_STEP + 1, "step")


def test_why_no_layer_norm_kernel(gpu, monkeypatch):
    def reason(engine="triton", **options):
        return layer_norm_lstm.why_not(fake(5, 4, 32, **options), 8, engine)

    for engine in ("triton", "small", "step"):
        assert reason(engine) is None
        assert "the tensors are on the CPU" in reason(engine, device="cpu")
        assert "not torch.float64" in reason(engine, dtype=torch.float64)
    assert reason(dtype=torch.bfloat16) is None
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "bf16" in reason(dtype=torch.bfloat16, device="cpu")
    assert reason(dtype=torch.float32, device="cpu") is None


def test_which_engine_a_cell_takes(gpu, monkeypatch):
    seen = []
    monkeypatch.setattr(
        tuning, "choose", lambda table, facts: [seen.append(facts), tuning.Row("triton", "", "", ())][1]
    )

    def choose(impl="auto", **options):
        return rnn_cell.choose(impl, fake(4, 8, **options))

    assert choose() == "triton"
    assert seen == [{"dtype": "float16", "gpu": "NVIDIA H100 80GB HBM3", "capability": 90}]
    assert choose(device="cpu") == "torch"
    assert choose(dtype=torch.float64) == "torch"
    assert "not torch.float64" in rnn_cell.why_not(fake(4, 8, dtype=torch.float64))
    assert "the tensors are on the CPU" in rnn_cell.why_not(fake(4, 8, device="cpu"))
    monkeypatch.setitem(_library.BROKEN, "rnn_cell", "it fell over")
    assert choose() == "torch"
    assert [choose(impl, dtype=torch.float64) for impl in ("triton", "torch")] == ["triton", "torch"]
    assert len(seen) == 1


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_module_asks_the_table_for_its_first_two_layers(gpu, monkeypatch, batch_first):
    module = fastops.nn.LSTM(8, 16, num_layers=3, batch_first=batch_first, device="meta")
    asked = []

    def choose(mode, stand_in, h0, c0, weights, lengths):
        asked.append((tuple(stand_in.shape), lengths is not None))
        return "small" if stand_in.shape[-1] == 16 else "torch"

    monkeypatch.setattr(rnn_modules.ops, "choose", choose)
    x = torch.empty((4, 7, 8) if batch_first else (7, 4, 8), device="meta")
    assert module._wins(x, False)
    assert asked == [((7, 4, 8), False), ((7, 4, 16), False)]
    asked.clear()
    assert module._wins(x[:, 0] if not batch_first else x[0], True)
    assert asked[0] == ((7, 1, 8), True)
    asked.clear()
    assert module._wins(pack_padded_sequence(torch.zeros(7, 2, 8), [7, 3]), False)
    assert asked[0] == ((7, 2, 8), True)
    asked.clear()
    assert module._wins(pack_padded_sequence(torch.zeros(7, 3, 8), [7, 1, 1]), False)
    assert asked[0] == ((7, 3, 8), True)
    calls = []
    monkeypatch.setattr(rnn_modules.ops, "choose", lambda *given: [calls.append(given), "torch"][1])
    assert not module._wins(x, False)
    assert [len(call[4]) for call in calls] == [1, 1]
    calls.clear()
    both = fastops.nn.LSTM(8, 16, num_layers=3, batch_first=batch_first, bidirectional=True, device="meta")
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")  # torch.autocast needs a GPU
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    assert not both._wins(x, False)
    assert [(call[1].shape[-1], len(call[4]), call[1].dtype) for call in calls] == [
        (8, 2, torch.bfloat16), (32, 2, torch.bfloat16),
    ]  # fmt: skip


def test_which_engine_a_recurrent_module_takes(gpu, monkeypatch):
    """ "torch" for all layers at once where the table names none of ours; where it does, each layer asks for itself."""
    module = fastops.nn.LSTM(8, 16, device="meta")
    asked = []
    monkeypatch.setattr(rnn_modules._Recurrent, "_wins", lambda self, *given: [asked.append(given), wins][1])
    x = fake(7, 4, 8)
    for wins in (True, False):
        found = "auto" if wins else "torch"
        assert module._engine(x, False) == found
        assert module._engine(fake(7, 8), True) == found
        packed = torch.nn.utils.rnn.PackedSequence(fake(10, 8), torch.tensor([4, 3, 3]))
        assert module._engine(packed, False) == found
        assert [ragged for _, ragged in asked] == [False, True, False]
        asked.clear()
    wins = True
    for stock in (fake(7, 4, 8, device="cpu"), fake(8), fake(1, 7, 4, 8)):
        assert module._engine(stock, False) == "torch"
    assert not asked
    for impl in ("torch", "triton", "small", "persistent", "step"):
        module.impl = impl
        assert module._engine(x, False) == impl
        assert module._engine(fake(7, 4, 8, device="cpu"), True) == impl
    assert not asked
    projected = fastops.nn.LSTM(8, 16, proj_size=4, device="meta")
    assert projected._engine(x, False) == "torch"
    projected.impl = "torch"
    assert projected._engine(x, False) == "torch"
    projected.impl = "step"
    with pytest.raises(KernelUnavailable, match=r"LSTM\(impl='step'\): proj_size"):
        projected._engine(x, False)
    assert not asked


def test_lengths_become_int64():
    found = check_lengths(torch.tensor([1, 2], dtype=torch.int16), 2, 2, torch.device("cpu"))
    assert found.dtype == torch.int64
    assert found.tolist() == [1, 2]
    with pytest.raises(TypeError, match="lengths must be an integer tensor, got list"):
        check_lengths([1, 2], 2, 2, torch.device("cpu"))


@pytest.mark.parametrize("lengths", [[3, 3, 1], [4], [2, 1, 1, 1]])
def test_packing_goes_there_and_back(lengths):
    x = torch.randn(max(lengths), len(lengths), 2)
    packed = pack_padded_sequence(x, lengths)
    packing = Packing(packed)
    assert (packing.steps, packing.batch, packing.lengths.tolist()) == (max(lengths), len(lengths), lengths)
    padded = packing.pad(packed.data)
    inside = torch.arange(max(lengths))[:, None] < torch.tensor(lengths)
    assert torch.equal(padded, x * inside[..., None])
    assert torch.equal(packing.pack(padded), packed.data)
