"""Limb arithmetic against Python integers: every operation is exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.numerics import limbs


def split(values: list[int]) -> limbs.Limbs:
    v = np.array(values, np.int64)
    return limbs.Limbs(*(jnp.asarray(a, jnp.int32) for a in (v & 0xFFFF, (v >> 16) & 0xFFFF, v >> 32)))


def join(a: limbs.Limbs) -> np.ndarray:
    low, middle, high = (np.asarray(v).astype(np.int64) for v in a)
    assert ((low >= 0) & (low < 2**16) & (middle >= 0) & (middle < 2**16)).all()
    return (high << 32) + (middle << 16) + low


def values(bits: int) -> list[int]:
    """Edges and random numbers in (-2^bits, 2^bits)."""
    rng = np.random.default_rng(bits)
    found = {0, 2**bits - 1}
    found |= {2**k + d for k in range(bits) for d in (-1, 0, 1)}
    found |= {int(rng.integers(2**k)) for k in range(1, bits) for _ in range(5)}
    found |= {(int(rng.integers(2**20)) << k) % 2**bits for k in range(bits)}  # many low zeros: ties
    return sorted(found | {-v for v in found})


def test_from_int32_round_trips() -> None:
    v = np.array([*values(31), -(2**31)], np.int32)
    np.testing.assert_array_equal(join(limbs.from_int32(jnp.asarray(v))), v)


def test_addition() -> None:
    a = values(48)
    b = a[::-1][7:] + a[:7]
    np.testing.assert_array_equal(join(limbs.add(split(a), split(b))), [x + y for x, y in zip(a, b, strict=True)])


@pytest.mark.parametrize("m", [0, 1, 2, 256, 16384, 32308, 32767])
def test_multiplication(m: int) -> None:
    a = values(48)
    np.testing.assert_array_equal(join(jax.jit(limbs.multiply)(split(a), jnp.int32(m))), [x * m for x in a])


def rounded(v: int, n: int, rounding: str) -> int:
    quotient, remainder = v >> n, v - ((v >> n) << n)
    if rounding == "toward_zero":
        return quotient + int(v < 0 and remainder > 0)
    if rounding == "floor" or 2 * remainder < 2**n:
        return quotient
    if 2 * remainder > 2**n or rounding == "half_up":
        return quotient + 1
    return quotient + (quotient % 2 if rounding == "half_even" else int(v > 0))


@pytest.mark.parametrize("rounding", ["floor", "half_up", "half_even", "half_away", "toward_zero"])
def test_right_shift_by_every_shift(rounding: str) -> None:
    a = values(62)
    shift = jax.jit(limbs.shift_right, static_argnames="rounding")
    for n in range(64):
        np.testing.assert_array_equal(
            join(shift(split(a), jnp.int32(n), rounding)), [rounded(v, n, rounding) for v in a], err_msg=str(n)
        )


def test_left_shift_is_modulo_two_to_the_64() -> None:
    a = values(47)
    for n in range(64):
        want = [((v << n) + 2**63) % 2**64 - 2**63 for v in a]
        np.testing.assert_array_equal(join(limbs.shift_left(split(a), jnp.int32(n))), want, err_msg=str(n))


@pytest.mark.parametrize(("dtype", "bits"), [("int8", 8), ("int16", 16), ("int32", 32)])
def test_saturation(dtype: str, bits: int) -> None:
    a = values(62)
    want = [min(max(v, -(2 ** (bits - 1))), 2 ** (bits - 1) - 1) for v in a]
    np.testing.assert_array_equal(limbs.saturate(split(a), dtype), want)
