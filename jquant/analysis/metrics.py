"""How far one array is from another: the metrics that comparison and sensitivity share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jquant.numerics.namespace import array_namespace
from jquant.text import did_you_mean
from jquant.types import Array, JQuantError

BINS = 64
FLOOR = 1e-30  # of powers, so that two equal arrays have a finite signal-to-noise ratio

MetricFunction = Callable[[Array, Array], Array]


class Histogram(NamedTuple):
    """Counts of two arrays over the same bins of equal width, from `low` to `high` (real)."""

    low: Array
    high: Array
    a: Array
    b: Array


def cosine(a: Array, b: Array) -> Array:
    """Cosine of the angle between two arrays as vectors; 1 where either is zero."""
    xp = array_namespace(a, b)
    # Scaled first: the product of two sums of squares overflows float32 for values near 1e10.
    peak_a, peak_b = xp.max(xp.abs(a)), xp.max(xp.abs(b))
    a, b = a / xp.where(peak_a > 0, peak_a, 1.0), b / xp.where(peak_b > 0, peak_b, 1.0)
    norms = xp.sqrt(xp.sum(a * a)) * xp.sqrt(xp.sum(b * b))
    return xp.where(norms > 0, xp.sum(a * b) / xp.where(norms > 0, norms, 1.0), 1.0)


def sqnr(a: Array, b: Array) -> Array:
    """Signal to quantization noise, dB: 10 log10(sum a^2 / sum (b - a)^2)."""
    xp = array_namespace(a, b)
    return 10 * xp.log10(xp.maximum(xp.mean(a * a), FLOOR) / xp.maximum(mse(a, b), FLOOR))


def difference(a: Array, b: Array) -> Array:
    """b - a, and 0 where they are equal.

    Inside a jit, XLA may contract the product that made b with the subtraction, and leave a rounding error of it.
    """
    return array_namespace(a, b).where(a == b, 0.0, b - a)


def mse(a: Array, b: Array) -> Array:
    """Mean squared error, real^2."""
    return array_namespace(a, b).square(difference(a, b)).mean()


def l1(a: Array, b: Array) -> Array:
    """Mean absolute error, real."""
    return abs(difference(a, b)).mean()


def max_error(a: Array, b: Array) -> Array:
    """Largest absolute error, real."""
    return abs(difference(a, b)).max()


def kl(a: Array, b: Array) -> Array:
    """Kullback-Leibler divergence, nats, of the histogram of a from that of b: 64 bins over their joint range.

    A count of 0 is taken as 1/1000 of a sample, so that the divergence stays finite.
    """
    return kl_of(histogram(a, b))


def kl_of(counts: Histogram) -> Array:
    xp = array_namespace(counts.a, counts.b)
    p, q = (xp.maximum(n.astype(np.float32), 1e-3) for n in (counts.a, counts.b))
    p, q = p / p.sum(), q / q.sum()
    return xp.maximum(xp.sum(p * xp.log(p / q)), 0.0)


def histogram(a: Array, b: Array) -> Histogram:
    """Both arrays over the same bins."""
    xp = array_namespace(a, b)
    low, high = xp.minimum(a.min(), b.min()), xp.maximum(a.max(), b.max())
    return Histogram(low, high, *(_count(x, low, high) for x in (a, b)))


def places(x: Array, low: Array, high: Array) -> Array:
    """The bin of each element, int32 of the shape of x."""
    xp = array_namespace(x)
    width = xp.where(high > low, (high - low) / BINS, 1.0)
    return ((x - low) / width).astype(np.int32).clip(0, BINS - 1)


def _count(x: Array, low: Array, high: Array) -> Array:
    place = places(x, low, high).reshape(-1)
    xp: Any = array_namespace(x)
    return xp.bincount(place, minlength=BINS) if xp is np else jnp.zeros(BINS, jnp.int32).at[place].add(1)


METRICS: dict[str, MetricFunction] = {
    "cosine": cosine,
    "sqnr": sqnr,
    "mse": mse,
    "l1": l1,
    "kl": kl,
    "max_error": max_error,
}
HIGHER_IS_BETTER = frozenset({"cosine", "sqnr"})


def metric_of(metric: str | MetricFunction) -> tuple[str, MetricFunction]:
    """The name and the function of a metric.

    One of the user's own is `f(baseline, other) -> scalar`, made of jax operations, larger being worse.

    Raises:
      JQuantError: an unknown name.
    """
    if callable(metric):
        return getattr(metric, "__name__", "custom"), metric
    if metric not in METRICS:
        known = ", ".join(METRICS)
        raise JQuantError(f"unknown metric {metric!r}; known: {known}{did_you_mean(str(metric), METRICS)}")
    return metric, METRICS[metric]


def badness(name: str, value: float) -> float:
    """A metric as an error, larger being worse, that adds up over independent sources where the metric allows it.

    A signal-to-noise ratio becomes the noise as a share of the signal, a cosine its distance from 1.
    """
    if name == "sqnr":
        return 10 ** (-value / 10)
    return 1 - value if name == "cosine" else value
