"""The batch stays symbolic: a function read at two batch sizes gives two graphs, and what differs is the batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import jquant.ops as ops
from jquant.trace.build import Built
from jquant.types import ConversionError, Graph, Input, Node

FIX = "pass dynamic_batch=False to fix the batch to that of the example"
_OVER_AXES = (
    ops.Mean, ops.Sum, ops.ReduceMax, ops.ReduceMin, ops.ReduceAll, ops.ReduceAny, ops.Variance, ops.Norm,
)  # fmt: skip
_OVER_AXIS = (
    ops.ArgMax, ops.ArgMin, ops.CumSum, ops.Softmax, ops.LogSoftmax, ops.Sort, ops.SortIndices, ops.TopK,
    ops.TopKIndices,
)  # fmt: skip


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
        found = _differing(shape, second.shapes[name])
        batch[name] = found | {i - len(shape) for i in found}
    nodes = [_joined(a, b, batch, one.inputs[0].name) for a, b in zip(one.nodes, two.nodes, strict=True)]
    for key, known in first.params.items():
        if key not in second.params or known.compact != second.params[key].compact:
            raise ConversionError(f"the constant {key!r} depends on the batch size; {FIX}")
    return Graph(inputs, tuple(nodes), one.outputs)


def _differing(a: tuple[int, ...], b: tuple[int, ...]) -> set[int]:
    return {i for i, (n, m) in enumerate(zip(a, b, strict=True)) if n != m}


def _joined(a: Node, b: Node, batch: Mapping[str, set[int]], example: str) -> Node:
    _check_examples_apart(a, batch)
    if a.op == b.op:
        return a
    joined: Node | None = None
    if isinstance(a.op, ops.Reshape) and isinstance(b.op, ops.Reshape):
        shape = tuple(n if n == m else -1 for n, m in zip(a.op.shape, b.op.shape, strict=True))
        joined = replace(a, op=ops.Reshape(shape=shape)) if shape.count(-1) == 1 else None
    if isinstance(a.op, ops.Expand) and isinstance(b.op, ops.Expand) and _differing(a.op.shape, b.op.shape) == {0}:
        joined = replace(a, op=ops.Expand(shape=(-1, *a.op.shape[1:])), inputs=(a.inputs[0], example))
    if joined is None:
        raise ConversionError(f"node {a.name!r} ({type(a.op).__name__}) depends on the batch size: {a.op} ; {FIX}")
    return joined


def _check_examples_apart(node: Node, batch: Mapping[str, set[int]]) -> None:
    """An example must not depend on the others, and the size of the batch is not known."""
    op = node.op
    axes: tuple[int, ...] = ()
    if isinstance(op, _OVER_AXES):
        axes = op.axes
    elif isinstance(op, _OVER_AXIS):
        axes = (op.axis,)
    elif isinstance(op, ops.MatMul):
        axes = (-2 if op.transpose_a else -1,)
    if any(axis in batch[node.inputs[0]] for axis in axes):
        raise ConversionError(
            f"node {node.name!r} ({type(op).__name__}) sums or compares over the batch. A batch norm in training does: "
            f"trace the model in its evaluation mode; or {FIX}"
        )
