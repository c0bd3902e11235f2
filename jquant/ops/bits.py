"""Shifts of exact integers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp

from jquant.graph.operator import Lowered, Operand, eval_float, eval_integer, lower_op
from jquant.types import Array, GraphError, NodeFormat, Op, Target


@dataclass(frozen=True, kw_only=True)
class BitShift(Op):
    """An exact int32 shifted to the right, rounding down, or by negative `bits` to the left, dropping what leaves."""

    takes_exact: ClassVar = True
    layout: ClassVar = "elementwise"
    needs_stats: ClassVar = False

    bits: int


@eval_float.register
def _(op: BitShift, x: Array) -> Array:
    if x.dtype != jnp.int32:
        raise GraphError(f"a shift is for exact int32, not {x.dtype}; a number is multiplied by a power of two (Scale)")
    if not -31 <= op.bits <= 31:
        raise GraphError(f"a shift by {op.bits} bits leaves nothing of an int32")
    return x >> op.bits if op.bits >= 0 else x << -op.bits


@lower_op.register
def _(op: BitShift, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    return Lowered({})


@eval_integer.register
def _(op: BitShift, node_format: NodeFormat, target: Target, x: Array) -> Array:
    return eval_float(op, x)
