"""Whole numbers and remainders."""

from collections.abc import Sequence
from dataclasses import dataclass
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
from jquant.numerics.rescale import Rescale, ratio, rescale, rescale_of
from jquant.numerics.rounding import quantize, saturate, widen
from jquant.numerics.whole import WholeRounding, to_whole, whole_of
from jquant.ops.compare import alike, one_dtype, to_larger_scale
from jquant.ops.elementwise import as_numbers, exact_number, is_exact, rescale_each
from jquant.types import EXACT_DTYPES, Array, GraphError, NodeFormat, Op, Target, bit_width


@dataclass(frozen=True, kw_only=True)
class Floor(Op):
    """The largest whole number not above x, exactly, then rescaled to the output."""

    layout: ClassVar = "elementwise"


@dataclass(frozen=True, kw_only=True)
class Ceil(Op):
    """The smallest whole number not below x, exactly, then rescaled to the output."""

    layout: ClassVar = "elementwise"


@dataclass(frozen=True, kw_only=True)
class Round(Op):
    """The nearest whole number, ties to even, exactly, then rescaled to the output."""

    layout: ClassVar = "elementwise"


@dataclass(frozen=True, kw_only=True)
class Mod(Op):
    """The remainder of a / b, or of x / `value`, at the larger scale, or that of x. It is 0 where the divisor is 0.

    Its sign is that of the divisor (Python's %), or of the dividend (C's). In integers `value` is v / s rounded,
    in LSB, not saturated; a remainder that leaves the format is.
    """

    takes_exact: ClassVar = True
    layout: ClassVar = "elementwise"
    scale_rule: ClassVar = "derived"
    needs_stats: ClassVar = False
    ports: ClassVar = ("a", "b")

    value: float | None = None
    same_sign_as_dividend: bool = False


# ---------------------------------------------------------------------------------------------------------------------
# Whole numbers: rescaled to scale 1 with that rounding, then to the output (specification, section 5)

_ROUNDINGS: dict[type[Op], WholeRounding] = {Floor: "floor", Ceil: "ceil", Round: "half_even"}


def _number(x: Array) -> Array:
    if is_exact(x):
        raise GraphError(f"{x.dtype} values are whole already; leave the operator out")
    return x


@eval_float.register
def _(op: Floor, x: Array) -> Array:
    return jnp.floor(_number(x))


@eval_float.register
def _(op: Ceil, x: Array) -> Array:
    return jnp.ceil(_number(x))


@eval_float.register
def _(op: Round, x: Array) -> Array:
    return jnp.round(_number(x))


@lower_op.register(Floor)
@lower_op.register(Ceil)
@lower_op.register(Round)
def _(op: Op, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    whole = whole_of(inputs[0].scale)
    by = rescale_of(ratio(whole.unit, 1.0, output.scale, 1.0), bits=bit_width(output.dtype), form=target.rescale)
    return Lowered({"factor": whole.factor, "shift": whole.shift, **by._asdict()})


@eval_integer.register(Floor)
@eval_integer.register(Ceil)
@eval_integer.register(Round)
def _(op: Op, node_format: NodeFormat, target: Target, x: Array, *, factor: Array, shift: Array, **by: Array) -> Array:
    whole = to_whole(widen(x), factor, shift, _ROUNDINGS[type(op)])
    return rescale(whole, Rescale(**by), node_format.output, target)


# ---------------------------------------------------------------------------------------------------------------------
# Remainders


@eval_float.register
def _(op: Mod, x: Array, *others: Array) -> Array:
    if len(others) != (op.value is None):
        raise GraphError("a remainder has two operands, or one operand and `value`")
    if op.value is None:
        return _remainder(op, *alike(x, *others))
    (x,) = as_numbers(x)
    return _remainder(op, x, jnp.asarray(exact_number(op.value, "int32") if is_exact(x) else np.float32(op.value)))


def _remainder(op: Mod, a: Array, b: Array) -> Array:
    zero = b == 0
    divisor = jnp.where(zero, 1, b)
    y = jnp.fmod(a, divisor) if op.same_sign_as_dividend else jnp.remainder(a, divisor)
    return jnp.where(zero, 0, y)


@derived_scale.register
def _(op: Mod, *scales: Array) -> Array:
    return array_namespace(*scales).maximum(*scales) if len(scales) == 2 else scales[0]


@lower_op.register
def _(op: Mod, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    if output.dtype in EXACT_DTYPES:
        return Lowered({})
    if op.value is not None:
        return Lowered({"modulus": quantize(real(op.value), inputs[0].scale, "int32", target.number_rounding)})
    return Lowered(to_larger_scale(inputs, target))


@eval_integer.register
def _(op: Mod, node_format: NodeFormat, target: Target, x: Array, *others: Array, **constants: Array) -> Array:
    if not constants:
        return eval_float(op, x, *others)
    if "modulus" in constants:
        check_roles(constants, "modulus")
        a, b = x, constants["modulus"]
    else:
        a, b = rescale_each((x, *others), constants, node_format.output, target)
    return saturate(_remainder(op, widen(a), widen(b)), node_format.output)


constraints.register(Mod)(one_dtype)
