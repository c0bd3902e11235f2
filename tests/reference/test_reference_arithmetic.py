"""The reference against its specification: every formula a second time, in rationals and one number at a time."""

import math
from fractions import Fraction

import numpy as np
import pytest

from jquant import reference
from jquant.targets import NASH_E
from jquant.types import InputError

TARGET = NASH_E
LIMIT = {"int8": 127, "int16": 32767, "int32": 2**31 - 1}


def exact(scale: float) -> Fraction:
    return Fraction(float(np.float32(scale)))


def clamp(value: int, dtype: str) -> int:
    return max(-LIMIT[dtype] - 1, min(LIMIT[dtype], value))


def rounded(value: Fraction, rounding: str) -> int:
    match rounding:
        case "floor":
            return math.floor(value)
        case "half_up":
            return math.floor(value + Fraction(1, 2))
        case _:
            return round(value)  # Python's own: half to even


def test_the_documented_golden_row() -> None:
    """Section 3: the only row that the vendor's public documents give."""
    ratio = exact(0.1) * exact(1.0) / exact(0.20284509658813477)
    bias = reference.bias_constant(Fraction(0), exact(0.1), TARGET)
    mantissa, pre, post = reference.rescale_constants(ratio, bits=8, narrow=False, target=TARGET)
    no_addend = (1, 0)  # sumin_scale, sumin_rshift
    assert [bias, *no_addend, pre, mantissa, post] == [0, 1, 0, 0, 32308, 16]


@pytest.mark.parametrize("rounding", ["floor", "half_up", "half_even"])
def test_round_shift(rounding: str) -> None:
    values = [*range(-40, 41), -(2**31), 2**31 - 1, -(2**46) + 1, 2**46 - 1]
    for shift in (0, 1, 2, 3, 4, 31, 47, 62):
        expected = [rounded(Fraction(v, 2**shift), rounding) for v in values]
        np.testing.assert_array_equal(reference.round_shift(values, shift, rounding), expected)


def test_round_shift_knows_its_roundings() -> None:
    with pytest.raises(ValueError, match="half_evn"):
        reference.round_shift(1, 1, "half_evn")


@pytest.mark.parametrize("high_precision", [False, True])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize(
    ("pre_rounding", "post_rounding"), [("floor", "half_up"), ("half_up", "half_even"), ("floor", "half_even")]
)
@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_rescale(dtype: str, pre_rounding: str, post_rounding: str, average: bool, high_precision: bool) -> None:
    average_rounding = "floor" if pre_rounding == "half_up" else "half_up"
    fields = {"pre_rounding": pre_rounding, "average_pre_rounding": average_rounding, "post_rounding": post_rounding}
    fields |= {"high_precision": high_precision}
    target = TARGET.with_fields({f"rescale.{name}": value for name, value in fields.items()})
    rng = np.random.default_rng(0)
    magnitude = 2 ** rng.integers(0, 32, 400)
    v = np.concatenate([rng.integers(-magnitude, magnitude), [2**31 - 1, -(2**31), 32767, 32768, -32768, -32769, 0]])
    mantissa, pre, post = rng.integers(16384, 32768, v.size), rng.integers(0, 32, v.size), rng.integers(0, 32, v.size)
    post[::7], pre[::5], pre[-7:] = 0, 0, 0

    def one(v: int, mantissa: int, pre: int, post: int) -> int:
        if high_precision:
            return clamp(rounded(Fraction(v * mantissa, 2 ** (pre + post)), post_rounding), dtype)
        shifted = rounded(Fraction(v, 2**pre), average_rounding if average else pre_rounding)
        return clamp(rounded(Fraction(clamp(shifted, "int16") * mantissa, 2**post), post_rounding), dtype)

    expected = [one(*map(int, row)) for row in zip(v, mantissa, pre, post, strict=True)]
    np.testing.assert_array_equal(reference.rescale(v, mantissa, pre, post, dtype, target, average), expected)


