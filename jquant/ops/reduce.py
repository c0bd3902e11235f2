"""Reductions over axes: sums, means, extremes and where they are, masks, and running sums.

The batch is never reduced: its size is not known, and an example must not depend on the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jquant.graph.operator import Lowered, Operand, constraints, eval_float, eval_integer, lower_op, to_channels_last
from jquant.numerics import sums
from jquant.numerics.rescale import Rescale, ratio, rescale, rescale_of
from jquant.numerics.rounding import widen
from jquant.ops.movement import channels_last_axis, only_moves
from jquant.types import EXACT_DTYPES, Array, GraphError, NodeFormat, Op, Target, bit_width


@dataclass(frozen=True, kw_only=True)
class Mean(Op):
    """Mean over `axes`."""

    reduces: ClassVar = True
    layout: ClassVar = "axes"

    axes: tuple[int, ...]
    keepdims: bool = False


@dataclass(frozen=True, kw_only=True)
class Sum(Op):
    """Sum over `axes`. Of a mask: how many are true, an exact int32."""

    reduces: ClassVar = True
    takes_exact: ClassVar = True
    layout: ClassVar = "axes"

    axes: tuple[int, ...]
    keepdims: bool = False


@dataclass(frozen=True, kw_only=True)
class ReduceMax(Op):
    """The largest element over `axes`."""

    reduces: ClassVar = True
    takes_exact: ClassVar = True
    layout: ClassVar = "axes"
    scale_rule: ClassVar = "same_as_input"
    needs_stats: ClassVar = False

    axes: tuple[int, ...]
    keepdims: bool = False


@dataclass(frozen=True, kw_only=True)
class ReduceMin(Op):
    """The smallest element over `axes`."""

    reduces: ClassVar = True
    takes_exact: ClassVar = True
    layout: ClassVar = "axes"
    scale_rule: ClassVar = "same_as_input"
    needs_stats: ClassVar = False

    axes: tuple[int, ...]
    keepdims: bool = False


@dataclass(frozen=True, kw_only=True)
class ReduceAll(Op):
    """A mask: whether all elements over `axes` are true, or not 0."""

    reduces: ClassVar = True
    takes_exact: ClassVar = True
    layout: ClassVar = "axes"
    needs_stats: ClassVar = False

    axes: tuple[int, ...]
    keepdims: bool = False


@dataclass(frozen=True, kw_only=True)
class ReduceAny(Op):
    """A mask: whether an element over `axes` is true, or not 0."""

    reduces: ClassVar = True
    takes_exact: ClassVar = True
    layout: ClassVar = "axes"
    needs_stats: ClassVar = False

    axes: tuple[int, ...]
    keepdims: bool = False


@dataclass(frozen=True, kw_only=True)
class ArgMax(Op):
    """The position of the largest element of `axis`, the first one of several: exact int32."""

    reduces: ClassVar = True
    takes_exact: ClassVar = True
    layout: ClassVar = "axes"
    needs_stats: ClassVar = False

    axis: int
    keepdims: bool = False


@dataclass(frozen=True, kw_only=True)
class ArgMin(Op):
    """The position of the smallest element of `axis`, the first one of several: exact int32."""

    reduces: ClassVar = True
    takes_exact: ClassVar = True
    layout: ClassVar = "axes"
    needs_stats: ClassVar = False

    axis: int
    keepdims: bool = False


@dataclass(frozen=True, kw_only=True)
class CumSum(Op):
    """The sum of all elements of `axis` up to each one; `exclusive`: before it; `reverse`: counted from the end."""

    reduces: ClassVar = True
    takes_exact: ClassVar = True
    layout: ClassVar = "axes"

    axis: int
    exclusive: bool = False
    reverse: bool = False


Reduction = Mean | Sum | ReduceMax | ReduceMin | ReduceAll | ReduceAny

# ---------------------------------------------------------------------------------------------------------------------
# Sums: exact, then rescaled from s_x / N (specification, section 5)


def average(x: Operand, output: Operand, counts: Any, target: Target) -> Rescale:
    """The rescale of a sum that is divided by `counts`, a number or an array of them."""
    share = ratio(x.scale, 1.0, output.scale, np.asarray(counts, np.float32))
    return rescale_of(share, bits=bit_width(output.dtype), form=target.rescale)


def reduced_limit(count: int, target: Target) -> list[str]:
    return [f"{count} elements are reduced, more than {target.max_reduced}"] if count > target.max_reduced else []


def _terms(x: Array) -> Array:
    """What can be summed: numbers, and masks and pixels as int32."""
    if x.dtype == jnp.int32:
        raise GraphError("a sum of exact int32 values may leave int32; sum masks, pixels or numbers")
    return x if jnp.issubdtype(x.dtype, jnp.floating) else widen(x)


@eval_float.register
def _(op: Mean, x: Array) -> Array:
    return _terms(x).astype(jnp.float32).mean(op.axes, keepdims=op.keepdims)


@eval_float.register
def _(op: Sum, x: Array) -> Array:
    return _terms(x).sum(op.axes, keepdims=op.keepdims)


@eval_float.register
def _(op: CumSum, x: Array) -> Array:
    return sums.running_sum(_terms(x), op.axis, reverse=op.reverse, exclusive=op.exclusive)


def _lower_sum(x: Operand, output: Operand, terms: int, divisor: int, target: Target) -> Lowered:
    if output.dtype in EXACT_DTYPES:
        return Lowered({})
    worst = sums.worst_sum(terms, x.dtype)
    wide = worst > 2**31 - 1
    return Lowered(average(x, output, divisor, target)._asdict(), "limbs" if wide else "int32", worst)


def _count(x: Operand, axes: Sequence[int]) -> int:
    return prod(x.shape[axis] or 1 for axis in axes)


@lower_op.register
def _(op: Mean, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    count = _count(inputs[0], op.axes)
    return _lower_sum(inputs[0], output, count, count, target)


@lower_op.register
def _(op: Sum, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    return _lower_sum(inputs[0], output, _count(inputs[0], op.axes), 1, target)


@lower_op.register
def _(op: CumSum, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    return _lower_sum(inputs[0], output, _count(inputs[0], (op.axis,)), 1, target)


@eval_integer.register(Mean)
@eval_integer.register(Sum)
def _(op: Mean | Sum, node_format: NodeFormat, target: Target, x: Array, **by: Array) -> Array:
    if not by:
        return eval_float(op, x)
    if node_format.accumulator == "limbs":
        wide = sums.wide_sum(widen(x), op.axes, keepdims=op.keepdims)
        return rescale(wide, Rescale(**by), node_format.output, target)
    return rescale(widen(x).sum(op.axes, keepdims=op.keepdims), Rescale(**by), node_format.output, target)


@eval_integer.register
def _(op: CumSum, node_format: NodeFormat, target: Target, x: Array, **by: Array) -> Array:
    if not by:
        return eval_float(op, x)
    running = sums.wide_running_sum if node_format.accumulator == "limbs" else sums.running_sum
    total = running(widen(x), op.axis, reverse=op.reverse, exclusive=op.exclusive)
    return rescale(total, Rescale(**by), node_format.output, target)


# ---------------------------------------------------------------------------------------------------------------------
# Exact on integers


@eval_float.register
def _(op: ReduceMax, x: Array) -> Array:
    return x.max(op.axes, keepdims=op.keepdims)


@eval_float.register
def _(op: ReduceMin, x: Array) -> Array:
    return x.min(op.axes, keepdims=op.keepdims)


@eval_float.register
def _(op: ReduceAll, x: Array) -> Array:
    return (x if x.dtype == jnp.bool_ else x != 0).all(op.axes, keepdims=op.keepdims)


@eval_float.register
def _(op: ReduceAny, x: Array) -> Array:
    return (x if x.dtype == jnp.bool_ else x != 0).any(op.axes, keepdims=op.keepdims)


@eval_float.register
def _(op: ArgMax, x: Array) -> Array:
    return _position(jax.lax.argmax(x, op.axis % x.ndim, jnp.int32), op)


@eval_float.register
def _(op: ArgMin, x: Array) -> Array:
    return _position(jax.lax.argmin(x, op.axis % x.ndim, jnp.int32), op)


def _position(index: Array, op: ArgMax | ArgMin) -> Array:
    if not op.keepdims:
        return index
    return jnp.expand_dims(index, op.axis % (index.ndim + 1))


only_moves(ReduceMax, ReduceMin, ReduceAll, ReduceAny, ArgMax, ArgMin)

# ---------------------------------------------------------------------------------------------------------------------
# Limits and layout


def _batch_limit(x: Operand, axes: Sequence[int]) -> list[str]:
    if all(axis % len(x.shape) for axis in axes):
        return []
    return ["it reduces over the batch, which has no fixed number of elements; do that after the network"]


@constraints.register(Mean)
@constraints.register(Sum)
@constraints.register(ReduceMax)
@constraints.register(ReduceMin)
@constraints.register(ReduceAll)
@constraints.register(ReduceAny)
def _(op: Reduction, inputs: Sequence[Operand], output: Operand, weight_dtype: str | None, target: Target) -> list[str]:
    return _batch_limit(inputs[0], op.axes) or reduced_limit(_count(inputs[0], op.axes), target)


@constraints.register
def _(op: CumSum, inputs: Sequence[Operand], output: Operand, weight_dtype: str | None, target: Target) -> list[str]:
    return _batch_limit(inputs[0], (op.axis,)) or reduced_limit(_count(inputs[0], (op.axis,)), target)


@constraints.register(ArgMax)
@constraints.register(ArgMin)
def _(
    op: ArgMax | ArgMin, inputs: Sequence[Operand], output: Operand, weight_dtype: str | None, target: Target
) -> list[str]:
    (x,), count = inputs, _count(inputs[0], (op.axis,))
    most = target.max_searched
    searched = [f"it searches {count} elements, more than {most}"] if count > most else []
    return _batch_limit(x, (op.axis,)) or searched


def _keeps_order(axes: Sequence[int], rank: int) -> bool:
    """Whether what is left without these axes has the framework's order: no channels, or nothing behind them."""
    gone = {axis % rank for axis in axes}
    return 1 in gone or set(range(2, rank)) <= gone


@to_channels_last.register(Mean)
@to_channels_last.register(Sum)
@to_channels_last.register(ReduceMax)
@to_channels_last.register(ReduceMin)
@to_channels_last.register(ReduceAll)
@to_channels_last.register(ReduceAny)
def _(op: Reduction, rank: int) -> Op | None:
    if not (op.keepdims or _keeps_order(op.axes, rank)):
        return None
    return replace(op, axes=tuple(sorted(channels_last_axis(a, rank) for a in op.axes)))


@to_channels_last.register(ArgMax)
@to_channels_last.register(ArgMin)
def _(op: ArgMax | ArgMin, rank: int) -> Op | None:
    if not (op.keepdims or _keeps_order((op.axis,), rank)):
        return None
    return replace(op, axis=channels_last_axis(op.axis, rank))


@to_channels_last.register
def _(op: CumSum, rank: int) -> Op:
    return replace(op, axis=channels_last_axis(op.axis, rank))
