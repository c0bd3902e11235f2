"""The mean over samples of each sample's largest value, from a sum that is exact in any order."""

from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jquant.numerics.rounding import divide
from jquant.observers.base import RangeState, carry, clipped_scale, empty_range, flush, merge_range
from jquant.observers.moments import add_counts, count_of, significand, split_count, sum_of_fields
from jquant.types import Array, Observer, QuantSpec

_LIMB = 20
_FIELDS = 256  # values of the exponent field of a float32
_BYTES = 3  # of the significand
_PIECE = 2**20  # samples summed before a carry: 2^20 * 255 + 2^20 < 2^32


class MaximaState(NamedTuple):
    """Exact sums of the largest values of samples, so that neither batch size nor order matters.

    Row 0 has max(x, 0) of each sample, which is the limit of unsigned dtypes, row 1 has max |x|. Both are s * 2^(field
    - 150) with an integer s below 2^24; the samples of each exponent field have a sum of every byte of s, the lowest
    first, in two limbs: `upper * 2^20 + lower`, enough for 2^44 samples.
    """

    range: RangeState  # real, [channels], of all samples
    samples: Array  # uint32 [2]: the lower and the upper limb of the number of samples
    lower: Array  # uint32 [channels, 2, 256, 3], below 2^20
    upper: Array  # uint32 [channels, 2, 256, 3]


@cache
def mean_of_maxima() -> Observer:
    """The scale of the mean over samples of max |x|; of max(x, 0) for unsigned dtypes, which clip the rest to zero.

    A few samples with values far beyond those of the others hardly move it, whereas `min_max` takes its scale from the
    largest of them. Where a sample has few entries, or samples differ much, it clips what matters: half of the samples
    have a larger maximum.

    The sum is exact, so the scale depends neither on the size of batches nor on their order, and shards merge exactly;
    the mean is computed from it in float32, to about 2^-21 of itself. A graph with a fixed batch size counts as one
    sample what it computes in one call. Of a weight, the mean is the largest value.

    Returns:
      An observer whose state is a `MaximaState`. It is `per_sample`: data arrives as [channels, samples, entries].

    Example:
      >>> import jax.numpy as jnp
      >>> from jquant.observers import mean_of_maxima
      >>> from jquant.types import QuantSpec
      >>> observer = mean_of_maxima()
      >>> x = jnp.array([[[1.0, -2.0], [0.5, 0.25], [-9.5, 3.0]]])  # maxima 2, 0.5 and 9.5
      >>> scale = observer.finalize(observer.update(observer.init(1), x), QuantSpec(dtype="int8"))
      >>> round(float(scale[0]) * 127.5, 6)
      4.0
    """
    return Observer(_init, _update, _merge, _mean_scale, name="mean_of_maxima", per_sample=True)


def _init(channels: int) -> MaximaState:
    sums: Any = np.zeros((channels, 2, _FIELDS, _BYTES), np.uint32)
    count: Any = np.zeros(2, np.uint32)
    return MaximaState(empty_range(channels), count, sums, sums)


def _sums(peaks: Array) -> Array:
    """[samples] >= 0 to sums [256, 3]."""
    field = (jax.lax.bitcast_convert_type(peaks, jnp.int32) >> 23) & 0xFF
    s = significand(peaks)
    parts = jnp.stack([(s >> shift) & 0xFF for shift in (0, 8, 16)], axis=-1).astype(jnp.uint32)
    return jnp.zeros((_FIELDS, _BYTES), jnp.uint32).at[field].add(parts)


def _update(state: MaximaState, x: Array) -> MaximaState:
    x = flush(x)
    low, high = x.min(axis=2, initial=jnp.inf), x.max(axis=2, initial=-jnp.inf)
    positive = jnp.maximum(high, 0.0)
    peaks = jnp.stack([positive, jnp.maximum(positive, -low)], axis=1)  # [channels, 2, samples]
    lower, upper = state.lower, state.upper
    for start in range(0, peaks.shape[2], _PIECE):
        added = jax.vmap(jax.vmap(_sums))(peaks[:, :, start : start + _PIECE])
        lower, upper = carry(lower + added, upper, _LIMB)
    seen = RangeState(low.min(axis=1, initial=jnp.inf), high.max(axis=1, initial=-jnp.inf))
    count = add_counts(state.samples, split_count(x.shape[1]))
    return MaximaState(merge_range(state.range, seen), count, lower, upper)


def _merge(a: MaximaState, b: MaximaState) -> MaximaState:
    sums = carry(a.lower + b.lower, a.upper + b.upper, _LIMB)
    return MaximaState(merge_range(a.range, b.range), add_counts(a.samples, b.samples), *sums)


def _mean_scale(state: MaximaState, spec: QuantSpec) -> Array:
    row = 1 if spec.range[0] else 0
    largest = jnp.maximum(jnp.maximum(-state.range.low, state.range.high), 0.0)
    total, unit = sum_of_fields(state.lower[:, row], state.upper[:, row], largest)
    mean = flush(divide(total, count_of(state.samples)) * 2.0) * unit  # 2 * unit itself may be 2^128
    return clipped_scale(mean, state.range, spec)
