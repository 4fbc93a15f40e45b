"""What an op would launch for a shape on a GPU that is not here: runs its launchers on tensors without data.

A process of its own, because it stands in for the machine: `_env` answers for the target, meta tensors say that they
are on a GPU, and a kernel launch is written down instead of made. Reads JSON requests, writes JSON answers. (Fake
CUDA tensors would do for the forward pass; autograd refuses them where PyTorch is built without CUDA.)
"""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fastops import _env, _library
from fastops.inspection import _source

GPU = torch.device("cuda", 0)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_NAMES = {
    **{torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"},
    **{torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64"},
    **{torch.uint8: "u8", torch.bool: "i1"},
}
_OPTIONS = {"num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion", "launch_cooperative_grid"}


def main() -> None:
    """Answer the requests on stdin, a list of them."""
    requests = json.loads(sys.stdin.read())
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")  # of torch, that this machine lacks cuDNN
    print(json.dumps([answer(request) for request in requests]), file=replies, flush=True)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The ops with the first engine that runs there, or why none does."""
    refusals = []
    for engine in request["engines"]:
        try:
            return {"ops": capture(request, engine)}
        except _env.KernelUnavailable as error:
            refusals.append(str(error))
        except Exception as error:
            refusals.append(f"{type(error).__name__}: {error}")
    return {"failed": "; ".join(refusals)}


def capture(request: dict[str, Any], engine: str) -> list[dict[str, Any]]:
    """Every op that the example calls, forward and backward, with its launches."""
    from triton.runtime.jit import JITFunction

    stand_in(request["target"], request["multiprocessors"], request["device_name"])
    recorder = _Recorder()
    JITFunction.run = _bound(recorder)
    os.environ["FASTOPS_IMPL"] = engine
    example = EXAMPLES[request["op"]]
    with recorder:
        results = example(request["shape"], DTYPES[request["dtype"]], request["backward"])
        if request["backward"]:
            outputs = [tensor for tensor in tree_leaves(results) if isinstance(tensor, torch.Tensor)][:1]
            torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])
    return recorder.ops


def stand_in(target: int, multiprocessors: int, name: str) -> None:
    """Let `_env` and tensors answer as on a machine with that GPU."""
    _env.capability = lambda device_index: divmod(target, 10)  # type: ignore[assignment]
    _env.multiprocessors = lambda device_index: multiprocessors
    _env.device_name = lambda device_index: name
    _env.index_of = lambda device: 0
    _env.why_no_triton = lambda device: None
    _env.interpreting = lambda: False
    true_device = torch._C.TensorBase.device.__get__
    torch.Tensor.device = property(  # type: ignore[assignment, method-assign]
        lambda tensor: true_device(tensor) if _Recorder.inside_torch else GPU
    )
    torch.Tensor.is_cuda = property(lambda tensor: not _Recorder.inside_torch)  # type: ignore[assignment, method-assign]
    torch.cuda._lazy_init = lambda: None  # type: ignore[assignment]
    # meta tensors have none; allocations on a GPU are aligned to 512 bytes
    torch.Tensor.data_ptr = lambda tensor: 512 + tensor.storage_offset() * tensor.element_size()  # type: ignore


class _Recorder(TorchDispatchMode):
    """Calls launchers in place of fastops' ops, and keeps what they launch."""

    # PyTorch's own shape functions are Python too, and must see the meta device
    inside_torch = False

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[dict[str, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace != "fastops":
            before, _Recorder.inside_torch = _Recorder.inside_torch, True
            try:
                return func(*args, **_on_meta(kwargs or {}))
            finally:
                _Recorder.inside_torch = before
        name = func._schema.name.removeprefix("fastops::")
        arguments = _in_order(func, args, kwargs or {})
        launches: list[dict[str, Any]] = []
        self.ops.append({"name": name, "launches": launches})
        with self:
            results = _library.LAUNCHERS[name]()(*arguments)
        touched = [x for x in tree_leaves((arguments, results)) if isinstance(x, torch.Tensor)]
        self.ops[-1]["bytes"] = sum(_bytes(tensor) for tensor in {id(tensor): tensor for tensor in touched}.values())
        self.ops[-1]["flops"] = _flops(name, arguments, results)
        return results

    def launch(self, kernel: Any, grid: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Write down one launch."""
        options = {name: value for name, value in kwargs.items() if name in _OPTIONS and name not in kernel.arg_names}
        given = dict(zip(kernel.arg_names, args, strict=False))
        given |= {name: value for name, value in kwargs.items() if name not in options}
        signature: dict[str, str] = {}
        constexprs: dict[str, Any] = {}
        divisible = []
        for parameter in kernel.params:
            value = given.get(parameter.name, parameter.default)
            kind, is_divisible = _specialise(value, parameter)
            if kind is None:
                constexprs[parameter.name] = _source.encode(parameter.name, value)
                continue
            signature[parameter.name] = kind
            if is_divisible:
                divisible.append(parameter.name)
        shape = grid({**given}) if callable(grid) else grid
        self.ops[-1]["launches"].append(
            {
                "kernel": _source.address(kernel),
                "signature": signature,
                "constexprs": constexprs,
                "num_warps": options.pop("num_warps", 4),
                "num_stages": options.pop("num_stages", 3),
                "options": options,
                "divisible_by_16": divisible,
                "grid": math.prod(int(size) for size in shape),
            }
        )


def _bound(recorder: _Recorder) -> Callable[..., None]:
    """What stands in for JITFunction.run: a function, so that it binds the kernel as its self."""

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        recorder.launch(kernel, grid, args, kwargs)

    return run


def _specialise(value: Any, parameter: Any) -> tuple[str | None, bool]:
    """Type of an argument as Triton's specialisation finds it, None for a constexpr, and whether 16 divides it."""
    if parameter.is_constexpr or value is None:
        return None, False
    if isinstance(value, torch.Tensor):
        aligned = value.data_ptr() % 16 == 0 and not parameter.do_not_specialize
        return f"*{_NAMES[value.dtype]}", aligned
    if type(value).__name__ == "TensorDescriptor":
        sizes = ",".join(str(size) for size in value.block_shape)
        return f"tensordesc<{_NAMES[value.base.dtype]}[{sizes}]>", False
    if isinstance(value, bool):
        return "u1", False
    if isinstance(value, int):
        if value == 1 and not parameter.do_not_specialize:
            return None, False
        kind = "i32" if -(2**31) <= value < 2**31 else "i64"
        return kind, value % 16 == 0 and not parameter.do_not_specialize
    return "fp32", False


def _on_meta(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What is asked for on a GPU, or in pinned memory, gets no memory at all."""
    if kwargs.get("pin_memory"):
        kwargs = kwargs | {"pin_memory": False}
    if getattr(kwargs.get("device"), "type", "") == "cuda":
        kwargs = kwargs | {"device": torch.device("meta")}
    return kwargs


def _in_order(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """All arguments by position, with the schema's defaults, as a launcher takes them."""
    schema = func._schema.arguments
    ordered = list(args)
    for argument in schema[len(args) :]:
        ordered.append(kwargs.get(argument.name, argument.default_value if argument.has_default_value() else None))
    return ordered


def _bytes(tensor: torch.Tensor) -> int:
    """Bytes of the distinct elements: a dimension that was expanded counts once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0 or size == 0)
    return math.prod(sizes) * tensor.element_size()


def _flops(name: str, arguments: list[Any], results: Any) -> float | None:
    formula = _library.FLOP_FORMULAS.get(name)
    if formula is None:
        return None
    shaped = tree_map(lambda x: x.shape if isinstance(x, torch.Tensor) else x, (arguments, results))
    return float(formula(*shaped[0], out_shape=shaped[1]))


def _new(shape: Iterable[int], dtype: torch.dtype, needs_grad: bool) -> torch.Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device="meta", requires_grad=needs_grad)


def _attention(shape: dict[str, int], dtype: torch.dtype, backward: bool) -> Any:
    from fastops.ops.attention import scaled_dot_product_attention

    batch, heads, queries, head_dim = (shape[letter] for letter in "BHSD")
    keys, key_heads = shape.get("SK", queries), shape.get("HK", heads)
    query = _new((batch, heads, queries, head_dim), dtype, backward)
    key, value = (_new((batch, key_heads, keys, head_dim), dtype, backward) for _ in range(2))
    return scaled_dot_product_attention(
        query, key, value, is_causal=bool(shape.get("CAUSAL", 0)), enable_gqa=key_heads != heads
    )


def _conv2d(shape: dict[str, int], dtype: torch.dtype, backward: bool) -> Any:
    from fastops.ops.conv2d_relu import conv2d_relu

    height = shape["H"]
    kernel = shape["R"]
    input = _new((shape["N"], shape["C"], height, shape.get("W", height)), dtype, backward)
    weight = _new((shape["K"], shape["C"], kernel, shape.get("S", kernel)), dtype, backward)
    bias = _new((shape["K"],), dtype, backward)
    input, weight = (x.to(memory_format=torch.channels_last) for x in (input, weight))
    return conv2d_relu(input, weight, bias, shape.get("STRIDE", 1), shape.get("PADDING", 0))


def _recurrent(name: str) -> Callable[..., Any]:
    def run(shape: dict[str, int], dtype: torch.dtype, backward: bool) -> Any:
        import fastops.nn

        layer = getattr(fastops.nn, name)(shape.get("I", shape["H"]), shape["H"], device="meta", dtype=dtype)
        return layer(_new((shape["T"], shape["B"], shape.get("I", shape["H"])), dtype, backward))[0]

    return run


EXAMPLES: dict[str, Callable[..., Any]] = {
    "attention": _attention,
    "conv2d": _conv2d,
    "lstm": _recurrent("LSTM"),
    "gru": _recurrent("GRU"),
    "rnn": _recurrent("RNN"),
}


if __name__ == "__main__":
    main()
