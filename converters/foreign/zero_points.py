"""Zero points other than 0: read as what they are, widened, or quantized again.

Integers of the chip have zero point 0. uint8 with zero point 128 is int8 with zero point 0, bit for bit. Any other
zero point of eight bits fits into int16 with the same scale ("widen"), or the range is quantized again ("requantize").
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import onnx
from onnx import helper

from ..onnx_in import Unsupported
from ..refusals import listed
from .edit import PLAIN, Change, Editor, Integers, operand

ZeroPoint = Literal["refuse", "widen", "requantize"]
MODES = ("refuse", "widen", "requantize")
SIGNED = {"uint4": ("int4", 8), "uint8": ("int8", 128), "uint16": ("int16", 32768)}  # and the zero point that is 0
RANGES = {
    "uint4": (0, 15), "int4": (-8, 7), "uint8": (0, 255), "int8": (-128, 127), "uint16": (0, 65535),
    "int16": (-32768, 32767),
}  # fmt: skip
NEXT_STEP = (
    "the chip's integers have zero point 0. Quantize symmetrically (onnxruntime: ActivationSymmetric and "
    'WeightSymmetric), or pass zero_point="widen" (int16 with the same scale, exact) or zero_point="requantize" '
    "(symmetric int8 of the same range)"
)
_OUTPUT_TYPES = {0: "uint8", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 21: "uint4", 22: "int4"}


def rewrite(editor: Editor, mode: ZeroPoint) -> None:
    work = _Rewriter(editor, mode)
    editor.rewrite(work)
    if work.refused:
        raise Refusals(listed(f"{len(work.refused)} zero points are not 0", work.refused, NEXT_STEP))


class Refusals(Unsupported):
    """Every value with a zero point that is not 0, in one message."""


class _Rewriter:
    def __init__(self, editor: Editor, mode: ZeroPoint) -> None:
        self.editor, self.mode = editor, mode
        self.refused: list[str] = []
        self.makers = editor.makers()
        self.readers = {name: len(found) for name, found in editor.readers().items()}
        self.told: set[str] = set()
        self.new: dict[tuple[str, str, str], tuple[str, str]] = {}  # {scale, zero point, dtype: names of new ones}

    def __call__(self, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or node.domain not in PLAIN:
            return None
        if node.op_type == "QuantizeLinear" and node.input[0] in self.editor.tensors:
            return self.constant(node)
        stored = self.editor.constant(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if operand(node, 2):
            zero = self.editor.constant(node.input[2])
            if zero is None:
                return None  # the reader says why
        elif stored is not None:
            zero = Integers(np.zeros((), np.int64), stored.dtype)
        else:
            dtype = self.dtype_without_zero(node)
            zero = Integers(np.zeros((), np.int64), dtype)
        if zero.dtype not in RANGES or (zero.dtype in ("int4", "int8", "int16") and not zero.array.any()):
            return self.plain(node, stored, zero.dtype)
        points = zero.array.astype(np.int64)
        if zero.dtype in SIGNED and (points == SIGNED[zero.dtype][1]).all():
            return self.signed(node, stored, points, zero.dtype)
        if stored is not None:
            return self.weight(node, stored, points, zero.dtype)
        return self.value(node, points, zero.dtype)

    def constant(self, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        """A constant that is quantized: its integers, which the DequantizeLinear behind it then reads."""
        zero = self.editor.constant(operand(node, 2)) if operand(node, 2) else None
        dtype = zero.dtype if zero is not None else self.dtype_without_zero(node)
        if dtype not in RANGES or (dtype.startswith("int") and (zero is None or not zero.array.any())):
            return None  # the reader does it
        x, scale = self.editor.known(node.input[0], "it").array, self.editor.known(node.input[1], "the scale").array
        points = np.zeros((), np.int64) if zero is None else zero.array.astype(np.int64)
        shape = [1] * x.ndim
        if scale.size > 1:
            shape[next((a.i for a in node.attribute if a.name == "axis"), 1)] = -1
        steps, spread = (v.reshape(shape) if v.size > 1 else v.reshape(()) for v in (scale, points))
        integers = np.clip(np.rint(x / steps) + spread, *RANGES[dtype])
        name = node.input[0] if self.readers[node.input[0]] == 1 else f"{node.input[0]}:integers"
        stored = "int8" if dtype == "int4" else "uint8" if dtype == "uint4" else dtype
        self.editor.tensors[node.output[0]] = onnx.numpy_helper.from_array(integers.astype(stored), name)
        return [helper.make_node("Constant", [], [node.output[0]], name, value=self.editor.tensors[node.output[0]])]

    def plain(self, node: onnx.NodeProto, stored: Integers | None, dtype: str) -> list[onnx.NodeProto] | None:
        """Zero point 0. A value with a scale for each channel is no form of the chip all the same."""
        scale = self.editor.constant(operand(node, 1))
        if stored is not None or scale is None or scale.array.size == 1 or not dtype.startswith("int"):
            return None
        maker = self.makers.get(node.input[0])
        if node.op_type == "DequantizeLinear" and maker is not None and maker.input[0] in self.editor.tensors:
            return None  # a weight
        if self.mode == "refuse":
            return None  # the reader says why
        return self.by_channel(node, np.zeros((), np.int64), dtype, scale.array)

    def dtype_without_zero(self, node: onnx.NodeProto) -> str:
        if node.op_type == "QuantizeLinear":
            kind = next((a.i for a in node.attribute if a.name == "output_dtype"), 0)
            return _OUTPUT_TYPES.get(kind, "")
        maker = self.makers.get(node.input[0])
        if maker is None or maker.op_type != "QuantizeLinear":
            return ""
        zero = self.editor.constant(operand(maker, 2)) if operand(maker, 2) else None
        return zero.dtype if zero is not None else self.dtype_without_zero(maker)

    def grid(self, node: onnx.NodeProto, scale: np.ndarray, dtype: str) -> list[str]:
        """Names of a scale, and of the zero point 0 of a dtype."""
        stored = "int8" if dtype == "int4" else dtype
        step = self.editor.add(f"{node.output[0]}:step", scale.astype(np.float32))
        return [step, self.editor.add(f"{node.output[0]}:point", np.zeros(scale.shape, stored), dtype)]

    def changed(self, node: onnx.NodeProto, *, x: str, grid: list[str]) -> onnx.NodeProto:
        made = onnx.NodeProto()
        made.CopyFrom(node)
        for i in reversed([i for i, a in enumerate(made.attribute) if a.name == "output_dtype"]):
            del made.attribute[i]
        del made.input[:]
        made.input.extend([x, *grid])
        return made

    def signed(
        self, node: onnx.NodeProto, stored: Integers | None, points: np.ndarray, dtype: str
    ) -> list[onnx.NodeProto]:
        """uint8 with zero point 128: the same integers, less 128."""
        narrow, middle = SIGNED[dtype]
        scale = self.editor.known(node.input[1], "the scale").array
        x = node.input[0]
        if stored is not None:
            array = (stored.array.astype(np.int64) - middle).astype("int8" if narrow == "int4" else narrow)
            x = self.editor.replace(node.input[0], array, narrow, self.readers[node.input[0]])
        return [self.changed(node, x=x, grid=self.grid(node, scale, narrow))]

    def weight(
        self, node: onnx.NodeProto, stored: Integers, points: np.ndarray, dtype: str
    ) -> list[onnx.NodeProto] | None:
        scale = self.editor.known(node.input[1], "the scale").array
        if stored.array.size == 1 and points.size == scale.size == 1:
            real = (stored.array.astype(np.float32) - np.float32(points.reshape(()))) * scale.reshape(())
            tensor = onnx.numpy_helper.from_array(real.astype(np.float32), node.output[0])
            self.editor.tensors[node.output[0]] = tensor  # a number is exact: bounds, factors
            return [helper.make_node("Constant", [], [node.output[0]], node.name, value=tensor)]
        shape = [1] * stored.array.ndim
        if points.size > 1 or scale.size > 1:
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
            if not -len(shape) <= axis < len(shape):
                raise Unsupported(f"axis {axis} of {len(shape)}")
            shape[axis] = -1
        spread = points.reshape(shape) if points.size > 1 else points.reshape(())
        values = stored.array.astype(np.int64) - spread
        low, high = RANGES["int8"]
        if low <= values.min(initial=0) and values.max(initial=0) <= high:
            # Without their zero point the integers fit as they are.
            wide = self.changed(node, x=self.stored(node, values, "int8"), grid=self.grid(node, scale, "int8"))
            return [wide]
        if not self.allowed(node, points, dtype, "weight"):
            return None
        steps = scale.reshape(shape) if scale.size > 1 else scale.reshape(())
        if self.mode == "widen":
            self.tell(node, points, dtype, scale, "int16", scale, "a weight whose zero point is not 0")
            return [self.changed(node, x=self.stored(node, values, "int16"), grid=self.grid(node, scale, "int16"))]
        reals = values * steps.astype(np.float64)
        axes = tuple(i for i, n in enumerate(shape) if n == 1) if steps.ndim else None
        peak = np.maximum(reals.max(axis=axes) / 127, -reals.min(axis=axes) / 128).astype(np.float32)
        peak = np.maximum(peak.reshape(scale.shape), np.float32(2.0**-23))
        fresh = np.clip(np.rint(reals / (peak.reshape(steps.shape))), low, high)
        loss = np.abs(fresh * peak.reshape(steps.shape) - reals).max()
        self.tell(node, points, dtype, scale, "int8", peak, f"a weight quantized again, at most {loss:.3g} off")
        return [self.changed(node, x=self.stored(node, fresh, "int8"), grid=self.grid(node, peak, "int8"))]

    def stored(self, node: onnx.NodeProto, values: np.ndarray, dtype: str) -> str:
        return self.editor.replace(node.input[0], values.astype(dtype), dtype, self.readers[node.input[0]])

    def value(self, node: onnx.NodeProto, points: np.ndarray, dtype: str) -> list[onnx.NodeProto] | None:
        scale = self.editor.known(node.input[1], "the scale").array
        if not self.allowed(node, points, dtype, "value"):
            return None
        return self.pair(node, points, dtype, scale)

    def pair(self, node: onnx.NodeProto, points: np.ndarray, dtype: str, scale: np.ndarray) -> list[onnx.NodeProto]:
        low, high = RANGES[dtype]
        quantizes, x = node.op_type == "QuantizeLinear", node.input[0]
        if scale.size > 1 or points.size > 1:
            return self.by_channel(node, points, dtype, scale)
        step, point = float(scale.reshape(())), int(points.reshape(()))
        if self.mode == "widen":
            why = f"the same steps from {low - point} to {high - point}, which a clamp keeps"
            self.tell(node, points, dtype, scale, "int16", scale, why)
            made = self.changed(node, x=x, grid=self.grid(node, scale.reshape(()), "int16"))
            if not quantizes:
                return [made]
            bounds = [self.editor.add(f"{node.output[0]}:{part}", np.float32((edge - point) * step))
                      for part, edge in (("low", low), ("high", high))]  # fmt: skip
            clipped = self.editor.unique(f"{node.output[0]}:clipped")
            made.input[0] = clipped
            return [helper.make_node("Clip", [x, *bounds], [clipped], f"{node.output[0]}:clip"), made]
        peak = np.float32(max((high - point) / 127, (point - low) / 128) * step)
        self.tell(node, points, dtype, scale, "int8", peak, _loss(step, float(peak)))
        made = self.changed(node, x=x, grid=self.grid(node, np.asarray(peak), "int8"))
        return [*self.cut(node, made, (low - point) * step, (high - point) * step), made] if quantizes else [made]

    def cut(self, node: onnx.NodeProto, made: onnx.NodeProto, low: float, high: float) -> list[onnx.NodeProto]:
        """What the range of the file cuts off and the symmetric one would not: of uint8 with zero point 0, a ReLU."""
        x, result = node.input[0], node.output[0]
        maker = self.makers.get(x)
        if low == 0 and maker is not None and maker.op_type == "Relu":
            return []
        made.input[0] = self.editor.unique(f"{result}:cut")
        if low == 0:
            return [helper.make_node("Relu", [x], [made.input[0]], f"{result}:relu")]
        smaller = [self.editor.add(f"{result}:low", np.float32(low)), ""] if -low < high else []
        bounds = smaller or ["", self.editor.add(f"{result}:high", np.float32(high))]
        return [helper.make_node("Clip", [x, *bounds], [made.input[0]], f"{result}:clip")]

    def by_channel(
        self, node: onnx.NodeProto, points: np.ndarray, dtype: str, scale: np.ndarray
    ) -> list[onnx.NodeProto]:
        """A value with a scale for each channel: the largest of them."""
        low, high = RANGES[dtype]
        peak = np.float32(np.max(np.maximum((high - points) / 127, (points - low) / 128) * scale))
        why = "a value with a scale for each channel, which the chip does not have: the largest range for all; "
        self.tell(node, points, dtype, scale, "int8", peak, why + _loss(float(scale.min()), float(peak)))
        made = self.changed(node, x=node.input[0], grid=self.grid(node, np.asarray(peak), "int8"))
        positive = node.op_type == "QuantizeLinear" and low == 0 and not points.any()
        return [*(self.cut(node, made, 0.0, float(peak)) if positive else []), made]

    # -- what is said

    def allowed(self, node: onnx.NodeProto, points: np.ndarray, dtype: str, what: str) -> bool:
        if self.mode != "refuse":
            return True
        if node.op_type == "DequantizeLinear" and what != "weight":
            return False  # its QuantizeLinear is named
        shown = ", ".join(map(str, np.unique(points)[:4]))
        self.refused.append(f"{node.op_type} {node.name!r} making {list(node.output)}: zero point {shown} of {dtype}")
        return False

    def tell(
        self,
        node: onnx.NodeProto,
        points: np.ndarray,
        dtype: str,
        scale: np.ndarray,
        after: str,
        new: Any,
        why: str,
    ) -> None:
        source = node.input[0] if node.op_type == "QuantizeLinear" or node.input[0] in self.editor.tensors else ""
        if not source or source in self.told:
            return
        self.told.add(source)
        shown = ", ".join(map(str, np.unique(points)[:4]))
        before = f"{dtype} zero point {shown}, scale {_shown(scale)}"
        self.editor.changes.append(Change(source, before, f"{after} scale {_shown(new)}", why))


def _loss(before: float, after: float) -> str:
    return f"a step is {after / before:.4g} of the file's: {np.log2(after / before):.2f} bits of resolution are lost"


def _shown(scale: Any) -> str:
    values = np.asarray(scale).reshape(-1)
    return f"{values[0]:.6g}" if values.size == 1 else f"{values.min():.6g} to {values.max():.6g}"
