"""torch.compile and subclasses of torch.nn.LSTM, GRU and RNN: lift its refusal of them.

torch.compile stops the graph at such a module, whatever its forward does, because stock PyTorch would be unrolled step
by step. The subclasses in fastops.nn call one opaque op a layer instead, so there is nothing to unroll. The refusal is
lifted for them alone; a torch.nn.LSTM in the same model is treated as ever.
"""

from __future__ import annotations

from typing import Any

import torch

from fastops import _library

__all__ = ["trace_through"]


def trace_through(classes: tuple[type, ...]) -> None:
    """Let torch.compile trace the forward of modules of these classes, as it does for any other module.

    Dynamo asks `isinstance(module, (RNN, GRU, LSTM)) and not config.allow_rnn` where it wraps a module. The switch is
    global; here it is thrown for the one question. Where a future PyTorch has no such method, nothing is changed.
    """

    def patch(builder: Any) -> None:
        wrap = getattr(getattr(builder, "VariableBuilder", None), "wrap_module", None)
        if wrap is None or not hasattr(builder.config, "allow_rnn"):
            return

        def wrap_module(self: Any, value: torch.nn.Module) -> Any:
            if not isinstance(value, classes):
                return wrap(self, value)
            with builder.config.patch(allow_rnn=True):
                return wrap(self, value)

        builder.VariableBuilder.wrap_module = wrap_module

    _library.after_import("torch._dynamo.variables.builder", patch)
