"""Writing elements: `x.at[...].set`, add, max, min, and segment sums.

`ops.Scatter` writes along one axis. Indices of several axes count along one that stands for them, and an index for each
example is one of the batch. Where JAX drops what lies outside, a place behind the last one takes it, and is cut off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from jax.lax import GatherScatterMode

import jquant.ops as ops
from jquant.drafts import values
from jquant.drafts.values import Draft, Known, Value, constant
from jquant.functions.trace.primitives.common import DTYPES, is_float, require, require_dtypes
from jquant.functions.trace.reader import Reader
from jquant.types import Op

_COMBINE: dict[str, Op] = {"add": ops.Add(), "max": ops.Maximum(), "min": ops.Minimum()}


def scatter(reduce: Any) -> Callable[..., Value]:
    def handle(reader: Reader, equation: Any, x: Value, index: Value, updates: Value) -> Value:
        params = equation.params
        numbers = params["dimension_numbers"]
        require_dtypes(DTYPES, x, updates)
        require(is_float(x) or reduce == "none" or str(x.dtype) == "int32", f"a sum of {x.dtype}")
        if isinstance(index, Known):
            require(not index.is_trained, "an index that is a parameter")
        if len(index.shape) == 1:
            return _into_window(reader, x, index, updates, numbers, reduce, params["mode"])
        axes = tuple(int(a) for a in numbers.scatter_dims_to_operand_dims)
        require(tuple(sorted(map(int, numbers.inserted_window_dims))) == tuple(sorted(axes)), "windows at indices")
        columns = _columns(reader, index)
        batching = (
            tuple(map(int, numbers.operand_batching_dims)),
            tuple(map(int, numbers.scatter_indices_batching_dims)),
        )
        require(batching in (((), ()), ((0,), (0,))), "an index for each element of an axis that is no batch")
        for_each = batching[0] == (0,)
        if not for_each and axes[0] == 0 and len(axes) > 1 and _counts_examples(columns[0], x.shape[0]):
            for_each, axes, columns = True, axes[1:], columns[1:]
        windows = set(map(int, numbers.update_window_dims))
        rest = [a for a in range(len(x.shape)) if a not in axes and not (for_each and a == 0)]
        sizes = [updates.shape[i] for i in sorted(windows)]
        require(sizes == [x.shape[a] for a in rest], "a window that is a part of an axis")
        first = [i for i in range(len(updates.shape)) if i not in windows]
        updates = reader.permute(updates, [*first, *sorted(windows)])
        return _written(reader, _Places(x, axes, columns, for_each, rest), updates, reduce, params["mode"])

    return handle


@dataclass(frozen=True)
class _Places:
    """Where x is written: `columns`, an index [..., of the updates] for each of `axes`; the others are whole rows."""

    x: Value
    axes: tuple[int, ...]
    columns: tuple[Value, ...]
    for_each: bool  # whether axis 0 of the columns is that of x, so that an example has an index of its own
    rest: list[int]


def _columns(reader: Reader, index: Value) -> tuple[Value, ...]:
    """The index of each axis, of an index [..., K]."""
    count, shape = index.shape[-1], index.shape[:-1]
    if isinstance(index, Draft) and isinstance(index.op, ops.Cat) and len(index.operands) == count:
        return tuple(reader.reshape(part, shape) for part in index.operands)
    found = []
    for k in range(count):
        starts, stops = [0] * len(index.shape), list(index.shape)
        starts[-1], stops[-1] = k, k + 1
        found.append(reader.reshape(reader.slice(index, starts, stops, [1] * len(starts)), shape))
    return tuple(found)


def _counts_examples(column: Value, size: int) -> bool:
    """Whether an index is the number of the example, as `jnp.arange(len(x))[:, None]` is."""
    if not isinstance(column, Known) or column.is_trained or column.shape[0] != size:
        return False
    numbers = np.arange(size).reshape(-1, *(1,) * (len(column.shape) - 1))
    return bool((np.asarray(values.full(column).array) == numbers).all())


def _written(reader: Reader, at: _Places, updates: Value, reduce: Any, mode: Any) -> Value:
    """With the axes of the index next to each other, as one."""
    x, axes = at.x, at.axes
    together = list(axes) == list(range(axes[0], axes[0] + len(axes)))
    before = [a for a in at.rest if a < axes[0]] if together else []
    behind = [a for a in at.rest if a not in before]
    order = [*([0] if at.for_each else []), *before, *axes, *behind]
    place = order.index(axes[0])
    sizes = [x.shape[a] for a in axes]
    total = prod(sizes)
    turned = reader.permute(x, order)
    merged = (*turned.shape[:place], total, *turned.shape[place + len(axes) :])
    count = prod(updates.shape[at.for_each : len(updates.shape) - len(at.rest)])
    source = _moved(reader, updates, at, before, behind, count)
    index = _linear(reader, at.columns, sizes)
    drops = mode != GatherScatterMode.CLIP  # XLA skips what lies outside, promised or not
    if isinstance(index, Known):
        inside = _inside(at.columns, sizes)
        require(inside or not drops, "a known index outside of an axis")
        drops = False
    shape = [1] * len(merged)
    shape[place] = count
    if at.for_each:
        shape[0] = x.shape[0]
    into = reader.reshape(turned, merged)
    if drops:
        index = _behind_the_last(reader, at.columns, index, sizes)
        padding = tuple((0, int(i == place)) for i in range(len(merged)))
        wide = tuple(n + (i == place) for i, n in enumerate(merged))
        into = reader.draft(ops.Pad(padding=padding), into, shape=wide)
    op = ops.Scatter(axis=place, reduce=reduce)
    result: Value = reader.draft(op, into, reader.reshape(index, shape), source, shape=into.shape)
    if drops:
        result = reader.slice(result, [0] * len(merged), merged, [1] * len(merged))
    split = reader.reshape(result, turned.shape)
    return reader.permute(split, [order.index(a) for a in range(len(order))])


def _moved(reader: Reader, updates: Value, at: _Places, before: list[int], behind: list[int], count: int) -> Value:
    """What is written, with its places as one axis where x has them."""
    examples = updates.shape[: int(at.for_each)]
    flat = reader.reshape(updates, (*examples, count, *(at.x.shape[a] for a in at.rest)))
    first = len(examples)
    axis_of = {a: first + 1 + i for i, a in enumerate(at.rest)}
    order = [*range(first), *(axis_of[a] for a in before), first, *(axis_of[a] for a in behind)]
    return reader.permute(flat, order)


def _linear(reader: Reader, columns: Sequence[Value], sizes: Sequence[int]) -> Value:
    """The index of axes that are one."""
    total: Value | None = None
    for k, column in enumerate(columns):
        part = _arithmetic(reader, ops.Mul(), np.multiply, column, prod(sizes[k + 1 :]))
        total = part if total is None else _arithmetic(reader, ops.Add(), np.add, total, part)
    assert total is not None
    return total


def _arithmetic(reader: Reader, op: Op, compute: Any, a: Value, b: Value | int) -> Value:
    """Of exact integers; known where both are."""
    if isinstance(b, int):
        if b == 1 and isinstance(op, ops.Mul):
            return a
        b = constant(np.int32(b))
    if isinstance(a, Known) and isinstance(b, Known):
        return constant(np.asarray(compute(values.full(a).array, values.full(b).array), np.int32))
    first, second = (b, a) if isinstance(a, Known) else (a, b)
    return reader.draft(op, first, second, shape=np.broadcast_shapes(a.shape, b.shape), dtype=np.int32)


def _inside(columns: Sequence[Value], sizes: Sequence[int]) -> bool:
    arrays = [np.asarray(column.array) for column in columns if isinstance(column, Known)]
    return all(bool(((a >= 0) & (a < n)).all()) for a, n in zip(arrays, sizes, strict=True))


def _behind_the_last(reader: Reader, columns: Sequence[Value], index: Value, sizes: Sequence[int]) -> Value:
    """The index, and the place behind the last one for what lies outside of an axis."""
    outside: Value | None = None
    for column, size in zip(columns, sizes, strict=True):
        if isinstance(column, Known):
            require(_inside([column], [size]), "a known index outside of an axis")
            continue
        for op in (ops.Less(value=0.0), ops.GreaterEqual(value=float(size))):
            mask = reader.draft(op, column, shape=column.shape, dtype=bool)
            joined = np.broadcast_shapes(mask.shape, () if outside is None else outside.shape)
            outside = mask if outside is None else reader.draft(ops.LogicalOr(), outside, mask, shape=joined)
    assert outside is not None
    last = constant(np.int32(prod(sizes)))
    return reader.draft(ops.Where(), outside, last, index, shape=index.shape, dtype=np.int32)


def _into_window(reader: Reader, x: Value, index: Value, updates: Value, numbers: Any, reduce: Any, mode: Any) -> Value:
    """One window of x, at a place that is known: `x.at[:, 0]`, `x.at[:, 1:3]`."""
    require(isinstance(index, Known) and not numbers.operand_batching_dims, "a place that is computed")
    assert isinstance(index, Known)
    shape: list[int] = []
    sizes = list(updates.shape)
    for axis in range(len(x.shape)):
        shape.append(1 if axis in numbers.inserted_window_dims else sizes.pop(0))
    starts = [0] * len(shape)
    for axis, start in zip(numbers.scatter_dims_to_operand_dims, np.asarray(values.full(index).array), strict=True):
        starts[axis] = int(start)
    fits = all(a >= 0 and a + n <= m for a, n, m in zip(starts, shape, x.shape, strict=True))
    require(fits or mode == GatherScatterMode.CLIP, "a window that leaves an axis")
    starts = [int(np.clip(a, 0, m - n)) for a, n, m in zip(starts, shape, x.shape, strict=True)]
    source = reader.reshape(updates, shape)
    stops = [a + n for a, n in zip(starts, shape, strict=True)]
    if reduce != "none":
        part = reader.slice(x, starts, stops, [1] * len(shape))
        source = reader.draft(_COMBINE[reduce], part, source, shape=shape, dtype=x.dtype)
    if tuple(shape) == x.shape:
        return source
    ends = tuple(None if b == n else b for b, n in zip(stops, x.shape, strict=True))
    if not is_float(x):
        return _exact_window(reader, x, source, starts, shape)
    op = ops.SliceScatter(starts=tuple(starts), stops=ends, steps=(1,) * len(shape))
    return reader.draft(op, x, source, shape=x.shape)


def _exact_window(reader: Reader, x: Value, source: Value, starts: Sequence[int], shape: Sequence[int]) -> Value:
    """Of indices and masks, by the places of the one axis of which the window is a part."""
    cut = [a for a, (n, m) in enumerate(zip(shape, x.shape, strict=True)) if n != m]
    require(len(cut) == 1, "a window of several axes of exact values")
    (axis,) = cut
    places = np.arange(starts[axis], starts[axis] + shape[axis], dtype=np.int32)
    index = constant(places.reshape([-1 if a == axis else 1 for a in range(len(shape))]))
    return reader.draft(ops.Scatter(axis=axis), x, index, source, shape=x.shape)


TABLE: dict[str, Callable[..., Any]] = {
    "scatter": scatter("none"),
    "scatter-add": scatter("add"),
    "scatter-max": scatter("max"),
    "scatter-min": scatter("min"),
}
