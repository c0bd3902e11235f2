"""Dynamic quantization: the integer weights are taken, and what was quantized by its own range is calibrated.

DynamicQuantizeLinear takes the scale of a value from the value itself, which no static program can. What remains of
`MatMulInteger(DynamicQuantizeLinear(x), w) * scales` is a product of x with a dequantized weight.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from ..onnx_in import Unsupported
from .edit import Change, Editor, attributes_of, operand

_REALS = {"ConvInteger": "Conv", "MatMulInteger": "MatMul"}
WHY = "its scale follows from the data (DynamicQuantizeLinear): calibrate it with the model's own batches"


def rewrite(editor: Editor) -> None:
    if not any(node.op_type in (*_REALS, "DynamicQuantizeMatMul") for node in editor.nodes):
        return
    _Rewriter(editor).run()


class _Rewriter:
    def __init__(self, editor: Editor) -> None:
        self.editor, self.makers, self.readers = editor, editor.makers(), editor.readers()
        self.dropped: set[str] = set()  # results of nodes that go
        self.new: dict[str, list[onnx.NodeProto]] = {}  # {result of a node: what comes in its place}

    def run(self) -> None:
        for node in self.editor.nodes:
            if node.op_type in _REALS:
                self.integer(node)
            elif node.op_type == "DynamicQuantizeMatMul":
                self.fused(node)
        self.editor.rewrite(self.replaced)
        read = {name for node in self.editor.nodes for name in node.input} | self.editor.outputs()
        self.editor.rewrite(lambda node: [] if self.is_dead(node, read) else None)

    def replaced(self, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        result = node.output[0]
        return self.new.get(result, [] if result in self.dropped else None)

    @staticmethod
    def is_dead(node: onnx.NodeProto, read: set[str]) -> bool:
        return node.op_type == "DynamicQuantizeLinear" and not read & set(node.output)

    def only(self, name: str, kind: str) -> onnx.NodeProto:
        found = self.readers.get(name, [])
        if len(found) != 1 or found[0].op_type != kind:
            raise Unsupported(f"{name!r} should go into one {kind}, as onnxruntime's quantize_dynamic writes it")
        return found[0]

    def integer(self, node: onnx.NodeProto) -> None:
        source = self.makers.get(node.input[0])
        if source is None or source.op_type != "DynamicQuantizeLinear":
            raise Unsupported(f"{node.op_type} {node.name!r} reads integers that no DynamicQuantizeLinear makes")
        cast = self.only(node.output[0], "Cast")
        scaled = self.only(cast.output[0], "Mul")
        scales = self.makers[next(name for name in scaled.input if name != cast.output[0])]
        weight_scale = next((name for name in scales.input if name != source.output[1]), "")
        if scales.op_type != "Mul" or source.output[1] not in scales.input or not weight_scale:
            raise Unsupported(f"the scale of {node.op_type} {node.name!r} is no product of two scales")
        conv = node.op_type == "ConvInteger"
        weight, real = self.weight(node.input[1], weight_scale, operand(node, 3), conv)
        made = helper.make_node(
            _REALS[node.op_type], [source.input[0], real], [scaled.output[0]], node.name, **attributes_of(node)
        )
        self.new[scaled.output[0]] = [weight, made]
        self.dropped |= {node.output[0], cast.output[0]}
        if len(self.readers[scales.output[0]]) == 1:
            self.dropped.add(scales.output[0])
        self.calibrate(source.input[0])

    def weight(self, integers: str, scale: str, zero: str, conv: bool) -> tuple[onnx.NodeProto, str]:
        """The weight dequantized; scales by channel are [O, 1, ...] or [O]."""
        steps = self.editor.known(scale, "the scale").array
        if steps.size == 1:
            named = self.editor.add(f"{integers}:scale", steps.reshape(()).astype(np.float32))
            found: tuple[onnx.NodeProto, str] = self.editor.dequantize(integers, named, zero)
            return found
        named = self.editor.add(f"{integers}:scale", steps.reshape(-1).astype(np.float32))
        found = self.editor.dequantize(integers, named, zero, axis=0 if conv else -1)
        return found

    def fused(self, node: onnx.NodeProto) -> None:
        """onnxruntime's DynamicQuantizeMatMul(A, B, scale of B, zero point of B, bias)."""
        weight, real = self.weight(node.input[1], node.input[2], operand(node, 3), conv=False)
        bias = operand(node, 4)
        product = self.editor.unique(f"{node.output[0]}:product") if bias else node.output[0]
        nodes = [weight, helper.make_node("MatMul", [node.input[0], real], [product], node.name)]
        if bias:
            nodes.append(helper.make_node("Add", [product, bias], [node.output[0]], f"{node.name}:bias"))
        self.new[node.output[0]] = nodes
        self.calibrate(node.input[0])

    def calibrate(self, name: str) -> None:
        if name not in self.editor.calibrated:
            self.editor.calibrated.append(name)
            self.editor.changes.append(Change(name, "uint8, a scale for each batch", "int8, calibrated", WHY))
