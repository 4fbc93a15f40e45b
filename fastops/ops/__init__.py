"""What an op computes, what it refuses, and how it is differentiated. Kernels are in fastops.kernels.

A module here has, in this order: docstring (formula, shapes, dtypes, error bound, references), `reference`, `why_not`,
the registered ops with their fakes, the autograd.Function, the functional, and `explain_auto() -> list[dict]` with one
{"op", "example", "engine", "why"} per typical case: what the table says by `_env.shown_gpu_facts()`, for `fastops env`.
"""

from __future__ import annotations

import importlib
from types import ModuleType

NAMES = ("conv2d_relu", "rnn", "rnn_cell", "layer_norm_lstm", "attention")


def modules() -> list[ModuleType]:
    """The modules of all ops, in the order of the docs."""
    return [importlib.import_module(f"fastops.ops.{name}") for name in NAMES]
