"""The rules for graphs that are whole already, as torch and ONNX give them: to drafts, simplified, and back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import numpy as np

import jquant.ops as ops
from jquant.drafts import values
from jquant.drafts.batch import joined
from jquant.drafts.maker import Maker
from jquant.drafts.names import key_of, leaves_of, reshaped_leaf, snake_case, unique
from jquant.drafts.simplify import evaluation_order, simplify
from jquant.drafts.values import Draft, Entry, Known, Value, seen_shape
from jquant.graph.float import value_types
from jquant.types import FrozenMap, Graph, Node, Op, Params

BATCHES = (1009, 2003)  # of the two readings; so large and prime that no other axis is taken for the batch

Namer = Callable[[str, Op], str]


def keep_name(name: str, op: Op) -> str:
    """The name that the last of several operators had is that of the operator in their place."""
    return name


def simplified(
    graph: Graph, params: Params, *, fixed: Collection[str] = (), name: Namer = keep_name
) -> tuple[Graph, Params]:
    """A graph with one operator in the place of many, by the same rules for every door.

    Args:
      graph: a valid graph, in the layout of its framework.
      params: {key: float32 array}.
      fixed: the keys of params whose numbers a rule may look at, such as a mask: no training changes them.
      name: gives an operator in the place of many its name, from the name of the last of them.

    Returns:
      The graph and its params: those that were given where no rule applies, where an output would be an input, or where
      the form that the rules find has two free axes. Other nodes keep their names. A parameter keeps its key; its shape
      may lose axes of size 1.
    """
    free = any(n is None for entry in graph.inputs for n in entry.shape)
    first = _Reading(graph, params, fixed, BATCHES[0]).simplify()
    if not first.changed or any(isinstance(value, Entry) for value in first.outputs):
        return graph, params
    made = first.rebuild(name)
    nodes = made.nodes
    if free:
        second = _Reading(graph, params, fixed, BATCHES[1]).simplify().rebuild(name)
        both = [joined(a, b, graph.inputs[0].name) for a, b in zip(nodes, second.nodes, strict=True)]
        nodes = [node for node in both if node is not None]
        if len(nodes) < len(both):
            return graph, params
    return replace(graph, nodes=tuple(nodes), outputs=made.outputs), _arrays(made.params, params)


def _arrays(knowns: Mapping[str, Known], params: Params) -> Params:
    """The arrays of params: those that were given, and what one compiled function makes of them."""
    as_given = {
        key: known for key, known in knowns.items() if known.path and known.shape == np.shape(params[known.path])
    }
    others = {key: known for key, known in knowns.items() if key not in as_given}
    found = {key: params[known.path] for key, known in as_given.items()}
    if others:
        needed = {path: params[path] for known in others.values() for path in leaves_of(known)}

        @jax.jit
        def compute(leaves: Params) -> Params:
            cache: dict[Known, Any] = {}
            return {key: values.evaluate_known(known, leaves, cache) for key, known in others.items()}

        found |= compute(needed)
    return {key: found[key] for key in knowns}


class _SizesKept(Maker):
    """Makes drafts whose parameters go back into the model that they came from."""

    repeats = False


class _Source(NamedTuple):
    """What a draft was read from."""

    node: Node
    place: int
    operands: tuple[Any, ...]
    params: dict[str, Known]


class _Rebuilt(NamedTuple):
    nodes: list[Node]
    outputs: tuple[str, ...]
    params: dict[str, Known]


@dataclass
class _Reading:
    """A graph at one batch size, as drafts."""

    graph: Graph
    params: Params
    fixed: Collection[str]
    batch: int
    maker: Maker = field(default_factory=_SizesKept)
    values: dict[str, Value] = field(default_factory=dict)
    sources: dict[Draft, _Source] = field(default_factory=dict)
    makers: dict[Known, str] = field(default_factory=dict)  # the node that makes a known value
    leaves: dict[str, Known] = field(default_factory=dict)
    outputs: list[Value] = field(default_factory=list)

    def simplify(self) -> _Reading:
        self.read()
        self.outputs = simplify(self.maker, [self.values[name] for name in self.graph.outputs])
        return self

    @property
    def changed(self) -> bool:
        if self.outputs != [self.values[name] for name in self.graph.outputs]:
            return True
        return not all(self.is_as_read(draft) for draft in evaluation_order(self.outputs))

    def is_as_read(self, draft: Draft) -> bool:
        source = self.sources.get(draft)
        if source is None:
            return False
        return (draft.op, draft.operands, draft.params) == (source.node.op, source.operands, source.params)

    # -- to drafts

    def read(self) -> None:
        types = value_types(self.graph, self.params, self.batch)
        for entry in self.graph.inputs:
            kind = types[entry.name]
            self.values[entry.name] = Entry(name=entry.name, shape=tuple(kind.shape), dtype=np.dtype(kind.dtype))
        for index, node in enumerate(self.graph.nodes):
            self.values[node.name] = self.read_node(node, index, types[node.name])

    def read_node(self, node: Node, index: int, kind: Any) -> Value:
        known = self.read_known(node)
        if known is not None:
            self.makers[known] = node.name
            return known
        shape = tuple(kind.shape)
        operands = tuple(self.values[name] for name in node.inputs)
        if node.op.layout == "elementwise":
            operands = tuple(self.spread(value, shape) for value in operands)
        roles = {role: self.leaf(key) for role, key in node.params.items()}
        draft = Draft(
            op=node.op, operands=operands, shape=shape, dtype=np.dtype(kind.dtype), params=roles, scope=node.name
        )
        self.sources[draft] = _Source(node, index, operands, dict(roles))
        return draft

    def read_known(self, node: Node) -> Known | None:
        """A constant, or a constant in another shape."""
        if isinstance(node.op, ops.Constant):
            return self.leaf(node.params["value"])
        if isinstance(node.op, ops.IntegerConstant):
            return values.constant(np.asarray(node.op.values, node.op.dtype).reshape(node.op.shape))
        inner = self.values[node.inputs[0]] if len(node.inputs) == 1 else None
        if not isinstance(inner, Known):
            return None
        if isinstance(node.op, ops.Reshape):
            shape = np.empty(inner.shape, np.bool_).reshape(node.op.shape).shape
            return values.known_from("reshape", lambda a: a.reshape(shape), [inner])
        if isinstance(node.op, ops.Permute):
            return values.transposed(inner, node.op.axes)
        return None

    def leaf(self, key: str) -> Known:
        if key not in self.leaves:
            known = values.leaf(key, self.params[key])
            known.array = np.asarray(self.params[key]) if key in self.fixed else None
            self.leaves[key] = known
        return self.leaves[key]

    def spread(self, value: Value, shape: tuple[int, ...]) -> Value:
        """A constant operand in the shape that broadcasting gives it."""
        if not isinstance(value, Known) or value.shape == shape:
            return value
        axes = range(len(shape) - len(value.shape), len(shape))
        key = ("spread", shape)
        found = self.maker.share(value, key, lambda: values.broadcast_in(value, shape, axes))
        self.makers.setdefault(found, self.makers[value])
        return found

    # -- to a graph

    def rebuild(self, name: Namer) -> _Rebuilt:
        return _Rebuild(self, name).run()


@dataclass
class _Rebuild:
    """Nodes of drafts: those that are as they were read, and those in the place of many."""

    reading: _Reading
    name: Namer
    names: dict[Value, str] = field(default_factory=dict)
    nodes: dict[str, Node] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    params: dict[str, Known] = field(default_factory=dict)

    def run(self) -> _Rebuilt:
        reading = self.reading
        drafts = self.in_order(evaluation_order(reading.outputs))
        self.taken = {entry.name for entry in reading.graph.inputs} | set(reading.makers.values())
        self.names.update({v: v.name for v in reading.values.values() if isinstance(v, Entry)})
        for draft in sorted(drafts, key=lambda d: not reading.is_as_read(d)):  # names that stay come first
            self.names[draft] = unique(self.wanted(draft), self.taken)
        for draft in drafts:
            self.add(draft)
        outputs = tuple(self.operand(value, None, 0) for value in reading.outputs)
        return _Rebuilt([self.with_call(node) for node in self.nodes.values()], outputs, self.params)

    def in_order(self, drafts: list[Draft]) -> list[Draft]:
        """As the graph has them; what a rule made stands before its first reader."""
        sources = self.reading.sources
        place: dict[Draft, int] = {}
        for draft in reversed(drafts):
            place.setdefault(draft, len(sources))
            if draft in sources:
                place[draft] = sources[draft].place
            for operand in draft.operands:
                if isinstance(operand, Draft) and operand not in sources:
                    place[operand] = min(place.get(operand, len(sources)), place[draft])
        return sorted(drafts, key=place.__getitem__)

    def wanted(self, draft: Draft) -> str:
        """The name a draft has, or that of the layer it is now, or of the operator in the place of others."""
        if draft not in self.reading.sources:
            name = self.name(draft.scope, draft.op)
            return name if name != draft.scope else f"{name}.{snake_case(type(draft.op).__name__)}"
        before = self.reading.graph.by_name[draft.scope].op
        return draft.scope if type(before) is type(draft.op) else self.name(draft.scope, draft.op)

    def add(self, draft: Draft) -> None:
        name, operands = self.names[draft], tuple(draft.operands)
        inputs = tuple(self.operand(value, draft, port) for port, value in enumerate(operands))
        roles = FrozenMap({role: self.key(known, f"{name}.{role}") for role, known in draft.params.items()})
        call_of = self.reading.sources[draft].node.call_of if draft in self.reading.sources else ""
        self.nodes[name] = Node(name, draft.op, inputs, roles, call_of)

    def with_call(self, node: Node) -> Node:
        """A node that is a later call of a layer while it has the layer's operator and parameters."""
        first = self.nodes.get(node.call_of)
        is_call = first is not None and (first.op, first.params) == (node.op, node.params)
        return node if is_call or not node.call_of else replace(node, call_of="")

    def operand(self, value: Value, reader: Draft | None, port: int) -> str:
        if not isinstance(value, Known):
            return self.names[value]
        if value not in self.names:
            maker = self.reading.makers.get(value)
            self.names[value] = self.constant(value, reader, port) if maker is None else self.as_read(maker)
        return self.names[value]

    def as_read(self, name: str) -> str:
        """A constant as the graph has it."""
        if name not in self.nodes:
            node = self.reading.graph.by_name[name]
            for inner in node.inputs:
                self.as_read(inner)
            roles = FrozenMap({role: self.key(self.reading.leaf(key), key) for role, key in node.params.items()})
            self.nodes[name] = replace(node, params=roles)
        return name

    def constant(self, known: Known, reader: Draft | None, port: int) -> str:
        """A new constant, of the shape that takes part in broadcasting."""
        owner = self.names[reader] if reader is not None else "output"
        ports = reader.op.ports if reader is not None else ("value",)
        name = unique(key_of(known) or f"{owner}.{ports[min(port, len(ports) - 1)]}", self.taken)
        if str(known.dtype) == "float32":
            node = Node(name, ops.Constant(), (), FrozenMap({"value": self.key(known, name)}))
        else:
            array = np.asarray(known.array)
            kind: Any = "bool" if array.dtype == np.bool_ else "int32"
            flat = tuple(int(v) for v in array.reshape(-1))
            node = Node(name, ops.IntegerConstant(shape=seen_shape(known), values=flat, dtype=kind), ())
        self.nodes[name] = node
        return name

    def key(self, known: Known, fallback: str) -> str:
        """The key of a parameter: that of the leaf, unless another shape of the leaf has the key."""
        leaf = reshaped_leaf(known)
        known = leaf if leaf is not None and leaf.shape == known.compact else known
        own = key_of(known)
        name = own or fallback
        candidates = (name, *(f"{name}_{i}" for i in range(1, len(self.params) + len(self.reading.params) + 2)))
        key = next(k for k in candidates if self.params.get(k, known) is known and self.is_free(k, own))
        self.params[key] = known
        return key

    def is_free(self, key: str, own: str | None) -> bool:
        return key == own or key in self.params or key not in self.reading.params
