"""The jitted interpreter of integer programs."""

from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jquant.graph.axes import with_automatic_axes
from jquant.graph.evaluate import Rule, bind_inputs, evaluate
from jquant.graph.loops import FEW_BLOCKS, LEAST_BLOCKS, find_loops
from jquant.graph.memory import Need, batch_of, largest_need, naming_memory
from jquant.graph.operator import eval_float, eval_integer
from jquant.graph.rolled import Keep, Own, Rolled, Stacked, columns_of, evaluate_rolled, stacked
from jquant.graph.structure import nested_outputs
from jquant.numerics.fusion import held
from jquant.numerics.platform import platform
from jquant.numerics.rounding import dequantize, quantize, to_float16
from jquant.ops.movement import Cat, Stack
from jquant.types import Array, InputError, Node, NodeFormat, Program, Target, storage_dtype


def run_integers(program: Program, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """All values of a program as integers, by name. No float dtype appears in its jaxpr, except for float islands."""
    return evaluate(program.graph, inputs, _rule(program, program.constants))


def run_outputs(program: Program, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs of a program as integers, by name. Equal blocks run as a loop, which is compiled once."""
    values, _ = _run_rolled(program, inputs, None)
    return {name: values[name] for name in program.graph.outputs}


def stacked_reals(program: Program, inputs: Mapping[str, Array]) -> dict[str, Array | Stacked]:
    """All values by name, real, as `jquant.graph.rolled.parted` takes them; those of equal blocks are `Stacked`."""

    def real_of(name: str, value: Array, own: Own) -> Array:
        scales = own["scales"] if own else program.scales
        return dequantize(value, scales[name]) if name in scales else value

    return _run_rolled(program, inputs, Keep(frozenset(program.graph.values), real_of))[1]


def _run_rolled(
    program: Program, inputs: Mapping[str, Array], keep: Keep | None
) -> tuple[dict[str, Array], dict[str, Any]]:
    blocks = LEAST_BLOCKS if keep is None else FEW_BLOCKS
    loops = find_loops(program.graph, lambda node: _kind(node, program), blocks, recurrences=False)
    rolled = []
    for loop in loops:
        columns = columns_of(loop)
        scaled = {body: names for body, names in columns.items() if body in program.scales} if keep else {}
        own = {"constants": stacked(program.constants, columns), "scales": stacked(program.scales, scaled)}
        rolled.append(Rolled(loop, own))

    def meaning(own: Own | None) -> tuple[Rule, None]:
        return _rule(program, {**program.constants, **(own or {}).get("constants", {})}), None

    return evaluate_rolled(program.graph, inputs, meaning, rolled, keep)


def _kind(node: Node, program: Program) -> Hashable:
    """What has to be equal for two nodes to be the same computation on constants of their own."""
    constants = tuple((role, c.shape, str(c.dtype)) for role, c in sorted(program.constants[node.name].items()))
    scale = program.scales[node.name].shape if node.name in program.scales else None
    return node.op, program.formats[node.name], constants, scale, _is_held(node, program)


def _rule(program: Program, constants: Mapping[str, Mapping[str, Array]]) -> Rule:
    held_nodes = {node.name for node in program.graph.nodes if _is_held(node, program)}

    def rule(node: Node, *operands: Array) -> Array:
        of_node = constants[node.name]
        value = run_node(node, program.formats[node.name], program.target, operands, of_node)
        return held(value, of_node["post"].ravel()[0] >= 0) if node.name in held_nodes else value  # a shift

    return rule


def _is_held(node: Node, program: Program) -> bool:
    """Whether a value is finished before its readers begin: one that several read, or that joins others.

    A loop of a CPU that joins values in its middle decides at each element which one it reads, and is not vectorized.
    """
    several = len(program.graph.consumers[node.name]) > 1
    joins = isinstance(node.op, Cat | Stack) and platform() == "cpu"
    return len(node.inputs) > 1 and (several or joins) and "post" in program.constants[node.name]


def run_node(
    node: Node, node_format: NodeFormat, target: Target, operands: Sequence[Array], constants: Mapping[str, Array]
) -> Array:
    """One node on integers."""
    if node_format.output == "float16":
        return run_island(node, operands, constants)
    return eval_integer(node.op, node_format, target, *operands, **constants)


def run_island(node: Node, operands: Sequence[Array], constants: Mapping[str, Array]) -> Array:
    """A float16 node: its operands made real, the operator in float32, the result rounded to float16 once."""
    scales = [constants[f"scale_{i}"] for i in range(len(operands))]
    params = {role: constants[role] for role in node.params}
    real = [x if is_exact(x) else dequantize(x, s) for x, s in zip(operands, scales, strict=True)]
    return to_float16(eval_float(node.op, *real, **params))


def is_exact(x: Array) -> bool:
    """Whether a stored operand is a mask, index or pixel; a high-precision accumulator never feeds a node."""
    return x.dtype in (jnp.bool_, jnp.int32, jnp.uint8)


def quantize_inputs(program: Program, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Real inputs to integers, at the scales of the program."""

    def convert(name: str, dtype: str) -> Array:
        if dtype == "float16":
            return to_float16(inputs[name])
        if name not in program.scales:
            return inputs[name]  # exact
        return quantize(inputs[name], program.scales[name], dtype, program.target.quantize_rounding)

    return {name: convert(name, dtype) for name, dtype in program.inputs.items()}


def dequantize_values(program: Program, values: Mapping[str, Array]) -> dict[str, Array]:
    """Integers to real float32; exact values as they are."""

    def convert(name: str, value: Array) -> Array:
        if value.dtype == jnp.float16:
            return value.astype(jnp.float32)
        return dequantize(value, program.scales[name]) if name in program.scales else value

    return {name: convert(name, value) for name, value in values.items()}


@partial(jax.jit, static_argnames=("raw", "tapped"))
def _run(program: Program, inputs: dict[str, Array], raw: bool, tapped: bool) -> dict[str, Array]:
    values = (run_integers if tapped else run_outputs)(program, inputs if raw else quantize_inputs(program, inputs))
    return values if raw or tapped else dequantize_values(program, values)


def run(program: Program, *inputs: Array, raw: bool = False) -> Any:
    """Executes a program. A call looks whether every input is finite; `jax.jit(jq.run)` does not, and is for loops.

    Args:
      program: what `lower` or `load` returned.
      *inputs: real float32 arrays, one for each graph input or nested as the arguments of the model; with `raw`,
        integers of the program's input dtypes.
      raw: integers in, integers out (in LSB of each output; acc for a high-precision one).

    Returns:
      The outputs, nested as those of the model: one alone, or a tuple of several, of a graph made by hand.

    Raises:
      InputError: an input of the wrong shape or dtype, or with values that are not finite; or memory that ran out.
      LoweringError: a program whose target is not the march that it was lowered for, or a stack outside of vmap.

    Example:
      >>> import jax.numpy as jnp, jquant as jq
      >>> x, weights = jnp.array([[1.0, 0.5], [-0.25, 0.75]]), {"w": jnp.array([[0.5, 1.0], [-1.0, 0.25]])}
      >>> graph, params = jq.trace(lambda p, x: x @ p["w"], weights, x)
      >>> model = jq.prepare(graph, params, jq.QConfig(jq.templates.int8_default()), target="nash-e")
      >>> model = jq.calibrate(model, [x])
      >>> program = jq.lower(model)
      >>> jq.run(program, jnp.array([[127, 64]], jnp.int8), raw=True).tolist()  # LSB in, acc out
      [[0, 18177]]
      >>> jq.run(program, x).shape  # real in, real out
      (2, 2)
    """
    bound = _bind(program, inputs, raw)
    with naming_memory(lambda: _need(program, bound, raw), "Give {batch} samples a call"):
        values = with_automatic_axes(partial(_run, raw=raw, tapped=False), program, bound)
    return nested_outputs(program.graph, [values[name] for name in program.graph.outputs])


def run_with_taps(program: Program, *inputs: Array, raw: bool = False) -> dict[str, Array]:
    """All values of a program by name, as integers.

    Args:
      program, *inputs, raw: as for `run`.

    Returns:
      {value: int8, int16 or int32 array, in LSB (acc for a high-precision one)}; float32 behind a `Dequantize`.

    Raises:
      InputError, LoweringError: as `run`.

    Example:
      >>> import jax.numpy as jnp, jquant as jq
      >>> x, weights = jnp.array([[1.0, 0.5], [-0.25, 0.75]]), {"w": jnp.array([[0.5, 1.0], [-1.0, 0.25]])}
      >>> graph, params = jq.trace(lambda p, x: x @ p["w"], weights, x)
      >>> model = jq.prepare(graph, params, jq.QConfig(jq.templates.int8_default()), target="nash-e")
      >>> model = jq.calibrate(model, [x])
      >>> program = jq.lower(model)
      >>> {name: str(value.dtype) for name, value in jq.run_with_taps(program, x).items()}
      {'linear': 'int32', 'x': 'int8'}
    """
    bound = _bind(program, inputs, raw)
    with naming_memory(lambda: _need(program, bound, raw), "Give {batch} samples a call"):
        return with_automatic_axes(partial(_run, raw=raw, tapped=True), program, bound)


def _need(program: Program, inputs: dict[str, Array], raw: bool) -> Need | None:
    types = jax.eval_shape(partial(_run, raw=raw, tapped=True), program, inputs)
    return largest_need(program.graph, types, batch_of(program.graph, inputs))


def _bind(program: Program, inputs: tuple[Array, ...], raw: bool) -> dict[str, Array]:
    if not isinstance(program, Program):
        raise InputError(f"a jq.Program is run, not {type(program).__name__}; make one with jq.lower")
    program.check_target()
    program.check_single()
    dtypes = {n: storage_dtype(d) for n, d in program.inputs.items() if n in program.scales or d == "float16"}
    dtypes = dtypes if raw else {}
    return bind_inputs(program.graph, inputs, dtypes)
