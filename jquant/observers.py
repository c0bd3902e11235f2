"""Observers: how a scale is estimated from data. An observer is a value made of pure functions over a small state.

Data arrives as [channels, samples] float32, in real; `finalize` returns scales [channels], in real per LSB, at least
2^-23. Nothing here hides a NaN: it reaches the scale, and the caller refuses it. Subnormal numbers count as zero, since
a backend may flush them or not.
"""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jquant.numerics.rounding import MIN_SCALE, divide
from jquant.types import Array, Observer, QConfigError, QuantSpec

# ---------------------------------------------------------------------------------------------------------------------
# What all observers share


class RangeState(NamedTuple):
    """Smallest and largest value so far, real, [channels]; +inf and -inf before any data."""

    low: Array
    high: Array


def _empty_range(channels: int) -> RangeState:
    return RangeState(jnp.full(channels, jnp.inf, jnp.float32), jnp.full(channels, -jnp.inf, jnp.float32))


def _flush(x: Array) -> Array:
    """Subnormals and -0.0 become 0.0: their order under min and max depends on the backend."""
    return jnp.where(jnp.abs(x) < np.finfo(np.float32).tiny, 0.0, x)


def _range_of(x: Array) -> RangeState:
    x = _flush(x)
    return RangeState(x.min(axis=1, initial=jnp.inf), x.max(axis=1, initial=-jnp.inf))


def _merge_range(a: RangeState, b: RangeState) -> RangeState:
    return RangeState(jnp.minimum(a.low, b.low), jnp.maximum(a.high, b.high))


def _limit(seen: RangeState, spec: QuantSpec) -> Array:
    """The magnitude that the integers must reach, real: max(-min, max, 0), without min for unsigned dtypes."""
    largest = jnp.maximum(seen.high, 0.0)
    return jnp.maximum(largest, -seen.low) if spec.range[0] else largest


def _scale_for(limit: Array, spec: QuantSpec) -> Array:
    """limit / ((qmax - qmin) / 2), or limit / qmax for unsigned dtypes; at least 2^-23."""
    low, high = spec.range
    steps = (high - low) / 2 if low else high
    return jnp.maximum(divide(limit, jnp.float32(steps)), MIN_SCALE)


# ---------------------------------------------------------------------------------------------------------------------
# min_max


def _min_max_update(state: RangeState, x: Array) -> RangeState:
    return _merge_range(state, _range_of(x))


@cache
def min_max() -> Observer:
    """The scale at which nothing saturates by more than half an LSB: max(-min, max, 0) / ((qmax - qmin) / 2).

    Returns:
      An observer whose state is a `RangeState`; the order of batches does not matter.

    References:
      Jacob et al. 2018, Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference.

    Example:
      >>> import jax.numpy as jnp
      >>> from jquant.observers import min_max
      >>> from jquant.types import QuantSpec
      >>> observer = min_max()
      >>> state = observer.update(observer.init(2), jnp.array([[-1.0, 51.0], [0.0, 0.0]]))
      >>> scale = observer.finalize(state, QuantSpec(dtype="int8"))
      >>> [round(s, 6) for s in scale.tolist()]
      [0.4, 0.0]
    """

    def finalize(state: RangeState, spec: QuantSpec) -> Array:
        return _scale_for(_limit(state, spec), spec)

    return Observer(_empty_range, _min_max_update, _merge_range, finalize, name="min_max")


# ---------------------------------------------------------------------------------------------------------------------
# moving_average


class MovingAverageState(NamedTuple):
    """Averaged range, real, [channels], and the number of batches so far, int32 scalar."""

    range: RangeState
    batches: Array


def moving_average(averaging_constant: float = 0.01) -> Observer:
    """The exponential moving average of each batch's minimum and maximum; the first batch is taken as it is.

    Args:
      averaging_constant: c of `new = (1 - c) * old + c * current`, in (0, 1].

    Returns:
      An observer whose state is a `MovingAverageState`; `merge` is None, since later batches weigh more.

    References:
      Jacob et al. 2018, Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
      section 3.1.

    Example:
      >>> import jax.numpy as jnp
      >>> from jquant.observers import moving_average
      >>> observer = moving_average(0.5)
      >>> state = observer.update(observer.init(1), jnp.array([[-2.0, 4.0]]))
      >>> state = observer.update(state, jnp.array([[0.0, 8.0]]))
      >>> state.range.low.tolist(), state.range.high.tolist()
      ([-1.0], [6.0])
    """
    if not 0 < averaging_constant <= 1:
        raise QConfigError(f"averaging_constant must be in (0, 1], not {averaging_constant!r}")
    return _moving_average(float(averaging_constant))


