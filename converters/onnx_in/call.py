"""What a handler gets: one ONNX node with its operands resolved, and the means to make operators of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite, prod
from typing import Any, Protocol

import numpy as np
import onnx

import jquant.ops as ops
from jquant.drafts.values import shortest
from jquant.graph.float import result_type
from jquant.types import JQuantError, Op

from .load import MAX_ELEMENTS, array_of
from .values import Integers, Known, Refused, Result, Unsupported, Value, known, require

MAX_CONSTANTS = 2**20  # elements of an exact constant, which is part of the graph
MAX_TAPS = 2**14  # of a window
_KINDS = {
    "int": onnx.AttributeProto.INT,
    "float": onnx.AttributeProto.FLOAT,
    "string": onnx.AttributeProto.STRING,
    "ints": onnx.AttributeProto.INTS,
    "floats": onnx.AttributeProto.FLOATS,
    "strings": onnx.AttributeProto.STRINGS,
    "tensor": onnx.AttributeProto.TENSOR,
}


class Graph(Protocol):
    """What `Call` needs of the graph that is being built. Names are those of nodes."""

    batch: Value | None  # an input whose axis 0 is the free batch

    def add(self, name: str, op: Op, operands: tuple[Value, ...], params: dict[str, Known]) -> str: ...

    def constant(self, value: Known, name: str) -> Value: ...

    def maker_of(self, name: str) -> Op | None: ...

    def operands_of(self, name: str) -> tuple[str, ...]: ...

    def value_of(self, name: str) -> Value: ...

    def known_of(self, name: str) -> np.ndarray | None: ...

    def takes_bias(self, name: str) -> bool: ...

    def set_bias(self, name: str, bias: Known) -> None: ...

    def on_grid(self, integers: Integers, result: str) -> Value: ...

    def note(self, name: str, before: str, after: str, why: str) -> None: ...


@dataclass(frozen=True)
class Call:
    """One node. Operands that are left out are None."""

    node: onnx.NodeProto
    name: str
    opset: int
    inputs: tuple[Result | None, ...]
    graph: Graph

    # -- attributes

    def attribute(self, name: str, kind: str, default: Any = None) -> Any:
        """An attribute of a kind of `_KINDS`; `default` where it is left out."""
        for found in self.node.attribute:
            if found.name == name:
                require(found.type == _KINDS[kind], f"attribute {name!r} should be {kind}")
                return _decode(found, kind)
        return default

    def integer(self, name: str, default: int) -> int:
        return int(self.attribute(name, "int", default))

    def flag(self, name: str, default: bool = False) -> bool:
        return bool(self.integer(name, int(default)))

    def number(self, name: str, default: float) -> float:
        value = shortest(self.attribute(name, "float", default))
        require(isfinite(value), f"attribute {name!r} is {value}")
        return value

    def text(self, name: str, default: str) -> str:
        return str(self.attribute(name, "string", default))

    def integers(self, name: str, default: Any = None) -> Any:
        found = self.attribute(name, "ints", default)
        require(found is None or len(found) <= 64, f"attribute {name!r} has {len(found or ())} entries")
        return found if found is None else tuple(int(v) for v in found)

    # -- operands

    def given(self, i: int) -> bool:
        return i < len(self.inputs) and self.inputs[i] is not None

    def operand(self, i: int) -> Known | Value:
        require(self.given(i), f"operand {i} is missing")
        found = self.inputs[i]
        if isinstance(found, Refused):
            raise Unsupported(found.reason)
        if isinstance(found, Known | Value):
            return found
        raise Unsupported("it reads integers before a DequantizeLinear; dequantize, compute, and quantize again (QDQ)")

    def value(self, i: int) -> Value:
        """An operand as a value of the graph; a constant becomes a node."""
        return self.as_value(self.operand(i), f"{self.name}.operand_{i}")

    def values(self) -> list[Value]:
        return [self.value(i) for i in range(len(self.inputs))]

    def as_value(self, found: Known | Value, name: str) -> Value:
        return self.graph.constant(found, name) if isinstance(found, Known) else found

    def real(self, i: int) -> Value:
        x = self.value(i)
        require(x.dtype == "float32", f"operand {i} is {x.dtype}; cast it to float32 before")
        return x

    def known(self, i: int, what: str) -> np.ndarray:
        """A constant operand, the same at every batch size."""
        found = self.operand(i)
        require(isinstance(found, Known), f"its {what} is computed by the model; make it a constant")
        assert isinstance(found, Known)
        require(found.fixed, f"its {what} depends on the batch size")
        return found.at[0]

    def known_integers(self, i: int, what: str) -> tuple[int, ...]:
        array = self.known(i, what)
        require(np.issubdtype(array.dtype, np.integer) and array.ndim <= 1, f"its {what} should be a list of integers")
        require(array.size <= MAX_CONSTANTS, f"its {what} has {array.size} entries")
        return tuple(int(v) for v in array.reshape(-1))

    def known_number(self, i: int, what: str) -> float:
        array = self.known(i, what)
        require(array.size == 1, f"its {what} should be one number")
        return shortest(array.reshape(-1)[0]) if array.dtype == np.float32 else float(array.reshape(-1)[0])

    def optional_integers(self, i: int, attribute: str) -> tuple[int, ...] | None:
        """Axes and the like: an attribute in old opsets, an operand in new ones."""
        if self.given(i):
            return self.known_integers(i, attribute)
        found: tuple[int, ...] | None = self.integers(attribute)
        return found

    # -- results

    def make(self, op: Op, *operands: Value, part: str = "", params: dict[str, Known] | None = None) -> Value:
        """An operator on values, named after the node, or `name.part`."""
        roles = params or {}
        for x in operands:
            if x.dtype != "float32" and not op.takes_exact:
                raise Unsupported(f"{type(op).__name__} of {x.dtype}; cast it to float32 before")
        kinds = tuple((x.shapes, x.dtype) for x in operands)
        sizes = tuple((role, value.at[0].shape) for role, value in roles.items())
        shapes, dtype = result_of(op, kinds, sizes)
        name = self.graph.add(f"{self.name}.{part}" if part else self.name, op, operands, roles)
        return Value(name, shapes, dtype)

    def constant(self, array: Any, part: str) -> Value:
        return self.graph.constant(known(array), f"{self.name}.{part}")

    def scaled(self, x: Value, factor: float, part: str = "") -> Value:
        require(factor != 0 and isfinite(factor), f"the factor is {factor}")
        return x if factor == 1 else self.make(ops.Scale(factor=factor), x, part=part)

    def maker(self, x: Any) -> tuple[Op | None, tuple[str, ...]]:
        """The operator that makes a value, and its operands: for patterns."""
        op = self.graph.maker_of(x.name) if isinstance(x, Value) else None
        return (None, ()) if op is None else (op, self.graph.operands_of(x.name))


Handler = Callable[[Call], Any]  # a Result, or a list of them


def _decode(found: onnx.AttributeProto, kind: str) -> Any:
    if kind == "tensor":
        return array_of(found.t, None)
    if kind == "string":
        return found.s.decode("utf-8", errors="replace")
    if kind == "strings":
        return tuple(s.decode("utf-8", errors="replace") for s in found.strings)
    return {"int": found.i, "float": found.f, "ints": found.ints, "floats": found.floats}[kind]


def result_of(op: Op, operands: tuple[Any, ...], params: tuple[Any, ...]) -> tuple[Any, str]:
    """Shapes and dtype of a result, from the float rule of the operator, without computing anything."""
    found = []
    for batch in (0, 1):
        try:
            kind = result_type(op, tuple((shapes[batch], dtype) for shapes, dtype in operands), params)
        except (JQuantError, TypeError, ValueError, IndexError, ZeroDivisionError, OverflowError) as error:
            raise Unsupported(str(error).splitlines()[0] if str(error) else type(error).__name__) from error
        require(prod(kind.shape) < MAX_ELEMENTS, f"its result {list(kind.shape)} is too large")
        found.append(kind)
    require(len(found[0].shape) == len(found[1].shape), "its rank depends on the batch")
    return (tuple(found[0].shape), tuple(found[1].shape)), str(found[0].dtype)


def axis_of(axis: int, rank: int) -> int:
    require(-rank <= axis < max(rank, 1), f"axis {axis} of {rank}")
    return axis % rank if rank else 0


def axes_of(axes: Any, rank: int) -> tuple[int, ...]:
    found = tuple(sorted(axis_of(a, rank) for a in axes))
    require(len(set(found)) == len(found), f"the axes {tuple(axes)} name one twice")
    return found
