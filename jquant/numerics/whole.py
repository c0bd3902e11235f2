"""Floor, ceiling and nearest whole number of a quantized value, exactly.

A float32 scale is a 24-bit integer times a power of two. Below 2^23 its product with an int16 has 39 bits and a
fraction, which is cut in limbs; from 2^23 on every product is whole already.
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from jquant.numerics import limbs
from jquant.numerics.limbs import Limbs
from jquant.numerics.namespace import array_namespace, bits_of
from jquant.types import Array

WholeRounding = Literal["floor", "ceil", "half_even"]

_PART = 12  # bits of the lower part of the factor


class Whole(NamedTuple):
    """x * scale = x * factor / 2^shift * unit; the unit is 1 wherever there is a fraction to cut."""

    factor: Array
    shift: Array
    unit: Array


def whole_of(scale: Array) -> Whole:
    """The exact parts of a positive normal float32 scale, real per LSB."""
    xp, pattern = array_namespace(scale), bits_of(scale)
    factor, exponent = (pattern & 0x7FFFFF) | 0x800000, ((pattern >> 23) & 0xFF) - 150
    coarse = exponent >= 0
    shift = xp.where(coarse, 0, xp.minimum(-exponent, 63))  # beyond 40, all that is left is the sign
    return Whole(xp.where(coarse, 1, factor), shift, xp.where(coarse, scale, np.float32(1)))


def to_whole(x: Array, factor: Array, shift: Array, rounding: WholeRounding) -> Limbs:
    """x * factor / 2^shift as an integer, for |x| <= 2^15 and a factor below 2^24. The result is below 2^39."""
    if rounding == "ceil":
        return _negate(to_whole(-x, factor, shift, "floor"))
    upper = limbs.shift_left(limbs.from_int32(x * (factor >> _PART)), jnp.int32(_PART))
    product = limbs.add(upper, limbs.from_int32(x * (factor & ((1 << _PART) - 1))))
    return limbs.shift_right(product, shift, rounding)


def _negate(a: Limbs) -> Limbs:
    return limbs.carry(-a.low, -a.middle, -a.high)
