"""Statistics of values, and the scales that follow from them, as pure functions.

Statistics kept apart can be merged (`merge_stats`), and scales derived from them again by another method
(`reset_scale`), without touching the data.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp

from jquant.calibration.samples import batch_axes, by_sample
from jquant.config.qconfig import matches
from jquant.graph.checks import is_finite
from jquant.graph.evaluate import Rule
from jquant.graph.float import float_rule, value_shapes
from jquant.graph.loops import FEW_BLOCKS, Loop, find_loops
from jquant.graph.rolled import (
    Keep,
    Own,
    Rolled,
    Stacked,
    columns_of,
    evaluate_rolled,
    parted,
    stack_trees,
    stacked,
    with_own,
)
from jquant.numerics.namespace import to_device, to_host
from jquant.observers import HistogramState, RangeState
from jquant.plan.batch_norm import raise_collapsed, weights_to_quantize
from jquant.plan.fills import raise_filled_scales
from jquant.plan.scales import observer_of, quantizer_of, weight_observer_of
from jquant.text import near_or_known
from jquant.types import Array, CalibrationError, Model, Node, Observer, Params, Plan, QuantSpec

Stats = dict[str, Any]


def observed_values(plan: Plan) -> tuple[str, ...]:
    """The values whose scale comes from data."""
    return tuple(n for n in plan.owned if plan.spec(n).fixed_scale is None and not plan.spec(n).is_float)


def init_stats(model: Model) -> Stats:
    """Empty statistics, {value: observer state}."""
    return empty_stats(model.plan)


def empty_stats(plan: Plan) -> Stats:
    """The statistics of `init_stats`."""
    return {name: observer_of(plan.spec(name)).init(1) for name in observed_values(plan)}


def updated(observer: Observer, state: Any, data: Array) -> Any:
    """The state of an observer after more data, which has the form of the state before.

    Raises:
      CalibrationError: an update that changes shapes, dtypes or the structure of its state.
    """
    found = _update(observer, state, data)
    try:
        chex.assert_trees_all_equal_shapes_and_dtypes(state, found)
    except AssertionError as error:
        raise CalibrationError(
            f"the observer {observer.name!r} changes the form of its state: its update gives {_form(found)}, its init "
            f"gave {_form(state)}"
        ) from error
    return found


@partial(jax.jit, static_argnames=("observer",))
def _update(observer: Observer, state: Any, data: Array) -> Any:
    """Traced once for all values of one size."""
    return observer.update(state, data)


def _form(state: Any) -> Any:
    return jax.tree.map(lambda leaf: f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}", state)


def update_stats(model: Model, stats: Stats, inputs: Mapping[str, Array]) -> Stats:
    """Observes one batch: a pure function for jit, scan or shard_map. The model runs in float."""
    names, loops = frozenset(stats), _loops(model, stats, inputs)
    return parted(_observed(model, _joined(loops, stats), inputs, loops), names)


def joined(model: Model, stats: Stats, inputs: Mapping[str, Array]) -> Stats:
    """Statistics on the host, those of equal blocks `Stacked`: as `update_joined` takes and returns them.

    In a compiled update, each that is joined or parted costs a kernel.
    """
    return to_device(_joined(_loops(model, stats, inputs), stats))


@jax.jit
def update_joined(model: Model, stats: Stats, inputs: Mapping[str, Array]) -> Stats:
    """`update_stats`, from and to what `joined` returns."""
    return _observed(model, stats, inputs, _loops(model, parted(stats, observed_values(model.plan)), inputs))


def _joined(loops: Sequence[Loop], stats: Stats) -> Stats:
    joint = [columns for loop in loops for columns in columns_of(loop).items() if columns[0] in stats]
    inside = {name for _, names in joint for name in names}
    alone = {name: state for name, state in stats.items() if name not in inside}
    return alone | {body: Stacked(stack_trees([stats[name] for name in names]), names) for body, names in joint}


def _loops(model: Model, stats: Stats, inputs: Mapping[str, Array]) -> list[Loop]:
    """Equal blocks whose values are observed alike."""
    plan, params = model.plan, model.params
    free = [entry.name for entry in plan.graph.inputs if entry.shape and entry.shape[0] is None]
    shapes = value_shapes(plan.graph, params, inputs[free[0]].shape[0] if free else 1)
    axes = _axes(plan, params, stats, inputs)

    def kind(node: Node) -> Hashable:
        name, weights = node.name, tuple((role, params[key].shape) for role, key in node.params.items())
        own = node.op, weights, *(shapes[value] for value in (name, *node.inputs))
        if name not in stats:
            return own
        leaves, structure = jax.tree.flatten(stats[name])
        form = structure, *((jnp.shape(leaf), str(jnp.result_type(leaf))) for leaf in leaves)
        return own, observer_of(plan.spec(name)), form, axes.get(name)

    return find_loops(plan.graph, kind, FEW_BLOCKS, recurrences=False)


def _axes(plan: Plan, params: Params, names: Iterable[str], inputs: Mapping[str, Array]) -> dict[str, tuple[int, int]]:
    """`batch_axes`, where an observer looks at each sample by itself."""
    apart = any(observer_of(plan.spec(name)).per_sample for name in names)
    return batch_axes(plan, params, inputs) if apart else {}


def _observed(model: Model, stats: Stats, inputs: Mapping[str, Array], loops: Sequence[Loop]) -> Stats:
    """The model runs in float; statistics of the values in `loops` are `Stacked`."""
    plan, params = model.plan, model.params
    names = frozenset(
        name for key, each in stats.items() for name in (each.names if isinstance(each, Stacked) else (key,))
    )
    observers = {name: observer_of(plan.spec(name)) for name in names}
    axes = _axes(plan, params, names, inputs)

    def observe(name: str, value: Array, own: Own) -> Any:
        each = observers[name].per_sample
        data = by_sample(value, axes.get(name)) if each else value.reshape(1, -1)
        return updated(observers[name], own["stats"][name] if own else stats[name], data)

    def meaning(own: Own | None) -> tuple[Rule, None]:
        return float_rule(plan.graph, with_own(params, own or {})), None

    rolled = []
    for loop in loops:
        of_loop = {body: stats[body].tree for body in columns_of(loop) if body in names}
        rolled.append(Rolled(loop, {"params": stacked(params, loop.params), "stats": of_loop}))
    return evaluate_rolled(plan.graph, inputs, meaning, rolled, Keep(names, observe))[1]


def merge_stats(model: Model, a: Stats, b: Stats) -> Stats:
    """Statistics of two shards as one; the order does not matter, bit for bit.

    Args:
      model: what `prepare` returned.
      a, b: what `collect` returned for this model.

    Raises:
      CalibrationError: an observer that depends on the order of batches, or statistics of another plan.

    Example:
      halves = [jq.calibration.collect(model, half) for half in (first, second)]
      stats = jq.calibration.merge_stats(model, *halves)
      model = jq.calibration.finalize_stats(model, stats)
    """
    return merged(model.plan, a, b)


def merged(plan: Plan, a: Stats, b: Stats) -> Stats:
    """The statistics of `merge_stats`."""
    for stats in (a, b):
        check_stats(plan, stats)
    return {name: merge(a[name], b[name]) for name, merge in merges_of(plan).items()}


def merges_of(plan: Plan) -> dict[str, Any]:
    """{value: merge function of its observer}."""
    observers = {name: observer_of(plan.spec(name)) for name in observed_values(plan)}
    for name, observer in observers.items():
        if observer.merge is None:
            raise CalibrationError(
                f"{observer.name} of {name!r} depends on the order of batches and cannot be merged; "
                "use min_max, percentile, mse or another that can, or collect on one device, without `microbatch`"
            )
    return {name: observer.merge for name, observer in observers.items()}


def check_stats(plan: Plan, stats: Stats) -> None:
    """There are statistics for every value that needs them, of the observer that the plan has for it.

    Raises:
      CalibrationError: a name missing or unknown, or a state of another kind or size.
    """
    wanted = jax.eval_shape(partial(empty_stats, plan))
    for name in sorted(wanted.keys() ^ stats.keys()):
        what = "lacks" if name in stats else "has"
        raise CalibrationError(f"statistics of another plan: this one {what} {name!r}; collect them with this plan")
    for name in observed_values(plan):
        found, expected = (jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), s) for s in (stats[name], wanted[name]))
        if found != expected:
            observer = observer_of(plan.spec(name))
            raise CalibrationError(f"the statistics of {name!r} are not those of {observer.name}; collect them again")


merge_jitted = jax.jit(merged, static_argnames=("plan",))


def finalize_with(model: Model, stats: Stats, methods: Mapping[str, Observer]) -> Model:
    """Statistics to scales; `methods`, {value: observer}, finalize in place of the values' own observers."""
    plan, params = model.plan, {key: model.params[key] for key in model.plan.graph.param_names}
    weights = _scales_of_weights(Model(plan, params))  # compiled once, whatever the methods
    qparams = to_host({**_scales_of_values(plan, stats, methods), **weights})
    qparams = raise_collapsed(plan, to_host(params), raise_filled_scales(plan, qparams))
    return model.replace(qparams=to_device(qparams))


