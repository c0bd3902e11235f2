"""The scale whose quantized distribution is nearest to that of the data, by Kullback-Leibler divergence."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from jquant.numerics import limbs
from jquant.numerics.limbs import Limbs
from jquant.numerics.rounding import divide
from jquant.observers.base import last_smallest, limit_of, scale_for
from jquant.observers.histograms import (
    HistogramState,
    bin_centres,
    histogram_observer,
    magnitude_counts,
    power_of_two,
    sum_counts,
    to_limbs,
)
from jquant.types import Array, Observer, QConfigError, QuantSpec


def kl(bins: int = 2048, *, candidates: int = 100) -> Observer:
    """The scale with the smallest KL divergence from the data to the quantized data, out of clipping thresholds.

    Thresholds are `k / candidates * max(-min, max, 0)`. P is the histogram up to the threshold, the bin that holds it
    included, with the samples beyond added to its outermost filled bin of their sign. Q spreads the samples of each
    integer evenly over the filled bins that quantize to it, without those beyond. Both are normalised. Zeros, and
    for unsigned dtypes negative values, are left out: they do not depend on the scale.

    A threshold at which every filled bin has an integer of its own says nothing, since Q is then P: it is no candidate.
    Of equal divergences the largest threshold is taken. So data of few values, and int16, whose integers are finer than
    the bins, have the scale of `min_max`.

    Args:
      bins: per sign, a power of two from 2 to 4096.
      candidates: thresholds tried, at least 1.

    Returns:
      An observer whose state is a `HistogramState`; `update` and `merge` are exact in any order.

    References:
      Migacz 2017, 8-bit Inference with TensorRT.

    Example:
      >>> import jax.numpy as jnp
      >>> from jquant.observers import kl, min_max
      >>> from jquant.types import QuantSpec
      >>> x = jnp.concatenate([jnp.linspace(-1.0, 1.0, 10001), jnp.array([4.0])])[None]
      >>> spec = QuantSpec(dtype="int4")
      >>> plain, best = (o.finalize(o.update(o.init(1), x), spec) for o in (min_max(), kl()))
      >>> bool(best[0] < plain[0])
      True
    """
    if candidates < 1:
        raise QConfigError(f"candidates must be at least 1, not {candidates!r}")
    return _kl(int(bins), int(candidates))


@cache
def _kl(bins: int, candidates: int) -> Observer:
    return histogram_observer("kl", partial(_kl_scale, candidates=candidates), bins, candidates=candidates)


def _kl_scale(state: HistogramState, spec: QuantSpec, candidates: int) -> Array:
    limit = limit_of(state.range, spec)
    fractions = jnp.asarray(np.arange(1, candidates + 1) / candidates, jnp.float32)
    counts, width = _line(_int32_counts(state, signed=spec.range[0] < 0)), power_of_two(state.exponent)
    divergence = jax.vmap(partial(_divergence, spec=spec))

    def of_fraction(fraction: Array) -> Array:
        threshold = limit * fraction
        return divergence(counts, divide(threshold, width), divide(scale_for(threshold, spec), width))

    best = last_smallest(jax.lax.map(of_fraction, fractions))
    return scale_for(limit * fractions[best], spec)


def _int32_counts(state: HistogramState, *, signed: bool) -> Array:
    """Counts [channels, 2, bins] in int32, halved until all together are below 2^31: exact sums in any order."""
    total = to_limbs(*sum_counts(*magnitude_counts(state, signed=signed)))
    upper = (total.high << 1) | (total.middle >> 15)  # what is above 31 bits
    shift = jnp.where(upper > 0, 32 - jax.lax.clz(upper), 0)[:, None, None]
    counts = limbs.shift_right_floor(to_limbs(state.lower, state.upper), shift)
    kept = _join(counts)
    return kept if signed else kept.at[:, 1].set(0)


def _join(counts: Limbs) -> Array:
    return (counts.middle << 16) | counts.low


def _line(rows: Array) -> Array:
    """[..., 2, bins] to [..., 2 * bins] in the order of x: the negative side turned round, then the positive one."""
    return jnp.concatenate([rows[..., 1, ::-1], rows[..., 0, :]], axis=-1)


def _divergence(counts: Array, threshold: Array, scale: Array, spec: QuantSpec) -> Array:
    """KL(P || Q) of one channel, infinite where Q is P in any case: counts [2 * bins], the others in bin widths."""
    centre = _line(bin_centres(counts.shape[0] // 2))
    inside = jnp.abs(centre) - 0.5 <= threshold
    level = jnp.clip(jnp.round(divide(centre, scale)), *map(float, spec.range))
    group = jnp.cumsum(jnp.pad(level[1:] != level[:-1], (1, 0)).astype(jnp.int32))
    kept = jnp.where(inside, counts, 0)
    filled = kept > 0
    mass, size = (jnp.zeros_like(counts).at[group].add(v)[group] for v in (kept, filled.astype(jnp.int32)))
    q = jnp.where(filled, divide(mass.astype(jnp.float32), jnp.maximum(size, 1).astype(jnp.float32)), 0.0)
    p = (kept + _outliers(counts, kept, centre)).astype(jnp.float32)
    # Each normalised by its exact sum: all samples, and those inside.
    p, q = (v / jnp.maximum(n.sum(), 1).astype(jnp.float32) for v, n in ((p, counts), (q, kept)))
    # p log(p / q) - p + q, of which the last two cancel in the sum, is positive and small where p is near q.
    r = divide(p - q, jnp.where(q > 0, q, 1.0))
    terms = jnp.where(q > 0, q * ((1.0 + r) * jnp.log1p(r) - r), jnp.where(p > 0, jnp.inf, 0.0))
    says_something = (filled & (size > 1)).any()
    return jnp.where(says_something, jnp.sum(terms), jnp.inf)


def _outliers(counts: Array, kept: Array, centre: Array) -> Array:
    """The samples beyond the threshold, [2 * bins], at the outermost filled bin of their sign."""
    index = jnp.arange(counts.shape[0])
    filled = kept > 0
    found = jnp.zeros_like(counts)
    for side, edge in ((centre > 0, index.shape[0] - 1), (centre < 0, 0)):
        here = filled & side
        outermost = jnp.argmin(jnp.where(here, jnp.abs(index - edge), index.shape[0]))
        outermost = jnp.where(here.any(), outermost, edge)  # none filled: there q is 0, the divergence infinite
        found = found.at[outermost].add(jnp.where(side, counts - kept, 0).sum())
    return found
