"""Recurrences without an operator, step by step: RNN, and GRU whose reset gate acts before the product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

import jquant.ops as ops

from .call import Call
from .values import Known, Value, known, require

MAX_STEPS = 1024


@dataclass(frozen=True)
class Layer:
    """Weights of one direction, each one object, so that all steps share one parameter."""

    weight_ih: Known
    weight_hh: Known
    bias_ih: Known | None
    bias_hh: Known | None

    def rows(self, start: int, stop: int) -> Layer:
        """The part of some gates."""
        parts = [None if p is None else known(p.at[0][start:stop]) for p in
                 (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)]  # fmt: skip
        return Layer(*parts)  # type: ignore[arg-type]


def unrolled(
    call: Call, kind: str, x: Value, initial: tuple[Value, ...], params: dict[str, Known], reverse: bool, at: int
) -> list[Value]:
    """The sequence [N, T, H] and the last state [N, H], of x [N, T, C]."""
    steps = x.shape[1]
    require(steps is not None and 0 < steps <= MAX_STEPS, f"{steps} steps, which become operators each")
    assert steps is not None
    layer = Layer(*(params.get(role) for role in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")))  # type: ignore[arg-type]
    prefix = f"d{at}_"
    inputs = _linear(call, x, layer.weight_ih, layer.bias_ih, f"{prefix}input")
    size = layer.weight_hh.at[0].shape[1]
    gates = [layer.rows(0, size), layer.rows(size, 2 * size), layer.rows(2 * size, 3 * size)] if kind == "gru" else []
    state: Value | None = initial[0] if initial else None
    found: dict[int, Value] = {}
    for t in range(steps)[:: -1 if reverse else 1]:
        step = _slice(call, inputs, 1, t, t + 1, f"{prefix}slice")
        step = call.make(ops.Reshape(shape=(-1, inputs.shapes[0][2])), step, part=f"{prefix}step")
        if kind == "rnn":
            state = _plain(call, step, state, layer, at, prefix)
        else:
            state = _gru(call, step, state, gates, size, prefix)
        found[t] = state
    sequence = call.make(ops.Stack(axis=1), *(found[t] for t in range(steps)), part=f"{prefix}sequence")
    return [sequence, found[0 if reverse else steps - 1]]


def _plain(call: Call, step: Value, state: Value | None, layer: Layer, at: int, prefix: str) -> Value:
    names = call.attribute("activations", "strings") or ("Tanh",)
    op = ops.Relu() if names[at if at < len(names) else -1] == "Relu" else ops.Tanh()
    return call.make(op, _with_state(call, step, state, layer, prefix), part=f"{prefix}hidden")


def _gru(call: Call, step: Value, state: Value | None, gates: list[Layer], size: int, prefix: str) -> Value:
    """n = tanh(x W + b + (r h) R + c), h' = n + z (h - n). The gates are r, z, n here, torch's order."""

    def of_input(k: int, letter: str) -> Value:
        return _slice(call, step, 1, k * size, (k + 1) * size if k < 2 else None, f"{prefix}{letter}_input")

    def gate(k: int, letter: str) -> Value:
        total = _with_state(call, of_input(k, letter), state, gates[k], f"{prefix}{letter}_")
        return call.make(ops.Sigmoid(), total, part=f"{prefix}{letter}")

    reset = None
    if state is not None:
        reset = call.make(ops.Mul(), gate(0, "r"), state, part=f"{prefix}reset")
    total = _with_state(call, of_input(2, "n"), reset, gates[2], f"{prefix}n_")
    new = call.make(ops.Tanh(), total, part=f"{prefix}n")
    z = gate(1, "z")
    if state is None:
        kept = call.make(ops.Mul(), z, new, part=f"{prefix}kept")
        return call.make(ops.Sub(), new, kept, part=f"{prefix}hidden")
    change = call.make(ops.Sub(), state, new, part=f"{prefix}change")
    kept = call.make(ops.Mul(), z, change, part=f"{prefix}kept")
    return call.make(ops.Add(), new, kept, part=f"{prefix}hidden")


def _with_state(call: Call, step: Value, state: Value | None, layer: Layer, prefix: str) -> Value:
    """What a step adds to its inputs: without a state before, a bias."""
    if state is not None:
        added = _linear(call, state, layer.weight_hh, layer.bias_hh, f"{prefix}state")
    elif layer.bias_hh is not None and np.any(layer.bias_hh.at[0]):
        added = call.as_value(layer.bias_hh, f"{call.name}.{prefix}bias")
    else:
        return step
    return call.make(ops.Add(), step, added, part=f"{prefix}sum")


def _linear(call: Call, x: Value, weight: Known, bias: Known | None, part: str) -> Value:
    params: dict[str, Known] = {"weight": weight} | ({} if bias is None else {"bias": bias})
    return call.make(ops.Linear(), x, params=params, part=part)


def _slice(call: Call, x: Value, axis: int, start: int, stop: int | None, part: str) -> Value:
    bounds: Any = [(start, stop, 1) if a == axis else (0, None, 1) for a in range(x.rank)]
    starts, stops, steps = zip(*bounds, strict=True)
    return call.make(ops.Slice(starts=starts, stops=stops, steps=steps), x, part=part)
