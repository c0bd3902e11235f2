"""Data movement: exact on integers, the scale is kept; joining operands rescales them to the output."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np

from jquant.graph.checks import check_lengths
from jquant.graph.operator import (
    Lowered,
    Operand,
    constraints,
    derived_scale,
    eval_float,
    eval_integer,
    lower_op,
    to_channels_last,
)
from jquant.numerics.namespace import real, to_device
from jquant.numerics.rounding import quantize
from jquant.ops.elementwise import requantize_each, rescale_each
from jquant.types import EXACT_DTYPES, Array, GraphError, NodeFormat, Op, Target, storage_dtype


@dataclass(frozen=True, kw_only=True)
class Cat(Op):
    """Concatenation along `axis`."""

    takes_exact: ClassVar = True
    layout: ClassVar = "axes"

    axis: int


@dataclass(frozen=True, kw_only=True)
class Stack(Op):
    """Operands of one shape side by side along a new axis, which is `axis` of the output."""

    takes_exact: ClassVar = True

    axis: int


@dataclass(frozen=True, kw_only=True)
class Reshape(Op):
    """Reshape with at most one -1, which stands for the symbolic batch or a free axis."""

    takes_exact: ClassVar = True
    scale_rule: ClassVar = "same_as_input"
    needs_stats: ClassVar = False
    moves: ClassVar = True

    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Flatten(Op):
    """Joins axes `start` to `end` inclusive."""

    takes_exact: ClassVar = True
    scale_rule: ClassVar = "same_as_input"
    needs_stats: ClassVar = False
    moves: ClassVar = True

    start: int = 1
    end: int = -1


@dataclass(frozen=True, kw_only=True)
class Permute(Op):
    """Transposition: output axis i is input axis axes[i]."""

    takes_exact: ClassVar = True
    scale_rule: ClassVar = "derived"  # the scale is kept, but a per-channel one moves with its axis
    needs_stats: ClassVar = False
    moves: ClassVar = True

    axes: tuple[int, ...]

    def __post_init__(self) -> None:
        axes = [axis % len(self.axes) for axis in self.axes]
        if sorted(axes) != list(range(len(axes))):
            raise GraphError(f"Permute: axes {self.axes} are no permutation")


@dataclass(frozen=True, kw_only=True)
class Pad(Op):
    """Padding, (before, after) for every axis: with `value`, the border element, or the mirror image without it."""

    takes_exact: ClassVar = True
    layout: ClassVar = "axes"
    scale_rule: ClassVar = "same_as_input"
    needs_stats: ClassVar = False
    moves: ClassVar = True

    padding: tuple[tuple[int, int], ...]
    value: float = 0.0
    mode: Literal["constant", "border", "reflect"] = "constant"


@dataclass(frozen=True, kw_only=True)
class Expand(Op):
    """Repeats axes of size 1 without a copy of the data. -1 keeps an axis; new axes come first.

    With a second operand, `like`, axis 0 becomes as long as its axis 0: a constant [1, ...] for every example.
    """

    takes_exact: ClassVar = True
    layout: ClassVar = "axes"
    scale_rule: ClassVar = "same_as_input"
    needs_stats: ClassVar = False
    moves: ClassVar = True
    ports: ClassVar = ("x", "like")

    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Tile(Op):
    """The whole tensor repeats[i] times along axis i; new axes come first."""

    takes_exact: ClassVar = True
    layout: ClassVar = "axes"
    scale_rule: ClassVar = "same_as_input"
    needs_stats: ClassVar = False
    moves: ClassVar = True

    repeats: tuple[int, ...]

    def __post_init__(self) -> None:
        if any(n < 1 for n in self.repeats):
            raise GraphError(f"Tile: repeats {self.repeats} must be positive: no value is empty")


@dataclass(frozen=True, kw_only=True)
class Roll(Op):
    """Shifts elements by shifts[i] towards the end of axes[i]; what leaves comes in again at the start."""

    takes_exact: ClassVar = True
    layout: ClassVar = "axes"
    scale_rule: ClassVar = "same_as_input"
    needs_stats: ClassVar = False
    moves: ClassVar = True

    shifts: tuple[int, ...]
    axes: tuple[int, ...]

    def __post_init__(self) -> None:
        check_lengths(self, "shifts", "axes")


@dataclass(frozen=True, kw_only=True)
class Flip(Op):
    """Reverses the order along `axes`."""

    takes_exact: ClassVar = True
    layout: ClassVar = "axes"
    scale_rule: ClassVar = "same_as_input"
    needs_stats: ClassVar = False
    moves: ClassVar = True

    axes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class StopGradient(Op):
    """The identity, through which no gradient passes."""

    layout: ClassVar = "elementwise"
    scale_rule: ClassVar = "same_as_input"
    needs_stats: ClassVar = False
    moves: ClassVar = True


# ---------------------------------------------------------------------------------------------------------------------
# What other families share


def channels_last_axis(axis: int, rank: int) -> int:
    """Where an axis of [N, C, *S] lies in [N, *S, C]."""
    axis %= rank
    return axis if axis == 0 else rank - 1 if axis == 1 else axis - 1


def channels_last_order(values: tuple) -> tuple:
    """One entry for each axis of [N, C, *S], in the order of [N, *S, C]."""
    return (values[0], *values[2:], values[1]) if len(values) > 2 else values


def only_moves(*operators: type[Op]) -> None:
    """Registers the integer side of operators whose float rule computes nothing: it is their integer rule too."""
    for operator in operators:
        lower_op.register(operator)(_no_constants)
        eval_integer.register(operator)(_float_rule)


def _no_constants(
    op: Op, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target
) -> Lowered:
    return Lowered({})


def _float_rule(op: Op, node_format: NodeFormat, target: Target, *inputs: Array) -> Array:
    return eval_float(op, *inputs)


# ---------------------------------------------------------------------------------------------------------------------
# Joining


@eval_float.register
def _(op: Cat, *inputs: Array) -> Array:
    return jnp.concatenate(inputs, axis=op.axis)


@eval_float.register
def _(op: Stack, *inputs: Array) -> Array:
    return jnp.stack(inputs, axis=op.axis)


@lower_op.register(Cat)
@lower_op.register(Stack)
def _(op: Op, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    if output.dtype in EXACT_DTYPES:
        return Lowered({})
    return Lowered(requantize_each(inputs, [output] * len(inputs), target))


@eval_integer.register(Cat)
@eval_integer.register(Stack)
def _(op: Op, node_format: NodeFormat, target: Target, *inputs: Array, **by: Array) -> Array:
    if not by:  # exact values
        return eval_float(op, *inputs)
    return eval_float(op, *rescale_each(inputs, by, node_format.output, target))  # which joins integers as well


@to_channels_last.register
def _(op: Cat, rank: int) -> Op:
    return replace(op, axis=channels_last_axis(op.axis, rank))


# ---------------------------------------------------------------------------------------------------------------------
# Shapes


@eval_float.register
def _(op: Reshape, x: Array) -> Array:
    return x.reshape(op.shape)


@eval_float.register
def _(op: Flatten, x: Array) -> Array:
    start, end = op.start % x.ndim, op.end % x.ndim
    return x.reshape(*x.shape[:start], -1, *x.shape[end + 1 :])


@eval_float.register
def _(op: Permute, x: Array) -> Array:
    return jnp.transpose(x, op.axes)


@derived_scale.register
def _(op: Permute, *scales: Array) -> Array:
    (scale,) = scales
    if scale.ndim == 0:
        return scale
    return jnp.transpose(scale.reshape((1,) * (len(op.axes) - scale.ndim) + scale.shape), op.axes)


def moved_scale(op: Op, scale: Array, shape: tuple[int, ...]) -> Array:
    """The scale of an accumulator's value behind data movement: scales of channels move as the values do.

    `shape` is that of the operand, without the batch. The result broadcasts against the moved value.
    """
    if scale.ndim == 0:
        return scale
    if isinstance(op, Permute):
        return derived_scale(op, scale)
    if isinstance(op, Pad) and op.mode == "constant":
        op = replace(op, mode="border")  # zeros have any scale
    return eval_float(_of_one(op), jnp.broadcast_to(scale, (1, *shape)))


def carries_accumulator(op: Op, before: Sequence[int], after: Sequence[int]) -> bool:
    """Whether an operator of one operand moves every accumulator of these shapes along, with its scales of channels.

    Axis 0 has to stay the batch, since scales have none.
    """
    if not op.moves or before[:1] != after[:1] or (isinstance(op, Permute) and op.axes[0] != 0):
        return False
    if isinstance(op, Pad) and op.mode == "constant":
        return op.value == 0  # 0 has every scale
    if isinstance(op, Permute):
        return True
    one = jax.ShapeDtypeStruct((1, *before[1:]), jnp.float32)
    try:
        return jax.eval_shape(partial(eval_float, _of_one(op)), one).shape == (1, *after[1:])
    except (GraphError, TypeError, ValueError):
        return False


def _of_one(op: Op) -> Op:
    """The operator for a batch of 1."""
    return replace(op, shape=(1, *op.shape[1:])) if isinstance(op, Reshape) else op


@eval_float.register
def _(op: Expand, x: Array, like: Array | None = None) -> Array:
    sizes = (1,) * (len(op.shape) - x.ndim) + x.shape
    wanted = [old if new == -1 else new for new, old in zip(op.shape, sizes, strict=True)]
    if like is not None:
        wanted[0] = like.shape[0]
    return jnp.broadcast_to(x, tuple(wanted))


@eval_float.register
def _(op: Tile, x: Array) -> Array:
    if len(op.repeats) < x.ndim:
        raise GraphError(f"{len(op.repeats)} repeats for {x.ndim} axes; give one for each")
    return jnp.tile(x, op.repeats)


@eval_float.register
def _(op: Roll, x: Array) -> Array:
    return jnp.roll(x, op.shifts, op.axes)


@eval_float.register
def _(op: Flip, x: Array) -> Array:
    return jnp.flip(x, op.axes)


@eval_float.register
def _(op: StopGradient, x: Array) -> Array:
    return jax.lax.stop_gradient(x)


only_moves(Reshape, Flatten, Permute, Expand, Tile, Roll, Flip, StopGradient)


@to_channels_last.register
def _(op: Expand, rank: int) -> Op | None:
    return replace(op, shape=channels_last_order(op.shape)) if len(op.shape) == rank else None


@to_channels_last.register
def _(op: Tile, rank: int) -> Op | None:
    return replace(op, repeats=channels_last_order(op.repeats)) if len(op.repeats) == rank else None


@to_channels_last.register(Roll)
@to_channels_last.register(Flip)
def _(op: Roll | Flip, rank: int) -> Op:
    return replace(op, axes=tuple(channels_last_axis(axis, rank) for axis in op.axes))


# ---------------------------------------------------------------------------------------------------------------------
# Padding


def _padded(op: Pad, x: Array, fill: Any) -> Array:
    if op.mode == "constant":
        return jnp.pad(x, op.padding, constant_values=fill)
    if op.mode == "border":
        return jnp.pad(x, op.padding, mode="edge")
    if any(max(pair) >= n for pair, n in zip(op.padding, x.shape, strict=True) if any(pair)):
        raise GraphError(f"reflect padding {op.padding} must be smaller than the axes it pads")
    return jnp.pad(x, op.padding, mode="reflect")


def _exact_fill(op: Pad, dtype: str) -> np.ndarray:
    fill = np.asarray(op.value).astype(dtype)
    if fill != op.value:
        raise GraphError(f"the padding value {op.value:g} is no {dtype}")
    return fill


@eval_float.register
def _(op: Pad, x: Array) -> Array:
    exact = str(x.dtype) in EXACT_DTYPES
    return _padded(op, x, _exact_fill(op, str(x.dtype)) if exact else np.float32(op.value))


@lower_op.register
def _(op: Pad, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    if op.mode != "constant":
        return Lowered({})
    if output.dtype in EXACT_DTYPES:
        return Lowered({"fill": to_device(cast(Array, _exact_fill(op, output.dtype)))})
    if op.value == 0:  # of an accumulator too, whose channels have scales of their own
        return Lowered({"fill": to_device(cast(Array, np.zeros((), storage_dtype(output.dtype))))})
    return Lowered({"fill": quantize(real(op.value), output.scale, output.dtype, target.number_rounding)})


@eval_integer.register
def _(op: Pad, node_format: NodeFormat, target: Target, x: Array, *, fill: Array | None = None) -> Array:
    return _padded(op, x, fill)


@constraints.register
def _(op: Pad, inputs: Sequence[Operand], output: Operand, weight_dtype: str | None, target: Target) -> list[str]:
    return ["it pads with constants or the border, not by reflection"] if op.mode == "reflect" else []


@to_channels_last.register
def _(op: Pad, rank: int) -> Op:
    return replace(op, padding=channels_last_order(op.padding))
