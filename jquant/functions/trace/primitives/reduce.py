"""Reductions over axes and over windows, running sums, order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import jquant.ops as ops
from jquant.drafts.values import Known, Value
from jquant.functions.trace.primitives.common import is_float, out_dtype, out_shape, require, require_dtypes
from jquant.functions.trace.reader import Reader


def reduction(op: Any, *, dtypes: tuple[str, ...] = ("float32",)) -> Callable[..., Any]:
    def handle(reader: Reader, equation: Any, x: Value) -> Value:
        require_dtypes(dtypes, x)
        axes = tuple(int(a) for a in equation.params["axes"])
        if not axes:
            return x
        return reader.draft(op(axes=axes), x, shape=out_shape(equation), dtype=out_dtype(equation))

    return handle


def position(op: Any) -> Callable[..., Any]:
    def handle(reader: Reader, equation: Any, x: Value) -> Value:
        require_dtypes(("float32", "int32", "uint8"), x)
        require(str(out_dtype(equation)) == "int32", f"positions of {out_dtype(equation)}")
        (axis,) = equation.params["axes"]
        return reader.draft(op(axis=int(axis)), x, shape=out_shape(equation), dtype=np.int32)

    return handle


def cumsum(reader: Reader, equation: Any, x: Value) -> Value:
    require_dtypes(("float32",), x)
    op = ops.CumSum(axis=int(equation.params["axis"]), reverse=bool(equation.params["reverse"]))
    return reader.draft(op, x, shape=x.shape)


def top_k(reader: Reader, equation: Any, x: Value) -> list[Value]:
    require_dtypes(("float32", "int32"), x)
    params = equation.params
    axis = int(params.get("axis", len(x.shape) - 1)) % len(x.shape)
    shape, count = out_shape(equation), int(params["k"])
    return [
        reader.draft(ops.TopK(axis=axis, k=count), x, shape=shape),
        reader.draft(ops.TopKIndices(axis=axis, k=count), x, shape=shape, dtype=np.int32),
    ]


def sort(reader: Reader, equation: Any, *operands: Value) -> list[Value]:
    """Of one array, or of one array with the positions along its axis, which is an argsort."""
    axis = int(equation.params["dimension"])
    x, *others = operands
    require(equation.params["num_keys"] == 1 and len(operands) <= 2, "a sort by several keys")
    require_dtypes(("float32", "int32"), x)
    found: list[Value] = [reader.draft(ops.Sort(axis=axis), x, shape=x.shape)]
    for other in others:
        shape = [n if a == axis else 1 for a, n in enumerate(x.shape)]
        positions = np.arange(x.shape[axis]).reshape(shape)
        array = other.array if isinstance(other, Known) else None
        along = array is not None and bool(np.all(np.asarray(array) == positions))
        require(along, "a sort of one array by another")
        found.append(reader.draft(ops.SortIndices(axis=axis), x, shape=x.shape, dtype=np.int32))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Windows


def window(reader: Reader, equation: Any, x: Value, make: Callable[..., Any]) -> Value:
    """A pool over the axes between the batch and the channels, which are last or second."""
    params, rank = equation.params, len(x.shape)
    require(is_float(x) and rank > 2, "a window over fewer than three axes, or of integers")
    kernel, strides = params["window_dimensions"], params["window_strides"]
    padding, dilation = params["padding"], params["window_dilation"]
    require(all(d == 1 for d in params["base_dilation"]), "a window with gaps between elements")

    def is_plain(axis: int) -> bool:
        return kernel[axis] == strides[axis] == 1 and tuple(padding[axis]) == (0, 0)

    last = is_plain(rank - 1)
    require(is_plain(0) and (last or is_plain(1)), "a window over the batch or the channels")
    axes = slice(1, -1) if last else slice(2, None)
    op = make(
        kernel=tuple(map(int, kernel[axes])),
        strides=tuple(map(int, strides[axes])),
        padding=tuple((int(low), int(high)) for low, high in padding[axes]),
        dilation=tuple(map(int, dilation[axes])),
        channels_last=last,
    )
    return reader.draft(op, x, shape=out_shape(equation))


def window_max(reader: Reader, equation: Any, x: Value) -> Value:
    return window(reader, equation, x, ops.MaxPool)


def window_min(reader: Reader, equation: Any, x: Value) -> Value:
    negative = reader.draft(ops.Neg(), x, shape=x.shape)
    pooled = window(reader, equation, negative, ops.MaxPool)
    return reader.draft(ops.Neg(), pooled, shape=pooled.shape)


def window_sum(reader: Reader, equation: Any, x: Value) -> Value:
    """The sum is an average by 1; the division that follows makes it one (`rules.pools`)."""

    def make(*, dilation: tuple[int, ...], **options: Any) -> Any:
        require(all(d == 1 for d in dilation), "a sum over a dilated window")
        return ops.AvgPool(divisor=1, **options)

    return window(reader, equation, x, make)


def reduce_window(reader: Reader, equation: Any, x: Value, initial: Value) -> Value:
    """The general form, as flax calls it: the function is known by its jaxpr, the initial value by being neutral."""
    (inner,) = equation.params["jaxpr"].eqns
    handler, neutral = {"max": (window_max, -np.inf), "min": (window_min, np.inf), "add": (window_sum, 0.0)}.get(
        inner.primitive.name, (None, 0.0)
    )
    require(handler is not None, f"a window of {inner.primitive.name}")
    require(isinstance(initial, Known) and initial.is_scalar and initial.number == neutral, "an initial value")
    assert handler is not None
    return handler(reader, equation, x)


TABLE: dict[str, Callable[..., Any]] = {
    "reduce_sum": reduction(ops.Sum), "reduce_max": reduction(ops.ReduceMax, dtypes=("float32", "int32")),
    "reduce_min": reduction(ops.ReduceMin, dtypes=("float32", "int32")),
    "reduce_and": reduction(ops.ReduceAll, dtypes=("bool",)), "reduce_or": reduction(ops.ReduceAny, dtypes=("bool",)),
    "argmax": position(ops.ArgMax), "argmin": position(ops.ArgMin),
    "cumsum": cumsum, "top_k": top_k, "sort": sort,
    "reduce_window_max": window_max, "reduce_window_min": window_min, "reduce_window_sum": window_sum,
    "reduce_window": reduce_window,
}  # fmt: skip
