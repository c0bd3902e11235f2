"""Integers beyond 32 bits without x64: three limbs in base 2^16, lowest first, the highest one signed.

v = l0 + l1 * 2^16 + l2 * 2^32 with 0 <= l0, l1 < 2^16. Room for 64 bits; sums of int16 x int8 products need 48.
"""

from typing import NamedTuple

import jax.numpy as jnp

from jquant.numerics.rounding import unknown
from jquant.types import Array, integer_range

MASK = 0xFFFF


class Limbs(NamedTuple):
    low: Array
    middle: Array
    high: Array


def carry(low: Array, middle: Array, high: Array) -> Limbs:
    """Brings limbs into their ranges; on entry each may be any int32 whose carries do not overflow."""
    middle = middle + (low >> 16)
    high = high + (middle >> 16)
    return Limbs(low & MASK, middle & MASK, high)


def from_int32(v: Array) -> Limbs:
    return Limbs(v & MASK, (v >> 16) & MASK, v >> 31)


def add(a: Limbs, b: Limbs) -> Limbs:
    return carry(a.low + b.low, a.middle + b.middle, a.high + b.high)


def multiply(a: Limbs, m: Array) -> Limbs:
    """a * m for 0 <= m < 2^15 and |a| < 2^48; limb by limb, each product fits in int32."""
    low = a.low * m
    middle = a.middle * m
    # The carry of low is added before middle is split, in two parts, since middle + 2^15 could overflow.
    high = a.high * m + (middle >> 16)
    return carry(low & MASK, (middle & MASK) + (low >> 16), high)


def shift_right_floor(a: Limbs, n: Array) -> Limbs:
    """floor(a / 2^n) for 0 <= n < 64."""
    n = jnp.asarray(n, jnp.int32)
    for step in (32, 16):  # whole limbs
        count, n = n >= step, jnp.where(n >= step, n - step, n)
        sign = a.high >> 31
        moved = (a.high & MASK, (a.high >> 16) & MASK, sign) if step == 32 else (a.middle, a.high & MASK, a.high >> 16)
        a = Limbs(*(jnp.where(count, new, old) for new, old in zip(moved, a, strict=True)))
    up = 16 - n
    low = ((a.low >> n) | (a.middle << up)) & MASK
    middle = ((a.middle >> n) | ((a.high & MASK) << up)) & MASK
    return Limbs(low, middle, a.high >> n)


def shift_right(a: Limbs, n: Array, rounding: str) -> Limbs:
    """a / 2^n as an integer, for 0 <= n < 64, by one of `ROUNDINGS`."""
    n = jnp.asarray(n, jnp.int32)
    quotient = shift_right_floor(a, n)
    if rounding == "floor":
        return quotient
    if rounding == "toward_zero":
        up = jnp.where((a.high < 0) & ~_equal(shift_left(quotient, n), a), 1, 0)
        return carry(quotient.low + up, quotient.middle, quotient.high)
    before = shift_right_floor(a, jnp.maximum(n - 1, 0))
    half = jnp.where(n > 0, before.low & 1, 0)
    if rounding in ("half_even", "half_away"):
        # A tie has nothing below the half bit: shifting back gives the number again.
        tie = _equal(shift_left(before, jnp.maximum(n - 1, 0)), a) & (half == 1)
        at_tie = quotient.low & 1 if rounding == "half_even" else jnp.where(a.high < 0, 0, 1)
        half = jnp.where(tie, at_tie, half)
    elif rounding != "half_up":
        raise unknown(rounding)
    return carry(quotient.low + half, quotient.middle, quotient.high)


def _equal(a: Limbs, b: Limbs) -> Array:
    return (a.low == b.low) & (a.middle == b.middle) & (a.high == b.high)


def shift_left(a: Limbs, n: Array) -> Limbs:
    """a * 2^n for 0 <= n < 64, modulo 2^64."""
    n = jnp.asarray(n, jnp.int32)
    for step in (32, 16):
        count, n = n >= step, jnp.where(n >= step, n - step, n)
        zero = jnp.zeros_like(a.low)
        moved = (zero, zero, a.low | (a.middle << 16)) if step == 32 else (zero, a.low, a.middle | (a.high << 16))
        a = Limbs(*(jnp.where(count, new, old) for new, old in zip(moved, a, strict=True)))
    low, middle = a.low << n, a.middle << n
    return Limbs(low & MASK, (middle | (low >> 16)) & MASK, (a.high << n) | (middle >> 16))


def saturate(a: Limbs, dtype: str) -> Array:
    """Clamps to a signed quantized dtype; returns int32."""
    return clip(a, *integer_range(dtype))


def clip(a: Limbs, low: int, high: int) -> Array:
    """Clamps to int32 bounds; returns int32."""
    fits = a.high == jnp.where(a.middle < 0x8000, 0, -1)
    ends = jnp.where(a.high < 0, jnp.int32(-(2**31)), jnp.int32(2**31 - 1))
    return jnp.clip(jnp.where(fits, (a.middle << 16) | a.low, ends), low, high)
