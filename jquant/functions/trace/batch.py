"""The graph of a function that was read at two batch sizes. An example must not depend on the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jquant.ops as ops
from jquant.drafts.batch import differing, joined
from jquant.functions.trace.build import Built
from jquant.types import ConversionError, Graph, Input, Node

FIX = "pass dynamic_batch=False to fix the batch to that of the example"


def with_symbolic_batch(first: Built, second: Built) -> Graph:
    """The graph of both.

    Raises:
      ConversionError: a node that depends on the batch size in another way than by its shape, or that mixes examples.
    """
    one, two = first.graph, second.graph
    alike = [(n.name, type(n.op), n.inputs) for n in one.nodes] == [(n.name, type(n.op), n.inputs) for n in two.nodes]
    if not alike or one.outputs != two.outputs:
        raise ConversionError(f"the function computes something else at another batch size; {FIX}")
    inputs = tuple(
        Input(a.name, tuple(None if n != m else n for n, m in zip(a.shape, b.shape, strict=True)), a.dtype)
        for a, b in zip(one.inputs, two.inputs, strict=True)
    )
    batch = {}  # the axes of every value that are as long as the batch, also counted from the end
    for name, shape in first.shapes.items():
        found = differing(shape, second.shapes[name])
        batch[name] = found | {i - len(shape) for i in found}
    nodes = [_joined(a, b, batch, one.inputs[0].name) for a, b in zip(one.nodes, two.nodes, strict=True)]
    for key, known in first.params.items():
        if key not in second.params or known.compact != second.params[key].compact:
            raise ConversionError(f"the constant {key!r} depends on the batch size; {FIX}")
    return Graph(inputs, tuple(nodes), one.outputs)


def _joined(a: Node, b: Node, batch: Mapping[str, set[int]], example: str) -> Node:
    _check_examples_apart(a, batch)
    node = joined(a, b, example)
    if node is None:
        raise ConversionError(f"node {a.name!r} ({type(a.op).__name__}) depends on the batch size: {a.op} ; {FIX}")
    return node


def _check_examples_apart(node: Node, batch: Mapping[str, set[int]]) -> None:
    """An example must not depend on the others, and the size of the batch is not known."""
    op = node.op
    axes: tuple[int, ...] = ()
    if op.reduces:
        found: Any = op
        axes = found.axes if hasattr(op, "axes") else (found.axis,)
    elif isinstance(op, ops.MatMul):
        axes = (-2 if op.transpose_a else -1,)
    if any(axis in batch[node.inputs[0]] for axis in axes):
        raise ConversionError(
            f"node {node.name!r} ({type(op).__name__}) sums or compares over the batch. A batch norm in training does: "
            f"trace the model in its evaluation mode; or {FIX}"
        )
