"""Observers against float64 numpy, and their promise that the order of batches does not matter, bit for bit."""

import doctest
import functools
import math
import sys
from fractions import Fraction

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.observers import clip_std, histogram, kl, min_max, mix, moving_average, mse, norm, percentile
from jquant.types import QConfigError, QuantSpec, integer_range

DTYPES = ["int2", "int3", "int4", "int8", "int16", "uint2", "uint3", "uint4", "uint8"]
by_dtype = pytest.mark.parametrize("dtype", DTYPES)
by_few_dtypes = pytest.mark.parametrize("dtype", ["int4", "int8", "int16", "uint8"])
SMALL = mse(bins=64, candidates=20)  # small enough to draw many cases
SMALL_MIX = mix(percentile(90, bins=64), SMALL, kl(bins=64, candidates=20))
MERGEABLE = [min_max(), SMALL, percentile(99, bins=64), clip_std(2.0)]
EVERY = [*MERGEABLE, moving_average(0.3), kl(64, candidates=20), norm(3.0, bins=64, candidates=20), SMALL_MIX]


@functools.partial(jax.jit, static_argnums=0)
def update(observer, state, batch):
    return observer.update(state, batch)


@functools.partial(jax.jit, static_argnums=0)
def merge(observer, a, b):
    return observer.merge(a, b)


@functools.partial(jax.jit, static_argnums=(0, 2))
def finalize(observer, state, dtype):
    return observer.finalize(state, QuantSpec(dtype=dtype))


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
        got = finalize(min_max(), observe(min_max(), *np.split(values, 4, axis=1)), dtype)
        np.testing.assert_array_equal(got, range_scale(values.min(1), values.max(1), dtype))
    assert np.all(finalize(min_max(), min_max().init(2), dtype) == 2.0**-23)


def test_known_scale():
    x = np.array([[-127.5, 3.0]], np.float32)
    assert finalize(min_max(), observe(min_max(), x), "int8") == 1.0
    assert finalize(min_max(), observe(min_max(), x), "uint2") == 1.0
    assert finalize(min_max(), observe(min_max(), x), "int4") == 17.0


@pytest.mark.parametrize("constant", [0.0, 0.01, 0.3, 1.0])
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
    got = finalize(moving_average(constant), state, dtype)
    np.testing.assert_array_equal(got, range_scale(low, high, dtype))
    assert moving_average().merge is None
    if constant in (0, 1):  # the first batch for good, the last batch alone
        np.testing.assert_array_equal(state.range.high, batches[-int(constant)].max(1))


# ---------------------------------------------------------------------------------------------------------------------
# The histogram


def total(state):
    return np.asarray(state.upper).astype(np.int64) * 2**20 + np.asarray(state.lower).astype(np.int64)


def total_zeros(state):
    lower, upper = np.asarray(state.zeros).astype(np.int64).T
    return upper * 2**20 + lower


@pytest.mark.parametrize("bins", [2, 64, 2048, 4096])
def test_histogram_counts(bins):
    x = data(samples=3000)
    state = observe(mse(bins), *np.split(x, 5, axis=1))
    for channel, exponent in zip(range(3), np.asarray(state.exponent), strict=True):
        index = np.floor(np.abs(x[channel].astype(np.float64)) / 2.0**exponent).astype(int)
        assert bins // 2 <= index.max() < bins
        for row, side in enumerate((x[channel] > 0, x[channel] < 0)):
            np.testing.assert_array_equal(total(state)[channel, row], np.bincount(index[side], minlength=bins))
    np.testing.assert_array_equal(total_zeros(state), (x == 0).sum(1))


def test_histogram_extremes():
    extremes = np.array([0.0, -0.0, 1e-45, 1.2e-38, 2.0**-40, 3.4e38, -3.4e38], np.float32)
    for order in (extremes, extremes[::-1]):
        state = observe(mse(), *[np.array([[v]]) for v in order])
        assert_same(state, observe(mse(), extremes[None]))
        assert total(state).sum() == 4  # neither zeros nor the subnormal
        assert total_zeros(state) == 3
        assert np.isfinite(finalize(mse(), state, "int8")).all()


