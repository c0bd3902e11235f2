"""Mean average precision of detectors, from counts that add up."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jquant.types import Array, InputError

RECALLS = np.linspace(0.0, 1.0, 101)


class _Counts(NamedTuple):
    matched: Any  # [thresholds, classes, bins]
    found: Any  # [classes, bins]
    objects: Any  # [classes]


def detections_of(outputs: Any) -> Any:
    """Outputs that are boxes, scores and classes already."""
    return outputs


def objects_of(batch: Any) -> Any:
    """The last two entries of a batch: boxes and classes."""
    return batch[-2:]


@dataclass(frozen=True, kw_only=True)
class MeanAveragePrecision:
    """Mean over classes, and over thresholds, of the average precision of detections, percent.

    In each image the detections are taken from the highest score to the lowest. Each takes the free object of its class
    with the largest overlap, if the overlap reaches the threshold. Precision is made to fall with recall, and is
    averaged at 101 recalls. Classes without an object count in no mean.

    Counts are kept by score in `bins` of equal width, so that they add up exactly over batches, devices and processes.
    Detections of one bin have one place in the order: with scores of int8 and 256 bins, or int16 and 65,536, each score
    has its own.

    Attributes:
      classes: C; classes are 0 to C - 1.
      thresholds: of intersection over union; `COCO_THRESHOLDS` has the ten from 0.5 to 0.95.
      bins: of scores in [0, 1]; the counts take 4 x (thresholds + 1) x classes x bins bytes.
      detections: of the outputs: boxes [N, D, 4] as x0, y0, x1, y1 in any unit, scores [N, D] in [0, 1], and classes
        [N, D]. A class outside of 0 to C - 1 is no detection.
      objects: of the batch: boxes [N, G, 4] in the same unit, classes [N, G]; a class outside of 0 to C - 1 is padding.

    Raises:
      InputError: shapes that are not those above.

    Source: Everingham et al., The PASCAL Visual Object Classes Challenge, 2015; Lin et al., Microsoft COCO, 2014, whose
    evaluation also leaves out crowds and counts 100 detections an image.

    Example:
      >>> import numpy as np, jquant as jq
      >>> boxes, objects = np.float32([[[0, 0, 2, 2], [4, 4, 6, 6]]]), np.float32([[[0, 0, 2, 2], [8, 8, 9, 9]]])
      >>> batch = (boxes, np.float32([[0.9, 0.4]]), np.int32([[0, 0]]), objects, np.int32([[0, 0]]))
      >>> metric = jq.evaluation.MeanAveragePrecision(classes=1)
      >>> found = jq.evaluate(lambda b, s, c: (b, s, c), [batch], {"mAP": metric}, inputs=lambda batch: batch[:3])
      >>> round(found.figures["mAP"], 2)
      50.5
    """

    classes: int
    thresholds: tuple[float, ...] = (0.5,)
    bins: int = 1000
    detections: Callable[[Any], Any] = detections_of
    objects: Callable[[Any], Any] = objects_of

    def measure(self, outputs: Any, batch: Any, mask: Array) -> _Counts:
        boxes, scores, kinds = map(jnp.asarray, self.detections(outputs))
        wanted, wanted_kinds = map(jnp.asarray, self.objects(batch))
        _check("detections", boxes, scores, kinds)
        _check("objects", wanted, wanted_kinds)
        kinds = jnp.where(mask[:, None] & (kinds >= 0) & (kinds < self.classes), kinds, -1).astype(jnp.int32)
        known = mask[:, None] & (wanted_kinds >= 0) & (wanted_kinds < self.classes)
        wanted_kinds = jnp.where(known, wanted_kinds, -2).astype(jnp.int32)
        limits = jnp.asarray(self.thresholds, jnp.float32)
        each = jax.vmap(_matched, in_axes=(None, None, None, None, None, 0))
        hits = jax.vmap(each, in_axes=(0, 0, 0, 0, 0, None))(
            boxes, scores, kinds, wanted, wanted_kinds, limits
        )  # [N, T, D]
        places = jnp.clip(jnp.floor(scores * self.bins), 0, self.bins - 1).astype(jnp.int32)
        # [N, D]; what is no detection counts behind the end
        cell = jnp.where(kinds < 0, self.classes * self.bins, kinds * self.bins + places)
        shape = (self.classes, self.bins)

        def counted(weight: Array) -> Array:
            counts = jnp.zeros(self.classes * self.bins + 1, jnp.int32).at[cell.ravel()].add(weight.ravel())
            return counts[:-1].reshape(shape)

        matched = jnp.stack([counted(hits[:, i].astype(jnp.int32)) for i in range(len(self.thresholds))])
        objects = jnp.zeros(self.classes + 1, jnp.int32).at[jnp.where(known, wanted_kinds, self.classes).ravel()].add(1)
        return _Counts(matched, counted(jnp.ones_like(kinds)), objects[:-1])

    def compute(self, sums: _Counts) -> float:
        there = np.asarray(sums.objects) > 0
        if not there.any():
            return float("nan")
        each = [_average_precision(hits[there], sums.found[there], sums.objects[there]) for hits in sums.matched]
        return float(100 * np.mean(each))


COCO_THRESHOLDS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))


def _matched(boxes: Array, scores: Array, kinds: Array, wanted: Array, wanted_kinds: Array, limit: Array) -> Array:
    """Of one image: bool [D], whether a detection takes an object."""
    overlap = jnp.where(kinds[:, None] == wanted_kinds[None, :], _overlaps(boxes, wanted), -1.0)  # [D, G]
    order = jnp.argsort(-scores, stable=True)

    def step(free: Array, i: Array) -> tuple[Array, Array]:
        row = jnp.where(free, overlap[i], -1.0)
        best = jnp.argmax(row)
        hit = row[best] >= limit
        return free.at[best].set(free[best] & ~hit), hit

    _, hits = jax.lax.scan(step, jnp.ones(wanted.shape[0], bool), order)
    return jnp.zeros(boxes.shape[0], bool).at[order].set(hits)


def _overlaps(a: Array, b: Array) -> Array:
    """Intersection over union [D, G]; 0 for boxes without an area."""
    corners = jnp.minimum(a[:, None, 2:], b[None, :, 2:]) - jnp.maximum(a[:, None, :2], b[None, :, :2])
    inside = jnp.prod(jnp.maximum(corners, 0.0), axis=-1)
    areas = [jnp.prod(jnp.maximum(boxes[:, 2:] - boxes[:, :2], 0.0), axis=-1) for boxes in (a, b)]
    union = areas[0][:, None] + areas[1][None, :] - inside
    return jnp.where(union > 0, inside / jnp.where(union > 0, union, 1.0), 0.0)


def _average_precision(hits: np.ndarray, found: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """[classes]: the mean over 101 recalls of the highest precision at that recall or beyond."""
    true = np.cumsum(hits[:, ::-1], axis=1)
    everything = np.cumsum(found[:, ::-1], axis=1)
    precision = true / np.maximum(everything, 1)
    recall = true / objects[:, None]
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    places = np.stack([np.searchsorted(row, RECALLS, side="left") for row in recall])
    inside = places < best.shape[1]
    values = np.take_along_axis(best, np.minimum(places, best.shape[1] - 1), axis=1)
    return np.where(inside, values, 0.0).mean(axis=1)


def _check(what: str, boxes: Array, *others: Array) -> None:
    n = boxes.shape[:2]
    if boxes.ndim != 3 or boxes.shape[-1] != 4 or any(other.shape != n for other in others):
        shapes = ", ".join(str(list(array.shape)) for array in (boxes, *others))
        raise InputError(
            f"{what} are boxes [N, D, 4] and for each a class, of detections a score before it; here {shapes}. "
            f"`{what}=` of the metric says where they are"
        )
