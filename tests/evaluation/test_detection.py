"""Mean average precision against a reference in numpy that sorts all detections, and by hand."""

import numpy as np
import pytest

import jquant as jq
from jquant.evaluation import COCO_THRESHOLDS, MeanAveragePrecision

RNG = np.random.default_rng(3)


def overlap(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    inside = max(width, 0.0) * max(height, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inside
    return inside / union if union > 0 else 0.0


def reference(batches, classes, thresholds):
    """One list of detections a class, sorted by score over all images."""
    precisions = []
    for kind in range(classes):
        images = [image for batch in batches for image in zip(*batch, strict=True)]
        objects = sum(int((truth_kinds == kind).sum()) for *_, truth_kinds in images)
        if objects == 0:
            continue
        for limit in thresholds:
            scored = []
            for boxes, scores, kinds, truth, truth_kinds in images:
                free = [g for g in range(len(truth)) if truth_kinds[g] == kind]
                for d in sorted(np.flatnonzero(kinds == kind), key=lambda d: -scores[d]):
                    best = max(free, key=lambda g: overlap(boxes[d], truth[g]), default=None)
                    hit = best is not None and overlap(boxes[d], truth[best]) >= limit
                    if hit:
                        free.remove(best)
                    scored.append((float(scores[d]), hit))
            scored.sort(key=lambda pair: -pair[0])
            hits = np.cumsum([hit for _, hit in scored])
            precision, recall = hits / np.arange(1, len(hits) + 1), hits / objects
            total = sum(max((p for p, r in zip(precision, recall, strict=True) if r >= wanted), default=0.0)
                        for wanted in np.linspace(0, 1, 101))  # fmt: skip
            precisions.append(total / 101)
    return 100 * float(np.mean(precisions))


def drawn(images, count=8, objects=5, classes=3):
    """Objects, and detections near some of them; every score is another one."""
    corner = RNG.uniform(0, 20, (images, objects, 2))
    truth = np.concatenate([corner, corner + RNG.uniform(2, 8, (images, objects, 2))], -1).astype(np.float32)
    kinds = RNG.integers(-1, classes, (images, objects)).astype(np.int32)
    near = RNG.integers(0, objects, (images, count))
    boxes = np.take_along_axis(truth, near[..., None], 1) + RNG.normal(0, 0.7, (images, count, 4)).astype(np.float32)
    boxes[..., 2:] = np.maximum(boxes[..., 2:], boxes[..., :2] + 0.5)
    found = np.where(RNG.random((images, count)) < 0.8, np.take_along_axis(kinds, near, 1), 0).astype(np.int32)
    scores = (RNG.permutation(999)[: images * count].reshape(images, count) + 0.5) / 1000
    return boxes.astype(np.float32), scores.astype(np.float32), found, truth, kinds


def evaluated(batches, metric):
    return jq.evaluate(lambda *outputs: outputs, batches, {"mAP": metric}, inputs=lambda b: b[:3]).figures["mAP"]


@pytest.mark.parametrize("thresholds", [(0.5,), COCO_THRESHOLDS])
def test_against_a_sort_of_all_detections(thresholds):
    batch = drawn(20)
    wanted = reference([batch], 3, thresholds)
    assert 5 < wanted < 95
    metric = MeanAveragePrecision(classes=3, thresholds=thresholds)
    assert evaluated([batch], metric) == pytest.approx(wanted, abs=1e-6)
    parts = [tuple(a[i : i + 7] for a in batch) for i in range(0, 20, 7)]  # the last one is padded
    assert evaluated(parts, metric) == pytest.approx(wanted, abs=1e-6)


def test_by_hand():
    """Two objects; the first detection is right, the second a double, the third right: precision 1, 1/2, 2/3."""
    boxes = np.float32([[[0, 0, 2, 2], [0, 0, 2, 2], [5, 5, 9, 9]]])
    batch = (
        boxes,
        np.float32([[0.9, 0.8, 0.7]]),
        np.zeros((1, 3), np.int32),
        boxes[:, [0, 2]],
        np.zeros((1, 2), np.int32),
    )
    # 51 recalls up to 1/2 have precision 1, the 50 beyond 2/3.
    assert evaluated([batch], MeanAveragePrecision(classes=1)) == pytest.approx(100 * (51 + 50 * 2 / 3) / 101)


def test_scores_of_one_bin_have_one_place():
    """A right and a wrong detection with one score: precision 1/2, whichever comes first."""
    boxes = np.float32([[[0, 0, 2, 2], [5, 5, 9, 9]]])
    for order in ([0, 1], [1, 0]):
        batch = (
            boxes[:, order],
            np.float32([[0.5, 0.5]]),
            np.zeros((1, 2), np.int32),
            boxes[:, :1],
            np.zeros((1, 1), np.int32),
        )
        assert evaluated([batch], MeanAveragePrecision(classes=1)) == pytest.approx(50.0)


def test_no_objects_and_wrong_shapes():
    boxes = np.zeros((1, 2, 4), np.float32)
    none = (boxes, np.ones((1, 2), np.float32), np.zeros((1, 2), np.int32), boxes, np.full((1, 2), -1, np.int32))
    assert np.isnan(evaluated([none], MeanAveragePrecision(classes=1)))
    flat = (boxes[..., :3], *none[1:])
    with pytest.raises(jq.InputError, match=r"detections are boxes \[N, D, 4\].*`detections=` of the metric"):
        evaluated([flat], MeanAveragePrecision(classes=1))
