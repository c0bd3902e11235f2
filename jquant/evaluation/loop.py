"""One pass over data: every mode and every metric of a batch in one compiled program.

Batches are dispatched ahead of their results, padded to one size, spread over a mesh, and counted on the host, in
int64 and float64.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jquant.evaluation.batches import Placed, Placement, first_of
from jquant.evaluation.metrics import Summed
from jquant.evaluation.position import Position, load_position, save_position
from jquant.evaluation.sources import Source, sources_of
from jquant.graph.axes import automatic_axes
from jquant.graph.memory import check_memory
from jquant.host.progress import track
from jquant.types import InputError, Model, Program

AHEAD = 4  # batches whose results are not waited for


@dataclass(frozen=True)
class Evaluation:
    """Figures of data.

    Attributes:
      modes: {mode: {metric: figure}}, in the order asked for.
      samples: how many were measured, padding left out.
    """

    modes: dict[str, dict[str, Any]]
    samples: int

    @property
    def figures(self) -> dict[str, Any]:
        """{metric: figure} of the last mode."""
        return self.modes[list(self.modes)[-1]]


@automatic_axes()
def evaluate(
    source: Model | Program | Callable[..., Any] | Mapping[str, Any],
    batches: Iterable[Any],
    metrics: Mapping[str, Summed],
    *,
    modes: Sequence[str] = (),
    inputs: Callable[[Any], tuple[Any, ...]] = first_of,
    mesh: Mesh | None = None,
    axis: str = "data",
    total: int | None = None,
    position: str | PathLike[str] | None = None,
    save_every: int = 100,
    padded: bool = True,
    label: str = "evaluating",
) -> Evaluation:
    """Measures a model on data, in several modes and by several metrics, in one pass.

    Batches are padded to the size of the first one, rounded up to the devices; padding counts nowhere. A batch runs
    while the next ones are read. Sums of counts are exact: they do not depend on batches, devices or processes.

    Args:
      source: a model, a program, a function of the inputs, or {name: one of these}, of which each is a mode.
      batches: pytrees of arrays [N, ...]; read once. On a mesh of several processes each gives its own share, and may
        have another number of batches.
      metrics: {name: metric}, of `jq.evaluation` or one's own.
      modes: of a model, "float", "fake_quant", "tables", "bit_true" and "integers" (its program); default fake_quant.
      inputs: what of a batch goes into the model; default the first of a tuple, or an array alone.
      mesh: devices to spread each batch over, along `axis`.
      total: how many batches there are, for the progress.
      position: a file that holds the sums so far, written every `save_every` batches and at the end. Where it exists, a
        run with the same source, modes, metrics and batch size goes on behind the batches counted there, with the same
        figures bit for bit.
      padded: False gives batches of other sizes as they are. Each size compiles, and on a mesh the devices divide it.
      label: the words beside the progress.

    Returns:
      `Evaluation`.

    Raises:
      InputError: no batches, unknown modes or axis, batches that do not fit, NaN in inputs. FormatError: a position of
      another evaluation, or damaged.

    Example:
      >>> import jax.numpy as jnp, jquant as jq
      >>> x, weights = jnp.array([[1.0, 0.5], [-0.25, 0.75]]), {"w": jnp.array([[0.5, 1.0], [-1.0, 0.25]])}
      >>> graph, params = jq.trace(lambda p, x: x @ p["w"], weights, x)
      >>> model = jq.prepare(graph, params, jq.QConfig(jq.templates.int8_default()), target="nash-e")
      >>> model = jq.calibrate(model, [x])
      >>> data = [(x, jnp.array([1, 0]))]
      >>> jq.evaluate(model, data, {"top-1": jq.evaluation.Accuracy()}, modes=("float", "integers")).modes
      {'float': {'top-1': 50.0}, 'integers': {'top-1': 50.0}}
    """
    _check_metrics(metrics, save_every)
    sources = sources_of(source, modes, [getattr(metric, "against", None) for metric in metrics.values()])
    shown = tuple(name for name, one in sources.items() if one.is_shown)
    placement = Placement(mesh, axis)
    run = _Run(sources, metrics, inputs, placement)
    state = Position.begin(sources, metrics) if position is None else load_position(position, sources, metrics)
    ahead = 0 if share_threads() else AHEAD
    waiting: deque[tuple[Any, Placed]] = deque()
    done = state.batches
    for placed in placement.batches(track(batches, label, total), inputs, done, padded):
        if placed.number == 0:
            _check_memory(sources, placed.size, mesh)
        if placed.number < done:  # counted before: the first one shows the form of the sums
            state = state.shaped(run.sums(run.dispatch(placed), placed), placed.size)
            continue
        waiting.append((run.dispatch(placed), placed))
        if len(waiting) > ahead:
            state = run.count(state, *waiting.popleft())
        if position is not None and (state.batches + len(waiting)) % save_every == 0:
            state = _counted(run, state, waiting)
            save_position(position, state)
    state = _counted(run, state, waiting)
    if not state.samples or state.structure is None:
        raise InputError("no batches: the iterable was empty (or used up by an earlier pass)")
    if position is not None:
        save_position(position, state)
    return Evaluation({mode: _figures(state, mode, metrics) for mode in shown}, state.samples)


def _check_memory(sources: Mapping[str, Source], batch: int, mesh: Mesh | None) -> None:
    devices = 1 if mesh is None else len([d for d in mesh.devices.flat if d.process_index == jax.process_index()])
    at_once = devices if jax.default_backend() == "cpu" else 1
    held = jax.tree.leaves([one.value for one in sources.values()], is_leaf=lambda v: isinstance(v, Model))
    for model in [one for one in held if isinstance(one, Model)]:
        check_memory(model.plan.graph, model.params, -(-batch // devices), "Give batches of {batch} a device", at_once)


def _check_metrics(metrics: Mapping[str, Summed], save_every: int) -> None:
    if save_every < 1:
        raise InputError(f"save_every must be at least 1, not {save_every!r}")
    if not metrics:
        raise InputError("no metrics; give {name: metric}, such as {'top-1': jq.evaluation.Accuracy()}")
    for name, metric in metrics.items():
        if not isinstance(metric, Summed):
            raise InputError(f"metric {name!r} is {metric!r}, which has no `measure` and `compute`; see jq.evaluation")
        if getattr(metric, "compiled_alone", False) and getattr(metric, "against", None) is not None:
            raise InputError(f"metric {name!r} is compiled alone, where it cannot compare with {metric.against!r}")  # type: ignore[attr-defined]


def _counted(run: "_Run", state: Position, waiting: deque[tuple[Any, Placed]]) -> Position:
    while waiting:
        state = run.count(state, *waiting.popleft())
    return state


def _figures(state: Position, mode: str, metrics: Mapping[str, Summed]) -> dict[str, Any]:
    return {name: metric.compute(state.sums[mode][name]) for name, metric in metrics.items()}


# ---------------------------------------------------------------------------------------------------------------------
# A batch


def share_threads() -> bool:
    """Whether devices share the few threads of a host, where programs in flight can wait for each other for ever."""
    return jax.default_backend() == "cpu" and jax.device_count() > 1


@partial(jax.jit, static_argnames=("calls", "metrics", "inputs", "wanted"))
def _measure(
    values: dict[str, Any], batch: Any, mask: Any, *, calls: Any, metrics: Any, inputs: Any, wanted: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """{mode: {metric: sums}} of a batch, and the outputs of the modes in `wanted`, for other metrics."""
    given = inputs(batch)
    outputs = {mode: call(values[mode], *given) for mode, call in calls}
    sums: dict[str, Any] = {mode: {} for mode, _ in calls}
    for name, metric in metrics:
        against = getattr(metric, "against", None)
        other = batch if against is None else outputs[against]
        for mode, _ in calls:
            sums[mode][name] = metric.measure(outputs[mode], other, mask)
    return sums, {mode: outputs[mode] for mode in wanted}


@partial(jax.jit, static_argnames=("metric",))
def _measure_alone(outputs: Any, batch: Any, mask: Any, *, metric: Summed) -> Any:
    return metric.measure(outputs, batch, mask)


class _Run:
    """The compiled part of an evaluation and its host part, with everything that stays the same over the batches."""

    def __init__(
        self,
        sources: Mapping[str, Source],
        metrics: Mapping[str, Summed],
        inputs: Callable[[Any], tuple[Any, ...]],
        placement: Placement,
    ) -> None:
        self._metrics = metrics
        here = {name: metric for name, metric in metrics.items() if getattr(metric, "on_host", False)}
        if here and placement.is_spread_over_processes:
            raise InputError(f"{', '.join(here)} need the outputs on one host; leave them out on several processes")
        self._host = here
        self._alone = {name: metric for name, metric in metrics.items() if getattr(metric, "compiled_alone", False)}
        self._shown = [mode for mode, one in sources.items() if one.is_shown]
        self._values = placement.everywhere({mode: one.value for mode, one in sources.items()})
        self._static = {
            "calls": tuple((mode, one.call) for mode, one in sources.items()),
            "metrics": tuple((name, m) for name, m in metrics.items() if name not in here | self._alone),
            "inputs": inputs,
            "wanted": tuple(self._shown if here or self._alone else ()),
        }
        self._placement = placement

    def dispatch(self, placed: Placed) -> Any:
        """Starts a batch; the result is not waited for."""
        begin: Callable[[Any], Any] = jax.block_until_ready if share_threads() else lambda results: results
        sums, outputs = begin(_measure(self._values, placed.batch, placed.mask, **self._static))
        for mode in self._shown:
            for name, metric in self._alone.items():
                sums[mode][name] = begin(_measure_alone(outputs[mode], placed.batch, placed.mask, metric=metric))
        return self._placement.together(sums), outputs if self._host else {}

    def count(self, state: Position, found: Any, placed: Placed) -> Position:
        """Adds the result of a batch."""
        return state.plus(self.sums(found, placed), placed.of_all, placed.size, self._metrics)

    def sums(self, found: Any, placed: Placed) -> dict[str, Any]:
        """{mode: {metric: sums}} of a batch, on the host."""
        sums, outputs = jax.device_get(found)
        for mode in self._shown:
            own = _trimmed(outputs[mode], placed.samples) if self._host else None
            for name, metric in self._host.items():
                sums[mode][name] = metric.measure(own, placed.given, np.ones(placed.samples, bool))
        return {mode: sums[mode] for mode in self._shown}


def _trimmed(outputs: Any, count: int) -> Any:
    return jax.tree.map(lambda v: v[:count], outputs)
