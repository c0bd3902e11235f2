"""Writing elements: into slices, and at indices that are values of the graph (exact int32).

x and what is written have scales of their own; both are rescaled to that of the output, as in a concatenation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jquant.graph.operator import Lowered, Operand, eval_float, eval_integer, lower_op, to_channels_last
from jquant.numerics.rounding import saturate, widen
from jquant.ops.elementwise import requantize_each, rescale_each
from jquant.ops.movement import channels_last_axis, channels_last_order
from jquant.types import EXACT_DTYPES, Array, GraphError, NodeFormat, Op, Target


@dataclass(frozen=True, kw_only=True)
class SliceScatter(Op):
    """x with x[starts[0]:stops[0]:steps[0], ...] replaced by the source, bounds as in `Slice`."""

    layout: ClassVar = "axes"
    ports: ClassVar = ("x", "source")

    starts: tuple[int, ...]
    stops: tuple[int | None, ...]
    steps: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Scatter(Op):
    """x with x[..., index[..., i, ...], ...] replaced by, or combined with, source[..., i, ...] along `axis`.

    The index has the shape of the source, or is 1 long along other axes than `axis`, where it counts for all elements.
    The source may be shorter than x along those, of which the first elements are written then. Where an element is
    written several times, the last one counts, or with `reduce` all of them and x itself. The index is clamped to the
    axis.
    """

    takes_exact: ClassVar = True
    layout: ClassVar = "axes"
    ports: ClassVar = ("x", "index", "source")

    axis: int
    reduce: Literal["none", "add", "max", "min"] = "none"


@eval_float.register
def _(op: SliceScatter, x: Array, source: Array) -> Array:
    where = tuple(slice(*bounds) for bounds in zip(op.starts, op.stops, op.steps, strict=True))
    return x.at[where].set(source)


@eval_float.register
def _(op: Scatter, x: Array, index: Array, source: Array) -> Array:
    return _scattered(op, x, index, source)


def _scattered(op: Scatter, x: Array, index: Array, source: Array) -> Array:
    """The operator on arrays of one dtype, floats or integers. With "none" it is the same on every backend."""
    axis = op.axis % x.ndim
    _check_shapes(axis, x, index, source)
    if all(m == n for d, (m, n) in enumerate(zip(source.shape, x.shape, strict=True)) if d != axis):
        return _written(op, axis, x, index, source)
    first = tuple(slice(None) if d == axis else slice(n) for d, n in enumerate(source.shape))
    return x.at[first].set(_written(op, axis, x[first], index, source))


def _written(op: Scatter, axis: int, x: Array, index: Array, source: Array) -> Array:
    """`_scattered` for a source that is as long as x along the other axes."""
    index = jnp.clip(index, 0, x.shape[axis] - 1)
    if op.reduce != "none":
        return _combined(op, axis, x, index, source)
    positions = jnp.broadcast_to(_places(index.shape, axis), index.shape)
    shape = tuple(n if d == axis else index.shape[d] for d, n in enumerate(x.shape))
    at = [_places(index.shape, d) for d in range(index.ndim)]
    at[axis] = index
    writer = jnp.full(shape, -1, jnp.int32).at[tuple(at)].max(positions)  # the last one that writes here
    written = jnp.take_along_axis(source, jnp.maximum(writer, 0), axis=axis)
    return jnp.where(writer >= 0, written, x)


def _combined(op: Scatter, axis: int, x: Array, index: Array, source: Array) -> Array:
    """Axes along which the index counts for all elements come last, so that whole rows are added."""
    rows = [d for d in range(x.ndim) if d != axis and index.shape[d] == 1 and source.shape[d] != 1]
    order = [d for d in range(x.ndim) if d not in rows] + rows
    at = [index if d == axis else _places(index.shape, d) for d in order if d not in rows]
    at = [jnp.transpose(places, order)[(..., *(0 for _ in rows))] for places in at]
    target = jnp.transpose(x, order).at[tuple(at)]
    written = getattr(target, op.reduce)(jnp.transpose(source, order))
    return jnp.transpose(written, [order.index(d) for d in range(x.ndim)])


def _check_shapes(axis: int, x: Array, index: Array, source: Array) -> None:
    fits = index.dtype == jnp.int32 and index.ndim == source.ndim == x.ndim
    for d, sizes in enumerate(zip(index.shape, source.shape, x.shape, strict=True) if fits else ()):
        of_index, of_source, of_x = sizes
        if d == axis:
            fits = fits and of_index == of_source
        else:
            fits = fits and (of_index in (1, of_source)) and (of_source == of_x or of_source <= of_x)
    if not fits:
        raise GraphError(
            f"index {index.dtype}{list(index.shape)} and source {list(source.shape)} must have one shape, of which the "
            f"index may be 1 and x {list(x.shape)} longer along other axes than {axis}, and the index be int32"
        )


def _places(shape: tuple[int, ...], axis: int) -> Array:
    """0, 1, 2 ... along an axis, 1 elsewhere; the batch may be open."""
    return jax.lax.broadcasted_iota(jnp.int32, tuple(n if d == axis else 1 for d, n in enumerate(shape)), axis)


@lower_op.register(SliceScatter)
@lower_op.register(Scatter)
def _(op: Op, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    if output.dtype in EXACT_DTYPES:
        return Lowered({})
    return Lowered(requantize_each([inputs[0], inputs[-1]], [output, output], target))


@eval_integer.register
def _(op: SliceScatter, node_format: NodeFormat, target: Target, x: Array, source: Array, **by: Array) -> Array:
    x, source = rescale_each((x, source), by, node_format.output, target) if by else (x, source)
    return eval_float(op, x, source)  # which writes integers as well


@eval_integer.register
def _(
    op: Scatter, node_format: NodeFormat, target: Target, x: Array, index: Array, source: Array, **by: Array
) -> Array:
    if not by:  # exact values
        return _scattered(op, x, index, source)
    x, source = rescale_each((x, source), by, node_format.output, target)
    return saturate(_scattered(op, widen(x), index, widen(source)), node_format.output)


@to_channels_last.register
def _(op: SliceScatter, rank: int) -> Op:
    starts, stops, steps = (channels_last_order(v) for v in (op.starts, op.stops, op.steps))
    return replace(op, starts=starts, stops=stops, steps=steps)


@to_channels_last.register
def _(op: Scatter, rank: int) -> Op:
    return replace(op, axis=channels_last_axis(op.axis, rank))
