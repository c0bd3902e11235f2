"""The functions that give an operator its meanings. Each is a `singledispatch` on the operator's class.

To add an operator, define its dataclass and register what it can do: see `docs/adding-an-operator.md`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any, Literal

import numpy as np

from jquant.types import Array, GraphError, LoweringError, Node, NodeFormat, Op, QuantSpec, Target


@dataclass(frozen=True)
class Operand:
    """What lowering knows of a value: its integer dtype, its scale (real per LSB) and its shape without the batch.

    An exact value (mask, index, pixel) has the dtype "bool", "int32" or "uint8" and the scale 1.
    """

    dtype: str
    scale: Array
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Lowered:
    """The integer form of a node: constants by role; the rest as in `NodeFormat` and `Accumulator`.

    `worst_case`  bound on |accumulator| in acc; None where there is no accumulator, or its weights are traced
    """

    constants: dict[str, Array]
    accumulator: Literal["int32", "pair", "limbs"] = "int32"
    worst_case: int | None = None
    kernel: str = ""
    saturating: np.ndarray | None = None


@singledispatch
def eval_float(op: Op, *inputs: Array, **params: Array) -> Array:
    """The operator on float32 arrays. Parameters arrive by role; a stochastic operator gets `rng=` in training."""
    raise GraphError(f"{type(op).__name__} has no float rule: register one with jquant.ops.eval_float.register")


@singledispatch
def eval_integer(op: Op, node_format: NodeFormat, target: Target, *inputs: Array, **constants: Array) -> Array:
    """The operator on integers, with the constants that `lower_op` made. No float but that of `Dequantize`."""
    raise GraphError(f"{type(op).__name__} has no integer rule: register one with jquant.ops.eval_integer.register")


def check_roles(constants: Mapping[str, Any], *roles: str) -> None:
    """A rule that takes its constants as they come has those that lowering made, and no others.

    Raises:
      GraphError: one is missing, or unknown.
    """
    for role in roles:
        if role not in constants:
            raise GraphError(f"the constant {role!r} is missing")
    for role in constants:
        if role not in roles:
            raise GraphError(f"there is no constant {role!r}")


@singledispatch
def lower_op(op: Op, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    """Integer constants of a node. `params` holds (integer array, scale) for quantized weights, else the real array."""
    raise LoweringError(f"{type(op).__name__} has no integer form yet; keep it float with a rule of value None")


@singledispatch
def eval_on_grid(op: Op, inputs: Sequence[Operand], output: Operand, target: Target, *values: Array) -> Array:
    """The fake-quant value of an operator whose integers round or saturate by themselves; real in, real out.

    Most operators have none: their result is put on the grid of its own scale, which is what their integers do. One
    that keeps a scale, or brings operands to one scale, registers here what its integers do. The gradient is that of
    `eval_float`.

    Args:
      op: the operator.
      inputs, output: dtype and scale (real per LSB) of each operand and of the result, as `lower_op` gets them.
      target: the march.
      *values: real float32 on the grids of `inputs`; exact operands as they are.
    """
    return eval_float(op, *values)


def rounds_by_itself(op: Op) -> bool:
    """Whether the operator has a rule in `eval_on_grid`."""
    return eval_on_grid.dispatch(type(op)) is not eval_on_grid.dispatch(object)


@singledispatch
def derived_scale(op: Op, *scales: Array, **weight_scales: Array) -> Array:
    """The output scale of an operator whose `scale_rule` is "derived", or of one that keeps its accumulator."""
    raise LoweringError(
        f"{type(op).__name__} cannot give a high-precision (int32) output; only convolutions and matrix products can"
    )


@singledispatch
def constraints(
    op: Op, inputs: Sequence[Operand], output: Operand, weight_dtype: str | None, target: Target
) -> list[str]:
    """The documented limits of the target that this node breaks, each as one sentence; empty where it fits."""
    return []


@dataclass(frozen=True)
class Parts:
    """What a composite operator is made of: nodes in order, the last one under the name of the composite.

    `specs` fixes the format of inner values; the others are int16 (or float where the composite is).
    """

    nodes: Sequence[Node]
    specs: Mapping[str, QuantSpec] = field(default_factory=dict)


@singledispatch
def decompose(op: Op, node: Node, shapes: Mapping[str, tuple[int, ...]]) -> Parts | None:
    """The operators that the chip runs for a composite one; None for an operator that it has.

    `shapes` are those of the operands and of the result, with a batch of 2. Inner nodes are named `node.name.part`.
    """
    return None


@singledispatch
def to_channels_last(op: Op, rank: int) -> Op | None:
    """The same operator on channels-last operands of that rank; None where it needs the framework's order."""
    return None
