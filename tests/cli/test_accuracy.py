"""What is measured where no metric is named: expected values are counted by hand or in numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

import jquant as jq
from jquant.cli.accuracy import AGREEMENT, NOISE, TOP_1, TopOne, usual_metric

RNG = np.random.default_rng(0)


def top_1(scores: np.ndarray, labels: np.ndarray) -> float:
    return jq.evaluate(lambda x: x, [(scores, labels)], {TOP_1: TopOne()}).figures[TOP_1]


@pytest.mark.parametrize(
    ("shape", "axis", "labels"),
    [
        ((6, 5), 1, (6,)),
        ((6, 5, 1, 1), 1, (6,)),
        ((6, 5, 3, 4), 1, (6, 3, 4)),  # pixels, channels first
        ((6, 3, 4, 5), 3, (6, 3, 4)),  # channels last
        ((6, 7, 5), 2, (6, 7)),  # positions of a sequence
        ((6, 5, 7), 1, (6, 7)),
    ],
)
def test_classes_are_on_the_axis_that_the_labels_lack(
    shape: tuple[int, ...], axis: int, labels: tuple[int, ...]
) -> None:
    scores, wanted = RNG.normal(size=shape).astype(np.float32), RNG.integers(0, 5, labels).astype(np.int32)
    hits = scores.argmax(axis).reshape(labels) == wanted
    assert top_1(scores, wanted) == pytest.approx(100 * hits.mean())


def test_255_counts_nowhere_below_256_classes() -> None:
    scores = np.float32([[[0, 1]], [[1, 0]]]).transpose(0, 2, 1)  # [2, classes, 1]
    assert top_1(scores, np.int32([[1], [255]])) == 100
    assert top_1(scores, np.int32([[0], [255]])) == 0
    many = np.zeros((2, 300), np.float32)
    many[:, 255] = 1
    assert top_1(many, np.int32([255, 0])) == 50


@pytest.mark.parametrize("labels", [np.zeros((2, 4), np.float32), np.zeros((2, 9), np.int32), np.zeros(2, np.float32)])
def test_labels_of_another_form_name_the_metric_to_give(labels: np.ndarray) -> None:
    with pytest.raises(jq.InputError, match=r"first output, \[2, 4, 3, 3\]: .*give --metric module:function"):
        top_1(np.zeros((2, 4, 3, 3), np.float32), labels)


@pytest.mark.parametrize(
    ("shape", "name"),
    [((4,), AGREEMENT), ((1,), NOISE), ((4, 3, 3), AGREEMENT), ((1, 3, 3), NOISE), ((7, 4), AGREEMENT)],
)
def test_without_labels_classes_are_compared_with_float_and_other_numbers_too(
    shape: tuple[int, ...], name: str
) -> None:
    graph = jq.Graph((jq.Input("x", (None, *shape)),), (jq.Node("y", jq.ops.Relu(), ("x",)),), ("y",))
    assert usual_metric(False, graph, {})[0] == name
    assert usual_metric(True, graph, {})[0] == TOP_1


def test_pixels_agree_one_by_one() -> None:
    graph = jq.Graph((jq.Input("x", (None, 3, 2, 2)),), (jq.Node("y", jq.ops.Relu(), ("x",)),), ("y",))
    name, metric = usual_metric(False, graph, {})
    x = RNG.normal(size=(2, 3, 2, 2)).astype(np.float32)
    other = x.copy()
    other[0, :, 0, 0] = -x[0, :, 0, 0]
    agree = (x.argmax(1) == other.argmax(1)).mean()
    sources = {"float": lambda x: x, "b": lambda _: jnp.asarray(other)}
    found = jq.evaluate(sources, [x], {name: metric}, inputs=lambda x: (x,)).modes
    assert found["b"][name] == pytest.approx(100 * agree)
    assert agree < 1
