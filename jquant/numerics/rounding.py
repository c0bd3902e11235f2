"""Rounding, shifting and saturation: section 2 of the specification. Integers are int32 unless named otherwise."""

from fractions import Fraction
from math import floor, trunc

import jax
import jax.numpy as jnp
import numpy as np

from jquant.numerics.namespace import array_namespace, bits_of, float_of
from jquant.numerics.platform import platform
from jquant.types import ROUNDINGS, Array, integer_range, storage_dtype


def divide(x: Array, scale: Array) -> Array:
    """x / scale, correctly rounded in float32, where neither it nor its rounding error is subnormal.

    XLA rewrites a division by a broadcast scalar into a product with its reciprocal, which is an ulp off for many
    values and moves ties of the rounding that follows. A divisor that depends on x keeps the division. On a GPU the
    division itself is up to 2 ulp off.
    """
    if array_namespace(x, scale) is np:
        return x / scale
    quotient = x / jnp.where(jnp.isnan(x), x, scale)
    if platform() != "gpu":
        return quotient
    rough, x, scale = jax.lax.stop_gradient((quotient, x, scale))
    step = nearest_quotient(rough, x, scale) - rough  # a few ulp, so that difference and sum are exact
    return quotient + jnp.where(jnp.isfinite(step), step, 0.0)  # infinity less infinity is no number


def nearest_quotient(q: Array, x: Array, scale: Array) -> Array:
    """The float32 nearest to x / scale, given one at most 2 ulp away. What is not finite stays as it is."""
    nearer = q + _remainder(q, x, scale) / scale
    candidates = jnp.stack([nearer, jnp.nextafter(nearer, -jnp.inf), jnp.nextafter(nearer, jnp.inf)])
    best = jnp.argmin(jnp.abs(_remainder(candidates, x, scale)), axis=0)
    chosen = jnp.where(best == 0, candidates[0], jnp.where(best == 1, candidates[1], candidates[2]))
    return jnp.where(jnp.isfinite(chosen), chosen, q)


def _remainder(q: Array, x: Array, scale: Array) -> Array:
    """x - q * scale, exact within 1 ulp of the quotient, and in whatever way the compiler joins products and sums.

    Factors in halves of 12 bits make every product exact, and every sum has less than 24 bits between its magnitude
    and the unit that all its terms are multiples of.
    """
    q1, s1 = _upper_half(q), _upper_half(scale)
    q0, s0 = q - q1, scale - s1
    return ((x - q1 * s1) - q1 * s0) - q0 * s1 - q0 * s0


def _upper_half(v: Array) -> Array:
    return float_of(bits_of(v) & ~0xFFF)


def expand(scale: Array, axis: int | None, rank: int) -> Array:
    """Shapes a scale [channels] so that it broadcasts along `axis` of a tensor of that rank; scalars stay scalars."""
    scale = array_namespace(scale).asarray(scale)
    if axis is None or scale.ndim != 1:
        return scale
    return scale.reshape([-1 if i == axis % rank else 1 for i in range(rank)])


def to_int32(x: Array) -> Array:
    """Float32 integers to int32, saturating at both ends."""
    xp = array_namespace(x)
    inside = xp.where((x < 2.0**31) & (x >= -(2.0**31)), x, 0.0).astype(xp.int32)
    return xp.where(x >= 2.0**31, xp.int32(2**31 - 1), xp.where(x < -(2.0**31), xp.int32(-(2**31)), inside))


def quantize(x: Array, scale: Array, dtype: str, rounding: str = "half_even") -> Array:
    """sat(round(x / scale)), the division in float32.

    Args:
      x: real, any shape, float32.
      scale: real per LSB, broadcastable to x.
      dtype: the quantized dtype, "int8" for example.
      rounding: one of `ROUNDINGS`; "half_up" is the legacy rule floor(v + 1/2).
    """
    rounded = round_real(divide(x, scale), rounding)
    if dtype == "int32":
        return to_int32(rounded)
    low, high = integer_range(dtype)
    return rounded.clip(low, high).astype(storage_dtype(dtype))


def half_steps(value: Array, scale: Array) -> Array:
    """Where a real number lies among integers n that mean n * scale in float32, in half LSB: 2n at n, odd between two.

    So that 2q is above, at or below it as q * scale is above, at or below `value`, for every int8 or int16 q.
    """
    nearest = quantize(value, scale, "int32", "half_up").clip(-(2**17), 2**17)
    point = dequantize(nearest, scale)
    return 2 * nearest - (point > value).astype(np.int32) + (point < value).astype(np.int32)


