"""Export rules: LSTM and GRU. ONNX stacks the gates of an LSTM as i, o, f, g and those of a GRU as z, r, h."""

from __future__ import annotations

from typing import Any

import numpy as np

import jquant.ops as ops

from .writer import Call, emit

LSTM_ORDER = (0, 3, 1, 2)  # of torch's i, f, g, o in i, o, f, g
GRU_ORDER = (1, 0, 2)  # of torch's r, z, n in z, r, h


def _reordered(weight: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    """[G * H, ...] with the blocks of the gates in another order."""
    gates = weight.reshape(len(order), -1, *weight.shape[1:])
    return gates[list(order)].reshape(weight.shape)


@emit.register
def _(op: ops.Lstm, call: Call) -> None:
    _layer(op, call, "LSTM", LSTM_ORDER)


@emit.register
def _(op: ops.Gru, call: Call) -> None:
    _layer(op, call, "GRU", GRU_ORDER, linear_before_reset=1)


def _layer(op: ops.Lstm | ops.Gru, call: Call, kind: str, order: tuple[int, ...], **attributes: Any) -> None:
    x, *states = call.inputs
    hidden = call.param_shapes["weight_hh"][1]
    size = len(order) * hidden
    weights = [call.constant(_reordered(call.arrays[r], order)[None], r) for r in ("weight_ih", "weight_hh")]
    biases = [_reordered(call.arrays[r], order) if r in call.arrays else np.zeros(size) for r in ("bias_ih", "bias_hh")]
    bias = call.constant(np.concatenate(biases)[None], "bias")
    first = call.integers([0], "direction")
    initial = [call.add("Unsqueeze", s, first, part="initial") for s in states]
    steps = call.add("Transpose", x, part="time_first", perm=[1, 0, 2])
    place = {"sequence": 0, "hidden": 1, "cell": 2}[op.output]
    outputs = ["", "", ""][: 3 if kind == "LSTM" else 2]
    outputs[place] = call.writer.unique(f"{call.name}:{op.output}")
    call.writer.node(
        kind,
        (steps, *weights, bias, "", *initial),
        tuple(outputs),
        call.name,
        hidden_size=hidden,
        direction="reverse" if op.reverse else "forward",
        **attributes,
    )
    if op.output == "sequence":  # [T, 1, N, H]
        joined = call.add("Squeeze", outputs[place], call.integers([1], "axis"), part="squeezed")
        call.add("Transpose", joined, title=f"{call.name}:batch_first", perm=[1, 0, 2])
    else:
        call.add("Squeeze", outputs[place], first, title=f"{call.name}:state")
