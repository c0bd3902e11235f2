"""Marks of the region that is to be quantized, by QuantStub and DeQuantStub modules. `prepare` takes them out."""

from dataclasses import dataclass
from typing import ClassVar

from jquant.graph.operator import eval_float
from jquant.types import Array, Op


@dataclass(frozen=True, kw_only=True)
class QuantStub(Op):
    """The identity: what follows from here is quantized. In a graph that has one, nothing else is."""

    layout: ClassVar = "elementwise"
    scale_rule: ClassVar = "same_as_input"
    needs_stats: ClassVar = False


@dataclass(frozen=True, kw_only=True)
class DeQuantStub(Op):
    """The identity: what follows from here is float again."""

    layout: ClassVar = "elementwise"
    scale_rule: ClassVar = "same_as_input"
    needs_stats: ClassVar = False


@eval_float.register(QuantStub)
@eval_float.register(DeQuantStub)
def _(op: Op, x: Array) -> Array:
    return x
