"""Sorting and the largest elements: exact on integers, the scale is kept; positions are exact int32 values.

The order is stable: of equal elements, the one of the lower index comes first, descending too. Values and positions are
two operators, since a node has one output.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jquant.graph.operator import Lowered, Operand, eval_float, eval_integer, lower_op, to_channels_last
from jquant.numerics.order import sorted_indices, sorted_values
from jquant.ops.movement import channels_last_axis, only_moves
from jquant.types import Array, GraphError, NodeFormat, Op, Target


@dataclass(frozen=True, kw_only=True)
class Sort(Op):
    """The elements along `axis` in order."""

    reduces: ClassVar = True
    takes_exact: ClassVar = True
    layout: ClassVar = "axes"
    scale_rule: ClassVar = "same_as_input"
    needs_stats: ClassVar = False

    axis: int
    descending: bool = False


@dataclass(frozen=True, kw_only=True)
class SortIndices(Op):
    """Where along `axis` the elements of `Sort` come from, int32."""

    reduces: ClassVar = True
    takes_exact: ClassVar = True
    layout: ClassVar = "axes"
    needs_stats: ClassVar = False

    axis: int
    descending: bool = False


@dataclass(frozen=True, kw_only=True)
class TopK(Op):
    """The k largest (or smallest) elements along `axis`, in order."""

    reduces: ClassVar = True
    takes_exact: ClassVar = True
    layout: ClassVar = "axes"
    scale_rule: ClassVar = "same_as_input"
    needs_stats: ClassVar = False

    axis: int
    k: int
    largest: bool = True


@dataclass(frozen=True, kw_only=True)
class TopKIndices(Op):
    """Where along `axis` the elements of `TopK` come from, int32."""

    reduces: ClassVar = True
    takes_exact: ClassVar = True
    layout: ClassVar = "axes"
    needs_stats: ClassVar = False

    axis: int
    k: int
    largest: bool = True


def _first(op: TopK | TopKIndices, ordered: Array) -> Array:
    size = ordered.shape[op.axis]
    if not 0 < op.k <= size:
        raise GraphError(f"k={op.k} elements of an axis of {size}")
    return jax.lax.slice_in_dim(ordered, 0, op.k, axis=op.axis)


@eval_float.register
def _(op: SortIndices, x: Array) -> Array:
    return sorted_indices(x, op.axis, op.descending)


@eval_float.register
def _(op: TopKIndices, x: Array) -> Array:
    return _first(op, sorted_indices(x, op.axis, op.largest))


@eval_float.register
def _(op: Sort, x: Array) -> Array:
    return jnp.take_along_axis(x, sorted_indices(x, op.axis, op.descending), axis=op.axis)


@eval_float.register
def _(op: TopK, x: Array) -> Array:
    return jnp.take_along_axis(x, _first(op, sorted_indices(x, op.axis, op.largest)), axis=op.axis)


only_moves(SortIndices, TopKIndices)


@lower_op.register(Sort)
@lower_op.register(TopK)
def _(op: Op, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    return Lowered({})


@eval_integer.register
def _(op: Sort, node_format: NodeFormat, target: Target, x: Array) -> Array:
    return sorted_values(x, op.axis, op.descending)


@eval_integer.register
def _(op: TopK, node_format: NodeFormat, target: Target, x: Array) -> Array:
    return _first(op, sorted_values(x, op.axis, op.largest))


@to_channels_last.register(Sort)
@to_channels_last.register(SortIndices)
@to_channels_last.register(TopK)
@to_channels_last.register(TopKIndices)
def _(op: Sort | SortIndices | TopK | TopKIndices, rank: int) -> Op:
    return replace(op, axis=channels_last_axis(op.axis, rank))
