"""The end of a finished program: integers to real numbers, float32."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jquant.graph.operator import Lowered, Operand, constraints, eval_float, eval_integer, lower_op
from jquant.numerics.rounding import dequantize
from jquant.types import Array, NodeFormat, Op, Target

_PLACE = (
    "Dequantize makes float32, so it is the last node behind an output of a finished program: "
    "jq.program.insert_op_behind(program, output, jq.ops.Dequantize()). In a float graph a DeQuantStub ends what is "
    "quantized, and jq.run gives real outputs without either"
)


@dataclass(frozen=True, kw_only=True)
class Dequantize(Op):
    """Integers times their scale, as float32 [..] of the operand's shape: what `jq.run` does to an output.

    `jq.program.insert_op_behind` puts it behind an output of a program. Nothing reads its result inside a program.
    """

    layout: ClassVar = "elementwise"
    scale_rule: ClassVar = "same_as_input"
    needs_stats: ClassVar = False


@eval_float.register
def _(op: Dequantize, x: Array) -> Array:
    return x


@constraints.register
def _(
    op: Dequantize, inputs: Sequence[Operand], output: Operand, weight_dtype: str | None, target: Target
) -> list[str]:
    return [] if output.dtype == "float32" else [_PLACE]


@lower_op.register
def _(op: Dequantize, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    return Lowered({"scale": inputs[0].scale})


@eval_integer.register
def _(op: Dequantize, node_format: NodeFormat, target: Target, x: Array, *, scale: Array) -> Array:
    return dequantize(x, scale)
