"""MultiheadAttention, TransformerEncoder, its layer, TransformerDecoderLayer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import fastops
from tests.fuzz.engine import SEEDED_DROPOUT, SEEDS, Spec, agree_modules, fuzzed, rarely, seeded, specs

WRONG = (
    "width",
    "rank",
    "key length",
    "mask shape",
    "mask dtype",
    "padding shape",
    "padding dtype",
    "causal without mask",
)
LAYER_WRONG = (
    "width",
    "rank",
    "input dtype",
    "mask width",
    "mask length",
    "mask dtype",
    "mask rank",
    "padding width",
    "padding batch",
    "padding dtype",
    "memory width",
    "memory batch",
    "memory rank",
)


def rates(impls: tuple[str, ...]) -> Any:
    """Of dropout: where the kernels draw, what is comparable is that all is dropped."""
    return st.sampled_from([0.0, 0.0, 0.5 if SEEDED_DROPOUT and "auto" in impls else 1.0, 1.0])


@dataclass(frozen=True)
class Heads:
    options: dict[str, Any]
    inputs: tuple[Spec, ...]  # query, key, value; fewer where they are one tensor
    mask: Any
    padding: Any
    call: dict[str, Any]
    dtype: torch.dtype
    impl: str
    seed: int


def bool_or_float(tensor: Tensor, as_float: bool, dtype: torch.dtype) -> Tensor:
    """A mask whose True hides, the first key seen by all: torch gives NaN for a query that sees nothing."""
    hidden = tensor.clone()
    hidden[..., 0] = False
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, float("-inf")) if as_float else hidden


@st.composite
def multihead(draw: Any, impls: tuple[str, ...]) -> Heads:
    heads = draw(st.sampled_from([1, 2]))
    width, dtype = heads * draw(st.sampled_from([1, 4])), torch.float32
    options: dict[str, Any] = {"num_heads": heads, "embed_dim": width, "bias": draw(st.booleans())}
    options["batch_first"] = draw(st.booleans())
    same = draw(st.sampled_from([1, 2, 3]))
    if same == 3 and draw(st.booleans()):
        options |= {"kdim": draw(st.integers(1, 3)), "vdim": draw(st.integers(1, 3))}
    options["dropout"] = draw(rates(impls))
    if draw(st.integers(0, 5)) == 5:
        options[draw(st.sampled_from(["add_bias_kv", "add_zero_attn"]))] = True
    wrong = draw(rarely(st.just("none"), st.sampled_from(WRONG)))
    batch, q_len = draw(st.integers(1, 2)), draw(st.integers(1, 4))
    k_len = q_len if same == 1 else draw(st.integers(1, 4))
    batched = draw(st.integers(0, 3)) > 0

    def shape(length: int, features: int) -> tuple[int, ...]:
        if not batched:
            return (length, features)
        return (batch, length, features) if options["batch_first"] else (length, batch, features)

    shapes = [shape(q_len, width + (wrong == "width")), shape(k_len, options.get("kdim", width))]
    shapes.append(shape(k_len + (wrong == "key length"), options.get("vdim", width)))
    if wrong == "rank":
        shapes[0] = (1, 1, *shapes[0])
    inputs = tuple(draw(specs(s, dtype)) for s in shapes[:same])
    weights = rarely(st.just(False), st.just(True)) if impls == ("triton",) else st.booleans()  # kernels have none
    call: dict[str, Any] = {"need_weights": draw(weights), "average_attn_weights": draw(st.booleans())}
    mask = padding = None
    if wrong.startswith("mask") or draw(st.booleans()):
        dims = (batch * heads, q_len, k_len) if batched and draw(st.booleans()) else (q_len, k_len)
        if wrong == "mask shape":
            dims = (*dims[:-1], k_len + 1)
        mask = draw(specs(dims, torch.int64 if wrong == "mask dtype" else torch.bool)), draw(st.booleans())
    if wrong.startswith("padding") or draw(st.booleans()):
        dims = (batch, k_len) if batched else (k_len,)
        if wrong == "padding shape":
            dims = (*dims[:-1], k_len + 1)
        kind = torch.int64 if wrong == "padding dtype" else torch.bool
        padding = draw(specs(dims, kind)), draw(st.booleans())
    if wrong == "causal without mask":
        mask, call["is_causal"] = None, True
    return Heads(options, inputs, mask, padding, call, dtype, draw(st.sampled_from(impls)), draw(SEEDS))


def multihead_call(case: Heads) -> str:
    def build(make: Any, **more: Any) -> nn.Module:
        torch.manual_seed(case.seed)
        return make(**case.options, dtype=case.dtype, **more)

    stock, ours = build(nn.MultiheadAttention), build(fastops.nn.MultiheadAttention, impl=case.impl)
    double = build(nn.MultiheadAttention).double()
    double.load_state_dict(stock.state_dict())

    def through(module: nn.Module) -> Any:
        def call(*inputs: Tensor) -> Any:
            query, key, value = (*inputs, *inputs[-1:] * 2)[:3]
            masks: dict[str, Any] = {}
            for name, mask in (("attn_mask", case.mask), ("key_padding_mask", case.padding)):
                if mask is not None:
                    made = mask[0].make()
                    masks[name] = made if made.dtype != torch.bool else bool_or_float(made, mask[1], query.dtype)
            return module(query, key, value, **masks, **case.call)

        return seeded(call, case.seed)

    return agree_modules(through, ours, stock, double, case.inputs, explicit=case.impl == "triton")


@fuzzed(multihead(("auto", "torch")))
def multihead_attention(case: Heads) -> str:
    return multihead_call(case)


@fuzzed(multihead(("triton",)))
def multihead_attention_kernels(case: Heads) -> str:
    return multihead_call(case)


@dataclass(frozen=True)
class Layer:
    kind: str
    options: dict[str, Any]
    inputs: tuple[Spec, ...]
    masks: dict[str, tuple[Spec, bool]]
    training: bool
    wrong: str
    dtype: torch.dtype
    impl: str
    seed: int


@st.composite
def layers(draw: Any, impls: tuple[str, ...]) -> Layer:
    one, many = ("TransformerEncoderLayer", "TransformerDecoderLayer"), ("TransformerEncoder",)
    kind = draw(st.sampled_from([*one, *many]) if "auto" in impls else rarely(*map(st.sampled_from, (one, many))))
    options: dict[str, Any] = {"d_model": 4, "nhead": draw(st.sampled_from([1, 2])), "dim_feedforward": 5}
    options |= {"norm_first": draw(st.booleans()), "batch_first": draw(st.booleans()), "bias": draw(st.booleans())}
    options |= {"dropout": draw(rates(impls)), "activation": draw(st.sampled_from(["relu", "gelu"]))}
    batch, length, memory = draw(st.integers(1, 2)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    dtype = torch.float32

    def shape(steps: int) -> tuple[int, ...]:
        return (batch, steps, 4) if options["batch_first"] else (steps, batch, 4)

    decoder = kind == "TransformerDecoderLayer"
    mistakes = [w for w in LAYER_WRONG if decoder or "memory" not in w]
    wrong = draw(rarely(st.just("none"), st.sampled_from(mistakes)))
    if wrong != "none":
        options["dropout"] = 0.0
    named = "tgt" if decoder else "src"
    square, hidden = f"{named}_mask" if kind != "TransformerEncoder" else "mask", f"{named}_key_padding_mask"
    names: dict[str, tuple[int, ...]] = {square: (length, length), hidden: (batch, length)}
    shapes = [shape(length)]
    if decoder:
        shapes.append(shape(memory))
        names |= {"memory_mask": (length, memory), "memory_key_padding_mask": (batch, memory)}
    place = 1 if "memory" in wrong else 0
    if "mask" in wrong or "padding" in wrong:
        odd = draw(st.sampled_from(sorted(n for n in names if ("padding" in n) == ("padding" in wrong))))
        first, last = names[odd]
        if wrong.endswith("width"):
            last += 1
        if wrong in ("mask length", "padding batch"):
            first += 1
        names[odd] = (first, last) if wrong != "mask rank" else draw(st.sampled_from([(last,), (1, 1, first, last)]))
    elif wrong.endswith("width"):
        shapes[place] = (*shapes[place][:-1], 5)
    elif wrong.endswith("rank"):
        shapes[place] = draw(st.sampled_from([(4,), (1, *shapes[place])]))
    elif wrong == "memory batch":
        axis = 0 if options["batch_first"] else 1
        shapes[1] = tuple(size + (i == axis) for i, size in enumerate(shapes[1]))
    inputs = [draw(specs(s, torch.float64 if wrong == "input dtype" else dtype)) for s in shapes]
    masks = {}
    for name, dims in names.items():
        mistaken = ("mask" in wrong or "padding" in wrong) and name == odd
        if mistaken or draw(st.booleans()):
            of = torch.int64 if mistaken and wrong.endswith("dtype") else torch.bool
            masks[name] = draw(specs(dims, of)), draw(st.booleans())
    seed, impl = draw(SEEDS), draw(st.sampled_from(impls))
    return Layer(kind, options, tuple(inputs), masks, draw(st.booleans()), wrong, dtype, impl, seed)


def layer_call(case: Layer) -> str:
    def build(package: Any, **more: Any) -> nn.Module:
        torch.manual_seed(case.seed)
        if case.kind != "TransformerEncoder":
            return getattr(package, case.kind)(**case.options, dtype=case.dtype, **more)
        layer = package.TransformerEncoderLayer(**case.options, dtype=case.dtype, **more)
        return package.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    stock, ours, double = build(nn), build(fastops.nn, impl=case.impl), build(nn).double()
    double.load_state_dict(stock.state_dict())
    for module in (stock, ours, double):
        # of what is wrong torch's fused way of evaluation sees another part, and says so by other errors
        module.train(case.training or (case.wrong != "none" and module is not ours))

    def through(module: nn.Module) -> Any:
        def call(*inputs: Tensor) -> Any:
            masks = {}
            for name, (mask, as_float) in case.masks.items():
                made = mask.make()
                masks[name] = made if made.dtype != torch.bool else bool_or_float(made, as_float, inputs[0].dtype)
            return module(*inputs, **masks)

        return seeded(call, case.seed)

    return agree_modules(through, ours, stock, double, case.inputs, explicit=case.impl == "triton")


@fuzzed(layers(("auto", "torch")))
def transformer_layers(case: Layer) -> str:
    return layer_call(case)


@fuzzed(layers(("triton",)))
def transformer_layers_kernels(case: Layer) -> str:
    return layer_call(case)
