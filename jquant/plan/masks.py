"""Masks in front of a softmax, however they are written, become an operand of it.

A number such as -1e9 that is filled in or added takes the scale of the scores away from them. As an operand of the
softmax a mask is exact and costs no range. This looks at the graph, so that it serves every door.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import jax
import numpy as np

from jquant.graph.float import value_shapes
from jquant.graph.passes import prune
from jquant.ops.attention import LEAST_ADDED, Attention
from jquant.ops.compare import LessEqual, LogicalNot, MaskedFill, Where
from jquant.ops.composite import Softmax
from jquant.ops.elementwise import Add, Clamp, Constant, IntegerConstant, Mul, Scale
from jquant.types import Graph, Node, Op, Params, Requested

VERY_NEGATIVE = -1e4  # a number at or below it makes exp 0 in every format: what is meant is a mask
ABSORBING = -1e8  # added to scores in float32, such a number leaves nothing of them

Empty = Literal["zero", "mean", "scores", "nan"]


@dataclass(frozen=True)
class _Joined:
    """A mask as an operand.

    `x`     the scores of a softmax, or the bias that an attention adds, without the mask; "" where none is left
    `mask`  bool, True where an element is left out
    `made`  the nodes that make these
    `least` the number that was filled in or added
    `like`  {real value that is new: the one whose policy it takes}
    """

    x: str
    mask: str
    made: Sequence[Node]
    least: float
    like: Mapping[str, str] = field(default_factory=dict)


def join_masks(graph: Graph, params: Params, policies: Mapping[str, Requested]) -> tuple[Graph, dict[str, Requested]]:
    """Gives every softmax that is to be quantized its mask as an operand; the fill or the addition goes.

    An attention whose added mask is a choice between 0 and a very negative number gets the choice, as bool. One whose
    added bias is filled with such a number gets the bias without it, and the places as a fifth operand.

    Returns the graph, and the policies of its values.
    """
    nodes: list[Node] = []
    finder, found = _Finder(graph, params), dict(policies)
    for node in graph.nodes:
        joined = None
        if isinstance(node.op, Softmax) and len(node.inputs) == 1 and policies[node.name].output is not None:
            mask_of = finder.mask_of(node)
            if mask_of is not None:
                joined, empty = mask_of
                node = replace(node, op=replace(node.op, empty=empty), inputs=(joined.x, joined.mask))
        if _adds(node) and policies[node.name].output is not None:
            joined = finder.chosen_mask(node, node.inputs[3]) or finder.filled(node, node.inputs[3])
            if joined is not None:
                node = _attention(node, joined)
                allowed = Node(f"{node.name}.allowed", LogicalNot(), (joined.mask,))
                joined = replace(joined, made=[*joined.made, allowed])
        if joined is not None:
            nodes += joined.made
            found |= {name: policies[source] for name, source in joined.like.items()}
        nodes.append(node)
    graph = prune(replace(graph, nodes=tuple(nodes)))
    return graph, {name: found.get(name, Requested()) for name in graph.values}


def _adds(node: Node) -> bool:
    return isinstance(node.op, Attention) and node.op.mask == "add" and len(node.inputs) == 4


def _attention(node: Node, joined: _Joined) -> Node:
    """The attention with its mask as bool, beside the bias where one is left."""
    assert isinstance(node.op, Attention)
    empty = _of_addend(joined.least) if np.isfinite(joined.least) else node.op.empty
    kind: Literal["bool", "add"] = "add" if joined.x else "bool"
    masks = (joined.x, f"{node.name}.allowed") if joined.x else (f"{node.name}.allowed",)
    return replace(node, op=replace(node.op, mask=kind, empty=empty), inputs=(*node.inputs[:3], *masks))


class _Finder:
    def __init__(self, graph: Graph, params: Params) -> None:
        self.graph, self.params = graph, params
        self.shapes = value_shapes(graph, params)

    def mask_of(self, node: Node) -> tuple[_Joined, Empty] | None:
        """The mask of a softmax, and what an empty row gives."""
        source = self.graph.by_name.get(node.inputs[0])
        if source is None:
            return None
        if isinstance(source.op, MaskedFill) and source.op.value <= VERY_NEGATIVE:
            x, mask = source.inputs
            same = self.shapes[x] == self.shapes[source.name]
            return (_Joined(x, mask, [], source.op.value), _of_fill(source.op.value)) if same else None
        if not isinstance(source.op, Add):
            return None
        operands = [(x, addend) for x, addend in (source.inputs, source.inputs[::-1])]
        operands = [(x, addend) for x, addend in operands if self.shapes[x] == self.shapes[source.name]]
        for x, addend in operands:
            if (found := self.added_mask(node, addend)) is not None:
                return replace(found, x=x), _of_addend(found.least)
        for x, addend in operands:
            if (found := self.filled(node, addend)) is not None:
                biased = Node(f"{node.name}.biased", Add(), (x, found.x))
                like = {**found.like, biased.name: source.name}
                found = replace(found, x=biased.name, made=[*found.made, biased], like=like)
                return found, _of_addend(found.least)
        return None

    def added_mask(self, softmax: Node, addend: str) -> _Joined | None:
        """The mask in a value that is 0 or very negative."""
        base = self.moved_from(addend)
        maker = self.graph.by_name.get(base)
        if maker is None:
            return None
        array = self.constant(base)
        if array is not None:
            if not _is_mask(array):
                return None
            if base == addend:
                values = tuple(int(v) for v in (array <= VERY_NEGATIVE).flat)
                op: Op = IntegerConstant(shape=array.shape, values=values, dtype="bool")
                name = f"{softmax.name}.masked"
                return _Joined("", name, [Node(name, op, ())], float(array.min()))
            return self.compared(softmax, addend, float(array.min()))
        if (chosen := self.chosen_mask(softmax, addend)) is not None:
            return chosen
        factor = self.factor(maker)
        return self.compared(softmax, addend, factor) if factor is not None else None

    def chosen_mask(self, softmax: Node, addend: str) -> _Joined | None:
        """As `added_mask`, of a choice by a mask."""
        base = self.moved_from(addend)
        maker = self.graph.by_name.get(base)
        chosen = None if maker is None else self.chosen(softmax, maker)
        return chosen if chosen is None else self.moved(softmax, addend, base, chosen)

    def filled(self, softmax: Node, addend: str) -> _Joined | None:
        """The mask in a value that is filled with a very negative number, and the value without it."""
        base = self.moved_from(addend)
        maker = self.graph.by_name.get(base)
        found = None if maker is None else self._unfilled(softmax, maker)
        found = None if found is None else self.moved(softmax, addend, base, found)
        moves = self._moves(addend, base)
        if found is None or (not all(map(_is_cut, moves)) and self.shapes[found.x] != self.shapes[base]):
            return None
        x, made, like = _along(f"{softmax.name}.biased", moves, found.x)
        return replace(found, x=x, made=[*found.made, *made], like=like)

    def _unfilled(self, softmax: Node, maker: Node) -> _Joined | None:
        if isinstance(maker.op, MaskedFill) and maker.op.value <= VERY_NEGATIVE:
            return _Joined(maker.inputs[0], maker.inputs[1], [], maker.op.value)
        if not isinstance(maker.op, Where):
            return None
        condition, a, b = maker.inputs
        first, second = (self.constant(self.moved_from(v)) for v in (a, b))
        if first is not None and first.size and first.max() <= VERY_NEGATIVE:
            return _Joined(b, condition, [], float(first.min()))
        if second is not None and second.size and second.max() <= VERY_NEGATIVE:
            return replace(self.inverted(softmax, condition, float(second.min())), x=a)
        return None

    def compared(self, softmax: Node, addend: str, least: float) -> _Joined | None:
        if any(map(_is_cut, self._moves(addend, self.moved_from(addend)))):
            return None
        name = f"{softmax.name}.masked"
        # Half of it: a mask of 1 is a little less than 1 on its grid.
        return _Joined("", name, [Node(name, LessEqual(value=VERY_NEGATIVE / 2), (addend,))], least)

    def factor(self, maker: Node) -> float | None:
        """The very negative number that a mask of 0 and 1 is multiplied by."""
        if isinstance(maker.op, Scale) and np.isfinite(maker.op.factor) and maker.op.factor <= VERY_NEGATIVE:
            return maker.op.factor
        if isinstance(maker.op, Mul):
            for name in maker.inputs:
                array = self.constant(self.moved_from(name))
                if array is not None and array.size and array.max() <= VERY_NEGATIVE:
                    return float(array.min())
        return None

    def chosen(self, softmax: Node, maker: Node) -> _Joined | None:
        """A choice between 0 and a very negative number, by a mask."""
        if isinstance(maker.op, MaskedFill) and maker.op.value <= VERY_NEGATIVE:
            base = self.constant(self.moved_from(maker.inputs[0]))
            return _Joined("", maker.inputs[1], [], maker.op.value) if base is not None and not base.any() else None
        if isinstance(maker.op, MaskedFill) and maker.op.value == 0:  # 0 where it is allowed
            base = self.constant(self.moved_from(maker.inputs[0]))
            if base is not None and base.size and base.max() <= VERY_NEGATIVE:
                return self.inverted(softmax, maker.inputs[1], float(base.min()))
        if isinstance(maker.op, Where):
            condition, a, b = maker.inputs
            first, second = (self.constant(self.moved_from(v)) for v in (a, b))
            if first is not None and second is not None and first.size and second.size:
                if first.max() <= VERY_NEGATIVE and not second.any():
                    return _Joined("", condition, [], float(first.min()))
                if second.max() <= VERY_NEGATIVE and not first.any():
                    return self.inverted(softmax, condition, float(second.min()))
        return None

    def inverted(self, softmax: Node, mask: str, least: float) -> _Joined:
        name = f"{softmax.name}.masked"
        return _Joined("", name, [Node(name, LogicalNot(), (mask,))], least)

    def moved(self, softmax: Node, addend: str, base: str, found: _Joined) -> _Joined | None:
        """A mask, moved as the value in which it was found: as nn.TransformerEncoder does with its padding mask."""
        moves = [node for node in self._moves(addend, base) if not _is_cut(node)]
        if not moves:
            return found
        shape = self.shapes[found.made[0].inputs[0] if found.made else found.mask]
        if shape != self.shapes[base] or any(type(node.op).__name__ not in _OF_ANY_DTYPE for node in moves):
            return None
        mask, made, _ = _along(f"{softmax.name}.masked", moves, found.mask)
        return replace(found, mask=mask, made=[*found.made, *made])

    def _moves(self, addend: str, base: str) -> list[Node]:
        """The nodes that move `base` until it is `addend`, in order."""
        found: list[Node] = []
        while addend != base:
            found.append(self.graph.by_name[addend])
            addend = found[-1].inputs[0]
        return found[::-1]

    def moved_from(self, name: str) -> str:
        """The value of which another one is made by moving and repeating elements, and by the cut of `Attention`."""
        node = self.graph.by_name.get(name)
        while node is not None and (type(node.op).__name__ in MOVES or _is_cut(node)):
            name = node.inputs[0]
            node = self.graph.by_name.get(name)
        return name

    def constant(self, name: str) -> np.ndarray | None:
        node = self.graph.by_name.get(name)
        if node is None or not isinstance(node.op, Constant):
            return None
        value = self.params[node.params["value"]]
        return None if isinstance(value, jax.core.Tracer) else np.asarray(value)


_OF_ANY_DTYPE = {"Expand", "Reshape", "Flatten", "Slice", "Permute", "Tile"}
MOVES = {*_OF_ANY_DTYPE, "Requantize", "QuantStub", "Dropout"}


def _is_cut(node: Node) -> bool:
    """Whether a node takes nothing from a mask, as the bound of `Attention`, which files have in front of it."""
    op = node.op
    return isinstance(op, Clamp) and op.maximum is None and op.minimum is not None and op.minimum <= LEAST_ADDED


def _along(prefix: str, moves: Sequence[Node], name: str) -> tuple[str, list[Node], dict[str, str]]:
    """A value moved by copies of nodes: its name, the copies, and of which node each is one."""
    made, like = [], {}
    for i, node in enumerate(moves):
        made.append(replace(node, name=f"{prefix}.{i}", inputs=(name, *node.inputs[1:])))
        name = made[-1].name
        like[name] = node.name
    return name, made, like


def _is_mask(array: np.ndarray) -> bool:
    return bool(((array == 0) | (array <= VERY_NEGATIVE)).all() and (array != 0).any())


def _of_fill(value: float) -> Empty:
    return "mean" if np.isfinite(value) else "nan"


def _of_addend(value: float) -> Empty:
    if not np.isfinite(value):
        return "nan"
    return "mean" if value <= ABSORBING else "scores"
