"""Puts pairs of QuantizeLinear and DequantizeLinear into a float ONNX model, where a table of scales says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import onnx
from onnx import helper

from jquant.text import did_you_mean, short
from jquant.types import ConversionError

from .edit import PLAIN, Editor
from .zero_points import RANGES

_RANGES = {4: ("int4", 8), 8: ("int8", 128), 16: ("int16", 32768)}


class Encoding(NamedTuple):
    """The grid of a tensor: integers of `bits` bits, real = (integer - zero) * scale; zero counts from the lowest one.

    `scale` is scalar or [channels]; `axis` is None where the table does not say it.
    """

    scale: np.ndarray
    zero: np.ndarray
    bits: int
    axis: int | None = None
    ends: tuple[int, int, int] | None = None  # lowest and highest integer and the zero point, in place of bits and zero


def with_pairs(model: onnx.ModelProto, grids: Mapping[str, Encoding], what: str) -> onnx.ModelProto:
    """A copy of a float model whose tensors have these grids.

    Raises:
      ConversionError: a name that the model does not have, or scales that do not fit.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    editor = Editor(copy, None)
    made = set(editor.makers()) | {entry.name for entry in copy.graph.input}
    names = made | {tensor.name for tensor in copy.graph.initializer}
    if unknown := sorted(set(grids) - names):
        raise ConversionError(
            f"{what} has {len(unknown)} names that the model does not have, the first {short(unknown[0])}"
            f"{did_you_mean(unknown[0], names)}; give the model that it was written beside"
        )
    _Inserter(editor, grids).run()
    _raise_opset(copy)
    return copy


class _Inserter:
    def __init__(self, editor: Editor, grids: Mapping[str, Encoding]) -> None:
        self.editor, self.grids = editor, grids
        self.behind: dict[str, str] = {}  # {tensor: its name behind the pair}
        self.before: dict[str, str] = {}  # {graph output: the name of what is rounded}

    def run(self) -> None:
        constants = [name for name in self.grids if name in self.editor.tensors]
        head = [node for name in constants for node in self.constant(name)]
        outputs = self.editor.outputs()
        for entry in self.editor.model.graph.input:
            if entry.name in self.grids and entry.name not in self.behind:
                head += self.pair(entry.name, entry.name, self.editor.unique(f"{entry.name}:dequantized"))
        nodes: list[onnx.NodeProto] = list(head)
        for node in self.editor.nodes:
            made = onnx.NodeProto()
            made.CopyFrom(node)
            for i, name in enumerate(made.input):
                made.input[i] = self.behind.get(name, name)
            pairs = []
            for i, name in enumerate(made.output):
                if name in self.grids and name not in self.behind:
                    real, result = name, self.editor.unique(f"{name}:dequantized")
                    if name in outputs or node.op_type == "Identity":  # which is no node of the graph: the pair is
                        real = made.output[i] = self.editor.unique(f"{name}:real")
                        result = name
                    pairs += self.pair(name, real, result)
            nodes += [made, *pairs]
        del self.editor.model.graph.node[:]
        self.editor.model.graph.node.extend(nodes)

    def pair(self, name: str, real: str, result: str) -> list[onnx.NodeProto]:
        grid, editor = self.grids[name], self.editor
        if grid.scale.size != 1:
            raise ConversionError(f"value {short(name)} has {grid.scale.size} scales; only weights have one a channel")
        step, point = np.float32(grid.scale.reshape(())), int(grid.zero.reshape(()))
        self.behind[name] = result
        nodes, source = [], real
        bits = grid.bits
        if bits not in (8, 16):
            if not 2 <= bits < 16:
                raise ConversionError(f"value {short(name)} has {bits} bits; 2 to 16 can be read")
            bounds = [editor.add(f"{name}:{part}", np.float32((edge - point) * float(step)))
                      for part, edge in (("low", 0), ("high", 2**bits - 1))]  # fmt: skip
            source = editor.unique(f"{name}:clipped")
            nodes.append(helper.make_node("Clip", [real, *bounds], [source], f"{name}:clip"))
            bits, point = (8, point - 2 ** (bits - 1) + 128) if bits < 8 else (16, point - 2 ** (bits - 1) + 32768)
        if not 0 <= point < 2**bits:
            raise ConversionError(f"value {short(name)} has the zero {point} of {2**bits} integers")
        dtype, middle = _RANGES[bits]
        zero = np.asarray(point - middle, dtype) if point == middle else np.asarray(point, f"u{dtype}")
        steps, zeros = editor.add(f"{name}:scale", step), editor.add(f"{name}:zero", zero)
        integers = editor.unique(f"{name}:integers")
        made, _ = editor.dequantize(integers, steps, zeros, result)
        return [*nodes, editor.quantize(source, steps, zeros, integers), made]

    def constant(self, name: str) -> list[onnx.NodeProto]:
        """A weight as its integers, or a number as what it is rounded to."""
        grid, editor = self.grids[name], self.editor
        array = editor.known(name, "the weight").array
        axis = self.axis_of(name, array, grid)
        shape = [-1 if i == axis else 1 for i in range(array.ndim)] if axis is not None else []
        scale, zero = (np.asarray(v).reshape(shape) for v in (grid.scale, grid.zero))
        integers = np.clip(np.rint(array / scale.astype(np.float32)) + zero, 0, 2**grid.bits - 1)
        result = editor.unique(f"{name}:dequantized")
        self.behind[name] = result
        if array.size == 1:
            editor.add(result, ((integers - zero) * scale.astype(np.float32)).astype(np.float32))
            self.behind[name] = editor.model.graph.initializer[-1].name
            return []
        if grid.bits not in _RANGES:
            raise ConversionError(f"weight {short(name)} has {grid.bits} bits; 4, 8 and 16 can be read")
        dtype, middle = _RANGES[grid.bits]
        if np.any(zero != middle):
            raise ConversionError(
                f"weight {short(name)} is asymmetric: its zero is {np.unique(zero)[:3].tolist()} of {2**grid.bits}; "
                "the chip's weights are symmetric. Quantize it so"
            )
        stored = editor.replace(name, (integers - middle).astype("int8" if grid.bits == 4 else dtype), dtype, 1)
        steps = editor.add(f"{name}:scale", grid.scale.astype(np.float32).reshape(-1 if axis is not None else ()))
        made, _ = editor.dequantize(stored, steps, "", result, axis)
        return [made]

    def axis_of(self, name: str, array: np.ndarray, grid: Encoding) -> int | None:
        """The axis of the channels: what the table says, or that of the output channels of what reads the weight."""
        if grid.scale.size == 1:
            return None
        found = grid.axis
        if found is None:
            for node in self.editor.nodes:
                if name in node.input:
                    found = _channels(node, array.ndim)
        if found is None or not -array.ndim <= found < array.ndim or array.shape[found] != grid.scale.size:
            raise ConversionError(
                f"weight {short(name)} {list(array.shape)} has {grid.scale.size} scales, along no axis of it"
            )
        return found % array.ndim


