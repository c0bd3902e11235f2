"""What an export rule writes with: ONNX nodes and initializers, and the names they take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any

import numpy as np
import onnx

from jquant.numerics.namespace import real
from jquant.numerics.rounding import dequantize, quantize
from jquant.types import ConversionError, Op

Shape = tuple[int | None, ...]  # None for what depends on the batch

TYPES = {
    "float32": onnx.TensorProto.FLOAT,
    "float16": onnx.TensorProto.FLOAT16,
    "bool": onnx.TensorProto.BOOL,
    "int4": onnx.TensorProto.INT4,
    "int8": onnx.TensorProto.INT8,
    "uint8": onnx.TensorProto.UINT8,
    "int16": onnx.TensorProto.INT16,
    "int32": onnx.TensorProto.INT32,
    "int64": onnx.TensorProto.INT64,
}


class Unsupported(Exception):  # noqa: N818 - a reason that is collected, not an error that callers see
    """Why a node has no ONNX form."""


@dataclass
class Writer:
    """Collects nodes and initializers under unique names: those of nodes are apart from those of values."""

    opset: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)
    titles: set[str] = field(default_factory=set)  # of nodes

    def unique(self, name: str) -> str:
        return unused(name, self.taken)

    def initializer(self, name: str, array: Any, dtype: str = "") -> str:
        """Stores an array; `dtype` "int4" packs integers of that range."""
        name, array = self.unique(name), np.asarray(array)
        if dtype == "int4":
            flat = np.append(array.reshape(-1), np.zeros(array.size % 2, array.dtype)).astype(np.int8)
            packed = ((flat[0::2] & 15) | ((flat[1::2] & 15) << 4)).astype(np.uint8)
            tensor = onnx.TensorProto(name=name, data_type=TYPES[dtype], dims=array.shape, raw_data=packed.tobytes())
        else:
            tensor = onnx.numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
        self.initializers.append(tensor)
        return name

    def node(self, kind: str, inputs: tuple[str, ...], outputs: tuple[str, ...], name: str, **attributes: Any) -> None:
        given = {key: value for key, value in attributes.items() if value is not None}
        self.nodes.append(onnx.helper.make_node(kind, inputs, outputs, unused(name, self.titles), **given))

    def pair(self, x: str, scale: Any, dtype: str, name: str, result: str) -> str:
        """QuantizeLinear and DequantizeLinear with zero point 0: `x` on the grid of `scale`, as the value `result`."""
        step = self.initializer(f"{name}:scale", np.float32(scale))
        zero = self.initializer(f"{name}:zero_point", np.zeros((), dtype))
        integers = self.unique(f"{name}:{dtype}")
        self.node("QuantizeLinear", (x, step, zero), (integers,), f"{name}:quantize")
        self.node("DequantizeLinear", (integers, step, zero), (result,), f"{name}:dequantize")
        return result


def unused(name: str, taken: set[str]) -> str:
    """The name, with a number behind it where it is taken; it is taken then."""
    candidates = (name if i == 0 else f"{name}_{i}" for i in range(len(taken) + 1))
    found = next(c for c in candidates if c not in taken)
    taken.add(found)
    return found


@dataclass(frozen=True)
class Operand:
    """What a rule knows of a value: its name in the file, its shape in the framework's order, its dtype."""

    name: str
    shape: Shape
    dtype: str


