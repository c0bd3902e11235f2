"""Statistics collected on many devices or processes: the same bits as on one."""

from collections.abc import Iterable
from functools import partial, reduce
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jquant.calibration.batches import SMALLER, Inputs, bound_batches, samples_of, slices_of
from jquant.calibration.observe import (
    Stats,
    check_stats,
    init_stats,
    joined,
    merge_jitted,
    merges_of,
    observed_values,
    update_joined,
)
from jquant.graph.memory import fitting
from jquant.graph.rolled import parted
from jquant.text import did_you_mean
from jquant.types import InputError, Model, Plan


def check_mesh(plan: Plan, mesh: Mesh, axis: str) -> None:
    if axis not in mesh.shape:
        known = tuple(map(str, mesh.shape))
        raise InputError(f"the mesh has no axis {axis!r}, only {', '.join(known)}{did_you_mean(axis, known)}")
    if any(device.process_index != jax.process_index() for device in mesh.devices.flat):
        raise InputError(
            "the mesh has devices of other processes: let each process collect its own batches on its own devices, "
            "and merge with jq.calibration.gather_stats"
        )
    merges_of(plan)


def collect_on_mesh(model: Model, batches: Iterable[Any], microbatch: int | None, mesh: Mesh, axis: str) -> Stats:
    """Rounds of one slice a device; slices that do not fill a round go to the first device."""
    plan, model = model.plan, Model(model.plan, dict(model.params))
    devices, first = mesh.shape[axis], mesh.devices.flat[0]
    here, everywhere = (jax.device_put(model, at) for at in (first, NamedSharding(mesh, PartitionSpec())))
    split, empty = NamedSharding(mesh, PartitionSpec(axis)), init_stats(model)
    stats, rest = empty, empty
    for inputs in bound_batches(plan, batches):
        count = samples_of(plan, inputs)
        if stats is empty:
            joint = jax.device_get(joined(model, empty, inputs))
            stats = jax.device_put(jax.tree.map(lambda s: np.stack([s] * devices), joint), split)
            rest = jax.device_put(joint, first)
        microbatch = microbatch or max(1, count // devices)
        whole = count - count % (devices * microbatch)
        for part in slices_of(plan, {k: v[:whole] for k, v in inputs.items()}, 0, devices * microbatch):
            with fitting(plan.graph, model.params, part, SMALLER, list(mesh.devices.flat)):
                stats = _update_on_mesh(everywhere, stats, jax.device_put(part, split), mesh, axis)
        for part in slices_of(plan, inputs, whole, microbatch):
            rest = update_joined(here, rest, jax.device_put(part, first))
    return _fold(plan, *jax.device_get((stats, rest)))


@partial(jax.jit, static_argnames=("mesh", "axis"))
def _update_on_mesh(model: Model, stats: Stats, inputs: Inputs, mesh: Mesh, axis: str) -> Stats:
    """Each device updates its own row of stats [devices, ...] with its own slice; nothing is communicated."""

    def local(model: Model, stats: Stats, inputs: Inputs) -> Stats:
        own = jax.tree.map(lambda s: s[0], stats)
        return jax.tree.map(lambda s: s[None], update_joined(model, own, inputs))

    row = PartitionSpec(axis)
    # No check of what varies over the mesh: a loop inside an operator may start from a constant.
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(PartitionSpec(), row, row), out_specs=row, check_vma=False)
    return mapped(model, stats, inputs)


def _fold(plan: Plan, rows: Stats, *more: Stats) -> Stats:
    """Statistics [shards, ...] on the host, one after the other, as one."""
    shards = len(jax.tree.leaves(rows)[0]) if rows else 0
    parts = [*(jax.tree.map(lambda s, i=i: s[i], rows) for i in range(shards)), *more]
    return reduce(partial(merge_jitted, plan), [parted(part, observed_values(plan)) for part in parts])


def gather_stats(model: Model, stats: Stats) -> Stats:
    """Merges the statistics of all processes of `jax.distributed`: the same on each, bit for bit those of one process.

    A collective: every process calls it, once. The processes may have had different numbers of batches.

    Args:
      model: what `prepare` returned, the same on each process.
      stats: what `collect` returned for the batches of this process.

    Raises:
      CalibrationError: an observer that depends on the order of batches.

    Example:
      jax.distributed.initialize(...)
      mine = jq.calibration.collect(model, batches[jax.process_index() :: jax.process_count()], microbatch=4)
      model = jq.calibration.finalize_stats(model, jq.calibration.gather_stats(model, mine))
    """
    from jax.experimental import multihost_utils  # loads much that one process does not need

    plan = model.plan
    check_stats(plan, stats)
    merges_of(plan)
    if jax.process_count() == 1 or not stats:
        return stats
    return _fold(plan, multihost_utils.process_allgather(jax.device_get(stats)))
