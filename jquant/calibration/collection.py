"""Scales from data: statistics collected batch by batch, and turned into scales at the end.

`calibrate` is `collect` and `finalize_stats`.
"""

from collections.abc import Iterable
from typing import Any

import jax
from jax.sharding import Mesh

from jquant.calibration.batches import SMALLER, bound_batches, slices_of
from jquant.calibration.devices import check_mesh, collect_on_mesh
from jquant.calibration.masks import check_added_masks
from jquant.calibration.observe import (
    Stats,
    checked_finite,
    finalize_with,
    init_stats,
    joined,
    merges_of,
    update_joined,
)
from jquant.calibration.outliers import warn_of_outliers
from jquant.calibration.tables import warn_of_tables
from jquant.graph.axes import automatic_axes, automatic_mesh
from jquant.graph.memory import fitting
from jquant.graph.rolled import parted
from jquant.host.progress import stages
from jquant.numerics.namespace import to_device
from jquant.plan.scales import check_model
from jquant.types import InputError, Model


@automatic_axes()
def calibrate(
    model: Model,
    batches: Iterable[Any],
    *,
    microbatch: int | None = None,
    mesh: Mesh | None = None,
    axis: str = "data",
) -> Model:
    """Runs the float model over batches and turns what the observers saw into scales.

    Args:
      model: what `prepare` returned.
      batches, microbatch, mesh, axis: as for `collect`.

    Returns:
      The model with qparams: {value or weight: trainable parameter of its quantizer}, float32.

    Raises:
      CalibrationError: no batches, or a batch with NaN or infinite values, with its index; an input that is added in
        front of a softmax and holds a mask, such as -1e9.
      InputError: a batch that does not fit the graph, or the memory.

    Warns:
      OutlierWarning: int8 values with entries far beyond nearly all others (see `find_outliers`), and what to do.
      TableWarning: a lookup table that is far from its function on these ranges, with the distance and other options.

    Example:
      >>> import jax.numpy as jnp, jquant as jq
      >>> x, weights = jnp.array([[1.0, 0.5], [-0.25, 0.75]]), {"w": jnp.array([[0.5, 1.0], [-1.0, 0.25]])}
      >>> graph, params = jq.trace(lambda p, x: x @ p["w"], weights, x)
      >>> model = jq.prepare(graph, params, jq.QConfig(jq.templates.int8_default()), target="nash-e")
      >>> jq.calibrate(model, [x[:1], x[1:]])
      Model(1 nodes for nash-e, 1 parameters, 2 scales)
    """
    stats = collect(model, batches, microbatch=microbatch, mesh=mesh, axis=axis)
    with stages("scales", ("of values and weights", "outliers", "tables")) as begin:
        begin("of values and weights")
        model = checked_finite(finalize_stats(model, stats))
        begin("outliers")
        warn_of_outliers(model, stats)
        begin("tables")
        warn_of_tables(model.plan, model.qparams, stats)
    return model


@automatic_axes()
def collect(
    model: Model,
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
      model: what `prepare` returned.
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
      CalibrationError: no batches; a batch with NaN or infinite values, with its index; with a mesh or `microbatch`, an
        observer that depends on the order of batches, whose range would be another one.
      InputError: a batch that does not fit the graph, or that memory cannot hold: with the node, the bytes and a size
        that fits.
    """
    check_model(model, scales=False)
    if microbatch is not None and microbatch < 1:
        raise InputError(f"microbatch must be at least 1, not {microbatch!r}")
    if microbatch is not None:
        merges_of(model.plan)
    if mesh is None:
        return _collect_here(model, batches, microbatch)
    check_mesh(model.plan, mesh, axis)
    return collect_on_mesh(model, batches, microbatch, automatic_mesh(mesh), axis)


def _collect_here(model: Model, batches: Iterable[Any], microbatch: int | None) -> Stats:
    plan, stats = model.plan, init_stats(model)
    model, joint = Model(plan, dict(model.params)), None
    for inputs in bound_batches(plan, batches):
        for part in [inputs] if microbatch is None else slices_of(plan, inputs, 0, microbatch):
            with fitting(plan.graph, model.params, part, SMALLER):
                joint = update_joined(model, joined(model, stats, part) if joint is None else joint, part)
    return stats if joint is None else to_device(parted(joint, stats))


@automatic_axes()
def finalize_stats(model: Model, stats: Stats) -> Model:
    """Statistics to the scales of values and weights; weights are observed here.

    The scale of a channel whose weights are almost zero is raised to what its bias and its fused addend need, see
    `jquant.plan.accumulators`; that of a value that a number enters (a fill, a bound) until its integers hold it, see
    `jquant.plan.fills`.

    Args:
      model: what `prepare` returned.
      stats: what `collect` returned, or merged ones.

    Returns:
      The model with qparams: {value or weight: trainable parameter of its quantizer}, float32.

    Raises:
      CalibrationError: outside of jit, an input that is added in front of a softmax and holds a mask, such as -1e9.
    """
    if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(stats)):
        check_added_masks(model.plan, stats)
    return finalize_with(model, stats, {})
