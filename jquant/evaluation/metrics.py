"""Metrics whose statistics add up: of batches, of devices and of processes.

A metric is a hashable value with two pure functions, so that a second evaluation compiles nothing:

  measure(outputs, batch, mask) -> a pytree of arrays, summed over the batches; mask [N] is False for padding
  compute(sums) -> the figure, from the sums as int64 and float64 numpy arrays

Counts are integers, so their sums are exact in any order. `Metric` makes one of two functions of one's own.

Where statistics do not add up, such as a maximum, a metric has a third function, which takes the place of `+`:

  merge(a, b) -> the statistics of the batches of a and of those of b, which come behind them: numpy arrays of the
    dtypes and shapes that `measure` gives
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from jquant.types import Array, InputError


@runtime_checkable
class Summed(Protocol):
    """A metric as above. Optional are `merge`; `against`, the mode whose outputs take the place of the batch; and
    `compiled_alone = True`, without `against`: the metric reads the outputs in a program of its own, which compiles
    faster where they are many."""

    def measure(self, outputs: Any, batch: Any, mask: Any) -> Any: ...
    def compute(self, sums: Any) -> Any: ...


def first_output(outputs: Any) -> Array:
    """The first array of the outputs."""
    return jax.tree.leaves(outputs)[0]


def labels_of(batch: Any) -> Array:
    """The labels in a batch of the form (x, ..., labels)."""
    return batch[-1]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric of one's own: `measure`, `compute` and `merge` as the module says.

    Attributes:
      measure: `(outputs, batch, mask) -> pytree of arrays`; a function at the top of a module compiles once.
      compute: `(sums) -> figure`.
      against: a mode, such as "float", whose outputs `measure` gets in the place of the batch.
      merge: `(statistics, statistics) -> statistics`, in numpy; None adds them up.

    Example:
      >>> import jax.numpy as jnp, numpy as np, jquant as jq
      >>> largest = jq.evaluation.Metric(
      ...     measure=lambda outputs, batch, mask: (jnp.sum(jnp.where(mask, outputs.max(-1), 0)), mask.sum()),
      ...     compute=lambda sums: float(sums[0] / sums[1]),
      ... )
      >>> batches = [np.float32([[1, 3], [2, 4]]), np.float32([[8, 5]])]
      >>> jq.evaluate(lambda x: x, batches, {"mean of maxima": largest}, inputs=lambda x: (x,)).figures
      {'mean of maxima': 5.0}
    """

    measure: Callable[[Any, Any, Array], Any]
    compute: Callable[[Any], Any]
    against: str | None = None
    merge: Callable[[Any, Any], Any] | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Classes