@cache
def _moving_average(constant: float) -> Observer:
    def init(channels: int) -> MovingAverageState:
        return MovingAverageState(_empty_range(channels), jnp.zeros((), jnp.int32))

    def average(first: Array, old: Array, new: Array) -> Array:
        old = jnp.where(first, new, old)  # not inf: inf * 0 is NaN where c is 1
        # _flush also keeps the compiler from fusing product and sum, which would round once less under jit.
        mixed = _flush(old * (1.0 - constant)) + _flush(new * constant)
        return jnp.where(first, new, mixed)

    def update(state: MovingAverageState, x: Array) -> MovingAverageState:
        mix = partial(average, state.batches == 0)
        return MovingAverageState(RangeState(*map(mix, state.range, _range_of(x))), state.batches + 1)

    def finalize(state: MovingAverageState, spec: QuantSpec) -> Array:
        return _scale_for(_limit(state.range, spec), spec)

    options = (("averaging_constant", constant),)
    return Observer(init, update, None, finalize, name="moving_average", options=options)


# ---------------------------------------------------------------------------------------------------------------------
# mse

_LIMB = 20  # bits of the lower limb: bins * 2^20 <= 2^32, so that all bins may be summed before the carry
_MAX_BINS = 2**12
_MIN_EXPONENT = -40  # narrower bins than 2^-40 would tell apart only what the smallest scale, 2^-23, rounds to zero


class HistogramState(NamedTuple):
    """A histogram of |x| that is exact in any order of batches.

    A bin is [i, i + 1) * 2^exponent. Bin edges of a larger exponent are edges of every smaller one, and the exponent is
    the smallest that holds the largest value so far, so the counts depend on the set of samples alone. Counts are
    integers in two limbs, `upper * 2^20 + lower`, enough for 2^52 samples a bin. Zeros quantize exactly: they are
    left out.
    """

    range: RangeState  # real, [channels]
    exponent: Array  # int32 [channels], log2 of the bin width in real
    lower: Array  # uint32 [channels, 2, bins], below 2^20; row 0 counts x > 0, row 1 x < 0
    upper: Array  # uint32 [channels, 2, bins]


def _exponent_for(limit: Array, bins: int) -> Array:
    """The smallest exponent for which `bins` bins reach beyond limit >= 0."""
    field = (jax.lax.bitcast_convert_type(limit, jnp.int32) >> 23) & 0xFF
    return jnp.maximum(field - 126 - (bins.bit_length() - 1), _MIN_EXPONENT)


