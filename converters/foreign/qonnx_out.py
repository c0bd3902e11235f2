"""A QDQ model in QONNX's form: each pair is one Quant node, and a weight is float with a Quant behind it."""

from __future__ import annotations

import warnings

import numpy as np
import onnx
from onnx import helper

from jquant.types import ConversionError

from .edit import PLAIN, Editor, operand
from .qonnx import DOMAINS

_SHOWN = 5  # names in a warning

_BITS = {"int4": 4, "int8": 8, "int16": 16, "int32": 32}


class BiasWarning(UserWarning):
    """Biases of which a file cannot hold every bit."""


def to_quant(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a model of `to_onnx` with Quant nodes in place of QuantizeLinear and DequantizeLinear.

    Raises:
      ConversionError: an integer that is neither a constant nor made by QuantizeLinear.

    Warns:
      BiasWarning: integers that become others. A Quant node rounds float32 numbers, which have 24 bits.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    editor = Editor(copy, None)
    makers = editor.makers()
    zero = editor.add("quant:zero", np.float32(0))
    bits = {n: editor.add(f"quant:bits_{n}", np.float32(n)) for n in sorted(_BITS.values())}

    lost: dict[str, int] = {}

    def quant(x: str, scale: str, dtype: str, result: str, name: str) -> onnx.NodeProto:
        given = [x, scale, zero, bits[_BITS[dtype]]]
        kept = {"signed": 1, "narrow": 0, "rounding_mode": "ROUND"}
        return helper.make_node("Quant", given, [result], name, domain=DOMAINS[0], **kept)

    def rule(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        if node.domain not in PLAIN or node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            return None
        if node.op_type == "QuantizeLinear":
            return []
        stored, maker = editor.constant(node.input[0]), makers.get(node.input[0])
        if maker is not None and maker.op_type == "QuantizeLinear":
            dtype = editor.known(operand(maker, 2), "the zero point").dtype
            return [quant(maker.input[0], maker.input[1], dtype, node.output[0], node.name)]
        if stored is None:
            raise ConversionError(f"{node.name!r} reads integers that no QuantizeLinear makes")
        return [_weight(node, stored.array, stored.dtype)]

    def _weight(node: onnx.NodeProto, integers: np.ndarray, dtype: str) -> onnx.NodeProto:
        scale = editor.known(node.input[1], "the scale").array
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        if scale.size > 1:
            scale = scale.reshape([-1 if i == axis % integers.ndim else 1 for i in range(integers.ndim)])
        reals = (integers * scale.astype(np.float64)).astype(np.float32)
        if off := int(np.abs(np.rint(reals / scale).astype(np.int64) - integers).max(initial=0)):
            lost[node.input[0]] = off
        real = editor.replace(node.input[0], reals, "float32", 1)
        step = editor.add(f"{node.input[0]}:steps", scale)
        return quant(real, step, dtype, node.output[0], node.name)

    editor.rewrite(rule)
    _warn_of(lost)
    copy.opset_import.append(helper.make_opsetid(DOMAINS[0], 2))
    return copy


def _warn_of(lost: dict[str, int]) -> None:
    """Warns of constants that come back as other integers: {name: the largest difference in LSB}."""
    if not lost:
        return
    shown = ", ".join(f"{name!r} (up to {off} LSB)" for name, off in list(lost.items())[:_SHOWN])
    warnings.warn(
        f"a QONNX file holds integers as float32 numbers, of 24 bits, and loses bits of {shown}"
        f"{' and others' if len(lost) > _SHOWN else ''}; form='qdq' keeps them",
        BiasWarning,
        stacklevel=4,
    )