class _Hits(NamedTuple):
    hits: Any
    count: Any


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Percent of samples, or of pixels, whose label is among the `top` largest of the last axis.

    Attributes:
      top: how many classes count as an answer; of equal logits the lower class comes first, as in argmax.
      ignore: a label that is not counted.
      output, labels: what of the outputs [N, ..., C] and of the batch [N, ...] is compared.

    Example:
      >>> import numpy as np, jquant as jq
      >>> logits, labels = np.float32([[1, 3, 2], [2, 4, 0], [9, 8, 7]]), np.int32([1, 0, 2])
      >>> metrics = {"top-1": jq.evaluation.Accuracy(), "top-2": jq.evaluation.Accuracy(top=2)}
      >>> found = jq.evaluate(lambda x: x, [(logits, labels)], metrics)
      >>> {name: round(value, 1) for name, value in found.figures.items()}
      {'top-1': 33.3, 'top-2': 66.7}
    """

    top: int = 1
    ignore: int | None = None
    output: Callable[[Any], Array] = first_output
    labels: Callable[[Any], Array] = labels_of

    def measure(self, outputs: Any, batch: Any, mask: Array) -> _Hits:
        logits = self.output(outputs)
        labels = _class_numbers(logits.shape[:-1], self.labels(batch))
        if not 1 <= self.top <= logits.shape[-1]:
            raise InputError(f"top {self.top} of {logits.shape[-1]} classes; take 1 to {logits.shape[-1]}")
        wanted = jnp.take_along_axis(logits, jnp.clip(labels, 0, logits.shape[-1] - 1)[..., None], axis=-1)
        earlier = jnp.arange(logits.shape[-1]) < labels[..., None]
        ahead = (logits > wanted) | ((logits == wanted) & earlier)
        known = (labels >= 0) & (labels < logits.shape[-1]) & ~jnp.isnan(wanted[..., 0])
        hits = known & (ahead.sum(-1) < self.top) & ~jnp.isnan(logits).any(-1)
        counted = _counted(labels, mask, self.ignore)
        return _Hits(jnp.sum(hits & counted), jnp.sum(counted))

    def compute(self, sums: _Hits) -> float:
        return _percent(sums.hits, sums.count)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Percent of samples, or of pixels, whose class is that of another mode: argmax of the last axis, [N, ..., C].

    Example:
      found = jq.evaluate(model, images, {"agrees": jq.evaluation.Agreement()}, modes=("fake_quant", "integers"))
    """

    against: str | None = "float"
    output: Callable[[Any], Array] = first_output

    def measure(self, outputs: Any, others: Any, mask: Array) -> _Hits:
        own, other = self.output(outputs).argmax(-1), self.output(others).argmax(-1)
        counted = _counted(own, mask, None)
        return _Hits(jnp.sum((own == other) & counted), jnp.sum(counted))

    def compute(self, sums: _Hits) -> float:
        return _percent(sums.hits, sums.count)


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """Counts [classes, classes] of samples or pixels by label (row) and answer (column), an int64 numpy array.

    Attributes:
      classes: C, as many as the last axis of the output has.
      ignore: a label that is not counted; any other outside of 0 .. C - 1 is an error of the data and counted nowhere.
      output, labels: as for `Accuracy`.

    Example:
      >>> import numpy as np, jquant as jq
      >>> logits, labels = np.float32([[1, 3], [4, 2], [9, 8]]), np.int32([1, 1, 0])
      >>> found = jq.evaluate(lambda x: x, [(logits, labels)], {"confusion": jq.evaluation.Confusion(classes=2)})
      >>> found.figures["confusion"].tolist()
      [[1, 0], [1, 1]]
    """

    classes: int
    ignore: int | None = None
    output: Callable[[Any], Array] = first_output
    labels: Callable[[Any], Array] = labels_of

    def measure(self, outputs: Any, batch: Any, mask: Array) -> Array:
        logits = self.output(outputs)
        labels = _class_numbers(logits.shape[:-1], self.labels(batch))
        if logits.shape[-1] != self.classes:
            raise InputError(f"an output of {logits.shape[-1]} classes, and a table of {self.classes}")
        counted = _counted(labels, mask, self.ignore) & (labels >= 0) & (labels < self.classes)
        cell = jnp.where(counted, labels * self.classes + logits.argmax(-1), self.classes**2)
        counts = jnp.zeros(self.classes**2 + 1, jnp.int32).at[cell.ravel()].add(1)
        return counts[:-1].reshape(self.classes, self.classes)

    def compute(self, sums: np.ndarray) -> Any:
        return sums


@dataclass(frozen=True, kw_only=True)
class MeanIoU(Confusion):
    """Mean over classes of intersection over union, percent: of classes that stand in labels or answers.

    Source: Everingham et al., The PASCAL Visual Object Classes Challenge, 2015, section 3.2.

    Example:
      >>> import numpy as np, jquant as jq
      >>> logits, labels = np.float32([[1, 3], [4, 2], [9, 8]]), np.int32([1, 1, 0])
      >>> jq.evaluate(lambda x: x, [(logits, labels)], {"mIoU": jq.evaluation.MeanIoU(classes=2)}).figures
      {'mIoU': 50.0}
    """

    def compute(self, sums: np.ndarray) -> float:
        both = np.diag(sums)
        union = sums.sum(0) + sums.sum(1) - both
        return float(100 * np.mean(both[union > 0] / union[union > 0])) if union.any() else float("nan")


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


class _Errors(NamedTuple):
    signal: Any
    noise: Any
    count: Any


@dataclass(frozen=True, kw_only=True)
class _Compared:
    """Outputs beside numbers of the same shape: the batch's last array, or the output of another mode."""

    against: str | None = None
    output: Callable[[Any], Array] = first_output
    labels: Callable[[Any], Array] = labels_of

    def _pair(self, outputs: Any, batch: Any, mask: Array) -> tuple[Array, Array, Array]:
        """Output, wanted, and a mask of what is no padding, of one shape."""
        y = self.output(outputs)
        wanted = self.labels(batch) if self.against is None else self.output(batch)
        if y.shape != wanted.shape:
            raise InputError(f"an output {list(y.shape)} is compared with values {list(wanted.shape)}")
        return y, wanted, _counted(y, mask, None)


