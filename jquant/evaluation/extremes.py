"""Metrics of extremes: the largest number and the worst samples of some data, exact for any batches and devices.

On the devices a batch is cut down to what it may contribute; `merge` joins two such parts on the host.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jquant.evaluation.metrics import labels_of
from jquant.types import Array, InputError


@dataclass(frozen=True, kw_only=True)
class Largest:
    """The largest of all numbers, NaN where one of them is.

    Attributes:
      of: `(outputs, batch) -> [N, ...]`, the numbers of each sample, in any unit.
      against: a mode, such as "float", whose outputs take the place of the batch.

    Example:
      >>> import numpy as np, jquant as jq
      >>> batches = [np.float32([[1, 3], [2, 4]]), np.float32([[8, 5]])]
      >>> largest = jq.evaluation.Largest(of=lambda outputs, batch: outputs - batch)
      >>> jq.evaluate(lambda x: 2 * x, batches, {"largest": largest}, inputs=lambda x: (x,)).figures
      {'largest': 8.0}
    """

    of: Callable[[Any, Any], Array]
    against: str | None = None

    def measure(self, outputs: Any, batch: Any, mask: Array) -> Array:
        values = jnp.asarray(self.of(outputs, batch))
        lowest = -jnp.inf if jnp.issubdtype(values.dtype, jnp.floating) else jnp.iinfo(values.dtype).min
        kept = mask.reshape(mask.shape + (1,) * (values.ndim - 1))
        return jnp.where(kept, values, jnp.asarray(lowest, values.dtype)).max()

    def merge(self, a: Any, b: Any) -> Any:
        return np.maximum(a, b)

    def compute(self, largest: np.ndarray) -> float:
        return float(largest)


class WorstSamples(NamedTuple):
    """The worst samples, the worst first.

    `place` [K] int32 and `error` [K] float32 of each; `kept` pytree of arrays [K, ...].
    """

    place: Any
    error: Any
    kept: Any


class _Part(NamedTuple):
    there: Any  # [count] bool, False behind the last sample where there are fewer
    worst: WorstSamples


def _nothing_of(batch: Any) -> Any:
    return ()


@dataclass(frozen=True, kw_only=True)
class Worst:
    """The samples with the largest error, as `WorstSamples`: of equal errors that of the smaller place comes first.

    The result does not depend on batches, devices or processes. NaN counts as infinite.

    Attributes:
      error: `(outputs, batch) -> [N]`, real, the larger the worse.
      count: how many to keep.
      places: of the batch: int32 [N], where each sample is in the data; default the last entry of the batch.
      kept: of the batch: a pytree of arrays [N, ...] to keep of each of the samples; default nothing.

    Raises:
      InputError: a count below 1, or errors and places of other shapes.

    Example:
      >>> import numpy as np, jquant as jq
      >>> batches = [(np.float32([1, 9, 2]), np.int32([0, 1, 2])), (np.float32([9, 3]), np.int32([3, 4]))]
      >>> worst = jq.evaluation.Worst(error=lambda outputs, batch: abs(outputs), count=3, kept=lambda batch: batch[0])
      >>> found = jq.evaluate(lambda x: x - 2, batches, {"worst": worst}).figures["worst"]
      >>> found.place.tolist(), found.error.tolist(), found.kept.tolist()
      ([1, 3, 0], [7.0, 7.0, 1.0], [9.0, 9.0, 1.0])
    """

    error: Callable[[Any, Any], Array]
    count: int = 8
    places: Callable[[Any], Array] = labels_of
    kept: Callable[[Any], Any] = _nothing_of

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(f"count must be at least 1, not {self.count!r}")

    def measure(self, outputs: Any, batch: Any, mask: Array) -> _Part:
        error = jnp.asarray(self.error(outputs, batch))
        places = jnp.asarray(self.places(batch))
        if error.shape != mask.shape or places.shape != mask.shape or places.dtype != jnp.int32:
            raise InputError(
                f"errors {error.dtype}{list(error.shape)} and places {places.dtype}{list(places.shape)} of "
                f"{mask.size} samples; give a number and an int32 for each: `error=` and `places=` of the metric"
            )
        error = error.astype(jnp.float32)
        error = jnp.where(jnp.isnan(error), jnp.inf, error)
        rows = jnp.arange(mask.size, dtype=jnp.int32)
        order = jax.lax.sort((~mask, -error, places, rows), num_keys=3)[-1][: self.count]
        missing = max(0, self.count - mask.size)
        there = jnp.pad(mask[order], (0, missing))
        order = jnp.pad(order, (0, missing))
        found = WorstSamples(places, error, self.kept(batch))
        return _Part(there, jax.tree.map(lambda v: v[order], found))

    def merge(self, a: _Part, b: _Part) -> _Part:
        both: _Part = jax.tree.map(lambda *v: np.concatenate(v), a, b)
        order = np.lexsort((both.worst.place, -both.worst.error, ~both.there))[: self.count]
        return jax.tree.map(lambda v: v[order], both)

    def compute(self, part: _Part) -> WorstSamples:
        return jax.tree.map(lambda v: v[part.there], part.worst)
