"""Looks at a model and decides, module by module, what becomes what and what stays, and why. Changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import nn

import fastops.nn
from fastops import _env
from fastops._accelerate import huggingface, swap, trace
from fastops._accelerate.report import Report, Row
from fastops._accelerate.table import OPS, ROWS, row_of
from fastops.nn.sequential import Sequential, groups, why_not_its_class, why_not_plain

Filter = Callable[[nn.Module, str], bool]


def plan(
    model: nn.Module, only: str | Iterable[str] | None = None, filter_fn: Filter | None = None, tracing: bool = False
) -> Report:
    """The report of a dry run; its rows carry what `accelerate` has to call."""
    check_module(model)
    ops = chosen_ops(only)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be a function of a module and its path, got {type(filter_fn).__name__}")
    wanted = filter_fn or (lambda module, path: True)
    rows: list[Row] = []
    if "conv2d_relu" in ops:
        rows += _convolutions(model, wanted, tracing)
    rows += _classes(model, ops, wanted)
    if "attention" in ops:
        rows += _pretrained(model, wanted)
    order = {path: place for place, (path, _) in enumerate(model.named_modules())}
    # a module that is in two places has its place by the first; a convolution may be reported at the second
    rows.sort(key=lambda row: order.get(row.path, order.get(row.path.rpartition(".")[0], 0)))
    return Report(type(model).__name__, tuple(rows), _note(model) if any(row.becomes for row in rows) else "")


def check_module(model: object) -> None:
    """TypeError where this is no module: a class of one, or a list."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def chosen_ops(only: str | Iterable[str] | None) -> set[str]:
    """`only` as a set of known words."""
    if only is None:
        return set(OPS)
    if not isinstance(only, Iterable):
        raise TypeError(f"only must be a word or several, got {type(only).__name__}")
    ops = {only} if isinstance(only, str) else set(only)
    unknown = ops - set(OPS)
    if unknown:
        raise ValueError(f"only must be among {', '.join(map(repr, OPS))}, got {sorted(unknown)}")
    return ops


def _classes(model: nn.Module, ops: set[str], wanted: Filter) -> Iterator[Row]:
    stays: set[nn.Module] = set()
    encoders = []
    for path, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoder):
            encoders.append((path, module))
            continue
        foreign = _foreign(module)
        if foreign is not None:
            if foreign[1] in ops and wanted(module, path):
                yield Row(path, foreign[0], foreign[1], None, foreign[2])
            continue
        row = row_of(module)
        if row is None or row.op not in ops or not wanted(module, path):
            continue
        name, ours = row.torch_class.__name__, f"fastops.nn.{row.fastops_class.__name__}"
        if isinstance(module, row.fastops_class):
            yield Row(path, name, row.op, ours, "", done=True)
            continue
        reason = why_not(module, row.torch_class)
        if reason is not None:
            stays.add(module)
            yield Row(path, name, row.op, None, reason)
        else:
            note = "with need_weights=False" if row.torch_class is nn.MultiheadAttention else ""
            yield Row(path, name, row.op, ours, note, apply=partial(swap.swap, module, row.fastops_class))
    if "attention" in ops:
        for path, module in encoders:
            if wanted(module, path):
                yield _encoder(path, module, any(layer in stays or not _known(layer) for layer in module.layers))


def _encoder(path: str, module: nn.TransformerEncoder, some_stay: bool) -> Row:
    name, ours = "TransformerEncoder", "fastops.nn.TransformerEncoder"
    if isinstance(module, fastops.nn.TransformerEncoder):
        return Row(path, name, "attention", ours, "", done=True)
    reason = why_not(module, nn.TransformerEncoder) or ("its layers stay" if some_stay else None)
    if reason is None and getattr(module, "use_nested_tensor", False):
        # fastops' gives real values there, and would be faster; but a sum over positions must not change
        reason = "in evaluation it gives zeros at padding (enable_nested_tensor=False: it does not)"
    if reason is not None:
        return Row(path, name, "attention", None, reason)
    return Row(path, name, "attention", ours, "", apply=partial(swap.swap, module, fastops.nn.TransformerEncoder))


def _known(layer: nn.Module) -> bool:
    return isinstance(layer, nn.TransformerEncoderLayer)


