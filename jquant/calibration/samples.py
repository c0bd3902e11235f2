"""Which entries of a value belong to which sample of a batch."""

from collections.abc import Mapping

import jax.numpy as jnp

from jquant.graph.float import value_shapes
from jquant.types import Array, Params, Plan


def batch_axes(plan: Plan, params: Params, inputs: Mapping[str, Array]) -> dict[str, tuple[int, int]]:
    """{value: (axis, samples)} of the values with an axis that grows with the batch; the others are of all samples.

    It is found by the shapes at twice the batch size, so that it makes no difference whether an operator keeps the
    batch in front, moves it, or merges it with another axis (windows, heads). A graph whose inputs have a fixed batch
    size has no such axis: what it computes in one call counts as one sample.
    """
    free = [entry.name for entry in plan.graph.inputs if entry.shape and entry.shape[0] is None]
    if not free:
        return {}
    batch = inputs[free[0]].shape[0]
    once, twice = (value_shapes(plan.graph, params, size) for size in (batch, 2 * batch))
    found = {}
    for name, shape in once.items():
        moved = [i for i, (a, b) in enumerate(zip(shape, twice[name], strict=True)) if a != b]
        if len(moved) == 1 and shape[moved[0]] % batch == 0 and twice[name][moved[0]] == 2 * shape[moved[0]]:
            found[name] = (moved[0], batch)
    return found


def by_sample(value: Array, axis: tuple[int, int] | None) -> Array:
    """A value as [1, samples, entries]; of a merged axis the batch is the outer part."""
    if axis is None:
        return value.reshape(1, 1, -1)
    return jnp.moveaxis(value, axis[0], 0).reshape(1, axis[1], -1)
