"""Fronts: programs of inserted nodes alone, and how they are joined to the program behind them."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jquant.graph.checks import validate
from jquant.graph.operator import Lowered, Operand, constraints, lower_op
from jquant.graph.passes import rewire
from jquant.numerics.namespace import to_device
from jquant.program.lower import accumulator_of, format_of
from jquant.text import did_you_mean
from jquant.types import Accumulator, FrozenMap, Graph, Input, InputError, LoweringError, Node, Program, Target

Step = tuple[Node, Operand, dict[str, Any]]  # a node, what it makes, its parameters by role
NARROW = ("int8", "int16")


def entry_of(program: Program, name: str) -> Input:
    """The input of a program that nodes go before; it must be a quantized one.

    Raises:
      InputError: no program, or no such input. LoweringError: an exact or a float16 input.
    """
    if not isinstance(program, Program):
        raise InputError(f"operators go before a jq.Program, not {type(program).__name__}; call jq.lower first")
    names = [i.name for i in program.graph.inputs]
    if name not in names:
        raise InputError(f"the program has no input {name!r}{did_you_mean(name, names)}; inputs: {', '.join(names)}")
    if name not in program.scales or program.inputs[name] not in NARROW:
        raise LoweringError(f"input {name!r} is {program.inputs[name]}; operators go before an int8 or int16 input")
    return program.graph.inputs[names.index(name)]


def operand_of(program: Program, entry: Input) -> Operand:
    """The format of an input."""
    return Operand(program.inputs[entry.name], program.scales[entry.name], entry.shape)


def unused(name: str, program: Program, replaced: str) -> str:
    """The name, with a number where a value of the program other than the replaced input has it."""
    taken = set(program.graph.values) - {replaced}
    return next(n for n in (name, *(f"{name}.{i}" for i in range(2, len(taken) + 3))) if n not in taken)


def front_of(inputs: Mapping[str, Operand], steps: Sequence[Step], value: str, target: Target) -> Program:
    """The program of new inputs and nodes whose output is `value`."""
    known: dict[str, Operand] = dict(inputs)
    constants, formats, accumulators = {}, {}, dict[str, Accumulator]()
    for node, output, params in steps:
        operands = [known[name] for name in node.inputs]
        integers = _lower(node, operands, output, params, target)
        known[node.name] = output
        constants[node.name] = {role: jnp.asarray(v) for role, v in integers.constants.items()}
        formats[node.name] = format_of(operands, output, integers)
        accumulators |= accumulator_of(node, integers)
    entries = tuple(Input(n, tuple(x.shape), "float32" if x.dtype in NARROW else x.dtype) for n, x in inputs.items())
    graph = Graph(entries, tuple(node for node, _, _ in steps), (value,))
    scales = {n: jnp.asarray(x.scale, jnp.float32) for n, x in known.items() if x.dtype in NARROW}
    return Program(
        constants,
        scales,
        to_device(accumulators),
        graph,
        FrozenMap(formats),
        FrozenMap({n: x.dtype for n, x in inputs.items()}),
        target,
        str(target),
    )


def _lower(node: Node, operands: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    where = f"node {node.name!r} ({type(node.op).__name__})"
    if broken := constraints(node.op, operands, output, None, target):
        raise LoweringError(f"{where}: {'; '.join(broken)}")
    try:
        return lower_op(node.op, operands, output, params, target)
    except LoweringError as error:
        raise LoweringError(f"{where}: {error}") from error


def join(program: Program, name: str, front: Program) -> Program:
    """The program with a front in the place of one of its inputs."""
    graph, (value,) = program.graph, front.graph.outputs
    inputs = tuple(new for i in graph.inputs for new in (front.graph.inputs if i.name == name else (i,)))
    behind = rewire(graph, {name: value}, list(graph.nodes))
    joined = validate(Graph(inputs, (*front.graph.nodes, *behind.nodes), behind.outputs, gives=behind.gives))
    dtypes = dict(program.inputs) | dict(front.inputs)
    return Program(
        {**front.constants, **program.constants},
        {n: scale for n, scale in program.scales.items() if n != name} | front.scales,
        {**front.accumulators, **program.accumulators},
        joined,
        FrozenMap({**front.formats, **program.formats}),
        FrozenMap({i.name: dtypes[i.name] for i in inputs}),
        program.target,
        program.lowered_for,
    )
