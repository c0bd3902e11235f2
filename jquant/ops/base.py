"""The functions that give an operator its meanings. Each is a `singledispatch` on the operator's class.

To add an operator, define its dataclass and register what it can do: see `docs/adding-an-operator.md`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, Literal

from jquant.types import Array, GraphError, LoweringError, NodeFormat, Op, Target


@dataclass(frozen=True)
class Operand:
    """What lowering knows of a value: its integer dtype, its scale (real per LSB) and its shape without the batch."""

    dtype: str
    scale: Array
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Lowered:
    """The integer form of a node: constants by role, and how it accumulates."""

    constants: dict[str, Array]
    accumulator: Literal["int32", "limbs"] = "int32"
    worst_case: int | None = None


@singledispatch
def eval_float(op: Op, *inputs: Array, **params: Array) -> Array:
    """The operator on float32 arrays. Parameters arrive by role; a stochastic operator gets `rng=` in training."""
    raise GraphError(f"{type(op).__name__} has no float rule: register one with jquant.eval_float.register")


@singledispatch
def eval_integer(op: Op, node_format: NodeFormat, target: Target, *inputs: Array, **constants: Array) -> Array:
    """The operator on integers, with the constants that `lower_op` made. No float enters or leaves."""
    raise GraphError(f"{type(op).__name__} has no integer rule: register one with jquant.eval_integer.register")


@singledispatch
def lower_op(op: Op, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    """Integer constants of a node. `params` holds (integer array, scale) for quantized weights, else the real array."""
    raise LoweringError(f"{type(op).__name__} has no integer form yet; keep it float with a rule of value None")


@singledispatch
def derived_scale(op: Op, *scales: Array, **weight_scales: Array) -> Array:
    """The output scale of an operator whose `scale_rule` is "derived", or of one that keeps its accumulator."""
    raise LoweringError(f"{type(op).__name__} cannot give a high-precision (int32) output; only conv and linear can")


@singledispatch
def constraints(
    op: Op, inputs: Sequence[Operand], output: Operand, weight_dtype: str | None, target: Target
) -> list[str]:
    """The documented limits of the target that this node breaks, each as one sentence; empty where it fits."""
    return []


@singledispatch
def to_channels_last(op: Op, rank: int) -> Op | None:
    """The same operator on channels-last operands of that rank; None where it needs the framework's order."""
    return None