def _power_of_two(exponent: Array) -> Array:
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _bin_of(x: Array, exponent: Array) -> Array:
    """floor(|x| / 2^exponent) on the bits of x, exact: the significand, shifted."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    significand = (bits & 0x7FFFFF) | 0x800000  # |x| = significand * 2^(field - 150)
    field = (bits >> 23) & 0xFF
    return significand >> jnp.clip(exponent - field + 150, 0, 31)


def _count(x: Array, exponent: Array, bins: int) -> Array:
    """[samples] and one exponent to counts [2, bins] by sign."""
    index = jnp.where(x < 0, bins, 0) + _bin_of(x, exponent)
    return jnp.zeros(2 * bins, jnp.uint32).at[index].add((x != 0).astype(jnp.uint32)).reshape(2, bins)


def _widen_bins(counts: Array, steps: Array) -> Array:
    """Adds bins in groups of 2^steps: counts [2, bins] of width w to counts of width w * 2^steps."""
    target = jnp.arange(counts.shape[1]) >> jnp.minimum(steps, 31)
    return jnp.zeros_like(counts).at[:, target].add(counts)


def _carry(lower: Array, upper: Array) -> tuple[Array, Array]:
    return lower & jnp.uint32(2**_LIMB - 1), upper + (lower >> jnp.uint32(_LIMB))


def _with_exponent(state: HistogramState, exponent: Array) -> HistogramState:
    """The same samples in wider bins."""
    widen = partial(jax.vmap(_widen_bins), steps=exponent - state.exponent)
    lower, upper = _carry(widen(state.lower), widen(state.upper))
    return HistogramState(state.range, exponent, lower, upper)


def _histogram_init(channels: int, bins: int) -> HistogramState:
    counts = jnp.zeros((channels, 2, bins), jnp.uint32)
    return HistogramState(_empty_range(channels), jnp.full(channels, _MIN_EXPONENT, jnp.int32), counts, counts)


def _histogram_update(state: HistogramState, x: Array) -> HistogramState:
    bins = state.lower.shape[-1]
    x, seen = _flush(x), _range_of(x)
    limit = jnp.maximum(jnp.maximum(-seen.low, seen.high), 0.0)
    exponent = jnp.maximum(state.exponent, _exponent_for(limit, bins))
    state = _with_exponent(state, exponent)
    added = jax.vmap(partial(_count, bins=bins))(x, exponent)
    lower, upper = _carry(state.lower + added, state.upper)
    return HistogramState(_merge_range(state.range, seen), exponent, lower, upper)


def _histogram_merge(a: HistogramState, b: HistogramState) -> HistogramState:
    exponent = jnp.maximum(a.exponent, b.exponent)
    a, b = _with_exponent(a, exponent), _with_exponent(b, exponent)
    lower, upper = _carry(a.lower + b.lower, a.upper + b.upper)
    return HistogramState(_merge_range(a.range, b.range), exponent, lower, upper)


def _histogram_finalize(state: HistogramState, spec: QuantSpec, candidates: int) -> Array:
    low, high = map(float, spec.range)
    limit = _limit(state.range, spec)
    fractions = jnp.asarray(np.arange(1, candidates + 1) / candidates, jnp.float32)
    # Everything below is in units of a bin width, so that no square overflows or vanishes.
    width = _power_of_two(state.exponent)
    centre = jnp.arange(state.lower.shape[-1], dtype=jnp.float32) + 0.5
    centre = jnp.stack([centre, -centre])
    count = state.upper.astype(jnp.float32) * 2.0**_LIMB + state.lower.astype(jnp.float32)

    def error(fraction: Array) -> Array:
        scale = divide(_scale_for(limit * fraction, spec), width)[:, None, None]
        rounded = jnp.clip(jnp.round(divide(centre[None], scale)), low, high)
        return jnp.sum(count * jnp.square(rounded * scale - centre), axis=(1, 2))

    best = jnp.argmin(jax.lax.map(error, fractions), axis=0)  # one candidate at a time: [channels, 2, bins] in memory
    return _scale_for(limit * fractions[best], spec)


def mse(bins: int = 2048, candidates: int = 100) -> Observer:
    """The scale with the smallest expected squared error, out of `candidates` clipping thresholds.

    Thresholds are `k / candidates * max(-min, max, 0)`, k = 1 .. candidates; the error of each is computed from a
    histogram, every sample taken at the centre of its bin. At least half of the bins are in use. With int16, a bin is
    wider than an LSB: the saturation error is still seen, the rounding error only on average.

    Args:
      bins: per sign, a power of two from 2 to 4096.
      candidates: thresholds tried, at least 1.

    Returns:
      An observer whose state is a `HistogramState`; `update` and `merge` are exact in any order.

    References:
      Sung et al. 2015, Resiliency of Deep Neural Networks under Quantization (L2-optimal step by search);
      Nagel et al. 2021, A White Paper on Neural Network Quantization, section 3.1.

    Example:
      >>> import jax.numpy as jnp
      >>> from jquant.observers import min_max, mse
      >>> from jquant.types import QuantSpec
      >>> x = jnp.concatenate([jnp.linspace(-1.0, 1.0, 10001), jnp.array([4.0])])[None]
      >>> spec = QuantSpec(dtype="int4")
      >>> plain, best = (o.finalize(o.update(o.init(1), x), spec) for o in (min_max(), mse()))
      >>> bool(best[0] < plain[0] / 3)  # one outlier in ten thousand samples is clipped
      True
    """
    if not (2 <= bins <= _MAX_BINS and bins == 2 ** (int(bins).bit_length() - 1)):
        raise QConfigError(f"bins must be a power of two from 2 to {_MAX_BINS}, not {bins!r}")
    if candidates < 1:
        raise QConfigError(f"candidates must be at least 1, not {candidates!r}")
    return _mse(int(bins), int(candidates))


@cache
def _mse(bins: int, candidates: int) -> Observer:
    return Observer(
        partial(_histogram_init, bins=bins),
        _histogram_update,
        _histogram_merge,
        partial(_histogram_finalize, candidates=candidates),
        name="mse",
        options=(("bins", bins), ("candidates", candidates)),
    )
