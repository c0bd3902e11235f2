"""A comparison over the batches of a dataset, in two passes of `jq.evaluate`."""

import os
from collections.abc import Iterable, Iterator, Sized
from typing import Any

import jax
from jax.sharding import Mesh

from jquant.analysis import layers as of_layers
from jquant.analysis.comparison import Comparison, compared_models, comparison_of, on_host_of, steps_of
from jquant.analysis.layers import Bins, Both, Given, LayerErrors, LayerHistograms
from jquant.analysis.meanings import Side
from jquant.evaluation.batches import processes_of
from jquant.evaluation.loop import Evaluation, evaluate
from jquant.evaluation.sources import Source
from jquant.graph.axes import automatic, automatic_axes
from jquant.graph.evaluate import bind_inputs
from jquant.meanings.meaning import Mode, check_mode
from jquant.plan.scales import value_scales
from jquant.types import Array, Graph, InputError, Model


@automatic_axes()
def compare_batches(
    model: Model,
    batches: Iterable[Any],
    a: Mode = "float",
    b: Mode = "fake_quant",
    *,
    model_b: Model | None = None,
    mesh: Mesh | None = None,
    axis: str = "data",
    total: int | None = None,
    position: str | os.PathLike[str] | None = None,
    save_every: int = 100,
) -> Comparison:
    """Compares as `compare` does, over all of the batches, in two passes of `jq.evaluate`.

    Batches are padded to the size of the first one, rounded up to the devices; padding counts nowhere. Values stay on
    the devices, which cut each down to its numbers. Counts, minima, maxima and histograms are those of all samples at
    once, where the values are. A sum has the rounding of each term to float32, at most 2^-22 of the sum of their sizes,
    and no more for more terms.

    Args:
      model, a, b, model_b: as for `compare`, without arrays from elsewhere.
      batches: arrays, or tuples of arrays. They are read twice, since the bins of a histogram are over the range of all
        of the data: a list or a loader, whose second pass may have another order. Of several processes each gives its
        share.
      mesh, axis, total, save_every: as for `jq.evaluate`.
      position: as for `jq.evaluate`; the second pass has a file beside it, whose name ends in ".histograms".

    Returns:
      A `Comparison`, rows in graph order.

    Raises:
      JQuantError, LoweringError: as `compare`. InputError: an iterator, no batches, passes that differ in their number
      of samples; or a batch that needs padding on a mesh, of a plan that joins its batch with another axis.
      FormatError: a position of something else, or damaged.

    Example:
      found = jq.analysis.compare_batches(model, batches, "float", "bit_true", mesh=mesh)
    """
    for mode in (a, b):
        check_mode(mode)
    if isinstance(batches, Iterator):
        raise InputError("batches are read twice; give a list or a loader in the place of an iterator")
    sides = tuple(Side.of(each, mode) for mode, each in zip((a, b), compared_models(model, model_b), strict=True))
    plan, on_host = sides[0].model.plan, on_host_of(sides)
    steps = steps_of(plan, value_scales(plan, on_host[1].qparams))
    layers, units = of_layers.layers_of(plan, sides[0].model.params, steps), of_layers.units_of(steps)
    joined = next((layer.name for layer in layers if layer.joins), None)
    devices = 1 if mesh is None or axis not in mesh.shape else mesh.shape[axis] // processes_of(mesh)

    def passed(bins: Bins, metric: Any, name: str, label: str, ending: str) -> Evaluation:
        return evaluate(
            {f"{b} against {a}": Source(Both(a, b), Given((sides[0], sides[1]), steps, units, bins))},
            _Bound(plan.graph, batches, joined, devices),
            {name: metric},
            inputs=_arguments_of,
            mesh=mesh,
            axis=axis,
            total=len(batches) if total is None and isinstance(batches, Sized) else total,
            position=None if position is None else f"{os.fspath(position)}{ending}",
            save_every=save_every,
            padded=joined is None,
            label=label,
        )

    first = passed(of_layers.no_bins(layers), LayerErrors(layers, a), "errors", "comparing", "")
    bins = of_layers.bins_of(first.figures["errors"])
    second = passed(bins, LayerHistograms(layers), "counts", "comparing: histograms", ".histograms")
    if first.samples != second.samples:
        raise InputError(
            f"the first pass over the batches gave {first.samples} samples, the second {second.samples}; give the same "
            "data"
        )
    found = of_layers.statistics_by_layer(layers, first.figures["errors"], steps, units)
    counts = of_layers.histograms_by_layer(layers, bins, second.figures["counts"])
    return comparison_of(plan, (a, b), on_host, (None, None), steps, found, counts)


class _Bound:
    """Batches as ({input: array},), read as often as the batches are."""

    def __init__(self, graph: Graph, batches: Iterable[Any], joined: str | None, devices: int) -> None:
        self._graph, self._batches, self._joined, self._devices = graph, batches, joined, devices

    def __iter__(self) -> Iterator[tuple[dict[str, Array]]]:
        for number, batch in enumerate(self._batches):
            arrays = jax.tree.map(automatic, batch if isinstance(batch, tuple | list) else (batch,))
            inputs = bind_inputs(self._graph, arrays)
            samples = len(next(iter(inputs.values())))
            if self._joined is not None and samples % self._devices:
                raise InputError(
                    f"batch {number} has {samples} samples, and value {self._joined!r} joins them with another axis, "
                    "where padding has no place; give batches of a size that the devices divide"
                )
            yield (inputs,)


def _arguments_of(batch: Any) -> tuple[Any, ...]:
    return (batch[0],)
