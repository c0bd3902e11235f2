"""Integers of torch and ONNX have 64 bits, those of a graph 32: where the two differ, it is rewritten or refused.

Sums and products that wrap are right as long as the true result fits in 32 bits, which an index does. What is not right
after a wrap is a remainder, a comparison, a bound, a shift to the right. Their operands must be shown to fit; a
remainder of sums and products is taken of every operand first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

import numpy as np

import jquant.ops as ops
from jquant.graph.float import value_types
from jquant.types import Array, ConversionError, Graph, Node, Op

Shape = tuple[int, ...]
Bounds = tuple[int, int]
_RANGES: dict[str, Bounds] = {
    "bool": (0, 1), "uint8": (0, 255), "int8": (-128, 127), "int16": (-(2**15), 2**15 - 1),
    "int32": (-(2**31), 2**31 - 1),
}  # fmt: skip
_INT32 = _RANGES["int32"]
_MOVES = (
    ops.BitwiseAnd, ops.BitwiseOr, ops.BitwiseXor, ops.BitwiseNot, ops.Cat, ops.Stack, ops.Reshape, ops.Flatten,
    ops.Permute, ops.Tile, ops.Roll, ops.Flip, ops.StopGradient, ops.Slice, ops.SliceScatter, ops.Dropout,
    ops.ReduceMax, ops.ReduceMin, ops.Sort, ops.TopK,
)  # fmt: skip
_COMPARES = (ops.ReduceMax, ops.ReduceMin, ops.Sort, ops.TopK)  # of these, the operand must fit too
_FIRST = (ops.Expand, ops.Gather, ops.IndexSelect, ops.Pad, ops.MaskedFill)  # the numbers come from operand 0
# An index that is out of range fails in torch and ONNX, so the true value of one fits.
_INDEXED = (ops.Embedding, ops.Gather, ops.IndexSelect, ops.Scatter)
# What lies between an index that counts from the start and the operator that reads it.
_OF_AN_INDEX = (ops.Reshape, ops.Flatten, ops.Expand, ops.Permute, ops.Add, ops.Mul)
_MAX_BATCH = 2**20  # examples that a sum over the batch is taken to have at most


def exact_indices(
    graph: Graph, types: Callable[[], Mapping[str, tuple[Shape, str]]], widths: Callable[[], Mapping[str, str]]
) -> Graph:
    """The graph with integer arithmetic that gives what 64 bits give.

    Args:
      graph: a valid graph. Its int32 values were int64, or what `widths` says.
      types: gives {value: (shape, dtype)} of the graph; what is missing is float32. Only called where needed.
      widths: gives {value: "int8", "int16", "int32", "uint8"}: the dtype in the source, where it is narrower.

    Raises:
      ConversionError: a value that may leave 32 bits, or its narrower dtype, where that matters.
    """
    if not any(isinstance(node.op, _ARITHMETIC) for node in graph.nodes):
        return graph
    known = types()
    exact = {name for name, (_, dtype) in known.items() if dtype != "float32"}
    if not any(n.name in exact and isinstance(n.op, _ARITHMETIC) for n in graph.nodes):
        return graph
    return _Exact(graph, dict(known), widths(), exact).rewritten()


def types_of(graph: Graph, params: Mapping[str, Array]) -> dict[str, tuple[Shape, str]]:
    """{value: (shape, dtype)} of a whole graph."""
    return {name: (kind.shape, str(kind.dtype)) for name, kind in value_types(graph, params).items()}


# ---------------------------------------------------------------------------------------------------------------------
# Bounds


def _sum(a: Bounds, b: Bounds) -> Bounds:
    return a[0] + b[0], a[1] + b[1]


def _negative(a: Bounds) -> Bounds:
    return -a[1], -a[0]


def _product(a: Bounds, b: Bounds) -> Bounds:
    corners = [x * y for x in a for y in b]
    return min(corners), max(corners)


def _join(*bounds: Bounds) -> Bounds:
    return min(b[0] for b in bounds), max(b[1] for b in bounds)


def _inside(a: Bounds, outer: Bounds) -> bool:
    return outer[0] <= a[0] and a[1] <= outer[1]


_ARITHMETIC = (ops.Add, ops.Sub, ops.Mul, ops.Neg, ops.BitShift, ops.Sum, ops.CumSum)  # right after a wrap


def _indices_of(node: Node) -> tuple[str, ...]:
    if isinstance(node.op, ops.Embedding):
        return node.inputs
    return node.inputs[1:2] if isinstance(node.op, _INDEXED) else ()


@dataclass
class _Exact:
    graph: Graph
    types: dict[str, tuple[Shape, str]]
    widths: Mapping[str, str]
    exact: set[str]
    bounds: dict[str, Bounds] = field(default_factory=dict)  # of the true value of every exact one
    nodes: dict[str, Node] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)

    def rewritten(self) -> Graph:
        self.taken = set(self.graph.values)
        for entry in self.graph.inputs:
            self.bounds[entry.name] = _RANGES.get(entry.dtype, _INT32)
        for node in self.graph.nodes:
            if self.is_exact(node.name) or any(self.is_exact(v) for v in node.inputs):
                node = self.checked(node)
            self.nodes[node.name] = node
        for name in self.graph.outputs:
            if self.is_exact(name) and not self.fits(name):
                raise self.refusal(self.graph.by_name[name], name, "it is an output")
        return replace(self.graph, nodes=self.read_nodes())

    def read_nodes(self) -> tuple[Node, ...]:
        """Nodes without those that only a rewritten remainder read."""
        before = {v for node in self.graph.nodes for v in node.inputs}
        wanted, kept = set(self.graph.outputs), []
        for node in reversed(self.nodes.values()):
            if node.name in wanted or (node.name in self.graph.by_name and node.name not in before):
                kept.append(node)
                wanted.update(node.inputs)
        return tuple(reversed(kept))

    def is_exact(self, name: str) -> bool:
        return name in self.exact

    @cached_property
    def signs(self) -> set[str]:
        """The comparisons with 0 that bring an index to count from the start: an index fits, in torch and in ONNX."""
        nodes, found = self.graph.by_name, set()
        indices = [name for node in self.graph.nodes for name in _indices_of(node)]
        while indices:
            node = nodes.get(indices.pop())
            if node is None:
                continue
            if isinstance(node.op, _OF_AN_INDEX):
                indices += node.inputs
            sign = nodes.get(node.inputs[0]) if isinstance(node.op, ops.Where) else None
            if sign is not None and sign.op == ops.Less(value=0.0) and sign.inputs == node.inputs[2:]:
                behind = nodes.get(node.inputs[1])
                if behind is not None and isinstance(behind.op, ops.Add) and sign.inputs[0] in behind.inputs:
                    found.add(sign.name)
        return found

    def fits(self, name: str) -> bool:
        return not self.is_exact(name) or _inside(self.bounds[name], _INT32)

    def checked(self, node: Node) -> Node:
        """The node, or what stands for it, with the bounds of its value noted."""
        node = self.remainder_of_parts(node)
        if self.reads_numbers(node.op) and node.name not in self.signs:
            for name in node.inputs:
                if not self.fits(name):
                    raise self.refusal(node, name, f"{type(node.op).__name__} needs it within 32 bits")
        if not self.is_exact(node.name):
            return node
        found = self.bounds_of(node)
        width = self.widths.get(node.name, "int64")
        if isinstance(node.op, _ARITHMETIC) and width == "int32" and not _inside(found, _INT32):
            found = _INT32  # it wraps in the source as well
        elif isinstance(node.op, _ARITHMETIC) and width in _RANGES and not _inside(found, _RANGES[width]):
            raise ConversionError(
                f"node {node.name!r} ({type(node.op).__name__}) is {width} in the model and wraps there, as its result "
                f"may be {found[0]} to {found[1]}; integers do not wrap here. Convert the operand before, with .int() "
                "or .float()"
            )
        self.bounds[node.name] = found
        return node

    @staticmethod
    def reads_numbers(op: Op) -> bool:
        """Whether the operator gives something else for numbers that are equal modulo 2^32."""
        if isinstance(op, ops.BitShift):
            return op.bits > 0
        moved = isinstance(op, (*_ARITHMETIC, *_MOVES, *_FIRST, *_INDEXED, ops.Where))
        return not moved or isinstance(op, _COMPARES)

    def refusal(self, reader: Node, name: str, reason: str) -> ConversionError:
        low, high = self.bounds[name]
        return ConversionError(
            f"node {reader.name!r} ({type(reader.op).__name__}): its integer operand {name!r} may be {low} to {high}, "
            f"and integers have 32 bits here; {reason}. Bound the operands before, such as ids.clamp(0, n - 1), or "
            "compute it outside of the model"
        )

    def bounds_of(self, node: Node) -> Bounds:
        """Of the true value, which may need more than 32 bits."""
        op, given = node.op, [self.bounds[v] for v in node.inputs if self.is_exact(v)]
        dtype = self.types[node.name][1]
        if dtype == "bool":
            return 0, 1
        match op:
            case ops.IntegerConstant():
                return (min(op.values), max(op.values)) if op.values else (0, 0)
            case ops.Add():
                return _sum(*given)
            case ops.Sub() if (found := self.multiple(node)) is not None and found[2]:
                return _join(found[0], (0, 0))
            case ops.Sub():
                return _sum(given[0], _negative(given[1]))
            case ops.Mul() if (quotient := self.quotient(node)) is not None:
                return quotient
            case ops.Mul():
                return _square(given[0]) if node.inputs[0] == node.inputs[1] else _product(*given)
            case ops.Neg():
                return _negative(given[0])
            case ops.Abs():
                return max(given[0][0], -given[0][1], 0), max(-given[0][0], given[0][1])
            case ops.BitShift():
                return _shifted(given[0][0], op.bits), _shifted(given[0][1], op.bits)
            case ops.BitwiseAnd() if max(g[0] for g in given) >= 0:  # one of them is not negative
                return 0, min(g[1] for g in given if g[0] >= 0)
            case ops.Sum() | ops.CumSum():
                terms = self.terms(node)
                return _join(_product(given[0], (terms, terms)), given[0] if isinstance(op, ops.CumSum) else (0, 0))
            case ops.Clamp():
                low = -(2**63) if op.minimum is None else int(op.minimum)
                high = 2**63 if op.maximum is None else int(op.maximum)
                return tuple(min(max(v, low), high) for v in given[0])  # type: ignore[return-value]
            case ops.Mod() if op.value is not None and op.value == int(op.value):
                most = abs(int(op.value)) - 1
                if op.same_sign_as_dividend:
                    return max(-most, min(given[0][0], 0)), min(most, max(given[0][1], 0))
                return (0, most) if op.value > 0 else (-most, 0)
            case ops.Maximum() | ops.Minimum():
                choose = max if isinstance(op, ops.Maximum) else min
                return choose(given[0][0], given[1][0]), choose(given[0][1], given[1][1])
            case ops.Where():
                return _join(*given[1:])
            case ops.Scatter():
                return _join(given[0], given[-1])
            case ops.MaskedFill() | ops.Pad():
                value = int(getattr(op, "value", 0) or 0)
                return _join(given[0], (value, value))
            case ops.ArgMax() | ops.ArgMin() | ops.SortIndices() | ops.TopKIndices():
                return 0, max(max(self.types[node.inputs[0]][0], default=1), prod(self.types[node.inputs[0]][0])) - 1
        if isinstance(op, _FIRST):
            return given[0]
        return _join(*given) if isinstance(op, _MOVES) and given else _RANGES.get(dtype, _INT32)

    def quotient(self, node: Node) -> Bounds | None:
        """Of a product by an inverse modulo 2^32, as `aten.quotients` divides a multiple; None of another product."""
        factor = self.nodes[node.inputs[1]].op if node.inputs[1] in self.nodes else None
        source = self.nodes.get(node.inputs[0])
        if not isinstance(factor, ops.IntegerConstant) or len(factor.values) != 1 or source is None:
            return None
        bits = source.op.bits if isinstance(source.op, ops.BitShift) else 0
        found = self.multiple(self.nodes.get(source.inputs[0]) if bits > 0 else source)
        if found is None or found[1] % 2**bits or (found[1] >> bits) * factor.values[0] % 2**32 != 1:
            return None
        bounds, divisor, towards_zero = found
        ends = [
            abs(v) // abs(divisor) * (1 if v * divisor > 0 else -1) if towards_zero else v // divisor for v in bounds
        ]
        return min(ends), max(ends)

    def multiple(self, node: Node | None) -> tuple[Bounds, int, bool] | None:
        """(bounds of x, divisor, rounded towards zero) of x less its remainder; None of anything else."""
        rest = self.nodes.get(node.inputs[1]) if node is not None and isinstance(node.op, ops.Sub) else None
        if node is None or rest is None or not isinstance(rest.op, ops.Mod) or rest.inputs != node.inputs[:1]:
            return None
        value = rest.op.value
        if value is None or value != int(value):
            return None
        return self.bounds[node.inputs[0]], int(value), rest.op.same_sign_as_dividend

    def terms(self, node: Node) -> int:
        """How many numbers a sum adds up."""
        (shape, _), op = self.types[node.inputs[0]], node.op
        axes = op.axes if isinstance(op, ops.Sum) else (op.axis,)  # type: ignore[attr-defined]
        summed = {a % len(shape) for a in axes} or set(range(len(shape)))
        return prod(_MAX_BATCH if a == 0 else shape[a] for a in summed)

    # -- remainders

    def remainder_of_parts(self, node: Node) -> Node:
        """A remainder whose operand may not fit, as remainders of what that is made of."""
        op = node.op
        if not isinstance(op, ops.Mod) or self.fits(node.inputs[0]):
            return node
        modulus = self.modulus_of(node)
        if modulus is None or op.same_sign_as_dividend or not 0 < modulus <= 2**30:
            raise self.refusal(
                node, node.inputs[0], "only a remainder by a number from 1 to 2^30, with its sign, is exact"
            )
        operand = _Remainder(self, node, modulus).of_operands(self.nodes[node.inputs[0]])
        return replace(node, op=ops.Mod(value=float(modulus)), inputs=(operand,))

    def modulus_of(self, node: Node) -> int | None:
        """The divisor of a remainder, if it is one number."""
        if node.op.value is not None:  # type: ignore[attr-defined]
            return int(node.op.value)  # type: ignore[attr-defined]
        divisor = self.nodes.get(node.inputs[1])
        values = divisor.op.values if divisor is not None and isinstance(divisor.op, ops.IntegerConstant) else ()
        return values[0] if len(values) == 1 else None

    def add(self, base: str, op: Op, *inputs: str) -> str:
        """A new node of exact values, and its name."""
        name, count = base, 0
        while name in self.taken:
            count += 1
            name = f"{base}_{count}"
        self.taken.add(name)
        self.nodes[name] = Node(name, op, inputs)
        shapes = [self.types[v][0] for v in inputs]
        shape = np.broadcast_shapes(*shapes) if inputs else op.shape  # type: ignore[attr-defined]
        self.types[name] = shape, "int32"
        self.exact.add(name)
        self.bounds[name] = self.bounds_of(self.nodes[name])
        return name


@dataclass
class _Remainder:
    """Nodes that give the remainder of sums and products by remainders of their operands."""

    exact: _Exact
    node: Node
    modulus: int

    def reduced(self, name: str) -> str:
        """The remainder of a value, in [0, modulus)."""
        low, high = self.exact.bounds[name]
        if low >= 0 and high < self.modulus:
            return name
        if self.exact.fits(name):
            return self.mod(name)
        return self.mod(self.of_operands(self.exact.nodes[name]))

    def of_operands(self, source: Node) -> str:
        """A value of 32 bits with the remainder of `source`."""
        op, exact = source.op, self.exact
        if isinstance(op, ops.Add | ops.Sub | ops.Neg):
            return exact.add(f"{self.node.name}.{_word(op)}", op, *map(self.reduced, source.inputs))
        if isinstance(op, ops.Mul):
            return self.product(*map(self.reduced, source.inputs))
        if isinstance(op, ops.BitShift) and op.bits < 0:
            factor = exact.add(f"{self.node.name}.factor", _constant(np.array(2**-op.bits % self.modulus)))
            return self.product(self.reduced(source.inputs[0]), factor)
        raise exact.refusal(self.node, source.name, f"a remainder is not taken apart at {type(op).__name__}")

    def product(self, a: str, b: str) -> str:
        """a * b by the modulus, both in [0, modulus): by parts of b, so that no product needs 32 bits."""
        exact, base = self.exact, self.node.name
        if exact.bounds[a][1] * exact.bounds[b][1] <= _INT32[1]:
            return exact.add(f"{base}.mul", ops.Mul(), a, b)
        if isinstance(exact.nodes[a].op if a in exact.nodes else None, ops.IntegerConstant):
            a, b = b, a
        width = 31 - self.modulus.bit_length()  # bits of a part: modulus * 2^width < 2^31
        shifts = range(0, self.modulus.bit_length(), max(width, 1))
        if width < 1:
            raise exact.refusal(self.node, a, "a product by a modulus of more than 30 bits")
        found = ""
        step = exact.add(f"{base}.step", _constant(np.array(2**width)))
        for shift in reversed(shifts):
            part = self.mod(exact.add(f"{base}.mul", ops.Mul(), a, self.part(b, shift, width)))
            if found:
                raised = self.mod(exact.add(f"{base}.raise", ops.Mul(), found, step))
                found = self.mod(exact.add(f"{base}.add", ops.Add(), raised, part))
            else:
                found = part
        return found

    def part(self, name: str, shift: int, width: int) -> str:
        """Bits [shift, shift + width) of a value that is not negative."""
        exact, base = self.exact, self.node.name
        op = exact.nodes[name].op if name in exact.nodes else None
        if isinstance(op, ops.IntegerConstant):
            values = np.array(op.values, np.int64).reshape(op.shape) % self.modulus
            return exact.add(f"{base}.part", _constant(values >> shift & (2**width - 1)))
        above = exact.add(f"{base}.shift", ops.BitShift(bits=shift), name) if shift else name
        mask = exact.add(f"{base}.mask", _constant(np.array(2**width - 1)))
        found = exact.add(f"{base}.part", ops.BitwiseAnd(), above, mask)
        exact.bounds[found] = 0, 2**width - 1
        return found

    def mod(self, name: str) -> str:
        return self.exact.add(f"{self.node.name}.mod", ops.Mod(value=float(self.modulus)), name)


def _shifted(value: int, bits: int) -> int:
    return value >> bits if bits >= 0 else value << -bits


def _square(a: Bounds) -> Bounds:
    ends = a[0] ** 2, a[1] ** 2
    return (0 if a[0] <= 0 <= a[1] else min(ends)), max(ends)


def _word(op: Any) -> str:
    return type(op).__name__.lower()


def _constant(array: np.ndarray) -> ops.IntegerConstant:
    return ops.IntegerConstant(shape=array.shape, values=tuple(int(v) for v in array.reshape(-1)))
