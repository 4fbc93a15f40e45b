"""What every property shares: tensors as small, shrinkable descriptions, and the comparison with stock PyTorch."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import hypothesis
import torch
from hypothesis import strategies as st
from torch import Tensor

from fastops import KernelUnavailable, _library
from tests.rule import assert_within_rule

PROPERTIES: dict[str, tuple[Any, Callable[[Any], None]]] = {}  # name -> strategy of cases, check
LAYOUTS = ("plain", "gaps", "permuted", "expanded", "offset", "channels_last")
KINDS = (TypeError, IndexError, AssertionError, ValueError, RuntimeError)
NEIGHBOURS = 32
# MKL draws what is dropped in the order of a tensor's indices; without it the order is that of memory, an accident
SEEDED_DROPOUT = torch.backends.mkl.is_available()


def fuzzed(cases: Any) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Enter a check under its name."""

    def enter(check: Callable[[Any], None]) -> Callable[[Any], None]:
        PROPERTIES[check.__name__] = (cases, check)
        return check

    return enter


@dataclass(frozen=True)
class Spec:
    """A tensor, as hypothesis prints it."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "plain"
    values: str = "normal"  # or "small" (integers) and "grid" (multiples of 1/64), whose sums of products are exact
    grad: bool = False
    seed: int = 0

    def make(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)

        def fill(*shape: int) -> Tensor:
            if self.values == "small" or not self.dtype.is_floating_point:
                numbers = torch.randint(-2, 3, shape, generator=generator).to(self.dtype)
            elif self.values == "grid":
                numbers = (torch.randint(-128, 129, shape, generator=generator) / 64).to(self.dtype)
            else:
                numbers = torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)
            return numbers

        shape, rank = self.shape, len(self.shape)
        if self.layout == "gaps" and rank:
            made = fill(*shape[:-1], 2 * shape[-1])[..., ::2]
        elif self.layout == "permuted" and rank > 1:
            made = fill(*reversed(shape)).permute(*reversed(range(rank)))
        elif self.layout == "expanded" and rank and shape[0]:
            made = fill(1, *shape[1:]).expand(shape)
        elif self.layout == "offset":
            made = fill(math.prod(shape) + 3)[3:].view(shape)
        elif self.layout == "channels_last" and rank == 4:
            made = fill(*shape).contiguous(memory_format=torch.channels_last)
        else:
            made = fill(*shape)
        made = made.detach()
        return made.requires_grad_() if self.grad and made.is_floating_point() else made


def specs(shape: Any, dtype: Any, *, values: Any = "normal", grad: Any = None) -> Any:
    """Strategy of a Spec whose parts are values or strategies."""

    def strategy(x: Any) -> Any:
        return x if isinstance(x, st.SearchStrategy) else st.just(x)

    return st.builds(
        Spec,
        strategy(shape),
        strategy(dtype),
        st.sampled_from(LAYOUTS),
        strategy(values),
        st.booleans() if grad is None else strategy(grad),
        SEEDS,
    )


SEEDS = st.integers(0, 99)
FLOATS = st.sampled_from([torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64])
ROUNDED_FLOATS = st.sampled_from([torch.float32, torch.float32, torch.float16, torch.bfloat16])  # the truth is float64
KERNEL_FLOATS = st.sampled_from([torch.float32, torch.float32, torch.float16])  # bf16 is wrong in the interpreter


@st.composite
def rarely(draw: Any, usual: Any, odd: Any) -> Any:
    """Mostly a draw from `usual`; one in eight from `odd`."""
    return draw(odd) if draw(st.integers(0, 7)) == 7 else draw(usual)


@dataclass
class Outcome:
    """What a call gave: tensors (results, then gradients), or an error."""

    tensors: list[Tensor | None]
    error: Exception | None = None
    upstream: list[Tensor] = field(default_factory=list)  # gradients given to the results


def flatten(result: Any) -> list[Tensor | None]:
    if result is None or isinstance(result, Tensor):
        return [result]
    if isinstance(result, torch.nn.utils.rnn.PackedSequence):
        return [result.data, result.batch_sizes]
    return [x for part in result for x in flatten(part)]


def outcome(
    function: Callable[..., Any], arguments: Sequence[Any], extra: Sequence[Tensor] = (), exact: bool = False
) -> Outcome:
    """Results and gradients of a call; `extra` are parameters that it also depends on; `exact` keeps to integers."""
    leaves = [x for x in (*arguments, *extra) if isinstance(x, Tensor) and x.requires_grad]
    seeds: list[Tensor] = []
    try:
        results = flatten(function(*arguments))
        ends = [x for x in results if x is not None and x.requires_grad]
        grads: list[Tensor | None]
        if ends and leaves:
            generator = torch.Generator().manual_seed(1)

            def drawn(x: Tensor) -> Tensor:
                if exact:
                    return torch.randint(-2, 3, x.shape, generator=generator).to(x.dtype)
                return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)

            # for every result, as not all ways to compute the same let the same results require gradients
            upstream = [drawn(x) for x in results if x is not None and x.is_floating_point()]
            seeds = [u for u, x in zip(upstream, filter(_real, results), strict=True) if x.requires_grad]
            grads = list(torch.autograd.grad(ends, leaves, seeds, allow_unused=True))
        else:
            grads = [None] * len(leaves)
    except Exception as error:
        return Outcome([], error)
    return Outcome([*results, *grads], upstream=seeds)


def kind(error: Exception) -> type:
    return next((k for k in KINDS if isinstance(error, k)), type(error))


def made(arguments: Sequence[Any]) -> list[Any]:
    return [x.make() if isinstance(x, Spec) else x for x in arguments]


def seeded(function: Callable[..., Any], seed: int) -> Callable[..., Any]:
    """The function, whose draws from torch's generator are the same at every call."""

    def call(*arguments: Any) -> Any:
        torch.manual_seed(seed)
        return function(*arguments)

    return call


