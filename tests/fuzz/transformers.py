"""MultiheadAttention, TransformerEncoder, its layer, TransformerDecoderLayer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import fastops
from tests.fuzz.engine import SEEDS, Spec, agree_modules, fuzzed, rarely, specs

WRONG = ("width", "rank", "key length", "mask shape", "mask dtype", "padding shape", "causal without mask")


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
    if wrong == "padding shape" or draw(st.booleans()):
        dims = (batch, k_len) if batched else (k_len,)
        if wrong == "padding shape":
            dims = (*dims[:-1], k_len + 1)
        padding = draw(specs(dims, torch.bool)), draw(st.booleans())
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

        return call

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
    dtype: torch.dtype
    impl: str
    seed: int


@st.composite
def layers(draw: Any, impls: tuple[str, ...]) -> Layer:
    one, many = ("TransformerEncoderLayer", "TransformerDecoderLayer"), ("TransformerEncoder",)
    kind = draw(st.sampled_from([*one, *many]) if "auto" in impls else rarely(*map(st.sampled_from, (one, many))))
    options: dict[str, Any] = {"d_model": 4, "nhead": draw(st.sampled_from([1, 2])), "dim_feedforward": 5}
    options |= {"norm_first": draw(st.booleans()), "batch_first": draw(st.booleans()), "bias": draw(st.booleans())}
    options |= {"dropout": 0.0, "activation": draw(st.sampled_from(["relu", "gelu"]))}
    batch, length, memory = draw(st.integers(1, 2)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    dtype = torch.float32

    def shape(steps: int) -> tuple[int, ...]:
        return (batch, steps, 4) if options["batch_first"] else (steps, batch, 4)

    wrong = draw(rarely(st.just(0), st.just(1)))
    names = {"src_mask": (length, length + wrong), "src_key_padding_mask": (batch, length)}
    inputs = [draw(specs(shape(length), dtype))]
    if kind == "TransformerEncoder":
        names["mask"] = names.pop("src_mask")
    if kind == "TransformerDecoderLayer":
        inputs.append(draw(specs(shape(memory), dtype)))
        names = {"tgt_mask": (length, length + wrong), "memory_mask": (length, memory)}
        names |= {"tgt_key_padding_mask": (batch, length), "memory_key_padding_mask": (batch, memory)}
    masks = {n: (draw(specs(s, torch.bool)), draw(st.booleans())) for n, s in names.items() if draw(st.booleans())}
    seed, impl = draw(SEEDS), draw(st.sampled_from(impls))
    return Layer(kind, options, tuple(inputs), masks, draw(st.booleans()), dtype, impl, seed)


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
        module.train(case.training)

    def through(module: nn.Module) -> Any:
        def call(*inputs: Tensor) -> Any:
            masks = {n: bool_or_float(m.make(), as_float, inputs[0].dtype) for n, (m, as_float) in case.masks.items()}
            return module(*inputs, **masks)

        return call

    return agree_modules(through, ours, stock, double, case.inputs, explicit=case.impl == "triton")


@fuzzed(layers(("auto", "torch")))
def transformer_layers(case: Layer) -> str:
    return layer_call(case)


@fuzzed(layers(("triton",)))
def transformer_layers_kernels(case: Layer) -> str:
    return layer_call(case)
