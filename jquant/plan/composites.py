"""Expands composite operators into the operators that the chip runs."""

from collections.abc import Mapping, Set
from dataclasses import replace

from jquant.config.qconfig import QConfig
from jquant.graph.float import value_shapes
from jquant.graph.operator import Parts, decompose
from jquant.graph.passes import prune
from jquant.plan.conversions import Policies, insert_requantize, is_quantized
from jquant.types import Graph, Node, Params, Requested


def expand(graph: Graph, params: Params, policies: Policies, qconfig: QConfig) -> tuple[Graph, dict[str, Requested]]:
    """Replaces composite operators by what the chip runs. A composite that is to be float (or float16) stays whole.

    Inner values are int16 whatever the qconfig says of the composite (specification, section 6); a rule that names an
    inner value, and not the composite too, overrides that. A part may be a composite itself.
    """
    policies = dict(policies)
    while True:
        shapes, taken = value_shapes(graph, params), set(graph.values)
        nodes: list[Node] = []
        expanded = False
        for node in graph.nodes:
            asked = policies[node.name]
            parts = _parts_of(node, shapes, taken) if is_quantized(asked.output) else None
            if parts is None:
                nodes.append(node)
                continue
            expanded = True
            taken |= {part.name for part in parts.nodes}
            policies |= _inner_policies(node, parts, asked, qconfig)
            nodes += parts.nodes
        graph = prune(replace(graph, nodes=tuple(nodes)))
        if not expanded:
            return insert_requantize(graph, {name: policies[name] for name in graph.values})


def _parts_of(node: Node, shapes: Mapping[str, tuple[int, ...]], taken: Set[str]) -> Parts | None:
    """The parts of a composite under names that no other value has: `node.part`, or `node.2.part` and so on."""
    prefix, count = node.name, 1
    while True:
        parts = decompose(node.op, replace(node, name=prefix), {**shapes, prefix: shapes[node.name]})
        if parts is None:
            return None
        *inner, last = parts.nodes
        if not any(part.name in taken for part in inner):
            inner = [replace(part, call_of=_same_part(part.name, prefix, node.call_of)) for part in inner]
            return Parts([*inner, replace(last, name=node.name, call_of=node.call_of)], parts.specs)
        count += 1
        prefix = f"{node.name}.{count}"


def _same_part(name: str, prefix: str, call_of: str) -> str:
    """The same part of the composite's first call; "" if this is the first."""
    return call_of + name.removeprefix(prefix) if call_of else ""


def _inner_policies(node: Node, parts: Parts, asked: Requested, qconfig: QConfig) -> Policies:
    """What is asked for the parts of a composite, but for the last, which is the composite's own value."""
    assert asked.output is not None
    wide = replace(asked.output, dtype="int16", fixed_scale=None)
    found = {}
    for part in parts.nodes[:-1]:
        base = replace(asked, output=parts.specs.get(part.name, wide), explicit=False, rank=-1, narrow=None)
        composite = (node.name, node.call_of)
        found[part.name] = qconfig.policy(
            part.name, type(part.op).__name__, base, call_of=part.call_of, unless=composite
        )
    return found
