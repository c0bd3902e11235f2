"""Elementwise arithmetic, constants, and the change of a value's format.

A mask or a pixel counts as its number where the other operand is one. Exact operands alone give an exact int32, by
plain integer arithmetic that wraps as torch's does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np

from jquant.graph.operator import Lowered, Operand, check_roles, derived_scale, eval_float, eval_integer, lower_op
from jquant.numerics.namespace import array_namespace, real
from jquant.numerics.rescale import Ratio, Rescale, multiplier_of, ratio, rescale, rescale_of
from jquant.numerics.rounding import negate, quantize, saturate, widen
from jquant.types import EXACT_DTYPES, Array, GraphError, NodeFormat, Op, Target, bit_width


@dataclass(frozen=True, kw_only=True)
class Add(Op):
    """a + b with broadcasting."""

    takes_exact: ClassVar = True
    layout: ClassVar = "elementwise"
    ports: ClassVar = ("a", "b")


@dataclass(frozen=True, kw_only=True)
class Sub(Op):
    """a - b with broadcasting."""

    takes_exact: ClassVar = True
    layout: ClassVar = "elementwise"
    ports: ClassVar = ("a", "b")


@dataclass(frozen=True, kw_only=True)
class Mul(Op):
    """a * b with broadcasting."""

    takes_exact: ClassVar = True
    layout: ClassVar = "elementwise"
    ports: ClassVar = ("a", "b")


@dataclass(frozen=True, kw_only=True)
class Scale(Op):
    """x * factor by a Python number: the scale is multiplied, the sign goes to the integers, nothing is rounded."""

    layout: ClassVar = "elementwise"
    scale_rule: ClassVar = "derived"
    needs_stats: ClassVar = False

    factor: float

    def __post_init__(self) -> None:
        if not self.factor or not isfinite(self.factor):
            raise GraphError(f"Scale: factor {self.factor} must be finite and not zero")


@dataclass(frozen=True, kw_only=True)
class Neg(Op):
    """-x; the smallest integer becomes the largest one."""

    takes_exact: ClassVar = True
    layout: ClassVar = "elementwise"
    scale_rule: ClassVar = "same_as_input"
    needs_stats: ClassVar = False


@dataclass(frozen=True, kw_only=True)
class Abs(Op):
    """|x|; the smallest integer becomes the largest one."""

    takes_exact: ClassVar = True
    layout: ClassVar = "elementwise"
    scale_rule: ClassVar = "same_as_input"
    needs_stats: ClassVar = False


@dataclass(frozen=True, kw_only=True)
class Clamp(Op):
    """min(max(x, minimum), maximum), with None for no bound. Integer bounds are v / s rounded, saturated."""

    takes_exact: ClassVar = True
    layout: ClassVar = "elementwise"
    scale_rule: ClassVar = "same_as_input"
    needs_stats: ClassVar = False

    minimum: float | None = None
    maximum: float | None = None


@dataclass(frozen=True, kw_only=True)
class Constant(Op):
    """A parameter as a value. Parameter: value, of any shape."""

    ports: ClassVar = ()


@dataclass(frozen=True, kw_only=True)
class IntegerConstant(Op):
    """An exact array that is part of the graph: indices, or a mask of 0 and 1. `values` in row-major order."""

    needs_stats: ClassVar = False
    ports: ClassVar = ()

    shape: tuple[int, ...]
    values: tuple[int, ...]
    dtype: Literal["int32", "bool"] = "int32"


@dataclass(frozen=True, kw_only=True)
class Requantize(Op):
    """The identity with an output format of its own."""

    layout: ClassVar = "elementwise"


# ---------------------------------------------------------------------------------------------------------------------
# What other families share


def as_numbers(*operands: Array) -> tuple[Array, ...]:
    """Operands of arithmetic: all float32, where a mask or pixel counts as its number, or all exact int32."""
    if not any(jnp.issubdtype(x.dtype, jnp.floating) for x in operands):
        if all(x.dtype == jnp.bool_ for x in operands):
            raise GraphError("this is no operator for masks; use logical_and, logical_or, logical_xor or logical_not")
        return tuple(map(widen, operands))
    if any(x.dtype == jnp.int32 for x in operands):
        raise GraphError("an exact int32 (index or count) cannot be mixed with numbers; there is no exact scale for it")
    return tuple(x.astype(jnp.float32) for x in operands)


def is_exact(x: Array) -> bool:
    return str(x.dtype) in EXACT_DTYPES


def exact_number(value: float, dtype: str) -> np.ndarray:
    """A number that goes with exact values, which have no fractions."""
    low, high = (0, 1) if dtype == "bool" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    if not (low <= value <= high and value == int(value)):
        raise GraphError(f"{value:g} is no {dtype}, which the exact operand is")
    return np.asarray(int(value)).astype(dtype)


def requantize(x: Operand, output: Operand, target: Target) -> Rescale:
    """The rescale from one narrow format to another."""
    to_output = ratio(x.scale, 1.0, output.scale, 1.0)
    return rescale_of(to_output, bits=bit_width(output.dtype), narrow=True, form=target.rescale)


def requantize_each(inputs: Sequence[Operand], outputs: Sequence[Operand], target: Target) -> dict[str, Array]:
    """The rescale of every operand, stacked: role i belongs to operand i. The width of an output decides nothing."""
    xp = array_namespace(*(x.scale for x in (*inputs, *outputs)))
    scales = [xp.stack([x.scale for x in side]) for side in (inputs, outputs)]
    return requantize(replace(inputs[0], scale=scales[0]), replace(outputs[0], scale=scales[1]), target)._asdict()


def rescale_each(inputs: Sequence[Array], by: Mapping[str, Array], dtype: str, target: Target) -> list[Array]:
    """Operands to `dtype`, with the constants of `requantize_each`."""
    each = [Rescale(**{role: v[i] for role, v in by.items()}) for i in range(len(inputs))]
    return [rescale(widen(x), row, dtype, target) for x, row in zip(inputs, each, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# Two operands


@eval_float.register
def _(op: Add, a: Array, b: Array) -> Array:
    a, b = as_numbers(a, b)
    return a + b


@eval_float.register
def _(op: Sub, a: Array, b: Array) -> Array:
    a, b = as_numbers(a, b)
    return a - b


@lower_op.register(Add)
@lower_op.register(Sub)
def _(op: Add | Sub, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    """The operand with the larger scale is shifted left, the other multiplied (specification, section 5)."""
    if output.dtype in EXACT_DTYPES:
        return Lowered({})
    a, b = inputs
    form = target.addition
    max_shift = form.max_shift_int8 if {a.dtype, b.dtype} <= {"int8", "bool"} else form.max_shift_int16
    xp, swap = array_namespace(a.scale, b.scale), b.scale > a.scale
    large, small = xp.where(swap, b.scale, a.scale), xp.where(swap, a.scale, b.scale)
    how = {"bits": form.multiplier_bits, "rounding": form.multiplier_rounding}
    factor, shift = multiplier_of(ratio(small, 1.0, large, 1.0), max_shift, exact_bound=True, **how)
    shifted = np.int32(1) << shift
    to_output = ratio(large, 1.0, output.scale, 1.0)
    to_output = Ratio(to_output.bits, to_output.exponent - shift, to_output.exact)
    by = rescale_of(to_output, bits=bit_width(output.dtype), form=target.rescale)
    of_a, of_b = xp.where(swap, factor, shifted), xp.where(swap, shifted, factor)
    multiplier = xp.stack([of_a, -of_b if isinstance(op, Sub) else of_b])
    return Lowered({"multiplier": multiplier, **by._asdict()})


@eval_integer.register(Add)
@eval_integer.register(Sub)
def _(op: Add | Sub, node_format: NodeFormat, target: Target, a: Array, b: Array, **constants: Array) -> Array:
    """The largest sum is that of two int16: 2^15 * 2^15 + 2^15 * 32767, below 2^31."""
    if not constants:
        return eval_float(op, a, b)
    of_a, of_b = constants.pop("multiplier")
    return rescale(widen(a) * of_a + widen(b) * of_b, Rescale(**constants), node_format.output, target)


@eval_float.register
def _(op: Mul, a: Array, b: Array) -> Array:
    a, b = as_numbers(a, b)
    return a * b


@lower_op.register
def _(op: Mul, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    if output.dtype in EXACT_DTYPES:
        return Lowered({})
    a, b = inputs
    to_output = ratio(a.scale, b.scale, output.scale, 1.0)
    return Lowered(rescale_of(to_output, bits=bit_width(output.dtype), form=target.rescale)._asdict())


@eval_integer.register
def _(op: Mul, node_format: NodeFormat, target: Target, a: Array, b: Array, **by: Array) -> Array:
    if not by:
        return eval_float(op, a, b)
    return rescale(widen(a) * widen(b), Rescale(**by), node_format.output, target)


# ---------------------------------------------------------------------------------------------------------------------
# One operand


@eval_float.register
def _(op: Scale, x: Array) -> Array:
    return x * op.factor


@lower_op.register
def _(op: Scale, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    return Lowered({})


@eval_integer.register
def _(op: Scale, node_format: NodeFormat, target: Target, x: Array) -> Array:
    return negate(widen(x), node_format.output) if op.factor < 0 else x


@derived_scale.register
def _(op: Scale, *scales: Array) -> Array:
    return scales[0] * abs(op.factor)


@eval_float.register
def _(op: Neg, x: Array) -> Array:
    (x,) = as_numbers(x)
    return -x


@eval_float.register
def _(op: Abs, x: Array) -> Array:
    (x,) = as_numbers(x)
    return jnp.abs(x)


@lower_op.register(Neg)
@lower_op.register(Abs)
def _(op: Op, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    return Lowered({})


@eval_integer.register
def _(op: Neg, node_format: NodeFormat, target: Target, x: Array) -> Array:
    return negate(widen(x), node_format.output)


@eval_integer.register
def _(op: Abs, node_format: NodeFormat, target: Target, x: Array) -> Array:
    return saturate(eval_float(op, widen(x)), node_format.output)


@eval_float.register
def _(op: Clamp, x: Array) -> Array:
    """With `where`, so that the gradient at a bound is 1, as torch's."""
    dtype = str(x.dtype)
    for bound, beyond in ((op.minimum, jnp.less), (op.maximum, jnp.greater)):
        if bound is not None:
            limit = exact_number(bound, dtype) if is_exact(x) else np.float32(bound)
            x = jnp.where(beyond(x, limit), limit, x)
    return x


