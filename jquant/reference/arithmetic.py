"""The arithmetic that every operator is made of: nash-arithmetic notation and sections 2 and 3.

Integers are numpy int64, in which nothing here can overflow: an accumulator has at most 2^16 products of 2^15 * 2^7 and
a 32-bit bias, so it stays below 2^39, and a mantissa adds 15 bits.
"""

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np

from jquant.types import InputError, Target, integer_range


def saturate(v, dtype: str) -> np.ndarray:
    """`sat_B`: clamps integers to the range of `dtype`."""
    low, high = integer_range(dtype)
    return np.clip(np.asarray(v, np.int64), low, high)


ROUNDED: dict[str, Callable[[Fraction], int]] = {
    "half_up": lambda v: math.floor(v + Fraction(1, 2)),
    "half_even": round,  # Python rounds a Fraction half to even
    "half_away": lambda v: math.floor(v + Fraction(1, 2)) if v >= 0 else math.ceil(v - Fraction(1, 2)),
    "floor": math.floor,
    "toward_zero": math.trunc,
}


def rounded(value: Fraction, rounding: str) -> int:
    """An exact number as an integer."""
    if rounding not in ROUNDED:
        raise ValueError(f"unknown rounding {rounding!r}; known: {', '.join(ROUNDED)}")
    return ROUNDED[rounding](Fraction(value))


def round_shift(v, shift, rounding: str) -> np.ndarray:
    """v / 2^shift as an integer, 0 <= shift <= 62, by a rounding of `ROUNDED`; `half_up` is `rsh`."""
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
        case "half_away":
            return floor + (above_half | (exactly_half & (v >= 0)))
        case "toward_zero":
            return floor + ((v < 0) & (remainder > 0))
    raise ValueError(f"unknown rounding {rounding!r}; known: {', '.join(ROUNDED)}")


def rescale_unsaturated(v, mantissa, pre, post, target: Target, *, average: bool = False) -> np.ndarray:
    """Section 3 without the last clamp, for operators that sum rescaled terms. Saturates at int32.

    v: accumulator, any shape; mantissa, pre, post: broadcastable against it. `average`: v is a pooling window's sum.
    """
    form = target.rescale
    v, mantissa = np.asarray(v, np.int64), np.asarray(mantissa, np.int64)
    pre, post = np.asarray(pre, np.int64), np.asarray(post, np.int64)
    if form.high_precision:
        return saturate(round_shift(v * mantissa, pre + post, form.post_rounding), "int32")
    limit = 2 ** (form.inner_bits - 1)
    pre_rounding = form.average_pre_rounding if average else form.pre_rounding
    shifted = np.clip(round_shift(v, pre, pre_rounding), -limit, limit - 1)
    return saturate(round_shift(shifted * mantissa, post, form.post_rounding), "int32")


def rescale(v, mantissa, pre, post, dtype: str, target: Target, average: bool = False) -> np.ndarray:
    """Section 3: y = sat_B( rsh( sat_inner( v >> pre ) * mantissa , post ) ), with the roundings of `target`."""
    return saturate(rescale_unsaturated(v, mantissa, pre, post, target, average=average), dtype)


def quantize(x, scale, dtype: str, rounding: str) -> np.ndarray:
    """Section 2: sat(round(x / scale)), the division in float32. x: real; scale: real per LSB, broadcastable."""
    with np.errstate(over="ignore"):  # a quotient beyond float32 is infinite, and saturates
        v = np.asarray(x, np.float32) / np.asarray(scale, np.float32)
    if np.isnan(v).any():
        raise InputError("cannot quantize NaN: check the input for NaN, and the scale for zero")
    exact = v.astype(np.float64)  # so that v + 1/2 is not rounded up to the next integer
    match rounding:
        case "half_even":
            integers = np.rint(exact)
        case "half_up":
            integers = np.floor(exact + 0.5)
        case "half_away":
            integers = np.where(exact < 0, np.ceil(exact - 0.5), np.floor(exact + 0.5))
        case "floor":
            integers = np.floor(exact)
        case "toward_zero":
            integers = np.trunc(exact)
        case _:
            raise ValueError(f"unknown rounding {rounding!r}; known: {', '.join(ROUNDED)}")
    return np.clip(integers, *integer_range(dtype)).astype(np.int64)


def dequantize(q, scale) -> np.ndarray:
    """Section 1: integer x scale, a float32 product. scale: real per LSB, broadcastable against q."""
    return np.asarray(q).astype(np.float32) * np.asarray(scale, np.float32)
