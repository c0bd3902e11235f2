"""Ratios, mantissas, shifts and rounding against exact rationals and Python integers, eagerly and inside jit."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jquant as jq
from jquant import reference
from jquant.numerics import rescale as fast
from jquant.numerics.limbs import Limbs
from jquant.numerics.rounding import divide, quantize, shift_right, snap_to_pow2

NASH = jq.targets.NASH_E
ROUNDINGS = [
    (pre, average, post)
    for pre in ("floor", "half_up")
    for average in ("floor", "half_up")
    for post in ("half_up", "half_even")
]


def target(pre: str, average: str, post: str, high_precision: bool = False) -> jq.Target:
    fields = {"pre_rounding": pre, "average_pre_rounding": average, "post_rounding": post}
    fields |= {"high_precision": high_precision}
    return NASH.with_fields({f"rescale.{name}": value for name, value in fields.items()})


MULTIPLIER = {"bits": 15, "rounding": "half_up"}


def draw_scales(seed: int, count: int, low: int = -23, high: int = 8) -> np.ndarray:
    """[4, count] float32 scales with uniform exponents; an eighth are powers of two, an eighth next to one."""
    rng = np.random.default_rng(seed)
    mantissa = rng.integers(2**23, 2**24, (4, count))
    kind = rng.integers(0, 16, (4, count))
    mantissa = np.where(kind < 2, 2**23, np.where(kind == 2, 2**24 - 1, np.where(kind == 3, 2**23 + 1, mantissa)))
    return np.ldexp(mantissa.astype(np.float64), rng.integers(low, high, (4, count)) - 23).astype(np.float32)


def exact(v: np.ndarray) -> Fraction:
    return Fraction(float(v))


scales = st.floats(2.0**-23, 2.0**8, width=32)


@settings(max_examples=300)
@given(st.tuples(scales, scales, scales, scales))
def test_rescale_constants_of_drawn_scales(drawn: tuple) -> None:
    n1, n2, d1, d2 = map(Fraction, drawn)
    value = fast.ratio(*(jnp.float32(v) for v in drawn))
    for bits, narrow in ((8, False), (16, False), (8, True), (16, True)):
        got = tuple(int(v) for v in fast.rescale_of(value, bits=bits, narrow=narrow, form=NASH.rescale))
        assert got == reference.rescale_constants(n1 * n2 / (d1 * d2), bits, narrow, NASH)


def test_constants_of_two_thousand_scales_equal_the_rationals() -> None:
    drawn = draw_scales(0, 2000)
    drawn[1, :700], drawn[3, :700] = 1, 1  # one scale over another, so that more quotients are exact
    drawn[0, :100] = drawn[2, :100] * np.exp2(np.arange(100) % 40 - 20).astype(np.float32)
    value = fast.ratio(*drawn)
    ratios = [exact(a) * exact(b) / (exact(c) * exact(d)) for a, b, c, d in drawn.T]
    for bits in (8, 16):
        for narrow in (False, True):
            got = np.stack(fast.rescale_of(value, bits=bits, narrow=narrow, form=NASH.rescale), axis=1)
            np.testing.assert_array_equal(got, [reference.rescale_constants(r, bits, narrow, NASH) for r in ratios])
    got = np.stack(fast.multiplier_of(value, 31, **MULTIPLIER), axis=1)
    np.testing.assert_array_equal(got, [reference.sumin_constants(r, NASH) for r in ratios])
    large, small = np.maximum(drawn[0], drawn[2]), np.minimum(drawn[0], drawn[2])
    for bits, max_shift in ((8, 23), (16, 15)):
        factor, shift = fast.multiplier_of(
            fast.ratio(small, 1.0, large, 1.0), max_shift, exact_bound=True, **MULTIPLIER
        )
        want = [reference.add_constants(exact(a), exact(b), bits, NASH) for a, b in zip(large, small, strict=True)]
        np.testing.assert_array_equal(np.stack([shift, factor], axis=1), want)


def test_add_and_sumin_bounds_next_to_their_limits() -> None:
    """Ratios around 32767 / 2^k and 32767.5 / 2^k, where the two bounds give different shifts."""
    limits = [Fraction(32767), Fraction(65535, 2), Fraction(32768)]
    near = [np.float32(float(v / 2**k)) for v in limits for k in range(16, 24)]
    near = np.array(
        [w for v in near for w in (np.nextafter(v, np.float32(0)), v, np.nextafter(v, np.float32(9)))], np.float32
    )
    value = fast.ratio(near, 1.0, 1.0, 1.0)
    np.testing.assert_array_equal(
        np.stack(fast.multiplier_of(value, 31, **MULTIPLIER), 1),
        [reference.sumin_constants(exact(v), NASH) for v in near],
    )
    factor, shift = fast.multiplier_of(value, 23, exact_bound=True, **MULTIPLIER)
    np.testing.assert_array_equal(
        np.stack([shift, factor], 1), [reference.add_constants(Fraction(1), exact(v), 8, NASH) for v in near]
    )


def test_a_million_mantissas_equal_integer_arithmetic() -> None:
    """Python integers in object arrays: exact, and written from the formula, not from long division."""
    drawn = draw_scales(1, 1_000_000)
    mantissa, exponent = np.frexp(drawn.astype(np.float64))
    whole = (mantissa * 2**24).astype(np.int64)
    p, q = ((whole[i] * whole[i + 1]).astype(object) for i in (0, 2))  # 48 bits
    e = exponent[0].astype(np.int64) + exponent[1] - exponent[2] - exponent[3]
    low = 2 * p < q
    p, e = np.where(low, 2 * p, p), e - low
    for _ in range(2):
        high = p >= q
        q, e = np.where(high, 2 * q, q), e + high
    mant = np.minimum(((p * 2**16 + q) // (2 * q)).astype(np.int64), 32767)  # floor(p / q * 2^15 + 1/2)
    over = e > 15  # the ratio is clamped to 32767
    mant, total = np.where(over, 32767, mant), np.where(over, 0, 15 - e)
    eager = fast.ratio(*drawn)
    np.testing.assert_array_equal(eager.exponent, e)
    np.testing.assert_array_equal(eager.bits, (p * 2**16 // q).astype(np.int64))
    np.testing.assert_array_equal(eager.exact, (p * 2**16 % q == 0).astype(bool))
    for bits in (8, 16):
        pre = np.clip(total - (29 - (bits - 1)), 0, 31)
        got = fast.rescale_of(eager, bits=bits, form=NASH.rescale)
        inside = jax.jit(lambda *s, bits=bits: fast.rescale_of(fast.ratio(*s), bits=bits, form=NASH.rescale))(*drawn)
        for a, b, want in zip(got, inside, (mant, pre, np.clip(total - pre, 0, 31)), strict=True):
            np.testing.assert_array_equal(a, want)
            np.testing.assert_array_equal(b, want)


def test_eager_without_jit_equals_jit() -> None:
    drawn = draw_scales(2, 500)
    inside = fast.ratio(*drawn)
    with jax.disable_jit():
        outside = fast.ratio(*drawn)
        outside_by = fast.rescale_of(outside, bits=8, form=NASH.rescale)
        outside_factor = fast.multiplier_of(outside, 31, **MULTIPLIER)
    for a, b in zip(
        (*inside, *fast.rescale_of(inside, bits=8, form=NASH.rescale), *fast.multiplier_of(inside, 31, **MULTIPLIER)),
        (*outside, *outside_by, *outside_factor),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_the_golden_row() -> None:
    by = fast.rescale_of(fast.ratio(0.1, 1.0, 0.20284509658813477, 1.0), bits=8, form=NASH.rescale)
    assert tuple(int(v) for v in by) == (32308, 0, 16)


def edges() -> np.ndarray:
    powers = np.array([2**k for k in range(31)], np.int64)
    v = np.concatenate([powers, powers - 1, powers + 1, 3 * powers[:30] // 2, np.array([0, 2**31 - 1, 2**31])])
    v = np.concatenate([v, -v, np.random.default_rng(3).integers(-(2**31), 2**31, 20)])
    return np.unique(v[(v >= -(2**31)) & (v < 2**31)])


MANTISSAS = np.array([0, 1, 16384, 16385, 24577, 32308, 32766, 32767], np.int64)


@pytest.mark.parametrize("roundings", ROUNDINGS)
@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_rescale_over_edges_shifts_and_mantissas(roundings: tuple, dtype: str) -> None:
    v, mantissa, pre, post = np.ix_(
        edges(), MANTISSAS, np.r_[0:4, 7, 8, 15:18, 30, 31], np.r_[0:3, 8, 13:18, 22, 30, 31]
    )
    by = fast.Rescale(*(a.astype(np.int32) for a in (mantissa, pre, post)))
    where = target(*roundings)
    for average in (False, True):
        want = reference.rescale(v, mantissa, pre, post, dtype, target(*roundings), average)
        run = jax.jit(lambda v, by, where=where, average=average: fast.rescale(v, by, dtype, where, average=average))
        got = run(v.astype(np.int32), by)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(run(split(v), by), want)


def split(v: np.ndarray) -> Limbs:
    return Limbs(*(jnp.asarray(a, jnp.int32) for a in (v & 0xFFFF, (v >> 16) & 0xFFFF, v >> 32)))


@pytest.mark.parametrize("high_precision", [False, True])
@pytest.mark.parametrize("post_rounding", ["half_up", "half_even"])
def test_wide_accumulators_equal_int64(high_precision: bool, post_rounding: str) -> None:
    wide = np.array([2**k + d for k in (32, 35, 38) for d in (-1, 0, 1)] + [2**39 - 1, 3 * 2**31 + 2**15], np.int64)
    v, mantissa, pre, post = np.ix_(
        np.concatenate([edges()[::3], wide, -wide]), MANTISSAS, np.r_[0, 1, 7, 17, 31], np.r_[0, 1, 14, 22, 31]
    )
    where = target("half_up", "floor", post_rounding, high_precision)
    by = fast.Rescale(*(a.astype(np.int32) for a in (mantissa, pre, post)))
    for dtype in ("int8", "int16"):
        want = reference.rescale(v, mantissa, pre, post, dtype, where)
        np.testing.assert_array_equal(
            jax.jit(lambda v, by, dtype=dtype: fast.rescale(v, by, dtype, where))(split(v), by), want
        )


@pytest.mark.parametrize("rounding", ["floor", "half_up", "half_even"])
def test_shift_right_by_every_shift(rounding: str) -> None:
    v, n = np.ix_(edges(), np.arange(32))
    np.testing.assert_array_equal(
        shift_right(v.astype(np.int32), n.astype(np.int32), rounding), reference.round_shift(v, n, rounding)
    )


@pytest.mark.parametrize("rounding", ["half_even", "half_up"])
@pytest.mark.parametrize("dtype", ["int4", "int8", "int16", "int32"])
def test_quantize_equals_the_reference(rounding: str, dtype: str) -> None:
    rng = np.random.default_rng(4)
    ties = (np.arange(-600, 600) / 2).astype(np.float32)
    ends = np.float32(2.0) ** np.arange(7, 40)
    x = np.concatenate(
        [
            ties,
            np.nextafter(ties, np.float32(np.inf)),
            np.nextafter(ties, np.float32(-np.inf)),
            ends,
            -ends,
            rng.normal(size=5000).astype(np.float32) * 300,
        ]
    )
    for scale in np.float32([1.0, 0.5, 0.1, 3.0, 2.0**-23, 0.0123]):
        for values in (x, x * scale):
            got = jax.jit(lambda x, s: quantize(x, s, dtype, rounding))(values, scale)
            np.testing.assert_array_equal(got, reference.quantize(values, scale, dtype, rounding))


def test_ties_by_hand() -> None:
    x = jnp.float32([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 0.49999997])
    assert quantize(x, jnp.float32(1), "int8").tolist() == [-2, -2, 0, 0, 2, 2, 0]
    assert quantize(x, jnp.float32(1), "int8", "half_up").tolist() == [-2, -1, 0, 1, 2, 3, 0]


@pytest.mark.parametrize("scale", [np.float32(0.1), np.float32(127.5), np.float32(3), np.float32(0.007)])
def test_division_is_correctly_rounded_inside_jit(scale: np.float32) -> None:
    x = np.random.default_rng(5).normal(size=1_000_000).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(divide)(x, scale), x / scale)
    np.testing.assert_array_equal(jax.jit(lambda x: divide(x, jnp.float32(scale)))(x), x / scale)  # a constant as well


def test_snap_to_pow2_is_the_smallest_above() -> None:
    scale = np.abs(draw_scales(6, 5000)[0])
    mantissa, exponent = np.frexp(scale)
    np.testing.assert_array_equal(
        snap_to_pow2(scale), np.ldexp(np.float32(1), np.where(mantissa == 0.5, exponent - 1, exponent))
    )


@pytest.mark.parametrize(
    ("rounding", "wanted"),
    [
        ("floor", [-2, -2, -1, -1, 0, 0, 1, 1, -(2**30), 2**30 - 1]),
        ("toward_zero", [-2, -1, -1, 0, 0, 0, 1, 1, -(2**30), 2**30 - 1]),
        ("half_up", [-2, -1, -1, 0, 0, 1, 1, 2, -(2**30), 2**30]),
        ("half_even", [-2, -2, -1, 0, 0, 0, 1, 2, -(2**30), 2**30]),
        ("half_away", [-2, -2, -1, -1, 0, 1, 1, 2, -(2**30), 2**30]),
    ],
)
def test_shift_right_by_hand(rounding: str, wanted: list[int]) -> None:
    """Halves of -4 to 3, and of both ends of int32."""
    v = np.array([-4, -3, -2, -1, 0, 1, 2, 3, -(2**31), 2**31 - 1], np.int32)
    np.testing.assert_array_equal(shift_right(v, np.int32(1), rounding), wanted)
    np.testing.assert_array_equal(jax.jit(shift_right, static_argnums=2)(jnp.asarray(v), 1, rounding), wanted)
    np.testing.assert_array_equal(shift_right(v, np.int32(0), rounding), v)
