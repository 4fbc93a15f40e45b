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
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from fastops import _triton_cache
from fastops._env import KernelUnavailable, interpreting

LIBRARY = torch.library.Library("fastops", "DEF")
FLOP_COUNTER = "torch.utils.flop_counter"
FLOP_FORMULAS: dict[str, Callable[..., int]] = {}
FAKES: dict[str, Callable[..., Any]] = {}  # what allocates an op's results, by op
# op name -> function that imports and returns its launcher; `fastops inspect --shape` runs launchers on fake tensors
LAUNCHERS: dict[str, Callable[[], Callable[..., Any]]] = {}
# overload of an op -> the one that goes on with stock PyTorch where its kernel cannot be launched
OR_STOCK: dict[Any, Any] = {}
# op -> why its kernels could not be compiled or launched; "auto" takes stock PyTorch for it from then on
BROKEN: dict[str, str] = {}
# Triton's interpreter replaces parts of triton.language while it runs a kernel, for all threads
_ONE_INTERPRETER = threading.RLock()


class LaunchFailed(KernelUnavailable):
    """Triton could not compile or launch a kernel; the message names the registered op and the reason."""


def define(
    name: str,
    schema: str,
    launch: str,
    fake: Callable[..., Any],
    flops: Callable[..., int] | None = None,
    stock: tuple[str, Callable[..., Any]] | None = None,
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
        stock: the name under which `or_stock` knows the op, and the op in plain torch: takes its arguments, returns its
            results in any layout, None for what is only read by a kernel that then does not run. See `for_graph`.
    """
    module, _, function = launch.partition(":")
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    loaded: list[Callable[..., Any]] = []

    def launcher() -> Callable[..., Any]:
        if not loaded:
            loaded.append(getattr(importlib.import_module(module), function))
        return loaded[0]

    def launch_here(*args: Any) -> Any:
        try:
            if interpreting():
                with _ONE_INTERPRETER:
                    return LAUNCHERS[name]()(*args)
            return LAUNCHERS[name]()(*args)
        except Exception as error:
            if not _is_launch_failure(error):
                raise
            failure = error
        if _triton_cache.damaged(failure):
            try:
                with _triton_cache.compiling_anew(failure):
                    return LAUNCHERS[name]()(*args)
            except Exception as error:
                if not _is_launch_failure(error):
                    raise
                failure = error
        reason = f"{type(failure).__name__}: {_short(str(failure))}"
        try:
            raise LaunchFailed(f"fastops::{name}: {reason} (FASTOPS_IMPL=torch avoids it)") from failure
        finally:
            del failure  # whose traceback holds this frame, and with it the tensors

    def on_cuda(*args: Any) -> Any:
        device = next(argument.device for argument in args if isinstance(argument, torch.Tensor))
        if device.index == torch.cuda.current_device():
            return launch_here(*args)
        with torch.cuda.device(device):
            return launch_here(*args)

    LAUNCHERS[name], FAKES[name] = launcher, fake
    overloads: dict[str, Sequence[Callable[..., Any]]] = {name: (launch_here, on_cuda)}
    if stock is not None:
        LIBRARY.define(f"{name}.or_stock{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        overloads[f"{name}.or_stock"] = [_going_on(*stock, each, fake) for each in overloads[name]]
    for overload, (on_cpu, on_gpu) in overloads.items():
        LIBRARY.impl(overload, on_cpu, "CPU")
        LIBRARY.impl(overload, on_gpu, "CUDA")
        torch.library.register_fake(f"fastops::{overload}", fake, lib=LIBRARY)
    if flops is not None:
        FLOP_FORMULAS[name] = flops
        if FLOP_COUNTER in sys.modules:
            _register_flop_formulas()
    packet = getattr(torch.ops.fastops, name)
    if stock is not None:
        OR_STOCK[packet.default] = packet.or_stock
    return packet.default


def _going_on(
    op: str, stock: Callable[..., Any], kernel: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    def launch_or_stock(*args: Any) -> Any:
        if op not in BROKEN:
            try:
                return kernel(*args)
            except LaunchFailed as error:
                _remember(op, str(error))
        results, found = fake(*args), stock(*args)
        for place, value in zip(_each(results), _each(found), strict=True):
            if value is not None:
                assert place.shape == value.shape, (op, place.shape, value.shape)
                place.copy_(value)
            elif place.is_floating_point():
                place.fill_(torch.nan)
        return results

    return launch_or_stock


def _each(results: Any) -> Sequence[Any]:
    return (results,) if isinstance(results, torch.Tensor) else results


def for_graph(op: Any, auto: bool) -> Any:
    """The overload of a registered op to call: under "auto" in torch.compile, the one that goes on with stock PyTorch.

    Eager code goes on by `or_stock`, whose other choice is the fastest way through PyTorch. In a compiled graph nothing
    is left to choose when a kernel fails, so it goes on with the op in plain torch, for this call: the next one finds
    the op in BROKEN and is compiled again. An overload, because an argument more costs each eager call 0.3 us.
    """
    return OR_STOCK[op] if auto and torch.compiler.is_compiling() else op


def _is_launch_failure(error: Exception) -> bool:
    """Whether Triton raised this, rather than a launcher (say for the values of an earlier call) or PyTorch.

    Memory that ran out is no property of the kernel, and a capture that broke off would break off stock PyTorch too.
    """
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
        return False
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return False
    place = error.__traceback__
    modules = [type(error).__module__]
    while place is not None:
        modules.append(place.tb_frame.f_globals.get("__name__", ""))
        place = place.tb_next
    return any(module.partition(".")[0] == "triton" for module in modules)


def _short(text: str) -> str:
    """A compiler's message on one line, with its start and its end."""
    line = " ".join(text.split())
    return line if len(line) < 400 else f"{line[:100]} ... {line[-280:]}"


def or_stock(op: str, auto: bool, kernel: Callable[[], Any], stock: Callable[[], Any]) -> Any:
    """`kernel()`, or under "auto" `stock()` where Triton cannot compile or launch it: one warning, and then for good.

    Without "auto" the failure is raised, a KernelUnavailable. Inside torch.compile the kernels run later than this, and
    go on by themselves, see `for_graph`; a graph compiled before a failure is compiled again, with stock PyTorch.
    """
    if not auto or torch.compiler.is_compiling():
        return kernel()
    if op in BROKEN:
        return stock()
    try:
        return kernel()
    except LaunchFailed as error:
        _remember(op, str(error))
        return stock()


def _remember(op: str, reason: str) -> None:
    if BROKEN.setdefault(op, reason) is reason:
        message = f"{op}: stock PyTorch runs from now on, a kernel failed: {reason}"
        warnings.warn(message, RuntimeWarning, stacklevel=_level_of_user())


def _level_of_user() -> int:
    """The `stacklevel` at which a warning of the calling function names the line that called fastops or autograd."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in {"fastops", "torch"}:
        frame, level = frame.f_back, level + 1
    return level


def why_not_dense(**tensors: torch.Tensor | None) -> str | None:
    """Which of these is sparse, blocked or quantised, so that a kernel cannot read it, or None."""
    for name, tensor in tensors.items():
        if tensor is not None and (tensor.layout != torch.strided or tensor.is_quantized):
            return f"{name} is not a dense tensor ({tensor.layout})"
    return None


def why_no_transform(vmap: bool = True) -> str | None:
    """Why an op without forward-mode derivatives (and, unless `vmap` is False, without batching) cannot run here."""
    if has_tangents():
        return "forward-mode derivatives are not implemented"
    return "torch.vmap is not implemented" if vmap and _under_vmap() else None


def _under_vmap() -> bool:
    """Whether torch.vmap is active at any level; inside torch.compile the ops themselves refuse it."""
    if torch.compiler.is_compiling():
        return False
    stack = torch._C._functorch.get_interpreter_stack()
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in stack or ())


def differentiable_again(grad_outputs: Sequence[torch.Tensor | None] = ()) -> bool:
    """Whether the running backward will itself be differentiated (create_graph=True), or runs for a batch of gradients.

    Such a backward must not call a kernel: its result would carry no graph, and a term of the second derivative would
    be missing without a word. It differentiates the reference instead, see `reference_gradients`.

    Args:
        grad_outputs: of an op that cannot run once for each gradient of a batch (`is_grads_batched=True`), which
            torch.autograd.grad hands over in a batch of its own kind.
    """
    return torch.is_grad_enabled() or _under_vmap() or _batched(grad_outputs)


def wants_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether what is computed from these is recorded for a backward pass."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def has_tangents() -> bool:
    """Whether derivatives are carried forward (torch.func.jvp): a look at the values does not see them."""
    return forward_ad._current_level >= 0  # type: ignore[attr-defined]


def transformed() -> bool:
    """Whether torch.func or forward-mode derivatives are at work: some ops of torch take none of their tensors."""
    return has_tangents() or bool(torch._C._functorch.get_interpreter_stack())


def _batched(tensors: Sequence[torch.Tensor | None]) -> bool:
    if torch.compiler.is_compiling():
        return False
    return any(x is not None and torch._C._functorch.is_legacy_batchedtensor(x) for x in tensors)


def reference_gradients(
    reference: Callable[..., Any],
    inputs: Sequence[torch.Tensor | None],
    needs_input_grad: Sequence[bool],
    grad_outputs: torch.Tensor | Sequence[torch.Tensor | None],
    again: bool = True,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of `reference(*inputs)`, with `again` differentiable; None where an input needs none."""
    wanted = [i for i, needed in enumerate(needs_input_grad) if needed and inputs[i] is not None]
    with torch.enable_grad():
        # a view of each input, so that a tensor passed twice (attention of x to itself) gets two separate gradients
        inputs = [x.view_as(x) if x is not None and i in wanted else x for i, x in enumerate(inputs)]
        if not all(inputs[i].requires_grad for i in wanted):  # type: ignore[union-attr]
            taken = _functional_gradients(reference, inputs, wanted, grad_outputs)
            return tuple(taken.get(i) for i in range(len(inputs)))
        outputs = reference(*inputs)
        if isinstance(outputs, torch.Tensor):
            outputs, grad_outputs = (outputs,), (grad_outputs,)  # type: ignore[assignment]
        pairs = [(o, g) for o, g in zip(outputs, grad_outputs, strict=True) if g is not None and o.requires_grad]
        found = torch.autograd.grad(
            [o for o, _ in pairs],
            [inputs[i] for i in wanted],  # type: ignore[arg-type]
            [g for _, g in pairs],
            create_graph=again,
            allow_unused=True,
        )
    gradients: list[torch.Tensor | None] = [None] * len(inputs)
    for index, gradient in zip(wanted, found, strict=True):
        gradients[index] = gradient
    return tuple(gradients)


def gradients_alone(
    reference: Callable[..., Any],
    inputs: Sequence[torch.Tensor | None],
    needed: Sequence[bool],
    grad_outputs: torch.Tensor | Sequence[torch.Tensor | None],
) -> tuple[torch.Tensor | None, ...]:
    """`reference_gradients`, once, of inputs that no graph leads to, as a registered op receives them."""
    leaves = [None if x is None else x.detach().requires_grad_(need) for x, need in zip(inputs, needed, strict=True)]
    return reference_gradients(reference, leaves, needed, grad_outputs, again=False)


def _functional_gradients(
    reference: Callable[..., Any],
    inputs: Sequence[torch.Tensor | None],
    wanted: Sequence[int],
    grad_outputs: torch.Tensor | Sequence[torch.Tensor | None],
) -> dict[int, torch.Tensor]:
    """The same where torch.func.vjp runs the backward: it has taken its inputs out of autograd by then."""
    given = (grad_outputs,) if isinstance(grad_outputs, torch.Tensor) else tuple(grad_outputs)

    def outputs_with_gradients(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        all_inputs = list(inputs)
        for index, leaf in zip(wanted, leaves, strict=True):
            all_inputs[index] = leaf
        outputs = reference(*all_inputs)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        return tuple(o for o, g in zip(outputs, given, strict=True) if g is not None)

    vjp = torch.func.vjp(outputs_with_gradients, *(inputs[i] for i in wanted))[1]
    return dict(zip(wanted, vjp(tuple(g for g in given if g is not None)), strict=True))


def _register_flop_formulas() -> None:
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
    after_import(FLOP_COUNTER, lambda _: _register_flop_formulas())
