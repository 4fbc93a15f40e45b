"""accelerate, restore, explain, accelerated: a model made faster in place, and made what it was.

Modules change class and stay the same objects: parameters (an optimizer may hold them), hooks, state_dict keys,
isinstance, deepcopy, pickle and torch.compile keep working.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

from fastops import _env
from fastops._accelerate import huggingface, swap
from fastops._accelerate.plan import check_module, chosen_ops, plan, why_no_kernel
from fastops._accelerate.report import Report
from fastops.nn._impl import WAS

__all__ = ["Report", "accelerate", "accelerated", "explain", "restore"]

Model = TypeVar("Model", bound=nn.Module)
Filter = Callable[[nn.Module, str], bool]
logger = logging.getLogger("fastops")


def accelerate(
    model: Model,
    *,
    only: str | Iterable[str] | None = None,
    filter_fn: Filter | None = None,
    strict: bool = False,
    trace: bool = False,
) -> Model:
    """Let fastops run what it can of a model. In place; the same object comes back; calling it again changes nothing.

    An nn.Sequential takes its Conv2d + ReLU (+ MaxPool2d) together; nn.LSTM, GRU, RNN and their cells,
    MultiheadAttention, TransformerEncoderLayer, TransformerDecoderLayer and (with enable_nested_tensor=False)
    TransformerEncoder become those of fastops.nn; models of transformers get attn_implementation="fastops". Everything
    else, and everything that does more than torch's own class (subclasses, parametrizations, weight norm, quantised or
    scripted modules), stays, and `explain` says why. Where an error ends it, the model is what it was.

    One line is logged to the logger "fastops": at level INFO, or WARNING where nothing was found to accelerate.

    Args:
        model: any nn.Module, also inside DistributedDataParallel or torch.compile, or sharded by FSDP2.
        only: of "conv2d_relu", "rnn", "attention" those wanted; all by default.
        filter_fn: `filter_fn(module, path)` says whether a module may change; of a convolution it is asked with the
            nn.Conv2d.
        strict: raise, before anything changes, where nothing is accelerated, where a word of `only` or a module that
            `filter_fn` chose is not, or where no kernel can run on the model's device.
        trace: also look for ReLUs that the model's own forward calls (`F.relu(self.conv(x))`), through torch.fx. The
            proof holds for forward as it is now, and for no other method that calls the convolution.

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: `only` has an unknown word, or what `strict` asks for is not there.
        KernelUnavailable: `strict`, and no kernel can run on the model's device.
    """
    _accelerate(model, only, filter_fn, strict, trace)
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate`, exactly: every module is what it was. Also of a copy, or of a model that was pickled."""
    check_module(model)
    for module in model.modules():
        swap.unswap(module)
        huggingface.switch_back(module)
    return model


def explain(
    model: nn.Module,
    *,
    only: str | Iterable[str] | None = None,
    filter_fn: Filter | None = None,
    trace: bool = False,
) -> Report:
    """What `accelerate` with these arguments would do, module by module, and why the rest stays; changes nothing.

    The Report prints as a table; `.rows`, `.accelerated` and `.kept` are the same as data.
    """
    return plan(model, only, filter_fn, trace)


@contextmanager
def accelerated(
    model: Model,
    *,
    only: str | Iterable[str] | None = None,
    filter_fn: Filter | None = None,
    strict: bool = False,
    trace: bool = False,
) -> Iterator[Model]:
    """`accelerate` inside a with statement: on leaving it, what it changed (and nothing else) is undone."""
    before = _state(model)
    _accelerate(model, only, filter_fn, strict, trace)
    ours = [module for module in model.modules() if _changed(module) and module not in before]
    try:
        yield model
    finally:
        _undo(ours, before)


def _state(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """The modules of a model that are changed already, and what of each is called on its own."""
    check_module(model)
    return {module: getattr(module, "apart", ()) for module in model.modules() if _changed(module)}


def _undo(changed: Iterable[nn.Module], before: dict[nn.Module, tuple[str, ...]]) -> None:
    """Make modules what they were; those that were changed before stay changed."""
    for module in changed:
        swap.unswap(module)
        huggingface.switch_back(module)
    for module, apart in before.items():
        if getattr(module, "apart", ()) != apart:  # a Sequential of which more was taken together in between
            module.apart = apart  # type: ignore[assignment]


def _changed(module: nn.Module) -> bool:
    return WAS in module.__dict__ or huggingface.switched(module)


def _accelerate(
    model: nn.Module, only: str | Iterable[str] | None, filter_fn: Filter | None, strict: bool, trace: bool
) -> None:
    only = None if only is None else chosen_ops(only)
    report = plan(model, only, filter_fn, trace)
    if strict:
        _be_strict(model, report, only, filter_fn is not None)
    before = _state(model)
    try:
        for row in report.rows:
            if row.apply is not None:
                row.apply()
    except BaseException:
        _undo([module for module in model.modules() if _changed(module) and module not in before], before)
        raise
    logger.log(logging.INFO if report.accelerated else logging.WARNING, "accelerate %s", report.summary())


def _be_strict(model: nn.Module, report: Report, only: set[str] | None, filtered: bool) -> None:
    if not report.accelerated:
        raise ValueError(f"strict: nothing to accelerate. {report.summary()}")
    missing = (only or set()) - {row.op for row in report.accelerated}
    if missing:
        raise ValueError(f"strict: no {' and no '.join(sorted(missing))} to accelerate. {report.summary()}")
    if filtered and report.kept:
        kept = "; ".join(f"{row.path} ({row.kind}): {row.reason}" for row in report.kept)
        raise ValueError(f"strict: filter_fn chose modules that stay: {kept}")
    why = why_no_kernel(model)
    if why is not None:
        raise _env.KernelUnavailable(f"strict: {why}")
