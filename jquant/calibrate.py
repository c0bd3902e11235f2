"""Scales from data: statistics collected batch by batch, on one device or many, and turned into scales at the end.

`calibrate` is `collect` and `finalize_stats`. Statistics kept apart can be merged (`merge_stats`, `gather_stats`), and
scales derived from them again by another method (`reset_scale`), without touching the data.
"""

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jquant.batch_norm import raise_collapsed_scales, weights_to_quantize
from jquant.ir.evaluate import bind_inputs, evaluate
from jquant.ir.graph import check_params, is_finite
from jquant.observers import HistogramState, RangeState, min_max
from jquant.progress import track
from jquant.simulate import float_rule, quantizer_of
from jquant.text import did_you_mean
from jquant.types import Array, CalibrationError, InputError, Observer, Params, Plan, QuantSpec

Stats = dict[str, Any]
Inputs = dict[str, Array]


def observer_of(spec: QuantSpec) -> Observer:
    return spec.observer or min_max()


def observed_values(plan: Plan) -> tuple[str, ...]:
    """The values whose scale comes from data."""
    return tuple(n for n in plan.owned if plan.spec(n).fixed_scale is None and not plan.spec(n).is_float)


# ---------------------------------------------------------------------------------------------------------------------
# Statistics as pure functions


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
    """Statistics of two shards as one; the order does not matter, bit for bit.

    Args:
      plan: what `prepare` returned.
      a, b: what `collect` returned for this plan.

    Raises:
      CalibrationError: an observer that depends on the order of batches, or statistics of another plan.

    Example:
      stats = jq.merge_stats(plan, jq.collect(plan, params, first_half), jq.collect(plan, params, second_half))
      qparams = jq.finalize_stats(plan, params, stats)
    """
    for stats in (a, b):
        check_stats(plan, stats)
    return {name: merge(a[name], b[name]) for name, merge in _merges(plan).items()}


def _merges(plan: Plan) -> dict[str, Any]:
    """{value: merge function of its observer}."""
    observers = {name: observer_of(plan.spec(name)) for name in observed_values(plan)}
    for name, observer in observers.items():
        if observer.merge is None:
            raise CalibrationError(
                f"{observer.name} of {name!r} depends on the order of batches and cannot be merged; "
                "use min_max, percentile, mse or another observer that can, or collect on one device"
            )
    return {name: observer.merge for name, observer in observers.items()}


def check_stats(plan: Plan, stats: Stats) -> None:
    """There are statistics for every value that needs them, of the observer that the plan has for it.

    Raises:
      CalibrationError: a name missing or unknown, or a state of another kind or size.
    """
    wanted = jax.eval_shape(partial(init_stats, plan))
    for name in sorted(wanted.keys() ^ stats.keys()):
        what = "lacks" if name in stats else "has"
        raise CalibrationError(f"statistics of another plan: this one {what} {name!r}; collect them with this plan")
    for name in observed_values(plan):
        found, expected = (jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), s) for s in (stats[name], wanted[name]))
        if found != expected:
            observer = observer_of(plan.spec(name))
            raise CalibrationError(f"the statistics of {name!r} are not those of {observer.name}; collect them anew")


_update = jax.jit(update_stats, static_argnames=("plan",))
_merge = jax.jit(merge_stats, static_argnames=("plan",))


def finalize_stats(plan: Plan, params: Params, stats: Stats) -> dict[str, Array]:
    """Statistics to the qparams of values and weights; weights are observed here.

    The scale of a channel whose weights are almost zero is raised to what its bias and its fused addend need, see
    `jquant.accumulators`.

    Args:
      plan: what `prepare` returned.
      params: the parameters that `prepare` returned.
      stats: what `collect` returned, or merged ones.

    Returns:
      QParams: {value or weight: trainable parameter of its quantizer}, float32.
    """
    return _finalize(plan, {key: params[key] for key in plan.graph.param_names}, stats, ())


