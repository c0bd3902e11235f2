"""Operators without statistics behind an output of a finished program, or at a value inside it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jquant.graph.checks import validate
from jquant.graph.operator import Operand, derived_scale, eval_float
from jquant.numerics.rounding import dequantize
from jquant.ops.dequantize import Dequantize
from jquant.ops.movement import carries_accumulator, moved_scale
from jquant.program.insert.front import front_of, unused
from jquant.program.insert.operator import check_stateless
from jquant.program.insert.parity import quantized
from jquant.program.integers import run, run_integers
from jquant.text import did_you_mean
from jquant.types import (
    Array,
    FrozenMap,
    Graph,
    InputError,
    LoweringError,
    Node,
    Op,
    Program,
    integer_range,
    storage_dtype,
)

_LARGEST = 2**20  # of an accumulator in the parity test: float32 tells its integers apart


def insert_op_behind(
    program: Program,
    value: str,
    op: Op,
    *,
    output: Operand | None = None,
    check: Any = None,
    max_difference: int = 1,
) -> Program:
    """Puts an operator that needs no statistics behind an output, or at a value inside of a program.

    Behind an output, its result is the new output: a permutation, a resize, the position of the largest element, or
    real numbers (`jq.ops.Dequantize()`, the last one). At an inner value, all that read it read the result, so format,
    scale and shape have to stay as they are.

    Args:
      program: what `lower` or `load` returned; it stays as it is.
      value: an output, or a node, as `print(program)` shows them; images inside are [N, H, W, C].
      op: an operator of one operand, without parameters.
      output: the format of the result, `jq.ops.Operand(dtype, scale, shape)`, for an operator whose scale does not
        follow from its operand (`jq.ops.Requantize()`, a table): a scale that is given needs no statistics.
      check: an array of integers to compare it on; None draws them.
      max_difference: LSB of the result that integers and floats may be apart.

    Returns:
      A program with a node `value.operator`. `jq.run` gives real outputs without any operator; behind `Dequantize` they
      are float32 with `raw` as well, in a saved program and for whoever runs it.

    Raises:
      LoweringError: an operator that needs statistics, one that changes what the readers of an inner value were
        calibrated for, one that compares or mixes an accumulator whose channels have scales of their own, a
        `Dequantize` of what has no scale or at an inner value, or integers that differ from the float rule.
      InputError: no such value, or an operator that does not take it.

    Example:
      program = jq.program.insert_op_behind(program, "head", jq.ops.ArgMax(axis=1))
    """
    value = _value_of(program, value)
    check_stateless(op, given=output)
    operand = _operand_of(program, value)
    if isinstance(op, Dequantize):
        _check_real_end(program, value)
    result = _result_of(op, operand, value) if output is None else output
    name = unused(f"{value}.{type(op).__name__.lower()}", program, "")
    front = front_of({value: operand}, [(Node(name, op, (value,)), result, {})], name, program.target)
    raw = _random(operand) if check is None else np.asarray(check)
    shape = _compare(front, op, raw, operand, result, max_difference)
    inside = value not in program.graph.outputs
    if inside:
        _check_readers(program, value, operand, replace(result, shape=(operand.shape[0], *shape[1:])), op)
    graph = _joined(program.graph, value, front.graph.nodes[0], inside)
    scales = dict(program.scales)
    if value in program.scales and result.dtype != "float32" and not _is_exact(op, operand):
        scales[name] = jnp.asarray(result.scale, jnp.float32)
    return replace(
        program,
        graph=graph,
        constants={**program.constants, **front.constants},
        scales=scales,
        formats=FrozenMap({**program.formats, **front.formats}),
        accumulators={**program.accumulators, **front.accumulators},
    )


def _value_of(program: Program, value: str) -> str:
    if not isinstance(program, Program):
        raise InputError(f"operators go behind a value of a jq.Program, not {type(program).__name__}; call jq.lower")
    names = [*program.graph.by_name]
    found = f"{value}.to_first" if f"{value}.to_first" in program.graph.outputs else value
    if found not in names:
        hint = "; before an input goes jq.program.insert_op" if value in program.inputs else did_you_mean(value, names)
        raise InputError(f"the program has no node {value!r}{hint}")
    if program.formats[found].output == "float16":
        raise LoweringError(
            f"{value!r} is a float16 island, real numbers already. Put the operator into the float graph"
        )
    if program.formats[found].output == "float32":
        raise LoweringError(
            f"{value!r} is float32 behind a Dequantize, which is the last node of a program; insert the operator at "
            f"{program.graph.by_name[found].inputs[0]!r} first, and Dequantize behind it"
        )
    return found


def _check_real_end(program: Program, value: str) -> None:
    """`Dequantize` goes behind an output that has a scale."""
    if value not in program.scales:
        raise LoweringError(
            f"Dequantize behind {value!r}: it is {program.formats[value].output} without a scale (an index, a mask or "
            "a pixel) and means its own number; jq.run gives it as it is"
        )
    if value not in program.graph.outputs:
        readers = ", ".join(node.name for node in program.graph.consumers[value])
        raise LoweringError(
            f"Dequantize at the inner value {value!r}: {readers} reads integers. Outputs are "
            f"{', '.join(program.graph.outputs)}; jq.run_with_taps gives inner values, and program.scales their scales"
        )


def _operand_of(program: Program, value: str) -> Operand:
    """The format of a value, and its shape, with None for the batch."""
    inputs = {
        i.name: jax.ShapeDtypeStruct(
            tuple(2 if n is None else n for n in i.shape),
            storage_dtype(program.inputs[i.name]) if i.dtype == "float32" else i.dtype,
        )
        for i in program.graph.inputs
    }
    shape = jax.eval_shape(run_integers, program, inputs)[value].shape
    batch = None if program.graph.inputs[0].shape[:1] == (None,) else shape[0]
    return Operand(program.formats[value].output, program.scales.get(value, jnp.float32(1)), (batch, *shape[1:]))


def _is_exact(op: Op, operand: Operand) -> bool:
    """Whether the result is no number on a grid: an index or a mask."""
    shape = tuple(2 if n is None else n for n in operand.shape)
    return jax.eval_shape(lambda x: eval_float(op, x), jax.ShapeDtypeStruct(shape, jnp.float32)).dtype != jnp.float32


def _result_of(op: Op, operand: Operand, value: str) -> Operand:
    """The format of the result, where it follows from that of the operand."""
    if len(op.ports) > 1 and not op.moves:
        raise InputError(
            f"{type(op).__name__} takes {len(op.ports)} operands ({', '.join(op.ports)}); it has {value!r} alone"
        )
    shape = tuple(2 if n is None else n for n in operand.shape)
    try:
        found = jax.eval_shape(lambda x: eval_float(op, x), jax.ShapeDtypeStruct(shape, jnp.float32))
    except (TypeError, ValueError, IndexError) as error:
        raise InputError(
            f"{type(op).__name__} does not take {value!r} of shape {list(operand.shape)}: {error}"
        ) from error
    after = (operand.shape[0], *found.shape[1:])
    if isinstance(op, Dequantize):
        return Operand("float32", jnp.float32(1), after)
    by_channel = operand.scale.ndim > 0
    if by_channel and not carries_accumulator(op, shape, found.shape):
        raise LoweringError(
            f"{value!r} is an accumulator whose channels have scales of their own, and {type(op).__name__} compares or "
            "mixes them; give the layer int8 or int16 before prepare, or insert jq.ops.Requantize() with output= first"
        )
    if found.dtype != jnp.float32:
        return Operand(str(found.dtype), jnp.float32(1), after)
    if by_channel:
        return Operand(operand.dtype, moved_scale(op, operand.scale, operand.shape[1:]), after)  # type: ignore[arg-type]
    if op.scale_rule == "same_as_input":
        return Operand(operand.dtype, operand.scale, after)
    if op.scale_rule == "derived":
        return Operand(operand.dtype, derived_scale(op, operand.scale), after)
    raise InputError(
        f"{type(op).__name__} changes the format; say which with output=jq.ops.Operand(dtype, scale, shape)"
    )


def _random(operand: Operand, batch: int = 4) -> np.ndarray:
    low, high = (0, 1) if operand.dtype == "bool" else integer_range(operand.dtype)
    low, high = max(low, -_LARGEST), min(high, _LARGEST)
    shape = [batch if n is None else n for n in operand.shape]
    return np.random.default_rng(0).integers(low, high + 1, shape).astype(storage_dtype(operand.dtype))


def _compare(
    front: Program, op: Op, raw: np.ndarray, operand: Operand, result: Operand, allowed: int
) -> tuple[int, ...]:
    """Runs the operator on integers and in float; returns the shape of the result."""
    real: Array = dequantize(jnp.asarray(raw), operand.scale)
    want = np.asarray(eval_float(op, real))
    if np.issubdtype(want.dtype, np.floating) and result.dtype != "float32":
        want = quantized(want, result.scale, result.dtype)
    (name,) = front.graph.outputs
    free = replace(front.graph.inputs[0], shape=(None, *front.graph.inputs[0].shape[1:]))
    front = replace(front, graph=replace(front.graph, inputs=(free,)))
    got = np.asarray(run(front, jnp.asarray(raw), raw=True))
    if result.dtype == "float32":
        if not np.array_equal(got, want):
            raise LoweringError(f"parity test of {name!r}: the real numbers are not the integers times their scale")
        return want.shape
    got = got.astype(np.int64)
    apart = int(np.abs(got - want.astype(np.int64)).max(initial=0)) if got.shape == want.shape else None
    if apart is None or apart > (0 if want.dtype == bool or result.dtype in ("bool", "uint8") else allowed):
        shown = f"the shape {list(got.shape)} against {list(want.shape)}" if apart is None else f"{apart} LSB apart"
        raise LoweringError(f"parity test of {name!r}: integers and the float rule are {shown}; {allowed} are allowed")
    return want.shape


def _check_readers(program: Program, value: str, before: Operand, after: Operand, op: Op) -> None:
    """What reads an inner value was lowered for its format, scale and shape."""
    scales = before.scale.shape == after.scale.shape and bool((before.scale == after.scale).all())
    same = before.dtype == after.dtype and scales and tuple(before.shape) == tuple(after.shape)
    if not same:
        readers = ", ".join(node.name for node in program.graph.consumers[value])
        raise LoweringError(
            f"{type(op).__name__} at the inner value {value!r} makes {after.dtype} {list(after.shape)}, scale "
            f"{_shown(after.scale)}, and {readers} was calibrated for {before.dtype} {list(before.shape)}, scale "
            f"{_shown(before.scale)}. Put it into the float graph, and prepare and calibrate with it"
        )


def _shown(scale: Array) -> str:
    values: Sequence[float] = np.asarray(scale).ravel().tolist()
    return f"{values[0]:.4g}" if len(values) == 1 else f"{min(values):.4g} .. {max(values):.4g}"


def _joined(graph: Graph, value: str, node: Node, inside: bool) -> Graph:
    nodes: list[Node] = []
    for old in graph.nodes:
        renamed = tuple(node.name if inside and v == value else v for v in old.inputs)
        nodes.append(replace(old, inputs=renamed))
        if old.name == value:
            nodes.append(node)
    outputs = graph.outputs if inside else tuple(node.name if v == value else v for v in graph.outputs)
    return validate(replace(graph, nodes=tuple(nodes), outputs=outputs))
