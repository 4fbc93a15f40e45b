"""nn.Sequential that runs Conv2d + ReLU (+ MaxPool2d) among its children as one call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastops._env import choose_impl
from fastops.nn._impl import WAS, set_impl, with_impl
from fastops.nn.conv import padded
from fastops.ops.conv2d_relu import IMPLS, conv2d_relu, conv2d_relu_max_pool2d


class Sequential(nn.Sequential):
    """`torch.nn.Sequential` whose forward takes nn.Conv2d, nn.ReLU and, where one follows, nn.MaxPool2d together.

        fastops.conv2d_relu(x, w, b), fastops.conv2d_relu_max_pool2d(x, w, b)

    The children are torch's own and stay what they are: indices, slices, iteration, state_dict and hooks mean what they
    always did. What can be taken together is decided in each forward from the children as they are then; one with a
    hook, a parametrization or a forward of its own is called, so that whatever it does is done. (Hooks on all modules
    at once, torch.nn.modules.module.register_module_forward_hook, see the Sequential and what is not taken together.)
    On the CPU, with `impl` "auto", and for inputs that are no tensors (torch.fx proxies) this is nn.Sequential.

    Args:
        *args: modules, or one OrderedDict of them, as for torch.nn.Sequential.
        impl: "auto", "triton", "hybrid" or "torch", see fastops.conv2d_relu.
    """

    impl: str = "auto"
    apart: tuple[str, ...] = ()  # names of convolutions that are to be called on their own

    def __init__(self, *args: Any, impl: str = "auto") -> None:
        super().__init__(*args)
        set_impl(self, impl, IMPLS)

    def forward(self, input: Any) -> Any:
        """All children in turn."""
        if type(self).__iter__ is not nn.Sequential.__iter__:  # a subclass's, which says what runs in which order
            return super().forward(input)
        impl = choose_impl(self.impl, IMPLS)
        if impl == "torch" or not isinstance(input, Tensor) or (impl == "auto" and not input.is_cuda):
            # nn.Sequential.forward; going there through super() costs a small layer on the CPU some percent
            for module in self._modules.values():
                input = module(input)  # type: ignore[misc]
            return input
        modules = list(self._modules.values())
        after = 0
        for start, length in self.fused():
            for module in modules[after:start]:
                input = module(input)  # type: ignore[misc]
            input = _together(input, modules[start : start + length], impl)
            after = start + length
        for module in modules[after:]:
            input = module(input)  # type: ignore[misc]
        return input

    def __getitem__(self, index: slice | int) -> Any:
        """A child, or a Sequential of a slice of the children with the same `impl`."""
        part = super().__getitem__(index)
        if isinstance(index, slice):
            part.__dict__.update(
                {name: self.__dict__[name] for name in ("impl", "apart", WAS) if name in self.__dict__}
            )
        return part

    def insert(self, index: int, module: nn.Module) -> Any:
        """As nn.Sequential's, which gives the modules after it other names."""
        with self._apart_kept():
            return super().insert(index, module)

    def __delitem__(self, index: slice | int) -> None:
        """As nn.Sequential's, which gives the modules after it other names."""
        with self._apart_kept():
            super().__delitem__(index)

    @contextmanager
    def _apart_kept(self) -> Iterator[None]:
        apart = [self._modules.get(name) for name in self.apart]
        yield
        if apart:
            self.__dict__["apart"] = tuple(
                name for name, module in self._modules.items() if any(module is one for one in apart)
            )

    def fused(self) -> Iterator[tuple[int, int]]:
        """(index, length) of each run of children that is taken together."""
        for group in groups(self):
            if group.length and group.name not in self.apart:
                yield group.start, group.length

    def extra_repr(self) -> str:
        """Which children are taken together, and `impl` unless it is "auto"."""
        runs = ", ".join(f"{start}-{start + length - 1}" for start, length in self.fused())
        return with_impl(self, f"together: {runs or 'none'}")


