"""What a plan costs on the chip, as far as it can be counted: multiply-accumulates and bytes."""

import math
from collections.abc import Mapping
from typing import Any

from jquant.graph.float import value_shapes
from jquant.ops.conv import Conv, ConvTranspose, Linear
from jquant.ops.matmul import MatMul
from jquant.types import Model, Node, bit_width


def macs(model: Model) -> dict[str, int]:
    """Multiply-accumulates of every node for one sample; 0 for a node that multiplies no matrix."""
    graph, params = model.plan.graph, model.params
    shapes = value_shapes(graph, params, 1)
    return {node.name: _node_macs(node, shapes, params) for node in graph.nodes}


def _node_macs(node: Node, shapes: Mapping[str, tuple[int, ...]], params: Mapping[str, Any]) -> int:
    if isinstance(node.op, Conv | Linear):  # every output is a sum over all of a filter, [O, ...]
        return math.prod(shapes[node.name]) * math.prod(params[node.params["weight"]].shape[1:])
    if isinstance(node.op, ConvTranspose):  # every input goes through all of a filter, [C, ...]
        return math.prod(shapes[node.inputs[0]]) * math.prod(params[node.params["weight"]].shape[1:])
    if isinstance(node.op, MatMul):
        a = shapes[node.inputs[0]]
        return math.prod(shapes[node.name]) * (a[-2] if node.op.transpose_a else a[-1])
    return 0


def elements(model: Model) -> dict[str, int]:
    """Elements of every value for one sample, and of every weight."""
    plan, params = model.plan, model.params
    shapes = value_shapes(plan.graph, params, 1)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    return sizes | {key: math.prod(params[key].shape) for key in plan.weights}


def passes(dtype: str) -> int:
    """How many 8-bit products a multiplication takes for an operand of this dtype: 1 up to 8 bits, 2 for 16."""
    return max(1, bit_width(dtype) // 8)
