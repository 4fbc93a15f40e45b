"""LSTM, GRU and RNN: torch.nn's, running on fastops' engines, with per-row lengths beside PackedSequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastops import _env
from fastops.nn._impl import set_impl, with_impl
from fastops.nn.rnn_compile import trace_through
from fastops.nn.rnn_sequences import Packing, check_lengths
from fastops.ops import rnn as ops
from fastops.ops.rnn_reference import stock

__all__ = ["GRU", "LSTM", "RNN"]

# (layer input, h0, c0, weights, lengths) -> (output, h_n, c_n), time-major
Layer = Callable[..., tuple[Tensor, Tensor, Tensor | None]]


class _Recurrent(torch.nn.RNNBase):
    """What LSTM, GRU and RNN share."""

    impl: str = "auto"

    def __init__(self, *args: Any, impl: str = "auto", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        set_impl(self, impl, ops.IMPLS)

    def flatten_parameters(self) -> None:
        """Moves the weights into one piece of memory on a GPU, as torch.nn does; results are the same without it.

        Our engines do not ask for it. It is kept for calls that go to stock PyTorch, where cuDNN would copy the weights
        and warn each time. torch.nn calls it where it is needed; there is no need to.
        """
        super().flatten_parameters()

    def extra_repr(self) -> str:
        return with_impl(self, super().extra_repr())

    def forward(self, input: Any, hx: Any = None, *, lengths: Tensor | None = None) -> Any:
        """torch.nn's call forms, and `lengths`: (B,) integers on the input's device, for a padded batch.

        With lengths, row b is read up to step lengths[b]: outputs after it are 0, the final states are those of its
        last step, and the reverse direction starts there, as with a PackedSequence. Nothing waits for the GPU.
        """
        if lengths is None and _env.nothing_to_choose(self.impl, input):
            return super().forward(input, hx)
        packed = isinstance(input, PackedSequence)
        if lengths is not None:
            lengths = self._check_lengths(input, lengths)
        engine = self._engine(input, lengths is not None)
        if engine == "torch":
            # compiled, each layer is one op; exported programs hold torch's own operators, a projection is unrolled
            one_op = torch.compiler.is_compiling() and not (packed or self.proj_size or torch.compiler.is_exporting())
            if lengths is None and not one_op:
                return super().forward(input, hx)
        layer = self._layer(engine)
        return self._packed(input, hx, layer) if packed else self._padded(input, hx, lengths, layer)

    def _check_lengths(self, input: Any, lengths: Tensor) -> Tensor:
        if not isinstance(input, Tensor | PackedSequence):
            raise TypeError(f"input must be a Tensor or a PackedSequence, got {type(input).__name__}")
        if isinstance(input, PackedSequence):
            raise ValueError("lengths go with a padded tensor; a PackedSequence has its own")
        if input.dim() != 3:
            raise ValueError(f"lengths need a batched 3-D input, got {input.dim()}-D")
        steps, batch = input.shape[:2] if not self.batch_first else (input.shape[1], input.shape[0])
        return check_lengths(lengths, batch, steps, input.device)

    def _engine(self, input: Any, ragged: bool) -> str:
        """Name of the engine: "torch" is stock PyTorch for the whole module, "auto" lets each layer choose."""
        engine = _env.choose_impl(self.impl, ops.IMPLS)
        if engine == "torch":
            return engine
        data = input.data if isinstance(input, PackedSequence) else input
        if self.proj_size:
            if engine == "auto":
                return "torch"
            raise _env.KernelUnavailable(f"{self._get_name()}(impl={engine!r}): proj_size runs on stock PyTorch only")
        if engine == "auto" and (
            data.device.type != "cuda" or data.dim() not in (2, 3) or not self._wins(input, ragged)
        ):
            return "torch"
        return engine

    def _wins(self, input: Any, ragged: bool) -> bool:
        """Whether the table names one of our engines for any layer. If not, stock runs all layers in one call."""
        data = input
        if isinstance(input, PackedSequence):
            data, ragged = input.data, True
            steps, batch = input.batch_sizes.shape[0], int(input.batch_sizes[0])
        elif input.dim() == 2:
            steps, batch = input.shape[0], 1
        else:
            steps, batch = input.shape[:2] if not self.batch_first else (input.shape[1], input.shape[0])
        dtype = _env.autocast_dtype(torch.device("cuda")) or data.dtype
        one = torch.empty((), dtype=dtype, device=data.device)  # stands for a layer's input: only its shape is read
        weights = self._weights()
        directions = 2 if self.bidirectional else 1
        for first in range(0, len(weights), directions)[:2]:  # layers after the second are like it
            own = weights[first : first + directions]
            stand_in = one.expand(steps, batch, own[0][0].shape[1])
            if ops.choose(self.mode, stand_in, None, None, own, data if ragged else None) != "torch":
                return True
        return False

    def _layer(self, engine: str) -> Layer:
        def layer(x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Any, lengths: Tensor | None) -> Any:
            if self.proj_size:
                return stock(self.mode, x, h0, c0, weights, lengths)
            return ops.recurrent_layer(self.mode, x, h0, c0, weights, lengths, impl=engine)

        return layer

    def _states(self, hx: Any) -> tuple[Tensor, ...] | None:
        """The initial states as a tuple, empty without any; None where they are not what a call takes."""
        if hx is None:
            return ()
        if self.mode != "LSTM":
            return (hx,)
        pair = isinstance(hx, (tuple, list)) and len(hx) == 2 and all(isinstance(s, Tensor) for s in hx)
        return tuple(hx) if pair else None

    def _padded(self, input: Tensor, hx: Any, lengths: Tensor | None, layer: Layer) -> Any:
        """All layers over a padded (or one unbatched) sequence."""
        lstm = self.mode == "LSTM"
        states = self._states(hx)
        if input.dim() == 2 and states is None and isinstance(hx, (tuple, list)):
            states = self._states(hx[:2])  # torch reads no more of an unbatched call
        if states is None or input.dim() not in (2, 3) or any(s.dim() != input.dim() for s in states):
            return super().forward(input, hx)  # torch says what is wrong
        batched = input.dim() == 3
        batch_dim = 0 if self.batch_first else 1
        x = input if batched else input.unsqueeze(batch_dim)
        if not batched:
            states = tuple(s.unsqueeze(1) for s in states)
        if states:
            self.check_forward_args(x, states if lstm else states[0], None)  # type: ignore[arg-type]
        else:
            self.check_input(x, None)
        x = x.transpose(0, 1) if self.batch_first else x
        output, finals = self._layers(x, states, lengths, layer)
        output = output.transpose(0, 1) if self.batch_first else output
        if not batched:
            output, finals = output.squeeze(batch_dim), tuple(f.squeeze(1) for f in finals)
        return output, finals if lstm else finals[0]

    def _packed(self, packed: PackedSequence, hx: Any, layer: Layer) -> Any:
        """All layers over a PackedSequence, padded on its device and packed again."""
        lstm = self.mode == "LSTM"
        states = self._states(hx)
        if states is None:
            return super().forward(packed, hx)  # torch says what is wrong
        self.check_input(packed.data, packed.batch_sizes)
        if states:
            self.check_forward_args(packed.data, states if lstm else states[0], packed.batch_sizes)  # type: ignore[arg-type]
            if packed.sorted_indices is not None:
                states = tuple(s.index_select(1, packed.sorted_indices) for s in states)
        packing = Packing(packed)
        output, finals = self._layers(packing.pad(packed.data), states, packing.lengths, layer)
        if packed.unsorted_indices is not None:
            finals = tuple(f.index_select(1, packed.unsorted_indices) for f in finals)
        again = PackedSequence(packing.pack(output), packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
        return again, finals if lstm else finals[0]

    def _weights(self) -> list[tuple[Any, ...]]:
        """(w_ih, w_hh, b_ih or None, b_hh or None) of each direction of each layer, and w_hr where it projects."""
        return [tuple(w) if self.bias else (*w[:2], None, None, *w[2:]) for w in self.all_weights]

    def _layers(
        self, x: Tensor, states: tuple[Tensor, ...], lengths: Tensor | None, layer: Layer
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        directions = 2 if self.bidirectional else 1
        weights = self._weights()
        last_h, last_c = [], []
        for k in range(self.num_layers):
            own = slice(k * directions, (k + 1) * directions)
            h0, c0 = [s[own] for s in states] + [None] * (2 - len(states))
            x, h_n, c_n = layer(x, h0, c0, weights[own], lengths)
            last_h.append(h_n)
            last_c.append(c_n)
            if self.dropout and self.training and k + 1 < self.num_layers:
                x = F.dropout(x, self.dropout)
        finals = [torch.cat(last_h)]
        if self.mode == "LSTM":
            finals.append(torch.cat([c for c in last_c if c is not None]))
        return x, tuple(finals)


class LSTM(_Recurrent, torch.nn.LSTM):
    """torch.nn.LSTM on fastops' engines.

    Constructor, parameters, initialisation, call forms and errors are torch.nn.LSTM's, with two additions: the
    keyword `impl` ("auto", "triton", "persistent", "small", "step" or "torch", see `fastops.ops.rnn`), and the
    keyword `lengths` of forward. Dropout between layers draws from torch's generator.

    "auto" runs stock PyTorch on the CPU, in float64, with proj_size, and where the table in fastops.tuning says so.
    An engine asked for by name never falls back: it raises `fastops.KernelUnavailable`.
    """


class GRU(_Recurrent, torch.nn.GRU):
    """torch.nn.GRU on fastops' engines; see `LSTM` for what is added."""


class RNN(_Recurrent, torch.nn.RNN):
    """torch.nn.RNN (tanh or relu) on fastops' engines; see `LSTM` for what is added."""


trace_through((LSTM, GRU, RNN))
