"""Quantized ONNX files of other forms, rewritten to pairs of QuantizeLinear and DequantizeLinear with zero point 0.

One file a form: integer operators, dynamic quantization, QONNX, integers between clips, zero points. The reader of QDQ
files then reads them all.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from . import clips, dynamic, qonnx, qoperator, zero_points
from .edit import PLAIN, WIDE, Change, Editor
from .zero_points import MODES, Refusals, ZeroPoint

_QUANTIZED = (
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "DynamicQuantizeMatMul", "ConvInteger",
    "MatMulInteger", *qoperator.TABLE,
)  # fmt: skip

__all__ = ["MODES", "Change", "Refusals", "ZeroPoint", "is_quantized", "to_qdq"]


def is_quantized(model: onnx.ModelProto) -> bool:
    return any(node.op_type in _QUANTIZED or node.domain in qonnx.DOMAINS for node in model.graph.node)


def to_qdq(model: onnx.ModelProto, folder: Path | None, zero_point: ZeroPoint = "refuse") -> Editor:
    """A copy of the model in pairs of int4, int8, int16 and int32 with zero point 0.

    Raises:
      Unsupported: a zero point that `zero_point` refuses, or what has no such form.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    editor = Editor(copy, folder)
    with np.errstate(all="ignore"):  # numbers of a damaged file; what is not finite is refused where it is read
        _name_constants_once(editor)
        for step in (dynamic, qoperator, qonnx, clips):
            step.rewrite(editor)
        zero_points.rewrite(editor, zero_point)
    _drop_left_over(copy)
    return editor


def _name_constants_once(editor: Editor) -> None:
    """Reads a constant under its own name. torch's older exporter stores equal scales and zero points once, and gives
    them other names by Identity."""
    constants = {name: name for name in editor.tensors}
    for node in editor.nodes:
        if node.op_type == "Identity" and node.domain in PLAIN and len(node.input) == len(node.output) == 1:
            if node.input[0] in constants:
                constants[node.output[0]] = constants[node.input[0]]
            continue
        for i, name in enumerate(node.input):
            node.input[i] = constants.get(name, name)
    kept = editor.outputs() | _read_by_branches(editor)
    editor.rewrite(
        lambda node: [] if node.op_type == "Identity" and node.output[0] in constants.keys() - kept else None
    )


def _read_by_branches(editor: Editor) -> set[str]:
    """Names that graphs inside nodes read, at any depth."""
    inner = [a.g for node in editor.nodes for a in node.attribute if a.HasField("g")]
    found: set[str] = set()
    while inner:
        nodes = inner.pop().node
        found |= {name for node in nodes for name in node.input}
        inner += [a.g for node in nodes for a in node.attribute if a.HasField("g")]
    return found


def _drop_left_over(model: onnx.ModelProto) -> None:
    """Takes out zero points that nothing reads any more, of dtypes that the reader does not have."""
    read = {name for node in model.graph.node for name in node.input} | {entry.name for entry in model.graph.output}
    wide = (onnx.TensorProto.UINT4, *WIDE)
    for tensor in [t for t in model.graph.initializer if t.data_type in wide and t.name not in read]:
        model.graph.initializer.remove(tensor)