def round_real(v: Array, rounding: str) -> Array:
    """Float32 v to an integer: to the nearest, ties up, to even or away from zero; down; or toward zero.

    "half_up" and "half_away" are infinite from 2^127 on.
    """
    xp = array_namespace(v)
    match rounding:
        case "half_even":
            return xp.round(v)
        case "half_up":
            # In halves: exact, where the float sum v + 1/2 would round. And v is read once, so that XLA fuses its
            # division.
            return xp.ceil(0.5 * xp.floor(2.0 * v))
        case "half_away":
            return xp.copysign(xp.ceil(0.5 * xp.floor(2.0 * abs(v))), v)
        case "floor":
            return xp.floor(v)
        case "toward_zero":
            return xp.trunc(v)
    raise unknown(rounding)


def round_fraction(value: Fraction, rounding: str) -> int:
    """An exact number to an integer, by one of `ROUNDINGS`."""
    match rounding:
        case "half_even":
            return round(value)
        case "half_up":
            return floor(value + Fraction(1, 2))
        case "half_away":
            return (-1 if value < 0 else 1) * floor(abs(value) + Fraction(1, 2))
        case "floor":
            return floor(value)
        case "toward_zero":
            return trunc(value)
    raise unknown(rounding)


def goes_up(whole: Array, half: Array, below: Array, negative: Array | bool, rounding: str) -> Array:
    """Whether a magnitude is rounded to whole + 1, as int32 0 or 1.

    Args:
      whole: its floor, int32.
      half: bool, whether what is left is at least 1/2.
      below: bool, whether something is left apart from that 1/2.
      negative: whether the number is negative.
      rounding: one of `ROUNDINGS`.
    """
    xp = array_namespace(whole, half, below, negative)
    match rounding:
        case "half_even":
            up = half & (below | ((whole & 1) == 1))
        case "half_up":
            up = half & (below | ~xp.asarray(negative))
        case "half_away":
            up = half
        case "floor":
            up = xp.asarray(negative) & (half | below)
        case "toward_zero":
            up = xp.zeros_like(half)
        case _:
            raise unknown(rounding)
    return xp.where(up, np.int32(1), np.int32(0))


def unknown(rounding: str) -> ValueError:
    return ValueError(f"unknown rounding {rounding!r}; known: {', '.join(ROUNDINGS)}")


def dequantize(q: Array, scale: Array) -> Array:
    """q * scale, in float32."""
    return q.astype(np.float32) * scale


def to_float16(x: Array) -> Array:
    """Float32 to float16: to nearest, ties to even, clamped to +-65504.

    Rounded before it is cast: for a GPU, XLA takes out a cast that is followed by the one back, with its rounding.
    """
    x = jnp.clip(x, -65504.0, 65504.0)
    normal = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=10)
    subnormal = jnp.round(x * 2.0**24) * 2.0**-24
    return jnp.where(jnp.abs(x) < 2.0**-14, subnormal, normal).astype(jnp.float16)


def saturate(v: Array, dtype: str) -> Array:
    """Clamps int32 to a quantized dtype and stores it there."""
    return v.clip(*integer_range(dtype)).astype(storage_dtype(dtype))


def negate(v: Array, dtype: str) -> Array:
    """sat(-v) of an int32 v. A GPU's compiler was seen to lose the saturation to int16 that comes after a minus."""
    return saturate(-array_namespace(v).maximum(v, integer_range(dtype)[0] + 1), dtype)


def widen(v: Array) -> Array:
    """Any stored integer to int32."""
    return v.astype(np.int32)


def shift_right(v: Array, n: Array, rounding: str) -> Array:
    """v / 2^n as an integer, for int32 v and 0 <= n <= 31, by one of `ROUNDINGS`; never overflows.

    "half_up" is floor(v / 2^n + 1/2).
    """
    xp = array_namespace(v, n)
    n = xp.asarray(n, np.int32)
    quotient = v >> n
    if rounding == "floor":
        return quotient
    if rounding == "toward_zero":
        return quotient + xp.where((v < 0) & ((quotient << n) != v), np.int32(1), np.int32(0))
    # The last bit shifted out decides: floor(v / 2^n + 1/2) = (v >> n) + bit n-1 of v.
    half = xp.where(n > 0, (v >> xp.maximum(n - 1, 0)) & 1, 0)
    if rounding == "half_up":
        return quotient + half
    below = v & ((xp.int32(1) << xp.maximum(n - 1, 0)) - 1)  # the bits below the half bit
    tie = (half == 1) & (below == 0)
    if rounding == "half_even":
        return quotient + xp.where(tie, quotient & 1, half)
    if rounding == "half_away":
        return quotient + xp.where(tie & (v < 0), np.int32(0), half)
    raise unknown(rounding)


def snap_to_pow2(scale: Array) -> Array:
    """The smallest power of two not below a positive normal float32, exactly: the exponent of the bit pattern."""
    bits = bits_of(scale)
    exponent = (bits >> 23) + array_namespace(bits).where((bits & 0x7FFFFF) == 0, np.int32(0), np.int32(1))
    return float_of(exponent << 23)
