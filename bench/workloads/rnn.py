"""Recurrent layers over whole sequences."""

from __future__ import annotations

import random as python_random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import rnn as packing

from bench.case import Arm, Built, Case, Tensors, Unavailable, control_of
from bench.modes import bind
from bench.workloads import common

GATES = {"lstm": 4, "layernorm_lstm": 4, "gru": 3, "rnn": 1}
CLASSES = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN", "layernorm_lstm": "LayerNormLSTM"}
ENGINES = ("auto", "small", "persistent", "step")


def lengths_of(case: Case) -> list[int]:
    """Steps of each row: uniform between one and all where ragged."""
    steps, batch = case.shape["steps"], case.shape["batch"]
    if not case.shape.get("ragged"):
        return [steps] * batch
    found = [1 + round((steps - 1) * i / max(batch - 1, 1)) for i in range(batch)]
    python_random.Random(0).shuffle(found)
    return found


class Rnn:
    """Shape keys: kind, steps, batch, inputs, hidden, layers, bidirectional; optional: ragged, batch_first."""

    wrt = ("x",)

    def flops(self, case: Case) -> float:
        """2 (I + H) G H per step, row, layer and direction, backward twice that; none past a row's end."""
        s = case.shape
        directions = 2 if s["bidirectional"] else 1
        widths = [s["inputs"]] + [directions * s["hidden"]] * (s["layers"] - 1)
        per_step = sum(2.0 * (width + s["hidden"]) * GATES[s["kind"]] * s["hidden"] for width in widths)
        return per_step * directions * sum(lengths_of(case)) * common.passes(case)

    def bytes(self, case: Case) -> float:
        """x, output and weights; backward also their gradients and the output's."""
        s, steps = case.shape, sum(lengths_of(case))
        directions = 2 if s["bidirectional"] else 1
        widths = [s["inputs"]] + [directions * s["hidden"]] * (s["layers"] - 1)
        weights = sum((width + s["hidden"]) * GATES[s["kind"]] * s["hidden"] * directions for width in widths)
        activations = steps * (s["inputs"] + directions * s["hidden"])
        forward, backward = activations + weights, 2 * activations + 2 * weights
        parts = {"infer": forward, "fwd": forward, "bwd": backward, "train": forward + backward}
        return float(parts[case.mode] * case.torch_dtype.itemsize)

    def algebra(self, case: Case) -> float:
        """No algorithm needs fewer operations."""
        return 1.0

    def inputs(self, case: Case, device: torch.device, seed: int) -> Tensors:
        """x (T, B, I); lengths where ragged; the gradient of the output where wanted."""
        s = case.shape
        sizes = (s["batch"], s["steps"]) if s.get("batch_first") else (s["steps"], s["batch"])

        def random(salt: int, width: int) -> Tensor:
            return common.random(device, seed, *sizes, width, dtype=case.torch_dtype, salt=salt)

        tensors = {"x": random(1, s["inputs"])}
        if s.get("ragged"):
            tensors["lengths"] = torch.tensor(lengths_of(case), device=device)
        if common.needs_grad(case):
            tensors["grad"] = random(2, s["hidden"] * (2 if s["bidirectional"] else 1))
        return tensors

    def truth(self, case: Case, tensors: Tensors) -> tuple[Tensor, ...]:
        """torch.nn's layer in float64 with the same rounded weights (the layer-norm LSTM: our reference's)."""
        module = self._module(case, tensors["x"].device).double()
        built = self._built(case, module, packed=case.shape["kind"] != "layernorm_lstm")
        return bind(built, common.double(tensors), case.mode, self.wrt)()

    def arms(self, case: Case, device: torch.device) -> list[Arm]:
        """torch.nn (cuDNN), torch.compile of it, fastops per engine."""
        kind, ragged = case.shape["kind"], case.shape.get("ragged")
        how = "nn." + CLASSES[kind] + (" of a PackedSequence" if ragged else "")
        if kind == "layernorm_lstm":
            how = "the formula in a Python loop, there is no stock layer"
        first = Arm("eager", "stock", self._stock(case, device), how, yardstick=True)
        arms = [first, control_of(first)]
        if not ragged:
            arms.append(Arm("compile", "stock", self._compiled(case, device), "torch.compile of eager"))
        for impl in ENGINES:
            name = "fastops" if impl == "auto" else f"fastops-{impl}"
            label = f"fastops.nn.{CLASSES[kind]}(impl={impl!r})"
            arms.append(Arm(name, "ours", self._fastops(case, device, impl), label, headline=impl == "auto"))
        return arms

    def _module(self, case: Case, device: torch.device, **extra: Any) -> nn.Module:
        """The stock layer with the case's weights: seeded, then rounded to the case's dtype."""
        s = case.shape
        arguments = {"batch_first": bool(s.get("batch_first"))}
        if s["kind"] == "layernorm_lstm":
            made = common.named("fastops.nn.LayerNormLSTM")
            extra.setdefault("impl", "torch")
        else:
            made = getattr(nn, CLASSES[s["kind"]])
            arguments |= {"num_layers": s["layers"], "bidirectional": s["bidirectional"]}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module: nn.Module = made(s["inputs"], s["hidden"], **arguments, **extra)
        return module.to(case.torch_dtype).to(device)

    def _built(self, case: Case, module: nn.Module, packed: bool) -> Built:
        lengths, ragged = lengths_of(case), case.shape.get("ragged")
        batch_first = bool(case.shape.get("batch_first"))

        def forward(t: Tensors) -> Any:
            if not ragged:
                return module(t["x"])
            if not packed:
                return module(t["x"], lengths=t["lengths"])
            bundle = packing.pack_padded_sequence(t["x"], lengths, batch_first, enforce_sorted=False)
            out, state = module(bundle)
            padded, _ = packing.pad_packed_sequence(out, batch_first, total_length=case.shape["steps"])
            return padded, state

        return Built(forward, list(module.parameters()))

    def _stock(self, case: Case, device: torch.device) -> Callable[[], Built]:
        return lambda: self._built(case, self._module(case, device), packed=case.shape["kind"] != "layernorm_lstm")

    def _compiled(self, case: Case, device: torch.device) -> Callable[[], Built]:
        def build() -> Built:
            if case.shape["kind"] == "layernorm_lstm":
                raise Unavailable("unrolling the loop takes minutes to compile")
            module = self._module(case, device)
            run = common.compiled(module, device)
            return Built(lambda t: run(t["x"]), list(module.parameters()))

        return build

    def _fastops(self, case: Case, device: torch.device, impl: str) -> Callable[[], Built]:
        def build() -> Built:
            s = case.shape
            if s["kind"] == "layernorm_lstm":
                return self._built(case, self._module(case, device, impl=impl), packed=False)
            made = common.named(f"fastops.nn.{CLASSES[s['kind']]}")
            extra = {"num_layers": s["layers"], "bidirectional": s["bidirectional"]}
            module = made(s["inputs"], s["hidden"], batch_first=bool(s.get("batch_first")), impl=impl, **extra)
            module = module.to(case.torch_dtype).to(device)
            module.load_state_dict(self._module(case, device).state_dict())
            return self._built(case, module, packed=False)

        return build


RNN = Rnn()
