"""One layer of a recurrent net (LSTM, GRU, tanh or relu RNN), in one or both directions, over whole sequences."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastops import _env
from fastops.ops.rnn_reference import GATES, Weights, reference, stock

__all__ = ["ENGINES", "recurrent_layer", "reference", "why_not"]

ENGINES = ("auto", "triton", "persistent", "small", "step", "torch")


def why_not(
    mode: str,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Weights],
    lengths: Tensor | None = None,
    batch_first: bool = False,
    engine: str = "triton",
) -> str | None:
    """Why `engine` cannot run this call, or None where it can. Reads metadata only."""
    return "this engine is not built"


def recurrent_layer(
    mode: str,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Weights],
    lengths: Tensor | None = None,
    batch_first: bool = False,
    *,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run one recurrent layer over a batch of sequences: torch's formulas, gate orders and results.

    Args:
        mode: "LSTM", "GRU", "RNN_TANH" or "RNN_RELU".
        input: (T, B, I), or (B, T, I) with `batch_first`; any strides.
        h0: (directions, B, H) initial hidden state, or None for zeros.
        c0: (directions, B, H) initial cell state of an LSTM, or None for zeros; None for other modes.
        weights: for each direction (w_ih (G H, I), w_hh (G H, H), b_ih (G H) or None, b_hh or None), G gates in
            torch's order. A second direction runs backwards in time.
        lengths: (B,) integer tensor on the input's device, or None where all rows have T steps. A row stops at its
            length: its outputs after that are 0, h_n and c_n are its states at its last step, and the reverse direction
            starts at that step, as with a PackedSequence. Nothing waits for the GPU.
        batch_first: whether input and output are (B, T, ...).
        impl: "auto", "triton" (small or persistent by H), "persistent", "small", "step" or "torch".

    Returns:
        output (T, B, directions H) or (B, T, directions H); h_n (directions, B, H); c_n likewise for an LSTM, else None.

    Raises:
        ValueError, RuntimeError: a bad mode, shape, dtype or device; the message names the argument.
        KernelUnavailable: the engine asked for cannot run this call; the message says why.
    """
    engine = _env.choose_impl(impl, ENGINES)
    if mode not in GATES:
        raise ValueError(f"mode must be one of {', '.join(GATES)}, got {mode!r}")
    if engine not in ("auto", "torch"):
        reason = why_not(mode, input, h0, c0, weights, lengths, batch_first, engine)
        if reason is not None:
            raise _env.KernelUnavailable(f"recurrent_layer(impl={engine!r}): {reason}")
    return stock(mode, input, h0, c0, weights, lengths, batch_first)


def explain_auto() -> list[dict[str, str]]:
    """What "auto" runs for typical calls, for `fastops env`."""
    return []
