"""Gathers: rows of a table, elements at known places, and elements at places that are values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jax.lax import GatherScatterMode

import jquant.ops as ops
from jquant.drafts import values
from jquant.drafts.values import Draft, Entry, Known, Shape, Value
from jquant.functions.trace.primitives.common import DTYPES, is_float, out_shape, require, require_dtypes
from jquant.functions.trace.reader import Reader


def gather(reader: Reader, equation: Any, x: Value, index: Value) -> Value:
    """One axis is indexed, all others are taken whole: x.take(index, axis)."""
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    require_dtypes(DTYPES, x)
    require(not numbers.operand_batching_dims, "an index for each example")
    axes = numbers.start_index_map
    require(len(axes) == 1 and tuple(numbers.collapsed_slice_dims) == tuple(axes), "an index of several axes")
    axis = int(axes[0])
    whole = all(n == m for i, (n, m) in enumerate(zip(sizes, x.shape, strict=True)) if i != axis)
    require(whole, "a gather of parts")
    fills = equation.params["mode"] == GatherScatterMode.FILL_OR_DROP
    index = reader.reshape(index, index.shape[:-1])
    first = [i for i in range(len(out_shape(equation))) if i not in numbers.offset_dims]
    together = first == list(range(axis, axis + len(first)))
    require(together, "an index whose axes are apart")
    if isinstance(index, Known) and not index.is_trained:
        return _at_known_places(reader, x, axis, index, fills=fills)
    require(isinstance(index, Draft | Entry) or isinstance(x, Known), "an index")
    if isinstance(x, Known) and len(x.shape) == 2 and axis == 0 and is_float(x):
        fill = equation.params["fill_value"]
        require(not fills or fill is None or np.isnan(fill), f"rows of {fill} outside of a table")
        return _rows_of_table(reader, values.full(x), index, out_shape(equation), fills=fills)
    require(len(index.shape) == 1 and not isinstance(x, Known), "an index of several axes")
    require(not fills, "an index that may be outside, which gives NaN; pass mode='clip' to jnp.take")
    return reader.draft(ops.IndexSelect(axis=axis), x, index, shape=out_shape(equation))


def _rows_of_table(reader: Reader, table: Known, index: Value, shape: Shape, *, fills: bool) -> Value:
    """An embedding gives NaN outside of the table, as "fill" does; the other modes take the nearest row."""
    size = table.shape[0]
    plain = _wrapped(reader, index, size)
    from_end = plain is not index
    if not fills:
        bounds = ops.Clamp(minimum=-float(size) if from_end else 0.0, maximum=float(size - 1))
        plain = reader.draft(bounds, plain, shape=plain.shape, dtype=plain.dtype)
    op = ops.Embedding(from_end=from_end)
    return reader.draft(op, plain, shape=shape, dtype=table.dtype, weight=table)


def _at_known_places(reader: Reader, x: Value, axis: int, index: Known, *, fills: bool) -> Value:
    """Slices where the places are evenly spaced, else a selection."""
    size = x.shape[axis]
    places = np.asarray(values.full(index).array).reshape(-1).astype(np.int64)
    require(not fills or not places.size or 0 <= places.min() <= places.max() < size, "an index outside of an axis")
    places = np.clip(places, 0, size - 1)
    steps = np.diff(places)
    step = int(steps[0]) if len(steps) else 1
    if step > 0 and bool(np.all(steps == step)):
        starts, stops, strides = [0] * len(x.shape), list(x.shape), [1] * len(x.shape)
        starts[axis], stops[axis], strides[axis] = int(places[0]), int(places[-1]) + 1, step
        y = reader.slice(x, starts, stops, strides)
    else:
        op = ops.IndexSelect(axis=axis, indices=tuple(int(i) for i in places))
        y = reader.draft(op, x, shape=(*x.shape[:axis], len(places), *x.shape[axis + 1 :]))
    return reader.reshape(y, (*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]))


def _wrapped(reader: Reader, index: Value, size: int) -> Value:
    """The index before `where(index < 0, index + size, index)`, with which numpy's negative indices are made."""
    found = index
    while isinstance(found, Draft) and isinstance(found.op, ops.Reshape):
        (found,) = found.operands
    if not isinstance(found, Draft) or not isinstance(found.op, ops.Where):
        return index
    below, shifted, plain = found.operands
    wraps = (
        isinstance(below, Draft)
        and isinstance(below.op, ops.Less)
        and below.op.value == 0
        and below.operands == (plain,)
        and isinstance(shifted, Draft)
        and isinstance(shifted.op, ops.Add)
        and shifted.operands[0] is plain
        and isinstance(shifted.operands[1], Known)
        and shifted.operands[1].is_scalar
        and shifted.operands[1].number == size
    )
    return reader.reshape(plain, index.shape) if wraps else index


TABLE: dict[str, Callable[..., Any]] = {"gather": gather}
