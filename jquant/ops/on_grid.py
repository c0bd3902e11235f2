"""What fake-quant rounds and saturates because the integers do: the rules of `eval_on_grid`.

Values here are real and lie on their grids: an integer of the operand's dtype times its scale. Where two operands meet
at one scale the integers themselves are computed, so that a comparison gives the same mask in both meanings.
"""

from collections.abc import Sequence

import jax.numpy as jnp

from jquant.graph.operator import Operand, eval_float, eval_integer, eval_on_grid, lower_op
from jquant.numerics.namespace import real
from jquant.numerics.rounding import dequantize, quantize
from jquant.ops.activation import Relu6
from jquant.ops.compare import Comparison, MaskedFill, Maximum, Minimum, Where
from jquant.ops.elementwise import Abs, Clamp, Neg, Scale
from jquant.ops.grid_sampling import GridSample, Warp
from jquant.ops.movement import Cat, Pad, Stack
from jquant.ops.regions import RoiAlign
from jquant.ops.resample import Interpolate
from jquant.ops.rounding import Mod
from jquant.ops.scatter import Scatter, SliceScatter
from jquant.types import EXACT_DTYPES, Array, NodeFormat, Op, Target, integer_range


def number_on_grid(value: float, grid: Operand, target: Target) -> Array:
    """A number as the integers have it: v / s rounded, saturated, times the scale (specification, section 5)."""
    return dequantize(quantize(real(value), grid.scale, grid.dtype, target.number_rounding), grid.scale)


def largest(grid: Operand) -> Array:
    """The largest real number on a grid."""
    return real(integer_range(grid.dtype)[1]) * grid.scale


# ---------------------------------------------------------------------------------------------------------------------
# Operands brought to one scale, and remainders: as integers


def _by_integers(op: Op, inputs: Sequence[Operand], output: Operand, target: Target, *values: Array) -> Array:
    lowered = lower_op(op, inputs, output, {}, target)
    integers = [
        v if x.dtype in EXACT_DTYPES else quantize(v, x.scale, x.dtype) for v, x in zip(values, inputs, strict=True)
    ]
    node_format = NodeFormat(tuple(x.dtype for x in inputs), output.dtype)
    found = eval_integer(op, node_format, target, *integers, **lowered.constants)
    return found if output.dtype in EXACT_DTYPES else dequantize(found, output.scale)


def _joined(op: Op, inputs: Sequence[Operand], output: Operand, target: Target, *values: Array) -> Array:
    """The real value where it rounds and saturates to the integer of the program, elsewhere the number of that integer.

    So the quantizer behind it gives that integer, and a learned scale still sees how far a value lies from its grid. A
    mantissa of 15 bits is a little off the ratio of two scales: what lies near a tie may round to its other side.
    """
    y, on_grid = eval_float(op, *values), _by_integers(op, inputs, output, target, *values)
    low, high = (real(end) * output.scale for end in integer_range(output.dtype))
    off = y - on_grid
    # Half a step less 0.01, which a float32 quotient of up to 2^15 LSB does not round over an edge.
    alike = jnp.abs(off) <= real(0.49) * output.scale
    saturated = ((on_grid >= high) & (off > 0)) | ((on_grid <= low) & (off < 0)) | jnp.isnan(y)
    return jnp.where(alike | saturated, y, on_grid)


def _at_one_scale(op: Op, inputs: Sequence[Operand], output: Operand, target: Target, *values: Array) -> Array:
    """A comparison with a number is that of the real values already; operands of two dtypes have no integer form."""
    if len({x.dtype for x in inputs}) > 1 or (len(inputs) == 1 and not isinstance(op, Mod)):
        return eval_float(op, *values)
    return _by_integers(op, inputs, output, target, *values)


for _cls in (Maximum, Minimum, Mod, *Comparison.__args__):
    eval_on_grid.register(_cls)(_at_one_scale)
for _cls in (Where, Cat, Stack, Scatter, SliceScatter):
    eval_on_grid.register(_cls)(_joined)


# ---------------------------------------------------------------------------------------------------------------------
# The smallest integer becomes the largest one


@eval_on_grid.register(Neg)
@eval_on_grid.register(Abs)
@eval_on_grid.register(Scale)
def _(op: Op, inputs: Sequence[Operand], output: Operand, target: Target, x: Array) -> Array:
    y = eval_float(op, x)
    return y if isinstance(op, Scale) and op.factor >= 0 else jnp.minimum(y, largest(output))


# ---------------------------------------------------------------------------------------------------------------------
# Numbers that enter a value, on its grid


@eval_on_grid.register
def _(op: Clamp, inputs: Sequence[Operand], output: Operand, target: Target, x: Array) -> Array:
    x = x if op.minimum is None else jnp.maximum(x, number_on_grid(op.minimum, output, target))
    return x if op.maximum is None else jnp.minimum(x, number_on_grid(op.maximum, output, target))


@eval_on_grid.register
def _(op: Relu6, inputs: Sequence[Operand], output: Operand, target: Target, x: Array) -> Array:
    return jnp.clip(x, 0.0, number_on_grid(6.0, output, target))


@eval_on_grid.register
def _(op: MaskedFill, inputs: Sequence[Operand], output: Operand, target: Target, x: Array, mask: Array) -> Array:
    return jnp.where(mask, number_on_grid(op.value, output, target), x)


@eval_on_grid.register
def _(op: Pad, inputs: Sequence[Operand], output: Operand, target: Target, x: Array) -> Array:
    if op.mode != "constant":
        return eval_float(op, x)
    return jnp.pad(x, op.padding, constant_values=number_on_grid(op.value, output, target))


# ---------------------------------------------------------------------------------------------------------------------
# Averages of values that keep their scale: one rounding (specification, section 7)


@eval_on_grid.register(GridSample)
@eval_on_grid.register(Warp)
@eval_on_grid.register(RoiAlign)
@eval_on_grid.register(Interpolate)
def _(op: Op, inputs: Sequence[Operand], output: Operand, target: Target, *values: Array) -> Array:
    if isinstance(op, Interpolate) and op.mode != "bilinear":  # the pixels that the target takes
        return eval_integer(op, NodeFormat((output.dtype,), output.dtype), target, *values)
    y = eval_float(op, *values)
    if getattr(op, "mode", "bilinear") != "bilinear":
        return y
    rounding = target.rescale.post_rounding if isinstance(op, RoiAlign) else target.grid.rounding
    rounding = target.resize.rounding if isinstance(op, Interpolate) else rounding
    return dequantize(quantize(y, output.scale, output.dtype, rounding), output.scale)
