"""A histogram of magnitudes that merges exactly, and the observer made of it and of a way to choose a scale."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jquant.numerics.limbs import MASK, Limbs
from jquant.observers.base import RangeState, carry, empty_range, flush, merge_range, range_of
from jquant.types import Array, Observer, QConfigError, QuantSpec

_LIMB = 20  # bits of the lower limb: bins * 2^20 <= 2^32, so that all bins may be summed before the carry
_MAX_BINS = 2**12
MIN_EXPONENT = -40  # narrower bins than 2^-40 would tell apart only what the smallest scale, 2^-23, rounds to zero


class HistogramState(NamedTuple):
    """A histogram of |x| that is exact in any order of batches.

    A bin is [i, i + 1) * 2^exponent. Bin edges of a larger exponent are edges of every smaller one, and the exponent is
    the smallest that holds the largest value so far, so the counts depend on the set of samples alone. Counts are
    integers in two limbs, `upper * 2^20 + lower`, enough for 2^52 samples a bin. Zeros quantize exactly: they are
    counted apart.
    """

    range: RangeState  # real, [channels]
    exponent: Array  # int32 [channels], log2 of the bin width in real
    lower: Array  # uint32 [channels, 2, bins], below 2^20; row 0 counts x > 0, row 1 x < 0
    upper: Array  # uint32 [channels, 2, bins]
    zeros: Array  # uint32 [channels, 2]: the lower and the upper limb of the number of zeros


Choose = Callable[[HistogramState, QuantSpec], Array]  # scales [channels], real per LSB


def histogram_observer(name: str, choose: Choose, bins: int, **options: float) -> Observer:
    """The observer that keeps a histogram and takes its scale from `choose`."""
    if not (2 <= bins <= _MAX_BINS and bins == 2 ** (int(bins).bit_length() - 1)):
        raise QConfigError(f"bins must be a power of two from 2 to {_MAX_BINS}, not {bins!r}")
    return Observer(
        partial(_init, bins=int(bins)),
        _update,
        _merge,
        choose,
        name=name,
        options=(("bins", int(bins)), *options.items()),
    )


def exponent_for(limit: Array, bins: int) -> Array:
    """The smallest exponent for which `bins` bins reach beyond limit >= 0."""
    field = (jax.lax.bitcast_convert_type(limit, jnp.int32) >> 23) & 0xFF
    return jnp.maximum(field - 126 - (bins.bit_length() - 1), MIN_EXPONENT)


def power_of_two(exponent: Array) -> Array:
    """2^exponent as float32, for int32 exponents from -126 to 127."""
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def bin_of(x: Array, exponent: Array) -> Array:
    """floor(|x| / 2^exponent) on the bits of x, exact: the significand, shifted."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    significand = (bits & 0x7FFFFF) | 0x800000  # |x| = significand * 2^(field - 150)
    field = (bits >> 23) & 0xFF
    return significand >> jnp.clip(exponent - field + 150, 0, 31)


def _count(x: Array, exponent: Array, bins: int) -> Array:
    """[samples] and one exponent to counts [2, bins] by sign."""
    index = jnp.where(x < 0, bins, 0) + bin_of(x, exponent)
    return jnp.zeros(2 * bins, jnp.uint32).at[index].add((x != 0).astype(jnp.uint32)).reshape(2, bins)


def _widen_bins(counts: Array, steps: Array) -> Array:
    """Adds bins in groups of 2^steps: counts [2, bins] of width w to counts of width w * 2^steps."""
    target = jnp.arange(counts.shape[1]) >> jnp.minimum(steps, 31)
    return jnp.zeros_like(counts).at[:, target].add(counts)


def _with_exponent(state: HistogramState, exponent: Array) -> HistogramState:
    """The same samples in wider bins."""
    widen = partial(jax.vmap(_widen_bins), steps=exponent - state.exponent)
    lower, upper = carry(widen(state.lower), widen(state.upper), _LIMB)
    return state._replace(exponent=exponent, lower=lower, upper=upper)


