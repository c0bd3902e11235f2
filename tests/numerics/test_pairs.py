"""Sums of two int32 that are not taken: shifted and saturated as Python's integers are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.numerics import limbs, pairs
from jquant.numerics.pairs import Pair

EDGES = [0, 1, -1, 2, -2, 3, 2**15, -(2**15), 2**30 - 1, 2**30, -(2**30), -(2**30) - 1, 2**31 - 1, 2**31 - 2, -(2**31)]


def terms() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    edges = np.array([(a, b) for a in EDGES for b in EDGES])
    drawn = rng.integers(-(2**31), 2**31, (4000, 2)) >> rng.integers(0, 31, (4000, 1))
    both = np.concatenate([edges, drawn])
    return both[:, 0], both[:, 1]


def pair(a: np.ndarray, b: np.ndarray) -> Pair:
    return Pair(jnp.asarray(a, jnp.int32), jnp.asarray(b, jnp.int32))


def clipped(v: np.ndarray) -> np.ndarray:
    return np.clip(v, -(2**31), 2**31 - 1)


def test_saturation() -> None:
    a, b = terms()
    np.testing.assert_array_equal(jax.jit(pairs.saturate)(pair(a, b)), clipped(a + b))
    assert (np.abs(a + b) > 2**31).any()


@pytest.mark.parametrize("rounding", ["floor", "half_up"])
def test_every_shift(rounding: str) -> None:
    a, b = terms()
    total, shift = a + b, jax.jit(pairs.shift_right, static_argnums=2)
    for n in range(32):
        wanted = (total + (1 << n >> 1 if rounding == "half_up" else 0)) >> n
        np.testing.assert_array_equal(shift(pair(a, b), n, rounding), clipped(wanted), err_msg=f"n = {n}")
    mixed = np.arange(len(a)) % 32  # as many shifts as elements
    wanted = (total + ((1 << mixed) >> 1 if rounding == "half_up" else 0)) >> mixed
    np.testing.assert_array_equal(shift(pair(a, b), jnp.asarray(mixed, jnp.int32), rounding), clipped(wanted))


def test_as_limbs() -> None:
    a, b = terms()
    wide = jax.tree.map(np.int64, pairs.to_limbs(pair(a, b)))
    np.testing.assert_array_equal(wide.low + (wide.middle << 16) + (wide.high << 32), a + b)
    np.testing.assert_array_equal(limbs.saturate(pairs.to_limbs(pair(a, b)), "int32"), clipped(a + b))


def test_an_unknown_rounding_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown rounding 'half_odd'; known: half_up, half_even, half_away, floor"):
        pairs.shift_right(pair(np.array([1]), np.array([2])), 1, "half_odd")
