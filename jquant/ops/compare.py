"""Minimum, maximum, comparisons, logic, and the choice between values by a mask.

Masks are exact: bool in every meaning, never quantized. Two numbers meet at the larger of their scales (specification,
section 5), where they are rounded; so two operands that are less than an LSB apart there may compare as equal.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from jquant.graph.operator import (
    Lowered,
    Operand,
    check_roles,
    constraints,
    derived_scale,
    eval_float,
    eval_integer,
    lower_op,
)
from jquant.numerics.namespace import array_namespace, real
from jquant.numerics.rounding import half_steps, quantize, widen
from jquant.ops.elementwise import as_numbers, exact_number, is_exact, requantize_each, rescale_each
from jquant.ops.movement import only_moves
from jquant.types import EXACT_DTYPES, Array, GraphError, NodeFormat, Op, Target


@dataclass(frozen=True, kw_only=True)
class Minimum(Op):
    """min(a, b) with broadcasting, at the larger of the two scales."""

    takes_exact: ClassVar = True
    layout: ClassVar = "elementwise"
    scale_rule: ClassVar = "derived"
    needs_stats: ClassVar = False
    ports: ClassVar = ("a", "b")


@dataclass(frozen=True, kw_only=True)
class Maximum(Op):
    """max(a, b) with broadcasting, at the larger of the two scales."""

    takes_exact: ClassVar = True
    layout: ClassVar = "elementwise"
    scale_rule: ClassVar = "derived"
    needs_stats: ClassVar = False
    ports: ClassVar = ("a", "b")


@dataclass(frozen=True, kw_only=True)
class Equal(Op):
    """a == b, or x == value: a mask. All six comparisons treat a number alike.

    A number is no operand and has no scale: the integers answer what the real x answers, x being integer times scale in
    float32. Nothing is rounded or saturated, so a `value` between two grid points equals none.
    """

    takes_exact: ClassVar = True
    layout: ClassVar = "elementwise"
    needs_stats: ClassVar = False
    ports: ClassVar = ("a", "b")

    value: float | None = None


@dataclass(frozen=True, kw_only=True)
class NotEqual(Op):
    """a != b, or x != value: a mask."""

    takes_exact: ClassVar = True
    layout: ClassVar = "elementwise"
    needs_stats: ClassVar = False
    ports: ClassVar = ("a", "b")

    value: float | None = None


@dataclass(frozen=True, kw_only=True)
class Greater(Op):
    """a > b, or x > value: a mask."""

    takes_exact: ClassVar = True
    layout: ClassVar = "elementwise"
    needs_stats: ClassVar = False
    ports: ClassVar = ("a", "b")

    value: float | None = None


@dataclass(frozen=True, kw_only=True)
class GreaterEqual(Op):
    """a >= b, or x >= value: a mask."""

    takes_exact: ClassVar = True
    layout: ClassVar = "elementwise"
    needs_stats: ClassVar = False
    ports: ClassVar = ("a", "b")

    value: float | None = None


@dataclass(frozen=True, kw_only=True)
class Less(Op):
    """a < b, or x < value: a mask."""

    takes_exact: ClassVar = True
    layout: ClassVar = "elementwise"
    needs_stats: ClassVar = False
    ports: ClassVar = ("a", "b")

    value: float | None = None


@dataclass(frozen=True, kw_only=True)
class LessEqual(Op):
    """a <= b, or x <= value: a mask."""

    takes_exact: ClassVar = True
    layout: ClassVar = "elementwise"
    needs_stats: ClassVar = False
    ports: ClassVar = ("a", "b")

    value: float | None = None


@dataclass(frozen=True, kw_only=True)
class LogicalAnd(Op):
    """A mask of where both are true; a number is true where it is not 0."""

    takes_exact: ClassVar = True
    layout: ClassVar = "elementwise"
    needs_stats: ClassVar = False
    ports: ClassVar = ("a", "b")


@dataclass(frozen=True, kw_only=True)
class LogicalOr(Op):
    """A mask of where one or both are true."""

    takes_exact: ClassVar = True
    layout: ClassVar = "elementwise"
    needs_stats: ClassVar = False
    ports: ClassVar = ("a", "b")


@dataclass(frozen=True, kw_only=True)
class LogicalXor(Op):
    """A mask of where exactly one is true."""

    takes_exact: ClassVar = True
    layout: ClassVar = "elementwise"
    needs_stats: ClassVar = False
    ports: ClassVar = ("a", "b")


@dataclass(frozen=True, kw_only=True)
class LogicalNot(Op):
    """A mask of where x is false, or 0."""

    takes_exact: ClassVar = True
    layout: ClassVar = "elementwise"
    needs_stats: ClassVar = False


@dataclass(frozen=True, kw_only=True)
class BitwiseAnd(Op):
    """a & b of exact values of one dtype."""

    takes_exact: ClassVar = True
    layout: ClassVar = "elementwise"
    needs_stats: ClassVar = False
    ports: ClassVar = ("a", "b")


@dataclass(frozen=True, kw_only=True)
class BitwiseOr(Op):
    """a | b of exact values of one dtype."""

    takes_exact: ClassVar = True
    layout: ClassVar = "elementwise"
    needs_stats: ClassVar = False
    ports: ClassVar = ("a", "b")


@dataclass(frozen=True, kw_only=True)
class BitwiseXor(Op):
    """a ^ b of exact values of one dtype."""

    takes_exact: ClassVar = True
    layout: ClassVar = "elementwise"
    needs_stats: ClassVar = False
    ports: ClassVar = ("a", "b")


@dataclass(frozen=True, kw_only=True)
class BitwiseNot(Op):
    """~x of an exact value."""

    takes_exact: ClassVar = True
    layout: ClassVar = "elementwise"
    needs_stats: ClassVar = False


@dataclass(frozen=True, kw_only=True)
class Where(Op):
    """a where the mask `condition` is true, else b; each is rescaled to the output."""

    takes_exact: ClassVar = True
    layout: ClassVar = "elementwise"
    ports: ClassVar = ("condition", "a", "b")


@dataclass(frozen=True, kw_only=True)
class MaskedFill(Op):
    """`value` where the mask is true, else x. The scale is kept: `value` becomes v / s rounded, saturated.

    So minus infinity is the smallest integer, which may still be near the others.
    """

    takes_exact: ClassVar = True
    layout: ClassVar = "elementwise"
    scale_rule: ClassVar = "same_as_input"
    needs_stats: ClassVar = False
    ports: ClassVar = ("x", "mask")

    value: float


Comparison = Equal | NotEqual | Greater | GreaterEqual | Less | LessEqual

_COMPARE: dict[type[Op], Callable[[Any, Any], Array]] = {
    Equal: jnp.equal,
    NotEqual: jnp.not_equal,
    Greater: jnp.greater,
    GreaterEqual: jnp.greater_equal,
    Less: jnp.less,
    LessEqual: jnp.less_equal,
}
_LOGICAL: dict[type[Op], Callable[..., Array]] = {
    LogicalAnd: jnp.logical_and,
    LogicalOr: jnp.logical_or,
    LogicalXor: jnp.logical_xor,
    LogicalNot: jnp.logical_not,
}
_BITWISE: dict[type[Op], Callable[..., Array]] = {
    BitwiseAnd: jnp.bitwise_and,
    BitwiseOr: jnp.bitwise_or,
    BitwiseXor: jnp.bitwise_xor,
    BitwiseNot: jnp.bitwise_not,
}


def alike(a: Array, b: Array) -> tuple[Array, Array]:
    """Two operands in one dtype: as they are, or as numbers."""
    if a.dtype == b.dtype:
        return a, b
    a, b = as_numbers(a, b)
    return a, b


def to_larger_scale(inputs: Sequence[Operand], target: Target) -> dict[str, Array]:
    """The rescale of two operands to the larger of their scales, each in its own dtype: the identity for that one."""
    scales = [x.scale for x in inputs]
    scale = array_namespace(*scales).maximum(*scales)
    return requantize_each(inputs, [replace(x, scale=scale) for x in inputs], target)


def one_dtype(
    op: Op, inputs: Sequence[Operand], output: Operand, weight_dtype: str | None, target: Target
) -> list[str]:
    """The limit of operators whose operands meet at one scale."""
    first, *others = [x.dtype for x in inputs]
    exact = [dtype in EXACT_DTYPES for dtype in (first, *others)]
    if all(exact) or all(dtype == first for dtype in others):
        return []
    shown = " and ".join((first, *others))
    return [f"its operands are {shown}; give one the other's: jq.Policy(input={{'{op.ports[-1]}': ...}})"]


# ---------------------------------------------------------------------------------------------------------------------
# Minimum and maximum


@eval_float.register
def _(op: Minimum, a: Array, b: Array) -> Array:
    return jnp.minimum(*alike(a, b))


@eval_float.register
def _(op: Maximum, a: Array, b: Array) -> Array:
    return jnp.maximum(*alike(a, b))


@derived_scale.register(Minimum)
@derived_scale.register(Maximum)
def _(op: Op, *scales: Array) -> Array:
    return array_namespace(*scales).maximum(*scales)


@lower_op.register(Minimum)
@lower_op.register(Maximum)
def _(op: Op, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    return Lowered({} if output.dtype in EXACT_DTYPES else to_larger_scale(inputs, target))


@eval_integer.register(Minimum)
@eval_integer.register(Maximum)
def _(op: Op, node_format: NodeFormat, target: Target, a: Array, b: Array, **by: Array) -> Array:
    if not by:
        return eval_float(op, a, b)
    return eval_float(op, *rescale_each((a, b), by, node_format.output, target))  # which orders integers as well


constraints.register(Minimum)(one_dtype)
constraints.register(Maximum)(one_dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Comparisons


def _compared(op: Comparison, x: Array, *others: Array) -> Array:
    if len(others) != (op.value is None):
        raise GraphError("a comparison is of two operands, or of one operand with `value`")
    if op.value is None:
        return _COMPARE[type(op)](*alike(x, *others))
    return _COMPARE[type(op)](x, exact_number(op.value, str(x.dtype)) if is_exact(x) else np.float32(op.value))


def _lower_comparison(
    op: Comparison, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target
) -> Lowered:
    if all(x.dtype in EXACT_DTYPES for x in inputs):
        return Lowered({})
    if op.value is not None:
        return Lowered({"half_steps": half_steps(real(op.value), inputs[0].scale)})
    return Lowered(to_larger_scale(inputs, target))


def _compared_integers(
    op: Comparison, node_format: NodeFormat, target: Target, x: Array, *others: Array, **constants: Array
) -> Array:
    """x and a number are compared in half LSB."""
    if not constants:
        return eval_float(op, x, *others)
    if "half_steps" in constants:
        check_roles(constants, "half_steps")
        return _COMPARE[type(op)](2 * widen(x), constants["half_steps"])
    return _COMPARE[type(op)](*rescale_each((x, *others), constants, node_format.inputs[0], target))


for _cls in _COMPARE:
    eval_float.register(_cls)(_compared)
    lower_op.register(_cls)(_lower_comparison)
    eval_integer.register(_cls)(_compared_integers)
    constraints.register(_cls)(one_dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Logic and bits: what a mask or an exact integer says, whatever the scale


def _logical(op: Op, *operands: Array) -> Array:
    return _LOGICAL[type(op)](*(x if x.dtype == jnp.bool_ else x != 0 for x in operands))


def _bitwise(op: Op, *operands: Array) -> Array:
    if not all(is_exact(x) and x.dtype == operands[0].dtype for x in operands):
        raise GraphError("only exact values of one dtype (masks, indices, pixels) have bits")
    return _BITWISE[type(op)](*operands)


for _cls in _LOGICAL:
    eval_float.register(_cls)(_logical)
for _cls in _BITWISE:
    eval_float.register(_cls)(_bitwise)
only_moves(*_LOGICAL, *_BITWISE)


# ---------------------------------------------------------------------------------------------------------------------
# Choices


def _check_mask(mask: Array) -> Array:
    if mask.dtype != jnp.bool_:
        raise GraphError(f"the mask is {mask.dtype}; make it bool, with not_equal(value=0) for example")
    return mask


@eval_float.register
def _(op: Where, condition: Array, a: Array, b: Array) -> Array:
    a, b = alike(a, b)
    return jnp.where(_check_mask(condition), a, b)


@lower_op.register
def _(op: Where, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    return Lowered({} if output.dtype in EXACT_DTYPES else requantize_each(inputs[1:], [output, output], target))


@eval_integer.register
def _(op: Where, node_format: NodeFormat, target: Target, condition: Array, a: Array, b: Array, **by: Array) -> Array:
    if not by:
        return eval_float(op, condition, a, b)
    a, b = rescale_each((a, b), by, node_format.output, target)
    return jnp.where(condition, a, b)


@eval_float.register
def _(op: MaskedFill, x: Array, mask: Array) -> Array:
    fill = exact_number(op.value, str(x.dtype)) if is_exact(x) else np.float32(op.value)
    return jnp.where(_check_mask(mask), fill, x)


@lower_op.register
def _(op: MaskedFill, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    if output.dtype in EXACT_DTYPES:
        return Lowered({})
    return Lowered({"fill": quantize(real(op.value), output.scale, output.dtype, target.number_rounding)})


@eval_integer.register
def _(op: MaskedFill, node_format: NodeFormat, target: Target, x: Array, mask: Array, **constants: Array) -> Array:
    if not constants:
        return eval_float(op, x, mask)
    check_roles(constants, "fill")
    return jnp.where(mask, constants["fill"], x)
