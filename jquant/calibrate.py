"""Scales from data: one jitted reduction over batches, mergeable across devices."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jquant.ir.evaluate import bind_inputs, evaluate
from jquant.ir.graph import check_params
from jquant.observers import min_max
from jquant.progress import track
from jquant.simulate import float_rule, quantizer_of
from jquant.types import Array, CalibrationError, InputError, Observer, Params, Plan, QuantSpec

Stats = dict[str, Any]


def observer_of(spec: QuantSpec) -> Observer:
    return spec.observer or min_max()


def observed_values(plan: Plan) -> tuple[str, ...]:
    """The values whose scale comes from data."""
    return tuple(n for n in plan.owned if plan.spec(n).fixed_scale is None)


def init_stats(plan: Plan) -> Stats:
    """Empty statistics, {value: observer state}."""
    return {name: observer_of(plan.spec(name)).init(1) for name in observed_values(plan)}


def update_stats(plan: Plan, params: Params, stats: Stats, inputs: Mapping[str, Array]) -> Stats:
    """Observes one batch: a pure function for jit, scan or shard_map. The model runs in float."""
    new: Stats = {}

    def observe(name: str, value: Array) -> Array:
        if name in stats:
            new[name] = observer_of(plan.spec(name)).update(stats[name], value.reshape(1, -1))
        return value

    evaluate(plan.graph, inputs, float_rule(plan.graph, params), observe)
    return new


def merge_stats(plan: Plan, a: Stats, b: Stats) -> Stats:
    """Statistics of two shards as one; the order does not matter.

    Raises:
      CalibrationError: an observer that depends on the order of batches.
    """
    merged = {}
    for name in a:
        observer = observer_of(plan.spec(name))
        if observer.merge is None:
            raise CalibrationError(f"{observer.name} of {name!r} depends on the order of batches; merge min_max or mse")
        merged[name] = observer.merge(a[name], b[name])
    return merged


def finalize_stats(plan: Plan, params: Params, stats: Stats) -> dict[str, Array]:
    """Statistics to the qparams of values and weights."""
    return _finalize(plan, {key: params[key] for key in plan.weights}, stats)


@partial(jax.jit, static_argnames=("plan",))
def _finalize(plan: Plan, weights: Params, stats: Stats) -> dict[str, Array]:
    qparams: dict[str, Array] = {}
    for name, state in stats.items():
        spec = plan.spec(name)
        (scale,) = observer_of(spec).finalize(state, spec)
        qparams[name] = quantizer_of(spec).init(scale, spec)
    for key, spec in plan.weights.items():
        if spec.fixed_scale is None:
            qparams[key] = quantizer_of(spec).init(
                weight_scale_from_data(weights[key], spec, plan.weight_axis.get(key)), spec
            )
    return qparams


def weight_scale_from_data(weight: Array, spec: QuantSpec, axis: int | None) -> Array:
    """The observed scale of a weight: scalar, or [channels]."""
    observer = observer_of(spec)
    data = weight.reshape(1, -1) if axis is None else jnp.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    scale = observer.finalize(observer.update(observer.init(data.shape[0]), data), spec)
    return scale[0] if axis is None else scale


_update = jax.jit(update_stats, static_argnames=("plan",))


def calibrate(plan: Plan, params: Params, batches: Iterable[Any]) -> dict[str, Array]:
    """Runs the float model over batches and turns what the observers saw into scales.

    Args:
      plan: what `prepare` returned.
      params: the parameters that `prepare` returned.
      batches: any iterable of arrays, or of tuples of arrays where the graph has several inputs; the last batch may be
        smaller. Sharded arrays are reduced over their devices.

    Returns:
      QParams: {value or weight: trainable parameter of its quantizer}, float32.

    Raises:
      CalibrationError: no batches, or a batch with NaN or infinite values, with its index.
      InputError: a batch that does not fit the graph.
    """
    check_params(plan.graph, params)
    params, stats, count = dict(params), init_stats(plan), 0
    for count, batch in enumerate(track(batches, "calibrating"), start=1):
        arrays = batch if isinstance(batch, tuple | list) else (batch,)
        try:
            inputs = bind_inputs(plan.graph, arrays)
        except InputError as error:
            kind = CalibrationError if "NaN" in str(error) else InputError
            raise kind(f"batch {count - 1}: {error}") from error
        stats = _update(plan, params, stats, inputs)
    if count == 0:
        raise CalibrationError("no calibration batches: the iterable was empty (or used up by an earlier pass)")
    qparams = finalize_stats(plan, params, stats)
    broken = [name for name, scale in qparams.items() if not bool(jnp.isfinite(scale).all())]
    if broken:
        raise CalibrationError(
            f"the values of {broken[0]!r} are not finite on these batches; look for overflow in the float model"
        )
    return qparams
