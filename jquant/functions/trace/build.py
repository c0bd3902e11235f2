"""From drafts to a graph: names, constants, parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import jquant.ops as ops
from jquant.drafts import values
from jquant.drafts.names import key_of, snake_case, unique
from jquant.drafts.values import Draft, Entry, Known, Value, seen_shape
from jquant.functions.trace.names import Scopes, module_of
from jquant.types import ConversionError, FrozenMap, Graph, Input, Node

_BROADCASTS = (ops.Softmax, ops.Attention)  # beside elementwise operators: their mask


@dataclass
class Built:
    """A graph for one batch size, what its parameters are computed from, and the shape of every value."""

    graph: Graph
    params: dict[str, Known]
    shapes: dict[str, tuple[int, ...]]


@dataclass
class _Builder:
    leaves: Sequence[str]
    scopes: Scopes
    taken: set[str] = field(default_factory=set)
    nodes: list[Node] = field(default_factory=list)
    params: dict[str, Known] = field(default_factory=dict)
    keys: dict[Known, str] = field(default_factory=dict)
    names: dict[Draft | Entry, str] = field(default_factory=dict)
    constants: dict[tuple[Known, bool], str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def add(self, draft: Draft) -> None:
        module = module_of(draft)
        scope = self.scopes.dotted(draft.scope)
        kind = snake_case(type(draft.op).__name__)
        kind = repr(draft.op.call) if isinstance(draft.op, ops.Opaque) else kind
        name = unique(module or (f"{scope}.{kind}" if scope else kind), self.taken | set(self.leaves))
        self.taken.add(name)
        self.names[draft] = name
        for role, known in draft.params.items():
            self.key(known, f"{name}.{role}")
        operands = tuple(self.operand(draft, i) for i in range(len(draft.operands)))
        params = FrozenMap({role: self.keys[known] for role, known in draft.params.items()})
        self.nodes.append(Node(name, draft.op, operands, params, self.call_of(name, module, draft, params)))
        self.shapes[name] = draft.shape

    def call_of(self, name: str, module: str, draft: Draft, params: FrozenMap[str]) -> str:
        """The layer of which this is a later call: it has that layer's operator and parameters."""
        if not module or name == module or not params:
            return ""
        first = next((node for node in self.nodes if node.name == module), None)
        return module if first is not None and (first.op, first.params) == (draft.op, params) else ""

    def key(self, known: Known, fallback: str) -> str:
        """The key of a parameter, made once for each value."""
        if known not in self.keys:
            if str(known.dtype) != "float32":
                raise ConversionError(
                    f"{key_of(known) or fallback!r} is {known.dtype}; the operators compute in float32. Convert the "
                    "params, and let the model compute in float32"
                )
            key = unique(key_of(known) or fallback, set(self.params))
            self.keys[known], self.params[key] = key, known
        return self.keys[known]

    def operand(self, draft: Draft, port: int) -> str:
        value = draft.operands[port]
        if not isinstance(value, Known):
            return self.names[value]
        if not self.takes_compact(draft, port):
            return self.constant(value, draft, port, compact=False)
        return self.constant(value, draft, port, compact=True)

    def takes_compact(self, draft: Draft, port: int) -> bool:
        """Whether broadcasting does what the constant would otherwise repeat."""
        if draft.op.layout != "elementwise" and not isinstance(draft.op, _BROADCASTS):
            return False
        if isinstance(draft.op, _BROADCASTS):
            return port > 0
        return np.broadcast_shapes(*map(seen_shape, draft.operands)) == draft.shape

    def constant(self, known: Known, reader: Draft | None, port: int, *, compact: bool) -> str:
        """The name of a node for a known value: of its compact shape, or repeated behind that."""
        if (known, compact) in self.constants:
            return self.constants[known, compact]
        if not compact and known.compact != known.shape:
            name = self.repeat(known, reader, port)
        else:
            name = self.add_constant(known, reader, port)
        self.constants[known, compact] = name
        if known.compact == known.shape:
            self.constants[known, not compact] = name
        return name

    def add_constant(self, known: Known, reader: Draft | None, port: int) -> str:
        owner = self.names[reader] if reader is not None else "output"
        ports = reader.op.ports if reader is not None else ("value",)
        fallback = f"{owner}.{ports[min(port, len(ports) - 1)]}" + (f"_{port}" if port >= len(ports) else "")
        dtype = str(known.dtype)
        if dtype == "float32":
            name = unique(key_of(known) or fallback, self.taken | set(self.params))
            key = self.key(known, fallback)
            self.taken.add(name)
            self.nodes.append(Node(name, ops.Constant(), (), FrozenMap({"value": key})))
        else:
            name = unique(fallback, self.taken)
            self.nodes.append(Node(name, _integer_constant(known, fallback), ()))
        self.shapes[name] = known.compact
        return name

    def repeat(self, known: Known, reader: Draft | None, port: int) -> str:
        inner = self.constant(known, reader, port, compact=True)
        shape = tuple(-1 if n == m else n for n, m in zip(known.shape, known.compact, strict=True))
        name = unique(f"{inner}.expand", self.taken)
        self.nodes.append(Node(name, ops.Expand(shape=shape), (inner,)))
        self.shapes[name] = known.shape
        return name

    def name_of(self, value: Value) -> str:
        return self.constant(value, None, 0, compact=False) if isinstance(value, Known) else self.names[value]


def _integer_constant(known: Known, where: str) -> ops.IntegerConstant:
    dtype = str(known.dtype)
    if known.is_trained or dtype not in ("bool", "int32", "uint8"):
        name = key_of(known) or where
        raise ConversionError(f"{name!r} is {dtype}, as a constant; use float32, int32 or bool in the model")
    array = np.asarray(known.array)
    kind: Any = "bool" if dtype == "bool" else "int32"
    return ops.IntegerConstant(shape=known.compact, values=tuple(int(v) for v in array.reshape(-1)), dtype=kind)


def build(drafts: Sequence[Draft], entries: Sequence[Entry], outputs: Sequence[Value], leaves: Sequence[str]) -> Built:
    """The graph of drafts in evaluation order."""
    builder = _Builder(leaves, Scopes(drafts, leaves))
    inputs = []
    for entry in entries:
        builder.taken.add(entry.name)
        builder.names[entry] = entry.name
        builder.shapes[entry.name] = entry.shape
        inputs.append(Input(entry.name, tuple(entry.shape), str(entry.dtype)))
    for draft in drafts:
        builder.add(draft)
    names = tuple(builder.name_of(v) for v in outputs)
    return Built(Graph(tuple(inputs), tuple(builder.nodes), names), builder.params, builder.shapes)


def evaluate_params(params: dict[str, Known], leaves: dict[str, Any]) -> dict[str, Any]:
    """{key: array} of a built graph for these leaves of params."""
    cache: dict[Known, Any] = {}
    return {key: values.evaluate_known(known, leaves, cache) for key, known in params.items()}
