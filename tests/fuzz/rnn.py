"""LSTM, GRU, RNN, their cells and the cell functions, LayerNormLSTM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastops
from tests.fuzz.engine import FLOATS, KERNEL_FLOATS, SEEDS, Spec, agree, agree_modules, fuzzed, rarely, specs

CPU_FLOATS = st.sampled_from([torch.float32, torch.float32, torch.bfloat16])
WRONG = ("input width", "input rank", "state shape", "state rank", "input dtype", "state dtype", "integers", "no steps")


@dataclass(frozen=True)
class Recurrent:
    name: str  # LSTM, GRU, RNN
    sizes: tuple[int, int]
    options: dict[str, Any]
    dtype: torch.dtype
    input: Spec
    states: tuple[Spec, ...]  # none for zeros
    lengths: list[int] | None
    packed: bool
    impl: str
    seed: int


@st.composite
def recurrent(draw: Any, impls: tuple[str, ...], dtypes: Any, layers: int) -> Recurrent:
    name, dtype = draw(st.sampled_from(["LSTM", "GRU", "RNN"])), draw(dtypes)
    size, hidden = draw(st.integers(1, 4)), draw(st.integers(2, 5))
    options: dict[str, Any] = {
        "num_layers": draw(st.integers(1, layers)),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
    }
    seen = hidden
    if name == "LSTM" and draw(st.integers(0, 5)) == 5:
        options["proj_size"] = seen = draw(st.integers(1, hidden - 1))
    if name == "RNN":
        options["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
    wrong = draw(rarely(st.just("none"), st.sampled_from(WRONG)))
    steps, batch = 0 if wrong == "no steps" else draw(st.integers(1, 4)), draw(st.integers(1, 3))
    batched = draw(st.integers(0, 3)) > 0
    shape: tuple[int, ...] = (batch, steps, size) if options["batch_first"] else (steps, batch, size)
    count = options["num_layers"] * (2 if options["bidirectional"] else 1)
    state, cell = (count, batch, seen), (count, batch, hidden)
    if not batched:
        shape, state, cell = (steps, size), (count, seen), (count, hidden)
    if wrong == "input width":
        shape = (*shape[:-1], size + 1)
    if wrong == "input rank":
        shape = draw(st.sampled_from([(size,), (1, *shape)]))
    kind, state_kind = dtype, dtype
    if wrong == "input dtype":
        kind = draw(CPU_FLOATS)
    if wrong == "integers":
        kind = torch.int64
    states: tuple[Spec, ...] = ()
    if wrong.startswith("state") or draw(st.booleans()):
        if wrong == "state shape":
            state = (*state[:-1], state[-1] + 1)
        if wrong == "state rank":
            state = draw(st.sampled_from([state[1:], (1, *state)]))
        if wrong == "state dtype":
            state_kind = draw(CPU_FLOATS)
        shapes = (state, cell) if name == "LSTM" else (state,)
        states = tuple(draw(specs(s, state_kind)) for s in shapes)
    lengths = None
    if batched and wrong == "none" and draw(st.booleans()):
        lengths = [draw(st.integers(1, steps)) for _ in range(batch)]
    packed = lengths is not None and draw(st.booleans())
    values = st.just("normal")
    image = draw(specs(shape, kind, values=values))
    return Recurrent(
        name, (size, hidden), options, dtype, image, states, lengths, packed, draw(st.sampled_from(impls)), draw(SEEDS)
    )


def build(make: Any, case: Recurrent, **more: Any) -> nn.Module:
    torch.manual_seed(case.seed)
    return make(*case.sizes, dtype=case.dtype, **case.options, **more)


def recurrent_call(case: Recurrent) -> str:
    stock = build(getattr(nn, case.name), case)
    ours = build(getattr(fastops.nn, case.name), case, impl=case.impl)
    double = build(getattr(nn, case.name), case).double()
    double.load_state_dict(stock.state_dict())
    batch_first = case.options["batch_first"]
    lengths = None if case.lengths is None else torch.tensor(case.lengths)

    def through(module: nn.Module, mine: bool) -> Any:
        def call(x: Tensor, *states: Tensor) -> Any:
            hx = None if not states else states if case.name == "LSTM" else states[0]
            if lengths is None:
                return module(x, hx)
            if mine and not case.packed:
                return module(x, hx, lengths=lengths)
            packed = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False)
            out, finals = module(packed, hx)
            steps = x.shape[1 if batch_first else 0]
            return pad_packed_sequence(out, batch_first, total_length=steps)[0], finals

        return call

    return agree(
        through(ours, True),
        through(stock, False),
        [case.input, *case.states],
        explicit=case.impl not in ("auto", "torch"),
        extra=list(ours.parameters()),
        stock_extra=list(stock.parameters()),
        truth_of=through(double, False),
        truth_extra=list(double.parameters()),
    )


@fuzzed(recurrent(("auto", "torch"), CPU_FLOATS, 2))
def recurrent_modules(case: Recurrent) -> str:
    return recurrent_call(case)


@fuzzed(recurrent(("triton", "small", "step"), KERNEL_FLOATS, 2))
def recurrent_modules_kernels(case: Recurrent) -> str:
    return recurrent_call(case)


@dataclass(frozen=True)
class Cell:
    name: str
    tensors: tuple[Any, ...]  # input, states, w_ih, w_hh, b_ih, b_hh
    impl: str


CELLS = {"lstm_cell": 4, "gru_cell": 3, "rnn_tanh_cell": 1, "rnn_relu_cell": 1}
CELL_WRONG = ("input width", "input rank", "state width", "state batch", "w_ih", "w_hh", "bias", "dtype", "integers")


@st.composite
def cells(draw: Any, impls: tuple[str, ...], dtypes: Any) -> Cell:
    name, dtype = draw(st.sampled_from(sorted(CELLS))), draw(dtypes)
    batch, size, hidden = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    wrong = draw(rarely(st.just("none"), st.sampled_from(CELL_WRONG)))
    rows = CELLS[name] * hidden
    state = (batch + (wrong == "state batch"), hidden + (wrong == "state width"))
    shapes: list[tuple[int, ...]] = [(batch, size + (wrong == "input width")), state]
    if name == "lstm_cell":
        shapes.append((batch, hidden))
    shapes += [(rows + (wrong == "w_ih"), size), (rows + (wrong == "w_hh"), hidden), (rows,), (rows,)]
    if wrong == "input rank":
        shapes[0] = draw(st.sampled_from([(size,), (1, batch, size)]))
    if wrong == "bias":
        shapes[-1] = (rows + 1,)
    kinds = [torch.int64 if wrong == "integers" else dtype] * len(shapes)
    if wrong == "dtype":
        kinds[draw(st.integers(0, len(kinds) - 1))] = draw(FLOATS)
    tensors = [draw(specs(shape, kind)) for shape, kind in zip(shapes, kinds, strict=True)]
    if wrong == "none" and draw(st.booleans()):
        tensors[-2:] = [None, None]
    return Cell(name, tuple(tensors), draw(st.sampled_from(impls)))


def cell_call(case: Cell) -> str:
    def through(function: Any, **more: Any) -> Any:
        def call(x: Any, *rest: Any) -> Any:
            if case.name == "lstm_cell":
                return function(x, rest[:2], *rest[2:], **more)
            return function(x, *rest, **more)

        return call

    ours = through(getattr(fastops, case.name), impl=case.impl)
    return agree(ours, through(getattr(torch, case.name)), case.tensors, explicit=case.impl == "triton")


@fuzzed(cells(("auto", "torch"), FLOATS))
def recurrent_cells(case: Cell) -> str:
    return cell_call(case)


@fuzzed(cells(("triton",), KERNEL_FLOATS))
def recurrent_cells_kernels(case: Cell) -> str:
    return cell_call(case)


@st.composite
def cell_modules(draw: Any) -> tuple[Any, ...]:
    name = draw(st.sampled_from(["LSTMCell", "GRUCell", "RNNCell"]))
    size, hidden, batch = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    batched = draw(st.booleans())
    wrong = draw(rarely(st.just("none"), st.sampled_from(["width", "rank", "state"])))
    shape = (batch, size + (wrong == "width")) if batched else (size + (wrong == "width"),)
    if wrong == "rank":
        shape = (1, 1, *shape)
    state = (batch, hidden + (wrong == "state")) if batched else (hidden + (wrong == "state"),)
    given = draw(specs(shape, torch.float32))
    states = [draw(specs(state, torch.float32)) for _ in range(2 if name == "LSTMCell" else 1)]
    if wrong != "state" and draw(st.booleans()):
        states = []
    return name, (size, hidden), draw(st.booleans()), given, tuple(states), draw(st.sampled_from(["auto", "triton"]))


@fuzzed(cell_modules())
def recurrent_cell_modules(case: tuple[Any, ...]) -> str:
    name, sizes, bias, given, states, impl = case

    def module(make: Any, **more: Any) -> nn.Module:
        torch.manual_seed(given.seed)
        return make(*sizes, bias=bias, **more)

    stock, double = module(getattr(nn, name)), module(getattr(nn, name)).double()
    ours = module(getattr(fastops.nn, name), impl=impl)
    double.load_state_dict(stock.state_dict())

    def through(cell: nn.Module) -> Any:
        return lambda x, *hx: cell(x, None if not hx else hx if name == "LSTMCell" else hx[0])

    return agree_modules(through, ours, stock, double, [given, *states], explicit=impl == "triton")


@st.composite
def layer_norms(draw: Any, impls: tuple[str, ...], dtypes: Any) -> tuple[Any, ...]:
    dtype = draw(dtypes)
    layers = st.integers(1, 2) if "auto" in impls else rarely(st.just(1), st.just(2))  # a kernel runs a layer each
    options: dict[str, Any] = {"num_layers": draw(layers), "bias": draw(st.booleans())}
    options["batch_first"] = draw(st.booleans())
    options["bidirectional"] = draw(st.booleans())
    rate = st.sampled_from([0.0, 0.1, (0.5, 0.0)])
    steps, batch, hidden = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(2, 5))
    shape = (batch, steps, 3) if options["batch_first"] else (steps, batch, 3)
    count = options["num_layers"] * (2 if options["bidirectional"] else 1)
    given = [draw(specs(shape, dtype))]
    if draw(st.booleans()):
        given += [draw(specs((count, batch, hidden), dtype)) for _ in range(2)]
    lengths = [draw(st.integers(0, steps)) for _ in range(batch)] if draw(st.booleans()) else None
    return hidden, options, draw(rate), dtype, tuple(given), lengths, draw(st.sampled_from(impls)), draw(SEEDS)


def layer_norm_formula(module: Any, lengths: list[int] | None) -> Any:
    """Row by row and step by step what the module's docstring says."""

    def call(x: Tensor, *states: Tensor) -> Any:
        x = x.transpose(0, 1) if module.batch_first else x
        finals: list[list[Tensor]] = [[], []]
        directions = 2 if module.bidirectional else 1
        for layer in range(module.num_layers):
            outs = []
            for direction in range(directions):
                suffix, place = f"_l{layer}" + "_reverse" * direction, layer * directions + direction
                w = {n: getattr(module, n + suffix, None) for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
                w |= {n: getattr(module, n + suffix) for n in ("gain_ih", "gain_hh", "gain_c", "bias_c")}
                rows, ends = [], []
                for row in range(x.shape[1]):
                    length = x.shape[0] if lengths is None else lengths[row]
                    zero = x.new_zeros(module.hidden_size)
                    h, c = (s[place, row] for s in states) if states else (zero, zero)
                    found = [zero] * x.shape[0]
                    for t in reversed(range(length)) if direction else range(length):
                        h, c = _step(module, w, x[t, row], h, c)
                        found[t] = h
                    rows.append(torch.stack(found))
                    ends.append((h, c))
                outs.append(torch.stack(rows, 1))
                for k in range(2):
                    finals[k].append(torch.stack([end[k] for end in ends]))
            x = torch.cat(outs, -1)
        return (x.transpose(0, 1) if module.batch_first else x), tuple(torch.stack(f) for f in finals)

    return call


def _step(module: Any, w: dict[str, Any], x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    size = module.hidden_size
    gates = F.layer_norm(w["weight_ih"] @ x, (4 * size,), w["gain_ih"], None, module.eps)
    gates = gates + F.layer_norm(w["weight_hh"] @ h, (4 * size,), w["gain_hh"], None, module.eps)
    if w["bias_ih"] is not None:
        gates = gates + w["bias_ih"] + w["bias_hh"]
    i, f, g, o = gates.chunk(4)
    candidate = f.sigmoid() * c + i.sigmoid() * g.tanh()
    output = o.sigmoid() * F.layer_norm(candidate, (size,), w["gain_c"], w["bias_c"], module.eps).tanh()
    rate_h, rate_c = module.zoneout
    return rate_h * h + (1 - rate_h) * output, rate_c * c + (1 - rate_c) * candidate


def layer_norm_call(case: tuple[Any, ...]) -> str:
    hidden, options, rate, dtype, given, lengths, impl, seed = case

    def module() -> Any:
        torch.manual_seed(seed)
        return fastops.nn.LayerNormLSTM(3, hidden, **options, zoneout=rate, dtype=dtype, impl=impl).eval()

    ours, stock, double = module(), module(), module().double()
    double.load_state_dict(stock.state_dict())

    def call(x: Tensor, *states: Tensor) -> Any:
        return ours(x, states or None, lengths=None if lengths is None else torch.tensor(lengths))

    return agree(
        call,
        layer_norm_formula(stock, lengths),
        given,
        explicit=impl not in ("auto", "torch"),
        extra=list(ours.parameters()),
        stock_extra=list(stock.parameters()),
        truth_of=layer_norm_formula(double, lengths),
        truth_extra=list(double.parameters()),
    )


@fuzzed(layer_norms(("auto", "torch"), st.just(torch.float32)))
def layer_norm_lstm(case: tuple[Any, ...]) -> str:
    return layer_norm_call(case)


@fuzzed(layer_norms(("triton", "small", "step"), st.just(torch.float32)))
def layer_norm_lstm_kernels(case: tuple[Any, ...]) -> str:
    return layer_norm_call(case)
