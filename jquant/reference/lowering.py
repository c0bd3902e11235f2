"""The integer constants that lowering derives from scales: nash-arithmetic sections 2 to 5, in exact rationals.

A float32 scale is a rational number: `Fraction(float(scale))` is its exact value, and nothing here is rounded but
where the specification rounds.
"""

import math
from fractions import Fraction

import numpy as np

from jquant.types import integer_range


def floor_half_up(value: Fraction) -> int:
    """floor(value + 1/2)."""
    return math.floor(value + Fraction(1, 2))


def rescale_constants(ratio: Fraction, bits: int, narrow: bool) -> tuple[int, int, int]:
    """Section 3: (mantissa, pre, post) for ratio = s_in / s_out and an output of `bits` bits.

    `narrow`: the input is int8 or int16, which needs no pre-shift. A ratio of 0 gives a mantissa of 0.
    """
    m, e = max(Fraction(-32768), min(Fraction(32767), Fraction(ratio))), 0
    while abs(m) >= 1:
        m, e = m / 2, e + 1
    while 0 < abs(m) < Fraction(1, 2):
        m, e = m * 2, e - 1
    mantissa = min(floor_half_up(m * 2**15), 32767)
    total = 15 - e
    max_post = 29 - (bits - 1)
    pre = 0 if narrow else min(max(total - max_post, 0), 31)
    post = min(max(total - pre, 0), 31)
    return mantissa, pre, post


def sumin_constants(ratio: Fraction) -> tuple[int, int]:
    """Section 4: (sumin_scale, sumin_rshift) for ratio = s_e / (s_x * s_w[c]).

    The largest shift in [0, 31] that keeps the scale in int16; where none does, the scale saturates.
    """
    for shift in range(31, -1, -1):
        if (scale := floor_half_up(Fraction(ratio) * 2**shift)) <= 32767:
            return scale, shift
    return 32767, 0


def add_constants(s_a: Fraction, s_b: Fraction, max_shift: int) -> tuple[int, int]:
    """Section 5: (sh, coefficient) of a + b where s_a >= s_b: acc = (a << sh) + b * coefficient, in units s_a / 2^sh.

    `max_shift`: 23 for int8 operands, 15 for int16.
    """
    s_a, s_b = Fraction(s_a), Fraction(s_b)
    if not s_a >= s_b > 0:
        raise ValueError(f"the first scale must be the larger one, and both positive; got {float(s_a)}, {float(s_b)}")
    shift = 0
    while shift < max_shift and 2 ** (shift + 1) <= 32767 * s_a / s_b:  # shift <= log2(32767 * s_a / s_b)
        shift += 1
    return shift, floor_half_up(s_b * 2**shift / s_a)


def bias_constant(bias: Fraction, scale: Fraction) -> int:
    """Section 4: sat_32(rhe(bias / scale)) with scale = s_x * s_w[c]. Python rounds a Fraction half to even."""
    low, high = integer_range("int32")
    return max(low, min(high, round(Fraction(bias) / Fraction(scale))))


def observer_scale(minimum: float, maximum: float, dtype: str) -> np.float32:
    """Section 2: max(-min, max, 0) / ((qmax - qmin) / 2), at least 2^-23; real per LSB, in float32."""
    low, high = integer_range(dtype)
    reach = max(np.float32(-minimum), np.float32(maximum), np.float32(0))
    return max(reach / np.float32((high - low) / 2), np.float32(2**-23))
