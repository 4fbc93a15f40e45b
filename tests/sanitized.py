"""Forward and backward passes on a GPU, small ones, for compute-sanitizer to watch.

Every public op and module in fp32 and fp16; then every engine and form that calls of their size do not reach.
"""

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastops
from fastops.ops.rnn import recurrent_layer
from tests.contract_subjects import SUBJECTS, tensors

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1}


def recurrent(mode: str, hidden: int, batch: int, impl: str, device: torch.device) -> tuple[Any, list[Tensor]]:
    """Two directions, ragged rows."""
    rows = GATES[mode] * hidden
    x, *weights = tensors(device, torch.float16, (3, batch, 24), *[(rows, 24), (rows, hidden)] * 2)
    lengths = torch.arange(batch, device=device) % 4

    def call(x: Tensor, *w: Tensor) -> Any:
        directions = [(*w[:2], None, None), (*w[2:], None, None)]
        return recurrent_layer(mode, x, None, None, directions, lengths, impl=impl)[0]

    return call, [x, *weights]


def attention(device: torch.device, shape: tuple[int, ...], **options: Any) -> tuple[Any, list[Tensor]]:
    return partial(fastops.scaled_dot_product_attention, impl="triton", **options), tensors(
        device, torch.float16, *[shape] * 3
    )


def convolution(device: torch.device, image: tuple[int, ...], weight: tuple[int, ...], **options: Any) -> Any:
    given = tensors(device, torch.float16, image, weight, weight[:1])
    layout = torch.channels_last
    given[:2] = [x.detach().contiguous(memory_format=layout).requires_grad_() for x in given[:2]]
    return partial(fastops.conv2d_relu, **options), given


def calls(device: torch.device) -> Iterator[tuple[str, Any, list[Tensor]]]:
    """(name, function or module, inputs)."""
    for dtype in (torch.float32, torch.float16):
        for name, subject in SUBJECTS.items():
            yield (f"{name} {dtype}", *subject.make(device, "triton", dtype))
    for mode in GATES:
        yield (f"{mode} step", *recurrent(mode, 40, 5, "step", device))
        yield (f"{mode} small", *recurrent(mode, 40, 20, "small", device))
        # several programs of several rows each, which meet at the barrier
        yield (f"{mode} persistent", *recurrent(mode, 256, 40, "persistent", device))
    for engine in ("small", "step"):
        module = fastops.nn.LayerNormLSTM(24, 40, impl=engine).to(device, torch.float16)
        yield (f"LayerNormLSTM {engine}", module, tensors(device, torch.float16, (3, 5, 24)))
    for form, image, weight, options in (
        ("hybrid", (2, 8, 9, 9), (16, 8, 3, 3), {"impl": "hybrid"}),
        ("gather_flat", (2, 3, 33, 33), (16, 3, 11, 11), {"impl": "triton", "stride": 4, "padding": 2}),
        ("gather", (2, 64, 9, 9), (16, 64, 3, 3), {"impl": "triton", "stride": 2}),
        ("boxes", (2, 64, 13, 13), (128, 64, 3, 3), {"impl": "triton", "padding": 1}),
        ("batch", (128, 64, 2, 2), (128, 64, 3, 3), {"impl": "triton", "padding": 1}),
    ):
        yield (f"conv2d_relu {form}", *convolution(device, image, weight, **options))
    for head_dim in (64, 128):
        shape = (2, 2, 150, head_dim)
        some = torch.tensor([150, 70], device=device)
        yield (f"attention {head_dim}", *attention(device, shape, is_causal=True))
        yield (f"attention {head_dim} lengths", *attention(device, shape, key_lengths=some, dropout_p=0.1))
        mask = torch.arange(150, device=device) % 3 != 0
        yield (f"attention {head_dim} mask", *attention(device, shape, attn_mask=mask[None, None, None]))


def backward(call: Any, given: list[Tensor]) -> None:
    """One pass each way; the first result is what is differentiated."""
    result = call(*given)
    while not isinstance(result, Tensor):
        result = result[0]
    leaves = [*given, *(call.parameters() if isinstance(call, nn.Module) else ())]
    torch.autograd.grad(result.float().square().sum(), leaves, allow_unused=True)


def main() -> int:
    for name, call, given in calls(torch.device("cuda")):
        backward(call, given)
        torch.cuda.synchronize()
        print(name, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