@lower_op.register
def _(op: Clamp, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    if output.dtype in EXACT_DTYPES:
        return Lowered({})
    return Lowered(
        {
            role: quantize(real(bound), output.scale, output.dtype, target.number_rounding)
            for role, bound in _bounds(op).items()
        }
    )


def _bounds(op: Clamp) -> dict[str, float]:
    bounds = {"lower": op.minimum, "upper": op.maximum}
    return {role: bound for role, bound in bounds.items() if bound is not None}


@eval_integer.register
def _(op: Clamp, node_format: NodeFormat, target: Target, x: Array, **bounds: Array) -> Array:
    if node_format.output in EXACT_DTYPES:
        check_roles(bounds)
        return eval_float(op, x)
    check_roles(bounds, *_bounds(op))
    x = jnp.maximum(x, bounds["lower"]) if "lower" in bounds else x
    return jnp.minimum(x, bounds["upper"]) if "upper" in bounds else x


# ---------------------------------------------------------------------------------------------------------------------
# Constants and formats


@eval_float.register
def _(op: IntegerConstant) -> Array:
    for value in (min(op.values, default=0), max(op.values, default=0)):
        exact_number(value, op.dtype)
    return jnp.asarray(np.asarray(op.values, op.dtype).reshape(op.shape))


@lower_op.register
def _(
    op: IntegerConstant, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target
) -> Lowered:
    return Lowered({})


@eval_integer.register
def _(op: IntegerConstant, node_format: NodeFormat, target: Target) -> Array:
    return eval_float(op)


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
    if inputs[0].dtype == "float16":
        return Lowered({"scale": output.scale})
    return Lowered(requantize(inputs[0], output, target)._asdict())


@eval_integer.register
def _(op: Requantize, node_format: NodeFormat, target: Target, x: Array, **by: Array) -> Array:
    if "scale" in by:  # the border of a float island
        return quantize(x.astype(jnp.float32), by["scale"], node_format.output, target.quantize_rounding)
    return rescale(widen(x), Rescale(**by), node_format.output, target)
