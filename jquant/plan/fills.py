"""Numbers that enter a value: fills of padding and masks, and bounds of a clamp that lift or lower everything.

They keep the scale of the value that they enter. So calibration widens the scale until it holds them, and `prepare`
refuses what no scale can hold beside the data, or what a fixed scale does not hold. Nothing is cut in silence.
"""

from collections.abc import Set
from math import isfinite, isinf

import jax
import numpy as np

from jquant.graph.operator import derived_scale
from jquant.numerics.namespace import array_namespace, real
from jquant.ops.compare import MaskedFill, Where
from jquant.ops.elementwise import Add, Clamp, Constant
from jquant.ops.movement import Pad
from jquant.plan.masks import VERY_NEGATIVE
from jquant.plan.scales import quantizer_of, scale_of, value_scales
from jquant.types import Array, Node, Op, Params, Plan, QConfigError, QParams, QuantSpec

LARGE = -VERY_NEGATIVE  # a number of such a magnitude is a mask, or a mistake: a scale that holds it holds nothing else

# What reads a fill without passing it on where anything else is larger, or smaller.
_MAXIMA = ("MaxPool", "AdaptiveMaxPool", "ReduceMax", "ArgMax")
_MINIMA = ("ReduceMin", "ArgMin")
_MOVES = ("Reshape", "Flatten", "Permute", "Slice", "Expand", "Pad", "Requantize")


def entering_numbers(op: Op) -> tuple[float, ...]:
    """The numbers that an operator puts into its result, whatever its operand is.

    A lower bound below 0, or an upper one above it, enters only where the operand goes beyond it: a bound beyond the
    range has no effect.
    """
    if isinstance(op, MaskedFill):
        return (op.value,)
    if isinstance(op, Pad) and op.mode == "constant" and any(map(any, op.padding)):
        return (op.value,)
    if isinstance(op, Clamp):
        low = () if op.minimum is None or op.minimum <= 0 else (op.minimum,)
        return (*low, *(() if op.maximum is None or op.maximum >= 0 else (op.maximum,)))
    return ()


def check_fills(plan: Plan, params: Params, given: Set[str]) -> None:
    """Raises one QConfigError for every number of the nodes `given` that an integer value cannot hold."""
    problems = []
    for node in plan.graph.nodes:
        spec = plan.values[node.name]
        if node.name not in given or spec is None or spec.is_float or spec.is_high_precision:
            continue
        for value in entering_numbers(node.op):
            problems += _problem(plan, node, spec, value)
        if isinstance(node.op, Where | Add):
            problems += _constants(plan, params, node, spec)
    if problems:
        raise QConfigError("numbers that no integer of their values can hold:\n  " + "\n  ".join(problems))


def _problem(plan: Plan, node: Node, spec: QuantSpec, value: float) -> list[str]:
    if _is_only_compared(plan, node.name, value):
        return []
    where = f"{node.name} ({type(node.op).__name__})"
    scale, (low, high) = _fixed_scale(plan, node.name), spec.range
    if scale is not None:
        if low - 0.5 <= value / scale < high + 0.5:
            return []
        return [f"{where}: {value:g} leaves the range [{low * scale:g}, {high * scale:g}] of its fixed scale"]
    if abs(value) < LARGE:
        return []
    step = f"; steps of {abs(value) / high:.3g} would be left for everything else" if not isinf(value) else ""
    return [f"{where}: {value:g} has no place in {spec.dtype}{step}. {_REMEDY}"]


_REMEDY = (
    "If it is a mask of attention, let it be filled in or added right in front of the softmax, of which it becomes an "
    "operand; else take a number within the range of the data, or keep the node float with a rule of value None"
)


