"""Scales chosen from a histogram: the percentile, the smallest error in an L_p norm, and the best of several."""

from fractions import Fraction
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from jquant.numerics import limbs
from jquant.numerics.limbs import Limbs
from jquant.numerics.rounding import divide
from jquant.observers.base import clipped_scale, last_smallest, limit_of, scale_for
from jquant.observers.divergence import kl
from jquant.observers.histograms import (
    HistogramState,
    all_samples,
    bin_centres,
    float_counts,
    histogram_observer,
    magnitude_counts,
    power_of_two,
    sum_counts,
    to_limbs,
)
from jquant.types import Array, Observer, QConfigError, QuantSpec

# ---------------------------------------------------------------------------------------------------------------------
# percentile

_SHARE_BITS = 30


def percentile(percentile: float = 99.99, *, bins: int = 2048) -> Observer:
    """The smallest bin edge that this share of the magnitudes lies below, zeros included; at most the largest one.

    Where that share holds nothing but zeros, the percentile is 0, which is no scale: the largest magnitude is taken.
    Unsigned dtypes clip negative values to zero, and so does the percentile. 100 is `min_max`.

    Args:
      percentile: of the samples, in percent, in (0, 100]. What lies above is rounded up to a multiple of 2^-30 of all
        samples.
      bins: per sign, a power of two from 2 to 4096. At least half of them are in use.

    Returns:
      An observer whose state is a `HistogramState`; `update` and `merge` are exact in any order.

    References:
      McKinstry et al. 2019, Discovering Low-Precision Networks Close to Full-Precision Networks for Efficient Embedded
      Inference.

    Example:
      >>> import jax.numpy as jnp
      >>> from jquant.observers import percentile
      >>> from jquant.types import QuantSpec
      >>> x = jnp.concatenate([jnp.linspace(-1.0, 1.0, 9999), jnp.array([100.0])])[None]
      >>> observer = percentile(99.9)
      >>> scale = observer.finalize(observer.update(observer.init(1), x), QuantSpec(dtype="int8"))
      >>> round(float(scale[0]) * 127.5, 4)  # the outlier made bins 1/16 wide
      1.0
    """
    if not 0 < percentile <= 100:
        raise QConfigError(f"percentile must be in (0, 100], not {percentile!r}")
    return _percentile(float(percentile), bins)


@cache
def _percentile(share: float, bins: int) -> Observer:
    choose = partial(_percentile_scale, above=_share_above(share))
    return histogram_observer("percentile", choose, bins, percentile=share)


