"""The scale of the least squared error relative to each sample's own range, from histograms that merge exactly."""

from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jquant.numerics.rounding import divide
from jquant.observers.base import RangeState, carry, empty_range, flush, limit_of, merge_range, scale_for
from jquant.observers.histograms import MIN_EXPONENT, bin_centres, bin_of, exponent_for, power_of_two
from jquant.observers.moments import add_counts, split_count
from jquant.types import Array, Observer, QuantSpec

_LIMB = 20
_BINS = 512
_OCTAVES = 8  # rows of the histogram: octaves * bins * (2^20 - 1) < 2^32, so that any of them may be summed
_THRESHOLDS = np.float32(2.0 ** (-np.arange(112) / 16))  # of the largest value, down to 1/128 of it


class SampleHistogramState(NamedTuple):
    """A histogram of |x| for each octave that the largest value of a sample may lie in, exact in any order of batches.

    Row g holds the samples whose bins are 2^(exponent - g) wide: half of them or more are in use. The last row holds
    all smaller samples as well, in bins of its own width. Row and bin depend on the sample and on the largest value of
    all samples alone. Counts are integers in two limbs, `upper * 2^20 + lower`. Zeros quantize exactly: they have no
    bin, and count among the entries alone.
    """

    range: RangeState  # real, [channels]
    exponent: Array  # int32 [channels], log2 of the bin width of row 0 in real
    lower: Array  # uint32 [channels, 8, 2, 512], below 2^20; [..., 0, :] counts x > 0, [..., 1, :] x < 0
    upper: Array  # uint32 [channels, 8, 2, 512]
    entries: Array  # uint32 [2]: the lower and the upper limb of the number of entries a channel


@cache
def nmse() -> Observer:
    """The scale of the smallest normalized squared error: the mean over samples of sum (x_hat - x)^2 / max |x|^2.

    `mse` adds up the errors of all samples, so that one of unusually large values decides. Here every sample counts
    the same. max |x| is rounded up to a power of two (and up to 1/128 of the largest of all samples), which lets the
    errors be computed from histograms: each entry is taken at the centre of one of 512 bins. Thresholds tried are the
    largest value times 2^(-k / 16), k = 0 .. 111.

    The counts are exact, so the scale depends neither on the size of batches nor on their order, and shards merge
    exactly. A graph with a fixed batch size counts as one sample what it computes in one call. A weight is one sample.

    Returns:
      An observer whose state is a `SampleHistogramState`. It is `per_sample`: data arrives as [channels, samples,
      entries].

    References:
      `mse` has those of the search; the mean over samples of an error relative to the signal is the NMSE of signal
      processing. `benchmarks/ptq_accuracy.py` compares it with the other observers.

    Example:
      >>> import jax.numpy as jnp
      >>> from jquant.observers import mse, nmse
      >>> from jquant.types import QuantSpec
      >>> ramp = jnp.linspace(-1.0, 1.0, 1001)
      >>> x = jnp.stack([ramp] * 20 + [ramp * 30])[None]  # 20 samples alike, and one of 30 times their range
      >>> spec, alike, plain = QuantSpec(dtype="int4"), nmse(), mse()
      >>> close = alike.finalize(alike.update(alike.init(1), x), spec)
      >>> wide = plain.finalize(plain.update(plain.init(1), x.reshape(1, -1)), spec)
      >>> bool(close[0] < wide[0] / 10)
      True
    """
    return Observer(_init, _update, _merge, _scale, name="nmse", per_sample=True)


def _init(channels: int) -> SampleHistogramState:
    counts: Any = np.zeros((channels, _OCTAVES, 2, _BINS), np.uint32)
    exponent: Any = np.full(channels, MIN_EXPONENT, np.int32)
    entries: Any = np.zeros(2, np.uint32)
    return SampleHistogramState(empty_range(channels), exponent, counts, counts, entries)


