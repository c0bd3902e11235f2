"""What is computed while reading: arithmetic on shapes and on constants, with numpy, at both batch sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from .call import MAX_CONSTANTS, Call, axes_of, axis_of
from .load import INPUT_TYPES, TYPES
from .values import Grid, Known, Result, Value, require

OF_SHAPES = ("Shape", "Size")
# How many operands cannot be left out; of the others, all.
_NEEDED = {"Slice": 3, "Squeeze": 1, "ReduceMax": 1, "ReduceMin": 1, "ReduceProd": 1, "ReduceSum": 1}
_MOVES = ("Expand", "Gather", "Reshape", "Slice", "Squeeze", "Unsqueeze")  # a grid with one scale stays
MAX_FOLDED = 2**22  # elements of what is computed
Arrays = Sequence[np.ndarray]


def fold(call: Call) -> list[Result] | None:
    """The results of a node that depends on constants and shapes alone; None where it is no such node."""
    kind = call.node.op_type
    if kind in OF_SHAPES:
        return [_shape(call)]
    present = [x for x in call.inputs if x is not None]
    if kind not in FOLDS or not present or not all(isinstance(x, Known) for x in present):
        return None
    if kind == "Transpose":
        return [_transpose(call)]
    arguments = [x if isinstance(x, Known) else None for x in call.inputs]
    needed = arguments[: _NEEDED.get(kind, len(arguments))]
    require(all(x is not None for x in needed), "an operand is missing")
    same = all(x is None or x.at[0] is x.at[1] for x in arguments)
    found = []
    for i in (0,) if same else (0, 1):
        with np.errstate(all="ignore"):
            result = FOLDS[kind](call, [None if x is None else x.at[i] for x in arguments])
        require(result.size <= MAX_FOLDED, f"a constant of {result.size} elements is computed")
        found.append(result)
    first = arguments[0]
    grows = kind == "Expand" and first is not None and first.fixed and found[0].shape != found[-1].shape
    if grows and first is not None and (first.at[0].size > 1 or found[-1].size > MAX_CONSTANTS):
        return None  # an example for every element of the batch: an operator
    return [Known((found[0], found[-1]), *_kept(kind, first))]


def _kept(kind: str, source: Known | None) -> tuple[str, Grid | None]:
    """The name and the grid that the result still has."""
    if source is None or source.grid is None:
        return "", None
    if kind == "Identity":
        return source.name, source.grid
    return "", source.grid if kind in _MOVES and source.grid.axis is None else None


def _shape(call: Call) -> Known:
    x = call.operand(0)
    both = x.shapes if isinstance(x, Value) else tuple(a.shape for a in x.at)
    if call.node.op_type == "Size":
        small, large = (np.asarray(prod(s), np.int64) for s in both)
    else:
        part = slice(call.integer("start", 0), call.attribute("end", "int"))
        small, large = (np.asarray(s[part], np.int64) for s in both)
    return Known((small, large))


def _transpose(call: Call) -> Known:
    x = call.operand(0)
    assert isinstance(x, Known)
    rank = x.at[0].ndim
    perm = call.integers("perm", tuple(range(rank))[::-1])
    require(sorted(perm) == list(range(rank)), f"the permutation {perm} of {rank} axes")
    arrays = tuple(np.transpose(a, perm) for a in x.at)
    grid = x.grid
    if grid is not None and grid.axis is not None:
        grid = replace(grid, axis=perm.index(grid.axis))
    return Known((arrays[0], arrays[1]), "", grid, turned=x if perm == (1, 0) else None)


def _elementwise(function: Callable[..., Any]) -> Callable[[Call, Arrays], np.ndarray]:
    def folded(call: Call, arrays: Arrays) -> np.ndarray:
        shape = np.broadcast_shapes(*(a.shape for a in arrays))
        require(prod(shape) <= MAX_FOLDED, f"a constant of shape {list(shape)} is computed")
        require(len({a.dtype for a in arrays}) == 1, "operands of different dtypes")
        result: np.ndarray = np.asarray(function(*arrays))
        return result

    return folded


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of integers towards 0, as in C."""
    if not np.issubdtype(a.dtype, np.integer):
        return a / b
    require(bool((b != 0).all()), "a division by 0")
    result: np.ndarray = (np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))).astype(a.dtype)
    return result


