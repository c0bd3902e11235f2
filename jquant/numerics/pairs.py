"""Integers of 33 bits as a sum of two int32 that is not taken: what a bias adds to a sum of products.

Cheaper than limbs: a shift by one bit brings the sum back to 32, and the bit that falls out is kept beside it.
"""

from typing import NamedTuple

import jax.numpy as jnp

from jquant.numerics import limbs
from jquant.numerics.limbs import Limbs
from jquant.numerics.rounding import shift_right as shift_int32
from jquant.types import Array

_LARGEST = 2**31 - 1


class Pair(NamedTuple):
    """The integer `first + second`, each int32."""

    first: Array
    second: Array


def to_limbs(v: Pair) -> Limbs:
    return limbs.add(limbs.from_int32(v.first), limbs.from_int32(v.second))


def saturate(v: Pair) -> Array:
    """The nearest int32."""
    half, odd = _halved(v)
    inside = half * 2 + odd  # wraps where it is not taken
    return jnp.where(half > _LARGEST // 2, _LARGEST, jnp.where(half < -(_LARGEST // 2) - 1, -_LARGEST - 1, inside))


def shift_right(v: Pair, n: Array, rounding: str) -> Array:
    """v / 2^n for 0 <= n <= 31 by one of `ROUNDINGS`, saturated to int32 (which only n = 0 needs).

    With v = 2 * half + odd, v >> n is half >> (n - 1); the last bit shifted out is odd for n = 1, else one of half.
    """
    if rounding not in ("floor", "half_up"):  # these need all the bits shifted out
        return limbs.saturate(limbs.shift_right(to_limbs(v), n, rounding), "int32")
    n = jnp.asarray(n, jnp.int32)
    half, odd = _halved(v)
    shifted = shift_int32(half, jnp.maximum(n - 1, 0), rounding)
    if rounding == "half_up":
        shifted = shifted + jnp.where(n == 1, odd, 0)
    return jnp.where(n == 0, saturate(v), shifted)


def _halved(v: Pair) -> tuple[Array, Array]:
    """(floor(v / 2), v mod 2)."""
    return (v.first >> 1) + (v.second >> 1) + (v.first & v.second & 1), (v.first ^ v.second) & 1
