"""Converts formats where they meet, by requantizations between nodes.

Every inserted node is an ordinary one with a policy of its own, so that `explain`, taps and the program show it.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace

from jquant.ops.elementwise import Requantize
from jquant.ops.matmul import MatMul
from jquant.types import FrozenMap, Graph, Node, QConfigError, QuantSpec, Requested

Policies = Mapping[str, Requested]


def insert_requantize(graph: Graph, policies: Policies) -> tuple[Graph, dict[str, Requested]]:
    """Gives an operand that `Policy.input` wants in another format a node of its own, named `consumer.port`.

    Consumers that want a value in one format share the node of the first: one rounding, one scale.
    """
    nodes, policies = [], dict(policies)
    made: dict[tuple[str, QuantSpec | None], str] = {}
    taken = {*graph.values}
    for node in graph.nodes:
        ports, operands = node.op.ports, list(node.inputs)
        for port, spec in policies[node.name].input.items():
            if port not in ports[: len(operands)]:
                raise QConfigError(
                    f"node {node.name!r} ({type(node.op).__name__}) has no input {port!r}; it has {', '.join(ports)}"
                )
            index = ports.index(port)
            value = operands[index]
            if (value, spec) not in made:
                name = made[value, spec] = _free(f"{node.name}.{port}", taken)
                nodes.append(Node(name, Requantize(), (value,)))
                policies[name] = Requested(output=spec)
            operands[index] = made[value, spec]
        policies[node.name] = replace(policies[node.name], input=FrozenMap())
        nodes.append(replace(node, inputs=tuple(operands)))
    return replace(graph, nodes=tuple(nodes)), policies


def _free(name: str, taken: set[str]) -> str:
    """The name, with a number behind it where it is taken; it is taken from then on."""
    found = next(n for n in (name, *(f"{name}_{i}" for i in range(1, len(taken) + 1))) if n not in taken)
    taken.add(found)
    return found


def is_quantized(spec: QuantSpec | None) -> bool:
    return spec is not None and not spec.is_high_precision and not spec.is_float


@dataclass
class _Conversions:
    """Collects the nodes of a graph with the requantizations put between them, and why."""

    policies: dict[str, Requested]
    nodes: list[Node] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)

    def convert(self, value: str, name: str, spec: QuantSpec, why: str) -> str:
        """The name of a node that gives `value` in another format; made once."""
        if name not in self.notes:
            self.nodes.append(Node(name, Requantize(), (value,)))
            self.policies[name], self.notes[name] = Requested(output=spec), why
        return name

    def from_island(self, value: str, asked: QuantSpec) -> str:
        source = self.policies[value].output
        if source is None or not source.is_float:
            return value
        spec = replace(asked, fixed_scale=None)
        return self.convert(value, f"{value}.to_{spec.dtype}", spec, ISLAND_BORDER)


ISLAND_BORDER = "border of a float island: quantized for integer operators"
PRODUCT = "int16 x int16: the chip multiplies int16 by int8 at most, and the other side has the smaller range"


def insert_conversions(
    graph: Graph, policies: Policies, bounded: Set[str]
) -> tuple[Graph, dict[str, Requested], dict[str, str]]:
    """Quantizes float16 values for integer consumers, and one side of an int16 x int16 matrix product to int8.

    The side of the smaller range stays int16. Before any data that is the one of `bounded` (`bounded_values`), else the
    first. Returns the graph, its policies, and {inserted node: why}.
    """
    made, taken = _Conversions(dict(policies)), {*graph.values}
    for node in graph.nodes:
        operands, asked = list(node.inputs), policies[node.name].output
        if asked is not None and is_quantized(asked):
            operands = [made.from_island(value, asked) for value in operands]
            formats = [_source_format(graph, policies, value) for value in node.inputs]
            if isinstance(node.op, MatMul) and all(spec is not None and spec.dtype == "int16" for spec in formats):
                side = 0 if node.inputs[1] in bounded and node.inputs[0] not in bounded else 1
                wide = formats[side]
                assert wide is not None
                spec = replace(wide, dtype="int8", fixed_scale=None)
                name = _free(f"{node.name}.{node.op.ports[side]}", taken)  # the policy of the operand may have it
                operands[side] = made.convert(operands[side], name, spec, PRODUCT)
        made.nodes.append(replace(node, inputs=tuple(operands)))
    graph = replace(graph, nodes=tuple(made.nodes))
    return graph, {name: made.policies[name] for name in graph.values}, made.notes


def _source_format(graph: Graph, policies: Policies, value: str) -> QuantSpec | None:
    """What is asked for the value whose scale this one keeps."""
    node = graph.by_name.get(value)
    while node is not None and node.op.scale_rule != "own" and node.inputs:
        value = node.inputs[0]
        node = graph.by_name.get(value)
    return policies[value].output


def bounded_values(graph: Graph) -> set[str]:
    """The values that lie in [-1, 1] by their operator, or by that of the value that they only move."""
    found: set[str] = set()
    for node in graph.nodes:
        moved = node.op.scale_rule == "same_as_input" and node.inputs and node.inputs[0] in found
        if node.op.bounded or moved:
            found.add(node.name)
    return found
