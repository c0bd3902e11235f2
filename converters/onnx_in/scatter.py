"""Handlers: writing elements at indices, and picking them by indices of several axes."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

import jquant.ops as ops

from .call import MAX_CONSTANTS, Call, Handler, axis_of
from .movement import Sizes, from_the_start, reshaped
from .values import Known, Result, Value, require

_KINDS: dict[str, Any] = {"none": "none", "add": "add", "max": "max", "min": "min"}


def reduction(call: Call) -> Any:
    kind = call.text("reduction", "none")
    require(kind in _KINDS, f"reduction={kind!r}")
    return _KINDS[kind]


def scatter_elements(call: Call) -> Result:
    x, source = call.value(0), call.value(2)
    axis = axis_of(call.integer("axis", 0), x.rank)
    index, kind = call.operand(1), reduction(call)
    row = same_along(index, axis)
    if row is not None:
        return written(call, x, row, source, axis, kind)
    at = from_the_start(call, call.value(1), x.shape[axis])
    return call.make(ops.Scatter(axis=axis, reduce=kind), x, at, source)


def same_along(index: Known | Value, axis: int) -> np.ndarray | None:
    """[K] where an index is known, and the same along every other axis than `axis`."""
    if not isinstance(index, Known) or index.at[0].size == 0 or index.at[0].ndim == 0:
        return None
    rows = [np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis]) for array in index.at]
    row: np.ndarray = rows[0][0]
    same = all(r.shape[1] == row.size and bool((r == row).all()) for r in rows)
    return row if same and np.issubdtype(row.dtype, np.integer) else None


def written(call: Call, x: Value, row: np.ndarray, source: Value, axis: int, kind: Any, part: str = "") -> Value:
    """x with places of one axis written that are known: a slice where they are one."""
    size = x.shape[axis]
    require(size is not None, "it writes to examples of the batch")
    assert size is not None
    require(bool(((row >= -size) & (row < size)).all()), f"an index beyond an axis of {size}")
    row = row % size
    step = int(row[1] - row[0]) if row.size > 1 else 1
    if kind == "none" and step > 0 and bool((np.diff(row) == step).all()):
        stop: int | None = int(row[-1]) + 1
        starts, stops, steps = ([v] * x.rank for v in (0, None, 1))
        starts[axis], stops[axis], steps[axis] = int(row[0]), stop if stop != size else None, step
        op = ops.SliceScatter(starts=tuple(starts), stops=tuple(stops), steps=tuple(steps))  # type: ignore[arg-type]
        return call.make(op, x, source, part=part)
    require(row.size <= MAX_CONSTANTS, "its indices")
    at = call.constant(row.astype(np.int32).reshape([-1 if a == axis else 1 for a in range(x.rank)]), "places")
    return call.make(ops.Scatter(axis=axis, reduce=kind), x, at, source, part=part)


def scatter_nd(call: Call) -> Result:
    """The first axes of x, which the index counts along, are one meanwhile."""
    x, source, kind = call.value(0), call.value(2), reduction(call)
    shapes = index_shapes(call)
    count = shapes[0][-1]
    require(0 < count <= x.rank and None not in x.shape[:count], "it writes to examples of the batch")
    rows = prod(x.shapes[0][:count])
    merged: Any = tuple((rows, *s[count:]) for s in x.shapes)
    flat: Any = tuple((prod(i[:-1]), *s[count:]) for i, s in zip(shapes, x.shapes, strict=True))
    into = reshaped(call, x, merged, part="merged")
    values = reshaped(call, source, flat, part="source")
    part = "" if merged == x.shapes else "written"
    index = linear(call, x.shapes[0][:count])
    if isinstance(index, np.ndarray):
        result = written(call, into, index.reshape(-1), values, 0, kind, part=part)
    else:
        places: Any = tuple((prod(s[:-1]), *(1 for _ in x.shapes[0][count:])) for s in shapes)
        at = reshaped(call, index, places, part="places")
        result = call.make(ops.Scatter(axis=0, reduce=kind), into, at, values, part=part)
    return reshaped(call, result, x.shapes) if part else result


def gather_nd(call: Call) -> Result:
    x, shapes = call.value(0), index_shapes(call)
    first, count = call.integer("batch_dims", 0), shapes[0][-1]
    require(
        0 <= first < len(shapes[0]) and 0 < count <= x.rank - first, f"batch_dims {first}, {count} axes of {x.rank}"
    )
    sizes = x.shape[first : first + count]
    require(None not in sizes, "it picks examples of the batch; use batch_dims=1")
    inner, rest = shapes[0][first:-1], x.shape[first + count :]
    require(None not in rest and all(s[first:] == shapes[0][first:] for s in shapes), "the size of the index")
    rows = prod(x.shapes[0][first : first + count])
    outs: Any = tuple((*s[:first], *inner, *s[first + count :]) for s in x.shapes)
    merged: Any = tuple((prod(s[:first]), rows, *s[first + count :]) for s in x.shapes)
    index = linear(call, x.shapes[0][first : first + count])
    if first == 0:
        source = reshaped(call, x, tuple(m[1:] for m in merged), part="merged")
        if isinstance(index, np.ndarray):
            require(0 < index.size <= MAX_CONSTANTS, "its indices")
            op = ops.IndexSelect(axis=0, indices=tuple(int(v) for v in index.reshape(-1)))
            return reshaped(call, call.make(op, source, part="selected"), outs)
        flat = reshaped(call, index, tuple((prod(s[:-1]),) for s in shapes), part="flat_index")  # type: ignore[arg-type]
        return reshaped(call, call.make(ops.IndexSelect(axis=0), source, flat, part="selected"), outs)
    source = reshaped(call, x, merged, part="merged")
    if isinstance(index, np.ndarray):
        index = call.constant(index.astype(np.int32), "index")
    ranked: Any = tuple((prod(s[:first]), prod(inner), *(1 for _ in rest)) for s in shapes)
    at = reshaped(call, index, ranked, part="places")
    if any(n != 1 for n in rest):
        at = call.make(ops.Expand(shape=(-1, prod(inner), *(n or 1 for n in rest))), at, part="all")
    return reshaped(call, call.make(ops.Gather(axis=1), source, at, part="selected"), outs)


def index_shapes(call: Call) -> tuple[Sizes, Sizes]:
    index = call.operand(1)
    shapes = index.shapes if isinstance(index, Value) else (index.at[0].shape, index.at[1].shape)
    require(len(shapes[0]) > 0 and 0 not in shapes[0], "its index is empty")
    return shapes


def linear(call: Call, sizes: Sizes) -> Any:
    """The index of axes that are one, from [..., K] with one number for each: an array where it is known.

    As a value it is [..., 1].
    """
    index = call.operand(1)
    if isinstance(index, Known) and index.fixed:
        columns = np.moveaxis(index.at[0].astype(np.int64), -1, 0)
        inside = all(bool(((c >= -n) & (c < n)).all()) for c, n in zip(columns, sizes, strict=True))
        require(inside, f"an index beyond axes of {list(sizes)}")
        return sum(c % n * prod(sizes[k + 1 :]) for k, (c, n) in enumerate(zip(columns, sizes, strict=True)))
    x, total = call.value(1), None
    for k, size in enumerate(sizes):
        ends = [(0, None, 1)] * (x.rank - 1) + [(k, k + 1 if k + 1 < len(sizes) else None, 1)]
        starts, stops, steps = zip(*ends, strict=True)
        one = x
        if len(sizes) > 1:
            one = call.make(ops.Slice(starts=starts, stops=stops, steps=steps), x, part=f"index_{k}")
        one = from_the_start(call, one, size, part=f"index_{k}" if len(sizes) > 1 else "index")
        if total is not None:
            factor = call.constant(np.int32(size), f"index_{k}_rows")
            total = call.make(ops.Mul(), total, factor, part=f"index_{k}_first")
            one = call.make(ops.Add(), total, one, part=f"index_{k}_flat")
        total = one
    return total


TABLE: dict[str, Handler] = {
    "GatherND": gather_nd,
    "Scatter": scatter_elements,
    "ScatterElements": scatter_elements,
    "ScatterND": scatter_nd,
}
