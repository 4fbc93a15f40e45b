"""One step of a recurrent net, as a decoder runs it: nn.LSTMCell and its kin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.case import Arm, Built, Case, Tensors, control_of
from bench.modes import bind
from bench.workloads import common
from bench.workloads.rnn import CLASSES, GATES

ENGINES = ("auto", "triton")


class Cell:
    """Shape keys: kind ("lstm", "gru", "rnn"), batch, inputs, hidden."""

    wrt = ("x", "h")

    def flops(self, case: Case) -> float:
        """2 (I + H) G H a row, backward twice that; what is done point by point does not count."""
        s = case.shape
        return 2.0 * s["batch"] * self._weights(case) * common.passes(case)

    def bytes(self, case: Case) -> float:
        """x, states, new states and weights; backward also the gradients of all of them."""
        s = case.shape
        states = (2 if s["kind"] == "lstm" else 1) * s["hidden"]
        activations = s["batch"] * (s["inputs"] + 2 * states)
        forward = activations + self._weights(case)
        # x and h for the weights' gradients, those of the outputs, and what each gives
        backward = 2 * activations + 2 * self._weights(case)
        parts = {"infer": forward, "fwd": forward, "bwd": backward, "train": forward + backward}
        return float(parts[case.mode] * case.torch_dtype.itemsize)

    def _weights(self, case: Case) -> int:
        s = case.shape
        return int((s["inputs"] + s["hidden"]) * GATES[s["kind"]] * s["hidden"])

    def algebra(self, case: Case) -> float:
        """No algorithm needs fewer operations."""
        return 1.0

    def inputs(self, case: Case, device: torch.device, seed: int) -> Tensors:
        """x (B, I), h and, for an LSTM, c (B, H); the gradient of the new h where wanted."""
        s = case.shape

        def random(salt: int, width: int) -> Tensor:
            return common.random(device, seed, s["batch"], width, dtype=case.torch_dtype, salt=salt)

        tensors = {"x": random(1, s["inputs"]), "h": random(2, s["hidden"])}
        if s["kind"] == "lstm":
            tensors["c"] = random(3, s["hidden"])
        if common.needs_grad(case):
            tensors["grad"] = random(4, s["hidden"])
        return tensors

    def truth(self, case: Case, tensors: Tensors) -> tuple[Tensor, ...]:
        """torch.nn's cell in float64 with the same rounded weights."""
        built = _built(_stock(case, tensors["x"].device).double())
        return bind(built, common.double(tensors), case.mode, self.wrt)()

    def arms(self, case: Case, device: torch.device) -> list[Arm]:
        """torch.nn's cell, torch.compile of it, fastops per engine."""
        name = CLASSES[case.shape["kind"]] + "Cell"

        def compiled() -> Built:
            module = _stock(case, device)
            return _built(module, common.compiled(module, device))

        first = Arm("eager", "stock", lambda: _built(_stock(case, device)), f"nn.{name}", yardstick=True)
        arms = [first, control_of(first), Arm("compile", "stock", compiled, "torch.compile of eager")]
        for impl in ENGINES:
            label = f"fastops.nn.{name}(impl={impl!r})"
            arm = "fastops" if impl == "auto" else f"fastops-{impl}"
            arms.append(Arm(arm, "ours", _fastops(case, device, impl), label, headline=impl == "auto"))
        return arms


def _stock(case: Case, device: torch.device) -> nn.Module:
    """The stock cell with the case's weights: seeded, then rounded to the case's dtype."""
    s = case.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module: nn.Module = getattr(nn, CLASSES[s["kind"]] + "Cell")(s["inputs"], s["hidden"])
    return module.to(case.torch_dtype).to(device)


def _fastops(case: Case, device: torch.device, impl: str) -> Callable[[], Built]:
    def build() -> Built:
        s = case.shape
        made = common.named(f"fastops.nn.{CLASSES[s['kind']]}Cell")
        module = made(s["inputs"], s["hidden"], impl=impl).to(case.torch_dtype).to(device)
        module.load_state_dict(_stock(case, device).state_dict())
        return _built(module)

    return build


def _built(module: nn.Module, run: Callable[..., Any] | None = None) -> Built:
    call = run or module

    def forward(t: Tensors) -> Any:
        return call(t["x"], (t["h"], t["c"]) if "c" in t else t["h"])

    return Built(forward, list(module.parameters()))


CELL = Cell()