def test_counts_beyond_int32():
    state = observe(SMALL, np.array([[0.7] * 1000 + [0.0] * 500], np.float32))
    for _ in range(30):
        state = merge(SMALL, state, state)
    assert total(state).sum() == 1000 * 2**30
    state = SMALL.update(state, jnp.full((1, 5), 100.0))  # the bins widen with counts this large
    assert total(state).sum() == 1000 * 2**30 + 5
    assert total_zeros(state) == 500 * 2**30
    assert np.asarray(state.lower).max() < 2**20
    # 5 of 1.6e12 samples are beyond 0.7; the shares are kept to 2^-30 of all, 1500 samples.
    assert finalize(percentile(100, bins=64), state, "int8")[0] == np.float32(100) / np.float32(127.5)
    assert finalize(percentile(99.999, bins=64), state, "int8")[0] == np.float32(2) / np.float32(127.5)  # one bin of 2
    assert np.isfinite(finalize(kl(64, candidates=20), state, "int8")).all()


# ---------------------------------------------------------------------------------------------------------------------
# percentile


@pytest.mark.parametrize("share", [0.5, 50, 90, 99.9, 99.99, 100])
@by_few_dtypes
def test_percentile(share, dtype):
    x = data(samples=10_000)
    state = observe(histogram(), *np.split(x, 4, axis=1))
    got = finalize(percentile(share), state, dtype)
    above = math.ceil((100 - Fraction(str(share))) / 100 * 2**30)
    for channel, row in enumerate(x.astype(np.float64)):
        width = 2.0 ** np.floor(np.log2(np.abs(row).max()) + 1) / 2048
        reached = np.maximum(row, 0) if dtype.startswith("u") else np.abs(row)
        allowed = row.size * above // 2**30
        if np.count_nonzero(reached) <= allowed:  # the percentile is 0, which is no scale
            np.testing.assert_array_equal(got[channel], range_scale(*np.float64([[row.min()], [row.max()]]), dtype)[0])
            continue
        edge = (np.floor(np.sort(reached)[row.size - 1 - allowed] / width) + 1) * width
        limit = np.float64([min(edge, reached.max())])
        np.testing.assert_array_equal(got[channel], range_scale(0 * limit, limit, dtype)[0])
        # And as numpy defines it, to a bin.
        assert -width <= edge - np.percentile(reached, share - 1e-9, method="inverted_cdf") <= 2 * width


def test_percentile_of_100_is_the_range():
    x = data()
    for dtype in DTYPES:
        whole = [finalize(o, observe(h, x), dtype) for o, h in ((min_max(), min_max()), (percentile(100), histogram()))]
        assert_same(*whole)


# ---------------------------------------------------------------------------------------------------------------------
# mse and norm


def squared_error(x, scale, dtype):
    q = np.clip(np.rint(x / scale), *integer_range(dtype))
    return float(np.sum((q * scale - x) ** 2))


def histogram_errors(state, dtype, candidates, p=2.0):
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
        errors.append((counts * np.abs(q * scale[:, None, None] - points) ** p).sum((1, 2)))
    return np.array(scales), np.array(errors)


@pytest.mark.parametrize(("observer", "p"), [(mse(), 2), (norm(1.0), 1), (norm(0.5), 0.5), (norm(4.0), 4)])
@by_few_dtypes
def test_the_smallest_error_is_taken(observer, p, dtype):
    x = data()
    state = observe(histogram(), *np.split(x, 4, axis=1))
    got = np.asarray(finalize(observer, state, dtype))
    scales, errors = histogram_errors(state, dtype, 100, p)
    chosen = np.abs(scales / got - 1).argmin(0)
    np.testing.assert_allclose(got, scales[chosen, range(3)], rtol=2.0**-22)  # a product, a quotient
    # Float32 sums of 4096 positive terms: candidates that are closer than 1e-4 may change places.
    assert np.all(errors[chosen, range(3)] <= errors.min(0) * (1 + 1e-4))


@pytest.mark.parametrize("dtype", ["int2", "int3", "int4", "int8"])
def test_mse_is_near_the_best_of_the_data(dtype):
    x = data(samples=20_000).astype(np.float64)
    got = np.asarray(finalize(mse(), observe(mse(), x.astype(np.float32)), dtype), np.float64)
    for channel in range(3):
        row, top = x[channel], np.abs(x[channel]).max()
        tried = [range_scale(np.array([-top * k / 100]), np.array([0.0]), dtype)[0] for k in range(1, 101)]
        best = min(squared_error(row, np.float64(s), dtype) for s in tried)
        # Bins cost a little where an LSB is few of them: at most 0.6 % on 8 seeds of this distribution, all at int8.
        assert squared_error(row, got[channel], dtype) <= 1.02 * best