def refuses(ours: Callable[..., Any], arguments: Sequence[Any], *names: str) -> str:
    """Hold `ours` to an error about an argument that torch has not, by one of its names; returns "error"."""
    with launches() as launched:
        error = outcome(ours, made(arguments)).error
    assert error is not None, f"{' or '.join(names)}: nothing was raised"
    assert isinstance(error, TypeError | ValueError | RuntimeError), f"{names}: {error!r}"
    assert any(name in str(error) for name in names), f"not a word of {' or '.join(names)}: {error!r}"
    assert not launched, f"{launched} ran before the error was seen: {error!r}"
    return "error"


def agree(
    ours: Callable[..., Any],
    stock: Callable[..., Any],
    arguments: Sequence[Any],
    *,
    explicit: bool = False,
    extra: Sequence[Tensor] = (),
    stock_extra: Sequence[Tensor] = (),
    truth_of: Callable[..., Any] | None = None,
    truth_extra: Sequence[Tensor] = (),
    terms: Callable[[Sequence[Any], Sequence[Tensor]], float] | None = None,
    roundings: int = 0,
) -> str:
    """Hold `ours` to `stock`; returns what became of it: "same", "error" or "refused".

    Args:
        ours: takes the tensors made of `arguments`.
        stock: likewise.
        arguments: Specs become tensors, anything else is handed on.
        explicit: an engine was named: it runs a kernel or raises KernelUnavailable, and nothing in between.
        extra: parameters of `ours`, `stock_extra` those of `stock`, `truth_extra` those of `truth_of`.
        truth_of: `stock` in float64, where that is not `stock` itself on float64 arguments.
        terms: from the arguments and the upstream gradients, the size of what the gradients are differences of.
        roundings: that the way to the results takes and stock's does not, each of the size of a result.
    """
    given = made(arguments)
    exact = any(isinstance(x, Spec) and x.values in ("small", "grid") for x in arguments)
    before = [x.detach().clone() if isinstance(x, Tensor) else None for x in given]
    with launches() as launched:
        mine = outcome(ours, given, extra, exact)
    for x, old in zip(given, before, strict=True):
        if old is not None:
            assert torch.equal(x.detach().nan_to_num(7.0), old.nan_to_num(7.0)), "an argument was written to"
    theirs = outcome(stock, made(arguments), stock_extra, exact)
    if theirs.error is not None:
        assert mine.error is not None, f"torch raises {theirs.error!r}, ours does not"
        if not (explicit and isinstance(mine.error, KernelUnavailable)):
            same = kind(mine.error) is kind(theirs.error)
            assert same, f"torch raises {theirs.error!r}, ours {mine.error!r}"
        return "error"
    if isinstance(mine.error, KernelUnavailable):
        assert explicit, f"auto refused: {mine.error}"
        assert not isinstance(mine.error, _library.LaunchFailed), mine.error
        return "refused"
    if mine.error is not None:
        raise AssertionError(f"torch computes this, ours raises {mine.error!r}") from mine.error
    assert launched or not explicit, "a named engine ran no kernel"

    def truth(given: Sequence[Any]) -> Outcome:
        wide = [x.detach().double().requires_grad_(x.requires_grad) if _real(x) else x for x in given]
        return outcome(truth_of or stock, wide, truth_extra or stock_extra, exact)

    compare(
        mine.tensors,
        theirs.tensors,
        truth(given).tensors,
        lambda: _neighbours(stock, truth, given, stock_extra, exact),
        terms(given, mine.upstream) if terms is not None and mine.upstream else 0.0,
        roundings,
    )
    return "same"


def agree_modules(
    through: Callable[[torch.nn.Module], Callable[..., Any]],
    ours: torch.nn.Module,
    stock: torch.nn.Module,
    double: torch.nn.Module,
    arguments: Sequence[Any],
    *,
    explicit: bool,
) -> str:
    """`agree` of modules that are called alike, `through` one; `double` is `stock` in float64."""
    return agree(
        through(ours),
        through(stock),
        arguments,
        explicit=explicit,
        extra=list(ours.parameters()),
        stock_extra=list(stock.parameters()),
        truth_of=through(double),
        truth_extra=list(double.parameters()),
    )


