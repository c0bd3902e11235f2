"""Tables that cannot follow their functions on the ranges that calibration found."""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from jquant.calibration.observe import Stats
from jquant.numerics.namespace import to_host
from jquant.observers import RangeState
from jquant.ops.lookup import evaluate_function, has_float64, is_table, table_constants, table_integers
from jquant.plan.scales import value_scales
from jquant.types import Array, LoweringError, Node, Plan, QConfigError, QParams, TableFormat

WORTH_A_WORD = 3.0  # LSB: one, and half a step of rounding in a line, its index, the entries and between them


class TableWarning(UserWarning):
    """A lookup table is far from its function. `calibrate` names the node, the distance and other options."""


def warn_of_tables(plan: Plan, qparams: QParams, stats: Stats) -> None:
    """Warns of every table from int16 that costs more than one LSB of its output, its own roundings left out.

    The distance is the largest one over all integers within the range of the data at which the output does not
    saturate. An observer that keeps no range leaves its table out.
    """
    nodes = [node for node in plan.graph.nodes if _is_wide_table(plan, node)]
    scales: Mapping[str, Array | None] = value_scales(plan, to_host(qparams)) if nodes else {}
    for node in nodes:
        x_scale, y_scale = scales[node.inputs[0]], scales[node.name]
        if x_scale is None or y_scale is None:
            continue
        y_dtype = plan.spec(node.name).dtype
        seen = seen_range(stats.get(node.inputs[0]))
        if seen is None:
            continue
        scaled = plan.target.tables, x_scale, y_scale, y_dtype, seen
        own = _distance(node.op, *scaled)
        if own <= WORTH_A_WORD:
            continue
        warnings.warn(
            f"the table of {node.name!r} ({type(node.op).__name__}) is up to {own:.1f} LSB off its function on the "
            f"calibrated range; {_advice(node.op, own, *scaled)}",
            TableWarning,
            stacklevel=3,
        )


def _is_wide_table(plan: Plan, node: Node) -> bool:
    source, spec = (plan.values.get(name) for name in (node.inputs[0] if node.inputs else "", node.name))
    known = source is not None and spec is not None and source.dtype == "int16" and spec.dtype in ("int8", "int16")
    return known and is_table(node.op) and has_float64(node.op) and getattr(node.op, "single_period", None) is None


def seen_range(state: Any) -> tuple[float, float] | None:
    """The smallest and the largest value that an observer saw."""
    state = getattr(state, "range", state)
    if not isinstance(state, RangeState):
        return None
    return float(np.asarray(state.low).min()), float(np.asarray(state.high).max())


def _distance(
    op: Any, form: TableFormat, x_scale: Array, y_scale: Array, y_dtype: str, seen: tuple[float, float]
) -> float:
    x: Any = np.arange(-32768, 32768, dtype=np.int32)
    with np.errstate(all="ignore"):
        exact = evaluate_function(op, x.astype(np.float64) * np.float64(x_scale)) / np.float64(y_scale)
    most = 2.0 ** (int(y_dtype[3:]) - 1) - 1
    real = x * np.float64(x_scale)
    inside = (np.abs(exact) < most) & (real >= seen[0]) & (real <= seen[1])
    constants = table_constants(op, x_scale, "int16", y_scale, y_dtype, form)
    found = np.asarray(table_integers(x, y_dtype, form, **constants))
    return float(np.abs(found - exact)[inside].max(initial=0.0))


def _advice(
    op: Any, own: float, form: TableFormat, x_scale: Array, y_scale: Array, y_dtype: str, seen: tuple[float, float]
) -> str:
    """The first options that bring the distance to `WORTH_A_WORD`, else the best of those that halve it."""
    best, least = None, max(own / 2, WORTH_A_WORD)
    for changes in _others(op, form, seen):
        try:
            error = _distance(replace(op, table=replace(op.table, **changes)), form, x_scale, y_scale, y_dtype, seen)
        except (QConfigError, LoweringError):  # a range outside of the domain
            continue
        if error <= least:
            wanted = ", ".join(f"{name}={value!r}" for name, value in changes.items())
            best, least = f"table=jq.ops.TableOptions({wanted}) is up to {error:.1f} LSB off", error
        if best and least <= WORTH_A_WORD:
            break
    return (
        best or "no other table helps: narrow the range of its operand (a clamp, another observer), or keep it float16"
    )


def _others(op: Any, form: TableFormat, seen: tuple[float, float]) -> Iterator[dict[str, Any]]:
    """Options to propose, the cheapest first: the march's own number of tables, four and sixteen times as many."""
    low, high = (float(f"{value:.3g}") for value in seen)
    now = op.table.count(form)
    for count in sorted({now, 4 * form.count, 16 * form.count}):
        if not now <= count <= form.max_count:
            continue
        yield {"num_tables": count, "placement": "least_error"}
        if low < high:
            yield {"num_tables": count, "placement": "least_error", "input_range": (low, high)}