def _where(call: Call, arrays: Arrays) -> np.ndarray:
    shape = np.broadcast_shapes(*(a.shape for a in arrays))
    require(prod(shape) <= MAX_FOLDED and arrays[1].dtype == arrays[2].dtype, "a choice")
    return np.where(*arrays)


def _cast(call: Call, arrays: Arrays) -> np.ndarray:
    wanted = TYPES.get(call.integer("to", 0), "")
    require(wanted in INPUT_TYPES, "a cast of a constant to a type that is not read")
    (x,) = arrays
    whole = np.issubdtype(x.dtype, np.integer) or x.dtype == np.bool_ or wanted in ("float32", "bool")
    require(
        bool(whole or (np.isfinite(x).all() and (np.abs(x) < 2**62).all())), "a cast of a number that is no integer"
    )
    return x.astype(wanted)


def _gather(call: Call, arrays: Arrays) -> np.ndarray:
    data, index = arrays
    axis = axis_of(call.integer("axis", 0), data.ndim)
    require(np.issubdtype(index.dtype, np.integer) and data.ndim > 0, "an index that is no integer")
    require(index.size * data.size // max(data.shape[axis], 1) <= MAX_FOLDED, "a large selection")
    size = data.shape[axis]
    require(bool(((index >= -size) & (index < size)).all()), f"an index beyond an axis of {size}")
    return np.take(data, index, axis=axis)


def _axes(call: Call, arrays: Arrays, rank: int) -> tuple[int, ...] | None:
    given = [int(v) for v in arrays[1].reshape(-1)] if len(arrays) > 1 and arrays[1] is not None else None
    given = given if given is not None else call.integers("axes")
    return None if given is None else axes_of(given, rank)


def _squeeze(call: Call, arrays: Arrays) -> np.ndarray:
    return np.squeeze(arrays[0], _axes(call, arrays, arrays[0].ndim))


def _unsqueeze(call: Call, arrays: Arrays) -> np.ndarray:
    count = arrays[1].size if len(arrays) > 1 else len(call.integers("axes", ()))
    require(arrays[0].ndim + count <= 16, "its axes")
    return np.expand_dims(arrays[0], _axes(call, arrays, arrays[0].ndim + count) or ())


def _concat(call: Call, arrays: Arrays) -> np.ndarray:
    require(len({a.dtype for a in arrays}) == 1, "operands of different dtypes")
    return np.concatenate(list(arrays), axis_of(call.integer("axis", 0), arrays[0].ndim))


def _slice(call: Call, arrays: Arrays) -> np.ndarray:
    data, starts, stops = arrays[:3]
    axes = [int(a) for a in arrays[3]] if len(arrays) > 3 and arrays[3] is not None else range(starts.size)
    steps = arrays[4] if len(arrays) > 4 and arrays[4] is not None else np.ones(starts.size, np.int64)
    require(starts.ndim == 1 and starts.shape == stops.shape == steps.shape and len(axes) == starts.size, "its bounds")
    at = [slice(None)] * data.ndim
    for axis, start, stop, step in zip(axes, starts, stops, steps, strict=True):
        require(step != 0, "a step of 0")
        size = data.shape[axis_of(axis, data.ndim)]
        found = range(size)[int(start) : int(stop) : int(step)]
        end = found.stop if found.stop >= 0 else None
        at[axis_of(axis, data.ndim)] = slice(found.start, end, found.step) if len(found) else slice(0, 0)
    return data[tuple(at)]


def _reshape(call: Call, arrays: Arrays) -> np.ndarray:
    data, shape = arrays
    require(shape.ndim == 1 and shape.size <= 16 and np.issubdtype(shape.dtype, np.integer), "its shape")
    asked = [int(n) for n in shape]
    if not call.flag("allowzero"):
        require(all(n != 0 or i < data.ndim for i, n in enumerate(asked)), "its shape")
        asked = [data.shape[i] if n == 0 else n for i, n in enumerate(asked)]
    return data.reshape(asked)


def _expand(call: Call, arrays: Arrays) -> np.ndarray:
    data, shape = arrays
    require(shape.ndim == 1 and shape.size <= 16, "its shape")
    wanted = np.broadcast_shapes(data.shape, tuple(int(n) for n in shape))
    require(prod(wanted) <= MAX_FOLDED, f"a constant of shape {list(wanted)} is computed")
    return np.broadcast_to(data, wanted).copy()


def _tile(call: Call, arrays: Arrays) -> np.ndarray:
    data, repeats = arrays
    counts = [int(n) for n in repeats.reshape(-1)]
    require(len(counts) == data.ndim and min(counts, default=1) >= 0, "its repeats")
    require(prod(counts) * data.size <= MAX_FOLDED, "a large constant is computed")
    return np.tile(data, counts)


def _range(call: Call, arrays: Arrays) -> np.ndarray:
    start, limit, step = (a.reshape(()) for a in arrays)
    require(step != 0 and np.isfinite(float((limit - start) / step)), "a step of 0")
    require(float((limit - start) / step) <= MAX_FOLDED, "a large range")
    return np.arange(start.item(), limit.item(), step.item(), dtype=arrays[0].dtype)


def _reduce(function: Any) -> Callable[[Call, Arrays], np.ndarray]:
    def folded(call: Call, arrays: Arrays) -> np.ndarray:
        axes = _axes(call, arrays, arrays[0].ndim)
        require(bool(axes) or not call.flag("noop_with_empty_axes"), "nothing is reduced")
        result = function(arrays[0], axis=axes or None, keepdims=call.flag("keepdims", True))
        return np.asarray(result).astype(arrays[0].dtype)

    return folded


def _identity(call: Call, arrays: Arrays) -> np.ndarray:
    return arrays[0]


def _mod(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    require(bool((b != 0).all()), "a division by 0")
    result: np.ndarray = np.mod(a, b)
    return result


FOLDS: dict[str, Callable[[Call, Any], np.ndarray]] = {
    "Abs": _elementwise(np.abs),
    "Add": _elementwise(np.add),
    "And": _elementwise(np.logical_and),
    "Cast": _cast,
    "Ceil": _elementwise(np.ceil),
    "Concat": _concat,
    "Div": _elementwise(_divide),
    "Equal": _elementwise(np.equal),
    "Expand": _expand,
    "Floor": _elementwise(np.floor),
    "Gather": _gather,
    "Greater": _elementwise(np.greater),
    "GreaterOrEqual": _elementwise(np.greater_equal),
    "Identity": _identity,
    "Less": _elementwise(np.less),
    "LessOrEqual": _elementwise(np.less_equal),
    "Max": _elementwise(lambda *a: np.maximum.reduce(np.broadcast_arrays(*a))),
    "Min": _elementwise(lambda *a: np.minimum.reduce(np.broadcast_arrays(*a))),
    "Mod": _elementwise(_mod),
    "Mul": _elementwise(np.multiply),
    "Neg": _elementwise(np.negative),
    "Not": _elementwise(np.logical_not),
    "Or": _elementwise(np.logical_or),
    "Range": _range,
    "ReduceMax": _reduce(np.max),
    "ReduceMin": _reduce(np.min),
    "ReduceProd": _reduce(np.prod),
    "ReduceSum": _reduce(np.sum),
    "Reshape": _reshape,
    "Slice": _slice,
    "Sqrt": _elementwise(np.sqrt),
    "Squeeze": _squeeze,
    "Sub": _elementwise(np.subtract),
    "Tile": _tile,
    "Transpose": lambda call, arrays: arrays[0],  # by `_transpose`
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}