def _share_above(share: float) -> int:
    """ceil((100 - share) / 100 * 2^30), of the decimal number as written."""
    exact = (100 - Fraction(str(share))) / 100 * 2**_SHARE_BITS
    return min(-(-exact.numerator // exact.denominator), 2**_SHARE_BITS - 1)


def _percentile_scale(state: HistogramState, spec: QuantSpec, above: int) -> Array:
    lower, upper = magnitude_counts(state, signed=spec.range[0] < 0)
    from_top = partial(jax.lax.cumsum, axis=1, reverse=True)
    beyond = to_limbs(
        *(jnp.pad(from_top(part)[:, 1:], ((0, 0), (0, 1))) for part in (lower, upper))
    )  # samples above bin i
    allowed = Limbs(*(v[:, None] for v in _share_of(all_samples(state), above)))
    first = jnp.argmax(_at_most(beyond, allowed), axis=1)
    edge = (first + 1).astype(jnp.float32) * power_of_two(state.exponent)
    only_zeros = _at_most(to_limbs(*sum_counts(lower, upper)), Limbs(*(v[:, 0] for v in allowed)))
    return clipped_scale(jnp.where(only_zeros, jnp.inf, edge), state.range, spec)


def _share_of(total: Limbs, share: int) -> Limbs:
    """floor(total * share / 2^30): total * (h * 2^15 + l), the lower product shifted before the two are added."""
    high, low = (limbs.multiply(total, jnp.int32(part)) for part in divmod(share, 2**15))
    fifteen = jnp.int32(15)
    return limbs.shift_right_floor(limbs.add(high, limbs.shift_right_floor(low, fifteen)), fifteen)


def _at_most(a: Limbs, b: Limbs) -> Array:
    low = (a.middle < b.middle) | ((a.middle == b.middle) & (a.low <= b.low))
    return (a.high < b.high) | ((a.high == b.high) & low)


# ---------------------------------------------------------------------------------------------------------------------
# norm, mse and histogram


def norm(p: float = 2.0, *, bins: int = 2048, candidates: int = 100) -> Observer:
    """The scale with the smallest L_p error, sum of |x_hat - x|^p, out of `candidates` clipping thresholds.

    Thresholds are `k / candidates * max(-min, max, 0)`, k = 1 .. candidates; the error of each is computed from a
    histogram, every sample taken at the centre of its bin. Of equal errors the largest threshold is taken. At least
    half of the bins are in use. With int16, a bin is wider than an LSB: the saturation error is still seen, the
    rounding error only on average.

    Args:
      p: in (0, 4]. 2 is `mse`; a larger one clips less, a smaller one more.
      bins: per sign, a power of two from 2 to 4096.
      candidates: thresholds tried, at least 1.

    Returns:
      An observer whose state is a `HistogramState`; `update` and `merge` are exact in any order.

    References:
      Nahshan et al. 2021, Loss Aware Post-Training Quantization, section 4 (the L_p-optimal step).

    Example:
      >>> import jax.numpy as jnp
      >>> from jquant.observers import norm
      >>> from jquant.types import QuantSpec
      >>> x = jnp.concatenate([jnp.linspace(-1.0, 1.0, 10001), jnp.array([4.0])])[None]
      >>> spec = QuantSpec(dtype="int4")
      >>> close, wide = (float(o.finalize(o.update(o.init(1), x), spec)[0]) for o in (norm(1.0), norm(4.0)))
      >>> close < wide
      True
    """
    if not 0 < p <= 4:
        raise QConfigError(f"p must be in (0, 4], not {p!r}")
    return _search("norm", float(p), bins, candidates)


def mse(bins: int = 2048, candidates: int = 100) -> Observer:
    """The scale with the smallest expected squared error, out of `candidates` clipping thresholds: `norm(2)`.

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
    return _search("mse", 2.0, bins, candidates)


def histogram(bins: int = 2048) -> Observer:
    """Keeps a histogram from which `jq.calibration.reset_scale` derives other scales; the scale of `mse` until then.

    Any of `percentile`, `mse`, `norm`, `kl` and `mix` keeps the same histogram: this one says that no method is meant.

    Args:
      bins: per sign, a power of two from 2 to 4096.

    Returns:
      An observer whose state is a `HistogramState`; `update` and `merge` are exact in any order.

    Example:
      >>> import jax.numpy as jnp
      >>> from jquant.observers import histogram
      >>> observer = histogram(bins=8)
      >>> state = observer.update(observer.init(1), jnp.array([[0.0, 0.5, 1.0, -3.5]]))
      >>> float(2.0 ** state.exponent[0]), state.lower[0].tolist(), state.zeros[0].tolist()
      (0.5, [[0, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 1]], [1, 0])
    """
    return _search("histogram", 2.0, bins, 100)


def _search(name: str, p: float, bins: int, candidates: int) -> Observer:
    if candidates < 1:
        raise QConfigError(f"candidates must be at least 1, not {candidates!r}")
    return _cached_search(name, p, int(bins), int(candidates))


@cache
def _cached_search(name: str, p: float, bins: int, candidates: int) -> Observer:
    told = {"histogram": (), "mse": ("candidates",), "norm": ("p", "candidates")}[name]
    options = {key: value for key, value in (("p", p), ("candidates", candidates)) if key in told}
    return histogram_observer(name, partial(_norm_scale, p=p, candidates=candidates), bins, **options)


def _norm_scale(state: HistogramState, spec: QuantSpec, p: float, candidates: int) -> Array:
    limit = limit_of(state.range, spec)
    fractions = jnp.asarray(np.arange(1, candidates + 1) / candidates, jnp.float32)

    def error(fraction: Array) -> Array:
        return quantization_error(state, scale_for(limit * fraction, spec), spec, p)

    best = last_smallest(jax.lax.map(error, fractions))  # one candidate at a time: [channels, 2, bins] in memory
    return scale_for(limit * fractions[best], spec)


def quantization_error(state: HistogramState, scale: Array, spec: QuantSpec, p: float) -> Array:
    """sum of count * |x_hat - x|^p over the bin centres, [channels], in units that the scale does not change.

    The unit is the upper end of the histogram, so that no power of an error overflows or vanishes.
    """
    bins = state.lower.shape[-1]
    centre = bin_centres(bins) / bins
    step = (divide(scale, power_of_two(state.exponent)) / bins)[:, None, None]
    error = jnp.abs(jnp.clip(jnp.round(divide(centre[None], step)), *map(float, spec.range)) * step - centre)
    powered = jnp.square(error) if p == 2 else error if p == 1 else jnp.power(error, p)
    return jnp.sum(float_counts(state) * powered, axis=(1, 2))


# ---------------------------------------------------------------------------------------------------------------------
# mix


def mix(*methods: Observer) -> Observer:
    """The best of several methods: the scale with the smallest squared error, on the one histogram of all.

    Args:
      *methods: at least two of `percentile`, `mse`, `norm`, `kl` and `histogram`, with the same number of bins; by
        default percentile(100), percentile(99.99), mse() and kl(). Of equal errors the largest scale is taken.

    Returns:
      An observer whose state is a `HistogramState`; `update` and `merge` are exact in any order.

    Example:
      >>> import jax.numpy as jnp
      >>> from jquant.observers import mix, percentile
      >>> from jquant.types import QuantSpec
      >>> x = jnp.concatenate([jnp.linspace(-1.0, 1.0, 10001), jnp.array([4.0])])[None]
      >>> wide, close = percentile(100), percentile(99)
      >>> state = wide.update(wide.init(1), x)
      >>> spec = QuantSpec(dtype="int4")
      >>> bool(mix(wide, close).finalize(state, spec) == close.finalize(state, spec))
      True
    """
    methods = methods or (percentile(100.0), percentile(99.99), mse(), kl())
    if len(methods) < 2:
        raise QConfigError(f"mix takes at least two methods, not {len(methods)}; use the method itself")
    states = [jax.eval_shape(partial(method.init, 1)) for method in methods]
    for method, state in zip(methods, states, strict=True):
        if not isinstance(state, HistogramState):
            raise QConfigError(f"{method.name} keeps no histogram: mix percentile, mse, norm, kl or histogram")
    bins = [state.lower.shape[-1] for state in states]
    if len(set(bins)) > 1:
        raise QConfigError(f"the methods of a mix share one histogram, but have {bins} bins; give all the same")
    return _mix(methods, bins[0])


@cache
def _mix(methods: tuple[Observer, ...], bins: int) -> Observer:
    options = {f"{i}.{m.name}.{key}": value for i, m in enumerate(methods) for key, value in m.options if key != "bins"}
    return histogram_observer("mix", partial(_best_scale, methods=methods), bins, **options)


def _best_scale(state: HistogramState, spec: QuantSpec, methods: tuple[Observer, ...]) -> Array:
    scales = jnp.stack([method.finalize(state, spec) for method in methods])
    errors = jnp.stack([quantization_error(state, scale, spec, 2.0) for scale in scales])
    broken = jnp.isnan(errors).any(axis=0)  # by NaN or infinity in the data, which must reach the scale
    return jnp.where(broken, scales[0], jnp.max(scales, axis=0, where=errors == errors.min(axis=0), initial=0.0))