def _constants(plan: Plan, params: Params, node: Node, spec: QuantSpec) -> list[str]:
    """Constants of a choice or a sum that hold something like minus infinity."""
    found = []
    for name in node.inputs:
        maker = plan.graph.by_name.get(name)
        while maker is not None and type(maker.op).__name__ in _MOVES:
            maker = plan.graph.by_name.get(maker.inputs[0])
        if maker is None or not isinstance(maker.op, Constant) or _fixed_scale(plan, maker.name) is not None:
            continue
        if isinstance(params[maker.params["value"]], jax.core.Tracer):
            continue  # its values are known to the call of `prepare` outside jit
        array = np.asarray(params[maker.params["value"]])
        least = float(array.min()) if array.size else 0.0
        if least <= VERY_NEGATIVE:
            what = f"{node.name} ({type(node.op).__name__}): the constant {maker.name} holds {least:g}"
            found.append(f"{what}, which takes the scale away from everything else in {spec.dtype}. {_REMEDY}")
    return found


def _is_only_compared(plan: Plan, name: str, value: float) -> bool:
    """Whether maxima alone read a large negative fill, for which the smallest integer stands; or minima a positive."""
    if abs(value) < LARGE or name in plan.graph.outputs:
        return False
    wanted = _MAXIMA if value < 0 else _MINIMA
    readers = [(type(node.op).__name__, node) for node in plan.graph.consumers[name]]
    return bool(readers) and all(
        kind in wanted or (kind in _MOVES and _is_only_compared(plan, node.name, value)) for kind, node in readers
    )


def _fixed_scale(plan: Plan, name: str) -> float | None:
    """The scale of a value where it is known without data."""
    spec = plan.values.get(name)
    if spec is None or spec.is_float or spec.is_high_precision:
        return None
    if name in plan.owned:
        return None if spec.fixed_scale is None else float(scale_of(name, plan, {}))
    node = plan.graph.by_name[name]
    scales = [_fixed_scale(plan, v) for v in node.inputs if v not in plan.exact]
    known = [scale for scale in scales if scale is not None]
    if not known or len(known) < len(scales):
        return None
    return known[0] if node.op.scale_rule == "same_as_input" else float(derived_scale(node.op, *map(real, known)))


def raise_filled_scales(plan: Plan, qparams: QParams) -> dict[str, Array]:
    """Widens the scales of values that numbers enter, so that the integers hold these.

    Args:
      plan: what `prepare` returned.
      qparams: complete, {value or weight: trainable parameter}.

    Returns:
      QParams; scales that are large enough, and fixed ones, stay as they are.
    """
    found = dict(qparams)
    for node in plan.graph.nodes:
        spec = plan.values[node.name]
        if spec is None or spec.is_float or spec.is_high_precision:
            continue
        numbers = [v for v in entering_numbers(node.op) if isfinite(v) and v and abs(v) < LARGE]
        if not numbers:
            continue
        low, high = spec.range
        needed = real(max(v / high if v > 0 else v / low for v in numbers))
        _raise(plan, found, node.name, needed)
    return found


def _raise(plan: Plan, qparams: dict[str, Array], name: str, needed: Array) -> None:
    """Multiplies the scales that a value follows by what its own scale lacks of `needed`."""
    scale = value_scales(plan, qparams)[name]
    if scale is None:
        return
    for owner in _owners(plan, name):
        spec, own = plan.spec(owner), scale_of(owner, plan, qparams)
        xp = array_namespace(scale, own)
        # By the quotient, a little more than 1 where float32 would round the product below the wanted scale.
        wider = quantizer_of(spec).init(own * xp.maximum(needed / scale, real(1.0)) * real(1 + 2.0**-22), spec)
        qparams[owner] = xp.where(scale < needed, wider, qparams[owner])


def _owners(plan: Plan, name: str) -> set[str]:
    """The values with trainable scales of their own that this one follows: several where operands meet at one scale."""
    if name in plan.owned:
        return {name} & set(plan.trained)
    node = plan.graph.by_name.get(name)
    numbers = [] if node is None else [v for v in node.inputs if v not in plan.exact]
    if node is not None and node.op.scale_rule == "same_as_input":
        numbers = numbers[:1]
    return set[str]().union(*(_owners(plan, v) for v in numbers))
