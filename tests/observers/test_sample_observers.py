"""Observers that see samples apart: against float64 and fractions, and the same bits whatever the size of batches."""

import doctest
import functools
import sys
from fractions import Fraction

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.observers import mean_of_maxima, min_max, nmse
from jquant.types import QuantSpec, integer_range

BOTH = pytest.mark.parametrize("observer", [mean_of_maxima(), nmse()], ids=lambda o: o.name)
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
samples = hnp.arrays(np.float32, (2, 6, 5), elements=finite | st.floats(-4, 4, width=32))


@functools.partial(jax.jit, static_argnums=0)
def update(observer, state, batch):
    return observer.update(state, batch)


def observe(observer, *batches):
    state = observer.init(batches[0].shape[0])
    for batch in batches:
        state = update(observer, state, jnp.asarray(batch))
    return state


def scale(observer, state, dtype):
    return np.asarray(observer.finalize(state, QuantSpec(dtype=dtype)))


def assert_same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def data(seed=0, channels=2, count=24, entries=300):
    """Samples whose ranges lie up to nine octaves apart."""
    rng = np.random.default_rng(seed)
    reach = 2.0 ** rng.uniform(-9, 0, (channels, count, 1))
    return np.float32(rng.normal(size=(channels, count, entries)) * reach)


@BOTH
@hypothesis.settings(max_examples=20)
@hypothesis.given(x=samples, seed=st.integers(0, 2**16))
def test_order_and_the_size_of_batches_do_not_matter(observer, x, seed):
    order = np.random.default_rng(seed).permutation(6)
    whole = observe(observer, x)
    parts = np.split(x[:, order], 3, axis=1)
    assert_same(whole, observe(observer, *parts))
    one, two, three = (observe(observer, part) for part in parts)
    merge = observer.merge
    assert_same(whole, merge(merge(one, two), three))
    assert_same(whole, merge(three, merge(two, one)))
    assert_same(whole, merge(observer.init(2), whole))


@pytest.mark.parametrize("dtype", ["int4", "int8", "int16", "uint8"])
def test_the_mean_of_maxima(dtype):
    x, observer = data(), mean_of_maxima()
    low, high = integer_range(dtype)
    peaks = np.abs(x).max(2) if low else np.maximum(x.max(2), 0)
    want = [float(sum(map(Fraction, map(float, row))) / len(row)) for row in peaks]
    want = np.array(want) / ((high - low) / 2 if low else high)
    np.testing.assert_allclose(scale(observer, observe(observer, x), dtype), want, rtol=2.0**-20)
    one = observe(observer, x[:, :1])  # of one sample it is the largest value, bit for bit
    np.testing.assert_array_equal(scale(observer, one, dtype), scale(min_max(), observe(min_max(), x[:, 0]), dtype))


def test_a_sum_of_maxima_beyond_24_bits_is_exact():
    observer = mean_of_maxima()
    x = np.full((1, 3000, 1), 1.0 + 2.0**-23, np.float32)
    x[:, ::3] = 2.0**-20
    state = observe(observer, x)
    exact = 2000 * (1 + Fraction(1, 2**23)) + 1000 * Fraction(1, 2**20)
    sums = np.asarray(state.lower[0, 1]).astype(object) + np.asarray(state.upper[0, 1]).astype(object) * 2**20
    weights = [1, 2**8, 2**16]
    found = sum(
        Fraction(int(n) * w) * Fraction(2) ** (field - 150)
        for field, row in enumerate(sums)
        for n, w in zip(row, weights, strict=True)
    )
    assert found == exact
    assert np.asarray(state.samples).tolist() == [3000, 0]


def normalized_error(x, limit, dtype):
    """The mean over samples of sum (x_hat - x)^2 / max |x|^2, in float64; max |x| within 1/128 of the largest."""
    low, high = integer_range(dtype)
    step = limit / ((high - low) / 2 if low else high)
    error = np.clip(np.rint(x / step), low, high) * step - x
    peak = np.abs(x).max(1)
    unit = 2.0 ** np.maximum(np.ceil(np.log2(peak)), np.ceil(np.log2(peak.max())) - 7)
    return np.mean(np.sum(error**2, axis=1) / unit**2)


@pytest.mark.parametrize("dtype", ["int2", "int4", "int8", "uint8"])
def test_the_smallest_normalized_error_is_taken(dtype):
    x, observer = data(seed=1), nmse()
    found = scale(observer, observe(observer, x), dtype)
    low, high = integer_range(dtype)
    steps = (high - low) / 2 if low else high
    for channel, own in enumerate(np.float64(x)):
        widest = np.abs(own).max() if low else own.max()
        tried = [normalized_error(own, widest * 2 ** (-k / 16), dtype) for k in range(112)]
        got = normalized_error(own, found[channel] * steps, dtype)
        # Entries are taken at the centres of bins: at most 1/512 of a sample's reach away, and half of that on average.
        assert got <= min(tried) * 1.05


def test_a_sample_of_unusual_range_does_not_decide():
    ramp = np.linspace(-1, 1, 1001, dtype=np.float32)
    usual = np.stack([ramp] * 20)[None]
    rare = np.concatenate([usual, 30 * ramp[None, None]], axis=1)
    alone, together = (float(scale(nmse(), observe(nmse(), x), "int4")[0]) for x in (usual, rare))
    assert alone * 0.9 < together < alone * 2.5
    assert scale(min_max(), observe(min_max(), rare.reshape(1, -1)), "int4") > 20 * alone


@BOTH
def test_a_state_and_a_scale_are_the_same_under_scan_and_vmap(observer):
    x = data(entries=40)
    batches = np.split(x, 4, axis=1)
    state = observe(observer, *batches)
    assert_same(
        state, jax.lax.scan(lambda s, b: (observer.update(s, b), None), observer.init(2), jnp.asarray(batches))[0]
    )
    together = scale(observer, state, "int8")
    jitted = jax.jit(observer.finalize, static_argnums=1)(state, QuantSpec(dtype="int8"))
    np.testing.assert_array_equal(jitted, together)
    alone = [scale(observer, observe(observer, x[i : i + 1]), "int8") for i in range(2)]
    np.testing.assert_array_equal(np.concatenate(alone), together)


@BOTH
def test_zeros_and_what_is_not_finite(observer):
    zeros = scale(observer, observe(observer, np.zeros((2, 3, 4), np.float32)), "int8")
    np.testing.assert_array_equal(zeros, np.float32(2.0**-23))
    for bad in (np.nan, np.inf):
        x = np.ones((2, 3, 4), np.float32)
        x[0, 1, 2] = bad
        assert np.isfinite(scale(observer, observe(observer, x), "int8")).tolist() == [False, True]


@pytest.mark.parametrize("module", ["maxima", "normalized"])
def test_examples(module):
    done = doctest.testmod(sys.modules[f"jquant.observers.{module}"])
    assert done.attempted > 0
    assert done.failed == 0
