"""LSTM and GRU: a node for each layer, direction and result in use. RNN, and an LSTM with proj_size: their steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Node

import jquant.ops as ops
from jquant.types import Op

from .call import Call, Handler, aten, constant_of, require, reshaped, shape_of
from .movement import sliced

ROLES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
PLAIN: dict[str, Op] = {"tanh": ops.Tanh(), "relu": ops.Relu()}  # of nn.RNN
ZEROS = (aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default)


def is_zero(state: Node) -> bool:
    """Whether an initial state is the zeros that nn.LSTM makes where none is given."""
    known = constant_of(state)
    return state.target in ZEROS or (known is not None and not bool(known.any()))


def row(state: Node, i: int) -> Call:
    """Layer and direction i of a state [layers, N, H]."""
    return reshaped(shape_of(state)[1:], sliced(state, 0, i, i + 1, label=f"slice{i}"), f"state{i}")


def layers(
    kind: str,
    x: Any,
    states: Sequence[Node],
    params: Sequence[Node],
    has_biases: bool,
    count: int,
    rate: float,
    bidirectional: bool,
    steps: int,
) -> list[Any]:
    """The sequence [N, T, directions * H] of the last layer, then a list of rows for each state."""
    directions = 2 if bidirectional else 1
    roles = ROLES if has_biases else ROLES[:2]
    if len(params) != count * directions * len(roles):
        roles = (*roles, "weight_hr")  # of proj_size
    require(len(params) == count * directions * len(roles), f"{len(params)} parameters of {count} layers")
    groups = [dict(zip(roles, params[i : i + len(roles)], strict=True)) for i in range(0, len(params), len(roles))]
    outputs = ("hidden", "cell")[: len(states)]
    zero = all(is_zero(s) for s in states)
    finals: list[list[Call]] = [[] for _ in outputs]
    for layer in range(count):
        sequences = []
        for direction in range(directions):
            i = layer * directions + direction
            operands = (x, *(() if zero else (row(s, i) for s in states)))
            label = f"layer{layer}{'r' if direction else ''}"
            sequence, *last = direction_of(kind, direction == 1, outputs, operands, groups[i], label, steps)
            sequences.append(sequence)
            for state, rows in zip(last, finals, strict=True):
                rows.append(state)
        x = sequences[0]
        if bidirectional:
            x = Call(ops.Cat(axis=2), tuple(sequences), label=f"layer{layer}.cat")
        if rate and layer + 1 < count:
            x = Call(ops.Dropout(rate=rate), (x,), label=f"layer{layer}.dropout")
    return [x, *finals]


def direction_of(
    kind: str,
    reverse: bool,
    outputs: Sequence[str],
    operands: tuple[Any, ...],
    params: dict[str, Node],
    label: str,
    steps: int,
) -> list[Call]:
    """The sequence and the last states of a layer in one direction."""
    if "weight_hr" in params:
        return projected(reverse, operands, params, label, steps)
    if kind in PLAIN:
        return unrolled(kind, reverse, operands, params, label, steps)
    return [one(kind, reverse, output, operands, params, label) for output in ("sequence", *outputs)]


def unrolled(
    kind: str, reverse: bool, operands: tuple[Any, ...], params: dict[str, Node], label: str, steps: int
) -> list[Call]:
    """The inputs of all steps by one linear layer, then step by step."""
    size = shape_of(params["weight_hh"])[0]
    inputs = Call(ops.Linear(), operands[:1], weights(params, "ih"), f"{label}.input")
    hidden = operands[1] if len(operands) > 1 else None
    found: dict[int, Call] = {}
    for t in range(steps)[:: -1 if reverse else 1]:
        part = sliced(inputs, 1, t, t + 1, rank=3, label=f"{label}.{t}.slice")
        gates = Call(ops.Reshape(shape=(-1, size)), (part,), label=f"{label}.{t}.input")
        hidden = found[t] = after(kind, gates, hidden, params, f"{label}.{t}")
    last = found[0 if reverse else steps - 1]
    return [Call(ops.Stack(axis=1), tuple(found[t] for t in range(steps)), label=f"{label}.sequence"), last]


def projected(reverse: bool, operands: tuple[Any, ...], params: dict[str, Node], label: str, steps: int) -> list[Call]:
    """An LSTM whose hidden state is projected before it is fed back: h = W_hr (o * tanh(c))."""
    size = shape_of(params["weight_hh"])[0]
    inputs = Call(ops.Linear(), operands[:1], weights(params, "ih"), f"{label}.input")
    hidden, memory = operands[1:] if len(operands) > 1 else (None, None)
    found: dict[int, Call] = {}
    for t in range(steps)[:: -1 if reverse else 1]:
        at = f"{label}.{t}"
        part = sliced(inputs, 1, t, t + 1, rank=3, label=f"{at}.slice")
        gates: Any = Call(ops.Reshape(shape=(-1, size)), (part,), label=f"{at}.input")
        state = params.get("bias_hh")
        if hidden is not None:
            state = Call(ops.Linear(), (hidden,), weights(params, "hh"), f"{at}.state")
        if state is not None:
            gates = Call(ops.Add(), (gates, state), label=f"{at}.sum")
        hidden, memory = gated(gates, memory, size // 4, params["weight_hr"], at)
        found[t] = hidden
    sequence = Call(ops.Stack(axis=1), tuple(found[t] for t in range(steps)), label=f"{label}.sequence")
    return [sequence, found[0 if reverse else steps - 1], memory]


def gated(gates: Any, memory: Any, size: int, projection: Node, at: str) -> tuple[Call, Call]:
    """The hidden state and the cell behind a step, from its gates [N, 4 * size] in torch's order: i, f, g, o."""
    which = [sliced(gates, 1, k * size, (k + 1) * size if k < 3 else None, rank=2, label=f"{at}.{n}.slice")
             for k, n in enumerate(("i", "f", "g", "o"))]  # fmt: skip
    i, f, o = (Call(ops.Sigmoid(), (which[k],), label=f"{at}.{n}") for k, n in ((0, "i"), (1, "f"), (3, "o")))
    g = Call(ops.Tanh(), (which[2],), label=f"{at}.g")
    new = Call(ops.Mul(), (i, g), label=f"{at}.new")
    if memory is not None:
        kept = Call(ops.Mul(), (f, memory), label=f"{at}.kept")
        new = Call(ops.Add(), (kept, new), label=f"{at}.cell")
    shown = Call(ops.Mul(), (o, Call(ops.Tanh(), (new,), label=f"{at}.tanh")), label=f"{at}.shown")
    return Call(ops.Linear(), (shown,), {"weight": projection, "bias": None}, f"{at}.hidden"), new