def why_not(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why a module cannot be swapped for one that does what `kind` does, or None. Hooks are no reason: they stay."""
    if swap.plain_class(module) is not kind:
        return why_not_plain(module, kind)
    return why_not_its_class(module) or _why_not_names(module, ("impl",)) or _why_not_weights(module)


def _why_not_names(module: nn.Module, names: Iterable[str]) -> str | None:
    """Ours has these attributes; a module that has one by that name already would lose it."""
    taken = next((name for name in names if hasattr(module, name)), None)
    return taken and f"it has an attribute {taken!r} of its own"


def _why_not_sequential(module: nn.Sequential) -> str | None:
    """Why a Sequential with something to take together stays, or None."""
    if isinstance(module, Sequential):
        return None
    reason = _why_not_names(module, ("impl", "apart", "fused")) or swap.why_no_class_of(swap.plain_class(module))
    return reason and f"{type(module).__name__}, its Sequential, stays: {reason}"


def _why_not_weights(module: nn.Module) -> str | None:
    names = getattr(module, "_flat_weights_names", ("weight", "weight_ih", "weight_hh", "in_proj_weight"))
    for name in names:
        if hasattr(module, name) and name not in module._parameters:
            return f"its {name} is no parameter of its own"
    for name, parameter in module._parameters.items():
        if parameter is None or type(parameter) in (nn.Parameter, torch.Tensor):
            continue
        if type(parameter).__name__ == "DTensor" and swap.sharded(module):
            continue  # whole again by the time forward runs
        return f"its {name} is a {type(parameter).__name__}"
    return None


def _foreign(module: nn.Module) -> tuple[str, str, str] | None:
    """(class name, op, reason) of a module that stands for one of ours but is another's: scripted or quantised."""
    if isinstance(module, torch.jit.ScriptModule):
        name, reason = str(module.original_name), "it is scripted: its forward is compiled code"
    elif type(module).__module__.startswith(("torch.ao.nn.", "torch.nn.quantized")):
        name, reason = type(module).__name__, f"it is quantised ({type(module).__module__})"
    else:
        return None
    known = {row.torch_class.__name__: row.op for row in ROWS} | dict.fromkeys(("Conv2d", "ConvReLU2d"), "conv2d_relu")
    return (name, known[name], reason) if name in known else None


def _convolutions(model: nn.Module, wanted: Filter, tracing: bool) -> Iterator[Row]:
    traced = trace.prove(model) if tracing else None
    in_sequential: dict[nn.Module, str] = {}  # convolutions that stay, and why
    settled: set[nn.Module] = set()
    for path, module in model.named_modules():
        if not isinstance(module, nn.Sequential):
            continue
        found = list(groups(module))
        if not found:
            continue
        stays = _why_not_sequential(module)
        if type(module).forward not in (nn.Sequential.forward, Sequential.forward):
            stays = f"{type(module).__name__}, its Sequential, has a forward of its own"
        elif type(module).__iter__ is not nn.Sequential.__iter__:
            stays = f"{type(module).__name__}, its Sequential, has an __iter__ of its own"
        done = isinstance(module, Sequential)
        chosen = [g for g in found if wanted(module._modules[g.name], _join(path, g.name))]  # type: ignore[arg-type]
        apart = tuple(g.name for g in found if g.length and g not in chosen)
        change = partial(_swap_sequential, module, apart)
        for group in chosen:
            convolution = module._modules[group.name]
            assert convolution is not None
            if group.length == 0 or stays:
                in_sequential.setdefault(convolution, group.reason or stays or "")
                continue
            settled.add(convolution)
            becomes = "one call: conv2d_relu" + ("_max_pool2d" if group.length == 3 else "")
            names = " + ".join(type(m).__name__ for m in list(module)[group.start : group.start + group.length])
            where = _join(path, group.name)
            if done and group.name not in module.apart:  # type: ignore[operator]
                yield Row(where, names, "conv2d_relu", becomes, group.reason, done=True)
            else:
                yield Row(where, names, "conv2d_relu", becomes, group.reason, apply=change)
    for path, module in model.named_modules():
        if module in settled or not isinstance(module, nn.Conv2d) or _foreign(module) or not wanted(module, path):
            continue
        if isinstance(module, (fastops.nn.Conv2dReLU, fastops.nn.Conv2dReLUMaxPool2d)):
            yield Row(path, "Conv2d", "conv2d_relu", f"fastops.nn.{type(module).__name__}", "", done=True)
            continue
        reason = in_sequential.get(module, "it is not in an nn.Sequential (trace=True looks into forward)")
        proof = traced.get(path) if traced is not None else None
        if isinstance(proof, trace.Proof):
            names, note = f"Conv2d, then {proof.relu_name}", proof.note
            yield Row(path, names, "conv2d_relu", "fastops.nn.Conv2dReLU", note, apply=partial(proof.apply, module))
        else:
            yield Row(path, "Conv2d", "conv2d_relu", None, proof or reason)


def _swap_sequential(module: nn.Sequential, apart: tuple[str, ...]) -> None:
    if isinstance(module, Sequential):
        swap.note(module, apart=apart)
    else:
        new = swap.sequential_class(swap.plain_class(module))
        swap.swap(module, new, **({"apart": apart} if apart else {}))


def _pretrained(model: nn.Module, wanted: Filter) -> Iterator[Row]:
    inside: set[nn.Module] = set()
    for path, module in model.named_modules():
        if module in inside or not huggingface.is_pretrained(module):
            continue
        inside.update(module.modules())
        if not wanted(module, path):
            continue
        name = f"attention of {type(module).__name__}"
        becomes = 'attn_implementation="fastops"'
        if huggingface.switched(module):
            yield Row(path, name, "attention", becomes, "", done=True)
            continue
        reason = huggingface.why_not(module)
        if reason is not None:
            yield Row(path, name, "attention", None, reason)
        else:
            yield Row(path, name, "attention", becomes, "", apply=partial(huggingface.switch, module))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _note(model: nn.Module) -> str:
    """What to know about where the model is now."""
    why = why_no_kernel(model)
    if why is None:
        return ""
    return f"Here and now impl='auto' runs stock PyTorch in all of them: {why}."


def why_no_kernel(model: nn.Module) -> str | None:
    """Why no kernel of fastops can run where a model's parameters are, or None."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type != "meta"}
    if not devices:
        return None
    reasons = [_env.why_no_triton(device) for device in devices]
    return None if None in reasons else reasons[0]
