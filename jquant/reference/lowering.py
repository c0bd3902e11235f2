"""The integer constants that lowering derives from scales: nash-arithmetic sections 2 to 5, in exact rationals.

A float32 scale is a rational number: `Fraction(float(scale))` is its exact value, and nothing here is rounded but
where the specification rounds.
"""

from fractions import Fraction

import numpy as np

from jquant.reference.arithmetic import quantize, rounded
from jquant.types import Target, integer_range


def rescale_constants(ratio: Fraction, bits: int, narrow: bool, target: Target) -> tuple[int, int, int]:
    """Section 3: (mantissa, pre, post) for ratio = s_in / s_out and an output of `bits` bits.

    `narrow`: the input is int8 or int16, which needs no pre-shift. A ratio of 0 gives a mantissa of 0.
    """
    form = target.rescale
    m, e = min(Fraction(2**form.ratio_bits - 1), Fraction(ratio)), 0
    while m >= 1:
        m, e = m / 2, e + 1
    while 0 < m < Fraction(1, 2):
        m, e = m * 2, e - 1
    mantissa = rounded(m * 2**form.mantissa_bits, form.mantissa_rounding)
    if mantissa == 2**form.mantissa_bits:
        if form.mantissa_overflow == "renormalize":
            mantissa, e = mantissa // 2, e + 1
        else:
            mantissa -= 1
    total = form.mantissa_bits - e
    before = {8: form.post_shift_int8, 16: form.post_shift_int16}[bits]
    pre = 0 if narrow else min(max(total - before, 0), form.max_pre_shift)
    post = min(max(total - pre, 0), form.max_post_shift)
    return mantissa, pre, post


def sumin_constants(ratio: Fraction, target: Target) -> tuple[int, int]:
    """Section 4: (sumin_scale, sumin_rshift) for ratio = s_e / (s_x * s_w[c]).

    The largest shift that keeps the scale below 2^multiplier_bits; where none does, the scale saturates.
    """
    form = target.addend
    for shift in range(form.max_shift, -1, -1):
        if (scale := rounded(Fraction(ratio) * 2**shift, form.multiplier_rounding)) < 2**form.multiplier_bits:
            return scale, shift
    return 2**form.multiplier_bits - 1, 0


def add_constants(s_a: Fraction, s_b: Fraction, bits: int, target: Target) -> tuple[int, int]:
    """Section 5: (sh, coefficient) of a + b where s_a >= s_b: acc = (a << sh) + b * coefficient, in units s_a / 2^sh.

    `bits`: 8 where both operands are int8, else 16.
    """
    form = target.addition
    s_a, s_b = Fraction(s_a), Fraction(s_b)
    if not s_a >= s_b > 0:
        raise ValueError(f"the first scale must be the larger one, and both positive; got {float(s_a)}, {float(s_b)}")
    most, largest = {8: form.max_shift_int8, 16: form.max_shift_int16}[bits], 2**form.multiplier_bits - 1
    shift = 0
    while shift < most and 2 ** (shift + 1) <= largest * s_a / s_b:  # shift <= log2(largest * s_a / s_b)
        shift += 1
    return shift, min(rounded(s_b * 2**shift / s_a, form.multiplier_rounding), largest)


def bias_constant(bias: Fraction, scale: Fraction, target: Target) -> int:
    """Section 4: sat_32(round(bias / scale)) with scale = s_x * s_w[c]."""
    low, high = integer_range("int32")
    return max(low, min(high, rounded(Fraction(bias) / Fraction(scale), target.bias_rounding)))


def number_constant(value: float, scale, dtype: str, target: Target) -> int:
    """Section 5: a number that enters integers (a fill, a bound, the modulus of a remainder), in LSB."""
    return int(quantize(value, scale, dtype, target.number_rounding))


def slope_constants(weight, target: Target) -> tuple[np.ndarray, np.float32]:
    """Section 5: the slope of PReLU in LSB, and its scale, which holds the largest of them."""
    largest = float(np.abs(weight).max())
    scale = observer_scale(-largest, largest, target.slope_dtype)
    return quantize(weight, scale, target.slope_dtype, target.quantize_rounding), scale


def observer_scale(minimum: float, maximum: float, dtype: str) -> np.float32:
    """Section 2: max(-min, max, 0) / ((qmax - qmin) / 2), at least 2^-23; real per LSB, in float32."""
    low, high = integer_range(dtype)
    reach = max(np.float32(-minimum), np.float32(maximum), np.float32(0))
    return max(reach / np.float32((high - low) / 2), np.float32(2**-23))