@partial(jax.jit, static_argnames=("plan", "methods"))
def _finalize(plan: Plan, params: Params, stats: Stats, methods: tuple[tuple[str, Observer], ...]) -> dict[str, Array]:
    """`methods` are observers that finalize in place of a value's own."""
    qparams: dict[str, Array] = {}
    for name, state in stats.items():
        spec = plan.spec(name)
        (scale,) = dict(methods).get(name, observer_of(spec)).finalize(state, spec)
        qparams[name] = quantizer_of(spec).init(scale, spec)
    weights = weights_to_quantize(plan, params)
    for key, spec in plan.weights.items():
        if spec.fixed_scale is None:
            qparams[key] = quantizer_of(spec).init(
                weight_scale_from_data(weights[key], spec, plan.weight_axis.get(key)), spec
            )
    return raise_collapsed_scales(plan, params, qparams)


def weight_scale_from_data(weight: Array, spec: QuantSpec, axis: int | None) -> Array:
    """The observed scale of a weight: scalar, or [channels]."""
    observer = observer_of(spec)
    data = weight.reshape(1, -1) if axis is None else jnp.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    scale = observer.finalize(observer.update(observer.init(data.shape[0]), data), spec)
    return scale[0] if axis is None else scale


def reset_scale(plan: Plan, params: Params, stats: Stats, method: Observer, *, names: str = "*") -> dict[str, Array]:
    """Derives scales by another method from the histograms of an earlier pass, without touching data.

    Args:
      plan: what `prepare` returned.
      params: the parameters that `prepare` returned.
      stats: what `collect` returned, with observers that keep a histogram: `histogram`, `percentile`, `mse`, `norm`,
        `kl` or `mix`.
      method: one of the same, or `min_max`. The histogram has the bins of the observer that collected it.
      names: a glob on value names. Others, and all weights, get the scale of their own observer.

    Returns:
      QParams, complete: {value or weight: trainable parameter of its quantizer}, float32.

    Raises:
      CalibrationError: an observer that kept no histogram, a method that needs other statistics, or a glob that matches
        no observed value.

    Example:
      stats = jq.collect(plan, params, batches)  # with jq.int8(observer=jq.histogram())
      for share in (99.9, 99.99, 100.0):
          qparams = jq.reset_scale(plan, params, stats, jq.percentile(share))
    """
    check_stats(plan, stats)
    chosen = [name for name in stats if fnmatchcase(name, names)]
    if not chosen:
        raise CalibrationError(f"{names!r} matches no observed value{did_you_mean(names, list(stats))}")
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
                f"{observer_of(plan.spec(name)).name} of {name!r} kept no histogram; collect with jq.histogram()"
            )
        states[name] = states[name].range if isinstance(wanted, RangeState) else states[name]
    wanted_params = {key: params[key] for key in plan.graph.param_names}
    return _checked(_finalize(plan, wanted_params, states, tuple((name, method) for name in chosen)))


def _checked(qparams: dict[str, Array]) -> dict[str, Array]:
    for name, scale in qparams.items():
        if not is_finite(scale):
            raise CalibrationError(
                f"the values of {name!r} are not finite on these batches; look for overflow in the float model"
            )
    return qparams


# ---------------------------------------------------------------------------------------------------------------------
# Over batches


def calibrate(
    plan: Plan,
    params: Params,
    batches: Iterable[Any],
    *,
    microbatch: int | None = None,
    mesh: Mesh | None = None,
    axis: str = "data",
) -> dict[str, Array]:
    """Runs the float model over batches and turns what the observers saw into scales.

    Args:
      plan: what `prepare` returned.
      params: the parameters that `prepare` returned.
      batches, microbatch, mesh, axis: as for `collect`.

    Returns:
      QParams: {value or weight: trainable parameter of its quantizer}, float32.

    Raises:
      CalibrationError: no batches, or a batch with NaN or infinite values, with its index.
      InputError: a batch that does not fit the graph.

    Example:
      mesh = jax.make_mesh((8,), ("data",))
      qparams = jq.calibrate(plan, params, batches, microbatch=4, mesh=mesh)
      # The same bits as jq.calibrate(plan, params, batches, microbatch=4).
    """
    stats = collect(plan, params, batches, microbatch=microbatch, mesh=mesh, axis=axis)
    return _checked(finalize_stats(plan, params, stats))


