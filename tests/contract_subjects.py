"""What the table of contracts is about: a call of every public op and module, small enough for the interpreter."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import fastops


@dataclass(frozen=True)
class Subject:
    """`make(device, impl, dtype)` gives a callable (an nn.Module or a function) and its inputs."""

    make: Callable[..., tuple[Any, list[torch.Tensor]]]
    is_module: bool


SUBJECTS: dict[str, Subject] = {}


def tensors(device, dtype, *shapes):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) * 0.5 for shape in shapes]
    return [x.to(dtype).to(device).requires_grad_() for x in made]


def function(name, call, *shapes):
    def make(device, impl, dtype=torch.float32):
        return (lambda *given: call(*given, impl=impl)), tensors(device, dtype, *shapes)

    SUBJECTS[name] = Subject(make, False)


def module(name, build, *shapes):
    def make(device, impl, dtype=torch.float32):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            made = build(impl)
        return made.to(device=device, dtype=dtype), tensors(device, dtype, *shapes)

    SUBJECTS[name] = Subject(make, True)


def packed(q, k, v, impl):
    i = torch.arange(3, dtype=torch.int32, device=q.device)
    offsets = i * (i + 3) // 2  # 0, 2, 5, made on the device: a CUDA graph cannot capture a copy from the host
    return fastops.varlen_attention(q, k, v, offsets, offsets, 3, 3, is_causal=True, impl=impl)


def attend(q, k, v, impl):
    lengths = torch.arange(3, 5, device=q.device)
    return fastops.scaled_dot_product_attention(q, k, v, is_causal=True, key_lengths=lengths, impl=impl)


image, weight, bias = (2, 2, 6, 6), (3, 2, 3, 3), (3,)
function("conv2d_relu", lambda x, w, b, impl: fastops.conv2d_relu(x, w, b, padding=1, impl=impl), image, weight, bias)
function(
    "conv2d_relu_max_pool2d",
    lambda x, w, b, impl: fastops.conv2d_relu_max_pool2d(x, w, b, pool_size=2, impl=impl),
    image,
    weight,
    bias,
)
function("scaled_dot_product_attention", attend, *[(2, 1, 4, 8)] * 3)
function("varlen_attention", packed, *[(5, 1, 8)] * 3)
function(
    "lstm_cell",
    lambda x, h, c, w, u, impl: fastops.lstm_cell(x, (h, c), w, u, impl=impl),
    (2, 3),
    (2, 4),
    (2, 4),
    (16, 3),
    (16, 4),
)
for cell, gates in (("gru_cell", 3), ("rnn_tanh_cell", 1), ("rnn_relu_cell", 1)):
    function(
        cell,
        lambda *given, impl, cell=cell: getattr(fastops, cell)(*given, impl=impl),
        *[(2, 3), (2, 4), (gates * 4, 3), (gates * 4, 4)],
    )
module("Conv2dReLU", lambda impl: fastops.nn.Conv2dReLU(2, 3, 3, impl=impl), image)
module("Conv2dReLUMaxPool2d", lambda impl: fastops.nn.Conv2dReLUMaxPool2d(2, 3, 3, pool_size=2, impl=impl), image)
module(
    "Sequential",
    lambda impl: fastops.nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), impl=impl),
    image,
)
for net in ("LSTM", "GRU", "RNN"):
    module(net, lambda impl, net=net: getattr(fastops.nn, net)(3, 4, bidirectional=True, impl=impl), (3, 2, 3))
    module(f"{net}Cell", lambda impl, net=net: getattr(fastops.nn, f"{net}Cell")(3, 4, impl=impl), (2, 3))
module("LayerNormLSTM", lambda impl: fastops.nn.LayerNormLSTM(3, 4, impl=impl), (3, 2, 3))


class Attend(nn.Module):
    """nn.MultiheadAttention as it is called without weights."""

    def __init__(self, impl: str) -> None:
        super().__init__()
        self.attention = fastops.nn.MultiheadAttention(8, 1, batch_first=True, impl=impl)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def layer(kind: str, impl: str) -> nn.Module:
    options = {"dim_feedforward": 8, "dropout": 0.0, "batch_first": True}
    return getattr(fastops.nn, kind)(8, 1, **options, impl=impl)


module("MultiheadAttention", Attend, (2, 4, 8))
module("TransformerEncoderLayer", lambda impl: layer("TransformerEncoderLayer", impl), (2, 4, 8))
module(
    "TransformerEncoder",
    lambda impl: fastops.nn.TransformerEncoder(layer("TransformerEncoderLayer", impl), 1, enable_nested_tensor=False),
    (2, 4, 8),
)
module("TransformerDecoderLayer", lambda impl: layer("TransformerDecoderLayer", impl), (2, 4, 8), (2, 3, 8))
