"""LayerNormLSTM: an LSTM with layer normalisation and zoneout, which torch.nn has not."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import init
from torch.nn.utils.rnn import PackedSequence

from fastops import _env
from fastops._sequences import without_padding
from fastops.nn._impl import set_impl
from fastops.nn.rnn import _Recurrent
from fastops.ops import layer_norm_lstm as ops

__all__ = ["LayerNormLSTM"]


class LayerNormLSTM(_Recurrent):
    """LSTM with layer normalisation (Ba et al. 2016) and optional zoneout (Krueger et al. 2016).

        i, f, g, o = LN(x_t W_ih^T) gain_ih + b_ih + LN(h_{t-1} W_hh^T) gain_hh + b_hh
        candidate  = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g)
        output     = sigmoid(o) tanh(LN(candidate) gain_c + bias_c)
        c_t = z_c c_{t-1} + (1 - z_c) candidate,    h_t = z_h h_{t-1} + (1 - z_h) output

    LN(v) = (v - mean(v)) / sqrt(var(v) + eps) over the 4 H numbers of a row of gates, and over the H of a cell state.
    In training z_h and z_c are masks drawn from torch's generator, 1 with the zoneout rate; in evaluation, the rates.

    Call forms, `lengths` and results are those of `fastops.nn.LSTM`. Parameters have torch.nn.LSTM's names, shapes and
    initialisation, so that its state_dict loads with strict=False; in addition, for each layer and direction, there are
    `gain_ih_l0` and `gain_hh_l0` (4H), `gain_c_l0` (H), all 1 at first, and `bias_c_l0` (H), 0 at first.

    Args:
        input_size: features of the input.
        hidden_size: H.
        num_layers: layers, each reading the output of the one before.
        bias: whether there are b_ih and b_hh.
        batch_first: (B, T, I) in place of (T, B, I).
        dropout: rate between layers.
        bidirectional: whether each layer has a second direction.
        zoneout: rate for h and c, or a pair of rates.
        eps: of the normalisations.
        device: of the parameters.
        dtype: of the parameters.
        impl: "auto", "triton", "small", "step" or "torch", see `fastops.ops.layer_norm_lstm`.
    """

    # the checks of a net with two states
    check_forward_args = torch.nn.LSTM.check_forward_args  # type: ignore[assignment]
    get_expected_cell_size = torch.nn.LSTM.get_expected_cell_size

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        zoneout: float | tuple[float, float] = 0.0,
        eps: float = 1e-5,
        device: Any = None,
        dtype: Any = None,
        impl: str = "auto",
    ) -> None:
        torch.nn.RNNBase.__init__(
            self,
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
        )
        rates = zoneout if isinstance(zoneout, tuple | list) else (zoneout, zoneout)
        if not all(isinstance(rate, int | float) and not isinstance(rate, bool) for rate in rates):
            raise TypeError(f"zoneout must be a rate in [0, 1] or a pair of them, for h and c, got {zoneout!r}")
        if len(rates) != 2 or not all(0 <= rate <= 1 for rate in rates):
            raise ValueError(f"zoneout must be a rate in [0, 1] or a pair of them, for h and c, got {zoneout!r}")
        if not isinstance(eps, int | float) or isinstance(eps, bool):
            raise TypeError(f"eps must be a number, got {eps!r}")
        self.zoneout = (float(rates[0]), float(rates[1]))
        self.eps = eps
        set_impl(self, impl, ops.IMPLS)
        sizes = {"gain_ih": 4 * hidden_size, "gain_hh": 4 * hidden_size, "gain_c": hidden_size, "bias_c": hidden_size}
        for suffix in self._suffixes():
            for name, size in sizes.items():
                self.register_parameter(
                    name + suffix, torch.nn.Parameter(torch.empty(size, device=device, dtype=dtype))
                )
        self._reset_norms()

    def _suffixes(self) -> list[str]:
        directions = ("", "_reverse") if self.bidirectional else ("",)
        return [f"_l{layer}{direction}" for layer in range(self.num_layers) for direction in directions]

    def _reset_norms(self) -> None:
        for name, parameter in self.named_parameters():
            if name.startswith("gain_"):
                init.ones_(parameter)
            elif name.startswith("bias_c_"):
                init.zeros_(parameter)

    def reset_parameters(self) -> None:
        """torch.nn.LSTM's initialisation, gains 1 and the bias of the cell 0."""
        bound = self.hidden_size**-0.5
        for name in self._flat_weights_names:
            init.uniform_(getattr(self, name), -bound, bound)
        self._reset_norms()

    def flatten_parameters(self) -> None:
        """Nothing to do: no kernel here wants the weights in one piece."""

    def extra_repr(self) -> str:
        """What torch shows of the module, the engine where one is named, zoneout and eps where they are given."""
        shown = super().extra_repr()
        shown += f", zoneout={self.zoneout}" if any(self.zoneout) else ""
        return shown + (f", eps={self.eps}" if self.eps != 1e-5 else "")

    def forward(self, input: Any, hx: Any = None, *, lengths: Tensor | None = None) -> Any:
        """(output, (h_n, c_n)), as `fastops.nn.LSTM`."""
        if hx is not None and self._states(hx) is None:
            raise RuntimeError("lstm expects two hidden states")
        if isinstance(input, PackedSequence):
            if lengths is not None:
                lengths = self._check_lengths(input, lengths)
            return self._packed(input, hx, self._run)
        if input.dim() not in (2, 3):
            raise ValueError(f"LayerNormLSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        if hx is not None and any(state.dim() != input.dim() for state in hx):
            got = ", ".join(f"{state.dim()}-D" for state in hx)
            raise RuntimeError(f"For {input.dim()}-D input, hx and cx should also be {input.dim()}-D but got ({got})")
        if lengths is not None:
            lengths = self._check_lengths(input, lengths)
            # NaN in the padding would reach the gradients of w_ih and its gain, as a factor of zero
            input = without_padding(input, lengths, self.batch_first)
        return self._padded(input, hx, lengths, self._run)

    def _weights(self) -> list[tuple[Any, ...]]:
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "gain_ih", "gain_hh", "gain_c", "bias_c")
        # a module without biases has no such attributes
        return [tuple(getattr(self, name + suffix, None) for name in names) for suffix in self._suffixes()]

    def _run(
        self, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Any, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One layer over a time-major input."""
        if x.shape[0] == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")  # as torch.nn.LSTM
        dtype = _env.autocast_dtype(x.device)
        if dtype is not None:
            with torch.autocast(x.device.type, enabled=False):
                x, h0, c0 = (_env.autocast(each, dtype) for each in (x, h0, c0))
                weights = [tuple(_env.autocast(w, dtype) for w in own) for own in weights]
                return self._run(x, h0, c0, weights, lengths)
        steps, batch, hidden = x.shape[0], x.shape[1], self.hidden_size
        found = []
        for direction, (w_ih, w_hh, b_ih, b_hh, gain_ih, gain_hh, gain_c, bias_c) in enumerate(weights):
            bias = None if b_ih is None else b_ih + b_hh
            gates = F.layer_norm(F.linear(x, w_ih), (4 * hidden,), gain_ih, bias, self.eps)
            rate_h, rate_c = self.zoneout
            options: dict[str, Any] = {"keep_h": 1 - rate_h, "keep_c": 1 - rate_c}
            if self.training and (rate_h or rate_c):
                draws = torch.rand(2, steps, batch, hidden, device=x.device)
                options = {"mask_h": draws[0] >= rate_h, "mask_c": draws[1] >= rate_c}
            found.append(
                ops.layer_norm_lstm(
                    gates,
                    w_hh,
                    gain_hh,
                    gain_c,
                    bias_c,
                    x.new_zeros(batch, hidden) if h0 is None else h0[direction],
                    x.new_zeros(batch, hidden) if c0 is None else c0[direction],
                    lengths=lengths,
                    eps=self.eps,
                    reverse=direction == 1,
                    impl=self.impl,
                    **options,
                )
            )
        outputs, h_n, c_n = zip(*found, strict=True)
        return torch.cat(outputs, -1), torch.stack(h_n), torch.stack(c_n)