def _scales_of_values(plan: Plan, stats: Stats, methods: Mapping[str, Observer]) -> dict[str, Array]:
    """Values of one format are one loop, joined on the host, so that the program hardly grows with their number."""
    alike: dict[tuple[Observer, QuantSpec, Any], list[str]] = {}
    for name, state in stats.items():
        shapes = jax.tree.structure(state), *(jnp.shape(leaf) for leaf in jax.tree.leaves(state))
        spec = plan.spec(name)
        alike.setdefault((methods.get(name, observer_of(spec)), spec, shapes), []).append(name)
    states = [stack_trees([stats[name] for name in names]) for names in alike.values()]
    scales = _finalized(states, tuple((observer, spec) for observer, spec, _ in alike))
    columns = zip(scales, alike.values(), strict=True)
    return parted({names[0]: Stacked(scale, tuple(names)) for scale, names in columns}, stats)


@partial(jax.jit, static_argnames=("formats",))
def _finalized(states: list[Any], formats: tuple[tuple[Observer, QuantSpec], ...]) -> list[Array]:
    """The parameters of the quantizers of groups of values [values, ...]."""

    def one(state: Any, observer: Observer, spec: QuantSpec) -> Array:
        return quantizer_of(spec).init(observer.finalize(state, spec)[0], spec)

    pairs = zip(states, formats, strict=True)
    return [jax.lax.map(partial(one, observer=observer, spec=spec), state) for state, (observer, spec) in pairs]