def _shift_rows(counts: Array, octaves: Array) -> Array:
    """Counts [8, 2, 512] after the largest value grew by so many octaves: what leaves the last row stays in it."""
    row, sign, bin_ = (jax.lax.broadcasted_iota(jnp.int32, counts.shape, axis) for axis in range(3))
    moved = row + octaves
    kept = jnp.minimum(moved, _OCTAVES - 1)
    return jnp.zeros_like(counts).at[kept, sign, bin_ >> jnp.minimum(moved - kept, 31)].add(counts)


@jax.jit
def _with_exponent(state: SampleHistogramState, exponent: Array) -> SampleHistogramState:
    octaves = exponent - state.exponent
    lower, upper = carry(
        jax.vmap(_shift_rows)(state.lower, octaves), jax.vmap(_shift_rows)(state.upper, octaves), _LIMB
    )
    return state._replace(exponent=exponent, lower=lower, upper=upper)


def _count(x: Array, row: Array, exponent: Array) -> Array:
    """[channels, samples, entries], the rows of samples and the exponents of row 0 to counts [channels, 8, 2, 512]."""
    bins = bin_of(x, (exponent[:, None] - row)[:, :, None])
    channel = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    index = (channel * _OCTAVES + row[:, :, None]) * (2 * _BINS) + jnp.where(x < 0, _BINS, 0) + bins
    counts = jnp.zeros(x.shape[0] * _OCTAVES * 2 * _BINS, jnp.uint32)
    return counts.at[index].add((x != 0).astype(jnp.uint32)).reshape(-1, _OCTAVES, 2, _BINS)


def _update(state: SampleHistogramState, x: Array) -> SampleHistogramState:
    x = flush(x)
    low, high = x.min(axis=2, initial=jnp.inf), x.max(axis=2, initial=-jnp.inf)
    needed = exponent_for(jnp.maximum(jnp.maximum(-low, high), 0.0), _BINS)  # [channels, samples]
    exponent = jnp.maximum(state.exponent, needed.max(axis=1, initial=MIN_EXPONENT))
    state = _with_exponent(state, exponent)
    row = jnp.minimum(exponent[:, None] - needed, _OCTAVES - 1)
    lower, upper = carry(state.lower + _count(x, row, exponent), state.upper, _LIMB)
    seen = RangeState(low.min(axis=1, initial=jnp.inf), high.max(axis=1, initial=-jnp.inf))
    entries = add_counts(state.entries, split_count(x.shape[1] * x.shape[2]))
    return SampleHistogramState(merge_range(state.range, seen), exponent, lower, upper, entries)


def _merge(a: SampleHistogramState, b: SampleHistogramState) -> SampleHistogramState:
    exponent = jnp.maximum(a.exponent, b.exponent)
    a, b = _with_exponent(a, exponent), _with_exponent(b, exponent)
    lower, upper = carry(a.lower + b.lower, a.upper + b.upper, _LIMB)
    return SampleHistogramState(merge_range(a.range, b.range), exponent, lower, upper, add_counts(a.entries, b.entries))


def _scale(state: SampleHistogramState, spec: QuantSpec) -> Array:
    limit = limit_of(state.range, spec)
    error = jax.lax.map(lambda share: _error(state, scale_for(limit * share, spec), spec), jnp.asarray(_THRESHOLDS))
    return scale_for(limit * jnp.asarray(_THRESHOLDS)[jnp.argmin(error, axis=0)], spec)


def _error(state: SampleHistogramState, scale: Array, spec: QuantSpec) -> Array:
    """sum of count * ((x_hat - x) / unit)^2 over the bin centres, [channels]; the unit is the upper end of a row."""
    centre = bin_centres(_BINS) / _BINS  # [2, bins], in units of each row
    octaves = np.float32(2.0 ** np.arange(_OCTAVES))
    step = divide(scale, power_of_two(state.exponent)) / _BINS
    step = (step[:, None] * octaves)[:, :, None, None]  # [channels, octaves, 1, 1]
    error = jnp.clip(jnp.round(divide(centre[None, None], step)), *map(float, spec.range)) * step - centre
    counts = state.upper.astype(jnp.float32) * 2.0**_LIMB + state.lower.astype(jnp.float32)
    return jnp.sum(counts * jnp.square(error), axis=(1, 2, 3))
