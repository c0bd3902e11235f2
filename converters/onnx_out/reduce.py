"""Export rules: reductions, positions, running sums and norms of vectors."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

import jquant.ops as ops

from .writer import Call, Operand, emit


def over(op: Any, call: Call, kind: str, x: str | Operand, part: str = "") -> str:
    return call.reduce(kind, x, op.axes, f"{part}_axes" if part else "axes", part=part, keepdims=int(op.keepdims))


def _terms(call: Call) -> str:
    (x,) = call.inputs
    return x.name if x.dtype == "float32" else call.cast(x, "int32", "as_int32")


@emit.register
def _(op: ops.Mean, call: Call) -> None:
    over(op, call, "ReduceMean", call.number(call.inputs[0], "number"))


@emit.register
def _(op: ops.Sum, call: Call) -> None:
    over(op, call, "ReduceSum", _terms(call))


@emit.register(ops.ReduceMax)
@emit.register(ops.ReduceMin)
def _(op: ops.ReduceMax | ops.ReduceMin, call: Call) -> None:
    over(op, call, type(op).__name__, call.inputs[0])


@emit.register(ops.ReduceAll)
@emit.register(ops.ReduceAny)
def _(op: ops.ReduceAll | ops.ReduceAny, call: Call) -> None:
    mask = call.cast(call.inputs[0], "bool", "mask")
    counted = call.cast(mask, "int32", "as_int32")
    call.cast(over(op, call, "ReduceMin" if isinstance(op, ops.ReduceAll) else "ReduceMax", counted, "reduced"), "bool")


@emit.register(ops.ArgMax)
@emit.register(ops.ArgMin)
def _(op: ops.ArgMax | ops.ArgMin, call: Call) -> None:
    (x,) = call.inputs
    ordered = call.cast(x, "int32", "as_int32") if x.dtype == "bool" else x
    place = call.add(type(op).__name__, ordered, part="place", axis=op.axis, keepdims=int(op.keepdims))
    call.cast(place, "int32")


@emit.register
def _(op: ops.CumSum, call: Call) -> None:
    axis = call.integers(op.axis, "axis")
    call.add("CumSum", _terms(call), axis, exclusive=int(op.exclusive), reverse=int(op.reverse))


@emit.register
def _(op: ops.Variance, call: Call) -> None:
    (x,) = call.inputs
    mean = call.reduce("ReduceMean", x, op.axes, "mean_axes", part="mean", keepdims=1)
    centred = call.add("Sub", x, mean, part="centred")
    square = call.add("Mul", centred, centred, part="square")
    if not op.correction:
        over(op, call, "ReduceMean", square)
        return
    count = prod(call.static(tuple(x.shape[a] for a in op.axes)))
    factor = call.constant(np.float32(count / max(count - op.correction, 1)), "correction")
    call.add("Mul", over(op, call, "ReduceMean", square, "variance"), factor)


_NORMS = {"1": "ReduceL1", "2": "ReduceL2"}


@emit.register
def _(op: ops.Norm, call: Call) -> None:
    if op.order in _NORMS:
        over(op, call, _NORMS[op.order], call.inputs[0])
    else:
        over(op, call, "ReduceMax", call.add("Abs", call.inputs[0], part="magnitude"))
