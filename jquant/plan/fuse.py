"""Fuses an add and an activation into the convolution or linear layer before them."""

from collections.abc import Callable, Collection
from dataclasses import replace

from jquant.graph.passes import rewire, sole_consumer
from jquant.ops.activation import Relu, Relu6
from jquant.ops.conv import Activation
from jquant.ops.elementwise import Add
from jquant.plan.fold import FUSES, Shapes
from jquant.types import Graph, Node


def fuse(
    graph: Graph, shapes: Shapes, fusible: Callable[[Node, str], bool], apart: Collection[str] = ()
) -> tuple[Graph, dict[str, str]]:
    """Fuses convolution or linear with an add of the same shape and with relu or relu6, where nothing reads between.

    `fusible(node, role)` decides by dtype, role "add" with the other operand's consumer, or "activation". Where both
    operands of an add could take it, the later one does, since the other operand must exist by then. The fused node
    keeps the name of the conv and stands at the place of the last node it took in. Nothing behind the values of `apart`
    is taken in.
    """
    renamed: dict[str, str] = {}
    nodes: dict[str, Node] = {}
    order = {node.name: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        operands = tuple(renamed.get(v, v) for v in node.inputs)
        nodes[node.name] = replace(node, inputs=operands)
        hosts = [
            (nodes[new], nodes[new].op)
            for new, old in zip(operands, node.inputs, strict=True)
            if new in nodes and old not in apart and sole_consumer(graph, old) is node
        ]
        free = [(host, op) for host, op in hosts if isinstance(op, FUSES) and op.activation == "none"]
        if isinstance(node.op, Relu | Relu6) and free and fusible(node, "activation"):
            host, op = free[0]
            activation: Activation = "relu" if isinstance(node.op, Relu) else "relu6"
            _move(nodes, host, replace(host, op=replace(op, activation=activation)), node, renamed)
        elif isinstance(node.op, Add) and free and fusible(node, "add"):
            host, op = max(free, key=lambda pair: order[pair[0].name])
            other = operands[1] if operands[0] == host.name else operands[0]
            same = all(shapes[v] == shapes[node.name] for v in node.inputs) and other != host.name
            if same and not op.addend:
                fused = replace(host, op=replace(op, addend=True), inputs=(host.inputs[0], other))
                _move(nodes, host, fused, node, renamed)
    return rewire(graph, renamed, list(nodes.values())), renamed


def _move(nodes: dict[str, Node], host: Node, fused: Node, last: Node, renamed: dict[str, str]) -> None:
    """Replaces host and last by the fused node, at the end of the order built so far."""
    del nodes[host.name], nodes[last.name]
    nodes[host.name] = fused
    renamed[last.name] = host.name
    for old, new in renamed.items():
        if new == last.name:
            renamed[old] = host.name
