"""The jitted interpreter of integer programs."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax

from jquant.ir.evaluate import bind_inputs, evaluate
from jquant.numerics.rounding import dequantize, quantize
from jquant.ops.base import eval_integer
from jquant.types import Array, Node, Program, storage_dtype


def run_integers(program: Program, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """All values of a program as integers, by name. No float dtype appears in its jaxpr."""

    def rule(node: Node, *operands: Array) -> Array:
        constants = program.constants[node.name]
        return eval_integer(node.op, program.formats[node.name], program.target, *operands, **constants)

    return evaluate(program.graph, inputs, rule)


def quantize_inputs(program: Program, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Real inputs to integers, at the scales of the program."""
    rounding = program.target.quantize_rounding
    return {n: quantize(inputs[n], program.scales[n], dtype, rounding) for n, dtype in program.inputs.items()}


def dequantize_values(program: Program, values: Mapping[str, Array]) -> dict[str, Array]:
    return {name: dequantize(value, program.scales[name]) for name, value in values.items()}


@partial(jax.jit, static_argnames=("raw", "tapped"))
def _run(program: Program, inputs: dict[str, Array], raw: bool, tapped: bool) -> dict[str, Array]:
    values = run_integers(program, inputs if raw else quantize_inputs(program, inputs))
    if not tapped:
        values = {name: values[name] for name in program.graph.outputs}
    return values if raw or tapped else dequantize_values(program, values)


def run(program: Program, *inputs: Array, raw: bool = False) -> Any:
    """Executes a program.

    Args:
      program: what `lower` or `load` returned.
      *inputs: real float32 arrays, one for each graph input; with `raw`, integers of the program's input dtypes.
      raw: integers in, integers out (in LSB of each output; acc for a high-precision one).

    Returns:
      The output, or a tuple where the graph has several.

    Raises:
      InputError: an input of the wrong shape or dtype, or with values that are not finite.
    """
    values = _run(program, _bind(program, inputs, raw), raw, False)
    outputs = tuple(values[name] for name in program.graph.outputs)
    return outputs[0] if len(outputs) == 1 else outputs


def run_with_taps(program: Program, *inputs: Array, raw: bool = False) -> dict[str, Array]:
    """All values of a program by name, as integers."""
    return _run(program, _bind(program, inputs, raw), raw, True)


def _bind(program: Program, inputs: tuple[Array, ...], raw: bool) -> dict[str, Array]:
    dtypes = {n: storage_dtype(d) for n, d in program.inputs.items()} if raw else None
    return bind_inputs(program.graph, inputs, dtypes)