@pytest.mark.parametrize("observer", EVERY, ids=lambda o: o.name)
def test_zeros(observer):
    for dtype in ("int4", "uint8"):
        state = observe(observer, np.zeros((2, 5), np.float32))
        assert np.all(finalize(observer, state, dtype) == 2.0**-23)


def test_norm_of_2_is_mse():
    state = observe(mse(), data())
    for dtype in ("int4", "uint8"):
        assert_same(*(finalize(o, state, dtype) for o in (mse(), norm(2.0))))
        assert_same(*(finalize(o, state, dtype) for o in (mse(), histogram())))


# ---------------------------------------------------------------------------------------------------------------------
# kl


def divergence(positive, negative, unit, threshold, scale, dtype):
    """KL(P || Q) of one channel in float64, bin by bin, from the definition."""
    bins, points, by_level = len(positive), [], {}
    for sign, counts in ((1, positive), (-1, negative)):
        filled = [i for i in range(bins) if counts[i] and i * unit <= threshold]
        beyond = counts.sum() - counts[filled].sum()
        if beyond and not filled:
            return math.inf
        for i in filled:
            level = np.clip(np.rint(np.float32(sign * (i + 0.5)) / np.float32(scale / unit)), *integer_range(dtype))
            points.append((counts[i] + (beyond if i == filled[-1] else 0), level))
            by_level.setdefault(level, []).append(counts[i])
    if all(len(counts) == 1 for counts in by_level.values()):
        return math.inf  # every bin has an integer of its own: Q is P
    everything, inside = sum(p for p, _ in points), sum(map(sum, by_level.values()))
    q = {level: sum(counts) / len(counts) / inside for level, counts in by_level.items()}
    return sum(p / everything * math.log(p / everything / q[level]) for p, level in points)


@by_few_dtypes
def test_kl_takes_the_smallest_divergence(dtype):
    observer = kl(512, candidates=50)
    x = data(samples=20_000)
    state = observe(observer, *np.split(x, 4, axis=1))
    got = np.asarray(finalize(observer, state, dtype))
    for channel in range(3):
        positive, negative = total(state)[channel]
        if dtype.startswith("u"):
            negative = 0 * negative
        unit, tried = 2.0 ** float(state.exponent[channel]), []
        low, high = (np.float32(side[channel]) for side in state.range)
        for k in range(1, 51):
            fraction = np.float32(k / 50)
            scale = range_scale(low * fraction, high * fraction, dtype)
            threshold = fraction * (high if dtype.startswith("u") else max(-low, high))
            tried.append((divergence(positive, negative, unit, threshold, scale, dtype), scale))
        chosen = min(tried, key=lambda pair: abs(pair[1] - got[channel]))
        assert abs(chosen[1] / got[channel] - 1) < 2.0**-22
        assert chosen[0] <= min(tried)[0] * (1 + 1e-4) + 1e-12  # float32 sums of 1024 positive terms


def test_kl_clips_outliers_and_not_what_has_none():
    rng = np.random.default_rng(0)
    x = np.append(rng.normal(size=200_000), 12.0).astype(np.float32)[None]
    assert float(finalize(kl(), observe(kl(), x), "int8")[0]) * 127.5 < 8
    even = rng.uniform(-1, 1, (1, 200_000)).astype(np.float32)
    assert float(finalize(kl(), observe(kl(), even), "int8")[0]) * 127.5 > 0.95
    assert_same(*(finalize(o, observe(o, x), "int16") for o in (kl(), min_max())))


# ---------------------------------------------------------------------------------------------------------------------
# mix


@by_few_dtypes
def test_mix_takes_the_best(dtype):
    methods = (percentile(100), percentile(99), mse(), kl(candidates=20))
    x = data()
    state = observe(histogram(), x)
    scales = np.array([finalize(m, state, dtype) for m in methods], np.float64)
    counts, unit = total(state), 2.0 ** np.asarray(state.exponent, np.float64)[:, None, None]
    centres = np.arange(2048) + 0.5
    points = unit * np.stack([centres, -centres])
    errors = []
    for scale in scales[:, :, None, None]:
        q = np.clip(np.rint(points / scale), *integer_range(dtype))
        errors.append((counts * (q * scale - points) ** 2).sum((1, 2)))
    got = np.asarray(finalize(mix(*methods), state, dtype))
    for channel in range(3):
        (chosen,) = set(np.flatnonzero(scales[:, channel] == got[channel])[:1])
        assert errors[chosen][channel] <= np.array(errors)[:, channel].min() * (1 + 1e-4)


