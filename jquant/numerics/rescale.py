"""From an accumulator to int8 or int16: section 3 of the specification, exact and without x64.

A ratio of float32 scales is a ratio of integers of at most 48 bits. Long division gives its leading 16 bits and its
exponent, so that the same mantissas come out inside jit and outside.
"""

from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jquant.numerics import limbs, pairs
from jquant.numerics.limbs import Limbs
from jquant.numerics.namespace import array_namespace, bits_of, repeat, traced_once
from jquant.numerics.pairs import Pair
from jquant.numerics.rounding import goes_up, saturate, shift_right
from jquant.types import Array, RescaleFormat, Target, bit_width

_PART = 26  # bits of the lower part of a 52-bit number in two int32 words
_PART_MASK = (1 << _PART) - 1
_LARGEST = np.int32(2**31 - 1)


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
    pattern = bits_of(scale)
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
    where = array_namespace(condition).where
    return where(condition, a[0], b[0]), where(condition, a[1], b[1])


def _subtract(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    low = a[1] - b[1]
    return a[0] - b[0] + (low >> 31), low & _PART_MASK  # the sign of low is the borrow


Division = tuple[tuple[Array, Array], tuple[Array, Array], Array]  # numerator, denominator in two words, exponent


def _division(n1: Array, n2: Array, d1: Array, d2: Array) -> Division:
    """(n1 * n2) / (d1 * d2) as numerator / denominator * 2^exponent, the quotient of the first two in [1/2, 1)."""
    xp = array_namespace(n1, n2, d1, d2)
    (mn1, en1), (mn2, en2), (md1, ed1), (md2, ed2) = _split(n1), _split(n2), _split(d1), _split(d2)
    numerator, denominator = _product(mn1, mn2), _product(md1, md2)
    exponent = en1 + en2 - ed1 - ed2
    # Mantissa products lie in [2^46, 2^48): bring numerator / denominator from (1/4, 4) into [1/2, 1).
    small = ~_at_least(_double(*numerator), denominator)
    numerator = _choose(small, _double(*numerator), numerator)
    exponent = xp.where(small, exponent - 1, exponent)
    for _ in range(2):
        large = _at_least(numerator, denominator)
        denominator = _choose(large, _double(*denominator), denominator)
        exponent = xp.where(large, exponent + 1, exponent)
    return numerator, denominator, exponent


def _next_bits(remainder: tuple[Array, Array], denominator: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
    """The next 16 bits of remainder / denominator, which is below 1, and what remains after them."""
    xp = array_namespace(*remainder)
    if xp is np:
        return _next_bits_on_host(remainder, denominator)

    def step(_: int, state: tuple) -> tuple:
        remainder, bits = state
        remainder = _double(*remainder)
        fits = _at_least(remainder, denominator)
        return _choose(fits, _subtract(remainder, denominator), remainder), xp.where(fits, (bits << 1) + 1, bits << 1)

    found: tuple[tuple[Array, Array], Array] = repeat(16, step, (remainder, xp.zeros_like(remainder[0])))
    return found


def _next_bits_on_host(
    remainder: tuple[Array, Array], denominator: tuple[Array, Array]
) -> tuple[tuple[Array, Array], Array]:
    """The same in int64, which numpy has: both are below 2^50, so that 8 bits more fit."""
    left, by = ((np.asarray(high, np.int64) << _PART) | low for high, low in (remainder, denominator))
    bits = np.zeros_like(left)
    for _ in range(2):
        quotient, left = np.divmod(left << 8, by)
        bits = (bits << 8) | quotient
    high, low, found = (part.astype(np.int32) for part in (left >> _PART, left & _PART_MASK, bits))
    return (high, low), found  # type: ignore[return-value]


def _together(*numbers: Array) -> list[Array]:
    xp = array_namespace(*numbers)
    found: list[Array] = xp.broadcast_arrays(*(xp.asarray(v, np.float32) for v in numbers))
    return found


def ratio(n1: Any, n2: Any, d1: Any, d2: Any) -> Ratio:
    """(n1 * n2) / (d1 * d2) of positive normal float32 arrays, exactly; integers below 2^24 are such numbers.

    Those of host arrays are kept: a fit lowers a node for thousands of marches, whose scales are the same.
    """
    numbers = n1, n2, d1, d2
    if array_namespace(*numbers) is not np:
        return _ratio(*numbers)
    arrays = [np.asarray(number, np.float32) for number in numbers]
    return _kept_ratio(tuple((array.tobytes(), array.shape) for array in arrays))


@lru_cache(maxsize=4096)
def _kept_ratio(numbers: tuple[tuple[bytes, tuple[int, ...]], ...]) -> Ratio:
    arrays: Any = [np.frombuffer(data, np.float32).reshape(shape) for data, shape in numbers]
    return _ratio(*arrays)


@traced_once
def _ratio(n1: Array, n2: Array, d1: Array, d2: Array) -> Ratio:
    numerator, denominator, exponent = _division(*_together(n1, n2, d1, d2))
    remainder, bits = _next_bits(numerator, denominator)
    return Ratio(bits, exponent, (remainder[0] == 0) & (remainder[1] == 0))


@partial(traced_once, static_argnames=("rounding",))
def quantize_exactly(x: Array, d1: Array, d2: Array, *, rounding: str) -> Array:
    """sat_32(round(x / (d1 * d2))) of the exact quotient: the bias of section 4 of the specification.

    Args:
      x: real, float32.
      d1, d2: positive normal float32 numbers whose product is a step, in real per LSB; broadcastable to x.
      rounding: one of `ROUNDINGS`.

    Returns:
      int32, in LSB. A subnormal x is 0, as it is less than half of any step.
    """
    xp = array_namespace(x, d1, d2)
    x, d1, d2 = _together(x, d1, d2)
    tiny = abs(x) < np.float32(2.0**-126)
    numerator, denominator, exponent = _division(xp.where(tiny, np.float32(1), abs(x)), xp.ones_like(x), d1, d2)
    remainder, high = _next_bits(numerator, denominator)
    remainder, low = _next_bits(remainder, denominator)
    more = (remainder[0] != 0) | (remainder[1] != 0)
    # 32 bits, of which the last one is kept apart so that the others fit: (31 bits + last / 2) * 2^(exponent - 31).
    leading, last, drop = (high << 15) | (low >> 1), low & 1, xp.clip(31 - exponent, 0, 31)
    whole = leading >> drop
    half = xp.where(drop > 0, (leading >> xp.maximum(drop - 1, 0)) & 1, last)
    below = leading & ((np.int32(1) << xp.maximum(drop - 1, 0)) - 1)
    small, large = exponent < 0, exponent > 31  # below 1/2; 2^31 or more
    more = more | ((drop > 0) & ((below != 0) | (last != 0))) | small
    up = goes_up(whole, (half == 1) & ~small, more, x < 0, rounding)
    magnitude = xp.where(large, _LARGEST, xp.where(small, 0, whole))
    up = xp.where(large, np.int32(1), up)
    positive = xp.where(magnitude == _LARGEST, magnitude, magnitude + up)
    return xp.where(tiny, 0, xp.where(x < 0, -magnitude - up, positive)).astype(np.int32)


@partial(traced_once, static_argnames=("bits", "narrow", "form"))
def rescale_of(value: Ratio, *, bits: int, form: RescaleFormat, narrow: bool = False) -> Rescale:
    """Mantissa and shifts for an output of `bits` bits; `narrow`: the input is int8 or int16, with no pre-shift."""
    xp = array_namespace(*value)
    value = _clamped(value, form.ratio_bits)
    largest, drop = 2**form.mantissa_bits - 1, 16 - form.mantissa_bits
    mantissa = _rounded(value.bits, drop, value.exact, form.mantissa_rounding)
    total = form.mantissa_bits - value.exponent
    if form.mantissa_overflow == "renormalize":
        total = xp.where(mantissa > largest, total - 1, total)
        mantissa = xp.where(mantissa > largest, (largest + 1) >> 1, mantissa)
    mantissa = xp.minimum(mantissa, largest)
    pre = xp.zeros_like(total) if narrow else xp.clip(total - form.post_shift(bits), 0, form.max_pre_shift)
    # A shift that both clips cannot hold (ratios below 2^-38 or so) leaves nothing of an int32 either way. High
    # precision uses their sum, of at most 62 bits.
    return Rescale(mantissa, pre, xp.clip(total - pre, 0, form.max_post_shift))


def _clamped(value: Ratio, bits: int) -> Ratio:
    """The ratio, or 2^bits - 1 where it is larger."""
    xp = array_namespace(*value)
    most = np.int32((2**bits - 1) << (16 - bits))
    over = (value.exponent == bits) & ((value.bits > most) | ((value.bits == most) & ~value.exact))
    over = over | (value.exponent > bits)
    exponent = xp.where(over, np.int32(bits), value.exponent)
    return Ratio(xp.where(over, most, value.bits), exponent, value.exact | over)


def _rounded(bits: Array, drop: Array | int, exact: Array, rounding: str) -> Array:
    """bits / 2^drop as an integer, for 1 <= drop <= 17; `exact`: nothing of the number lies below `bits`."""
    whole, half = bits >> drop, (bits >> (drop - 1)) & 1
    below = (bits & ((1 << (drop - 1)) - 1)) != 0
    return whole + goes_up(whole, half == 1, below | ~exact, False, rounding)


@partial(traced_once, static_argnames=("bits", "rounding", "exact_bound"))
def multiplier_of(
    value: Ratio, max_shift: int | Array, *, bits: int, rounding: str, exact_bound: bool = False
) -> tuple[Array, Array]:
    """(factor, shift) with factor = round(r * 2^shift) below 2^bits, for the largest shift in [0, max_shift].

    The bound is on the rounded factor (the sumin rule); `exact_bound` puts it on r * 2^shift itself (the add rule).
    """
    xp = array_namespace(*value, max_shift)
    largest = 2**bits - 1
    if exact_bound:
        most = largest << (16 - bits)
        over = ~((value.bits < most) | ((value.bits == most) & value.exact))
    else:
        over = _rounded(value.bits, 16 - bits, value.exact, rounding) > largest
    shift = xp.clip(xp.where(over, np.int32(bits - 1), np.int32(bits)) - value.exponent, 0, max_shift)
    kept = xp.clip(value.exponent + shift, -1, bits)  # bits of the factor before its rounding bit
    factor = _rounded(value.bits, 16 - kept, value.exact, rounding)
    return xp.where(value.exponent > bits, largest, xp.minimum(factor, largest)), shift


def rescale(v: Array | Limbs | Pair, by: Rescale, dtype: str, target: Target, *, average: bool = False) -> Array:
    """An accumulator in acc to an integer of `dtype`: y = sat(rsh(sat_inner(v >> pre) * mantissa, post))."""
    return saturate(rescale_unsaturated(v, by, target, bits=bit_width(dtype), average=average), dtype)


def rescale_unsaturated(
    v: Array | Limbs | Pair, by: Rescale, target: Target, *, bits: int, average: bool = False
) -> Array:
    """`rescale` before the last saturation, int32; a product beyond 32 bits is shifted and saturated to int32."""
    form = target.rescale
    pre_rounding = form.average_pre_rounding if average else form.pre_rounding
    if form.high_precision:
        v = pairs.to_limbs(v) if isinstance(v, Pair) else v
        wide = v if isinstance(v, Limbs) else limbs.from_int32(v.astype(jnp.int32))
        return _shifted_product(wide, by.mantissa, by.pre + by.post, form.post_rounding)
    low, high = -(2 ** (form.inner_bits - 1)), 2 ** (form.inner_bits - 1) - 1
    if isinstance(v, Limbs):
        head = limbs.clip(limbs.shift_right(v, by.pre, pre_rounding), low, high)
    elif isinstance(v, Pair):
        head = jnp.clip(pairs.shift_right(v, by.pre, pre_rounding), low, high)
    else:
        head = jnp.clip(shift_right(v.astype(jnp.int32), by.pre, pre_rounding), low, high)
    if leaves_int32(form):
        return _shifted_product(limbs.from_int32(head), by.mantissa, by.post, form.post_rounding)
    return shift_right(head * by.mantissa, by.post, form.post_rounding)


def leaves_int32(form: RescaleFormat) -> bool:
    """Whether a rescaled value before its last saturation can be beyond +-2^30."""
    return form.high_precision or form.inner_bits + form.mantissa_bits > 31


def _shifted_product(v: Limbs, mantissa: Array, shift: Array, rounding: str) -> Array:
    return limbs.saturate(limbs.shift_right(limbs.multiply(v, mantissa), shift, rounding), "int32")
