"""A copy of an ONNX graph that is being rewritten: its constants, its nodes by result, and new names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import onnx
from onnx import helper, numpy_helper

from ..onnx_in import Unsupported
from ..onnx_in.load import array_of

NARROW = {
    onnx.TensorProto.INT4: ("int4", ml_dtypes.int4),
    onnx.TensorProto.UINT4: ("uint4", ml_dtypes.uint4),
}
WIDE = {onnx.TensorProto.UINT16: "uint16", onnx.TensorProto.UINT32: "uint32"}
PLAIN = ("", "ai.onnx")


class Change(NamedTuple):
    """What is read otherwise than the file says it, for the report."""

    name: str
    before: str
    after: str
    why: str


class Integers(NamedTuple):
    """A constant of integers with the dtype that it has in the file."""

    array: np.ndarray
    dtype: str


@dataclass
class Editor:
    """Rewrites the nodes of a model in place; the model should be a copy."""

    model: onnx.ModelProto
    folder: Path | None
    changes: list[Change] = field(default_factory=list)
    calibrated: list[str] = field(default_factory=list)  # values whose scale follows from the data
    tensors: dict[str, onnx.TensorProto] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    made: list[onnx.TensorProto] = field(default_factory=list)

    def __post_init__(self) -> None:
        graph = self.model.graph
        self.tensors = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant" and node.domain in PLAIN and node.output:
                for attribute in node.attribute:
                    if attribute.name == "value":
                        self.tensors[node.output[0]] = attribute.t
        self.taken = {name for node in graph.node for name in (*node.input, *node.output)}
        self.taken |= {entry.name for entry in graph.input} | set(self.tensors)

    # -- reading

    @property
    def nodes(self) -> Any:
        return self.model.graph.node

    def makers(self) -> dict[str, onnx.NodeProto]:
        return {name: node for node in self.nodes for name in node.output if name}

    def readers(self) -> dict[str, list[onnx.NodeProto]]:
        found: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                found.setdefault(name, []).append(node)
        return found

    def outputs(self) -> set[str]:
        return {entry.name for entry in self.model.graph.output}

    def constant(self, name: str) -> Integers | None:
        """A constant of the file; integers narrower than a byte are int8 or uint8 here."""
        tensor = self.tensors.get(name)
        if tensor is None:
            return None
        if tensor.data_type in NARROW and tensor.data_location != onnx.TensorProto.EXTERNAL:
            dtype, _ = NARROW[tensor.data_type]
            return Integers(numpy_helper.to_array(tensor).astype(np.int8 if dtype == "int4" else np.uint8), dtype)
        if tensor.data_type in WIDE and tensor.data_location != onnx.TensorProto.EXTERNAL:
            array = numpy_helper.to_array(tensor)
            return Integers(array, str(array.dtype))
        array = array_of(tensor, self.folder)
        narrow = tensor.data_type == onnx.TensorProto.INT4
        return Integers(array, "int4" if narrow else str(array.dtype))

    def known(self, name: str, what: str) -> Integers:
        found = self.constant(name)
        if found is None:
            raise Unsupported(f"{what} {name!r} is computed by the model; make it a constant")
        return found

    # -- writing

    def unique(self, name: str) -> str:
        candidate, count = name, 0
        while candidate in self.taken:
            count += 1
            candidate = f"{name}_{count}"
        self.taken.add(candidate)
        return candidate

    def add(self, name: str, array: Any, dtype: str = "") -> str:
        """A new constant. `dtype` "int4": the integers are stored in four bits."""
        name = self.unique(name)
        if dtype == "int4":
            tensor = numpy_helper.from_array(np.asarray(array).astype(ml_dtypes.int4), name)
        else:
            tensor = numpy_helper.from_array(np.asarray(array, dtype or None), name)
        self.tensors[name] = tensor
        self.model.graph.initializer.append(tensor)
        return name

    def replace(self, name: str, array: np.ndarray, dtype: str, readers: int) -> str:
        """A constant in other numbers: under its own name where one node reads it, so that weights keep their names."""
        old = self.tensors[name]
        if readers != 1 or old.name != name:
            return self.add(f"{name}:{dtype}", array, dtype)
        self.model.graph.initializer.remove(old)
        self.taken.discard(name)
        return self.add(name, array, dtype)

    def rewrite(self, rule: Callable[[onnx.NodeProto], Iterable[onnx.NodeProto] | None]) -> None:
        """Puts what `rule` returns in the place of each node; None keeps the node."""
        nodes: list[onnx.NodeProto] = []
        for node in self.nodes:
            found = rule(node)
            nodes += [node] if found is None else list(found)
        del self.model.graph.node[:]
        self.model.graph.node.extend(nodes)

    def dequantize(self, integers: str, scale: str, zero: str, result: str = "", axis: int | None = None) -> Any:
        """A DequantizeLinear, and the name of its result."""
        result = result or self.unique(f"{integers}:real")
        given = [integers, scale, zero] if zero else [integers, scale]
        attributes = {} if axis is None else {"axis": axis}
        return helper.make_node("DequantizeLinear", given, [result], f"{result}:dequantize", **attributes), result

    def quantize(self, x: str, scale: str, zero: str, result: str) -> onnx.NodeProto:
        given = [x, scale, zero] if zero else [x, scale]
        return helper.make_node("QuantizeLinear", given, [result], f"{result}:quantize")


def attributes_of(node: onnx.NodeProto, *left_out: str) -> dict[str, Any]:
    """The attributes of a node, for another one."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute if a.name not in left_out}


def operand(node: onnx.NodeProto, i: int) -> str:
    """The name of an operand, "" where it is left out."""
    return node.input[i] if i < len(node.input) else ""
