"""Masks that only the data show: numbers such as -1e9 in an input that is added to the scores of a softmax."""

from jquant.calibration.observe import Stats
from jquant.calibration.tables import seen_range
from jquant.ops.elementwise import Add, Clamp, Sub
from jquant.ops.reduce import ReduceMax
from jquant.plan.masks import MOVES, VERY_NEGATIVE
from jquant.types import CalibrationError, Node, Plan


def check_added_masks(plan: Plan, stats: Stats) -> None:
    """Raises CalibrationError for an input that is added in front of a softmax and holds a very negative number.

    `prepare` makes a mask an operand of the softmax where the graph shows it; of an input only the data do. Its numbers
    would take the whole range of the scores.
    """
    inputs = {entry.name for entry in plan.graph.inputs}
    for node in plan.graph.nodes:
        if not isinstance(node.op, Add) or not _is_softmax_operand(plan, node):
            continue
        for operand in node.inputs:
            source = _source(plan, operand)
            seen = seen_range(stats.get(source)) if source in inputs else None
            if seen is not None and seen[0] <= VERY_NEGATIVE:
                raise CalibrationError(
                    f"input {source!r} holds {seen[0]:g} and is added in front of a softmax, by {node.name!r}: a mask, "
                    "which would leave the scores no range. Pass it as bool: scores.masked_fill(mask, float('-inf')), "
                    "or attn_mask=mask of bool; or keep these nodes float with a rule of value None"
                )


def _is_softmax_operand(plan: Plan, node: Node) -> bool:
    """Whether a softmax reads the node: its integers take a maximum, and the distance from it."""
    kinds = {type(reader.op) for reader in plan.graph.consumers[node.name]}
    return {ReduceMax, Sub} <= kinds


def _source(plan: Plan, name: str) -> str:
    """The value that another one has by moving, repeating or cutting elements."""
    node = plan.graph.by_name.get(name)
    while node is not None and (type(node.op).__name__ in MOVES or isinstance(node.op, Clamp)):
        name = node.inputs[0]
        node = plan.graph.by_name.get(name)
    return name
