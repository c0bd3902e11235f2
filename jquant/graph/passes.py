"""Graph to graph: fold batch norm, fuse add and activation, channels-last, dead code. Each returns new values."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jquant.types import Array, FrozenMap, Graph, Node, Op


def prune(graph: Graph) -> Graph:
    """Drops nodes that reach no output. Inputs stay: they are the signature."""
    needed = set(graph.outputs)
    kept = []
    for node in reversed(graph.nodes):
        if node.name in needed:
            kept.append(node)
            needed.update(node.inputs)
    return replace(graph, nodes=tuple(reversed(kept)))


def rewire(graph: Graph, renamed: Mapping[str, str], nodes: list[Node]) -> Graph:
    """The graph with other nodes, where every use of a renamed value reads the new name."""
    rewired = [replace(n, inputs=tuple(renamed.get(v, v) for v in n.inputs)) for n in nodes]
    return replace(graph, nodes=tuple(rewired), outputs=tuple(renamed.get(v, v) for v in graph.outputs))


def sole_consumer(graph: Graph, value: str) -> Node | None:
    """The only node that reads a value, or None; a graph output has a reader outside."""
    readers = graph.consumers[value]
    return readers[0] if len(readers) == 1 and value not in graph.outputs else None


def param_uses(graph: Graph) -> dict[str, int]:
    """How many node roles read each parameter."""
    uses: dict[str, int] = {}
    for node in graph.nodes:
        for key in node.params.values():
            uses[key] = uses.get(key, 0) + 1
    return uses


def scale_channels(weight: Array, multiplier: Array) -> Array:
    """A weight [O, ...] with channel c multiplied by multiplier[c]."""
    return weight * multiplier.reshape(-1, *(1,) * (weight.ndim - 1))


def keep_used(graph: Graph, params: Mapping[str, Any]) -> dict[str, Array]:
    return {key: params[key] for key in graph.param_names}


def with_params(node: Node, params: Mapping[str, str], op: Op | None = None) -> Node:
    """The node with other parameters, and with another operator if one is given."""
    return replace(node, op=node.op if op is None else op, params=FrozenMap(params))
