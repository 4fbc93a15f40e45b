"""Softmax attention, padded and packed. Only real tokens count as work: padding is nobody's FLOP."""

from __future__ import annotations

import random as python_random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Arm, Built, Case, Tensors, Unavailable, control_of
from bench.modes import as_tuple
from bench.workloads import common
from bench.workloads.attention_truth import attention_truth

BACKENDS = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "math": "MATH"}
MATH_SCORES = 2**30  # the math backend writes every score; beyond this it only wastes minutes and memory


def lengths_of(case: Case) -> list[int]:
    """Real tokens of each sequence: spread evenly around the mean that `fill` names, in an arbitrary fixed order."""
    s = case.shape
    fill, longest, batch = s.get("fill", 1.0), s["k_len"], s["batch"]
    if fill >= 1.0:
        return [longest] * batch
    low, high = (max(1.0, (2 * fill - 1) * longest), longest) if fill >= 0.5 else (1.0, 2 * fill * longest)
    steps = max(batch - 1, 1)
    found = [round(low + (high - low) * i / steps) for i in range(batch)]
    python_random.Random(0).shuffle(found)
    return found


def visible_pairs(case: Case, length: int) -> int:
    """Query-key pairs that attend, of one sequence of this many tokens."""
    left = case.shape.get("window")
    if not case.shape.get("causal"):
        return length * length
    if left is None or left >= length:
        return length * (length + 1) // 2
    return (left + 1) * (left + 2) // 2 + (length - left - 1) * (left + 1)


def slopes(heads: int, device: torch.device) -> Tensor:
    """ALiBi's geometric slopes."""
    return torch.tensor([2.0 ** (-8.0 * (i + 1) / heads) for i in range(heads)], device=device)


