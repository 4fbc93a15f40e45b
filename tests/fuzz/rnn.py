"""LSTM, GRU, RNN, their cells and the cell functions, LayerNormLSTM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastops
from fastops.ops import rnn_reference
from tests.fuzz.engine import (
    FLOATS,
    KERNEL_FLOATS,
    SEEDED_DROPOUT,
    SEEDS,
    Spec,
    agree,
    agree_modules,
    fuzzed,
    rarely,
    refuses,
    seeded,
    specs,
)

CPU_FLOATS = st.sampled_from([torch.float32, torch.float32, torch.bfloat16])
WRONG = ("input width", "input rank", "state shape", "state rank", "input dtype", "state dtype", "integers", "no steps")
SHORT_INTEGERS = (torch.int32, torch.int16, torch.int8, torch.uint8)
WRONG_LENGTHS = ("lengths", "lengths", "lengths of one sequence", "lengths beside packed ones")


@st.composite
def wrong_lengths(draw: Any, steps: int, batch: int) -> Any:
    """Of a padded batch."""
    lengths = torch.ones(batch, dtype=torch.int64)
    kind = draw(st.sampled_from(["dtype", "shape", "no tensor", "too long", "negative"]))
    if kind == "dtype":
        return lengths.to(draw(st.sampled_from([torch.float32, torch.float64, torch.bool])))
    if kind == "shape":
        return draw(st.sampled_from([lengths[:-1], lengths[:, None], lengths[0], torch.cat([lengths, lengths])]))
    if kind == "no tensor":
        return draw(st.sampled_from([lengths.tolist(), steps, "1", ()]))
    # some of 33 bits: cut to 32 they would be within 0..T
    number = st.one_of(st.integers(steps + 1, steps + 3), st.integers(2**32, 2**32 + steps))
    lengths[draw(st.integers(0, batch - 1))] = draw(number) * (1 if kind == "too long" else -1)
    return lengths


@dataclass(frozen=True)
class Recurrent:
    name: str  # LSTM, GRU, RNN
    sizes: tuple[int, int]
    options: dict[str, Any]
    dtype: torch.dtype
    input: Spec
    states: tuple[Spec, ...]  # none for zeros
    lengths: Any  # a tensor; where illegal, anything
    packed: bool
    illegal: bool  # by the lengths, which torch does not take
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
    wrong = draw(rarely(st.just("none"), st.sampled_from((*WRONG, *WRONG_LENGTHS))))
    steps, batch = 0 if wrong == "no steps" else draw(st.integers(1, 4)), draw(st.integers(1, 3))
    illegal = wrong.startswith("lengths")
    batched = draw(st.integers(0, 3)) > 0 if not illegal else wrong != "lengths of one sequence"
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
    lengths, packed, impl = None, False, draw(st.sampled_from(impls))
    if wrong == "lengths":
        lengths = draw(wrong_lengths(steps, batch))
    elif illegal or (batched and wrong == "none" and draw(st.booleans())):
        packed = wrong == "lengths beside packed ones" or (not illegal and draw(st.booleans()))
        numbers = [draw(st.integers(1 if packed else 0, steps)) for _ in range(batch)]
        lengths = torch.tensor(numbers, dtype=draw(rarely(st.just(torch.int64), st.sampled_from(SHORT_INTEGERS))))
    if options["num_layers"] > 1:
        # torch drops numbers of the packed rows; where ours are padded, others are dropped, unless it is all of them
        alike = lengths is None or (packed and impl in ("auto", "torch"))
        options["dropout"] = draw(st.sampled_from([0.0, 0.0, 0.5 if alike and SEEDED_DROPOUT else 1.0, 1.0]))
    given = draw(specs(shape, kind))
    return Recurrent(name, (size, hidden), options, dtype, given, states, lengths, packed, illegal, impl, draw(SEEDS))


def build(make: Any, case: Recurrent, **more: Any) -> nn.Module:
    torch.manual_seed(case.seed)
    return make(*case.sizes, dtype=case.dtype, **case.options, **more)


def recurrent_call(case: Recurrent) -> str:
    stock = build(getattr(nn, case.name), case)
    ours = build(getattr(fastops.nn, case.name), case, impl=case.impl)
    double = build(getattr(nn, case.name), case).double()
    double.load_state_dict(stock.state_dict())
    batch_first = case.options["batch_first"]
    lengths, lstm = case.lengths, case.name == "LSTM"

    def padded(module: nn.Module, x: Tensor, hx: Any) -> Any:
        """By torch, which packs no row without a step: such a row is run for one, and nothing is kept of it."""
        packed = pack_padded_sequence(x, lengths.long().clamp(min=1), batch_first, enforce_sorted=False)
        out, finals = module(packed, hx)
        out = pad_packed_sequence(out, batch_first, total_length=x.shape[1 if batch_first else 0])[0]
        dead = lengths == 0
        out = out.masked_fill(dead[:, None, None] if batch_first else dead[:, None], 0.0)
        ends = finals if lstm else (finals,)
        starts = [torch.zeros_like(end) for end in ends] if hx is None else hx if lstm else (hx,)
        ends = [torch.where(dead[:, None], start, end) for start, end in zip(starts, ends, strict=True)]
        return out, tuple(ends) if lstm else ends[0]

    def through(module: nn.Module, mine: bool) -> Any:
        def call(x: Tensor, *states: Tensor) -> Any:
            hx = None if not states else states if lstm else states[0]
            if lengths is None:
                return module(x, hx)
            if case.illegal and case.packed:
                return module(pack_padded_sequence(x, lengths.long(), batch_first, False), hx, lengths=lengths)
            if mine and not case.packed:
                return module(x, hx, lengths=lengths)
            return padded(module, x, hx)

        return seeded(call, case.seed)

    arguments = [case.input, *case.states]
    if case.illegal:
        return refuses(through(ours, True), arguments, "lengths")
    return agree(
        through(ours, True),
        through(stock, False),
        arguments,
        explicit=case.impl not in ("auto", "torch"),
        extra=list(ours.parameters()),
        stock_extra=list(stock.parameters()),
        truth_of=through(double, False),
        truth_extra=list(double.parameters()),
    )


@fuzzed(recurrent(("auto", "torch"), CPU_FLOATS, 2))
def recurrent_modules(case: Recurrent) -> str:
    return recurrent_call(case)


@fuzzed(recurrent(("auto", "torch"), CPU_FLOATS, 2))
def recurrent_modules_packed(case: Recurrent) -> str:
    """As on a CPU with layers large enough for that."""
    with mock.patch.object(rnn_reference, "PACKING_PAYS", dict.fromkeys(rnn_reference.PACKING_PAYS, (1.0, 0))):
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


@dataclass(frozen=True)
class LayerNorm:
    hidden: int
    options: dict[str, Any]
    dtype: torch.dtype
    training: bool
    tensors: tuple[Spec, ...]  # input, h0 and c0 or neither
    lengths: Any  # a tensor; where illegal, anything
    packed: bool
    illegal: tuple[str, ...]  # names of the wrong argument, one of which the error has
    impl: str
    seed: int


RATES = (0.0, 0.1, (0.5, 0.0), 1.0, (0, 1))
WRONG_RATES = (1.5, -0.1, (0.1, 2.0), (0.1,), (0.1, 0.1, 0.1), (), float("nan"), "0.1", None, (None, 0.1))
HIDDEN = ("hidden", "hx", "h0", "c0")  # as torch calls the states, and as the op does
LAYER_NORM_WRONG = {
    "input width": ("input",),
    "input rank": ("input",),
    "input dtype": ("input",),
    "state shape": HIDDEN,
    "state rank": HIDDEN,
    "state dtype": HIDDEN,
    "one state": HIDDEN,
    "zoneout": ("zoneout",),
    "no steps": ("sequence length",),
    **dict.fromkeys(WRONG_LENGTHS, ("lengths",)),
}


@st.composite
def layer_norms(draw: Any, impls: tuple[str, ...], dtypes: Any) -> LayerNorm:
    dtype, wrong = draw(dtypes), draw(rarely(st.just("none"), st.sampled_from(sorted(LAYER_NORM_WRONG))))
    layers = st.integers(1, 2) if "auto" in impls else rarely(st.just(1), st.just(2))  # a kernel runs a layer each
    options: dict[str, Any] = {"num_layers": draw(layers), "bias": draw(st.booleans())}
    options["batch_first"] = draw(st.booleans())
    options["bidirectional"] = draw(st.booleans())
    options["zoneout"] = draw(st.sampled_from(WRONG_RATES if wrong == "zoneout" else RATES))
    if options["num_layers"] > 1:
        options["dropout"] = draw(st.sampled_from([0.0, 0.5 if SEEDED_DROPOUT else 1.0, 1.0]))
    steps, batch, hidden = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(2, 5))
    steps = 0 if wrong == "no steps" else steps
    batched = draw(rarely(st.just(True), st.just(False)))
    if "lengths" in wrong:
        batched = wrong != "lengths of one sequence"
    shape: tuple[int, ...] = (batch, steps, 3) if options["batch_first"] else (steps, batch, 3)
    count = options["num_layers"] * (2 if options["bidirectional"] else 1)
    state: tuple[int, ...] = (count, batch, hidden)
    if not batched:
        shape, state = (steps, 3), (count, hidden)
    if wrong == "input width":
        shape = (*shape[:-1], draw(st.sampled_from([1, 4])))
    if wrong == "input rank":
        shape = draw(st.sampled_from([(3,), (1, *shape) if batched else (1, 1, *shape)]))
    given = [draw(specs(shape, torch.float64 if wrong == "input dtype" else dtype))]
    if "state" in wrong or draw(st.booleans()):
        shapes, place = [state, state], draw(st.integers(0, 1))
        if wrong == "state shape":
            axis = draw(st.integers(0, len(state) - 1))
            shapes[place] = tuple(size + (i == axis) for i, size in enumerate(state))
        if wrong == "state rank":
            shapes[place] = draw(st.sampled_from([state[1:], (1, *state)]))
        kinds = [torch.float64 if wrong == "state dtype" and i == place else dtype for i in range(2)]
        given += [draw(specs(s, kind)) for s, kind in zip(shapes, kinds, strict=True)]
    given = given[:2] if wrong == "one state" else given
    lengths, packed = None, False
    if wrong == "lengths":
        lengths = draw(wrong_lengths(steps, batch))
    elif "lengths" in wrong or (wrong == "none" and batched and draw(st.booleans())):
        packed = wrong == "lengths beside packed ones" or (
            wrong == "none" and draw(rarely(st.just(False), st.just(True)))
        )
        numbers = [draw(st.integers(1 if packed else 0, steps)) for _ in range(batch)]
        lengths = torch.tensor(numbers, dtype=draw(rarely(st.just(torch.int64), st.sampled_from(SHORT_INTEGERS))))
    names, training = LAYER_NORM_WRONG.get(wrong, ()), draw(st.booleans())
    if training and packed:  # of sorted rows others would be dropped
        options |= {"zoneout": 0.0, "dropout": 0.0}
    impl = draw(st.sampled_from(impls))
    return LayerNorm(hidden, options, dtype, training, tuple(given), lengths, packed, names, impl, draw(SEEDS))


def layer_norm_formula(module: Any, lengths: Tensor | None, seed: int) -> Any:
    """Row by row and step by step what the module's docstring says."""

    def call(x: Tensor, *states: Tensor) -> Any:
        batched = x.dim() == 3
        if not batched:
            x, states = x[:, None], tuple(s[:, None] for s in states)
        x = x.transpose(0, 1) if module.batch_first and batched else x
        steps, batch = x.shape[:2]
        ends_at = [steps] * batch if lengths is None else lengths.tolist()
        finals: list[list[Tensor]] = [[], []]
        directions = 2 if module.bidirectional else 1
        for layer in range(module.num_layers):
            outs = []
            for direction in range(directions):
                suffix, place = f"_l{layer}" + "_reverse" * direction, layer * directions + direction
                w = {n: getattr(module, n + suffix, None) for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
                w |= {n: getattr(module, n + suffix) for n in ("gain_ih", "gain_hh", "gain_c", "bias_c")}
                kept = None
                if module.training and any(module.zoneout):
                    kept = torch.rand(2, steps, batch, module.hidden_size)
                rows, ends = [], []
                for row, length in enumerate(ends_at):
                    zero = x.new_zeros(module.hidden_size)
                    h, c = (s[place, row] for s in states) if states else (zero, zero)
                    found = [zero] * steps
                    for count in range(length):
                        t = length - 1 - count if direction else count
                        rates: Any = module.zoneout
                        if kept is not None:  # drawn for each step, in the order in which they are run
                            rates = [(kept[i, count, row] < rate).to(x.dtype) for i, rate in enumerate(rates)]
                        h, c = _step(module, w, x[t, row], h, c, rates)
                        found[t] = h
                    rows.append(torch.stack(found))
                    ends.append((h, c))
                outs.append(torch.stack(rows, 1))
                for k in range(2):
                    finals[k].append(torch.stack([end[k] for end in ends]))
            x = torch.cat(outs, -1)
            if module.training and module.dropout and layer + 1 < module.num_layers:
                x = F.dropout(x, module.dropout)
        lasts = tuple(torch.stack(f) for f in finals)
        if not batched:
            return x[:, 0], tuple(last[:, 0] for last in lasts)
        return (x.transpose(0, 1) if module.batch_first else x), lasts

    return seeded(call, seed)


def _step(
    module: Any, w: dict[str, Any], x: Tensor, h: Tensor, c: Tensor, rates: tuple[Any, Any]
) -> tuple[Tensor, Tensor]:
    size = module.hidden_size
    gates = F.layer_norm(w["weight_ih"] @ x, (4 * size,), w["gain_ih"], None, module.eps)
    gates = gates + F.layer_norm(w["weight_hh"] @ h, (4 * size,), w["gain_hh"], None, module.eps)
    if w["bias_ih"] is not None:
        gates = gates + w["bias_ih"] + w["bias_hh"]
    i, f, g, o = gates.chunk(4)
    candidate = f.sigmoid() * c + i.sigmoid() * g.tanh()
    output = o.sigmoid() * F.layer_norm(candidate, (size,), w["gain_c"], w["bias_c"], module.eps).tanh()
    rate_h, rate_c = rates
    return rate_h * h + (1 - rate_h) * output, rate_c * c + (1 - rate_c) * candidate


def layer_norm_call(case: LayerNorm) -> str:
    def module() -> Any:
        torch.manual_seed(case.seed)
        made = fastops.nn.LayerNormLSTM(3, case.hidden, **case.options, dtype=case.dtype, impl=case.impl)
        return made.train(case.training)

    def through(net: Any) -> Any:
        def call(x: Tensor, *states: Tensor) -> Any:
            if not case.packed:
                return net(x, states or None, lengths=case.lengths)
            packed = pack_padded_sequence(x, case.lengths.long(), net.batch_first, enforce_sorted=False)
            if case.illegal:
                return net(packed, states or None, lengths=case.lengths)
            out, finals = net(packed, states or None)
            steps = x.shape[1 if net.batch_first else 0]
            return pad_packed_sequence(out, net.batch_first, total_length=steps)[0], finals

        return seeded(call, case.seed)

    if case.illegal:
        return refuses(lambda *given: through(module())(*given), case.tensors, *case.illegal)
    ours, stock, double = module(), module(), module().double()
    double.load_state_dict(stock.state_dict())
    return agree(
        through(ours),
        layer_norm_formula(stock, case.lengths, case.seed),
        case.tensors,
        explicit=case.impl not in ("auto", "torch"),
        extra=list(ours.parameters()),
        stock_extra=list(stock.parameters()),
        truth_of=layer_norm_formula(double, case.lengths, case.seed),
        truth_extra=list(double.parameters()),
    )


@fuzzed(layer_norms(("auto", "torch"), st.just(torch.float32)))
def layer_norm_lstm(case: LayerNorm) -> str:
    return layer_norm_call(case)


@fuzzed(layer_norms(("triton", "small", "step"), st.just(torch.float32)))
def layer_norm_lstm_kernels(case: LayerNorm) -> str:
    return layer_norm_call(case)
