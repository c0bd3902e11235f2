"""Elementwise arithmetic of two activations, constants, and the change of a value's format."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp

from jquant.numerics.rescale import Ratio, Rescale, multiplier_of, ratio, rescale, rescale_of
from jquant.numerics.rounding import quantize, saturate, widen
from jquant.ops.base import Lowered, Operand, derived_scale, eval_float, eval_integer, lower_op
from jquant.types import Array, NodeFormat, Op, Target, bit_width


@dataclass(frozen=True, kw_only=True)
class Add(Op):
    """a + b with broadcasting."""

    layout: ClassVar = "elementwise"
    ports: ClassVar = ("a", "b")


@dataclass(frozen=True, kw_only=True)
class Mul(Op):
    """a * b with broadcasting."""

    layout: ClassVar = "elementwise"
    ports: ClassVar = ("a", "b")


@dataclass(frozen=True, kw_only=True)
class Scale(Op):
    """x * factor by a Python number: the scale is multiplied, the sign goes to the integers, nothing is rounded."""

    layout: ClassVar = "elementwise"
    scale_rule: ClassVar = "derived"
    needs_stats: ClassVar = False

    factor: float


@dataclass(frozen=True, kw_only=True)
class Constant(Op):
    """A parameter as a value. Parameter: value, of any shape."""

    ports: ClassVar = ()


@dataclass(frozen=True, kw_only=True)
class Requantize(Op):
    """The identity with an output format of its own."""

    layout: ClassVar = "elementwise"


@eval_float.register
def _(op: Add, a: Array, b: Array) -> Array:
    return a + b


@lower_op.register
def _(op: Add, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    """The operand with the larger scale is shifted left, the other multiplied (specification, section 5)."""
    a, b = inputs
    max_shift = 15 if "int16" in (a.dtype, b.dtype) else 23
    swap = b.scale > a.scale
    large, small = jnp.where(swap, b.scale, a.scale), jnp.where(swap, a.scale, b.scale)
    factor, shift = multiplier_of(ratio(small, 1.0, large, 1.0), max_shift, exact_bound=True)
    shifted = jnp.int32(1) << shift
    to_output = ratio(large, 1.0, output.scale, 1.0)
    by = rescale_of(Ratio(to_output.bits, to_output.exponent - shift, to_output.exact), bits=bit_width(output.dtype))
    multiplier = jnp.stack([jnp.where(swap, factor, shifted), jnp.where(swap, shifted, factor)])
    return Lowered({"multiplier": multiplier, **by._asdict()})


@eval_integer.register
def _(op: Add, node_format: NodeFormat, target: Target, a: Array, b: Array, *, multiplier: Array, **by: Array) -> Array:
    acc = widen(a) * multiplier[0] + widen(b) * multiplier[1]
    return rescale(acc, Rescale(**by), node_format.output, target)


@eval_float.register
def _(op: Mul, a: Array, b: Array) -> Array:
    return a * b


@lower_op.register
def _(op: Mul, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    a, b = inputs
    return Lowered(rescale_of(ratio(a.scale, b.scale, output.scale, 1.0), bits=bit_width(output.dtype))._asdict())


@eval_integer.register
def _(op: Mul, node_format: NodeFormat, target: Target, a: Array, b: Array, **by: Array) -> Array:
    return rescale(widen(a) * widen(b), Rescale(**by), node_format.output, target)


@eval_float.register
def _(op: Scale, x: Array) -> Array:
    return x * op.factor


@lower_op.register
def _(op: Scale, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    return Lowered({})


@eval_integer.register
def _(op: Scale, node_format: NodeFormat, target: Target, x: Array) -> Array:
    return saturate(-widen(x), node_format.output) if op.factor < 0 else x


@derived_scale.register
def _(op: Scale, *scales: Array) -> Array:
    return scales[0] * abs(op.factor)


@eval_float.register
def _(op: Constant, *, value: Array) -> Array:
    return value


@lower_op.register
def _(op: Constant, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    return Lowered({"value": quantize(params["value"], output.scale, output.dtype, target.quantize_rounding)})


@eval_integer.register
def _(op: Constant, node_format: NodeFormat, target: Target, *, value: Array) -> Array:
    return value


@eval_float.register
def _(op: Requantize, x: Array) -> Array:
    return x


@lower_op.register
def _(op: Requantize, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    return Lowered(requantize(inputs[0], output)._asdict())


def requantize(x: Operand, output: Operand) -> Rescale:
    """The rescale from one narrow format to another."""
    return rescale_of(ratio(x.scale, 1.0, output.scale, 1.0), bits=bit_width(output.dtype), narrow=True)


@eval_integer.register
def _(op: Requantize, node_format: NodeFormat, target: Target, x: Array, **by: Array) -> Array:
    return rescale(widen(x), Rescale(**by), node_format.output, target)
