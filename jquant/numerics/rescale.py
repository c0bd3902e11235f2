"""From an accumulator to int8 or int16: section 3 of the specification, exact and without x64.

A ratio of float32 scales is a ratio of integers of at most 48 bits. Long division gives its leading 16 bits and its
exponent, so that the same mantissas come out inside jit and outside.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jquant.numerics import limbs, pairs
from jquant.numerics.limbs import Limbs
from jquant.numerics.pairs import Pair
from jquant.numerics.rounding import saturate, shift_right
from jquant.types import Array, Target, bit_width

_PART = 26  # bits of the lower part of a 52-bit number in two int32 words
_PART_MASK = (1 << _PART) - 1


class Ratio(NamedTuple):
    """A positive ratio r: `bits` = floor(r / 2^exponent * 2^16) in [2^15, 2^16); `exact` where nothing was cut off."""

    bits: Array
    exponent: Array
    exact: Array


class Rescale(NamedTuple):
    """The three integers of a requantization, each int32 and broadcastable to the accumulator."""

    mantissa: Array
    pre: Array
    post: Array


def _split(scale: Array) -> tuple[Array, Array]:
    """A positive normal float32 as mantissa * 2^exponent with the mantissa in [2^23, 2^24)."""
    pattern = jax.lax.bitcast_convert_type(jnp.asarray(scale, jnp.float32), jnp.int32)
    return (pattern & 0x7FFFFF) | 0x800000, ((pattern >> 23) & 0xFF) - 150


def _product(a: Array, b: Array) -> tuple[Array, Array]:
    """The 48-bit product of two 24-bit integers as (high, low), low in [0, 2^26)."""
    a1, a0, b1, b0 = a >> 12, a & 0xFFF, b >> 12, b & 0xFFF
    middle = a0 * b1 + a1 * b0
    low = a0 * b0 + ((middle & 0x3FFF) << 12) + (((a1 * b1) & 3) << 24)
    return (middle >> 14) + ((a1 * b1) >> 2) + (low >> _PART), low & _PART_MASK


def _double(high: Array, low: Array) -> tuple[Array, Array]:
    return (high << 1) | (low >> (_PART - 1)), (low << 1) & _PART_MASK


def _at_least(a: tuple[Array, Array], b: tuple[Array, Array]) -> Array:
    return (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] >= b[1]))


def _choose(condition: Array, a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    return jnp.where(condition, a[0], b[0]), jnp.where(condition, a[1], b[1])


def _subtract(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    low = a[1] - b[1]
    return a[0] - b[0] + (low >> 31), low & _PART_MASK  # the sign of low is the borrow


@jax.jit
def ratio(n1: Array, n2: Array, d1: Array, d2: Array) -> Ratio:
    """(n1 * n2) / (d1 * d2) of positive normal float32 arrays, exactly; integers below 2^24 are such numbers."""
    n1, n2, d1, d2 = jnp.broadcast_arrays(*(jnp.asarray(v, jnp.float32) for v in (n1, n2, d1, d2)))
    (mn1, en1), (mn2, en2), (md1, ed1), (md2, ed2) = _split(n1), _split(n2), _split(d1), _split(d2)
    numerator, denominator = _product(mn1, mn2), _product(md1, md2)
    exponent = en1 + en2 - ed1 - ed2
    # Mantissa products lie in [2^46, 2^48): bring numerator / denominator from (1/4, 4) into [1/2, 1).
    small = ~_at_least(_double(*numerator), denominator)
    numerator = _choose(small, _double(*numerator), numerator)
    exponent = jnp.where(small, exponent - 1, exponent)
    for _ in range(2):
        large = _at_least(numerator, denominator)
        denominator = _choose(large, _double(*denominator), denominator)
        exponent = jnp.where(large, exponent + 1, exponent)

    def step(_: int, state: tuple) -> tuple:
        remainder, bits = state
        remainder = _double(*remainder)
        fits = _at_least(remainder, denominator)
        return _choose(fits, _subtract(remainder, denominator), remainder), jnp.where(fits, (bits << 1) + 1, bits << 1)

    remainder, bits = jax.lax.fori_loop(0, 16, step, (numerator, jnp.zeros_like(mn1)))
    return Ratio(bits, exponent, (remainder[0] == 0) & (remainder[1] == 0))


@jax.jit(static_argnames=("bits", "narrow"))
def rescale_of(value: Ratio, *, bits: int, narrow: bool = False) -> Rescale:
    """Mantissa and shifts for an output of `bits` bits; `narrow`: the input is int8 or int16, with no pre-shift."""
    mantissa = jnp.minimum((value.bits + 1) >> 1, 32767)
    too_large = value.exponent > 15
    mantissa = jnp.where(too_large, 32767, mantissa)
    total = jnp.where(too_large, 0, 15 - value.exponent)
    max_post = 29 - (bits - 1)
    pre = jnp.zeros_like(total) if narrow else jnp.clip(total - max_post, 0, 31)
    # A shift that both clips cannot hold (ratios below 2^-38 or so) leaves nothing of an int32 either way. High
    # precision uses their sum, of at most 62 bits.
    return Rescale(mantissa, pre, jnp.clip(total - pre, 0, 31))


@jax.jit(static_argnames=("exact_bound",))
def multiplier_of(value: Ratio, max_shift: int | Array, *, exact_bound: bool = False) -> tuple[Array, Array]:
    """(factor, shift) with factor = floor(r * 2^shift + 1/2) in int16, for the largest shift in [0, max_shift].

    The bound is on the rounded factor (the sumin rule); `exact_bound` puts it on r * 2^shift itself (the add rule).
    """
    rounded = (value.bits + 1) >> 1
    over = ~((value.bits < 65534) | ((value.bits == 65534) & value.exact)) if exact_bound else rounded > 32767
    shift = jnp.clip(jnp.where(over, 14, 15) - value.exponent, 0, max_shift)
    kept = jnp.clip(value.exponent + shift, -1, 15)  # bits of the factor before its rounding bit
    factor = ((value.bits >> (15 - kept)) + 1) >> 1
    return jnp.where(value.exponent > 15, 32767, jnp.minimum(factor, 32767)), shift


def rescale(v: Array | Limbs | Pair, by: Rescale, dtype: str, target: Target, *, average: bool = False) -> Array:
    """An accumulator in acc to an integer of `dtype`: y = sat(rsh(sat_16(v >> pre) * mantissa, post))."""
    return saturate(rescale_unsaturated(v, by, target, bits=bit_width(dtype), average=average), dtype)


def rescale_unsaturated(
    v: Array | Limbs | Pair, by: Rescale, target: Target, *, bits: int, average: bool = False
) -> Array:
    """`rescale` before the last saturation, int32; with high precision it is saturated to int32 only."""
    pre_rounding = target.average_pre_rounding if average else target.pre_rounding
    if target.high_precision_rescale:
        v = pairs.to_limbs(v) if isinstance(v, Pair) else v
        wide = v if isinstance(v, Limbs) else limbs.from_int32(v.astype(jnp.int32))
        product = limbs.multiply(wide, by.mantissa)
        return limbs.saturate(limbs.shift_right(product, by.pre + by.post, target.post_rounding), "int32")
    if isinstance(v, Limbs):
        head = limbs.saturate(limbs.shift_right(v, by.pre, pre_rounding), "int16")
    elif isinstance(v, Pair):
        head = jnp.clip(pairs.shift_right(v, by.pre, pre_rounding), -32768, 32767)
    else:
        head = jnp.clip(shift_right(v.astype(jnp.int32), by.pre, pre_rounding), -32768, 32767)
    return shift_right(head * by.mantissa, by.post, target.post_rounding)
