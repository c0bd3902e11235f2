"""What `eval` and `report` measure where no metric is named: by the labels, and by the axes of the first output."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from jquant.cli.settings import IGNORED
from jquant.evaluation.metrics import Accuracy, Agreement, SignalToNoise, Summed, first_output, labels_of
from jquant.graph.float import value_types
from jquant.graph.structure import flatten, output_names
from jquant.types import Array, Graph, InputError, Structure

TOP_1, AGREEMENT, NOISE = "top-1 %", "agreement with float %", "SQNR against float, dB"


@dataclass(frozen=True)
class First:
    """The first output as the model gives them; keys of a dictionary keep their order."""

    gives: Structure | None = None

    def __call__(self, outputs: Any) -> Array:
        return first_output(outputs) if self.gives is None else flatten(self.gives, outputs)[0]


@dataclass(frozen=True)
class ClassesLast:
    """The first output with its classes on the last axis."""

    first: First

    def __call__(self, outputs: Any) -> Array:
        found = self.first(outputs)
        return jnp.moveaxis(found, _class_axis(found.ndim), -1)


@dataclass(frozen=True, kw_only=True)
class TopOne:
    """Percent of samples, pixels or positions whose largest score is that of the label: classes are on the axis that
    the labels lack. The label 255 counts nowhere where there are fewer classes.
    """

    output: First = First()

    def measure(self, outputs: Any, batch: Any, mask: Array) -> Any:
        scores = _by_labels(self.output(outputs), labels_of(batch))
        ignore = IGNORED if scores.shape[-1] <= IGNORED else None
        return Accuracy(ignore=ignore, output=lambda _: scores).measure(outputs, batch, mask)

    def compute(self, sums: Any) -> float:
        return Accuracy().compute(sums)


def usual_metric(labelled: bool, graph: Graph, params: Any) -> tuple[str, Summed]:
    """The name of a metric, and the metric: top-1, agreement of classes with float, or the noise of other numbers."""
    first = First(graph.gives)
    if labelled:
        return TOP_1, TopOne(output=first)
    shape = value_types(graph, params)[graph.outputs[0]].shape
    if len(shape) < 2 or shape[_class_axis(len(shape))] < 2:  # a number a sample: its argmax says nothing
        return NOISE, SignalToNoise(output=first)
    return AGREEMENT, Agreement(output=ClassesLast(first))


def first_name(graph: Graph) -> str:
    """What the model calls its first output, or the value of the graph."""
    return next(iter(output_names(graph)), graph.outputs[0])


def _by_labels(scores: Array, labels: Array) -> Array:
    """Scores [N, ..., classes] of labels [N, ...].

    Raises:
      InputError: labels that are no class numbers of these scores.
    """
    if jnp.issubdtype(labels.dtype, jnp.integer):
        if labels.shape == (scores.shape[0], *scores.shape[2:]):
            return jnp.moveaxis(scores, 1, -1)
        if labels.shape == scores.shape[:-1]:
            return scores
        if labels.ndim == 1 and max(scores.shape[1:], default=0) * len(scores) == scores.size:
            return scores.reshape(len(scores), -1)
    raise InputError(
        f"labels {labels.dtype}{list(labels.shape)} are no class numbers of the first output, {list(scores.shape)}: "
        f"top-1 takes integers [{len(scores)}], or one a pixel; for others give --metric module:function of (outputs, "
        "labels)"
    )


def _class_axis(rank: int) -> int:
    """Of pictures and volumes [N, classes, H, W] axis 1; of sequences [N, T, classes] and of samples the last one."""
    return 1 if rank > 3 else rank - 1
