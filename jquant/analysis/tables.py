"""What lookup tables cost, one at a time, and which other tables would cost less."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jquant.analysis.metrics import max_error, sqnr
from jquant.graph.evaluate import bind_inputs
from jquant.graph.operator import eval_float
from jquant.meanings.apply import apply_with_taps
from jquant.meanings.meaning import Meaning, meaning_of
from jquant.ops.lookup import table_float
from jquant.plan.batch_norm import fold_kept
from jquant.plan.scales import check_model, value_scales
from jquant.types import Array, Model, Node, Plan


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


def table_costs(model: Model, *inputs: Array) -> list[TableCost]:
    """Every table by itself: what it costs, and which num_tables, placement or period would cost less.

    Args:
      model, *inputs: as for `jq.apply`.

    Returns:
      The tables, the worst at the output first. A table from int8 has every entry, and nothing to try.

    Example:
      worst = jq.analysis.table_costs(model, x)[0]
      print(worst.name, worst.own_sqnr, worst.tried[0])
    """
    check_model(model)
    model = fold_kept(model)
    plan, qparams = model.plan, model.qparams
    values = apply_with_taps(model, *inputs)[1]
    scales, first = value_scales(plan, qparams), plan.graph.outputs[0]
    bound = bind_inputs(plan.graph, inputs)
    found = []
    for node in plan.graph.nodes:
        if not _is_table(plan, node):
            continue
        operand = values[node.inputs[0]]
        low, high = plan.spec(node.name).range
        scale = scales[node.name]
        assert scale is not None
        # What the output cannot hold is the scale's fault, and no table's.
        function = jnp.clip(eval_float(node.op, operand), low * scale, high * scale)

        def table(op: Any, node: Node = node, operand: Array = operand) -> Array:
            return _table(plan, scales, node, op, operand)

        own = table(node.op)
        with_table = _with_value(model, bound, node.name, own)
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
    return table_float(op, operand, x_scale, x_dtype, y_scale, y_dtype, target=plan.target)


@partial(jax.jit, static_argnames=("name",))
def _with_value(model: Model, inputs: dict[str, Array], name: str, value: Array) -> dict[str, Array]:
    """The outputs of fake-quant with one value replaced."""
    graph, rule, tap = meaning_of(model, "fake_quant")
    assert tap is not None
    values = Meaning(graph, rule, lambda n, v: value if n == name else tap(n, v)).values(inputs)
    return {output: values[output] for output in graph.outputs}


def _alternatives(plan: Plan, node: Node) -> dict[str, Any]:
    """The same function with other tables."""
    if plan.spec(node.inputs[0]).dtype != "int16":
        return {}
    op: Any = node.op
    form, found = plan.target.tables, {}
    now = op.table.count(form)
    rules = ("least_error",) if isinstance(op.table.placement, tuple) else ("curvature", "least_error")
    counts = [n for n in (4 * form.count, 16 * form.count) if n <= form.max_count]
    more = ((count, placement) for count in counts for placement in ("evenly", "balanced", "least_error"))
    for count, placement in (*((now, placement) for placement in rules), *more):
        if count >= now:
            options = replace(op.table, num_tables=count, placement=placement)
            if options != replace(op.table, num_tables=now):
                found[f"num_tables={count}, placement={placement!r}"] = replace(op, table=options)
    if hasattr(op, "single_period"):
        found[f"single_period={not op.single_period}"] = replace(op, single_period=not op.single_period)
    return found
