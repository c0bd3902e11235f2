"""The error of a value as counts, extremes and sums, and the numbers made of them."""

from typing import Any, NamedTuple

import jax
import numpy as np

from jquant.analysis.metrics import FLOOR, Histogram, difference, histogram, kl_of
from jquant.types import Array, QuantSpec


class Statistics(NamedTuple):
    """Of the elements of `a` and `b`, real. Sums of numpy arrays are float64, of arrays of several devices float32;
    those of many batches have terms of float32.

    `is_masked`  every element is left out by a mask: counts only where all batches are so
    `size`, `saturated`, `differing`      counts
    `signal`, `b_signal`, `product`, `noise`, `off`   sums of a^2, b^2, a b, (b - a)^2, |b - a|
    `own_signal`, `own_noise`             sums of alone^2, (b - alone)^2
    """

    is_masked: Any
    size: Any
    minimum: Any
    maximum: Any
    b_minimum: Any
    b_maximum: Any
    signal: Any
    b_signal: Any
    product: Any
    noise: Any
    off: Any
    max_error: Any
    max_lsb: Any
    saturated: Any
    differing: Any
    own_signal: Any = None
    own_noise: Any = None
    own_max_error: Any = None
    own_max_lsb: Any = None


def measured(
    a: Array, b: Array, alone: Array | None, step: Array | None, spec: QuantSpec | None, is_masked: bool = False
) -> tuple[Statistics, Histogram]:
    """Of one batch, on the host. `alone` is what a's node makes of b's operands; `step` (real per LSB) broadcasts.

    Arrays of several devices are measured by one program, which ends before the next begins: host devices share few
    threads, where the collectives of programs in flight can wait for each other for ever.
    """
    if any(isinstance(each, jax.Array) for each in (a, b)):
        return jax.tree.map(np.asarray, jax.device_get(_compiled(a, b, alone, step, spec=spec, is_masked=is_masked)))
    return _measured(a, b, alone, step, spec, is_masked)


def _measured(
    a: Array, b: Array, alone: Array | None, step: Array | None, spec: QuantSpec | None, is_masked: bool
) -> tuple[Statistics, Histogram]:
    error = abs(difference(a, b))
    own = None if alone is None else abs(difference(alone, b))
    sums = Statistics(
        is_masked=is_masked,
        size=int(np.prod(a.shape)),
        minimum=a.min(),
        maximum=a.max(),
        b_minimum=b.min(),
        b_maximum=b.max(),
        signal=_product(a, a),
        b_signal=_product(b, b),
        product=_product(a, b),
        noise=_product(error, error),
        off=_total(error),
        max_error=error.max(),
        max_lsb=None if step is None else (error / step).max(),
        saturated=None if step is None or spec is None else _saturated(a, step, spec),
        differing=(error > (0.0 if step is None else step * 0.5)).sum(),
        own_signal=None if alone is None else _product(alone, alone),
        own_noise=None if own is None else _product(own, own),
        own_max_error=None if own is None else own.max(),
        own_max_lsb=None if own is None or step is None else (own / step).max(),
    )
    return sums, histogram(a, b)


_compiled = jax.jit(_measured, static_argnames=("spec", "is_masked"))


def numbers_of(of: Statistics, step: Array | None, counts: Histogram) -> dict[str, Any]:
    """The numbers of a row; `counts` is over all elements."""
    norms = np.sqrt(np.float64(of.signal)) * np.sqrt(np.float64(of.b_signal))
    return {
        "scale": None if step is None else step.max(),
        "minimum": of.minimum,
        "maximum": of.maximum,
        "b_minimum": of.b_minimum,
        "b_maximum": of.b_maximum,
        "cosine": of.product / norms if norms > 0 else 1.0,
        "sqnr": _decibels(of.signal, of.noise, of.size),
        "mse": of.noise / of.size,
        "l1": of.off / of.size,
        "kl": kl_of(counts),
        "max_error": of.max_error,
        "max_lsb": of.max_lsb,
        "saturated": None if of.saturated is None else of.saturated / of.size,
        "differing": of.differing / of.size,
        "own_sqnr": None if of.own_signal is None else _decibels(of.own_signal, of.own_noise, of.size),
        "own_max_error": of.own_max_error,
        "own_max_lsb": of.own_max_lsb,
        "histogram": counts,
    }


def _product(x: Any, y: Any) -> Any:
    """The sum of x y, in float64 where there is one, without arrays of float64."""
    if isinstance(x, np.ndarray):
        return np.einsum("i,i->", x.ravel(), y.ravel(), dtype=np.float64)
    return (x * y).sum()


def _total(x: Any) -> Any:
    return x.sum(dtype=np.float64) if isinstance(x, np.ndarray) else x.sum()


def _decibels(signal: Any, noise: Any, size: Any) -> Any:
    return 10 * np.log10(np.maximum(signal / size, FLOOR) / np.maximum(noise / size, FLOOR))


def _saturated(a: Array, step: Array, spec: QuantSpec) -> Any:
    low, high = spec.range
    return ((a < (low - 0.5) * step) | (a > (high + 0.5) * step)).sum()
