"""Whole models: what a user of `fastops.accelerate` gets. Same weights in every arm, dropout at 0 when training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.case import Arm, Built, Case, Tensors, Unavailable, control_of
from bench.modes import as_tuple, bind
from bench.workloads import attention, common, conv


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

    def loss_shape(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and labels as cross-entropy takes them."""
        return logits, target

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
            logits = logits if logits.dtype == torch.float64 else logits.float()
            return F.cross_entropy(*self.loss_shape(logits, t["target"]))

        return Built(forward, list(owner.parameters()), update)


def _accelerated(impl: str) -> Callable[[nn.Module], nn.Module]:
    def change(model: nn.Module) -> nn.Module:
        accelerated: nn.Module = common.named("fastops.accelerate")(model)
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
        made: nn.Module = common.named("models.alexnet.AlexNet")(num_classes=case.shape["classes"])
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


class Bert(Model):
    """models.bert on padded batches. Shape keys: batch, length, fill; optional small: layers, width, heads."""

    def make(self, case: Case) -> nn.Module:
        """BERT-base, or the small one that the shape describes; no dropout anywhere."""
        made = common.named("models.bert.BertClassifier")
        try:
            from transformers import BertConfig
        except ImportError as error:
            raise Unavailable(f"transformers is not installed ({error})") from error
        sizes = _bert_sizes(case)
        config = BertConfig(
            num_hidden_layers=sizes["layers"],
            hidden_size=sizes["width"],
            intermediate_size=4 * sizes["width"],
            num_attention_heads=sizes["heads"],
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        model: nn.Module = made(config=config)
        return model

    def inputs(self, case: Case, device: torch.device, seed: int) -> Tensors:
        """Token ids, the mask a tokenizer gives, labels when training."""
        s = case.shape
        generator = torch.Generator(device=device).manual_seed(seed)
        ids = torch.randint(1000, 30000, (s["batch"], s["length"]), generator=generator, device=device)
        lengths = torch.tensor(attention.lengths_of(_as_attention(case)), device=device)
        mask = (torch.arange(s["length"], device=device) < lengths[:, None]).long()
        tensors = {"ids": ids * mask, "mask": mask}
        if case.mode != "infer":
            tensors["target"] = torch.randint(2, (s["batch"],), generator=generator, device=device)
        return tensors

    def logits(self, model: nn.Module, t: Tensors) -> Tensor:
        """Call with the mask."""
        found: Tensor = model(t["ids"], attention_mask=t["mask"])
        return found

    def algebra(self, case: Case) -> float:
        """No algorithm needs fewer operations."""
        return 1.0

    def flops(self, case: Case) -> float:
        """Linear layers and attention of real tokens."""
        sizes, lengths = _bert_sizes(case), attention.lengths_of(_as_attention(case))
        linear = 2.0 * 12 * sizes["width"] ** 2 * sum(lengths)
        scores = 4.0 * sizes["width"] * sum(length**2 for length in lengths)
        return sizes["layers"] * (linear * common.passes(case) + scores * common.passes(case, 2.5))


def _bert_sizes(case: Case) -> dict[str, int]:
    return {"layers": 12, "width": 768, "heads": 12} | {
        key: case.shape[key] for key in ("layers", "width", "heads") if key in case.shape
    }


def _as_attention(case: Case) -> Case:
    shape = {"batch": case.shape["batch"], "k_len": case.shape["length"], "fill": case.shape["fill"]}
    return Case(case.op, case.name, case.dtype, case.mode, shape)


class ByteLstm(Model):
    """models.lstm's byte-level language model. Shape keys: batch, length, hidden, layers."""

    engines = ("persistent", "step")

    def make(self, case: Case) -> nn.Module:
        """An LSTM between an embedding and a head."""
        s = case.shape
        made: nn.Module = common.named("models.lstm.ByteLanguageModel")(
            embedding=s["hidden"], hidden=s["hidden"], layers=s["layers"]
        )
        return made

    def inputs(self, case: Case, device: torch.device, seed: int) -> Tensors:
        """Bytes, and the bytes after them when training."""
        generator = torch.Generator(device=device).manual_seed(seed)
        sizes = (case.shape["batch"], case.shape["length"])
        names = ("tokens",) if case.mode == "infer" else ("tokens", "target")
        return {name: torch.randint(256, sizes, generator=generator, device=device) for name in names}

    def logits(self, model: nn.Module, t: Tensors) -> Tensor:
        """One row of 256 for every byte."""
        found: Tensor = as_tuple(model(t["tokens"]))[0]
        return found

    def loss_shape(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Every position is an example."""
        return logits.flatten(0, 1), target.flatten()

    def algebra(self, case: Case) -> float:
        """No algorithm needs fewer operations."""
        return 1.0

    def flops(self, case: Case) -> float:
        """Gates of every layer, and the head."""
        s = case.shape
        per_token = s["layers"] * 2.0 * 2 * s["hidden"] * 4 * s["hidden"] + 2.0 * s["hidden"] * 256
        return per_token * s["batch"] * s["length"] * common.passes(case)


BERT = Bert()
BYTE_LSTM = ByteLstm()
