"""The region between QuantStub and DeQuantStub: it alone is quantized."""

from collections.abc import Mapping
from dataclasses import replace

from jquant.graph.passes import rewire
from jquant.ops.elementwise import Requantize
from jquant.ops.stub import DeQuantStub, QuantStub
from jquant.types import Graph, Node, QConfigError, Requested

OUTSIDE = "outside of the region that QuantStub and DeQuantStub mark"


def mark_region(
    graph: Graph, policies: Mapping[str, Requested], *, strict: bool
) -> tuple[Graph, dict[str, Requested], dict[str, str], dict[str, str]]:
    """Makes everything float that no path from a QuantStub reaches without passing a DeQuantStub, and drops the stubs.

    A stub on a graph input that nothing else reads makes that input quantized; on a computed value it becomes a
    `Requantize`. Constants follow their readers. A graph without stubs is returned as it is.

    Returns the graph, its policies, {stub: the value that stands for it}, and {value: why it is float}.

    Raises:
      QConfigError: with `strict`, a format asked for by name outside of the region.
    """
    if not any(isinstance(node.op, QuantStub | DeQuantStub) for node in graph.nodes):
        return graph, dict(policies), {}, {}
    inside, policies = _inside(graph), dict(policies)
    nodes: list[Node] = []
    renamed: dict[str, str] = {}
    for node in graph.nodes:
        if not isinstance(node.op, QuantStub | DeQuantStub):
            nodes.append(node)
            continue
        source = renamed.get(node.inputs[0], node.inputs[0])
        if isinstance(node.op, DeQuantStub) or inside[node.inputs[0]]:
            renamed[node.name] = source
        elif _only_stubs_read(graph, source):
            renamed[node.name], inside[source] = source, True
            if policies[node.name].explicit:
                policies[source] = policies[node.name]
        else:
            nodes.append(replace(node, op=Requantize()))
    exact = {entry.name for entry in graph.inputs if entry.dtype != "float32"}
    outside = [
        name for name, quantized in inside.items() if not quantized and name not in renamed and name not in exact
    ]
    asked = [name for name in outside if policies[name].explicit and policies[name].output is not None]
    if strict and asked:
        raise QConfigError(
            f"asked for by name, but {OUTSIDE}: {', '.join(asked)}; move the stubs, or pass strict=False"
        )
    policies |= dict.fromkeys(outside, Requested())
    graph = rewire(graph, renamed, nodes)
    return graph, {name: policies[name] for name in graph.values}, renamed, dict.fromkeys(outside, OUTSIDE)


def _inside(graph: Graph) -> dict[str, bool]:
    """Whether each value is in the region. What depends on no number, such as a constant, is where it is read."""
    found: dict[str, bool | None] = {i.name: False if i.dtype == "float32" else None for i in graph.inputs}
    for node in graph.nodes:
        operands = [found[v] for v in node.inputs]
        if isinstance(node.op, QuantStub | DeQuantStub):
            found[node.name] = isinstance(node.op, QuantStub)
        else:
            found[node.name] = None if all(v is None for v in operands) else any(operands)
    for name in reversed(graph.values):
        if found[name] is None:
            readers = (r for r in graph.consumers[name] if not isinstance(r.op, QuantStub | DeQuantStub))
            found[name] = any(found[reader.name] for reader in readers)
    return {name: bool(quantized) for name, quantized in found.items()}


def _only_stubs_read(graph: Graph, value: str) -> bool:
    readers = graph.consumers[value]
    is_input = any(entry.name == value for entry in graph.inputs)
    return is_input and value not in graph.outputs and all(isinstance(r.op, QuantStub) for r in readers)
