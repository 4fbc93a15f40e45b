"""Arithmetic and traffic of traced operators, from the shapes the profiler recorded.

FLOPs come from the formulas of `torch.utils.flop_counter`, which fastops extends with its own operators, and count a
multiply-add as two. Recurrent operators of PyTorch have no formula there: 2 * weights * rows, twice that in backward.
Bytes are a lower bound: every tensor argument read once, and a result as large as the largest of them.
"""

from __future__ import annotations

import ast
import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from fastops.profiling.trace import HostEvent

ITEM_BYTES = {
    "double": 8,
    "float": 4,
    "c10::Half": 2,
    "c10::BFloat16": 2,
    "long int": 8,
    "int": 4,
    "short int": 2,
    "signed char": 1,
    "unsigned char": 1,
    "bool": 1,
    "c10::complex<float>": 8,
}
FLOATING = {"double": "fp64", "float": "fp32", "c10::Half": "fp16", "c10::BFloat16": "bf16"}
DTYPES = {"double": torch.float64, "c10::Half": torch.float16, "c10::BFloat16": torch.bfloat16, "bool": torch.bool}
RECURRENT = {"aten::lstm", "aten::gru", "aten::rnn_tanh", "aten::rnn_relu"}
RECURRENT_BACKWARD = {"aten::_cudnn_rnn_backward", "aten::mkldnn_rnn_layer_backward", "aten::miopen_rnn_backward"}
VIEWS = """alias as_strided detach detach_ empty empty_like empty_strided expand item _local_scalar_dense narrow permute
    reshape resize_ result_type select slice split squeeze t to transpose unbind unflatten unsqueeze view view_as
    _reshape_alias _unsafe_view lift_fresh is_nonzero size stride"""
NO_TRAFFIC = frozenset(f"aten::{name}" for name in VIEWS.split())


def flops_of(event: HostEvent) -> int:
    """Floating point operations of an operator; 0 where no formula is known or an enclosing operator counted them."""
    if event.category != "cpu_op" or any(_countable(ancestor) for ancestor in event.ancestors()):
        return 0
    return _flops(event)


def bytes_of(event: HostEvent) -> int:
    """Bytes an operator moves at least; 0 for views, and where its children do the work."""
    if event.category != "cpu_op" or event.name in NO_TRAFFIC or not event.name.startswith(("aten::", "fastops::")):
        return 0
    if any(child.category == "cpu_op" and child.name not in NO_TRAFFIC for child in event.children):
        return 0
    sizes = list(_tensor_bytes(event.arguments.get("Input Dims", ()), event.arguments.get("Input type", ())))
    return sum(sizes) + max(sizes, default=0)


def dtype_of(event: HostEvent) -> str:
    """Kind of an operator's first floating tensor, as ceilings name it; "" where it has none."""
    kinds = event.arguments.get("Input type", ())
    return next((FLOATING[kind] for kind in kinds if kind in FLOATING), "")


def _tensor_bytes(dims: Any, types: Any) -> Any:
    for shape, kind in zip(dims, types, strict=False):
        if kind in ITEM_BYTES and (shape or kind):
            yield math.prod(shape) * ITEM_BYTES[kind]


def _countable(event: HostEvent) -> bool:
    if event.name in RECURRENT or event.name in RECURRENT_BACKWARD:
        return True
    return event.category == "cpu_op" and _formula(event.name) is not None


def _flops(event: HostEvent) -> int:
    dims = event.arguments.get("Input Dims")
    if not dims:
        return 0
    if event.name in RECURRENT:
        return _recurrent_flops(dims)
    if event.name in RECURRENT_BACKWARD:
        stacked = bool(dims[1]) and isinstance(dims[1][0], list)  # cuDNN takes all layers at once, oneDNN one
        weights = [shape for shape in dims[1] if len(shape) == 2] if stacked else dims[1:3]
        return 4 * math.prod(dims[0][:-1]) * sum(math.prod(shape) for shape in weights)
    key = (event.name, str(dims), str(event.arguments.get("Input type")), str(event.arguments.get("Concrete Inputs")))
    if key not in _known:
        if len(_known) > 10_000:
            _known.clear()
        _known[key] = _by_formula(event)
    return _known[key]


_known: dict[tuple[str, ...], int] = {}  # steps repeat themselves, and a formula runs an operator on the meta device


def _by_formula(event: HostEvent) -> int:
    formula = _formula(event.name)
    if formula is None:
        return 0
    try:
        return int(formula(event))
    except Exception:
        return 0  # a shape the formula does not know: the operator counts as no arithmetic, its time still counts


def _recurrent_flops(dims: Any) -> int:
    """aten::lstm and its kin: (input, hx, params, ...) or packed: (data, batch_sizes, hx, params, ...)."""
    rows = math.prod(dims[0][:-1])
    weights: list[list[int]] = next((value for value in reversed(dims) if value and isinstance(value[0], list)), [])
    return 2 * rows * sum(math.prod(shape) for shape in weights if len(shape) == 2)


@functools.cache
def _formula(name: str) -> Callable[[HostEvent], int] | None:
    """The flop_counter formula of an operator, as a function of a traced event."""
    from torch.utils.flop_counter import flop_registry

    namespace, _, operator = name.partition("::")
    packet = getattr(getattr(torch.ops, namespace, None), operator, None) if operator else None
    if packet is None or packet not in flop_registry:
        return None
    formula = flop_registry[packet]

    names = [
        (argument.name, argument.kwarg_only) for argument in getattr(packet, packet.overloads()[0])._schema.arguments
    ]

    def count(event: HostEvent) -> int:
        values = [_argument(*triple) for triple in _arguments(event)]
        positional = [value for value, (_, keyword) in zip(values, names, strict=False) if not keyword]
        keywords = {name: value for value, (name, keyword) in zip(values, names, strict=False) if keyword}
        # tensors are on the meta device: shapes only
        return int(formula(*positional, out_val=packet(*positional, **keywords)))

    return count


def _arguments(event: HostEvent) -> Any:
    arguments = event.arguments
    return zip(arguments["Input Dims"], arguments["Input type"], arguments["Concrete Inputs"], strict=True)


def _argument(shape: Any, kind: str, value: str) -> Any:
    if kind in ITEM_BYTES:
        return torch.empty(shape, dtype=DTYPES.get(kind, torch.float32), device="meta")
    if kind == "TensorList":
        return [torch.empty(one, device="meta") for one in shape]
    if value in ("", "None"):
        return None
    try:
        return ast.literal_eval(value.replace("true", "True").replace("false", "False"))
    except (ValueError, SyntaxError):
        return value
