"""Brevitas's QCDQ form: a Clip of integers between QuantizeLinear and DequantizeLinear, for ranges of other widths."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from ..onnx_in import Unsupported
from .edit import PLAIN, Editor, Integers, operand


def rewrite(editor: Editor) -> None:
    makers = editor.makers()

    def quantized(name: str) -> bool:
        maker = makers.get(name)
        return maker is not None and maker.op_type == "QuantizeLinear"

    clips = {
        node.output[0]: node
        for node in editor.nodes
        if node.op_type == "Clip" and node.domain in PLAIN and node.output and node.input
        and (quantized(node.input[0]) or _is_integer(editor.constant(node.input[0])))
    }  # fmt: skip
    if not clips:
        return
    before = {node.input[0]: node for node in clips.values() if quantized(node.input[0])}

    def rule(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        if node.op_type == "QuantizeLinear" and node.output[0] in before:
            return _clipped_before(editor, node, before[node.output[0]])
        if node.output and node.output[0] in clips:
            return [] if operand(node, 0) in before else _folded(editor, node)
        return None

    editor.rewrite(rule)


def _is_integer(found: Integers | None) -> bool:
    return found is not None and np.issubdtype(found.array.dtype, np.integer)


def _bounds(editor: Editor, node: onnx.NodeProto) -> list[int | None]:
    names = (operand(node, 1), operand(node, 2))
    return [int(editor.known(name, "the bound").array.reshape(())) if name else None for name in names]


def _folded(editor: Editor, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """A constant: clipped now, in four bits where these hold it. The Clip's name becomes the constant's."""
    found = editor.known(node.input[0], "the weight")
    low, high = _bounds(editor, node)
    values = np.clip(found.array, low, high)
    narrow = found.dtype == "int8" and low is not None and high is not None and low >= -8 and high <= 7
    stored = editor.add(f"{node.output[0]}:clipped", values, "int4" if narrow else "")
    for reader in editor.nodes:
        for i, name in enumerate(reader.input):
            if name == node.output[0]:
                reader.input[i] = stored
                if narrow:  # its zero point has to be of the same dtype, or left out
                    _drop_zero(editor, reader)
    return []


def _drop_zero(editor: Editor, node: onnx.NodeProto) -> None:
    if len(node.input) > 2 and node.input[2]:
        if np.any(editor.known(node.input[2], "the zero point").array):
            raise Unsupported(f"{node.op_type} {node.name!r}: a zero point of four bits")
        del node.input[2:]


def _clipped_before(editor: Editor, node: onnx.NodeProto, clip: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The reals are clipped before they are rounded: the same integers, since the bounds lie on the grid."""
    scale = editor.known(node.input[1], "the scale").array
    zero = editor.known(node.input[2], "the zero point").array if operand(node, 2) else np.zeros((), np.uint8)
    if scale.size != 1:
        raise Unsupported(f"QuantizeLinear {node.name!r} has {scale.size} scales for a value; only weights have that")
    step, point = float(scale.reshape(())), int(zero.reshape(()))
    names = []
    for part, edge in zip(("low", "high"), _bounds(editor, clip), strict=True):
        names.append("" if edge is None else editor.add(f"{clip.output[0]}:{part}", np.float32((edge - point) * step)))
    real = editor.unique(f"{clip.output[0]}:real")
    made = onnx.NodeProto()
    made.CopyFrom(node)
    made.input[0], made.output[0] = real, clip.output[0]
    return [helper.make_node("Clip", [node.input[0], *names], [real], f"{clip.output[0]}:clip"), made]