class Attention:
    """Self-attention of (B, S, H, D) projections, as a layer has them before and after the heads are split.

    Shape keys: batch, heads, kv_heads, q_len, k_len, dim; optional: fill, dropout, causal, window, alibi, bias.
    """

    wrt: tuple[str, ...] = ("q", "k", "v", "bias")

    def flops(self, case: Case) -> float:
        """4 D per visible pair and head forward; backward 2.5 times that."""
        pairs = sum(visible_pairs(case, length) for length in lengths_of(case))
        return 4.0 * case.shape["dim"] * case.shape["heads"] * pairs * common.passes(case, 2.5)

    def bytes(self, case: Case) -> float:
        """q, k, v, out of real tokens; backward reads these and dout and writes dq, dk, dv."""
        s = case.shape
        tokens = sum(lengths_of(case))
        bias = s["heads"] * s["q_len"] * s["k_len"] if s.get("bias") else 0
        forward = tokens * s["dim"] * (2 * s["heads"] + 2 * s["kv_heads"]) + bias
        backward = tokens * s["dim"] * (4 * s["heads"] + 4 * s["kv_heads"]) + 2 * bias
        parts = {"infer": forward, "fwd": forward, "bwd": backward, "train": forward + backward}
        return float(parts[case.mode] * case.torch_dtype.itemsize)

    def algebra(self, case: Case) -> float:
        """No algorithm needs fewer operations."""
        return 1.0

    def randomised(self, case: Case) -> bool:
        """Whether outputs are random (dropout)."""
        return bool(case.shape.get("dropout"))

    def inputs(self, case: Case, device: torch.device, seed: int) -> Tensors:
        """Projections; lengths where rows are padded; the gradient of the output, zero where rows are padding."""
        s, dtype = case.shape, case.torch_dtype

        def random(salt: int, length: int, heads: int) -> Tensor:
            return common.random(device, seed, s["batch"], length, heads, s["dim"], dtype=dtype, salt=salt)

        heads, kv_heads = s["heads"], s["kv_heads"]
        tensors = {"q": random(1, s["q_len"], heads), "k": random(2, s["k_len"], kv_heads)}
        tensors["v"] = random(3, s["k_len"], kv_heads)
        if s.get("fill", 1.0) < 1:
            tensors["lengths"] = torch.tensor(lengths_of(case), device=device, dtype=torch.int32)
        if s.get("bias"):
            tensors["bias"] = common.random(device, seed, 1, heads, s["q_len"], s["k_len"], dtype=dtype, salt=5)
        if common.needs_grad(case):
            tensors["grad"] = random(4, s["q_len"], heads)
            tensors["grad"] = _blank_padding(case, tensors["grad"])
        return tensors

    def relevant(self, case: Case, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Rows of padding in the output mean nothing: zero in every arm's answer before it is graded."""
        return outputs if case.mode == "bwd" else (_blank_padding(case, outputs[0]), *outputs[1:])

    def truth(self, case: Case, tensors: Tensors) -> tuple[Tensor, ...]:
        """Float64, some heads at a time; without dropout."""
        return attention_truth(case, tensors, self.wrt)

    def arms(self, case: Case, device: torch.device) -> list[Arm]:
        """SDPA as a user calls it, each backend forced, FlexAttention, fastops per engine."""
        s = case.shape
        first = Arm(
            "sdpa", "stock", self._sdpa(case), f"F.scaled_dot_product_attention, {_mask_form(s)}", yardstick=True
        )
        arms = [first, control_of(first, "sdpa again")]
        if s.get("fill", 1.0) < 1:
            arms.append(Arm("sdpa-expanded", "stock", self._sdpa(case, expand=True), "SDPA, bool mask [B,1,S,S]"))
        for name, backend in BACKENDS.items():
            build = self._sdpa(case, backend=backend, device=device)
            arms.append(Arm(f"sdpa-{name}", "stock", build, f"SDPA, only SDPBackend.{backend}"))
        arms.append(Arm("flex", "stock", self._flex(case, device), "torch.compile(flex_attention) with a block mask"))
        for impl in ("auto", "triton"):
            name = "fastops" if impl == "auto" else f"fastops-{impl}"
            how = f"fastops.scaled_dot_product_attention(impl={impl!r})"
            arms.append(Arm(name, "ours", self._fastops(case, impl), how, headline=impl == "auto"))
        return arms

    def _sdpa(
        self, case: Case, expand: bool = False, backend: str | None = None, device: torch.device | None = None
    ) -> Callable[[], Built]:
        s = case.shape

        def build() -> Built:
            if backend is not None:
                assert device is not None
                common.only_on_gpu(device, "SDPA backends are forced on GPUs only")
                if backend == "MATH" and s["batch"] * s["heads"] * s["q_len"] * s["k_len"] > MATH_SCORES:
                    raise Unavailable("writes every score: left out at this size")
            made: dict[torch.device, Tensor | None] = {}

            def forward(t: Tensors) -> Tensor:
                where = t["q"].device
                if where not in made:
                    made[where] = _mask(case, t, expand)
                mask = t.get("bias", made[where])
                out = F.scaled_dot_product_attention(
                    *(t[name].transpose(1, 2) for name in ("q", "k", "v")),
                    attn_mask=mask,
                    dropout_p=s.get("dropout", 0.0),
                    is_causal=bool(s.get("causal")) and mask is None,
                    enable_gqa=s["heads"] != s["kv_heads"],
                )
                return out.transpose(1, 2)

            return Built(_with_backend(forward, backend))

        return build

    def _flex(self, case: Case, device: torch.device) -> Callable[[], Built]:
        s = case.shape

        def build() -> Built:
            common.only_on_gpu(device, "FlexAttention is compiled for GPUs")
            if s.get("dropout"):
                raise Unavailable("FlexAttention has no dropout")
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention

            call = common.compiled(flex_attention, device)
            lengths = torch.tensor(lengths_of(case), device=device)
            tilt = slopes(s["heads"], device)

            def visible(b: Any, h: Any, i: Any, j: Any) -> Any:
                seen = j < lengths[b]
                if s.get("causal"):
                    seen = seen & (j <= i)
                if s.get("window") is not None:
                    seen = seen & (i - j <= s["window"])
                return seen

            block_mask = None
            if s.get("causal") or s.get("fill", 1.0) < 1:
                block_mask = create_block_mask(visible, s["batch"], None, s["q_len"], s["k_len"], device=device)

            def forward(t: Tensors) -> Tensor:
                score_mod = None
                if s.get("alibi"):
                    score_mod = lambda score, b, h, i, j: score - tilt[h] * (i - j).abs()  # noqa: E731
                elif "bias" in t:
                    bias = t["bias"]
                    score_mod = lambda score, b, h, i, j: score + bias[0, h, i, j]  # noqa: E731
                q, k, v = (t[name].transpose(1, 2) for name in ("q", "k", "v"))
                gqa = s["heads"] != s["kv_heads"]
                return call(q, k, v, score_mod, block_mask, enable_gqa=gqa).transpose(1, 2)

            return Built(forward)

        return build

    def _fastops(self, case: Case, impl: str) -> Callable[[], Built]:
        s = case.shape

        def build() -> Built:
            function = common.named("fastops.scaled_dot_product_attention")
            extra: dict[str, Any] = {}
            if s.get("window") is not None:
                extra["window"] = (s["window"], 0)

            def forward(t: Tensors) -> Tensor:
                if "lengths" in t:
                    extra["key_lengths"] = extra["query_lengths"] = t["lengths"]
                if s.get("alibi") and "alibi_slopes" not in extra:
                    extra["alibi_slopes"] = slopes(s["heads"], t["q"].device)
                out: Tensor = function(
                    *(t[name].transpose(1, 2) for name in ("q", "k", "v")),
                    attn_mask=t.get("bias"),
                    dropout_p=s.get("dropout", 0.0),
                    is_causal=bool(s.get("causal")),
                    enable_gqa=s["heads"] != s["kv_heads"],
                    impl=impl,
                    **extra,
                )
                return out.transpose(1, 2)

            return Built(forward)

        return build


class Varlen(Attention):
    """The same without padding: (tokens, H, D) and offsets."""

    wrt = ("q", "k", "v")

    def inputs(self, case: Case, device: torch.device, seed: int) -> Tensors:
        """Packed projections and the offsets of the sequences."""
        s, lengths = case.shape, lengths_of(case)
        total = sum(lengths)

        def random(salt: int, heads: int) -> Tensor:
            return common.random(device, seed, total, heads, s["dim"], dtype=case.torch_dtype, salt=salt)

        tensors = {"q": random(1, s["heads"]), "k": random(2, s["kv_heads"]), "v": random(3, s["kv_heads"])}
        offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        tensors["offsets"] = offsets.to(device)
        if common.needs_grad(case):
            tensors["grad"] = random(4, s["heads"])
        return tensors

    def relevant(self, case: Case, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Everything is real."""
        return outputs

    def truth(self, case: Case, tensors: Tensors) -> tuple[Tensor, ...]:
        """One sequence at a time, in float64."""
        leaves = common.double(tensors, self.wrt if common.needs_grad(case) else ())
        out = self._loop(case)(leaves)
        if not common.needs_grad(case):
            return (out.detach(),)
        grads = torch.autograd.grad(out, [leaves[name] for name in self.wrt], leaves["grad"])
        return grads if case.mode == "bwd" else (out.detach(), *grads)

    def arms(self, case: Case, device: torch.device) -> list[Arm]:
        """A loop over SDPA, jagged nested tensors, torch's varlen_attn, fastops."""
        loop = Arm("sdpa-loop", "stock", lambda: Built(self._loop(case)), "one SDPA call a sequence", yardstick=True)
        arms = [loop, control_of(loop, "sdpa-loop again")]
        arms.append(Arm("nested", "stock", self._nested(case, device), "SDPA of jagged nested tensors"))
        arms.append(
            Arm("varlen_attn", "stock", self._varlen_attn(case, device), "torch.nn.attention.varlen.varlen_attn")
        )
        for impl in ("auto", "triton"):
            name = "fastops" if impl == "auto" else f"fastops-{impl}"
            how = f"fastops.varlen_attention(impl={impl!r})"
            arms.append(Arm(name, "ours", self._packed(case, impl), how, headline=impl == "auto"))
        return arms

    def _loop(self, case: Case) -> Callable[[Tensors], Tensor]:
        lengths, gqa = lengths_of(case), case.shape["heads"] != case.shape["kv_heads"]

        def forward(t: Tensors) -> Tensor:
            parts = zip(*(t[name].split(lengths) for name in ("q", "k", "v")), strict=True)
            causal = bool(case.shape.get("causal"))
            outs = [
                F.scaled_dot_product_attention(
                    *(x.transpose(0, 1)[None] for x in part), is_causal=causal, enable_gqa=gqa
                ).squeeze(0)
                for part in parts
            ]
            return torch.cat([out.transpose(0, 1) for out in outs])

        return forward

    def _nested(self, case: Case, device: torch.device) -> Callable[[], Built]:
        lengths = lengths_of(case)

        def build() -> Built:
            common.only_on_gpu(device, "jagged SDPA runs on GPUs only")

            def forward(t: Tensors) -> Tensor:
                q, k, v = (
                    torch.nested.nested_tensor_from_jagged(
                        t[name], t["offsets"].long(), min_seqlen=min(lengths), max_seqlen=max(lengths)
                    ).transpose(1, 2)
                    for name in ("q", "k", "v")
                )
                out = F.scaled_dot_product_attention(q, k, v, is_causal=bool(case.shape.get("causal")))
                values: Tensor = out.transpose(1, 2).values()
                return values

            return Built(forward)

        return build

    def _varlen_attn(self, case: Case, device: torch.device) -> Callable[[], Built]:
        longest, causal = max(lengths_of(case)), bool(case.shape.get("causal"))

        def build() -> Built:
            common.only_on_gpu(device, "varlen_attn is a CUDA op")
            from torch.nn.attention.varlen import varlen_attn

            window = {"window_size": (-1, 0)} if causal else {}
            return Built(
                lambda t: as_tuple(
                    varlen_attn(t["q"], t["k"], t["v"], t["offsets"], t["offsets"], longest, longest, **window)
                )[0]
            )

        return build

    def _packed(self, case: Case, impl: str) -> Callable[[], Built]:
        longest, causal = max(lengths_of(case)), bool(case.shape.get("causal"))

        def build() -> Built:
            call = common.named("fastops.varlen_attention")
            return Built(
                lambda t: call(
                    t["q"], t["k"], t["v"], t["offsets"], t["offsets"], longest, longest, is_causal=causal, impl=impl
                )
            )

        return build


def _blank_padding(case: Case, x: Tensor) -> Tensor:
    """(B, S, H, D) with zeros in the rows past each sequence's length."""
    if case.shape.get("fill", 1.0) >= 1:
        return x
    lengths = torch.tensor(lengths_of(case), device=x.device)
    padding = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
    return x.masked_fill(padding[..., None, None], 0)


def _mask_form(s: Any) -> str:
    if s.get("bias") or s.get("alibi"):
        return "float mask [1,H,S,S]"
    if s.get("window") is not None:
        return "bool mask [1,1,S,S]"
    if s.get("fill", 1.0) < 1:
        return "bool mask [B,1,1,S]"
    return "is_causal" if s.get("causal") else "no mask"


def _mask(case: Case, t: Tensors, expand: bool) -> Tensor | None:
    """The mask a user would build once, outside the layer."""
    s, device = case.shape, t["q"].device
    rows, columns = (torch.arange(s[name], device=device) for name in ("q_len", "k_len"))
    if s.get("alibi"):
        distance = (rows[:, None] - columns).abs()
        bias = -slopes(s["heads"], device)[:, None, None] * distance
        if s.get("causal"):
            bias = bias.masked_fill(columns > rows[:, None], float("-inf"))
        return bias[None].to(t["q"].dtype)
    if s.get("window") is not None:
        return ((columns <= rows[:, None]) & (rows[:, None] - columns <= s["window"]))[None, None]
    if "lengths" in t:
        mask = (columns < t["lengths"][:, None])[:, None, None, :]
        return mask.expand(-1, 1, s["q_len"], -1).contiguous() if expand else mask
    return None


def _with_backend(forward: Callable[[Tensors], Tensor], backend: str | None) -> Callable[[Tensors], Tensor]:
    if backend is None:
        return forward
    from torch.nn.attention import SDPBackend, sdpa_kernel

    chosen = getattr(SDPBackend, backend)

    def forced(t: Tensors) -> Tensor:
        with sdpa_kernel(chosen):
            return forward(t)

    return forced


ATTENTION = Attention()
VARLEN = Varlen()
