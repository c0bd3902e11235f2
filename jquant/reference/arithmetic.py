"""The arithmetic that every operator is made of: nash-arithmetic notation and sections 2 and 3.

Integers are numpy int64, in which nothing here can overflow: an accumulator has at most 2^16 products of 2^15 * 2^7 and
a 32-bit bias, so it stays below 2^39, and a mantissa adds 15 bits.
"""

import numpy as np

from jquant.types import InputError, Target, integer_range


def saturate(v, dtype: str) -> np.ndarray:
    """`sat_B`: clamps integers to the range of `dtype`."""
    low, high = integer_range(dtype)
    return np.clip(np.asarray(v, np.int64), low, high)


def round_shift(v, shift, rounding: str = "half_up") -> np.ndarray:
    """v / 2^shift as an integer, 0 <= shift <= 62: `half_up` (the specification's `rsh`), `half_even` or `floor`."""
    v, shift = np.asarray(v, np.int64), np.asarray(shift, np.int64)
    floor = v >> shift
    remainder = v - (floor << shift)  # 0 <= remainder < 2^shift
    above_half = 2 * remainder > np.int64(1) << shift
    exactly_half = 2 * remainder == np.int64(1) << shift
    match rounding:
        case "floor":
            return floor
        case "half_up":
            return floor + (above_half | exactly_half)
        case "half_even":
            return floor + (above_half | (exactly_half & (floor % 2 == 1)))
    raise ValueError(f"unknown rounding {rounding!r}; known: floor, half_up, half_even")


def rescale_unsaturated(v, mantissa, pre, post, target: Target, *, average: bool = False) -> np.ndarray:
    """Section 3 without the last clamp, for operators that sum rescaled terms. Always fits in int32.

    v: accumulator, any shape; mantissa, pre, post: broadcastable against it. `average`: v is a pooling window's sum.
    The high-precision form may leave int32, where it saturates.
    """
    v, mantissa = np.asarray(v, np.int64), np.asarray(mantissa, np.int64)
    pre, post = np.asarray(pre, np.int64), np.asarray(post, np.int64)
    if target.high_precision_rescale:
        return saturate(round_shift(v * mantissa, pre + post, target.post_rounding), "int32")
    pre_rounding = target.average_pre_rounding if average else target.pre_rounding
    shifted = saturate(round_shift(v, pre, pre_rounding), "int16")
    return round_shift(shifted * mantissa, post, target.post_rounding)


def rescale(v, mantissa, pre, post, dtype: str, target: Target, average: bool = False) -> np.ndarray:
    """Section 3: y = sat_B( rsh( sat_16( v >> pre ) * mantissa , post ) ), with the roundings of `target`."""
    return saturate(rescale_unsaturated(v, mantissa, pre, post, target, average=average), dtype)


def quantize(x, scale, dtype: str, rounding: str = "half_even") -> np.ndarray:
    """Section 2: sat(round(x / scale)), the division in float32. x: real; scale: real per LSB, broadcastable."""
    with np.errstate(over="ignore"):  # a quotient beyond float32 is infinite, and saturates
        v = np.asarray(x, np.float32) / np.asarray(scale, np.float32)
    if np.isnan(v).any():
        raise InputError("cannot quantize NaN: check the input for NaN, and the scale for zero")
    exact = v.astype(np.float64)  # so that v + 1/2 is not rounded up to the next integer
    match rounding:
        case "half_even":
            rounded = np.rint(exact)
        case "half_up":
            rounded = np.floor(exact + 0.5)
        case _:
            raise ValueError(f"unknown rounding {rounding!r}; known: half_even, half_up")
    return np.clip(rounded, *integer_range(dtype)).astype(np.int64)


def dequantize(q, scale) -> np.ndarray:
    """Section 1: integer x scale, a float32 product. scale: real per LSB, broadcastable against q."""
    return np.asarray(q).astype(np.float32) * np.asarray(scale, np.float32)