@jax.jit
def _scales_of_weights(model: Model) -> dict[str, Array]:
    plan, weights, found = model.plan, weights_to_quantize(model.plan, model.params), dict[str, Array]()
    for key, spec in plan.weights.items():
        if spec.fixed_scale is None:
            scale = weight_scale_from_data(weights[key], spec, plan.weight_axis.get(key))
            found[key] = quantizer_of(spec).init(scale, spec)
    return found


@partial(jax.jit, static_argnames=("spec", "axis"))
def weight_scale_from_data(weight: Array, spec: QuantSpec, axis: int | None) -> Array:
    """The observed scale of a weight: scalar, or [channels]."""
    observer = weight_observer_of(spec)
    data = weight.reshape(1, -1) if axis is None else jnp.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    data = data[:, None] if observer.per_sample else data  # a weight is one sample
    scale = observer.finalize(updated(observer, observer.init(data.shape[0]), data), spec)
    return scale[0] if axis is None else scale


def reset_scale(model: Model, stats: Stats, method: Observer, *, names: str = "*") -> Model:
    """Derives scales by another method from the histograms of an earlier pass, without touching data.

    Args:
      model: what `prepare` or `calibrate` returned.
      stats: what `collect` returned, with observers that keep a histogram: `histogram`, `percentile`, `mse`, `norm`,
        `kl` or `mix`.
      method: one of the same, or `min_max`. The histogram has the bins of the observer that collected it.
      names: a pattern of values, as in a qconfig. Others, and all weights, get the scale of their own observer.

    Returns:
      The model with other scales, all of them.

    Raises:
      CalibrationError: an observer that kept no histogram, a method that needs other statistics, or a glob that matches
        no observed value.

    Example:
      stats = jq.calibration.collect(model, batches)  # with jq.int8(observer=jq.observers.histogram())
      for share in (99.9, 99.99, 100.0):
          model = jq.calibration.reset_scale(model, stats, jq.observers.percentile(share))
    """
    plan = model.plan
    check_stats(plan, stats)
    chosen = [name for name in stats if matches(names, name)]
    if not chosen:
        raise CalibrationError(f"{names!r} matches no observed value{near_or_known(names, list(stats))}")
    wanted = jax.eval_shape(partial(method.init, 1))
    if not isinstance(wanted, HistogramState | RangeState):
        raise CalibrationError(
            f"{method.name} needs statistics of its own; reset by percentile, mse, norm, kl, mix or min_max, "
            f"or calibrate again with {method.name}"
        )
    states = dict(stats)
    for name in chosen:
        if not isinstance(states[name], HistogramState):
            raise CalibrationError(
                f"{observer_of(plan.spec(name)).name} of {name!r} kept no histogram; collect with "
                "jq.observers.histogram()"
            )
        states[name] = states[name].range if isinstance(wanted, RangeState) else states[name]
    return checked_finite(finalize_with(model, states, dict.fromkeys(chosen, method)))


def checked_finite(model: Model) -> Model:
    for name, scale in model.qparams.items():
        if not is_finite(scale):
            raise CalibrationError(
                f"the values of {name!r} are not finite on these batches; look for overflow in the float model"
            )
    return model
