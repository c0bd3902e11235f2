"""The values of a plan under any of its meanings, and the rule of one node under each."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from jquant.apply import table_rule
from jquant.integer import dequantize_values, quantize_inputs, run_integers, run_island
from jquant.ir.evaluate import evaluate
from jquant.numerics.rounding import quantize, to_float16
from jquant.ops.base import eval_integer
from jquant.simulate import evaluate_plan, fake_quant_rule, fake_quant_tap, float_rule
from jquant.text import did_you_mean
from jquant.types import Array, JQuantError, Node, Params, Plan, Program, QParams

# calibrated, validation and qat are one evaluation: fake-quant. Which parameters and scales go in makes the difference.
MEANINGS = ("float", "calibrated", "validation", "qat", "pre_export", "integer")


class Side(NamedTuple):
    """What a meaning is computed from. `program` is there for "integer" only."""

    params: Params
    qparams: QParams
    program: Program | None


def check_meaning(meaning: str) -> None:
    """Raises JQuantError for a name that is no meaning."""
    if meaning not in MEANINGS:
        raise JQuantError(f"unknown meaning {meaning!r}; known: {', '.join(MEANINGS)}{did_you_mean(meaning, MEANINGS)}")


def values_of(plan: Plan, meaning: str, side: Side, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """All values by name, real."""
    if meaning == "integer":
        assert side.program is not None
        return dequantize_values(side.program, run_integers(side.program, quantize_inputs(side.program, inputs)))
    if meaning == "pre_export":
        rule = table_rule(plan, side.params, side.qparams, None)
        return evaluate(plan.graph, inputs, rule, fake_quant_tap(plan, side.qparams))
    return evaluate_plan(plan, side.params, side.qparams, inputs, quantized=meaning != "float")


def node_rule(plan: Plan, meaning: str, side: Side) -> Callable[..., Array]:
    """`rule(node, *operands) -> value`, real in and out: one node alone under a meaning."""
    if meaning == "integer":
        assert side.program is not None
        return _integer_rule(side.program)
    if meaning == "float":
        return float_rule(plan.graph, side.params)
    make = table_rule if meaning == "pre_export" else fake_quant_rule
    rule, tap = make(plan, side.params, side.qparams, None), fake_quant_tap(plan, side.qparams)
    return lambda node, *operands: tap(node.name, rule(node, *operands))


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
