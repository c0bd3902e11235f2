"""Coordinates between pixels and the weights at them: section 7 of the specification.

A coordinate is an integer with fraction bits, in pixels, 0 at the centre of the first pixel. Along an axis it meets
two pixels with weights that sum to 2^bits; a value is the sum of the products over both axes, shifted back once.
"""

from fractions import Fraction
from typing import NamedTuple, cast

import jax.numpy as jnp
import numpy as np

from jquant.numerics import limbs
from jquant.numerics.namespace import array_namespace
from jquant.numerics.rescale import Ratio, multiplier_of
from jquant.numerics.rounding import round_fraction, saturate, shift_right, widen
from jquant.types import Array, GridFormat, ResizeFormat, bit_width

# ---------------------------------------------------------------------------------------------------------------------
# Resize: static coordinates, one axis at a time


class Steps(NamedTuple):
    """Coordinates i * step + offset for i < outputs, in `bits` fraction bits."""

    step: int
    offset: int
    outputs: int
    bits: int

    def at(self) -> np.ndarray:
        return np.arange(self.outputs, dtype=np.int64) * self.step + self.offset


def steps_of(step: Fraction, offset: Fraction, outputs: int, form: ResizeFormat) -> Steps:
    """Step and offset, in pixels, each rounded to the fraction bits of the format."""
    fixed_step, fixed_offset = (round_fraction(v * 2**form.step_bits, form.step_rounding) for v in (step, offset))
    return Steps(fixed_step, fixed_offset, outputs, form.step_bits)


def pick(x: Array, axis: int, steps: Steps, ahead: int = 0) -> Array:
    """The pixel at or below every coordinate, or `ahead` pixels after it, along an axis; the border pixel outside.

    A gather by constant indices, also where slices would do: measured on a CPU, it fuses with the products that follow
    and takes a sixth to a half of their time when bilinear doubles an image, at 1 to 256 channels.
    """
    index = np.clip((steps.at() >> steps.bits) + ahead, 0, x.shape[axis] - 1)
    return jnp.take(x, index.astype(np.int32), axis=axis, mode="clip")


def step_weights(steps: Steps, form: ResizeFormat) -> tuple[np.ndarray, np.ndarray]:
    """The weights of the pixel below a coordinate and of the one above, with the fraction bits of the format."""
    fraction = (steps.at() & (2**steps.bits - 1)).astype(np.int32)
    cut = cast(Array, np.int32(steps.bits - form.weight_bits))
    above = np.asarray(shift_right(cast(Array, fraction), cut, form.weight_rounding))
    return np.int32(2**form.weight_bits) - above, above


def resize(x: Array, axes: tuple[int, ...], steps: tuple[Steps, ...], form: ResizeFormat, dtype: str) -> Array:
    """Linear interpolation of int8 or int16 along one or two axes, all products summed exactly before the one shift.

    Weights are not negative and sum to 2^bits an axis, so every partial sum lies between the extremes of x times that:
    the second axis leaves int32 only above 8 bits for int16, 12 for int8.
    """
    acc = widen(x)
    for axis, step in zip(axes[:-1], steps[:-1], strict=True):
        below, above = _along(step_weights(step, form), axis, x.ndim)
        acc = pick(acc, axis, step) * below + pick(acc, axis, step, 1) * above
    below, above = _along(step_weights(steps[-1], form), axes[-1], x.ndim)
    first, second = pick(acc, axes[-1], steps[-1]), pick(acc, axes[-1], steps[-1], 1)
    total = len(axes) * form.weight_bits
    if bit_width(dtype) - 1 + total <= 31:
        return saturate(shift_right(first * below + second * above, jnp.int32(total), form.rounding), dtype)
    wide = limbs.add(limbs.multiply(limbs.from_int32(first), below), limbs.multiply(limbs.from_int32(second), above))
    return saturate(limbs.saturate(limbs.shift_right(wide, jnp.int32(total), form.rounding), dtype), dtype)


def _along(weights: tuple[np.ndarray, np.ndarray], axis: int, rank: int) -> tuple[Array, Array]:
    shape = [-1 if a == axis else 1 for a in range(rank)]
    return jnp.asarray(weights[0].reshape(shape)), jnp.asarray(weights[1].reshape(shape))


# ---------------------------------------------------------------------------------------------------------------------
# Sampling: computed coordinates


def coordinate_bits(form: GridFormat, *sides: int) -> int:
    """The fraction bits of absolute coordinates on images with these sides."""
    return min(max(form.coordinate_bits - max(sides).bit_length(), 0), form.max_fraction_bits)


class Line(NamedTuple):
    """The map of quantized coordinates to pixels: (multiplier * q + offset) >> shift, int32 scalars or [2] for x, y.

    Where the shift rounds half up, its half is part of the offset, and the shift is a floor.
    """

    multiplier: Array
    offset: Array
    shift: Array