def test_mix_is_of_histograms_of_one_size():
    with pytest.raises(QConfigError, match="clip_std keeps no histogram"):
        mix(mse(), clip_std())
    with pytest.raises(QConfigError, match=r"\[2048, 64\] bins"):
        mix(mse(), SMALL)
    with pytest.raises(QConfigError, match="at least two"):
        mix(mse())


# ---------------------------------------------------------------------------------------------------------------------
# clip_std


def exact_sums(state):
    """Sums of |x| by sign and of x^2, [channels, 2], as fractions, from the bytes of the state."""
    bytes_ = total(state)
    sums = []
    for channel in bytes_:
        for row in channel:
            fields = [Fraction(2) ** (f - 150) for f in range(256)]
            first = sum(u * sum(int(row[f, i]) << (8 * i) for i in range(3)) for f, u in enumerate(fields))
            second = sum(u**2 * sum(int(row[f, 3 + i]) << (8 * i) for i in range(6)) for f, u in enumerate(fields))
            sums.append((first, second))
    return sums


def test_moments_are_exact():
    x = data(2, 500)
    x[0, :4] = 3.3e38, -3.3e38, 1.3e-38, 1e-45
    state = observe(clip_std(), *np.split(x, 2, axis=1))
    want = []
    for row in x:
        for values in (row[row > 1.2e-38], row[row < -1.2e-38]):
            exact = [abs(Fraction(float(v))) for v in values]
            want.append((sum(exact), sum(v**2 for v in exact)))
    assert exact_sums(state) == want


@pytest.mark.parametrize("multiple", [0.5, 3.0, 100.0])
@by_few_dtypes
def test_clip_std(multiple, dtype):
    x = np.concatenate([data(), data(seed=1) + 50 * np.abs(data()).mean(1, keepdims=True)]).astype(np.float32)
    x[0, 0] = 3e38  # squares beyond float32
    got = finalize(clip_std(multiple), observe(clip_std(multiple), *np.split(x, 5, axis=1)), dtype)
    wide = x.astype(np.float64)
    mean, reach = wide.mean(1), multiple * wide.std(1)
    low, high = np.maximum(mean - reach, wide.min(1)), np.minimum(mean + reach, wide.max(1))
    limit = np.maximum(high, 0) if dtype.startswith("u") else np.maximum(np.maximum(-low, high), 0)
    # The deviation is about 2^-22 * (1 + mean^2 / variance) off: 5 means stand for 50 average deviations.
    slack = 2.0**-21 * (np.abs(mean) + reach * (1 + (mean / wide.std(1)) ** 2))
    steps = np.subtract(*integer_range(dtype)[::-1]) / (1 if dtype.startswith("u") else 2)
    np.testing.assert_array_less(np.abs(got * steps - limit), slack + 2.0**-21 * limit + 2.0**-23 * steps)


