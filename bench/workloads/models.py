"""Whole models: what a user of `fastops.accelerate` gets. Same weights in every arm, dropout at 0 when training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.case import Arm, Built, Case, Tensors, control_of
from bench.modes import bind
from bench.workloads import common, conv


class Model:
    """Shape keys: batch, and what the model's `make`, `inputs` and `flops` need.

    "train" is forward, cross-entropy, backward and an SGD update at learning rate 0 (the same work every step).
    """

    wrt: tuple[str, ...] = ()

    def make(self, case: Case) -> nn.Module:
        """The plain model in fp32 on the CPU, weights from the current seed."""
        raise NotImplementedError

    def flops(self, case: Case) -> float:
        """Useful operations of a step."""
        raise NotImplementedError

    def inputs(self, case: Case, device: torch.device, seed: int) -> Tensors:
        """What `logits` takes, and "target" when training."""
        raise NotImplementedError

    def logits(self, model: nn.Module, t: Tensors) -> Tensor:
        """Call the model."""
        found: Tensor = model(t["x"])
        return found

    def bytes(self, case: Case) -> float:
        """The weights once a pass: a lower bound, activations between layers are left out."""
        parameters = sum(p.numel() for p in self.make(case).parameters())
        return float(parameters * case.torch_dtype.itemsize * common.passes(case))

    def algebra(self, case: Case) -> float:
        """Winograd, where there are convolutions."""
        return 6.25

    def truth(self, case: Case, tensors: Tensors) -> tuple[Tensor, ...]:
        """The same model, weights rounded to the case's dtype, in float64."""
        model = self._placed(case, next(iter(tensors.values())).device).double()
        return bind(self._built(case, model, model, update=False), common.double(tensors), case.mode, self.wrt)()

    def arms(self, case: Case, device: torch.device) -> list[Arm]:
        """Plain in both layouts, compiled, accelerated, accelerated per engine."""

        def arm(name: str, role: str, how: str, change: Callable[[nn.Module], Any] = lambda m: m, **more: Any) -> Arm:
            nhwc = more.get("layout") == "channels_last"

            def build() -> Built:
                model = self._placed(case, device)
                if nhwc:
                    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
                return self._built(case, model, change(model), update=case.mode == "train")

            return Arm(name, role, build, how, **more)

        eager = arm("eager", "stock", "the plain model", yardstick=True)
        arms = [eager, control_of(eager)]
        if self.has_images:
            how = "the plain model, channels_last"
            arms.insert(1, arm("eager-nhwc", "stock", how, layout="channels_last", yardstick=True))
        for name, mode in common.COMPILE_MODES.items():
            how = f"torch.compile(mode={mode!r})"
            slow = mode is not None
            arms.append(arm(name, "stock", how, lambda m, mode=mode: common.compiled(m, device, mode), slow_build=slow))
            if self.has_images and not slow:
                compile_nhwc = arm(
                    f"{name}-nhwc",
                    "stock",
                    f"{how}, channels_last",
                    lambda m: common.compiled(m, device),
                    layout="channels_last",
                )
                arms.append(compile_nhwc)
        for impl in ("auto", *self.engines):
            for layout in ("contiguous", "channels_last") if self.has_images else ("contiguous",):
                name = "fastops" + ("" if impl == "auto" else f"-{impl}") + ("-nhwc" if "last" in layout else "")
                how = "fastops.accelerate(model)" + ("" if impl == "auto" else f", impl={impl!r}") + f", {layout}"
                change = _accelerated(impl)
                arms.append(arm(name, "ours", how, change, layout=layout, headline=impl == "auto"))
        return arms

    has_images = False
    engines: tuple[str, ...] = ()

    def _placed(self, case: Case, device: torch.device) -> nn.Module:
        state = torch.get_rng_state()
        try:
            torch.manual_seed(0)
            model = self.make(case)
        finally:
            torch.set_rng_state(state)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model.to(case.torch_dtype).to(device).train(case.mode != "infer")

    def _built(self, case: Case, owner: nn.Module, call: Any, update: bool) -> Built:
        def forward(t: Tensors) -> Tensor:
            logits = self.logits(call, t)
            if case.mode == "infer":
                return logits
            return F.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, t["target"])

        return Built(forward, list(owner.parameters()), update)


def _accelerated(impl: str) -> Callable[[nn.Module], nn.Module]:
    def change(model: nn.Module) -> nn.Module:
        accelerated: nn.Module = common.fastops_name("accelerate")(model)
        if impl != "auto":
            for module in accelerated.modules():
                if hasattr(module, "impl"):
                    module.impl = impl  # type: ignore[assignment]
        return accelerated

    return change


class AlexNet(Model):
    """models.alexnet at 224x224. Shape keys: batch, side, classes."""

    has_images = True
    engines = ("triton", "hybrid")

    def make(self, case: Case) -> nn.Module:
        """The textbook's AlexNet."""
        made: nn.Module = common.model("alexnet.AlexNet")(num_classes=case.shape["classes"])
        return made

    def inputs(self, case: Case, device: torch.device, seed: int) -> Tensors:
        """Images, and labels when training."""
        s = case.shape
        sizes = (s["batch"], 3, s["side"], s["side"])
        tensors = {"x": common.random(device, seed, *sizes, dtype=case.torch_dtype, salt=1)}
        if case.mode != "infer":
            generator = torch.Generator(device=device).manual_seed(seed)
            tensors["target"] = torch.randint(s["classes"], (s["batch"],), generator=generator, device=device)
        return tensors

    def flops(self, case: Case) -> float:
        """Convolutions (valid taps) and linear layers; backward twice that, without the gradient of the images."""
        from bench.cases import ALEXNET_LAYERS

        assert case.shape["side"] == 224, "the table of layers is for 224x224"
        taps = [
            2.0 * c * k * conv.taps(side, kernel, stride, padding) ** 2
            for c, side, k, kernel, stride, padding, _ in ALEXNET_LAYERS
        ]
        linear = 2.0 * (256 * 4096 + 4096 * 4096 + 4096 * case.shape["classes"])
        forward = case.shape["batch"] * (sum(taps) + linear)
        unneeded = case.shape["batch"] * taps[0] if common.needs_grad(case) else 0.0
        return forward * common.passes(case) - unneeded


ALEXNET = AlexNet()
