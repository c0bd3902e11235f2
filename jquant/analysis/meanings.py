"""The values of a model in any mode, those of its integer program included, and the rule of one node in each."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from jquant.graph.operator import eval_integer
from jquant.graph.rolled import Stacked
from jquant.meanings.meaning import Mode, meaning_of
from jquant.meanings.rolled import stacked_values
from jquant.numerics.rounding import quantize, to_float16
from jquant.program.integers import dequantize_values, quantize_inputs, run_integers, run_island, stacked_reals
from jquant.program.lower import lower
from jquant.types import Array, Model, Node, Program


class Side(NamedTuple):
    """Of one side of a comparison the model, and in mode "bit_true" its program."""

    model: Model
    program: Program | None

    @classmethod
    def of(cls, model: Model, mode: str) -> "Side":
        return cls(model, lower(model) if mode == "bit_true" else None)


def values_of(side: Side, mode: Mode, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """All values by name, real."""
    if mode == "bit_true":
        assert side.program is not None
        return dequantize_values(side.program, run_integers(side.program, quantize_inputs(side.program, inputs)))
    return meaning_of(side.model, mode).values(inputs)


def stacked_values_of(side: Side, mode: Mode, inputs: Mapping[str, Array]) -> dict[str, Array | Stacked]:
    """`values_of`, as `jquant.graph.rolled.parted` takes them: a program that hardly grows with equal blocks."""
    if mode == "bit_true":
        assert side.program is not None
        return stacked_reals(side.program, quantize_inputs(side.program, inputs))
    if mode == "tables":
        return dict(meaning_of(side.model, mode).values(inputs))
    return stacked_values(side.model, mode, inputs)


def node_rule(side: Side, mode: Mode) -> Callable[..., Array]:
    """`rule(node, *operands) -> value`, real in and out: one node alone."""
    if mode == "bit_true":
        assert side.program is not None
        return _integer_rule(side.program)
    return meaning_of(side.model, mode).at


def _integer_rule(program: Program) -> Callable[..., Array]:
    """A node of the program on operands that are first put on the program's grid."""
    dtypes = dict(program.inputs) | {name: entry.output for name, entry in program.formats.items()}

    def on_grid(name: str, value: Array) -> Array:
        if dtypes[name] == "float16":
            return to_float16(value)
        if name not in program.scales:
            return value
        return quantize(value, program.scales[name], dtypes[name], program.target.quantize_rounding)

    def rule(node: Node, *operands: Array) -> Array:
        integers = [on_grid(name, x) for name, x in zip(node.inputs, operands, strict=True)]
        constants, entry = program.constants[node.name], program.formats[node.name]
        if entry.output == "float16":
            value = run_island(node, integers, constants)
        else:
            value = eval_integer(node.op, entry, program.target, *integers, **constants)
        return dequantize_values(program, {node.name: value})[node.name]

    return rule


def alone_of(side: Side, mode: Mode, values: Mapping[str, Array]) -> dict[str, Array]:
    """The value of each node for operands that another mode gave, where all of them are there."""
    rule = node_rule(side, mode)
    nodes = [node for node in side.model.plan.graph.nodes if all(v in values for v in node.inputs)]
    return {node.name: rule(node, *(values[v] for v in node.inputs)) for node in nodes}