def pairs_at(model: onnx.ModelProto, grids: Mapping[str, Encoding]) -> onnx.ModelProto:
    """A copy of a model in which nodes of these names, Identities, are pairs."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    editor = Editor(copy, None)

    def rule(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        grid = grids.get(node.output[0]) if node.op_type == "Identity" else None
        if grid is None or grid.ends is None:
            return None
        name, step = node.output[0], np.float32(grid.scale)
        low, high, zero = grid.ends
        dtype = _dtype(low, high)
        if dtype is None:
            raise ConversionError(f"value {short(name)} has integers from {low} to {high}; 16 bits are the most")
        nodes, source = [], node.input[0]
        lowest, highest = RANGES[dtype]
        if (low, high) != (lowest, highest):
            bounds = [editor.add(f"{name}:{part}", np.float32((edge - zero) * float(step)))
                      for part, edge in (("low", low), ("high", high))]  # fmt: skip
            source = editor.unique(f"{name}:clipped")
            nodes.append(helper.make_node("Clip", [node.input[0], *bounds], [source], f"{name}:clip"))
        steps, zeros = editor.add(f"{name}:scale", step), editor.add(f"{name}:zero", np.asarray(zero, dtype))
        integers = editor.unique(f"{name}:integers")
        made, _ = editor.dequantize(integers, steps, zeros, name)
        return [*nodes, editor.quantize(source, steps, zeros, integers), made]

    editor.rewrite(rule)
    return copy


def _dtype(low: int, high: int) -> str | None:
    """The narrowest dtype of values that holds a range."""
    for dtype in ("int8", "uint8", "int16", "uint16"):
        if RANGES[dtype][0] <= low and high <= RANGES[dtype][1]:
            return dtype
    return None


def _channels(node: onnx.NodeProto, rank: int) -> int:
    turned = any(a.name == "transB" and a.i for a in node.attribute)
    kinds = {"Conv": 0, "ConvTranspose": 1, "Gemm": 0 if turned else 1, "MatMul": rank - 1}
    return kinds.get(node.op_type, 0)


def _raise_opset(model: onnx.ModelProto) -> None:
    """Quantization by channel came with opset 13."""
    for entry in model.opset_import:
        if entry.domain in PLAIN and entry.version < 13:
            raise ConversionError(f"the model has opset {entry.version}; from 13 on it can have scales by channel")
