"""Operators on integers (QLinearConv and its like) as QuantizeLinear, DequantizeLinear and the operator on reals.

Their meaning is the same: the operand dequantized, the operator, the result quantized. Operators of ONNX and of the
domain com.microsoft, which onnxruntime's `quantize_static` writes with `QuantFormat.QOperator`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import helper

from ..onnx_in import Unsupported
from .edit import PLAIN, Editor, attributes_of, operand

MICROSOFT = "com.microsoft"
# What moves integers, or keeps their order: the same on reals, with the same scale behind it.
MOVES = (
    "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Gather", "MaxPool", "Identity", "Split",
    "DepthToSpace", "SpaceToDepth", "Expand", "Tile", "Resize", "Concat", "Pad",
)  # fmt: skip
Nodes = list[onnx.NodeProto]


class _Rewriter:
    """One pass over the nodes; `grids` {value of integers: its scale and zero point}."""

    def __init__(self, editor: Editor) -> None:
        self.editor = editor
        self.grids: dict[str, tuple[str, str]] = {}

    def __call__(self, node: onnx.NodeProto) -> Nodes | None:
        kind, microsoft = node.op_type, node.domain == MICROSOFT
        if kind == "QuantizeLinear" and (node.domain in PLAIN or microsoft):
            self.grids[node.output[0]] = (operand(node, 1), operand(node, 2))
            return self.plain(node) if microsoft else None
        if kind == "DequantizeLinear" and microsoft:
            return self.plain(node)
        if kind in TABLE and (microsoft or node.domain in PLAIN):
            return TABLE[kind](self, node)
        if kind in MOVES and node.domain in PLAIN and operand(node, 0) in self.grids:
            return self.moved(node)
        return None

    def plain(self, node: onnx.NodeProto) -> Nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.domain = ""
        return [copy]

    def moved(self, node: onnx.NodeProto) -> Nodes:
        count = len(node.input) if node.op_type == "Concat" else 1
        grids = [self.grids.get(name) for name in node.input[:count]]
        if len(set(grids)) > 1 or grids[0] is None:
            raise Unsupported(f"{node.op_type} {node.name!r} joins integers of different scales")
        if node.op_type == "Pad" and operand(node, 2):
            raise Unsupported(f"Pad {node.name!r} fills integers; pad before QuantizeLinear")
        nodes, names = [], []
        for name in node.input[:count]:
            made, real = self.editor.dequantize(name, *grids[0])
            nodes.append(made)
            names.append(real)
        results = [self.editor.unique(f"{name}:real") for name in node.output]
        nodes.append(
            helper.make_node(node.op_type, [*names, *node.input[count:]], results, node.name, **attributes_of(node))
        )
        for real, name in zip(results, node.output, strict=True):
            self.grids[name] = grids[0]
            nodes.append(self.editor.quantize(real, *grids[0], name))
        return nodes

    # -- operators

    def operand(self, node: onnx.NodeProto, i: int, axis: int | None = None) -> tuple[onnx.NodeProto, str]:
        """Operand i with its scale and zero point behind it, dequantized. `axis`: of scales by channel."""
        scale = self.editor.constant(operand(node, i + 1))
        along = axis if scale is not None and scale.array.size > 1 else None
        made: tuple[onnx.NodeProto, str] = self.editor.dequantize(
            node.input[i], operand(node, i + 1), operand(node, i + 2), axis=along
        )
        return made

    def bias(self, node: onnx.NodeProto, i: int, scale: np.ndarray) -> tuple[Nodes, list[str]]:
        """An int32 bias, whose scale is that of the input times that of the weight."""
        if not operand(node, i):
            return [], []
        name = self.editor.add(f"{node.input[i]}:scale", scale.astype(np.float32))
        made, real = self.editor.dequantize(node.input[i], name, "", axis=0 if scale.size > 1 else None)
        return [made], [real]

    def product(self, node: onnx.NodeProto, a: int, b: int, factor: float = 1.0) -> np.ndarray:
        first = self.editor.known(operand(node, a), "the scale").array
        second = self.editor.known(operand(node, b), "the scale").array
        found: np.ndarray = np.float32(factor) * first.reshape(()) * second.reshape(-1)
        return found if found.size > 1 else found.reshape(())

    def result(self, node: onnx.NodeProto, nodes: Nodes, op: str, reals: list[str], i: int, **attributes: Any) -> Nodes:
        """The operator on reals; its result quantized with scale i and zero point i + 1, where the node has these."""
        if not operand(node, i):
            return [*nodes, helper.make_node(op, reals, [node.output[0]], node.name, **attributes)]
        real = self.editor.unique(f"{node.output[0]}:real")
        scale, zero = operand(node, i), operand(node, i + 1)
        self.grids[node.output[0]] = (scale, zero)
        made = helper.make_node(op, reals, [real], node.name, **attributes)
        return [*nodes, made, self.editor.quantize(real, scale, zero, node.output[0])]


def conv(self: _Rewriter, node: onnx.NodeProto) -> Nodes:
    x, x_real = self.operand(node, 0)
    w, w_real = self.operand(node, 3, axis=0)
    bias, more = self.bias(node, 8, self.product(node, 1, 4))
    if attributes_of(node).get("channels_last"):
        raise Unsupported(f"QLinearConv {node.name!r} is channels-last, as onnxruntime's optimizer writes it; save the "
                          "model without optimizations")  # fmt: skip
    kept = attributes_of(node, "channels_last")
    return self.result(node, [x, w, *bias], "Conv", [x_real, w_real, *more], 6, **kept)


def matmul(self: _Rewriter, node: onnx.NodeProto) -> Nodes:
    a, a_real = self.operand(node, 0)
    b, b_real = self.operand(node, 3, axis=-1)
    return self.result(node, [a, b], "MatMul", [a_real, b_real], 6)


def gemm(self: _Rewriter, node: onnx.NodeProto) -> Nodes:
    kept = attributes_of(node)
    a, a_real = self.operand(node, 0)
    b, b_real = self.operand(node, 3, axis=0 if kept.get("transB") else 1)
    alpha = float(kept.get("alpha", 1.0))
    bias, more = self.bias(node, 6, self.product(node, 1, 4, alpha))
    return self.result(node, [a, b, *bias], "Gemm", [a_real, b_real, *more], 7, **kept)


def binary(op: str) -> Callable[[_Rewriter, onnx.NodeProto], Nodes]:
    def made(self: _Rewriter, node: onnx.NodeProto) -> Nodes:
        a, a_real = self.operand(node, 0)
        b, b_real = self.operand(node, 3)
        return self.result(node, [a, b], op, [a_real, b_real], 6)

    return made


def unary(op: str, *left_out: str) -> Callable[[_Rewriter, onnx.NodeProto], Nodes]:
    def made(self: _Rewriter, node: onnx.NodeProto) -> Nodes:
        kept = attributes_of(node)
        if kept.get("channels_last"):
            raise Unsupported(f"{node.op_type} {node.name!r} is channels-last; save the model without optimizations")
        x, x_real = self.operand(node, 0)
        return self.result(node, [x], op, [x_real], 3, **attributes_of(node, "channels_last", *left_out))

    return made


def concat(self: _Rewriter, node: onnx.NodeProto) -> Nodes:
    """Result scale and zero point come first, then operands with theirs."""
    nodes, reals = [], []
    for i in range(2, len(node.input), 3):
        made, real = self.operand(node, i)
        nodes.append(made)
        reals.append(real)
    return self.result(node, nodes, "Concat", reals, 0, **attributes_of(node))


def where(self: _Rewriter, node: onnx.NodeProto) -> Nodes:
    a, a_real = self.operand(node, 1)
    b, b_real = self.operand(node, 4)
    return self.result(node, [a, b], "Where", [node.input[0], a_real, b_real], 7)


def mean(self: _Rewriter, node: onnx.NodeProto) -> Nodes:
    kept = attributes_of(node, "axes")
    axes = self.editor.add(f"{node.output[0]}:axes", np.asarray(attributes_of(node).get("axes", []), np.int64))
    x, x_real = self.operand(node, 0)
    opset = next(e.version for e in self.editor.model.opset_import if e.domain in PLAIN)
    if opset < 18:
        return self.result(node, [x], "ReduceMean", [x_real], 3, **attributes_of(node))
    return self.result(node, [x], "ReduceMean", [x_real, axes], 3, **kept)


TABLE: dict[str, Callable[[_Rewriter, onnx.NodeProto], Nodes]] = {
    "QGemm": gemm,
    "QLinearAdd": binary("Add"),
    "QLinearAveragePool": unary("AveragePool"),
    "QLinearConcat": concat,
    "QLinearConv": conv,
    "QLinearGlobalAveragePool": unary("GlobalAveragePool"),
    "QLinearLeakyRelu": unary("LeakyRelu"),
    "QLinearMatMul": matmul,
    "QLinearMul": binary("Mul"),
    "QLinearReduceMean": mean,
    "QLinearSigmoid": unary("Sigmoid"),
    "QLinearSoftmax": unary("Softmax", "opset"),
    "QLinearWhere": where,
}


def rewrite(editor: Editor) -> None:
    editor.rewrite(_Rewriter(editor))
