"""Activations that are not tables: those of `table.py` are."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jquant.graph.operator import Lowered, Operand, check_roles, eval_float, eval_integer, lower_op, to_channels_last
from jquant.numerics.namespace import array_namespace, real
from jquant.numerics.rescale import Rescale, ratio, rescale_of, rescale_unsaturated
from jquant.numerics.rounding import divide, expand, quantize, saturate, widen
from jquant.ops.movement import channels_last_axis
from jquant.types import MIN_SCALE, Array, GraphError, NodeFormat, Op, Target, bit_width, integer_range


@dataclass(frozen=True, kw_only=True)
class Relu(Op):
    """max(x, 0)."""

    layout: ClassVar = "elementwise"
    scale_rule: ClassVar = "same_as_input"
    needs_stats: ClassVar = False


@dataclass(frozen=True, kw_only=True)
class Relu6(Op):
    """min(max(x, 0), 6)."""

    layout: ClassVar = "elementwise"
    scale_rule: ClassVar = "same_as_input"
    needs_stats: ClassVar = False


@dataclass(frozen=True, kw_only=True)
class PRelu(Op):
    """max(x, 0) + weight * min(x, 0). Parameter: weight [C] or [1]."""

    layout: ClassVar = "spatial"

    channels_last: bool = False


@dataclass(frozen=True, kw_only=True)
class Dropout(Op):
    """Zeroes a share `rate` in training and scales the rest up; the identity everywhere else.

    One draw counts for all elements along `shared_axes`, which count from the start: (1, 2, 3) of [N, H, W, C] keeps or
    drops whole examples, as stochastic depth does (Huang et al. 2016, arXiv:1603.09382).
    """

    layout: ClassVar = "elementwise"
    scale_rule: ClassVar = "same_as_input"
    needs_stats: ClassVar = False
    stochastic: ClassVar = True

    rate: float = 0.5
    shared_axes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise GraphError(f"Dropout: rate {self.rate} must be from 0 to 1")


# ---------------------------------------------------------------------------------------------------------------------
# Exact on integers


@eval_float.register
def _(op: Relu, x: Array) -> Array:
    return jnp.maximum(x, 0.0)


@eval_float.register
def _(op: Relu6, x: Array) -> Array:
    return jnp.clip(x, 0.0, 6.0)


@eval_float.register
def _(op: Dropout, x: Array, *, rng: Array | None = None) -> Array:
    if rng is None:
        return x
    shape = tuple(1 if axis in op.shared_axes else n for axis, n in enumerate(x.shape))
    keep = jax.random.bernoulli(rng, 1.0 - op.rate, shape)
    return jnp.where(keep, x / (1.0 - op.rate), 0.0)


@lower_op.register(Relu)
@lower_op.register(Dropout)
def _(op: Op, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    return Lowered({})


@eval_integer.register
def _(op: Relu, node_format: NodeFormat, target: Target, x: Array) -> Array:
    return jnp.maximum(x, 0)


@eval_integer.register
def _(op: Dropout, node_format: NodeFormat, target: Target, x: Array) -> Array:
    return x


@lower_op.register
def _(op: Relu6, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    return Lowered({"upper": quantize(real(6.0), output.scale, output.dtype, target.number_rounding)})


@eval_integer.register
def _(op: Relu6, node_format: NodeFormat, target: Target, x: Array, *, upper: Array) -> Array:
    return jnp.clip(x, 0, upper)


# ---------------------------------------------------------------------------------------------------------------------
# PReLU: rescale(max(x, 0)) + rescale(slope * min(x, 0)), one sum before saturation


def _channel_axis(op: PRelu, rank: int) -> int:
    return rank - 1 if op.channels_last else min(1, rank - 1)


@eval_float.register
def _(op: PRelu, x: Array, *, weight: Array) -> Array:
    slope = weight if weight.size == 1 else expand(weight, _channel_axis(op, x.ndim), x.ndim)
    return jnp.maximum(x, 0.0) + slope * jnp.minimum(x, 0.0)


@lower_op.register
def _(op: PRelu, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    (x,), bits = inputs, bit_width(output.dtype)
    weight = params["weight"]
    low, high = integer_range(target.slope_dtype)
    slope_scale = array_namespace(weight).maximum(divide(abs(weight).max(), real((high - low) / 2)), MIN_SCALE)
    positive = rescale_of(ratio(x.scale, 1.0, output.scale, 1.0), bits=bits, narrow=True, form=target.rescale)
    negative = rescale_of(ratio(x.scale, slope_scale, output.scale, 1.0), bits=bits, form=target.rescale)
    slope = quantize(weight, slope_scale, target.slope_dtype, target.quantize_rounding)
    return Lowered(
        {"slope": slope, **positive._asdict(), **{f"negative_{k}": v for k, v in negative._asdict().items()}}
    )


@eval_integer.register
def _(op: PRelu, node_format: NodeFormat, target: Target, x: Array, *, slope: Array, **by: Array) -> Array:
    check_roles(by, *Rescale._fields, *(f"negative_{role}" for role in Rescale._fields))
    x, bits = widen(x), bit_width(node_format.output)
    factor = widen(slope)
    factor = factor if factor.size == 1 else expand(factor, _channel_axis(op, x.ndim), x.ndim)
    positive = Rescale(*(by[k] for k in Rescale._fields))
    negative = Rescale(*(by[f"negative_{k}"] for k in Rescale._fields))
    y = rescale_unsaturated(jnp.maximum(x, 0), positive, target, bits=bits)
    y = y + rescale_unsaturated(factor * jnp.minimum(x, 0), negative, target, bits=bits)
    return saturate(y, node_format.output)


@to_channels_last.register
def _(op: Dropout, rank: int) -> Op:
    return replace(op, shared_axes=tuple(sorted(channels_last_axis(axis, rank) for axis in op.shared_axes)))


@to_channels_last.register
def _(op: PRelu, rank: int) -> Op:
    return replace(op, channels_last=True)
