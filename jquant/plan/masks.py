"""Masks in front of a softmax, however they are written, become an operand of it.

A number such as -1e9 that is filled in or added takes the scale of the scores away from them. As an operand of the
softmax a mask is exact and costs no range. This looks at the graph, so that it serves every door.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import jax
import numpy as np

from jquant.graph.float import value_shapes
from jquant.graph.passes import prune
from jquant.ops.attention import Attention
from jquant.ops.compare import LessEqual, LogicalNot, MaskedFill, Where
from jquant.ops.composite import Softmax
from jquant.ops.elementwise import Add, Constant, IntegerConstant, Mul, Scale
from jquant.types import Graph, Node, Op, Params, Requested

VERY_NEGATIVE = -1e4  # a number at or below it makes exp 0 in every format: what is meant is a mask
ABSORBING = -1e8  # added to scores in float32, such a number leaves nothing of them

Empty = Literal["zero", "mean", "scores", "nan"]


def join_masks(graph: Graph, params: Params, policies: Mapping[str, Requested]) -> tuple[Graph, dict[str, Requested]]:
    """Gives every softmax that is to be quantized its mask as an operand; the fill or the addition goes.

    An attention whose added mask is a choice between 0 and a very negative number gets the choice, as bool.

    Returns the graph, and the policies of its values.
    """
    nodes: list[Node] = []
    finder = _Finder(graph, params)
    for node in graph.nodes:
        if isinstance(node.op, Softmax) and len(node.inputs) == 1 and policies[node.name].output is not None:
            found = finder.mask_of(node)
            if found is not None:
                x, mask, made, empty = found
                nodes += made
                node = replace(node, op=replace(node.op, empty=empty), inputs=(x, mask))
        if isinstance(node.op, Attention) and node.op.mask == "add" and policies[node.name].output is not None:
            chosen = finder.chosen_mask(node, node.inputs[3])
            if chosen is not None:
                mask, made, least = chosen
                allowed = Node(f"{node.name}.allowed", LogicalNot(), (mask,))
                nodes += [*made, allowed]
                empty = _of_addend(least) if np.isfinite(least) else node.op.empty
                op = replace(node.op, mask="bool", empty=empty)
                node = replace(node, op=op, inputs=(*node.inputs[:3], allowed.name))
        nodes.append(node)
    graph = prune(replace(graph, nodes=tuple(nodes)))
    return graph, {name: policies.get(name, Requested()) for name in graph.values}


class _Finder:
    def __init__(self, graph: Graph, params: Params) -> None:
        self.graph, self.params = graph, params
        self.shapes = value_shapes(graph, params)

    def mask_of(self, node: Node) -> tuple[str, str, list[Node], Empty] | None:
        """(scores, mask, nodes to make it, what an empty row gives) of a softmax."""
        source = self.graph.by_name.get(node.inputs[0])
        if source is None:
            return None
        if isinstance(source.op, MaskedFill) and source.op.value <= VERY_NEGATIVE:
            x, mask = source.inputs
            same = self.shapes[x] == self.shapes[source.name]
            return (x, mask, [], _of_fill(source.op.value)) if same else None
        if isinstance(source.op, Add):
            for x, addend in (source.inputs, source.inputs[::-1]):
                found = self.added_mask(node, addend) if self.shapes[x] == self.shapes[source.name] else None
                if found is not None:
                    mask, made, least = found
                    return x, mask, made, _of_addend(least)
        return None

    def added_mask(self, softmax: Node, addend: str) -> tuple[str, list[Node], float] | None:
        """(mask, nodes to make it, the number added) of a value that is 0 or very negative."""
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
                return f"{softmax.name}.masked", [Node(f"{softmax.name}.masked", op, ())], float(array.min())
            return self.compared(softmax, addend, float(array.min()))
        if (chosen := self.chosen_mask(softmax, addend)) is not None:
            return chosen
        factor = self.factor(maker)
        return self.compared(softmax, addend, factor) if factor is not None else None

    def chosen_mask(self, softmax: Node, addend: str) -> tuple[str, list[Node], float] | None:
        """As `added_mask`, of a choice by a mask."""
        base = self.moved_from(addend)
        maker = self.graph.by_name.get(base)
        chosen = None if maker is None else self.chosen(softmax, maker)
        return chosen if chosen is None or base == addend else self.moved(softmax, addend, base, chosen)

    def compared(self, softmax: Node, addend: str, least: float) -> tuple[str, list[Node], float]:
        name = f"{softmax.name}.masked"
        # Half of it: a mask of 1 is a little less than 1 on its grid.
        return name, [Node(name, LessEqual(value=VERY_NEGATIVE / 2), (addend,))], least

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

    def chosen(self, softmax: Node, maker: Node) -> tuple[str, list[Node], float] | None:
        """A choice between 0 and a very negative number, by a mask."""
        if isinstance(maker.op, MaskedFill) and maker.op.value <= VERY_NEGATIVE:
            base = self.constant(self.moved_from(maker.inputs[0]))
            return (maker.inputs[1], [], maker.op.value) if base is not None and not base.any() else None
        if isinstance(maker.op, MaskedFill) and maker.op.value == 0:  # 0 where it is allowed
            base = self.constant(self.moved_from(maker.inputs[0]))
            if base is not None and base.size and base.max() <= VERY_NEGATIVE:
                return self.inverted(softmax, maker.inputs[1], float(base.min()))
        if isinstance(maker.op, Where):
            condition, a, b = maker.inputs
            first, second = (self.constant(self.moved_from(v)) for v in (a, b))
            if first is not None and second is not None and first.size and second.size:
                if first.max() <= VERY_NEGATIVE and not second.any():
                    return condition, [], float(first.min())
                if second.max() <= VERY_NEGATIVE and not first.any():
                    return self.inverted(softmax, condition, float(second.min()))
        return None

    def inverted(self, softmax: Node, mask: str, least: float) -> tuple[str, list[Node], float]:
        name = f"{softmax.name}.masked"
        return name, [Node(name, LogicalNot(), (mask,))], least

    def moved(
        self, softmax: Node, addend: str, base: str, chosen: tuple[str, list[Node], float]
    ) -> tuple[str, list[Node], float] | None:
        """The mask of a choice, moved as the choice is: as nn.TransformerEncoder does with its padding mask."""
        mask, made, least = chosen
        shape = self.shapes[made[0].inputs[0] if made else mask]
        if shape != self.shapes[base]:
            return None
        moves: list[Node] = []
        while addend != base:
            moves.append(self.graph.by_name[addend])
            addend = moves[-1].inputs[0]
        if any(type(node.op).__name__ not in _OF_ANY_DTYPE for node in moves):
            return None
        for i, node in enumerate(reversed(moves)):
            name = f"{softmax.name}.masked.{i}"
            made = [*made, replace(node, name=name, inputs=(mask, *node.inputs[1:]))]
            mask = name
        return mask, made, least

    def moved_from(self, name: str) -> str:
        """The value of which another one is made by moving and repeating elements."""
        node = self.graph.by_name.get(name)
        while node is not None and type(node.op).__name__ in MOVES:
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


def _is_mask(array: np.ndarray) -> bool:
    return bool(((array == 0) | (array <= VERY_NEGATIVE)).all() and (array != 0).any())


def _of_fill(value: float) -> Empty:
    return "mean" if np.isfinite(value) else "nan"


def _of_addend(value: float) -> Empty:
    if not np.isfinite(value):
        return "nan"
    return "mean" if value <= ABSORBING else "scores"
