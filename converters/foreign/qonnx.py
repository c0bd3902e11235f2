"""QONNX's Quant, as Brevitas writes it, as QuantizeLinear and DequantizeLinear.

`Quant(x, scale, zero point, bit width)` is (clip(round(x / scale + zero)) - zero) * scale. A range that is not that of
a dtype becomes a Clip before the pair.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from ..onnx_in import Unsupported
from .edit import Editor, attributes_of, operand

DOMAINS = ("qonnx.custom_op.general", "finn.custom_op.general", "onnx.brevitas")
KINDS = ("Quant", "IntQuant")


def rewrite(editor: Editor) -> None:
    readers = {name: len(found) for name, found in editor.readers().items()}
    editor.rewrite(lambda node: _quant(editor, node, readers) if node.domain in DOMAINS else None)


def _quant(editor: Editor, node: onnx.NodeProto, readers: dict[str, int]) -> list[onnx.NodeProto]:
    if node.op_type not in KINDS:
        raise Unsupported(f"{node.op_type} {node.name!r} of {node.domain}; Quant alone is read")
    kept = attributes_of(node)
    mode = kept.get("rounding_mode", b"ROUND")
    mode = mode.decode() if isinstance(mode, bytes) else str(mode)
    if mode.upper() not in ("ROUND", "HALF_EVEN"):
        raise Unsupported(
            f"Quant {node.name!r} rounds by {mode}; integers here are rounded to the nearest, ties to even"
        )
    scale, zero, bits = (editor.known(operand(node, i), what).array for i, what in _NUMBERS)
    if bits.size != 1 or not 2 <= float(bits.reshape(())) <= 32 or float(bits.reshape(())) % 1:
        raise Unsupported(f"Quant {node.name!r} has the bit width {bits.reshape(-1)[:4]}; one whole number, 2 to 32")
    if np.any(zero % 1) or zero.size != 1:
        raise Unsupported(f"Quant {node.name!r} has the zero point {zero.reshape(-1)[:4]}; one whole number is read")
    low, high = _range(int(bits.reshape(())), bool(kept.get("signed", 1)), bool(kept.get("narrow", 0)))
    point = int(zero.reshape(()))
    if operand(node, 0) in editor.tensors:
        return _constant(editor, node, scale, point, (low, high), readers[node.input[0]])
    return _value(editor, node, scale, point, low, high)


_NUMBERS = ((1, "the scale"), (2, "the zero point"), (3, "the bit width"))


def _range(bits: int, signed: bool, narrow: bool) -> tuple[int, int]:
    if signed:
        return -(2 ** (bits - 1)) + narrow, 2 ** (bits - 1) - 1
    return 0, 2**bits - 1 - narrow


def _dtype(low: int, high: int) -> str:
    for name, bits in (("int4", 4), ("int8", 8), ("int16", 16)):
        if -(2 ** (bits - 1)) <= low and high < 2 ** (bits - 1):
            return name
    return "int32"


def _constant(
    editor: Editor, node: onnx.NodeProto, scale: np.ndarray, zero: int, ends: tuple[int, int], readers: int
) -> list[onnx.NodeProto]:
    """Its integers, with the zero point taken off."""
    x, (low, high) = editor.known(node.input[0], "the weight").array, ends
    values = np.clip(np.rint(x / scale + np.float32(zero)), low, high) - zero
    dtype = _dtype(int(min(values.min(), low - zero)), int(max(values.max(), high - zero)))
    stored = editor.replace(node.input[0], values.astype("int8" if dtype == "int4" else dtype), dtype, readers)
    axis = _axis(node, scale, x.ndim)
    steps = editor.add(f"{node.input[0]}:scale", scale.reshape(-1) if axis is not None else scale.reshape(()))
    made, _ = editor.dequantize(stored, steps, "", node.output[0], axis)
    return [made]


def _axis(node: onnx.NodeProto, scale: np.ndarray, rank: int) -> int | None:
    if scale.size == 1:
        return None
    found = [i for i, n in enumerate(scale.shape) if n > 1]
    if len(found) != 1 or scale.ndim > rank:
        raise Unsupported(f"Quant {node.name!r} has scales of shape {list(scale.shape)}; one, or one a channel")
    return found[0] + rank - scale.ndim


def _value(
    editor: Editor, node: onnx.NodeProto, scale: np.ndarray, zero: int, low: int, high: int
) -> list[onnx.NodeProto]:
    if scale.size != 1:
        raise Unsupported(f"Quant {node.name!r} has {scale.size} scales for a value; only weights have that")
    step = np.float32(scale.reshape(()))
    name, result = node.input[0], node.output[0]
    whole = {(-128, 127): "int8", (0, 255): "uint8", (-32768, 32767): "int16"}.get((low, high))
    nodes: list[onnx.NodeProto] = []
    if whole is None or (whole == "int16" and zero):
        if high - zero > 32767 or low - zero < -32768:
            raise Unsupported(f"Quant {node.name!r} makes values of {low} to {high}; int16 is the widest value here")
        bounds = [editor.add(f"{result}:{part}", np.float32((edge - zero) * float(step)))
                  for part, edge in (("low", low), ("high", high))]  # fmt: skip
        clipped = editor.unique(f"{result}:clipped")
        nodes.append(helper.make_node("Clip", [name, *bounds], [clipped], f"{node.name or result}:clip"))
        whole, zero, name = "int8" if low - zero >= -128 and high - zero <= 127 else "int16", 0, clipped
    steps, point = editor.add(f"{result}:scale", step), editor.add(f"{result}:zero", np.asarray(zero, whole))
    integers = editor.unique(f"{result}:integers")
    made, _ = editor.dequantize(integers, steps, point, result)
    return [*nodes, editor.quantize(name, steps, point, integers), made]
