"""The graph of a plan in the framework's order [N, C, *S], which ONNX has: the inverse of `rewrite.channels_last`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from jquant.graph.operator import to_channels_last
from jquant.ops.grid_sampling import GridSample
from jquant.ops.movement import Permute
from jquant.types import ConversionError, Graph, Node, Op

_AXIS_FIELDS = ("axis", "axes")
_ORDER_FIELDS = ("padding", "starts", "stops", "steps", "repeats", "shape")  # one entry for each axis


def framework_layout(graph: Graph, shapes: Mapping[str, tuple[int, ...]]) -> Graph:
    """The graph without the permutations `name.to_last` and `name.to_first`; every value keeps its name.

    `shapes` are those of the plan's graph. The values are the same but for the order of their axes.
    """
    last: set[str] = set()  # values that the plan has channels-last
    same: dict[str, str] = {}  # permutations that are left out, and what they permuted
    nodes = []
    for node in graph.nodes:
        (source, *_) = node.inputs or ("",)
        if node.name in (f"{source}.to_last", f"{source}.to_first") and isinstance(node.op, Permute):
            same[node.name] = same.get(source, source)
            if node.name.endswith(".to_last"):
                last.add(node.name)
            continue
        follows = any(value in last for value in node.inputs)
        op = _in_framework_order(node, len(shapes[source])) if follows else node.op
        rank = len(shapes[node.name])
        if follows and rank >= 3 and rank == len(shapes[source]):
            last.add(node.name)
        nodes.append(replace(node, op=op, inputs=tuple(same.get(value, value) for value in node.inputs)))
    return Graph(graph.inputs, tuple(nodes), tuple(same.get(value, value) for value in graph.outputs))


def channels_first(graph: Graph, shapes: Mapping[str, tuple[int, ...]]) -> Graph:
    """A float graph whose operators all run on [N, C, *S]: those that a traced function has channels-last are permuted.

    A value keeps its name and its order.
    """
    nodes = []
    for node in graph.nodes:
        if not getattr(node.op, "channels_last", False):
            nodes.append(node)
            continue
        operands = list(node.inputs)
        moved = operands[:1] if isinstance(node.op, GridSample) else operands  # a grid keeps its order
        for i, value in enumerate(moved):
            rank = len(shapes[value])
            if rank >= 3:
                operands[i] = f"{node.name}.{i}.to_first"
                nodes.append(Node(operands[i], Permute(axes=(0, rank - 1, *range(1, rank - 1))), (value,)))
        op: Any = replace(node.op, channels_last=False)  # type: ignore[call-arg]
        rank = len(shapes[node.name])
        if rank < 3:
            nodes.append(replace(node, op=op, inputs=tuple(operands)))
            continue
        inner = f"{node.name}.first"
        nodes.append(replace(node, name=inner, op=op, inputs=tuple(operands)))
        nodes.append(Node(node.name, Permute(axes=(0, *range(2, rank), 1)), (inner,)))
    return replace(graph, nodes=tuple(nodes))


def channels_last_values(graph: Graph, shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    """The values of a plan's graph whose channels are last, `name.to_last` among them."""
    last: set[str] = set()
    for node in graph.nodes:
        (source, *_) = node.inputs or ("",)
        if isinstance(node.op, Permute) and node.name == f"{source}.to_first":
            continue
        follows = any(value in last for value in node.inputs)
        rank = len(shapes[node.name])
        if node.name == f"{source}.to_last" or (follows and rank >= 3 and rank == len(shapes[source])):
            last.add(node.name)
    return last


def _in_framework_order(node: Node, rank: int) -> Op:
    op = node.op
    names = {field.name for field in fields(op)}
    changes: dict[str, Any] = {"channels_last": False} if "channels_last" in names else {}
    if op.layout == "axes" and not changes:
        for name in names & {*_AXIS_FIELDS}:
            value = getattr(op, name)
            axes = tuple(_axis(a, rank) for a in ((value,) if isinstance(value, int) else value))
            changes[name] = axes[0] if isinstance(value, int) else axes
        for name in names & {*_ORDER_FIELDS}:
            changes[name] = _order(getattr(op, name))
        if "axes" in changes and "keepdims" in names:
            changes["axes"] = tuple(sorted(changes["axes"]))
    found = replace(op, **changes)
    again = op if op.layout == "elementwise" else to_channels_last(found, rank)
    if again != _counted_from_start(op, rank):
        raise ConversionError(
            f"node {node.name!r} ({type(op).__name__}) runs channels-last in a way that cannot be undone; export the "
            "plan that jq.prepare returned"
        )
    return found


def _counted_from_start(op: Op, rank: int) -> Op:
    """The operator with its axes as `to_channels_last` writes them."""
    axis = getattr(op, "axis", None)
    return replace(op, axis=axis % rank) if op.layout == "axes" and isinstance(axis, int) else op  # type: ignore[call-arg]


def _axis(axis: int, rank: int) -> int:
    """Where an axis of [N, *S, C] lies in [N, C, *S]."""
    axis %= rank
    return axis if axis == 0 or rank < 3 else 1 if axis == rank - 1 else axis + 1


def _order(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return (values[0], values[-1], *values[1:-1]) if len(values) > 2 else values