def after(kind: str, gates: Any, hidden: Any, params: dict[str, Any], label: str = "", end: str = "hidden") -> Call:
    """The hidden state of a step: without one before, what it adds is its bias."""
    prefix = f"{label}." if label else ""
    state = params.get("bias_hh")
    if hidden is not None:
        state = Call(ops.Linear(), (hidden,), weights(params, "hh"), f"{prefix}state")
    total = gates if state is None else Call(ops.Add(), (gates, state), label=f"{prefix}sum")
    return Call(PLAIN[kind], (total,), label=f"{prefix}{end}" if end else "")


def weights(params: dict[str, Any], which: str) -> dict[str, Any]:
    return {"weight": params[f"weight_{which}"], "bias": params.get(f"bias_{which}")}


def plain_cell(kind: str) -> Handler:
    def handler(
        out: Any, x: Node, hidden: Node, w_ih: Node, w_hh: Node, b_ih: Node | None = None, b_hh: Node | None = None
    ) -> Call:
        params = dict(zip(ROLES, (w_ih, w_hh, b_ih, b_hh), strict=True))
        gates = Call(ops.Linear(), (x,), weights(params, "ih"), "input")
        return after(kind, gates, None if is_zero(hidden) else hidden, params, end="")

    return handler


def one(kind: str, reverse: bool, output: Any, operands: tuple[Any, ...], params: Any, label: str) -> Call:
    op = ops.Lstm(reverse=reverse, output=output) if kind == "lstm" else ops.Gru(reverse=reverse, output=output)
    return Call(op, operands, params, f"{label}.{output}")


def recurrent(kind: str) -> Handler:
    def handler(
        out: Any,
        x: Node,
        states: Any,
        params: Sequence[Node],
        has_biases: bool,
        count: int,
        rate: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> list[Any]:
        shape = shape_of(x)
        require(len(shape) == 3, "an input without a batch axis; add one")
        steps = shape[1 if batch_first else 0]
        require(isinstance(steps, int), "its number of steps is the batch: axis 0 of the input; use batch_first=True")
        source: Any = x if batch_first else Call(ops.Permute(axes=(1, 0, 2)), (x,), label="batch_first")
        states = (states,) if isinstance(states, Node) else tuple(states)
        sequence, *finals = layers(kind, source, states, params, has_biases, count, rate, bidirectional, steps)
        if batch_first:
            result = Call(sequence.op, sequence.operands, sequence.params)
        else:
            result = Call(ops.Permute(axes=(1, 0, 2)), (sequence,))
        return [result, *(Call(ops.Stack(axis=0), tuple(rows)) for rows in finals)]

    return handler


def cell(kind: str) -> Handler:
    """One step: a sequence of length 1."""

    def handler(
        out: Any, x: Node, states: Any, w_ih: Node, w_hh: Node, b_ih: Node | None = None, b_hh: Node | None = None
    ) -> Any:
        shape = shape_of(x)
        require(len(shape) == 2, "an input without a batch axis; add one")
        source = reshaped((shape[0], 1, shape[1]), x, "sequence")
        states = (states,) if isinstance(states, Node) else tuple(states)
        initial = () if all(is_zero(s) for s in states) else states
        params = dict(zip(ROLES, (w_ih, w_hh, b_ih, b_hh), strict=True))
        if kind == "gru":
            return Call(ops.Gru(output="hidden"), (source, *initial), params)
        hidden, memory = (ops.Lstm(output="hidden"), ops.Lstm(output="cell"))
        return [Call(op, (source, *initial), params) for op in (hidden, memory)]

    return handler


TABLE: dict[Any, Handler] = {
    aten.lstm.input: recurrent("lstm"),
    aten.gru.input: recurrent("gru"),
    aten.lstm_cell.default: cell("lstm"),
    aten.gru_cell.default: cell("gru"),
    aten.rnn_tanh.input: recurrent("tanh"),
    aten.rnn_relu.input: recurrent("relu"),
    aten.rnn_tanh_cell.default: plain_cell("tanh"),
    aten.rnn_relu_cell.default: plain_cell("relu"),
}