def _real(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def compare(
    mine: Sequence[Tensor | None],
    theirs: Sequence[Tensor | None],
    truth: Sequence[Tensor | None],
    neighbours: Callable[[], list[tuple[list[Any], list[Any]]]] = list,
    terms: float = 0.0,
    roundings: int = 0,
) -> None:
    """Shapes, dtypes and numbers, by the rule.

    On a handful of numbers stock may be right by luck. Where the rule fails, its error is measured again at points next
    to this one, each against its own truth, and the largest is taken; and a result that is 0 throughout (but for the
    rounding of float64), as a difference of terms of the size `terms`, may be off by a rounding of those.
    """
    assert len(mine) == len(theirs), f"{len(mine)} results, torch gives {len(theirs)}"
    more: list[tuple[list[Any], list[Any]]] | None = None
    for index, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        if a is None or b is None:
            zero = a if b is None else b
            assert zero is None or not zero.any(), f"result {index} is None on one side only: {a}, {b}"
            continue
        assert (a.shape, a.dtype) == (b.shape, b.dtype), (
            f"result {index}: {a.shape} {a.dtype}, torch {b.shape} {b.dtype}"
        )
        if not a.is_floating_point() or index >= len(truth):
            assert torch.equal(a, b), f"result {index}: {a}, torch {b}"
            continue
        exact = truth[index]
        assert exact is not None
        try:
            assert_within_rule(a, b, exact, f"result {index}")
        except AssertionError as failure:
            if "allowed" not in str(failure):
                raise
            more = neighbours() if more is None else more
            error = (a.detach().double() - exact.detach()).abs()
            pairs = [(near[index], right[index]) for near, right in more]
            stocks = [(x.detach().double() - y.detach()).abs().nan_to_num(0.0).max() for x, y in pairs]
            worst = max([float(s) for s in stocks], default=0.0)
            # of all results: where terms cancel exactly (the gradient of an only key), rounding is of their size
            parts = [x.detach() for x in truth if x is not None]
            scale = max(float(x[x.isfinite()].abs().max()) for x in parts if x.isfinite().any())
            vanishes = float(exact[exact.isfinite()].abs().max()) <= 64 * torch.finfo(torch.float64).eps * terms
            size = (1 + roundings) * torch.finfo(a.dtype).eps * scale
            if vanishes:  # terms are of the coarsest dtype there is: an fp32 mask beside fp16 queries has a gradient
                size = max(size, terms * max(torch.finfo(x.dtype).eps for x in mine if x is not None and _real(x)))
            if not float(error[exact.isfinite()].max()) <= 2 * worst + size:
                raise


def _neighbours(
    stock: Callable[..., Any], truth: Callable[..., Outcome], given: Sequence[Any], extra: Sequence[Tensor], exact: bool
) -> list[tuple[list[Any], list[Any]]]:
    """(results of stock, truth) at points some roundings from this one."""
    found = []
    for seed in range(NEIGHBOURS):
        generator = torch.Generator().manual_seed(seed)
        near = []
        for x in given:
            if _real(x):
                noise = torch.randn(x.shape, generator=generator, dtype=torch.float64) * 64 * torch.finfo(x.dtype).eps
                x = (x.detach().double() * (1 + noise)).to(x.dtype).requires_grad_(x.requires_grad)
            near.append(x)
        results, exact = outcome(stock, near, extra, exact), truth(near)
        if results.error is None and exact.error is None:
            found.append((results.tensors, exact.tensors))
    return found


@contextlib.contextmanager
def launches() -> Iterator[list[str]]:
    """Names of the registered ops that run meanwhile."""
    names: list[str] = []
    kept = dict(_library.LAUNCHERS)

    def counted(name: str, launcher: Callable[[], Any]) -> Callable[[], Any]:
        def load() -> Any:
            names.append(name)
            return launcher()

        return load

    _library.LAUNCHERS.update({name: counted(name, launcher) for name, launcher in kept.items()})
    try:
        yield names
    finally:
        _library.LAUNCHERS.update(kept)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN, and nothing warns."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    log = logging.getLogger("fastops")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])


@contextlib.contextmanager
def environment(**values: str | None) -> Iterator[None]:
    """Environment variables, None for unset."""
    kept = {name: os.environ.get(name) for name in values}

    def put(values: dict[str, str | None]) -> None:
        for name, value in values.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    put(dict(values))
    try:
        yield
    finally:
        put(kept)


def run(name: str, examples: int, seed: int) -> dict[str, int]:
    """Check that many cases; returns how they ended. The same seed gives the same cases."""
    cases, check = PROPERTIES[name]
    ends: dict[str, int] = {}

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        print_blob=False,
    )
    @hypothesis.given(cases)
    def each(case: Any) -> None:
        end = check(case) or "same"
        ends[end] = ends.get(end, 0) + 1

    with poisoned():
        each()
    return ends


__all__ = [
    "FLOATS",
    "KERNEL_FLOATS",
    "PROPERTIES",
    "ROUNDED_FLOATS",
    "SEEDED_DROPOUT",
    "SEEDS",
    "Spec",
    "agree",
    "compare",
    "environment",
    "fuzzed",
    "launches",
    "outcome",
    "rarely",
    "refuses",
    "replace",
    "run",
    "seeded",
    "specs",
]
