"""The op boundary: how a launcher becomes `torch.ops.fastops.<name>`, and how second derivatives stay right.

Every op is a `torch.autograd.Function` (setup_context style) over two registered ops, `<name>_forward` and
`<name>_backward`. Registered ops are opaque to torch.compile, checked by opcheck, and launch on the device of their
first tensor. The launchers, and with them triton, are imported at the first call.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

LIBRARY = torch.library.Library("fastops", "DEF")
FLOP_COUNTER = "torch.utils.flop_counter"
FLOP_FORMULAS: dict[str, Callable[..., int]] = {}
FAKES: dict[str, Callable[..., Any]] = {}  # what allocates an op's results, by op
# op name -> function that imports and returns its launcher; `fastops inspect --shape` runs launchers on fake tensors
LAUNCHERS: dict[str, Callable[[], Callable[..., Any]]] = {}


def define(
    name: str, schema: str, launch: str, fake: Callable[..., Any], flops: Callable[..., int] | None = None
) -> Any:
    """Register `fastops::name` and return its overload, to be bound once at module level.

    Args:
        name: op name, without namespace.
        schema: arguments and results in PyTorch's schema language, e.g. "(Tensor x, float p) -> Tensor".
        launch: "module:function" of the launcher. It is imported at the first call, so importing fastops needs no
            triton. It receives real tensors, on a GPU or (while interpreting) on the CPU, with the device made current.
        fake: allocates outputs exactly as the launcher does, with `new_empty` of the same sizes and strides.
        flops: formula for `torch.utils.flop_counter`: takes the op's arguments with shapes in place of tensors, and
            `out_shape=`; returns the operations, counting a multiply-add as two.
    """
    module, _, function = launch.partition(":")
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    loaded: list[Callable[..., Any]] = []

    def launcher() -> Callable[..., Any]:
        if not loaded:
            loaded.append(getattr(importlib.import_module(module), function))
        return loaded[0]

    def on_cpu(*args: Any) -> Any:
        return LAUNCHERS[name]()(*args)

    def on_cuda(*args: Any) -> Any:
        device = next(argument.device for argument in args if isinstance(argument, torch.Tensor))
        if device.index == torch.cuda.current_device():
            return LAUNCHERS[name]()(*args)
        with torch.cuda.device(device):
            return LAUNCHERS[name]()(*args)

    LAUNCHERS[name], FAKES[name] = launcher, fake
    LIBRARY.impl(name, on_cpu, "CPU")
    LIBRARY.impl(name, on_cuda, "CUDA")
    torch.library.register_fake(f"fastops::{name}", fake, lib=LIBRARY)
    if flops is not None:
        FLOP_FORMULAS[name] = flops
        if FLOP_COUNTER in sys.modules:
            _registerFLOP_FORMULAS()
    return getattr(torch.ops.fastops, name).default


def differentiable_again() -> bool:
    """Whether the running backward will itself be differentiated (create_graph=True).

    Such a backward must not call a kernel: its result would carry no graph, and a term of the second derivative would
    be missing without a word. It differentiates the reference instead, see `reference_gradients`.
    """
    return torch.is_grad_enabled()


def reference_gradients(
    reference: Callable[..., Any],
    inputs: Sequence[torch.Tensor | None],
    needs_input_grad: Sequence[bool],
    grad_outputs: torch.Tensor | Sequence[torch.Tensor | None],
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of `reference(*inputs)` that can be differentiated again; None where an input needs none."""
    wanted = [i for i, needed in enumerate(needs_input_grad) if needed and inputs[i] is not None]
    with torch.enable_grad():
        # a view of each input, so that a tensor passed twice (attention of x to itself) gets two separate gradients
        inputs = [x.view_as(x) if x is not None and i in wanted else x for i, x in enumerate(inputs)]
        outputs = reference(*inputs)
        if isinstance(outputs, torch.Tensor):
            outputs, grad_outputs = (outputs,), (grad_outputs,)  # type: ignore[assignment]
        pairs = [(o, g) for o, g in zip(outputs, grad_outputs, strict=True) if g is not None and o.requires_grad]
        found = torch.autograd.grad(
            [o for o, _ in pairs],
            [inputs[i] for i in wanted],  # type: ignore[arg-type]
            [g for _, g in pairs],
            create_graph=True,
            allow_unused=True,
        )
    gradients: list[torch.Tensor | None] = [None] * len(inputs)
    for index, gradient in zip(wanted, found, strict=True):
        gradients[index] = gradient
    return tuple(gradients)


def _registerFLOP_FORMULAS() -> None:
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for name, formula in FLOP_FORMULAS.items():
        packet = getattr(torch.ops.fastops, name)
        if packet not in flop_registry:
            register_flop_formula(packet)(formula)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Waits for one module to be imported and then calls `action` with it."""

    def __init__(self, name: str, action: Callable[[Any], None]) -> None:
        self.name = name
        self.action = action

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_act(module: Any) -> None:
            execute(module)
            self.action(module)

        spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec


def after_import(name: str, action: Callable[[Any], None]) -> None:
    """Call `action(module)` once module `name` is imported: now where it is, without importing it where it is not."""
    if name in sys.modules:
        action(sys.modules[name])
    else:
        sys.meta_path.insert(0, _AfterImport(name, action))


# registering a formula imports the flop counter, and with it triton: left to whoever imports it
if FLOP_COUNTER not in sys.modules:
    after_import(FLOP_COUNTER, lambda _: _registerFLOP_FORMULAS())
