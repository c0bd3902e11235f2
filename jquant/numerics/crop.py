"""Crop and resize with regions that are data: section 7's interpolation, its step computed from each region.

The arithmetic is that of `resample.steps_of` on the crop, with half-pixel centres for linear.
"""

from fractions import Fraction
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jquant.numerics.rounding import goes_up, round_fraction, shift_right, widen
from jquant.types import Array, ResizeFormat

REACH = 2**14 - 1  # of coordinates: at most 2^15 - 1 pixels, so that a position in 16 fraction bits stays in int32
MAX_FRACTION_BITS = 11  # 8 bits of a pixel and two weights in int32


class Region(NamedTuple):
    """A part of each picture along an axis, in pixels: [N], int32. It may leave the picture."""

    first: Array
    pixels: Array


class Taps(NamedTuple):
    """What outputs meet along an axis: [N, count] indices of two pixels, relative to the picture, and their weights."""

    indices: tuple[Array, ...]
    weights: tuple[Array, ...]


def region_of(low: Array, high: Array) -> Region:
    """The pixels from low to high, both included and within +-REACH; at least one pixel."""
    return Region(low, jnp.maximum(high - low, 0) + 1)


def divided(n: Array, bits: int, by: int, rounding: str, *, less: int = 0) -> Array:
    """n * 2^bits / by - less, rounded, without leaving int32: n < 2^15, by < 2^15, bits <= 16."""
    high = (n % by) << bits
    rest = high % by
    floor = ((n // by) << bits) + high // by
    floor = floor - less if less else floor
    if rounding == "floor":
        return floor
    if rounding == "half_up":
        return floor + (2 * rest >= by).astype(jnp.int32)
    # A number below 0 has the magnitude -floor - 1 and (by - rest) / by, unless nothing is left.
    negative = (floor < 0) & (rest > 0)
    left = 2 * jnp.where(negative, by - rest, rest)
    whole = jnp.where(negative, -floor - 1, floor)
    up = goes_up(whole, left >= by, (left > 0) & (left != by), negative, rounding)
    return jnp.where(negative, -(whole + up), whole + up)


def taps_of(region: Region, out: int, form: ResizeFormat, *, nearest: bool) -> Taps:
    """The pixels that `out` positions on each region meet, clamped to it: [N] -> [N, out]."""
    first, count = (v[:, None] for v in region)
    places, bits, rounding = form.step_bits, form.weight_bits, form.step_rounding
    step = divided(count, places, out, rounding)
    i = np.arange(out, dtype=np.int32)
    if nearest:  # as in `Interpolate`: as much higher as rounded steps can fall short of an integer
        at = step * i + round_fraction(Fraction(out + 1, 2), rounding)
    else:
        at = step * i + divided(count, places - 1, out, rounding, less=2 ** (places - 1))
    at = jnp.clip(at, 0, (count - 1) << places)
    below = at >> places
    if nearest:
        return Taps((first + below,), (jnp.full_like(below, 2**bits),))
    fraction = shift_right(at & (2**places - 1), jnp.int32(places - bits), form.weight_rounding)
    above = jnp.minimum(below + 1, count - 1)
    return Taps((first + below, first + above), (2**bits - fraction, fraction))


def blend(x: Array, axis: int, taps: Taps, fill: Array | None) -> Array:
    """The weighted sum of the pixels met along an axis of x [N, H, W, C], int32.

    A pixel outside the picture is `fill`, broadcastable to C; with None it is the border's.
    """
    n = x.shape[axis]
    shape = (x.shape[0], *(-1 if a == axis else 1 for a in range(1, x.ndim)))
    total = jnp.int32(0)
    for index, weight in zip(taps.indices, taps.weights, strict=True):
        index, weight = index.reshape(shape), weight.reshape(shape)
        met = jnp.take_along_axis(x, jnp.clip(index, 0, n - 1), axis=axis, mode="clip")
        if fill is not None:
            met = jnp.where((index >= 0) & (index < n), met, fill)
        total = total + met * weight
    return total


def crop_resize(plane: Array, rows: Taps, columns: Taps, form: ResizeFormat, fill: int | None) -> Array:
    """Regions of pixels [N, H, W, C] resized, int32 in [0, 255]: one right shift of the exact sum."""
    bits = form.weight_bits
    x = blend(widen(plane), 1, rows, None if fill is None else jnp.int32(fill))
    x = blend(x, 2, columns, None if fill is None else jnp.int32(fill << bits))
    return shift_right(x, jnp.int32(2 * bits), form.rounding)
