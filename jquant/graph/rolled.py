"""Evaluates a graph with the steps of its loops run as `jax.lax.scan`, and everything else node by node.

Each step keeps what is its own, as parameters and scales: the loop takes those of all steps, one after the other.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jquant.graph.evaluate import Rule, Tap, evaluate_nodes
from jquant.graph.loops import Loop
from jquant.numerics.fusion import held
from jquant.numerics.platform import platform
from jquant.types import Array, Graph, Params

_GROUP = 16  # arrays that are joined or parted in one kernel

Own = Mapping[str, Any]  # what differs from step to step, by kind of thing; empty outside of loops
Steps = Callable[[Own | None], tuple[Rule, Tap | None]]  # None: for the nodes of a loop that cannot run as one


class Rolled(NamedTuple):
    """A loop, and what its steps have of their own: {kind of thing: {name in the body: [steps, ...]}}."""

    loop: Loop
    own: Mapping[str, Mapping[str, Any]]


class Keep(NamedTuple):
    """What to keep of values as they are made: of `names`, `what(name in the body or graph, value, own)`."""

    names: frozenset[str]
    what: Callable[[str, Array, Own], Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stacked:
    """Something of each step of a loop: trees with leaves [steps, ...], and the names that the steps have in the graph.

    Parting it in a compiled program takes a kernel a step, on the host nothing.
    """

    tree: Any
    names: tuple[str, ...] = field(metadata={"static": True})


def parted(kept: Mapping[str, Any], wanted: Iterable[str]) -> dict[str, Any]:
    """{value of the graph: what was kept of it}, on the host or in a trace."""
    order, found = tuple(wanted), dict[str, Any]()
    names = frozenset(order)
    for name, each in kept.items():
        if not isinstance(each, Stacked):
            found[name] = each
        elif not names.isdisjoint(each.names):
            leaves, structure = jax.tree.flatten(each.tree)
            columns = zip(*map(unstack, leaves), strict=True) if leaves else ((),) * len(each.names)
            trees = (jax.tree.unflatten(structure, column) for column in columns)
            found |= dict(zip(each.names, trees, strict=True))
    return {name: found[name] for name in order if name in found}


def stacked(arrays: Mapping[str, Any], columns: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """{name in the body: the arrays, or trees of arrays, of all steps, [steps, ...]}."""
    return {key: stack_trees([arrays[name] for name in names]) for key, names in columns.items()}


def stack_trees(trees: Sequence[Any]) -> Any:
    """Trees of one structure as a tree of leaves [trees, ...]."""
    return jax.tree.map(lambda *each: stack(each), *trees)


def stack(arrays: Sequence[Array]) -> Array:
    """Like jnp.stack, for hundreds of arrays.

    XLA compiles one kernel that joins n arrays on a CPU in a time that grows with the square of n. On the host it is
    numpy's.
    """
    if all(map(_is_here, arrays)):
        return np.stack([np.asarray(array) for array in arrays])  # type: ignore[return-value]
    groups = [jnp.stack(arrays[i : i + _GROUP]) for i in range(0, len(arrays), _GROUP)]
    return groups[0] if len(groups) == 1 else jnp.concatenate([_finished(group) for group in groups])


def unstack(array: Array) -> list[Array]:
    """The entries along the first axis.

    XLA compiles a kernel for each part of one array, but a single kernel for equal parts of many arrays.
    """
    if _is_here(array):
        return list(np.asarray(array))
    groups = [_finished(array[i : i + _GROUP]) for i in range(0, len(array), _GROUP)]
    return [group[i] for group in groups for i in range(len(group))]


def _is_here(array: Array) -> bool:
    """Whether an array has numbers that this process can read."""
    return not isinstance(array, jax.Array) or (not isinstance(array, jax.core.Tracer) and array.is_fully_addressable)


def _finished(group: Array) -> Array:
    """An array that XLA does not look through: only for its CPU, where a branch costs nothing."""
    if platform() != "cpu" or not group.size:
        return group
    first, dtype = group[(0,) * group.ndim], group.dtype
    lowest = -jnp.inf if jnp.issubdtype(dtype, jnp.inexact) else False if dtype == jnp.bool_ else jnp.iinfo(dtype).min
    return held(group, ~(first < jnp.asarray(lowest, dtype)))  # true of NaN, too


def columns_of(loop: Loop) -> dict[str, tuple[str, ...]]:
    """{node of the body: its name in each step}."""
    return dict(zip((node.name for node in loop.body), zip(*loop.steps, strict=True), strict=True))


def with_own(params: Params, own: Own) -> Params:
    """The parameters of a step."""
    return {**params, **own["params"]} if own.get("params") else params


def evaluate_rolled(
    graph: Graph, inputs: Mapping[str, Array], meaning: Steps, loops: Sequence[Rolled], keep: Keep | None = None
) -> tuple[dict[str, Array], dict[str, Any]]:
    """The outputs of a graph by name, with other values that were computed on the way; and what is kept, `Stacked`."""
    rule, tap = meaning({})
    kept: dict[str, Any] = {}
    values = {entry.name: inputs[entry.name] for entry in graph.inputs}
    if tap is not None:
        values = {name: tap(name, value) for name, value in values.items()}

    def run(begin: int, stop: int, rule: Rule = rule, tap: Tap | None = tap) -> None:
        evaluate_nodes(graph.nodes[begin:stop], values, rule, tap)
        note(node.name for node in graph.nodes[begin:stop])

    def note(names: Any) -> None:
        if keep is not None:
            kept.update({name: keep.what(name, values[name], {}) for name in names if name in keep.names})

    note(values)
    begin = 0
    for each in loops:
        run(begin, each.loop.start)
        evaluate_nodes(each.loop.before, values, rule, tap)
        found = _run(each, values, meaning, _read_later(graph, each.loop), keep)
        if found is None:
            run(each.loop.start, each.loop.stop, *meaning(None))
        else:
            note(node.name for node in each.loop.before)
            values |= found[0]
            kept |= found[1]
        begin = each.loop.stop
    run(begin, len(graph.nodes))
    return values, kept


def _read_later(graph: Graph, loop: Loop) -> set[str]:
    """The values of a loop that what follows it needs."""
    later = {name for node in graph.nodes[loop.stop :] for name in node.inputs} | set(graph.outputs)
    return later & {name for row in loop.steps for name in row}


def _run(
    rolled: Rolled, values: Mapping[str, Array], meaning: Steps, wanted: set[str], keep: Keep | None
) -> tuple[dict[str, Array], dict[str, Any]] | None:
    """The wanted values of a loop, and what is kept of others.

    None where shapes change from step to step, as those of a cache that grows.
    """
    loop = rolled.loop
    columns = columns_of(loop)
    last = {loop.steps[-1][i]: key for key, (_, i) in loop.carried.items()}
    made = [name for name, names in columns.items() if not wanted.isdisjoint(set(names) - last.keys())]
    noted = [name for name, names in columns.items() if keep is not None and not keep.names.isdisjoint(names)]

    def step(carried: dict[str, Array], of_step: tuple[dict[str, Array], Own]) -> tuple[Any, Any]:
        given, own = of_step
        found = {**values, **carried, **given}
        evaluate_nodes(loop.body, found, *meaning(own))
        after = {key: found[loop.body[i].name] for key, (_, i) in loop.carried.items()}
        notes = {name: keep.what(name, found[name], own) for name in noted} if keep is not None else {}
        return after, ({name: found[name] for name in made}, notes)

    start = {key: values[first] for key, (first, _) in loop.carried.items()}
    each = {key: [values[name] for name in names] for key, names in loop.given.items()}
    if any(len({(v.shape, v.dtype) for v in steps}) > 1 for steps in each.values()):
        return None
    first = {key: steps[0] for key, steps in each.items()}, jax.tree.map(lambda v: v[0], rolled.own)
    after, _ = jax.eval_shape(step, start, first)
    if any((after[key].shape, after[key].dtype) != (v.shape, v.dtype) for key, v in start.items()):
        return None
    given = {key: stack(steps) for key, steps in each.items()}
    final, (all_made, all_noted) = jax.lax.scan(step, start, (given, rolled.own))
    of_steps = parted({name: Stacked(tree, columns[name]) for name, tree in all_made.items()}, wanted)
    of_steps |= {name: final[key] for name, key in last.items() if name in wanted}
    return of_steps, {name: Stacked(tree, columns[name]) for name, tree in all_noted.items()}