def _init(channels: int, bins: int) -> HistogramState:
    counts: Any = np.zeros((channels, 2, bins), np.uint32)
    exponent: Any = np.full(channels, MIN_EXPONENT, np.int32)
    zeros: Any = np.zeros((channels, 2), np.uint32)
    return HistogramState(empty_range(channels), exponent, counts, counts, zeros)


def _add_zeros(zeros: Array, lower: Array, upper: Array) -> Array:
    return jnp.stack(carry(zeros[:, 0] + lower, zeros[:, 1] + upper, _LIMB), axis=1)


def _update(state: HistogramState, x: Array) -> HistogramState:
    bins = state.lower.shape[-1]
    x, seen = flush(x), range_of(x)
    limit = jnp.maximum(jnp.maximum(-seen.low, seen.high), 0.0)
    exponent = jnp.maximum(state.exponent, exponent_for(limit, bins))
    state = _with_exponent(state, exponent)
    added = jax.vmap(partial(_count, bins=bins))(x, exponent)
    lower, upper = carry(state.lower + added, state.upper, _LIMB)
    zeros = _add_zeros(state.zeros, *carry((x == 0).sum(axis=1, dtype=jnp.uint32), jnp.uint32(0), _LIMB))
    return HistogramState(merge_range(state.range, seen), exponent, lower, upper, zeros)


def _merge(a: HistogramState, b: HistogramState) -> HistogramState:
    exponent = jnp.maximum(a.exponent, b.exponent)
    a, b = _with_exponent(a, exponent), _with_exponent(b, exponent)
    lower, upper = carry(a.lower + b.lower, a.upper + b.upper, _LIMB)
    zeros = _add_zeros(a.zeros, b.zeros[:, 0], b.zeros[:, 1])
    return HistogramState(merge_range(a.range, b.range), exponent, lower, upper, zeros)


# ---------------------------------------------------------------------------------------------------------------------
# Reading a histogram


def bin_centres(bins: int) -> Array:
    """[2, bins], in bin widths: i + 1/2 for x > 0, its negative for x < 0."""
    centre = jnp.arange(bins, dtype=jnp.float32) + 0.5
    return jnp.stack([centre, -centre])


def float_counts(state: HistogramState) -> Array:
    """Counts [channels, 2, bins] as float32."""
    return state.upper.astype(jnp.float32) * 2.0**_LIMB + state.lower.astype(jnp.float32)


def to_limbs(lower: Array, upper: Array) -> Limbs:
    """A count in two limbs, brought into range, to the limbs of `jquant.numerics`; below 2^48."""
    low, high = (v.astype(jnp.int32) for v in carry(lower, upper, _LIMB))
    return Limbs(low & MASK, ((high << 4) | (low >> 16)) & MASK, high >> 12)


def magnitude_counts(state: HistogramState, *, signed: bool) -> tuple[Array, Array]:
    """Two limbs, [channels, bins], of |x|; of x > 0 alone for unsigned dtypes, which clip the rest to zero."""
    if not signed:
        return state.lower[:, 0], state.upper[:, 0]
    return carry(state.lower.sum(axis=1, dtype=jnp.uint32), state.upper.sum(axis=1, dtype=jnp.uint32), _LIMB)


def sum_counts(lower: Array, upper: Array) -> tuple[Array, Array]:
    """The sum over the last axis, at most 4096 bins, in two limbs."""
    return carry(lower.sum(axis=-1, dtype=jnp.uint32), upper.sum(axis=-1, dtype=jnp.uint32), _LIMB)


def all_samples(state: HistogramState) -> Limbs:
    """The number of samples, zeros included, [channels], below 2^48."""
    lower, upper = sum_counts(*magnitude_counts(state, signed=True))
    return to_limbs(lower + state.zeros[:, 0], upper + state.zeros[:, 1])