def line_of(slope: Ratio | None, half_pixels: int, bits: int, form: GridFormat) -> Line:
    """The map q -> slope * q + half_pixels / 2 * 2^bits, rounded to an integer.

    The multiplier is below 2^15 and, with |half_pixels| < 2^(15 - bits), the offset is at most 2^30 + 2^15, so that the
    sum stays in int32 for every int16. slope None: 0.
    """
    if slope is None:
        multiplier, shift = cast(tuple[Array, Array], (np.int32(0), np.int32(form.max_map_shift)))
    else:
        rounding = form.map_constant_rounding
        multiplier, shift = multiplier_of(slope, form.max_map_shift, bits=form.map_bits, rounding=rounding)
    xp = array_namespace(multiplier, shift)
    power = bits + shift
    whole = np.int32(half_pixels) << xp.maximum(power - 1, 0)
    at_zero = np.int32(round_fraction(Fraction(half_pixels, 2), form.map_constant_rounding))
    offset = xp.where(power > 0, whole, at_zero)
    if form.map_rounding == "half_up":
        offset = offset + xp.where(shift > 0, np.int32(1) << xp.maximum(shift - 1, 0), 0)
    return Line(multiplier, offset, shift)


def on_line(q: Array, line: Line, form: GridFormat) -> Array:
    """Absolute coordinates of quantized ones, saturated to int16, as int32."""
    total = widen(q) * line.multiplier + line.offset
    rounding = "floor" if form.map_rounding == "half_up" else form.map_rounding
    return widen(saturate(shift_right(total, line.shift, rounding), "int16"))


def displaced(offset: Array, size: tuple[int, int], bits: int) -> Array:
    """Every pixel's own coordinate plus an offset [N, H, W, 2], saturated to int16, as int32. Order (x, y)."""
    y, x = np.meshgrid(*(np.arange(n, dtype=np.int32) << bits for n in size), indexing="ij")
    return widen(saturate(offset + np.stack([x, y], axis=-1), "int16"))


def neighbours(
    at: Array, n: int, bits: int, form: GridFormat, *, nearest: bool, border: bool
) -> list[tuple[Array, Array]]:
    """The pixels that absolute coordinates meet along an axis of n, as (index in [0, n), weight in [0, 2^bits]).

    Nearest has one. Outside, the weight is 0, or with `border` the border pixel is met.
    """
    if nearest:
        met = [(shift_right(at, jnp.int32(bits), form.nearest_rounding), jnp.full_like(at, 2**bits))]
    else:
        fraction = at & (2**bits - 1)
        met = [(at >> bits, 2**bits - fraction), ((at >> bits) + 1, fraction)]
    kept = []
    for index, weight in met:
        if not border:
            weight = jnp.where((index >= 0) & (index < n), weight, 0)
        kept.append((jnp.clip(index, 0, n - 1), weight))
    return kept


def round_weighted(total: Array, bits: int, dtype: str, rounding: str) -> Array:
    """A sum of products of weights along two axes, back to the data: sat(total / 2^(2 * bits)).

    Weights sum to at most 2^16, so |total| <= 2^15 * 2^16, and 2^31 itself is only reached as -2^31: int32 holds it.
    """
    return saturate(shift_right(total, jnp.int32(2 * bits), rounding), dtype)


def points_between(start: Array, end: Array, count: int, form: GridFormat, *, least: int | None) -> Array:
    """`count` points at the centres of equal parts of every [start, end], [K] -> [K, count], in the same unit.

    start and end are int16 in int32; parts are cut at the point bits of the format, at most 15, and a length is at
    least `least`. A length has 17 bits with its sign and is at most 2^16 - 1, so its product with a fraction of at most
    2^15 stays in int32.
    """
    length = end - start if least is None else jnp.maximum(end - start, least)
    centres = [Fraction(2 * i + 1, 2 * count) * 2**form.point_bits for i in range(count)]
    fraction = np.array([round_fraction(c, form.point_fraction_rounding) for c in centres], np.int32)
    return start[:, None] + shift_right(length[:, None] * fraction, jnp.int32(form.point_bits), form.point_rounding)


def inside_border(at: Array, n: int, bits: int, form: GridFormat) -> list[tuple[Array, Array]]:
    """`neighbours` with the border pixel up to one pixel outside the image, and weight 0 beyond."""
    near = (at >= -(1 << bits)) & (at <= n << bits)
    clamped = jnp.clip(at, 0, (n - 1) << bits)
    met = neighbours(clamped, n, bits, form, nearest=False, border=True)
    return [(index, jnp.where(near, weight, 0)) for index, weight in met]
