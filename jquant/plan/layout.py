"""Runs convolutions and pools channels-last."""

from dataclasses import replace

from jquant.graph.operator import to_channels_last
from jquant.ops.movement import Permute
from jquant.plan.fold import Shapes
from jquant.types import Graph, Node


def channels_last(graph: Graph, shapes: Shapes) -> Graph:
    """Runs convolutions, pools and what lies between them on [N, *S, C]; outputs keep the framework's order.

    A value keeps its name in whichever layout it is made; inserted permutations are `name.to_last` and `name.to_first`.
    """
    last: set[str] = set()  # values made channels-last under their own name
    nodes: list[Node] = []
    made: set[str] = set()

    def in_order(value: str, want_last: bool) -> str:
        rank = len(shapes[value])
        if (value in last) == want_last or rank < 3:
            return value
        name = f"{value}.to_last" if want_last else f"{value}.to_first"
        if name not in made:
            axes = (0, *range(2, rank), 1) if want_last else (0, rank - 1, *range(1, rank - 1))
            nodes.append(Node(name, Permute(axes=axes), (value,)))
            made.add(name)
        return name

    for node in graph.nodes:
        rank = len(shapes[node.inputs[0]]) if node.inputs else 0
        alike = all(len(shapes[v]) == rank for v in (*node.inputs, node.name))
        follows = any(v in last for v in node.inputs)
        plain = node.op.layout == "elementwise" and not getattr(node.op, "shared_axes", ())
        converted = node.op if plain else to_channels_last(node.op, rank)
        if getattr(node.op, "channels_last", False):  # in the order of its framework already
            converted = None
        wanted = node.op.layout == "spatial" or (follows and (alike or node.op.layout == "axes"))
        if converted is None or not wanted:
            nodes.append(replace(node, inputs=tuple(in_order(v, False) for v in node.inputs)))
            continue
        nodes.append(replace(node, op=converted, inputs=tuple(in_order(v, True) for v in node.inputs)))
        if len(shapes[node.name]) == rank >= 3:  # below, the two orders are the same
            last.add(node.name)
    outputs = tuple(in_order(v, False) for v in graph.outputs)
    return replace(graph, nodes=tuple(nodes), outputs=outputs)
