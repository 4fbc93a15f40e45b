"""The table of cases, most valuable first in every suite.

quick      one or two cases an op: under a minute on a GPU; on the CPU its small twin `cpu`
models     whole models
full       everything but `cpu`
cpu        sizes for two cores, what `quick` means where there is no GPU
published  shapes whose times on an H100 others have published
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from bench.case import Case

SUITES = ("quick", "models", "full", "cpu", "published")

# AlexNet's convolutions at 224x224: channels, height = width, filters, kernel, stride, padding, and whether a 3x3
# max-pool of stride 2 follows
ALEXNET_LAYERS = (
    (3, 224, 64, 11, 4, 2, True),
    (64, 27, 192, 5, 1, 2, True),
    (192, 13, 384, 3, 1, 1, False),
    (384, 13, 256, 3, 1, 1, False),
    (256, 13, 256, 3, 1, 1, True),
    (256, 6, 384, 3, 1, 1, False),
    (384, 6, 256, 3, 1, 1, False),
    (256, 6, 256, 3, 1, 1, True),
)


def all_cases() -> list[Case]:
    """Every case. Order is the order of running: a run that is cut off has done what matters most."""
    table = sorted(_table(), key=_turn)
    names = [case.id for case in table]
    assert len(names) == len(set(names)), "two cases share a name"
    return table


def select(suite: str, ops: Iterable[str] = (), words: Iterable[str] = ()) -> list[Case]:
    """Cases of a suite, narrowed to these ops (all of them where none is named) and to ids with every word."""
    wanted, words = set(ops), list(words)
    return [
        case
        for case in all_cases()
        if (suite in case.suites or (suite == "full" and "cpu" not in case.suites))
        and (not wanted or case.op in wanted)
        and all(word in case.id for word in words)
    ]


def _table() -> Iterator[Case]:
    yield from _cpu()
    yield from _alexnet()
    yield from _attention()
    yield from _bert()
    yield from _rnn()
    yield from _cells()
    yield from _lstm_models()
    yield from _published()


def _turn(case: Case) -> int:
    """Rows that cost little and say most come first, so that they are there when a dear case is cut off."""
    if "models" in case.suites:
        return 1 if (case.name, case.dtype) in FIRST_MODELS else 3
    return 0 if "quick" in case.suites else 2


def _suites(*names: str) -> tuple[str, ...]:
    return (*names, "full")


def _alexnet() -> Iterator[Case]:
    """The whole network and its layers, most useful dtype and batch first."""
    for batch in (256, 64):
        for dtype in ("fp16", "fp32", "bf16"):
            for mode in ("infer", "train"):
                first = (dtype, batch) == ("fp16", 256)
                shape = {"batch": batch, "side": 224, "classes": 1000}
                suites = _suites("models", "quick") if first else _suites("models")
                yield Case("alexnet", f"alexnet b{batch}", dtype, mode, shape, suites)
            for mode in ("infer", "train"):
                for number, layer in enumerate(ALEXNET_LAYERS, 1):
                    quick = (number, dtype, mode, batch) in QUICK_LAYERS
                    suites = _suites("quick") if quick else ("full",)
                    yield _layer(f"alexnet.conv{number} b{batch}", layer, dtype, mode, batch, suites)


# the most useful size and dtype of each
FIRST_MODELS = {
    ("alexnet b256", "fp16"),
    ("bert-base b32 s512 fill50%", "fp16"),
    ("byte-lm b64 s256 h512 l2", "bf16"),
}
QUICK_LAYERS = {
    (1, "fp16", "infer", 256),
    (2, "fp16", "infer", 256),
    (3, "fp16", "infer", 256),
    (2, "fp16", "train", 256),
}


def _layer(name: str, layer: tuple[Any, ...], dtype: str, mode: str, batch: int, suites: tuple[str, ...]) -> Case:
    channels, side, filters, kernel, stride, padding, pooled = layer
    shape = {
        "batch": batch,
        "channels": channels,
        "height": side,
        "width": side,
        "filters": filters,
        "kernel": kernel,
        "stride": stride,
        "padding": padding,
    }
    if pooled:
        return Case("conv2d_relu_max_pool2d", name + "+pool", dtype, mode, shape | _POOL, suites)
    return Case("conv2d_relu", name, dtype, mode, shape, suites)


_POOL = {"pool": 3, "pool_stride": 2}


def _attention() -> Iterator[Case]:
    base = {"batch": 64, "heads": 12, "kv_heads": 12, "q_len": 512, "k_len": 512, "dim": 64}
    for dtype in ("fp16", "bf16"):
        for fill in (0.5, 1.0, 0.75, 0.25):
            for dropout in (0.0, 0.1):
                for mode in ("infer", "train"):
                    if dropout and mode == "infer":
                        continue
                    name = f"bert-base b64 s512 fill{fill:.0%}" + (f" p{dropout}" if dropout else "")
                    quick = dtype == "fp16" and fill == 0.5 and not dropout
                    suites = _suites("quick") if quick else ("full",)
                    yield _attend(name, dtype, mode, {**base, "fill": fill, "dropout": dropout}, suites)
    for length in (512, 1024, 2048, 4096):
        shape = {"batch": max(1, 16384 // length), "heads": 16, "kv_heads": 16, "q_len": length, "k_len": length}
        for mode in ("infer", "train"):
            yield _attend(f"dense d64 s{length}", "fp16", mode, {**shape, "dim": 64})
    for length in (1024, 2048, 4096, 8192):
        shape = {"batch": max(1, 16384 // length), "heads": 16, "kv_heads": 16, "q_len": length, "k_len": length}
        for mode in ("infer", "train"):
            yield _attend(f"causal d128 s{length}", "bf16", mode, {**shape, "dim": 128, "causal": True})
    gqa = {"batch": 4, "heads": 32, "kv_heads": 8, "q_len": 4096, "k_len": 4096, "dim": 128, "causal": True}
    short = {"batch": 4, "heads": 16, "kv_heads": 16, "q_len": 2048, "k_len": 2048, "dim": 64}
    packed = {**base, "fill": 0.5}
    long = {**gqa, "batch": 1, "q_len": 16384, "k_len": 16384, "window": 4096}
    for mode in ("infer", "train"):
        yield _attend("gqa 32/8 causal s4096", "bf16", mode, gqa)
        yield _attend("packed bert-base b64 s512 fill50%", "fp16", mode, packed, op="varlen_attention")
        yield _attend("window4096 causal s16384", "bf16", mode, long)
        yield _attend("alibi causal s2048", "fp16", mode, {**short, "causal": True, "alibi": True})
        yield _attend("learned bias s1024", "fp16", mode, {**short, "q_len": 1024, "k_len": 1024, "bias": True})


def _attend(
    name: str, dtype: str, mode: str, shape: dict[str, Any], suites: tuple[str, ...] = ("full",), op: str = "attention"
) -> Case:
    return Case(op, name, dtype, mode, shape, suites)


def _bert() -> Iterator[Case]:
    for dtype in ("fp16", "bf16"):
        for fill in (0.5, 1.0):
            for mode in ("infer", "train"):
                shape = {"batch": 32, "length": 512, "fill": fill}
                yield Case("bert", f"bert-base b32 s512 fill{fill:.0%}", dtype, mode, shape, _suites("models"))


def _lstm_models() -> Iterator[Case]:
    for dtype in ("bf16", "fp16"):
        for mode in ("infer", "train"):
            shape = {"batch": 64, "length": 256, "hidden": 512, "layers": 2}
            yield Case("lstm_model", "byte-lm b64 s256 h512 l2", dtype, mode, shape, _suites("models"))


# kind, steps, batch, input size, hidden size, layers, bidirectional, further
RNN_SHAPES = (
    ("lstm", 128, 64, 512, 512, 1, False, {}),
    ("lstm", 1024, 16, 768, 768, 1, False, {}),
    ("lstm", 512, 10, 128, 256, 6, False, {}),
    ("lstm", 128, 64, 1024, 1024, 1, False, {}),
    ("lstm", 256, 32, 80, 320, 2, True, {}),
    ("lstm", 100, 128, 300, 200, 1, False, {}),
    ("gru", 100, 128, 300, 200, 1, False, {}),
    ("lstm", 1000, 8, 64, 64, 1, False, {}),
    ("lstm", 128, 64, 512, 512, 1, False, {"ragged": True}),
    ("layernorm_lstm", 128, 64, 512, 512, 1, False, {}),
)


def _rnn() -> Iterator[Case]:
    for dtype, mode in (
        ("bf16", "infer"),
        ("bf16", "train"),
        ("fp16", "infer"),
        ("fp16", "train"),
        ("fp32", "infer"),
        ("fp32", "train"),
    ):
        for kind, steps, batch, inputs, hidden, layers, both, further in RNN_SHAPES:
            shape = {
                "kind": kind,
                "steps": steps,
                "batch": batch,
                "inputs": inputs,
                "hidden": hidden,
                "layers": layers,
                "bidirectional": both,
                **further,
            }
            name = f"{kind} {steps}x{batch}x{inputs}x{hidden}x{layers}" + ("x2" if both else "")
            name += " ragged" if further.get("ragged") else ""
            quick = (kind, steps, batch, dtype) == ("lstm", 128, 64, "bf16") and hidden == 512 and not further
            yield Case("rnn", name, dtype, mode, shape, _suites("quick") if quick else ("full",))


# kind, batch, input size, hidden size
CELL_SHAPES = (("lstm", 64, 512, 512), ("gru", 64, 512, 512), ("lstm", 1, 1024, 1024), ("rnn", 64, 512, 512))


def _cells() -> Iterator[Case]:
    for dtype in ("bf16", "fp16", "fp32"):
        for mode in ("infer", "train"):
            for kind, batch, inputs, hidden in CELL_SHAPES:
                shape = {"kind": kind, "batch": batch, "inputs": inputs, "hidden": hidden}
                quick = (kind, batch, dtype) == ("lstm", 64, "bf16")
                suites = _suites("quick") if quick else ("full",)
                yield Case("rnn_cell", f"{kind} {batch}x{inputs}x{hidden}", dtype, mode, shape, suites)


def _published() -> Iterator[Case]:
    """Shapes of KernelBench whose eager times on an H100 are public: does this harness see the same?"""
    conv = {"batch": 128, "channels": 64, "height": 128, "width": 128}
    conv |= {"filters": 128, "kernel": 3, "stride": 1, "padding": 0}
    yield Case("conv2d_relu", "kernelbench conv 128x64x128x128", "fp32", "infer", conv, ("full", "published"))
    sdpa = {"batch": 32, "heads": 32, "kv_heads": 32, "q_len": 512, "k_len": 512, "dim": 1024}
    yield _attend("kernelbench sdpa 32x32x512x1024", "fp16", "infer", sdpa, ("full", "published"))
    lstm = {"kind": "lstm", "steps": 512, "batch": 10, "inputs": 128, "hidden": 256, "layers": 6}
    lstm |= {"bidirectional": False, "batch_first": True}
    yield Case("rnn", "kernelbench lstm 10x512x128x256x6", "fp32", "infer", lstm, ("full", "published"))


def _cpu() -> Iterator[Case]:
    """Real work for two cores, shortest first. fastops "auto" is stock there, so a ratio off 1.00 is noise."""
    attention = {"batch": 4, "heads": 4, "kv_heads": 4, "q_len": 128, "k_len": 128, "dim": 64}
    lstm = {"kind": "lstm", "steps": 32, "batch": 8, "inputs": 64, "hidden": 64, "layers": 1, "bidirectional": False}
    image = {"batch": 1, "side": 224, "classes": 1000}
    yield _layer("alexnet.conv6 b2", ALEXNET_LAYERS[5], "fp32", "infer", 2, ("cpu",))
    yield _layer("alexnet.conv6 b2", ALEXNET_LAYERS[5], "fp32", "train", 2, ("cpu",))
    yield _attend("bert-like b4 s128", "fp32", "infer", attention, ("cpu",))
    # padding is what fastops does not pay for on the CPU either: here "auto" is expected to win
    yield _attend("bert-like b8 s256 fill50%", "fp32", "infer", {**attention, **_LONGER, "fill": 0.5}, ("cpu",))
    longest = {**attention, "batch": 8, "heads": 12, "kv_heads": 12, "q_len": 512, "k_len": 512, "fill": 0.5}
    yield _attend("bert-base b8 s512 fill50%", "fp32", "infer", longest, ("cpu",))
    yield Case("rnn", "lstm 32x8x64x64x1", "fp32", "infer", lstm, ("cpu",))
    yield Case("rnn", "lstm 32x8x64x64x1", "fp32", "train", lstm, ("cpu",))
    yield _layer("alexnet.conv2 b2", ALEXNET_LAYERS[1], "fp32", "infer", 2, ("cpu",))
    yield _layer("alexnet.conv3 b2", ALEXNET_LAYERS[2], "fp32", "infer", 2, ("cpu",))
    yield Case("alexnet", "alexnet b1", "fp32", "infer", image, ("cpu",))
    yield Case("alexnet", "alexnet b1", "fp32", "train", image, ("cpu",))


_LONGER = {"batch": 8, "q_len": 256, "k_len": 256}