@dataclass(frozen=True)
class Call:
    """One node to be written: operands, parameters by role, and where the result goes.

    `snap` puts a real attribute (a bound, a fill) on the grid of the result; `scales` are those of the operands, empty
    where the file is to have no quantization.
    """

    writer: Writer
    name: str
    inputs: tuple[Operand, ...]
    output: Operand
    params: Mapping[str, str]
    param_shapes: Mapping[str, tuple[int, ...]]
    arrays: Mapping[str, np.ndarray]
    snap: Callable[[float], float] = float
    scales: tuple[Any, ...] = ()
    dtype: str = ""
    number_rounding: str = "half_up"
    dtypes: tuple[str, ...] = ()  # of the operands

    @property
    def opset(self) -> int:
        return self.writer.opset

    def add(self, kind: str, *inputs: str | Operand, part: str = "", title: str = "", **attributes: Any) -> str:
        """Writes a node. Without `part` it makes the result; with one, the inner value `name:part`."""
        names = tuple(i.name if isinstance(i, Operand) else i for i in inputs)
        result = self.writer.unique(f"{self.name}:{part}") if part else self.output.name
        self.writer.node(kind, names, (result,), title or (result if part else self.name), **attributes)
        return result

    def reduce(self, kind: str, x: str | Operand, axes: Any, title: str, *, part: str, keepdims: int) -> str:
        """A reduction over axes, which are an operand called `title`, or before opset 18 an attribute of most."""
        if self.opset < 18 and kind != "ReduceSum":
            return self.add(kind, x, part=part, axes=list(axes), keepdims=keepdims)
        return self.add(kind, x, self.integers(axes, title), part=part, keepdims=keepdims)

    def constant(self, value: Any, part: str, dtype: Any = np.float32) -> str:
        return self.writer.initializer(f"{self.name}:{part}", np.asarray(value, dtype))

    def integers(self, values: Any, part: str) -> str:
        return self.constant(values, part, np.int64)

    def requantized(self, operands: list[str]) -> list[str]:
        """Two operands at the larger of their scales, where the integers compare them."""
        if len(self.scales) != 2 or any(s is None for s in self.scales):
            return operands
        larger = max(map(float, self.scales))
        found = []
        for i, (x, scale) in enumerate(zip(operands, self.scales, strict=True)):
            title = f"{self.name}:operand_{i}"
            same = float(scale) == larger
            found.append(x if same else self.writer.pair(x, larger, self.dtype, title, self.writer.unique(title)))
        return found

    def in_steps(self, value: float) -> float:
        """A number as a whole count of the first operand's steps, as the march rounds it, not saturated."""
        scale = self.scales[0] if self.scales else None
        if scale is None:
            return value
        return float(dequantize(quantize(real(value), scale, "int32", self.number_rounding), scale))

    def cast(self, x: str | Operand, dtype: str, part: str = "") -> str:
        return self.add("Cast", x, part=part, to=TYPES[dtype])

    def number(self, operand: Operand, part: str) -> str:
        """A mask or pixel as float32; a number as it is."""
        return operand.name if operand.dtype == "float32" else self.cast(operand, "float32", part)

    def static(self, shape: Shape) -> tuple[int, ...]:
        """A shape of which nothing depends on the batch."""
        if any(n is None for n in shape):
            raise Unsupported(f"its shape {format_shape(shape)} depends on the batch where ONNX needs a number")
        return tuple(n for n in shape if n is not None)

    def reshape_to(self, shape: Shape, x: str | Operand, part: str = "", title: str = "") -> str:
        if sum(n is None for n in shape) > 1:
            raise Unsupported(f"{format_shape(shape)} has more than one axis that depends on the batch")
        target = self.integers([-1 if n is None else n for n in shape], f"{part}_shape" if part else "shape")
        return self.add("Reshape", x, target, part=part, title=title)


def format_shape(shape: Shape) -> str:
    return "[" + ", ".join("batch" if n is None else str(n) for n in shape) + "]"


@singledispatch
def emit(op: Op, call: Call) -> None:
    """Writes the nodes of an operator. Register a rule by the operator's class."""
    raise Unsupported("there is no ONNX form of it")


def refuse(name: str, op: Op, reason: str) -> ConversionError:
    return ConversionError(
        f"node {name!r} ({type(op).__name__}): {reason}. Cut the graph before it, replace the operator, or register a "
        "rule with jquant_converters.onnx_out.emit.register"
    )
