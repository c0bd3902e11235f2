"""Shapes, joins, slices and padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

import jquant.ops as ops
from jquant.drafts import values
from jquant.drafts.values import Known, Value, scalar_of
from jquant.functions.trace.primitives.common import DTYPES, out_shape, require, require_dtypes
from jquant.functions.trace.reader import Reader


def reshape(reader: Reader, equation: Any, x: Value) -> Value:
    permutes = equation.primitive.name == "reshape" and equation.params["dimensions"] is not None
    require(not permutes, "a reshape that permutes")
    require_dtypes(DTYPES, x)
    return reader.reshape(x, out_shape(equation))


def transpose(reader: Reader, equation: Any, x: Value) -> Value:
    require_dtypes(DTYPES, x)
    return reader.permute(x, equation.params["permutation"])


def broadcast_in_dim(reader: Reader, equation: Any, x: Value, *dynamic: Value) -> Value:
    require(not dynamic, "a shape that is computed")
    require_dtypes(DTYPES, x)
    shape, axes = out_shape(equation), [int(a) for a in equation.params["broadcast_dimensions"]]
    sizes = [1] * len(shape)
    for axis, size in zip(axes, x.shape, strict=True):
        sizes[axis] = size
    return expanded(reader, reader.reshape(x, sizes), shape)


def expanded(reader: Reader, x: Value, shape: Sequence[int]) -> Value:
    """The value with its axes of 1 repeated to `shape`, of the same rank."""
    if x.shape == tuple(shape):
        return x
    if isinstance(x, Known):
        return values.broadcast_in(x, tuple(shape), range(len(shape)))
    wanted = tuple(-1 if n == m else m for n, m in zip(x.shape, shape, strict=True))
    return reader.draft(ops.Expand(shape=wanted), x, shape=shape)


def concatenate(reader: Reader, equation: Any, *operands: Value) -> Value:
    require_dtypes(DTYPES, *operands)
    if len(operands) == 1:
        return operands[0]
    return reader.draft(ops.Cat(axis=equation.params["dimension"]), *operands, shape=out_shape(equation))


def slice_(reader: Reader, equation: Any, x: Value) -> Value:
    require_dtypes(DTYPES, x)
    params = equation.params
    return reader.slice(x, params["start_indices"], params["limit_indices"], params["strides"] or (1,) * len(x.shape))


def stack(reader: Reader, equation: Any, *operands: Value) -> Value:
    require_dtypes(DTYPES, *operands)
    return reader.draft(ops.Stack(axis=int(equation.params["axis"])), *operands, shape=out_shape(equation))


def split(reader: Reader, equation: Any, x: Value) -> list[Value]:
    require_dtypes(DTYPES, x)
    axis, start, found = equation.params["axis"], 0, []
    for size in equation.params["sizes"]:
        starts, stops = [0] * len(x.shape), list(x.shape)
        starts[axis], stops[axis] = start, start + int(size)
        found.append(reader.slice(x, starts, stops, (1,) * len(starts)))
        start += int(size)
    return found


def dynamic_slice(reader: Reader, equation: Any, x: Value, *starts: Value) -> Value:
    """With starts that are known, a slice."""
    sizes = equation.params["slice_sizes"]
    first = _known_starts(x, starts, sizes)
    return reader.slice(x, first, [a + n for a, n in zip(first, sizes, strict=True)], (1,) * len(sizes))


def _known_starts(x: Value, starts: Sequence[Value], sizes: Sequence[int]) -> list[int]:
    require_dtypes(DTYPES, x)
    found = [scalar_of(start) for start in starts]
    require(None not in found, "a start that is computed")
    return [int(np.clip(int(a or 0), 0, n - m)) for a, n, m in zip(found, x.shape, sizes, strict=True)]


def dynamic_update_slice(reader: Reader, equation: Any, x: Value, source: Value, *starts: Value) -> Value:
    first = _known_starts(x, starts, source.shape)
    stops = [a + n for a, n in zip(first, source.shape, strict=True)]
    ends = tuple(None if b == n else b for b, n in zip(stops, x.shape, strict=True))
    op = ops.SliceScatter(starts=tuple(first), stops=ends, steps=(1,) * len(first))
    return reader.draft(op, x, source, shape=x.shape)


def pad(reader: Reader, equation: Any, x: Value, fill: Value) -> Value:
    """Padding with a number; a negative amount cuts elements off."""
    value, config = scalar_of(fill), equation.params["padding_config"]
    require(value is not None, "a padding value that is computed")
    require(all(interior == 0 for *_, interior in config), "padding between elements")
    require_dtypes(DTYPES, x)
    assert value is not None
    starts = [max(-low, 0) for low, _, _ in config]
    stops = [n - max(-high, 0) for n, (_, high, _) in zip(x.shape, config, strict=True)]
    x = reader.slice(x, starts, stops, (1,) * len(config))
    padding = tuple((max(low, 0), max(high, 0)) for low, high, _ in config)
    if not any(map(any, padding)):
        return x
    return reader.draft(ops.Pad(padding=padding, value=value), x, shape=out_shape(equation))


def rev(reader: Reader, equation: Any, x: Value) -> Value:
    require_dtypes(DTYPES, x)
    return reader.draft(ops.Flip(axes=tuple(map(int, equation.params["dimensions"]))), x, shape=x.shape)


def tile(reader: Reader, equation: Any, x: Value) -> Value:
    require_dtypes(DTYPES, x)
    repeats = tuple(int(n) for n in equation.params["reps"])
    shape = out_shape(equation)
    if all(n == 1 or r == 1 for n, r in zip(x.shape, repeats, strict=True)):
        return expanded(reader, x, shape)
    return reader.draft(ops.Tile(repeats=repeats), x, shape=shape)


def stop_gradient(reader: Reader, equation: Any, x: Value) -> Value:
    if isinstance(x, Known):
        return values.elementwise("stop_gradient", jax.lax.stop_gradient, [x], x.shape)
    return reader.draft(ops.StopGradient(), x, shape=x.shape)


TABLE: dict[str, Callable[..., Any]] = {
    "reshape": reshape, "squeeze": reshape, "expand_dims": reshape, "transpose": transpose,
    "broadcast_in_dim": broadcast_in_dim, "concatenate": concatenate, "slice": slice_, "split": split,
    "stack": stack,
    "dynamic_slice": dynamic_slice, "dynamic_update_slice": dynamic_update_slice, "pad": pad, "rev": rev, "tile": tile,
    "stop_gradient": stop_gradient,
}  # fmt: skip