@dataclass(frozen=True, kw_only=True)
class MeanAbsoluteError(_Compared):
    """Mean of |output - wanted|, in the unit of the output; wanted is the batch's last array, or another mode's output.

    Sums are float32 within a batch and float64 over batches.

    Example:
      >>> import numpy as np, jquant as jq
      >>> batch = (np.float32([[1], [4]]), np.float32([[2], [6]]))
      >>> jq.evaluate(lambda x: x, [batch], {"error": jq.evaluation.MeanAbsoluteError()}).figures
      {'error': 1.5}
    """

    def measure(self, outputs: Any, batch: Any, mask: Array) -> _Errors:
        y, wanted, kept = self._pair(outputs, batch, mask)
        off = jnp.where(kept, jnp.abs(y - wanted), 0.0)
        return _Errors(jnp.float32(0.0), off.sum(), kept.sum())

    def compute(self, sums: _Errors) -> float:
        return float(sums.noise / sums.count) if sums.count else float("nan")


@dataclass(frozen=True, kw_only=True)
class SignalToNoise(_Compared):
    """Signal to quantization noise ratio of the whole data in dB: 10 log10(sum wanted^2 / sum (output - wanted)^2).

    Example:
      found = jq.evaluate(model, images, {"SQNR": jq.evaluation.SignalToNoise(against="float")}, modes=("integers",))
    """

    against: str | None = "float"

    def measure(self, outputs: Any, batch: Any, mask: Array) -> _Errors:
        y, wanted, kept = self._pair(outputs, batch, mask)
        signal, noise = (jnp.where(kept, v * v, 0.0).sum() for v in (wanted, y - wanted))
        return _Errors(signal, noise, kept.sum())

    def compute(self, sums: _Errors) -> float:
        if not sums.count:
            return float("nan")
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(10 * np.log10(np.float64(sums.signal) / np.float64(sums.noise)))


def _counted(values: Array, mask: Array, ignore: int | None) -> Array:
    """Bool of the shape of values [N, ...]: samples that are no padding, labels that are not ignored."""
    kept = jnp.broadcast_to(mask.reshape(mask.shape + (1,) * (values.ndim - 1)), values.shape)
    return kept if ignore is None else kept & (values != ignore)


def _percent(hits: Any, count: Any) -> float:
    return 100.0 * int(hits) / int(count) if int(count) else float("nan")


def _class_numbers(shape: tuple[int, ...], labels: Array) -> Array:
    if labels.shape != shape or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise InputError(
            f"labels {labels.dtype}{list(labels.shape)} are no class numbers of an output [..., classes], which takes "
            f"integers {list(shape)}; `labels=` and `output=` of the metric say where they are"
        )
    return labels.astype(jnp.int32)


# ---------------------------------------------------------------------------------------------------------------------
# On the host


@dataclass(frozen=True, kw_only=True)
class HostMean:
    """The mean over samples of `function(outputs, labels)`, a number a batch, computed in numpy.

    Example:
      >>> import numpy as np, jquant as jq
      >>> share = jq.evaluation.HostMean(lambda outputs, labels: (outputs[:, 0] > labels).mean())
      >>> data = [(np.float32([[1], [4]]), np.float32([2, 2])), (np.float32([[3]]), np.float32([2]))]
      >>> round(jq.evaluate(lambda x: x, data, {"share": share}).figures["share"], 3)
      0.667
    """

    on_host: ClassVar = True

    function: Callable[[Any, Any], Any]
    labels: Callable[[Any], Any] = labels_of

    def __init__(self, function: Callable[[Any, Any], Any], *, labels: Callable[[Any], Any] = labels_of) -> None:
        object.__setattr__(self, "function", function)
        object.__setattr__(self, "labels", labels)

    def measure(self, outputs: Any, batch: Any, mask: np.ndarray) -> tuple[np.float64, np.int64]:
        return np.float64(self.function(outputs, self.labels(batch))) * len(mask), np.int64(len(mask))

    def compute(self, sums: Any) -> float:
        return float(sums[0] / sums[1]) if sums[1] else float("nan")
