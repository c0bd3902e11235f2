"""The values of both sides of a comparison: of one batch, and of batch after batch."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jquant.analysis.meanings import Side, node_rule, values_of
from jquant.evaluation.batches import Placed, Placement
from jquant.graph.axes import automatic
from jquant.graph.evaluate import bind_inputs
from jquant.graph.float import value_shapes
from jquant.host.progress import stages
from jquant.meanings.meaning import Mode
from jquant.numerics.namespace import to_host
from jquant.types import Array, Graph, InputError, Params

Arrays = Mapping[str, Any]


class Values(NamedTuple):
    """Of a batch, by name: in both modes, and each node of `a` alone on the operands of `b`."""

    first: Arrays
    second: Arrays
    alone: Arrays


_values = jax.jit(values_of, static_argnames=("mode",))


@partial(jax.jit, static_argnames=("mode",))
def _alone(side: Side, mode: Mode, values: dict[str, Array]) -> dict[str, Array]:
    """The value of each node for operands that another mode gave, where all of them are there."""
    rule = node_rule(side, mode)
    nodes = [node for node in side.model.plan.graph.nodes if all(v in values for v in node.inputs)]
    return {node.name: rule(node, *(values[v] for v in node.inputs)) for node in nodes}


def evaluated(
    modes: Sequence[Any], sides: Sequence[Side], inputs: dict[str, Array], given: Sequence[Arrays | None]
) -> Values:
    """The values of one batch: those of one device on the host, where the rest needs no program for each shape."""
    names = (f"baseline, {modes[0]}", f"against it, {modes[1]}", "each node alone")
    with stages("comparing", names) as begin:
        both = []
        for name, mode, side, arrays in zip(names, modes, sides, given, strict=False):
            begin(name)
            both.append(jax.block_until_ready(_values(side, mode, inputs)) if arrays is None else arrays)
        begin(names[2])
        alone = to_host(_alone(sides[0], modes[0], dict(both[1])) if given[0] is None else {})
        return Values(to_host(both[0]), to_host(both[1]), alone)


def in_batches(
    modes: Sequence[Mode],
    sides: Sequence[Side],
    batches: Iterable[Any],
    placement: Placement,
    is_spread: bool,
    with_alone: bool,
) -> Iterator[tuple[int, Values]]:
    """(samples, values on the host) of each batch, dispatched one ahead."""
    model = sides[0].model
    graph = model.plan.graph
    waiting: deque[tuple[int, Any, Values]] = deque()
    for placed in placement.batches(_bound(graph, batches), lambda inputs: (inputs,), 0):
        shapes, inputs = None, placed.batch
        if placed.samples < placed.size:
            shapes = value_shapes(graph, model.params, placed.samples)
            if name := _joined_batch(graph, model.params, shapes, placed):
                if is_spread:
                    raise InputError(
                        f"batch {placed.number} has {placed.samples} samples, and value {name!r} joins them with "
                        "another axis, where padding has no place; give batches of one size that the devices divide"
                    )
                shapes, inputs = None, placed.given
        first, second = (_values(side, mode, inputs) for side, mode in zip(sides, modes, strict=True))
        alone = _alone(sides[0], modes[0], dict(second)) if with_alone else {}
        waiting.append((placed.samples, shapes, Values(first, second, alone)))
        if len(waiting) > 1:
            yield _fetched(*waiting.popleft())
    while waiting:
        yield _fetched(*waiting.popleft())


def _bound(graph: Graph, batches: Iterable[Any]) -> Iterator[dict[str, Array]]:
    for batch in batches:
        yield bind_inputs(graph, jax.tree.map(automatic, batch if isinstance(batch, tuple | list) else (batch,)))


def _joined_batch(graph: Graph, params: Params, shapes: Mapping[str, tuple[int, ...]], placed: Placed) -> str | None:
    """A value whose batch is no axis of its own, so that it does not show where padding lies."""
    padded = value_shapes(graph, params, placed.size)
    return next(
        (
            name
            for name, shape in shapes.items()
            if any(n != m and n != placed.samples for n, m in zip(shape, padded[name], strict=True))
        ),
        None,
    )


def _fetched(samples: int, shapes: Mapping[str, tuple[int, ...]] | None, values: Values) -> tuple[int, Values]:
    """Values on the host, without padding."""

    def of(arrays: Arrays) -> dict[str, np.ndarray]:
        whole = {name: np.asarray(v) for name, v in arrays.items()}
        return whole if shapes is None else {name: v[tuple(map(slice, shapes[name]))] for name, v in whole.items()}

    return samples, Values(*map(of, values))