def test_a_high_precision_term_saturates_in_int32() -> None:
    target = TARGET.with_fields({"rescale.high_precision": True})
    terms = reference.rescale_unsaturated([2**31 - 1, -(2**31)], 32767, 0, 0, target)
    np.testing.assert_array_equal(terms, [2**31 - 1, -(2**31)])


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("narrow", [False, True])
def test_rescale_constants_are_the_nearest_mantissa(bits: int, narrow: bool) -> None:
    rng = np.random.default_rng(1)
    for exponent in rng.uniform(-30, 14, 300):
        ratio = exact(2.0**exponent) * exact(rng.uniform(0.5, 2)) / exact(rng.uniform(0.5, 2))
        mantissa, pre, post = reference.rescale_constants(ratio, bits, narrow, TARGET)
        assert 16384 <= mantissa <= 32767
        assert pre == 0 or not narrow
        assert pre == 0 or post == 29 - (bits - 1)  # the pre-shift takes only what the post-shift may not
        if pre + post < 31:  # beyond, the shifts are clipped
            step = Fraction(1, 2 ** (pre + post))
            assert abs(mantissa * step - ratio) <= (step / 2 if mantissa < 32767 else step)


@pytest.mark.parametrize(
    ("ratio", "bits", "narrow", "expected"),
    [
        (Fraction(1), 8, False, (16384, 0, 14)),  # the identity
        (Fraction(1), 16, False, (16384, 0, 14)),
        (Fraction(1, 2), 16, False, (16384, 1, 14)),
        (Fraction(1, 2), 16, True, (16384, 0, 15)),
        (Fraction(1, 2**9), 8, False, (16384, 1, 22)),
        (Fraction(65535, 65536), 8, False, (32767, 0, 15)),  # would round to 2^15
        (Fraction(10**9), 8, False, (32767, 0, 0)),  # clamped to 32767
        (Fraction(1, 2**60), 8, False, (16384, 31, 31)),  # clipped shifts
        (Fraction(0), 8, False, (0, 0, 15)),
    ],
)
def test_rescale_constants_at_the_edges(ratio: Fraction, bits: int, narrow: bool, expected: tuple) -> None:
    assert reference.rescale_constants(ratio, bits, narrow, TARGET) == expected


@pytest.mark.parametrize(("dtype", "bound", "high_precision_bound"), [("int8", 0.51, 0.51), ("int16", 2.9, 1.5)])
def test_the_error_of_a_rescale(dtype: str, bound: float, high_precision_bound: float) -> None:
    """In LSB, against v * ratio. v runs far beyond what the output can hold: the inner saturation loses nothing.

    A mantissa is up to 2^-15 of its value off the ratio, which is one LSB at the end of the int16 range: with the half
    LSB of the last rounding, 1.5. Against v * mantissa * 2^-total the high-precision form is within 0.5 everywhere.
    """
    rng = np.random.default_rng(2)
    for exponent in rng.uniform(-20, 2, 60):
        ratio = exact(2.0**exponent)
        row = reference.rescale_constants(ratio, int(dtype.removeprefix("int")), narrow=False, target=TARGET)
        reach = min(2**31 - 1, int(4 * LIMIT[dtype] / ratio))
        v = rng.integers(-reach, reach, 300)
        expected = np.clip(v * float(ratio), -LIMIT[dtype] - 1, LIMIT[dtype])
        assert np.abs(reference.rescale(v, *row, dtype, TARGET) - expected).max() <= bound
        precise = TARGET.with_fields({"rescale.high_precision": True})
        assert np.abs(reference.rescale(v, *row, dtype, precise) - expected).max() <= high_precision_bound


