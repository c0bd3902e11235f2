"""LSTM and GRU: a node for each layer, direction and result that is used. RNN: its steps one by one."""

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
    require(
        len(params) == count * directions * len(roles),
        "a projection (proj_size), which feeds back "
        "into the recurrence; there is no operator for it, and a linear layer behind is another model: train one with "
        "proj_size=0",
    )
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
