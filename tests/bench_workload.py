"""A workload of a few microseconds with arms that behave and arms that cheat, for the tests of the benchmark."""

import threading
import time

import torch

from bench.case import Arm, Built, Case, control_of
from bench.measure import Effort
from bench.modes import bind
from bench.run import Options, run_case

CPU = torch.device("cpu")
CASE = Case("toy", "toy", "fp32", "infer", {"size": 64}, ("cpu",))
TINY = Effort(budget_s=0.05, patience=1.0, min_rounds=5, max_rounds=20, block_s=1e-5)


class Toy:
    """y = x w, repeated; `arms` says who competes with the honest one."""

    wrt = ("x",)

    def __init__(self, *arms, repeats=1, device=CPU):
        self.extra, self.repeats, self.device = arms, repeats, device

    def flops(self, case):
        return 2.0 * case.shape["size"] ** 3 * self.repeats

    def bytes(self, case):
        return 3.0 * 4 * case.shape["size"] ** 2

    def algebra(self, case):
        return 1.0

    def inputs(self, case, device, seed):
        generator = torch.Generator(device=device).manual_seed(seed)
        size = (case.shape["size"],) * 2
        x, w = (torch.randn(size, generator=generator, device=device, dtype=case.torch_dtype) for _ in range(2))
        tensors = {"x": x, "w": w}
        if case.mode in ("train", "bwd"):
            tensors["grad"] = torch.randn(size, generator=generator, device=device, dtype=case.torch_dtype)
        return tensors

    def truth(self, case, tensors):
        double = {name: x.detach().double() for name, x in tensors.items()}
        return bind(Built(lambda t: t["x"] @ t["w"]), double, case.mode, self.wrt)()

    def arms(self, case, device):
        first = Arm("eager", "stock", lambda: Built(honest(self.repeats)), yardstick=True)
        return [first, control_of(first), *self.extra]


def honest(repeats=1):
    """The right product, computed as many times as asked for."""

    def forward(t):
        for _ in range(repeats):
            y = t["x"] @ t["w"]
        return y

    return forward


def ours(name, forward, **kwargs):
    return Arm(name, "ours", lambda: Built(forward), headline=True, **kwargs)


def run(*arms, effort=TINY, case=CASE, repeats=1, **options):
    return run_case(case, Toy(*arms, repeats=repeats), Options(CPU, effort, **options))


def cached():
    kept = {}

    def forward(t):
        return kept.setdefault(t["x"].data_ptr(), t["x"] @ t["w"])

    return forward


def cached_by_content():
    """The cleverest cache: it keeps results by the numbers themselves, and hands out the same tensor."""
    kept = {}

    def forward(t):
        key = (float(t["x"].sum()), float(t["w"].sum()))
        if key not in kept:
            kept[key] = t["x"] @ t["w"]
        return kept[key]

    return forward


def zeroes_its_input(t):
    y = t["x"] @ t["w"]
    t["x"].zero_()
    return y


def writes_half(t):
    y = torch.empty_like(t["x"])
    half = len(y) // 2
    torch.mm(t["x"][:half], t["w"], out=y[:half])
    return y


def finishes_later(t):
    """Returns before its work is done, as work on another stream does."""
    y = torch.empty_like(t["x"])

    def work():
        time.sleep(0.02)
        torch.mm(t["x"], t["w"], out=y)

    threading.Thread(target=work).start()
    return y


def slightly_wrong(t):
    return t["x"] @ t["w"] * 1.001


def one_element_wrong(t):
    y = t["x"] @ t["w"]
    y[3, 5] += 0.01
    return y
