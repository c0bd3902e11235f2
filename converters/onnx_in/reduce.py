"""Handlers: reductions, positions and running sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jquant.ops as ops
from jquant.types import Op

from .call import Call, Handler, axes_of, axis_of
from .values import Result, Value, require


def over(call: Call, x: Value) -> dict[str, Any] | None:
    """Axes and keepdims; None where nothing is reduced. Axes are an operand since opset 18, that of a sum since 13."""
    given = call.optional_integers(1, "axes")
    if not given:
        if call.flag("noop_with_empty_axes"):
            return None
        given = tuple(range(x.rank))
    return {"axes": axes_of(given, x.rank), "keepdims": call.flag("keepdims", True)}


def reduction(*steps: Callable[..., Op] | Op) -> Handler:
    """Functions before the reduction, the reduction (a class), functions after it."""

    def handler(call: Call) -> Result:
        x = call.value(0)
        found = over(call, x)
        require(found is not None or len(steps) == 1, "nothing is reduced")
        if found is None:
            return x
        require(x.shape[0] is not None or 0 not in found["axes"] if x.rank else False, "it reduces the batch")
        x = counted(call, x) if ops.Sum in steps else x
        for i, step in enumerate(steps, start=1):
            op = step if isinstance(step, Op) else step(**found)
            operands = (x, x) if isinstance(op, ops.Mul) else (x,)
            x = call.make(op, *operands, part="" if i == len(steps) else type(op).__name__.lower())
        return x

    return handler


def counted(call: Call, x: Value) -> Value:
    """A mask or pixel behind its cast to integers, which jquant sums as it is."""
    op, operands = call.maker(x)
    if isinstance(op, ops.Add) and len(operands) == 2:
        source, zero = call.graph.value_of(operands[0]), call.graph.maker_of(operands[1])
        if source.dtype in ("bool", "uint8") and isinstance(zero, ops.IntegerConstant) and not any(zero.values):
            return source
    return x


def log_sum_exp(call: Call) -> Result:
    """m + log(sum(exp(x - m))) with m the maximum."""
    x = call.real(0)
    found = over(call, x)
    require(found is not None, "nothing is reduced")
    assert found is not None
    axes, keepdims = found["axes"], found["keepdims"]
    kept = call.make(ops.ReduceMax(axes=axes, keepdims=True), x, part="max")
    shifted = call.make(ops.Exp(), call.make(ops.Sub(), x, kept, part="shifted"), part="exp")
    total = call.make(ops.Log(), call.make(ops.Sum(axes=axes, keepdims=keepdims), shifted, part="sum"), part="log")
    largest = kept if keepdims else call.make(ops.ReduceMax(axes=axes), x, part="largest")
    return call.make(ops.Add(), total, largest)


def position(cls: Callable[..., Op]) -> Handler:
    def handler(call: Call) -> Result:
        x = call.value(0)
        require(not call.flag("select_last_index"), "select_last_index=1; the first one of several is found here")
        axis = axis_of(call.integer("axis", 0), x.rank)
        require(x.rank > 0 and x.shape[axis] is not None, "it searches the batch")
        return call.make(cls(axis=axis, keepdims=call.flag("keepdims", True)), x)

    return handler


def running_sum(call: Call) -> Result:
    x = counted(call, call.value(0))
    axis = axis_of(int(call.known_number(1, "axis")), x.rank)
    require(x.rank > 0 and x.shape[axis] is not None, "it sums over the batch")
    return call.make(ops.CumSum(axis=axis, exclusive=call.flag("exclusive"), reverse=call.flag("reverse")), x)


def norm(order: Any) -> Callable[..., Op]:
    return lambda axes, keepdims: ops.Norm(axes=axes, keepdims=keepdims, order=order)


TABLE: dict[str, Handler] = {
    "ArgMax": position(ops.ArgMax),
    "ArgMin": position(ops.ArgMin),
    "CumSum": running_sum,
    "ReduceL1": reduction(norm("1")),
    "ReduceL2": reduction(norm("2")),
    "ReduceLogSum": reduction(ops.Sum, ops.Log()),
    "ReduceLogSumExp": log_sum_exp,
    "ReduceMax": reduction(ops.ReduceMax),
    "ReduceMean": reduction(ops.Mean),
    "ReduceMin": reduction(ops.ReduceMin),
    "ReduceSum": reduction(ops.Sum),
    "ReduceSumSquare": reduction(ops.Mul(), ops.Sum),
}
