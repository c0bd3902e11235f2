"""Rounding, shifting and saturation: section 2 of the specification. Integers are int32 unless named otherwise."""

import jax
import jax.numpy as jnp

from jquant.numerics.platform import platform
from jquant.types import Array, integer_range, storage_dtype


def divide(x: Array, scale: Array) -> Array:
    """x / scale, correctly rounded in float32, where neither it nor its rounding error is subnormal.

    XLA rewrites a division by a broadcast scalar into a product with its reciprocal, which is an ulp off for many
    values and moves ties of the rounding that follows. A divisor that depends on x keeps the division. On a GPU the
    division itself is up to 2 ulp off.
    """
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
    bits = jax.lax.bitcast_convert_type(jnp.asarray(v, jnp.float32), jnp.int32)
    return jax.lax.bitcast_convert_type(bits & ~0xFFF, jnp.float32)


def expand(scale: Array, axis: int | None, rank: int) -> Array:
    """Shapes a scale [channels] so that it broadcasts along `axis` of a tensor of that rank; scalars stay scalars."""
    scale = jnp.asarray(scale)
    if axis is None or scale.ndim != 1:
        return scale
    return scale.reshape([-1 if i == axis % rank else 1 for i in range(rank)])


def to_int32(x: Array) -> Array:
    """Float32 integers to int32, saturating at both ends."""
    inside = jnp.where((x < 2.0**31) & (x >= -(2.0**31)), x, 0.0).astype(jnp.int32)
    return jnp.where(x >= 2.0**31, jnp.int32(2**31 - 1), jnp.where(x < -(2.0**31), jnp.int32(-(2**31)), inside))


def quantize(x: Array, scale: Array, dtype: str, rounding: str = "half_even") -> Array:
    """sat(round(x / scale)), the division in float32.

    Args:
      x: real, any shape, float32.
      scale: real per LSB, broadcastable to x.
      dtype: the quantized dtype, "int8" for example.
      rounding: "half_even", or "half_up" for the legacy rule floor(v + 1/2).
    """
    rounded = round_ties(divide(x, scale), rounding)
    if dtype == "int32":
        return to_int32(rounded)
    low, high = integer_range(dtype)
    return jnp.clip(rounded, low, high).astype(storage_dtype(dtype))


def half_steps(value: Array, scale: Array) -> Array:
    """Where a real number lies among integers n that mean n * scale in float32, in half LSB: 2n at n, odd between two.

    So that 2q is above, at or below it as q * scale is above, at or below `value`, for every int8 or int16 q.
    """
    nearest = jnp.clip(quantize(value, scale, "int32", "half_up"), -(2**17), 2**17)
    point = dequantize(nearest, scale)
    return 2 * nearest - (point > value).astype(jnp.int32) + (point < value).astype(jnp.int32)


def round_ties(v: Array, rounding: str) -> Array:
    """Float32 v to the nearest integer, ties "half_even", or "half_up": floor(v + 1/2), infinite from 2^127 on."""
    if rounding == "half_even":
        return jnp.round(v)
    # In halves: exact, where the float sum v + 1/2 would round. And v is read once, so that XLA fuses its division.
    return jnp.ceil(0.5 * jnp.floor(2.0 * v))


def dequantize(q: Array, scale: Array) -> Array:
    """q * scale, in float32."""
    return q.astype(jnp.float32) * scale


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
    return jnp.clip(v, *integer_range(dtype)).astype(storage_dtype(dtype))


def negate(v: Array, dtype: str) -> Array:
    """sat(-v) of an int32 v. A GPU's compiler was seen to lose the saturation to int16 that comes after a minus."""
    return saturate(-jnp.maximum(v, integer_range(dtype)[0] + 1), dtype)


def widen(v: Array) -> Array:
    """Any stored integer to int32."""
    return v.astype(jnp.int32)


def shift_right(v: Array, n: Array, rounding: str) -> Array:
    """v / 2^n for 0 <= n <= 31 with "floor", "half_up" (floor(v / 2^n + 1/2)) or "half_even"; never overflows."""
    n = jnp.asarray(n, jnp.int32)
    if rounding == "floor":
        return v >> n
    # The last bit shifted out decides: floor(v / 2^n + 1/2) = (v >> n) + bit n-1 of v.
    quotient = v >> n
    half = jnp.where(n > 0, (v >> jnp.maximum(n - 1, 0)) & 1, 0)
    if rounding == "half_up":
        return quotient + half
    below = v & ((jnp.int32(1) << jnp.maximum(n - 1, 0)) - 1)  # the bits below the half bit
    tie = (half == 1) & (below == 0)
    return quotient + jnp.where(tie, quotient & 1, half)


def snap_to_pow2(scale: Array) -> Array:
    """The smallest power of two not below a positive normal float32, exactly: the exponent of the bit pattern."""
    bits = jax.lax.bitcast_convert_type(jnp.asarray(scale, jnp.float32), jnp.int32)
    exponent = (bits >> 23) + jnp.where((bits & 0x7FFFFF) == 0, 0, 1)
    return jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)