def collect(
    plan: Plan,
    params: Params,
    batches: Iterable[Any],
    *,
    microbatch: int | None = None,
    mesh: Mesh | None = None,
    axis: str = "data",
) -> Stats:
    """Runs the float model over batches and returns what the observers saw, to be kept, merged or finalized.

    The bits of a float model may depend on the size of the batch it sees. So it is run on slices of `microbatch`
    samples, on one device or many: then the statistics are the same, bit for bit, however many devices there are.

    Args:
      plan: what `prepare` returned.
      params: the parameters that `prepare` returned.
      batches: any iterable of arrays, or of tuples of arrays where the graph has several inputs; the last batch may be
        smaller. An array that is sharded already is reduced over its devices, by the compiler, equal to one device only
        within float rounding: for equal bits, leave it to `mesh`.
      microbatch: samples the model sees at once; what is left of a batch is a smaller slice. None: the whole batch, or
        with a mesh the first batch's share of one device.
      mesh: devices that each run the model on slices of their own; all of this process (see `gather_stats` for more).
      axis: the axis of the mesh to spread slices over.

    Returns:
      {value: observer state}.

    Raises:
      CalibrationError: no batches; a batch with NaN or infinite values, with its index; with a mesh, an observer that
        depends on the order of batches.
      InputError: a batch that does not fit the graph.
    """
    check_params(plan.graph, params)
    if microbatch is not None and microbatch < 1:
        raise InputError(f"microbatch must be at least 1, not {microbatch!r}")
    if mesh is None:
        return _collect_here(plan, params, batches, microbatch)
    _check_mesh(plan, mesh, axis)
    return _collect_on_mesh(plan, params, batches, microbatch, mesh, axis)


def _bound(plan: Plan, batches: Iterable[Any]) -> Iterator[Inputs]:
    """Batches, checked and named."""
    count = 0
    for count, batch in enumerate(track(batches, "calibrating"), start=1):
        arrays = batch if isinstance(batch, tuple | list) else (batch,)
        try:
            inputs = bind_inputs(plan.graph, arrays)
        except InputError as error:
            kind = CalibrationError if "NaN" in str(error) else InputError
            raise kind(f"batch {count - 1}: {error}") from error
        yield {name: _auto(array) for name, array in inputs.items()}
    if count == 0:
        raise CalibrationError("no calibration batches: the iterable was empty (or used up by an earlier pass)")


