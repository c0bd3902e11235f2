"""What a qconfig asks for, beside what a plan gives: one row for every value and weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from jquant.ops.elementwise import Requantize
from jquant.plan.formats import show
from jquant.types import Resolution

if TYPE_CHECKING:
    from jquant.plan.prepare import Preparation


def resolutions(made: Preparation) -> list[Resolution]:
    """Requested against applied, with the reason of each difference."""
    position = {name: i for i, name in enumerate(made.policies)}
    makers: dict[str, str] = {}  # {value: the last of the nodes that were fused into it}
    for old, new in made.renamed.items():
        makers[new] = max(makers.get(new, old), old, key=position.__getitem__)
    rows = []
    for name in made.policies:
        final = made.renamed.get(name, name)
        maker = makers.get(final, final)
        rows.append(_of_value(made, name, final) if name == maker else _of_fused(made, name, final, maker))
    weights = [
        (made.policies[node.name].weight, node.params[r]) for node in made.graph.nodes for r in node.op.weight_roles
    ]
    return rows + [Resolution(key, "weight", show(asked), show(made.weights.get(key)), "") for asked, key in weights]


def _of_value(made: Preparation, name: str, final: str) -> Resolution:
    assert made.formats is not None
    requested, rule = show(made.policies[name].output), made.rules.get(final, name)
    other = "" if rule == name else rule
    if final in made.exact:
        applied, reason = f"{made.exact[final]} (exact)", "no number on a grid: never quantized"
    else:
        applied = show(made.formats.values[final])
        fused = f"asked for at {rule}, which is fused with it" if other else ""
        reason = _reason(made, final) or fused if applied != requested else ""
        reason = reason or _reason(made, name)
    node = made.graph.by_name.get(final)
    port: Literal["input", "output"] = "input" if node is not None and isinstance(node.op, Requantize) else "output"
    return Resolution(name, port, requested, applied, reason, other)


def _of_fused(made: Preparation, name: str, final: str, maker: str) -> Resolution:
    reason = _inside(name, maker, made.rules.get(final, name), _reason(made, final))
    return Resolution(name, "output", show(made.policies[name].output), "-", reason)


def _reason(made: Preparation, name: str) -> str:
    assert made.formats is not None
    return made.notes.get(name) or made.formats.reasons.get(name, "")


def _inside(name: str, maker: str, rule: str, reason: str) -> str:
    """Why a node of a fused group has no value of its own, and whose format that of the group is."""
    made = f"fused: the value is made by {maker}"
    if rule != name:
        return made if rule == maker else f"{made}, in the format of {rule}"
    return f"{made}: {reason}" if reason else f"{made}, which takes this format"