class FusedReLU(nn.ReLU):
    """An nn.ReLU whose work the convolution before it has done: gives back its input."""

    def forward(self, input: Tensor) -> Tensor:
        """The input."""
        return input

    def extra_repr(self) -> str:
        """As nn.ReLU, and what became of it."""
        return ", ".join(filter(None, (super().extra_repr(), "done by the convolution")))


class Group(NamedTuple):
    """A convolution among the children of a Sequential: how many are taken together with it, or why none is."""

    name: str
    start: int
    length: int  # 0: it is called on its own
    reason: str = ""  # why it is, or why the pool after it is


def groups(sequential: nn.Sequential) -> Iterator[Group]:
    """One Group for each nn.Conv2d among the children."""
    names, modules = list(sequential._modules), list(sequential._modules.values())
    for index, module in enumerate(modules):
        if not isinstance(module, nn.Conv2d):
            continue
        following = modules[index + 1 : index + 3]
        reason = why_not_plain(module, nn.Conv2d) or why_no_relu(following)
        if reason is not None:
            yield Group(names[index], index, 0, reason)
        elif len(following) > 1 and isinstance(following[1], nn.MaxPool2d):
            reason = why_no_pool(following[1])
            yield Group(names[index], index, 2 if reason else 3, reason or "")
        else:
            yield Group(names[index], index, 2)


def why_not_plain(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why a module may do something else than `kind`'s forward, or None."""
    if type(module) is not kind:
        if "Parametrized" in type(module).__name__:
            return "it is parametrized"
        return f"it is a {type(module).__module__}.{type(module).__qualname__}, not exactly {kind.__name__}"
    reason = why_not_its_class(module)
    if reason is not None:
        return reason
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"a hook wants to see {kind.__name__} alone"
    return None


def why_not_its_class(module: nn.Module) -> str | None:
    """Why a call of a module may be something else than its class says, hooks that only look on left aside; or None."""
    for name in ("forward", "_conv_forward"):
        if name in module.__dict__:
            return f"its {name} was replaced on the instance"
    if module._compiled_call_impl is not None:
        return "it is compiled on its own"
    for hook in module._forward_pre_hooks.values():
        if type(hook).__module__.startswith("torch.nn.utils."):
            return f"torch.nn.utils recomputes its weight ({type(hook).__name__})"
    return None


def why_no_relu(following: Sequence[nn.Module | None]) -> str | None:
    """Why a convolution cannot be taken together with what follows it, or None."""
    if not following:
        return "nothing follows it in its Sequential"
    if not isinstance(following[0], nn.ReLU):
        return f"{type(following[0]).__name__} follows it, not ReLU"
    reason = why_not_plain(following[0], nn.ReLU)
    return reason and f"the ReLU after it: {reason}"


def why_no_pool(pool: nn.MaxPool2d) -> str | None:
    """Why a max-pool is called on its own, or None."""
    reason = why_not_plain(pool, nn.MaxPool2d)
    if reason is None and pool.return_indices:
        reason = "it returns indices"
    if reason is None and pool.ceil_mode:
        reason = "ceil_mode"
    if reason is None and pool.dilation not in (1, (1, 1)):
        reason = f"dilation {pool.dilation}"
    return reason and f"the MaxPool2d after it is apart: {reason}"


def _together(input: Tensor, modules: Sequence[Any], impl: str) -> Tensor:
    convolution = modules[0]
    input, padding = padded(convolution, input)
    window = (convolution.stride, padding, convolution.dilation, convolution.groups)
    if len(modules) == 2:
        return conv2d_relu(input, convolution.weight, convolution.bias, *window, impl=impl)
    pool = modules[2]
    return conv2d_relu_max_pool2d(
        input,
        convolution.weight,
        convolution.bias,
        *window,
        pool_size=pool.kernel_size,
        pool_stride=pool.stride,
        pool_padding=pool.padding,
        impl=impl,
    )
