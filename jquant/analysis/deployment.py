"""A plan against what public documents say that the compiler takes: by node within, beyond, or unknown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from jquant.graph.float import value_types
from jquant.ops.movement import Permute
from jquant.targets.constraints import CONSTRAINTS, WHAT, Constraint, constraints_of
from jquant.text import format_table
from jquant.types import Model, Node, Plan

State = Literal["within", "beyond", "unknown"]


@dataclass(frozen=True, kw_only=True)
class OperatorSupport:
    """One node: whether what is documented of its operator holds.

    `state`   "within": all documented limits hold; "beyond": one does not, so that the compiler may refuse the node or
              put it on the CPU; "unknown": no row about the operator is known here
    `reason`  which limit, and what the node has
    `source`  the page of that limit, or of all of them
    """

    where: str
    operator: str
    state: State
    reason: str
    source: str


def operator_support(model: Model) -> list[OperatorSupport]:
    """Each node of a plan against the documented constraints of its march (`jquant.targets.constraints`).

    Args:
      model: prepared; it need not be calibrated.

    Returns:
      One entry a node, in the order of the graph. Most operators are "unknown": the public pages that could be read
      name few. A node that is "within" may still be refused for a reason that no page states.

    Example:
      for entry in jq.analysis.operator_support(model):
          print(entry.where, entry.state, entry.reason)
    """
    plan = model.plan
    types = value_types(plan.graph, model.params)
    return [_support(plan, node, model.params, types) for node in plan.graph.nodes if not _is_inserted(node)]


def _is_inserted(node: Node) -> bool:
    """A permutation that `prepare` put in: the chip's own layout, and no operator of the model."""
    return isinstance(node.op, Permute) and node.name.endswith((".to_last", ".to_first"))


def _support(plan: Plan, node: Node, params: Mapping[str, Any], types: Mapping[str, Any]) -> OperatorSupport:
    kind, march = type(node.op).__name__, plan.target.name
    rows = constraints_of(march, kind)
    everywhere = tuple(row for row in CONSTRAINTS.get(march, ()) if not row.operators)
    for row in (*rows, *everywhere):
        found = _measured(row, plan, node, params, types)
        if not _holds(row, found):
            shown = " and ".join(sorted(found)) if isinstance(found, set) else str(found)
            reason = f"{WHAT[row.quantity]}: {shown}, documented is {row.limit}"
            return OperatorSupport(
                where=node.name, operator=kind, state="beyond", reason=reason, source=row.page.source
            )
    if not rows:
        return OperatorSupport(
            where=node.name, operator=kind, state="unknown", reason="no public row is known", source=""
        )
    limits = "; ".join(f"{WHAT[row.quantity]} {row.limit}" for row in rows)
    sources = ", ".join(dict.fromkeys(row.page.source for row in rows))
    return OperatorSupport(where=node.name, operator=kind, state="within", reason=limits, source=sources)


def _holds(row: Constraint, found: set[str] | int) -> bool:
    return found <= set(row.allowed) if isinstance(found, set) else row.least <= found <= row.most


def _measured(
    row: Constraint, plan: Plan, node: Node, params: Mapping[str, Any], types: Mapping[str, Any]
) -> set[str] | int:
    """What a node has of a quantity."""
    op: Any = node.op

    def dtype(name: str) -> str:
        spec = plan.values.get(name)
        return spec.dtype if spec is not None else str(types[name].dtype)

    match row.quantity:
        case "operands":
            return {dtype(name) for name in node.inputs}
        case "result":
            return {dtype(node.name)}
        case "rank":
            return len(types[node.name].shape)
        case "kernel" | "products":
            weight = params[node.params["weight"]].shape
            transposed = type(op).__name__ == "ConvTranspose"
            kernel, channels = weight[2:], weight[0] // op.groups if transposed else weight[1]
            return max(kernel) if row.quantity == "kernel" else channels * prod(kernel)
        case "reduced":
            return prod(types[node.inputs[0]].shape[axis] for axis in op.axes)
        case "searched":
            return int(types[node.inputs[0]].shape[op.axis])


def support_table(entries: Iterable[OperatorSupport]) -> str:
    """What is beyond a documented limit, node by node; then how many nodes of each operator are unknown and within."""
    found = list(entries)
    lines = []
    beyond = [(e.where, e.operator, e.reason, e.source) for e in found if e.state == "beyond"]
    if beyond:
        lines.append(format_table(("where", "operator", "beyond what is documented", "source"), beyond))
    for state, text in (("unknown", "no public row is known for"), ("within", "within what is documented")):
        counts: dict[str, int] = {}
        for entry in found:
            if entry.state == state:
                counts[entry.operator] = counts.get(entry.operator, 0) + 1
        if counts:
            lines.append(f"{text}: " + ", ".join(f"{kind} ({count})" for kind, count in sorted(counts.items())))
    return "\n".join(lines)
