"""Picking elements: slices, indices that are static, and indices that are values of the graph (exact int32)."""

from dataclasses import dataclass, replace
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from jquant.graph.checks import check_lengths
from jquant.graph.operator import eval_float, to_channels_last
from jquant.ops.movement import channels_last_axis, channels_last_order, only_moves
from jquant.types import Array, GraphError, Op


@dataclass(frozen=True, kw_only=True)
class Slice(Op):
    """x[starts[0]:stops[0]:steps[0], ...], an entry for every axis, steps positive. A stop of None is the end."""

    takes_exact: ClassVar = True
    layout: ClassVar = "axes"
    scale_rule: ClassVar = "same_as_input"
    needs_stats: ClassVar = False
    moves: ClassVar = True

    starts: tuple[int, ...]
    stops: tuple[int | None, ...]
    steps: tuple[int, ...]

    def __post_init__(self) -> None:
        check_lengths(self, "starts", "stops", "steps")


@dataclass(frozen=True, kw_only=True)
class IndexSelect(Op):
    """Elements of `axis` at `indices`, or at a second operand [K] int32 where that is None.

    Static indices may count from the end. Those of an operand are clamped to the axis.
    """

    takes_exact: ClassVar = True
    layout: ClassVar = "axes"
    scale_rule: ClassVar = "same_as_input"
    needs_stats: ClassVar = False
    moves: ClassVar = True
    ports: ClassVar = ("x", "index")

    axis: int
    indices: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Gather(Op):
    """y[..., i, ...] = x[..., index[..., i, ...], ...] along `axis`, index int32 of the rank of x: torch.gather.

    The index may be shorter than x along the other axes. It is clamped to the axis.
    """

    takes_exact: ClassVar = True
    layout: ClassVar = "axes"
    scale_rule: ClassVar = "same_as_input"
    needs_stats: ClassVar = False
    ports: ClassVar = ("x", "index")

    axis: int


@eval_float.register
def _(op: Slice, x: Array) -> Array:
    if min(op.steps, default=1) < 1:
        raise GraphError(f"steps {op.steps} must be positive; reverse an axis by Flip")
    return x[tuple(slice(*bounds) for bounds in zip(op.starts, op.stops, op.steps, strict=True))]


@eval_float.register
def _(op: IndexSelect, x: Array, index: Array | None = None) -> Array:
    size = x.shape[op.axis]
    if (index is None) == (op.indices is None):
        raise GraphError("it takes static indices or an index operand, one of the two")
    if index is None:
        if not all(-size <= i < size for i in op.indices or ()):
            raise GraphError(f"indices {op.indices} leave axis {op.axis} of {size} elements")
        return jnp.take(x, np.array(op.indices, np.int32) % size, axis=op.axis, mode="clip")
    if index.ndim != 1:
        raise GraphError(f"the index has {index.ndim} axes, not 1; reshape it")
    return jnp.take(x, _clamped(index, size), axis=op.axis, mode="clip")


@eval_float.register
def _(op: Gather, x: Array, index: Array) -> Array:
    axis = op.axis % x.ndim
    fits = index.ndim == x.ndim and all(
        m <= n for d, (m, n) in enumerate(zip(index.shape, x.shape, strict=True)) if d != axis
    )
    if not fits:
        raise GraphError(f"an index of shape {list(index.shape)} does not fit {list(x.shape)} along axis {axis}")
    within = x[tuple(slice(None) if d == axis else slice(m) for d, m in enumerate(index.shape))]
    return jnp.take_along_axis(within, _clamped(index, x.shape[axis]), axis=axis, mode="clip")


def _clamped(index: Array, size: int) -> Array:
    if index.dtype != jnp.int32:
        raise GraphError(f"the index is {index.dtype}, not int32; make it by an operator that returns indices")
    return jnp.clip(index, 0, size - 1)


only_moves(Slice, IndexSelect, Gather)


@to_channels_last.register
def _(op: Slice, rank: int) -> Op:
    starts, stops, steps = (channels_last_order(v) for v in (op.starts, op.stops, op.steps))
    return replace(op, starts=starts, stops=stops, steps=steps)


@to_channels_last.register(IndexSelect)
@to_channels_last.register(Gather)
def _(op: IndexSelect | Gather, rank: int) -> Op:
    return replace(op, axis=channels_last_axis(op.axis, rank))
