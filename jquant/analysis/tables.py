"""What lookup tables cost, one at a time, and which other tables would cost less."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax

from jquant.analysis.metrics import max_error, sqnr
from jquant.apply import apply_with_taps
from jquant.batch_norm import fold_kept
from jquant.ir.evaluate import evaluate
from jquant.ir.graph import check_params
from jquant.ops.base import eval_float
from jquant.ops.lookup import table_float
from jquant.simulate import check_qparams, fake_quant_rule, fake_quant_tap, value_scales
from jquant.types import Array, Node, Params, Plan, QParams


@dataclass(frozen=True, kw_only=True)
class TableCost:
    """What the table of one node costs on a batch, and what other tables would.

    `own_sqnr`, `own_max_lsb`  of the table against its function on the same operand, dB and LSB of the output
    `output_sqnr`  dB, of the first output with only this table in place, against fake-quant without tables
    `tried`    ((change, own_sqnr), ...), best first
    """

    name: str
    operator: str
    own_sqnr: float
    own_max_lsb: float
    output_sqnr: float
    tried: tuple[tuple[str, float], ...]


def table_costs(plan: Plan, params: Params, qparams: QParams, *inputs: Array) -> list[TableCost]:
    """Every table by itself: what it costs, and which num_tables, placement or period would cost less.

    Args:
      plan, params, qparams, *inputs: as for `jq.apply`.

    Returns:
      The tables, the worst at the output first. A table from int8 has every entry, and nothing to try.

    Example:
      worst = jq.analysis.table_costs(plan, params, qparams, x)[0]
      print(worst.name, worst.own_sqnr, worst.tried[0])
    """
    check_params(plan.graph, params)
    check_qparams(plan, qparams)
    plan, params, qparams = fold_kept(plan, params, qparams)
    values = apply_with_taps(plan, params, qparams, *inputs)[1]
    scales, first = value_scales(plan, qparams), plan.graph.outputs[0]
    bound = {entry.name: x for entry, x in zip(plan.graph.inputs, inputs, strict=True)}
    found = []
    for node in plan.graph.nodes:
        if not _is_table(plan, node):
            continue
        operand = values[node.inputs[0]]
        function = eval_float(node.op, operand)

        def table(op: Any, node: Node = node, operand: Array = operand) -> Array:
            return _table(plan, scales, node, op, operand)

        own = table(node.op)
        with_table = _with_value(plan, dict(params), dict(qparams), bound, node.name, own)
        scale = scales[node.name]
        assert scale is not None
        tried = {name: float(sqnr(function, table(op))) for name, op in _alternatives(plan, node).items()}
        found.append(
            TableCost(
                name=node.name,
                operator=type(node.op).__name__,
                own_sqnr=float(sqnr(function, own)),
                own_max_lsb=float(max_error(function, own) / scale),
                output_sqnr=float(sqnr(values[first], with_table[first])),
                tried=tuple(sorted(tried.items(), key=lambda item: -item[1])),
            )
        )
    return sorted(found, key=lambda cost: cost.output_sqnr)


def _is_table(plan: Plan, node: Node) -> bool:
    spec = plan.values[node.name]
    source = plan.values.get(node.inputs[0]) if node.inputs else None
    return (
        hasattr(node.op, "table") and spec is not None and source is not None and not (spec.is_float or source.is_float)
    )


def _table(plan: Plan, scales: Mapping[str, Array | None], node: Node, op: Any, operand: Array) -> Array:
    x_scale, y_scale = scales[node.inputs[0]], scales[node.name]
    assert x_scale is not None
    assert y_scale is not None
    x_dtype, y_dtype = plan.spec(node.inputs[0]).dtype, plan.spec(node.name).dtype
    return table_float(op, operand, x_scale, x_dtype, y_scale, y_dtype, rounding=plan.target.quantize_rounding)


@partial(jax.jit, static_argnames=("plan", "name"))
def _with_value(
    plan: Plan, params: Params, qparams: QParams, inputs: dict[str, Array], name: str, value: Array
) -> dict[str, Array]:
    """The outputs of fake-quant with one value replaced."""
    tap, rule = fake_quant_tap(plan, qparams), fake_quant_rule(plan, params, qparams)
    values = evaluate(plan.graph, inputs, rule, lambda n, v: value if n == name else tap(n, v))
    return {output: values[output] for output in plan.graph.outputs}


def _alternatives(plan: Plan, node: Node) -> dict[str, Any]:
    """The same function with other tables."""
    if plan.spec(node.inputs[0]).dtype != "int16":
        return {}
    op: Any = node.op
    found = {}
    own = () if isinstance(op.table.placement, tuple) else ((op.table.num_tables, "curvature"),)
    for count, placement in (*own, (24, "evenly"), (24, "balanced"), (96, "evenly"), (96, "balanced")):
        if count >= op.table.num_tables:
            options = replace(op.table, num_tables=count, placement=placement)
            if options != op.table:
                found[f"num_tables={count}, placement={placement!r}"] = replace(op, table=options)
    if hasattr(op, "single_period"):
        found[f"single_period={not op.single_period}"] = replace(op, single_period=not op.single_period)
    return found