def _auto(array: Array) -> Array:
    """The same shards, their sharding left to the compiler: explicit axes would need a sharding at every reshape."""
    sharding = getattr(array, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.are_all_axes_auto:
        return array
    return jax.device_put(array, NamedSharding(Mesh(sharding.mesh.devices, sharding.mesh.axis_names), sharding.spec))


def _samples(plan: Plan, inputs: Inputs) -> int:
    """The batch size of inputs that are to be split."""
    for entry in plan.graph.inputs:
        if not entry.shape or entry.shape[0] is not None:
            raise InputError(f"input {entry.name!r} has no batch axis to split: leave out microbatch and mesh")
    return next(iter(inputs.values())).shape[0]


def _slices(plan: Plan, inputs: Inputs, start: int, size: int) -> Iterator[Inputs]:
    """Samples from `start` on, `size` at a time; the last slice may be smaller."""
    count = _samples(plan, inputs)
    for i in range(start, count, size):
        yield {name: array[i : min(i + size, count)] for name, array in inputs.items()}


def _collect_here(plan: Plan, params: Params, batches: Iterable[Any], microbatch: int | None) -> Stats:
    params, stats = dict(params), init_stats(plan)
    for inputs in _bound(plan, batches):
        for part in [inputs] if microbatch is None else _slices(plan, inputs, 0, microbatch):
            stats = _update(plan, params, stats, part)
    return stats


# ---------------------------------------------------------------------------------------------------------------------
# On many devices


def _check_mesh(plan: Plan, mesh: Mesh, axis: str) -> None:
    if axis not in mesh.shape:
        known = tuple(map(str, mesh.shape))
        raise InputError(f"the mesh has no axis {axis!r}, only {', '.join(known)}{did_you_mean(axis, known)}")
    if any(device.process_index != jax.process_index() for device in mesh.devices.flat):
        raise InputError(
            "the mesh has devices of other processes: let each process collect its own batches on its own devices, "
            "and merge with jq.gather_stats"
        )
    _merges(plan)


def _collect_on_mesh(
    plan: Plan, params: Params, batches: Iterable[Any], microbatch: int | None, mesh: Mesh, axis: str
) -> Stats:
    """Rounds of one slice a device; slices that do not fill a round go to the first device."""
    devices, first = mesh.shape[axis], mesh.devices.flat[0]
    here, everywhere = (jax.device_put(dict(params), at) for at in (first, NamedSharding(mesh, PartitionSpec())))
    split, rest = NamedSharding(mesh, PartitionSpec(axis)), jax.device_put(init_stats(plan), first)
    stats = jax.device_put(jax.tree.map(lambda s: np.stack([s] * devices), jax.device_get(rest)), split)
    for inputs in _bound(plan, batches):
        count = _samples(plan, inputs)
        microbatch = microbatch or max(1, count // devices)
        whole = count - count % (devices * microbatch)
        for part in _slices(plan, {k: v[:whole] for k, v in inputs.items()}, 0, devices * microbatch):
            stats = _update_on_mesh(plan, everywhere, stats, jax.device_put(part, split), mesh, axis)
        for part in _slices(plan, inputs, whole, microbatch):
            rest = _update(plan, here, rest, jax.device_put(part, first))
    return _fold(plan, *jax.device_get((stats, rest)))


@partial(jax.jit, static_argnames=("plan", "mesh", "axis"))
def _update_on_mesh(plan: Plan, params: Params, stats: Stats, inputs: Inputs, mesh: Mesh, axis: str) -> Stats:
    """Each device updates its own row of stats [devices, ...] with its own slice; nothing is communicated."""

    def local(params: Params, stats: Stats, inputs: Inputs) -> Stats:
        own = jax.tree.map(lambda s: s[0], stats)
        return jax.tree.map(lambda s: s[None], update_stats(plan, params, own, inputs))

    row = PartitionSpec(axis)
    # No check of what varies over the mesh: a loop inside an operator may start from a constant.
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(PartitionSpec(), row, row), out_specs=row, check_vma=False)
    return mapped(params, stats, inputs)


def _fold(plan: Plan, rows: Stats, *more: Stats) -> Stats:
    """Statistics [shards, ...] on the host, one after the other, as one."""
    shards = len(jax.tree.leaves(rows)[0]) if rows else 0
    parts = [jax.tree.map(lambda s, i=i: s[i], rows) for i in range(shards)]
    return reduce(partial(_merge, plan), [*parts, *more])


def gather_stats(plan: Plan, stats: Stats) -> Stats:
    """Merges the statistics of all processes of `jax.distributed`: the same on each, bit for bit those of one process.

    A collective: every process calls it, once. The processes may have had different numbers of batches.

    Args:
      plan: what `prepare` returned, the same on each process.
      stats: what `collect` returned for the batches of this process.

    Raises:
      CalibrationError: an observer that depends on the order of batches.

    Example:
      jax.distributed.initialize(...)
      mine = jq.collect(plan, params, batches[jax.process_index() :: jax.process_count()], microbatch=4)
      qparams = jq.finalize_stats(plan, params, jq.gather_stats(plan, mine))
    """
    from jax.experimental import multihost_utils  # loads much that one process does not need

    check_stats(plan, stats)
    _merges(plan)
    if jax.process_count() == 1 or not stats:
        return stats
    return _fold(plan, multihost_utils.process_allgather(jax.device_get(stats)))