def test_sumin_constants() -> None:
    rng = np.random.default_rng(3)
    for exponent in rng.uniform(-40, 20, 300):
        ratio = exact(2.0**exponent)
        fitting = [k for k in range(32) if rounded(ratio * 2**k, "half_up") <= 32767]
        expected = (rounded(ratio * 2 ** fitting[-1], "half_up"), fitting[-1]) if fitting else (32767, 0)
        assert reference.sumin_constants(ratio, TARGET) == expected
    assert reference.sumin_constants(Fraction(1), TARGET) == (16384, 14)
    assert reference.sumin_constants(Fraction(40000), TARGET) == (32767, 0)


def test_add_constants() -> None:
    rng = np.random.default_rng(4)
    for exponent in rng.uniform(0, 12, 200):
        s_b = exact(rng.uniform(0.001, 1))
        s_a = s_b * exact(2.0**exponent)
        for bits, max_shift in ((16, 15), (8, 23)):
            shift = min(max_shift, (32767 * s_a // s_b).__index__().bit_length() - 1)
            expected = (shift, rounded(s_b * 2**shift / s_a, "half_up"))
            assert reference.add_constants(s_a, s_b, bits, TARGET) == expected
            assert expected[1] <= 32767
    assert reference.add_constants(Fraction(1), Fraction(1), 8, TARGET) == (14, 16384)
    with pytest.raises(ValueError, match="larger"):
        reference.add_constants(Fraction(1), Fraction(2), 8, TARGET)


def test_quantize() -> None:
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 127.6, -200.0, np.inf, -np.inf], np.float32)
    np.testing.assert_array_equal(
        reference.quantize(x, 1.0, "int8", "half_even"), [0, 2, 2, 0, -2, 127, -128, 127, -128]
    )
    half_up = reference.quantize(x, 1.0, "int8", "half_up")
    np.testing.assert_array_equal(half_up, [1, 2, 3, 0, -1, 127, -128, 127, -128])
    below_half = np.nextafter(np.float32(0.5), np.float32(0))  # adding 1/2 in float32 would give 1
    assert reference.quantize(below_half, 1.0, "int8", "half_up") == 0
    assert reference.quantize(3e38, 1e-7, "int16", "half_even") == 32767
    assert reference.quantize(2.0**31, 1.0, "int32", "half_even") == 2**31 - 1
    with pytest.raises(InputError, match="NaN"):
        reference.quantize(np.nan, 1.0, "int8", "half_even")


def test_quantize_divides_in_float32() -> None:
    """A case where the double quotient is below a tie, and the float32 quotient is the tie."""
    rng = np.random.default_rng(5)
    scale = rng.uniform(0.001, 1, 200_000).astype(np.float32)
    x = ((rng.integers(-100, 100, scale.size) + 0.5) * scale).astype(np.float32)
    expected = np.rint(x / scale)
    assert (expected != np.rint(x.astype(np.float64) / scale)).any()
    np.testing.assert_array_equal(reference.quantize(x, scale, "int8", "half_even"), expected)


def test_observer_scale() -> None:
    assert reference.observer_scale(-1.0, 0.5, "int8") == np.float32(1 / 127.5)
    assert reference.observer_scale(-1.0, 2.0, "int16") == np.float32(2 / 32767.5)
    assert reference.observer_scale(3.0, 4.0, "int8") == np.float32(4) / np.float32(127.5)
    assert reference.observer_scale(0.0, 0.0, "int8") == np.float32(2**-23)


def test_bias_constant() -> None:
    assert [reference.bias_constant(Fraction(b), Fraction(2), TARGET) for b in (1, 3, 5, -1, -3)] == [0, 2, 2, 0, -2]
    assert reference.bias_constant(Fraction(10**12), Fraction(1), TARGET) == 2**31 - 1


def test_dequantize_is_a_float32_product() -> None:
    real = reference.dequantize(np.array([[3, -5]]), np.array([0.1, 0.25], np.float32))
    assert real.dtype == np.float32
    np.testing.assert_array_equal(real, np.array([[np.float32(3) * np.float32(0.1), -1.25]], np.float32))
