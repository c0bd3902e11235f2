"""Any operator without statistics in front of a program."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from jquant.graph.operator import Operand, derived_scale, eval_float
from jquant.numerics.rounding import dequantize
from jquant.ops.stub import DeQuantStub, QuantStub
from jquant.program.insert.front import entry_of, front_of, join, operand_of, unused
from jquant.program.insert.parity import compare, quantized, random_integers
from jquant.types import Array, InputError, LoweringError, Node, Op, Program

_SAY_OPERANDS = "say what comes before it with operands={name: jq.ops.Operand(dtype, scale, shape)}"


def insert_op(
    program: Program,
    input: str,
    op: Op,
    *,
    operands: Mapping[str, Operand] | None = None,
    check: Sequence[Any] | None = None,
    max_difference: int = 1,
) -> Program:
    """Puts an operator that needs no statistics before an input.

    Args:
      program: what `lower` or `load` returned; it stays as it is.
      input: the input that the operator's result takes the place of.
      op: an operator with `needs_stats = False` and without parameters.
      operands: {new input: `jq.ops.Operand(dtype, scale, shape)`}, in the operator's order. None: one of the same name,
        format and shape, where the operator keeps these; a scale that it changes is changed back.
      check: integer arrays to compare it on, one for each operand; None draws them, except for int32 ones.
      max_difference: LSB of the input that integers and floats may be apart.

    Returns:
      A program whose node `input.operator` makes what the input was.

    Raises:
      LoweringError: an operator that needs statistics, or integers that differ from the float rule.
      InputError: an input or operands that do not fit.
    """
    entry = entry_of(program, input)
    check_stateless(op)
    output = operand_of(program, entry)
    if operands is None:
        operands = {input: replace(output, scale=_scale_before(op, output.scale))}
    inputs = {n if n == input else unused(n, program, input): x for n, x in operands.items()}
    name = unused(f"{input}.{type(op).__name__.lower()}", program, input)
    front = front_of(inputs, [(Node(name, op, tuple(inputs)), output, {})], name, program.target)
    raw = random_integers(inputs) if check is None else [np.asarray(a) for a in check]
    if len(raw) != len(inputs):
        raise InputError(f"check has {len(raw)} arrays, and {type(op).__name__} takes {len(inputs)} operands")
    real = _float_value(op, front, raw)
    if real.shape[1:] != tuple(entry.shape[1:]):
        raise InputError(
            f"{type(op).__name__} makes {real.shape}, and input {input!r} is {entry.shape}; {_SAY_OPERANDS}"
        )
    compare(front, raw, quantized(real, output.scale, output.dtype), max_difference, channel_axis=1)
    return join(program, input, front)


def check_stateless(op: Any, *, given: Operand | None = None) -> None:
    """Raises LoweringError for an operator with weights, or whose scale comes from statistics and is not `given`.

    Raises:
      InputError: something that is no operator, such as its class.
    """
    if not isinstance(op, Op):
        made = isinstance(op, type) and issubclass(op, Op)
        shown = f"the class {op.__name__}; call it: jq.ops.{op.__name__}(...)" if made else f"{op!r}"
        raise InputError(f"an operator is needed, such as jq.ops.Permute(axes=(0, 2, 3, 1)), not {shown}")
    if isinstance(op, DeQuantStub | QuantStub):
        raise InputError(
            f"{type(op).__name__} marks a region of a float graph; behind an output of a program goes "
            "jq.ops.Dequantize()"
        )
    if (op.needs_stats and given is None) or op.weight_roles:
        raise LoweringError(
            f"{type(op).__name__} cannot be inserted after calibration: its output scale comes from statistics (as "
            "that of cat, add, conv). Put it into the float graph, and prepare and calibrate with it; for colours "
            "there is insert_image_preprocess"
        )


def _scale_before(op: Op, scale: Array) -> Array:
    """The operand scale that gives this output scale; a derived scale is proportional to that of the operand."""
    if op.scale_rule == "own":
        raise InputError(f"{type(op).__name__} changes the format; {_SAY_OPERANDS}")
    return scale if op.scale_rule == "same_as_input" else scale / derived_scale(op, jnp.float32(1))


def _float_value(op: Op, front: Program, raw: Sequence[np.ndarray]) -> np.ndarray:
    """The float rule on the real numbers that the integers stand for."""
    real = [
        dequantize(jnp.asarray(a), front.scales[name]) if name in front.scales else jnp.asarray(a)
        for name, a in zip(front.inputs, raw, strict=True)
    ]
    try:
        return np.asarray(eval_float(op, *real))
    except (TypeError, ValueError) as error:
        shapes = ", ".join(str(a.shape) for a in raw)
        raise InputError(f"{type(op).__name__} does not take operands of shape {shapes}: {error}") from error
