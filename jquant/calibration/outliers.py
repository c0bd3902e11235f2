"""Outlier layers: values whose largest entries are so far beyond nearly all others that 8 bits cannot hold both."""

import warnings
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jquant.calibration.observe import Stats
from jquant.observers import HistogramState, SampleHistogramState
from jquant.text import format_table
from jquant.types import Model, OutlierWarning

RATIO = 8.0  # 3 of 8 bits
SHARE = 1e-4  # of the entries, which the percentile leaves out
_LIMB = 20
_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class Outlier:
    """A value, its largest |x| and the 99.99 percentile of |x|, both real, and its format."""

    name: str
    largest: float
    percentile: float
    dtype: str

    @property
    def ratio(self) -> float:
        return self.largest / self.percentile


@dataclass(frozen=True)
class Outliers:
    """Outlier values, in the order of the graph; `print` shows them as a table."""

    all: tuple[Outlier, ...]

    def __str__(self) -> str:
        rows = [(o.name, o.dtype, f"{o.largest:.4g}", f"{o.percentile:.4g}", f"{o.ratio:.1f}") for o in self.all]
        return format_table(("value", "dtype", "largest", "99.99 percentile", "ratio"), rows)


def find_outliers(model: Model, stats: Stats, *, ratio: float = RATIO) -> Outliers:
    """Values whose largest entry is more than `ratio` times the 99.99 percentile of their magnitudes.

    A scale that covers the largest entry leaves the others 3 bits less; one that does not saturates it. The remedies
    are int16 for the value, or splitting the channels with the outliers off into a value of their own. A value that is
    zero almost everywhere, with a percentile of 0, is none.

    Args:
      model: what `prepare` returned.
      stats: what `collect` returned. Only observers that keep a histogram tell: `nmse`, `histogram`, `percentile`,
        `mse`, `norm`, `kl` and `mix`. Of 10,000 entries or fewer the percentile is the largest one.
      ratio: more than 1.

    Example:
      stats = jq.calibration.collect(model, batches)
      found = jq.calibration.find_outliers(model, stats)
      wide = {o.name: jq.Policy(output=jq.int16()) for o in found.all}
      model = jq.prepare(graph, params, jq.QConfig({**rules, **wide}), target=target)
    """
    plan, found = model.plan, []
    for name, state in stats.items():
        if not isinstance(state, HistogramState | SampleHistogramState):
            continue
        largest, percentile = _largest_and_percentile(jax.device_get(state))
        if largest > ratio * percentile > 0:
            dtype = plan.spec(name).dtype
            found.append(Outlier(name=name, largest=largest, percentile=percentile, dtype=dtype))
    return Outliers(tuple(found))


def warn_of_outliers(model: Model, stats: Stats) -> None:
    """Names the outlier values that have 8 bits or less."""
    found = [o for o in find_outliers(model, stats).all if model.plan.spec(o.name).bits <= 8]
    if not found:
        return
    shown = ", ".join(f"{o.name} ({o.ratio:.0f} times)" for o in found[:_SHOWN])
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    warnings.warn(
        f"the largest entry is over {RATIO:g} times the 99.99 percentile in {shown}{more}: 8 bits hold either the "
        "outliers or the rest. Give these values int16 with a rule of the qconfig, or split the channels with the "
        "outliers off; jq.calibration.find_outliers(model, stats) has the numbers",
        OutlierWarning,
        stacklevel=3,
    )


def _largest_and_percentile(state: HistogramState | SampleHistogramState) -> tuple[float, float]:
    """The largest |x|, and the smallest edge of a bin that at most `SHARE` of all entries lie beyond."""
    largest = max(-float(state.range.low[0]), float(state.range.high[0]), 0.0)
    counts = _whole(state.lower[0], state.upper[0])  # [2, bins], or [octaves, 2, bins]
    exponent = float(state.exponent[0]) - np.arange(counts.size // (2 * counts.shape[-1]))
    edges = np.exp2(exponent)[:, None] * np.arange(1, counts.shape[-1] + 1)  # [octaves, bins]
    by_bin = counts.reshape(-1, 2, counts.shape[-1]).sum(1)
    if isinstance(state, HistogramState):
        total = by_bin.sum() + _whole(*state.zeros[0])
    else:
        total = _whole(*state.entries)
    if by_bin.sum() <= SHARE * total:
        return largest, 0.0
    order = np.argsort(-edges, axis=None)  # from the top
    beyond = np.cumsum(by_bin.reshape(-1)[order]) - by_bin.reshape(-1)[order]
    first = int(np.flatnonzero(beyond <= SHARE * total)[-1])
    return largest, float(min(edges.reshape(-1)[order[first]], largest))


def _whole(lower: Any, upper: Any) -> np.ndarray:
    return np.asarray(upper).astype(np.int64) * 2**_LIMB + np.asarray(lower).astype(np.int64)
