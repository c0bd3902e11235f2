"""Data movement: exact on integers, the scale is kept; concatenation rescales."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax.numpy as jnp

from jquant.numerics.rescale import Rescale, rescale
from jquant.numerics.rounding import quantize, widen
from jquant.ops.base import Lowered, Operand, derived_scale, eval_float, eval_integer, lower_op, to_channels_last
from jquant.ops.elementwise import requantize
from jquant.types import Array, NodeFormat, Op, Target


@dataclass(frozen=True, kw_only=True)
class Cat(Op):
    """Concatenation along `axis`."""

    layout: ClassVar = "axes"

    axis: int


@dataclass(frozen=True, kw_only=True)
class Reshape(Op):
    """Reshape with at most one -1, which stands for the symbolic batch or a free axis."""

    scale_rule: ClassVar = "same_as_input"
    needs_stats: ClassVar = False

    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Flatten(Op):
    """Joins axes `start` to `end` inclusive."""

    scale_rule: ClassVar = "same_as_input"
    needs_stats: ClassVar = False

    start: int = 1
    end: int = -1


@dataclass(frozen=True, kw_only=True)
class Permute(Op):
    """Transposition: output axis i is input axis axes[i]."""

    scale_rule: ClassVar = "derived"  # the scale is kept, but a per-channel one moves with its axis
    needs_stats: ClassVar = False

    axes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Pad(Op):
    """Constant padding, (before, after) for every axis."""

    layout: ClassVar = "axes"
    scale_rule: ClassVar = "same_as_input"
    needs_stats: ClassVar = False

    padding: tuple[tuple[int, int], ...]
    value: float = 0.0


def channels_last_axis(axis: int, rank: int) -> int:
    """Where an axis of [N, C, *S] lies in [N, *S, C]."""
    axis %= rank
    return axis if axis == 0 else rank - 1 if axis == 1 else axis - 1


@eval_float.register
def _(op: Cat, *inputs: Array) -> Array:
    return jnp.concatenate(inputs, axis=op.axis)


@lower_op.register
def _(op: Cat, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    each = [requantize(x, output) for x in inputs]
    return Lowered({role: jnp.stack([getattr(by, role) for by in each]) for role in Rescale._fields})


@eval_integer.register
def _(op: Cat, node_format: NodeFormat, target: Target, *inputs: Array, **by: Array) -> Array:
    parts = [
        rescale(widen(x), Rescale(**{role: v[i] for role, v in by.items()}), node_format.output, target)
        for i, x in enumerate(inputs)
    ]
    return jnp.concatenate(parts, axis=op.axis)


@to_channels_last.register
def _(op: Cat, rank: int) -> Op:
    return replace(op, axis=channels_last_axis(op.axis, rank))


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


@eval_float.register
def _(op: Pad, x: Array) -> Array:
    return jnp.pad(x, op.padding, constant_values=op.value)


@lower_op.register(Reshape)
@lower_op.register(Flatten)
@lower_op.register(Permute)
def _(op: Op, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    return Lowered({})


@eval_integer.register(Reshape)
@eval_integer.register(Flatten)
@eval_integer.register(Permute)
def _(op: Op, node_format: NodeFormat, target: Target, x: Array) -> Array:
    return eval_float(op, x)  # only moves elements


@lower_op.register
def _(op: Pad, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    return Lowered({"fill": quantize(jnp.float32(op.value), output.scale, output.dtype, "half_up")})


@eval_integer.register
def _(op: Pad, node_format: NodeFormat, target: Target, x: Array, *, fill: Array) -> Array:
    return jnp.pad(x, op.padding, constant_values=fill)


@to_channels_last.register
def _(op: Pad, rank: int) -> Op:
    return replace(op, padding=(op.padding[0], *op.padding[2:], op.padding[1]))
