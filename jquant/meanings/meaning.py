"""The meanings of a model: what its graph computes, as a rule at a node and a tap on each value."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax

from jquant.graph.evaluate import Rule, Tap, evaluate
from jquant.graph.float import float_rule
from jquant.meanings.bit_true import partly_bit_true
from jquant.meanings.fake_quant import fake_quant_rule, fake_quant_tap
from jquant.ops.lookup import table_float
from jquant.plan.batch_norm import fold_kept
from jquant.plan.scales import value_scales
from jquant.quantizers.surrogate import straight_through
from jquant.text import did_you_mean
from jquant.types import Array, Graph, JQuantError, Model, Node

Mode = Literal["float", "fake_quant", "tables", "bit_true"]
MODES: tuple[Mode, ...] = ("float", "fake_quant", "tables", "bit_true")


class Meaning(NamedTuple):
    """A graph, the rule that computes a node from its operands, and the tap that every value passes."""

    graph: Graph
    rule: Rule
    tap: Tap | None = None

    def values(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """All values by name, for inputs by name; real."""
        return evaluate(self.graph, inputs, self.rule, self.tap)

    def at(self, node: Node, *operands: Array) -> Array:
        """One node alone: its value for real operands."""
        value = self.rule(node, *operands)
        return value if self.tap is None else self.tap(node.name, value)


def meaning_of(model: Model, mode: Mode, *, rng: Array | None = None, selected: tuple[str, ...] = ()) -> Meaning:
    """The meaning of a model in a mode. A batch norm that `prepare` kept is folded, but in float.

    Args:
      model: with scales, but for "float".
      mode: "float"; "fake_quant": weights and values on their grids; "tables": with lookup tables in the place of
        functions; "bit_true": fake-quant in which the nodes `selected` compute on integers.
      rng: a PRNG key that activates stochastic operators.
    """
    if mode == "float":
        return Meaning(model.plan.graph, float_rule(model.plan.graph, model.params, rng))
    model = fold_kept(model)
    plan, params, qparams = model.plan, model.params, model.qparams
    rule = fake_quant_rule(plan, params, qparams, rng)
    if mode == "bit_true":
        return Meaning(plan.graph, *partly_bit_true(plan, params, qparams, rule, selected))
    if mode == "tables":
        rule = with_tables(model, rule)
    return Meaning(plan.graph, rule, fake_quant_tap(plan, qparams))


def with_tables(model: Model, rule: Rule) -> Rule:
    """A rule of fake-quant in which table functions are their tables, with the gradient of the function."""
    plan, scales = model.plan, value_scales(model.plan, model.qparams)

    def tables(node: Node, *operands: Array) -> Array:
        value = rule(node, *operands)
        source, spec = plan.values.get(node.inputs[0]) if node.inputs else None, plan.values[node.name]
        if not hasattr(node.op, "table") or source is None or spec is None or "float16" in (source.dtype, spec.dtype):
            return value
        x_scale, y_scale = scales[node.inputs[0]], scales[node.name]
        assert x_scale is not None
        assert y_scale is not None
        table = table_float(node.op, operands[0], x_scale, source.dtype, y_scale, spec.dtype, target=plan.target)
        return straight_through(value, jax.lax.stop_gradient(table))

    return tables


def check_mode(mode: str) -> None:
    """Raises JQuantError for a name that is no mode."""
    if mode not in MODES:
        raise JQuantError(f"unknown mode {mode!r}; known: {', '.join(MODES)}{did_you_mean(mode, MODES)}")