def test_moments_of_many_samples():
    x = np.full((1, 2**21 + 5), 0.1, np.float32)
    x[0, 0] = -7.0
    state = observe(clip_std(), x)
    positive, negative = exact_sums(state)
    assert positive[0] == (2**21 + 4) * Fraction(float(np.float32(0.1)))
    assert negative == (7, 49)
    for _ in range(20):
        state = merge(clip_std(), state, state)
    assert exact_sums(state)[1] == (7 * 2**20, 49 * 2**20)
    lower, upper = np.asarray(state.samples).astype(np.int64)
    assert upper * 2**20 + lower == x.size * 2**20
    alone = finalize(clip_std(), observe(clip_std(), x), "int8")
    np.testing.assert_allclose(finalize(clip_std(), state, "int8"), alone, rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Order of batches

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
arrays = hnp.arrays(np.float32, st.tuples(st.just(2), st.just(12)), elements=finite | st.floats(-4, 4, width=32))


@pytest.mark.parametrize("observer", MERGEABLE, ids=lambda o: o.name)
@hypothesis.settings(max_examples=30)
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
    other = merge(observer, observe(observer, b, a), three)
    assert_same(finalize(observer, whole, "int4"), finalize(observer, other, "int4"))


# ---------------------------------------------------------------------------------------------------------------------
# Transformations


@pytest.mark.parametrize("observer", [min_max(), moving_average(0.3), SMALL, clip_std(2.0)], ids=lambda o: o.name)
def test_a_state_is_the_same_under_jit_and_scan(observer):
    batches = np.split(data(), 4, axis=1)
    eager = observer.init(3)
    for batch in batches:
        eager = observer.update(eager, jnp.asarray(batch))
    assert_same(eager, observe(observer, *batches))
    if observer.merge:
        assert_same(observer.merge(eager, eager), merge(observer, eager, eager))
    scanned = jax.lax.scan(lambda s, x: (observer.update(s, x), None), observer.init(3), jnp.asarray(batches))[0]
    assert_same(eager, scanned)


@pytest.mark.parametrize("observer", EVERY, ids=lambda o: o.name)
def test_a_scale_is_the_same_under_jit_and_vmap_and_channels_are_independent(observer):
    batches = np.split(data(), 4, axis=1)
    state = observe(observer, *batches)
    scale = observer.finalize(state, QuantSpec(dtype="uint8"))
    assert (scale.shape, scale.dtype) == ((3,), jnp.float32)
    assert_same(scale, finalize(observer, state, "uint8"))
    alone = [finalize(observer, observe(observer, *[b[i : i + 1] for b in batches]), "uint8") for i in range(3)]
    assert_same(scale, np.concatenate(alone))

    def one_channel(x):  # [batches, samples]
        one = observer.init(1)
        for row in x:
            one = observer.update(one, row[None])
        return observer.finalize(one, QuantSpec(dtype="uint8"))[0]

    assert_same(jax.jit(jax.vmap(one_channel))(jnp.asarray(np.stack(batches, axis=1))), scale)


@pytest.mark.parametrize("observer", EVERY, ids=lambda o: o.name)
def test_not_finite_reaches_the_scale(observer):
    for bad in (np.nan, np.inf):
        state = observe(observer, np.array([[1.0, bad, 2.0], [1.0, 2.0, 3.0]], np.float32))
        finite = np.isfinite(finalize(observer, state, "int8"))
        assert finite.tolist() == [False, True]


def test_equal_options_are_one_observer():
    assert mse() is mse(bins=2048, candidates=100)
    assert moving_average() is moving_average(averaging_constant=0.01)
    assert min_max() is min_max()
    assert percentile() is percentile(99.99, bins=2048)
    assert percentile(100) is percentile(100.0)
    assert kl() is kl(2048)
    assert norm(2) is norm(2.0)
    assert norm(2) is not mse()
    assert histogram() is histogram(2048)
    assert clip_std(3) is clip_std()
    assert mix() is mix(percentile(100), percentile(99.99), mse(), kl())
    assert dict(mix().options)["1.percentile.percentile"] == 99.99
    assert hash(QuantSpec(dtype="int8", observer=mse()))
    assert mse().options == (("bins", 2048), ("candidates", 100))


def test_bad_options():
    for bins in (0, 1, 100, 8192):
        with pytest.raises(QConfigError, match="bins"):
            mse(bins=bins)
    with pytest.raises(QConfigError, match="candidates"):
        mse(candidates=0)
    for constant in (-0.1, 1.5, float("nan")):
        with pytest.raises(QConfigError, match="averaging_constant"):
            moving_average(constant)
    with pytest.raises(QConfigError, match="candidates"):
        kl(candidates=0)
    for share in (0, -1, 100.1, float("nan")):
        with pytest.raises(QConfigError, match="percentile"):
            percentile(share)
    for p in (0, 4.1, float("nan")):
        with pytest.raises(QConfigError, match="p must be"):
            norm(p)
    for multiple in (0, float("inf"), float("nan")):
        with pytest.raises(QConfigError, match="multiple"):
            clip_std(multiple)


@pytest.mark.parametrize("module", ["divergence", "moments", "ranges", "search"])
def test_examples(module):
    done = doctest.testmod(sys.modules[f"jquant.observers.{module}"])
    assert done.attempted > 0
    assert done.failed == 0
