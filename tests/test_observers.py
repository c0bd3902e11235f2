"""Observers against float64 numpy, and their promise that the order of batches does not matter, bit for bit."""

import doctest
import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant import observers
from jquant.observers import min_max, moving_average, mse
from jquant.types import QConfigError, QuantSpec, integer_range

DTYPES = ["int2", "int3", "int4", "int8", "int16", "uint2", "uint3", "uint4", "uint8"]
by_dtype = pytest.mark.parametrize("dtype", DTYPES)
SMALL = mse(bins=64, candidates=20)  # small enough to draw many cases


@functools.partial(jax.jit, static_argnums=0)
def update(observer, state, batch):
    return observer.update(state, batch)


@functools.partial(jax.jit, static_argnums=0)
def merge(observer, a, b):
    return observer.merge(a, b)


def observe(observer, *batches):
    state = observer.init(batches[0].shape[0])
    for batch in batches:
        state = update(observer, state, jnp.asarray(batch))
    return state


def assert_same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(bits(x), bits(y)), a, b)


def bits(x):
    x = np.asarray(x)
    return x.view(np.int32) if x.dtype == np.float32 else x


def range_scale(low, high, dtype):
    """The rule of the specification, the division in float32."""
    qmin, qmax = integer_range(dtype)
    limit = np.maximum(np.maximum(-low if qmin else 0, high), 0).astype(np.float32)
    return np.maximum(limit / np.float32((qmax - qmin) / 2 if qmin else qmax), np.float32(2.0**-23))


