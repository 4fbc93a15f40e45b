"""Engines by name and by FASTOPS_IMPL, of every public op and module: those it has, those of others, and none."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

import fastops
from fastops import _env
from tests.contract_subjects import SUBJECTS
from tests.fuzz.engine import environment, fuzzed, launches, outcome

CPU = torch.device("cpu")
RECURRENT = ("LSTM", "GRU", "RNN", "LayerNormLSTM")
CONVOLUTIONS = ("conv2d_relu", "conv2d_relu_max_pool2d", "Conv2dReLU", "Conv2dReLUMaxPool2d", "Sequential")
NAMES = ("auto", "torch", "triton", "hybrid", "persistent", "small", "step")
NONE = ("", "cudnn", "Triton", "triton ", None, 0, True, ("auto",))


def engines_of(name: str) -> tuple[str, ...]:
    if name in RECURRENT:
        return ("auto", "torch", "triton", "persistent", "small", "step")
    return ("auto", "torch", "triton", "hybrid") if name in CONVOLUTIONS else ("auto", "torch", "triton")


@st.composite
def choices(draw: Any) -> tuple[str, Any, bool]:
    """A subject, an engine, and whether it is the environment that names it."""
    by_environment = draw(st.booleans())
    engine = draw(st.sampled_from((*NAMES, *(x for x in NONE if not by_environment or isinstance(x, str)))))
    return draw(st.sampled_from(sorted(SUBJECTS))), engine, by_environment


@fuzzed(choices())
def engines(case: tuple[str, Any, bool]) -> str:
    """The engine that was named runs, or an error says why not; "auto" and what other ops have is PyTorch here."""
    name, engine, by_environment = case
    own = engine in engines_of(name)
    impl, wanted = ("auto", engine) if by_environment else (engine, None)

    def call() -> Any:
        function, given = SUBJECTS[name].make(CPU, impl)
        return function(*given)

    with environment(FASTOPS_IMPL=wanted), launches() as launched:
        error = outcome(call, ()).error
    if own or (by_environment and engine in (*NAMES, "")):
        if isinstance(error, fastops.KernelUnavailable):
            missing = _env.why_no_triton(CPU)
            assert missing or engine == "persistent", error
            assert (missing or "persistent") in str(error), error
            return "refused"
        assert error is None, error
        assert bool(launched) == (own and engine not in ("auto", "torch")), launched
        return "same"
    assert isinstance(error, ValueError), error
    assert ("FASTOPS_IMPL must be one of" if by_environment else "impl must be one of") in str(error), error
    assert not launched, launched
    return "error"
