"""relu(conv2d(x) + bias), and the same followed by max-pooling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from bench.case import Arm, Built, Case, Tensors, control_of
from bench.modes import bind
from bench.workloads import common

FUSED_STOCK = "torch.cudnn_convolution_relu"


class Conv:
    """Shape keys: batch, channels, height, width, filters, kernel, stride, padding; with pool: pool, pool_stride."""

    wrt = ("x", "weight", "bias")

    def __init__(self, pooled: bool):
        self.pooled = pooled

    def flops(self, case: Case) -> float:
        """2 N K C (valid taps over all output pixels): taps that fall on padding do no work."""
        s = case.shape
        rows = taps(s["height"], s["kernel"], s["stride"], s["padding"])
        columns = taps(s["width"], s["kernel"], s["stride"], s["padding"])
        # images need no gradient in a first layer; here every input gets one, as in the middle of a network
        return 2.0 * s["batch"] * s["filters"] * s["channels"] * rows * columns * common.passes(case)

    def bytes(self, case: Case) -> float:
        """Forward x + w + y; backward also reads dy, x, w, y (or pool codes) and writes dx, dw."""
        s, size = case.shape, case.torch_dtype.itemsize
        x = s["batch"] * s["channels"] * s["height"] * s["width"]
        w = s["filters"] * s["channels"] * s["kernel"] ** 2
        y = s["batch"] * s["filters"] * self._out(s, "height") * self._out(s, "width")
        forward = (x + w + y) * size
        backward = (y + 2 * x + 2 * w) * size + y
        return float({"infer": forward, "fwd": forward, "bwd": backward, "train": forward + backward}[case.mode])

    def algebra(self, case: Case) -> float:
        """Winograd needs up to 4 times fewer multiplications for 3x3, and more for 5x5."""
        s = case.shape
        return {3: 4.0, 5: 6.25}.get(s["kernel"], 1.0) if s["stride"] == 1 else 1.0

    def inputs(self, case: Case, device: torch.device, seed: int) -> Tensors:
        """x, weight (scaled as torch initialises it), bias; the gradient of the output where wanted."""
        s, dtype = case.shape, case.torch_dtype
        fan_in = s["channels"] * s["kernel"] ** 2

        def random(salt: int, *sizes: int, scale: float = 1.0) -> torch.Tensor:
            return common.random(device, seed, *sizes, dtype=dtype, scale=scale, salt=salt)

        weight = (s["filters"], s["channels"], s["kernel"], s["kernel"])
        tensors = {
            "x": random(1, s["batch"], s["channels"], s["height"], s["width"]),
            "weight": random(2, *weight, scale=(2 / fan_in) ** 0.5),
            "bias": random(3, s["filters"], scale=0.1),
        }
        if common.needs_grad(case):
            tensors["grad"] = random(4, s["batch"], s["filters"], self._out(s, "height"), self._out(s, "width"))
        return tensors

    def truth(self, case: Case, tensors: Tensors) -> tuple[torch.Tensor, ...]:
        """The eager formula in float64."""
        return bind(Built(self._eager(case)), common.double(tensors), case.mode, self.wrt)()

    def arms(self, case: Case, device: torch.device) -> list[Arm]:
        """Eager in both layouts, the fused cuDNN call, torch.compile, and fastops per engine in both layouts."""
        how, forward = self._formula("F.conv2d(...).relu_()"), self._eager(case)
        eager = Arm("eager", "stock", lambda: Built(forward), how, yardstick=True)
        nhwc = Arm("eager-nhwc", "stock", eager.build, f"{how}, channels_last", "channels_last", yardstick=True)
        arms = [eager, nhwc, control_of(eager)]
        if case.mode == "infer":
            for suffix, layout in (("", "contiguous"), ("-nhwc", "channels_last")):
                arms.append(
                    Arm(f"cudnn-fused{suffix}", "stock", self._cudnn(case, device), self._formula(FUSED_STOCK), layout)
                )
        for name, mode in common.COMPILE_MODES.items():
            build = self._compiled(case, device, mode)
            arms.append(
                Arm(name, "stock", build, f"torch.compile(mode={mode!r}) of eager", slow_build=mode is not None)
            )
        for impl in ("auto", "triton", "hybrid"):
            for suffix, layout in (("", "contiguous"), ("-nhwc", "channels_last")):
                name = ("fastops" if impl == "auto" else f"fastops-{impl}") + suffix
                how = f"fastops.{self._name()}(impl={impl!r}), {layout}"
                arms.append(Arm(name, "ours", self._fastops(case, impl), how, layout, headline=impl == "auto"))
        return arms

    def _name(self) -> str:
        return "conv2d_relu_max_pool2d" if self.pooled else "conv2d_relu"

    def _formula(self, core: str) -> str:
        return f"F.max_pool2d({core})" if self.pooled else core

    def _out(self, s: Any, side: str) -> int:
        size: int = (s[side] + 2 * s["padding"] - s["kernel"]) // s["stride"] + 1
        return (size - s["pool"]) // s["pool_stride"] + 1 if self.pooled else size

    def _pool(self, case: Case) -> Callable[[torch.Tensor], torch.Tensor]:
        if not self.pooled:
            return lambda y: y
        size, stride = case.shape["pool"], case.shape["pool_stride"]
        return lambda y: F.max_pool2d(y, size, stride)

    def _eager(self, case: Case) -> Callable[[Tensors], torch.Tensor]:
        stride, padding, pool = case.shape["stride"], case.shape["padding"], self._pool(case)

        def forward(t: Tensors) -> torch.Tensor:
            return pool(F.conv2d(t["x"], t["weight"], t["bias"], stride, padding).relu_())

        return forward

    def _cudnn(self, case: Case, device: torch.device) -> Callable[[], Built]:
        def build() -> Built:
            common.only_on_gpu(device, f"{FUSED_STOCK} is a CUDA op")
            s, pool = case.shape, self._pool(case)
            stride, padding = [s["stride"]] * 2, [s["padding"]] * 2
            call = torch.cudnn_convolution_relu
            return Built(lambda t: pool(call(t["x"], t["weight"], t["bias"], stride, padding, [1, 1], 1)))

        return build

    def _compiled(self, case: Case, device: torch.device, mode: str | None) -> Callable[[], Built]:
        return lambda: Built(common.compiled(self._eager(case), device, mode))

    def _fastops(self, case: Case, impl: str) -> Callable[[], Built]:
        def build() -> Built:
            s = case.shape
            function = common.named(f"fastops.{self._name()}")
            extra = {"pool_size": s["pool"], "pool_stride": s["pool_stride"]} if self.pooled else {}
            return Built(
                lambda t: function(t["x"], t["weight"], t["bias"], s["stride"], s["padding"], impl=impl, **extra)
            )

        return build


def taps(size: int, kernel: int, stride: int, padding: int) -> int:
    """Taps that fall inside the image, summed over the output positions of one dimension."""
    outputs = (size + 2 * padding - kernel) // stride + 1
    starts = [i * stride - padding for i in range(outputs)]
    return sum(max(min(start + kernel, size) - max(start, 0), 0) for start in starts)


CONV = Conv(pooled=False)
CONV_POOL = Conv(pooled=True)