def data(channels=3, samples=4000, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_t(3, (channels, samples)) * np.logspace(-4, 3, channels)[:, None]
    return np.where(rng.random(x.shape) < 0.1, 0, x).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# min_max and moving_average


@by_dtype
def test_min_max(dtype):
    x = data()
    for values in (x, np.abs(x), -np.abs(x), 0 * x):
        got = min_max().finalize(observe(min_max(), *np.split(values, 4, axis=1)), QuantSpec(dtype=dtype))
        np.testing.assert_array_equal(got, range_scale(values.min(1), values.max(1), dtype))
    assert np.all(min_max().finalize(min_max().init(2), QuantSpec(dtype=dtype)) == 2.0**-23)


def test_known_scale():
    x = np.array([[-127.5, 3.0]], np.float32)
    assert min_max().finalize(observe(min_max(), x), QuantSpec(dtype="int8")) == 1.0
    assert min_max().finalize(observe(min_max(), x), QuantSpec(dtype="uint2")) == 1.0
    assert min_max().finalize(observe(min_max(), x), QuantSpec(dtype="int4")) == 17.0


@pytest.mark.parametrize("constant", [0.01, 0.3, 1.0])
@by_dtype
def test_moving_average(constant, dtype):
    batches = np.split(data(), 8, axis=1)
    c, old_weight = np.float32(constant), np.float32(1 - constant)
    low, high = batches[0].min(1), batches[0].max(1)
    wide_low, wide_high = low.astype(np.float64), high.astype(np.float64)
    for batch in batches[1:]:
        low, high = old_weight * low + c * batch.min(1), old_weight * high + c * batch.max(1)
        wide_low = (1 - constant) * wide_low + constant * batch.min(1)
        wide_high = (1 - constant) * wide_high + constant * batch.max(1)
    state = observe(moving_average(constant), *batches)
    np.testing.assert_array_equal(state.range.low, low)
    np.testing.assert_array_equal(state.range.high, high)
    np.testing.assert_allclose(state.range.low, wide_low, rtol=8 * 2.0**-23)  # three roundings a batch
    np.testing.assert_allclose(state.range.high, wide_high, rtol=8 * 2.0**-23)
    got = moving_average(constant).finalize(state, QuantSpec(dtype=dtype))
    np.testing.assert_array_equal(got, range_scale(low, high, dtype))
    assert moving_average().merge is None


# ---------------------------------------------------------------------------------------------------------------------
# mse


def total(state):
    return np.asarray(state.upper).astype(np.int64) * 2**20 + np.asarray(state.lower).astype(np.int64)


@pytest.mark.parametrize("bins", [2, 64, 2048, 4096])
def test_histogram_counts(bins):
    x = data(samples=3000)
    state = observe(mse(bins), *np.split(x, 5, axis=1))
    for channel, exponent in zip(range(3), np.asarray(state.exponent), strict=True):
        index = np.floor(np.abs(x[channel].astype(np.float64)) / 2.0**exponent).astype(int)
        assert bins // 2 <= index.max() < bins
        for row, side in enumerate((x[channel] > 0, x[channel] < 0)):
            np.testing.assert_array_equal(total(state)[channel, row], np.bincount(index[side], minlength=bins))


def test_histogram_extremes():
    extremes = np.array([0.0, -0.0, 1e-45, 1.2e-38, 2.0**-40, 3.4e38, -3.4e38], np.float32)
    for order in (extremes, extremes[::-1]):
        state = observe(mse(), *[np.array([[v]]) for v in order])
        assert_same(state, observe(mse(), extremes[None]))
        assert total(state).sum() == 4  # neither zeros nor the subnormal
        assert np.isfinite(mse().finalize(state, QuantSpec(dtype="int8"))).all()


def test_counts_beyond_int32():
    state = observe(SMALL, np.full((1, 1000), 0.7, np.float32))
    for _ in range(30):
        state = SMALL.merge(state, state)
    assert total(state).sum() == 1000 * 2**30
    state = SMALL.update(state, jnp.full((1, 5), 100.0))  # the bins widen with counts this large
    assert total(state).sum() == 1000 * 2**30 + 5
    assert np.asarray(state.lower).max() < 2**20


def squared_error(x, scale, dtype):
    q = np.clip(np.rint(x / scale), *integer_range(dtype))
    return float(np.sum((q * scale - x) ** 2))


def histogram_errors(state, dtype, candidates):
    """The definition in float64, [candidates, channels], and the scale of every candidate."""
    counts, unit = total(state), 2.0 ** np.asarray(state.exponent, np.float64)
    centres = np.arange(counts.shape[-1]) + 0.5
    points = unit[:, None, None] * np.stack([centres, -centres])
    low, high = (np.asarray(side, np.float64) for side in state.range)
    scales, errors = [], []
    for k in range(1, candidates + 1):
        scale = range_scale(low * k / candidates, high * k / candidates, dtype).astype(np.float64)
        q = np.clip(np.rint(points / scale[:, None, None]), *integer_range(dtype))
        scales.append(scale)
        errors.append((counts * (q * scale[:, None, None] - points) ** 2).sum((1, 2)))
    return np.array(scales), np.array(errors)


@by_dtype
def test_mse_takes_the_smallest_error(dtype):
    x = data()
    state = observe(mse(), *np.split(x, 4, axis=1))
    got = np.asarray(mse().finalize(state, QuantSpec(dtype=dtype)))
    scales, errors = histogram_errors(state, dtype, 100)
    chosen = np.abs(scales / got - 1).argmin(0)
    np.testing.assert_allclose(got, scales[chosen, range(3)], rtol=2.0**-22)  # a product, a quotient
    # Float32 sums of 4096 positive terms: candidates that are closer than 1e-4 may change places.
    assert np.all(errors[chosen, range(3)] <= errors.min(0) * (1 + 1e-4))


@pytest.mark.parametrize("dtype", ["int2", "int3", "int4", "int8"])
def test_mse_is_near_the_best_of_the_data(dtype):
    x = data(samples=20_000).astype(np.float64)
    got = np.asarray(mse().finalize(observe(mse(), x.astype(np.float32)), QuantSpec(dtype=dtype)), np.float64)
    for channel in range(3):
        row, top = x[channel], np.abs(x[channel]).max()
        tried = [range_scale(np.array([-top * k / 100]), np.array([0.0]), dtype)[0] for k in range(1, 101)]
        best = min(squared_error(row, np.float64(s), dtype) for s in tried)
        # Bins cost a little where an LSB is few of them: at most 0.6 % on 8 seeds of this distribution, all at int8.
        assert squared_error(row, got[channel], dtype) <= 1.02 * best


def test_mse_of_zeros():
    for dtype in DTYPES:
        state = observe(mse(), np.zeros((2, 5), np.float32))
        assert np.all(mse().finalize(state, QuantSpec(dtype=dtype)) == 2.0**-23)


# ---------------------------------------------------------------------------------------------------------------------
# Order of batches

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
arrays = hnp.arrays(np.float32, st.tuples(st.just(2), st.just(12)), elements=finite | st.floats(-4, 4, width=32))


@pytest.mark.parametrize("observer", [min_max(), SMALL], ids=lambda o: o.name)
@hypothesis.settings(max_examples=40)
@hypothesis.given(x=arrays, seed=st.integers(0, 2**16))
def test_order_and_split_do_not_matter(observer, x, seed):
    order = np.random.default_rng(seed).permutation(12)
    whole = observe(observer, x)
    a, b, c = np.split(x[:, order], 3, axis=1)
    assert_same(whole, observe(observer, a, b, c))
    assert_same(whole, observe(observer, c, b, a))
    one, two, three = (observe(observer, part) for part in (a, b, c))
    assert_same(whole, merge(observer, merge(observer, one, two), three))
    assert_same(whole, merge(observer, one, merge(observer, three, two)))
    assert_same(whole, merge(observer, observer.init(2), whole))
    spec = QuantSpec(dtype="int4")
    assert_same(
        observer.finalize(whole, spec), observer.finalize(merge(observer, observe(observer, b, a), three), spec)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Transformations


@pytest.mark.parametrize("observer", [min_max(), moving_average(0.3), mse()], ids=lambda o: o.name)
def test_jit_equals_eager_and_channels_are_independent(observer):
    batches = np.split(data(), 4, axis=1)
    eager = observer.init(3)
    for batch in batches:
        eager = observer.update(eager, jnp.asarray(batch))
    assert_same(eager, observe(observer, *batches))
    if observer.merge:
        assert_same(observer.merge(eager, eager), merge(observer, eager, eager))
    scanned = jax.lax.scan(lambda s, x: (observer.update(s, x), None), observer.init(3), jnp.asarray(batches))[0]
    assert_same(eager, scanned)
    for dtype in DTYPES:
        spec = QuantSpec(dtype=dtype)
        scale = observer.finalize(eager, spec)
        assert (scale.shape, scale.dtype) == ((3,), jnp.float32)
        assert_same(scale, jax.jit(observer.finalize, static_argnums=1)(eager, spec))
        alone = [observer.finalize(observe(observer, *[b[i : i + 1] for b in batches]), spec) for i in range(3)]
        assert_same(scale, np.concatenate(alone))

    def one_channel(x):  # [batches, samples]
        state = observer.init(1)
        for row in x:
            state = observer.update(state, row[None])
        return observer.finalize(state, QuantSpec(dtype="int8"))[0]

    by_channel = jax.vmap(one_channel)(jnp.asarray(np.stack(batches, axis=1)))
    assert_same(by_channel, observer.finalize(eager, QuantSpec(dtype="int8")))


@pytest.mark.parametrize("observer", [min_max(), moving_average(), mse()], ids=lambda o: o.name)
def test_not_finite_reaches_the_scale(observer):
    for bad in (np.nan, np.inf):
        state = observe(observer, np.array([[1.0, bad, 2.0], [1.0, 2.0, 3.0]], np.float32))
        finite = np.isfinite(observer.finalize(state, QuantSpec(dtype="int8")))
        assert finite.tolist() == [False, True]


def test_equal_options_are_one_observer():
    assert mse() is mse(bins=2048, candidates=100)
    assert moving_average() is moving_average(averaging_constant=0.01)
    assert min_max() is min_max()
    assert hash(QuantSpec(dtype="int8", observer=mse()))
    assert mse().options == (("bins", 2048), ("candidates", 100))


def test_bad_options():
    for bins in (0, 1, 100, 8192):
        with pytest.raises(QConfigError, match="bins"):
            mse(bins=bins)
    with pytest.raises(QConfigError, match="candidates"):
        mse(candidates=0)
    for constant in (0.0, 1.5, float("nan")):
        with pytest.raises(QConfigError, match="averaging_constant"):
            moving_average(constant)


def test_examples():
    assert doctest.testmod(observers).failed == 0
    assert doctest.testmod(observers).attempted > 0
