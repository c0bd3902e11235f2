"""Handlers: LSTM, GRU and RNN. ONNX stacks the gates of an LSTM as i, o, f, g and those of a GRU as z, r, h."""

from __future__ import annotations

from typing import Any

import numpy as np

import jquant.ops as ops

from .call import Call, Handler
from .layers import weight_of
from .movement import reshaped
from .unrolled import unrolled
from .values import Known, Result, Value, known, require

ORDERS = {"lstm": (0, 2, 3, 1), "gru": (1, 0, 2), "rnn": (0,)}  # of ONNX's gates in torch's order


def _reordered(weight: np.ndarray, order: tuple[int, ...]) -> Known:
    gates = weight.reshape(len(order), -1, *weight.shape[1:])
    return known(gates[list(order)].reshape(weight.shape))


def recurrent(kind: str) -> Handler:
    def handler(call: Call) -> list[Result]:
        order, x = ORDERS[kind], call.real(0)
        require(x.rank == 3, f"an input of {x.rank} axes")
        direction = call.text("direction", "forward")
        require(direction in ("forward", "reverse", "bidirectional"), f"direction={direction!r}")
        reverses = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}[direction]
        _check(call, kind)
        first = call.flag("layout")
        sequence = x if first else call.make(ops.Permute(axes=(1, 0, 2)), x, part="batch_first")
        weights = [weight_of(call, i, what).at[0] for i, what in ((1, "W"), (2, "R"))]
        gates, hidden = len(order) * weights[1].shape[-1], weights[1].shape[-1]
        count = len(reverses)
        require(
            weights[0].shape == (count, gates, x.shapes[0][2]) and weights[1].shape == (count, gates, hidden), "W, R"
        )
        bias = weight_of(call, 3, "B").at[0] if call.given(3) else None
        require(bias is None or bias.shape == (count, 2 * gates), "B")
        states = [5, 6] if kind == "lstm" else [5]
        rows = []
        for at, reverse in enumerate(reverses):
            params = {"weight_ih": _reordered(weights[0][at], order), "weight_hh": _reordered(weights[1][at], order)}
            if bias is not None:
                params["bias_ih"] = _reordered(bias[at][:gates], order)
                params["bias_hh"] = _reordered(bias[at][gates:], order)
            initial = _initial(call, states, at, x, first, hidden)
            rows.append(_outputs(call, kind, sequence, initial, params, reverse, at))
        return _joined(call, rows, first)

    return handler


def _check(call: Call, kind: str) -> None:
    activations = call.attribute("activations", "strings")
    if kind == "rnn":
        plain = [a in ("Tanh", "Relu") for a in activations or ()]
        require(all(plain) and len(plain) in (0, 1, 2), f"activations {activations}")
    usual = ("Sigmoid", "Tanh", "Tanh") if kind == "lstm" else ("Sigmoid", "Tanh")
    require(
        kind == "rnn" or activations is None or tuple(activations) in (usual, usual * 2), f"activations {activations}"
    )
    require(call.attribute("clip", "float") is None, "a clip of its gates")
    require(not call.flag("input_forget"), "input_forget=1")
    require(not call.given(4), "lengths of sequences; pad them to one")
    require(not call.given(7), "peepholes")


def _initial(call: Call, states: list[int], at: int, x: Value, first: bool, hidden: int) -> tuple[Value, ...]:
    """The states [N, H] before the first step; none where they are left out, or known zeros."""
    if all(not call.given(i) or _is_zero(call.operand(i)) for i in states):
        return ()
    found = []
    for i in states:
        require(call.given(i), "one of two initial states")
        state = call.real(i)
        axis = 1 if first else 0
        bounds: list[tuple[int, int | None, int]] = [(0, None, 1)] * 3
        bounds[axis] = (at, at + 1, 1)
        starts, stops, steps = zip(*bounds, strict=True)
        piece = call.make(ops.Slice(starts=starts, stops=stops, steps=steps), state, part=f"state_{i}_{at}")
        batch = tuple(s[0 if first else 1] for s in x.shapes)
        found.append(reshaped(call, piece, ((batch[0], hidden), (batch[1], hidden)), part=f"initial_{i}_{at}"))
    return tuple(found)


def _is_zero(value: Any) -> bool:
    return isinstance(value, Known) and not any(part.any() for part in value.at)


def _outputs(
    call: Call, kind: str, x: Value, initial: tuple[Value, ...], params: dict[str, Known], reverse: bool, at: int
) -> list[Value]:
    names: tuple[Any, ...] = ("sequence", "hidden", "cell") if kind == "lstm" else ("sequence", "hidden")
    make: Any = ops.Lstm if kind == "lstm" else ops.Gru
    suffix = f"_{at}" if at else ""
    if kind == "rnn" or (kind == "gru" and not call.flag("linear_before_reset")):
        return unrolled(call, kind, x, initial, params, reverse, at)
    return [
        call.make(make(reverse=reverse, output=name), x, *initial, params=params, part=f"{name}{suffix}")
        for name in names
    ]


def _joined(call: Call, rows: list[list[Value]], first: bool) -> list[Result]:
    """[T, D, N, H] and states [D, N, H]; with layout 1 the batch comes first."""
    axis = 2 if first else 1
    sequences = [row[0] for row in rows]
    if not first:
        sequences = [call.make(ops.Permute(axes=(1, 0, 2)), s, part=f"time_first_{i}") for i, s in enumerate(sequences)]
    found: list[Result] = [_stacked(call, sequences, axis, "Y")]
    for i, name in enumerate(("Y_h", "Y_c")[: len(rows[0]) - 1], start=1):
        found.append(_stacked(call, [row[i] for row in rows], 1 if first else 0, name))
    return found


def _stacked(call: Call, parts: list[Value], axis: int, name: str) -> Value:
    """Of one direction, the axis that a Squeeze takes out again."""
    if len(parts) > 1:
        return call.make(ops.Stack(axis=axis), *parts, part=name)
    small, large = ((*s[:axis], 1, *s[axis:]) for s in parts[0].shapes)
    return reshaped(call, parts[0], (small, large), part=name)


TABLE: dict[str, Handler] = {"GRU": recurrent("gru"), "LSTM": recurrent("lstm"), "RNN": recurrent("rnn")}
