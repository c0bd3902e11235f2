"""Batches of data: checked, named by the inputs of the graph, and cut into slices."""

from collections.abc import Iterable, Iterator
from typing import Any

import jax

from jquant.graph.axes import automatic
from jquant.graph.evaluate import bind_inputs
from jquant.host.progress import track
from jquant.types import Array, CalibrationError, InputError, Plan

Inputs = dict[str, Array]
SMALLER = "Give `microbatch={batch}`, or smaller batches"


def bound_batches(plan: Plan, batches: Iterable[Any], *, label: str | None = "calibrating") -> Iterator[Inputs]:
    """Batches, checked and named; `label` is that of the progress, None for none."""
    count = 0
    shape = getattr(batches, "shape", ())
    if shape and len(plan.graph.inputs) == 1 and len(shape) == len(plan.graph.inputs[0].shape):
        raise InputError(f"batches is one array of shape {list(shape)}; give several, such as [x]")
    for count, batch in enumerate(batches if label is None else track(batches, label), start=1):
        arrays = jax.tree.map(automatic, batch if isinstance(batch, tuple | list) else (batch,))
        try:
            inputs = bind_inputs(plan.graph, arrays)
        except InputError as error:
            kind = CalibrationError if "NaN" in str(error) else InputError
            raise kind(f"batch {count - 1}: {error}") from error
        yield inputs
    if count == 0:
        raise CalibrationError("no calibration batches: the iterable was empty (or used up by an earlier pass)")


def samples_of(plan: Plan, inputs: Inputs) -> int:
    """The batch size of inputs that are to be split."""
    for entry in plan.graph.inputs:
        if not entry.shape or entry.shape[0] is not None:
            raise InputError(f"input {entry.name!r} has no batch axis to split: leave out microbatch and mesh")
    return next(iter(inputs.values())).shape[0]


def slices_of(plan: Plan, inputs: Inputs, start: int, size: int) -> Iterator[Inputs]:
    """Samples from `start` on, `size` at a time; the last slice may be smaller."""
    count = samples_of(plan, inputs)
    for i in range(start, count, size):
        yield {name: array[i : min(i + size, count)] for name, array in inputs.items()}
