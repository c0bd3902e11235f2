"""Cross-layer equalization: channels of one layer are scaled down, the next layer's inputs up, and nothing changes."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp

from jquant.graph.float import value_shapes
from jquant.graph.passes import param_uses, sole_consumer
from jquant.ops.activation import Dropout, PRelu, Relu
from jquant.ops.elementwise import Requantize
from jquant.ops.movement import Flatten, Pad, Permute
from jquant.ops.pool import AdaptiveAvgPool, AdaptiveMaxPool, AvgPool, MaxPool
from jquant.ops.reduce import Mean
from jquant.ops.table import LeakyRelu
from jquant.plan.batch_norm import check_folded
from jquant.plan.fold import scale_outputs
from jquant.plan.scales import check_model
from jquant.ptq.channels import channel_axis, input_ranges, layers, output_ranges, scale_inputs
from jquant.text import format_table
from jquant.types import Array, Model, Node, Op, Plan

SWEEPS = 50
CONVERGED = 1e-3  # of the largest change of a channel in a sweep, relative


@dataclass(frozen=True)
class Pair:
    """A layer, and the one that its channels go to; or, with `second` empty, the reason why there is none."""

    first: str
    second: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Pairs:
    """Every layer of a plan; `print` shows which can be equalized with which, and what keeps the others from it."""

    all: tuple[Pair, ...]

    @property
    def equalizable(self) -> tuple[Pair, ...]:
        return tuple(pair for pair in self.all if pair.second)

    def __str__(self) -> str:
        return format_table(("layer", "next", "reason"), [(p.first, p.second or "-", p.reason) for p in self.all])


def find_pairs(model: Model) -> Pairs:
    """Which layers can be equalized: conv or linear, then positively homogeneous operators alone, then conv or linear.

    Relu, leaky relu and prelu are homogeneous, f(s x) = s f(x) for s > 0; pools, means, zero padding and permutations
    act on each channel alone. relu6 is not: it clips at 6.
    """
    plan, shapes = model.plan, value_shapes(model.plan.graph, model.params)
    uses = param_uses(plan.graph)
    return Pairs(tuple(_pair(plan, node, shapes, uses) for node, _ in layers(plan.graph)))


def _pair(plan: Plan, node: Node, shapes: Mapping[str, tuple[int, ...]], uses: Mapping[str, int]) -> Pair:
    by_name = {n.name: op for n, op in layers(plan.graph)}
    op = by_name[node.name]

    def no(reason: str) -> Pair:
        return Pair(node.name, reason=reason)

    if op.activation == "relu6":
        return no("relu6 clips at 6: it is not homogeneous")
    if op.addend:
        return no("a fused addend would have to be rescaled with it")
    if _is_shared(node, uses) or _has_fixed_weight(plan, node):
        return no("its weight is shared, or has a fixed scale")
    value, axis = node.name, channel_axis(op, len(shapes[node.name]))
    while True:
        if (spec := plan.values[value]) is not None and spec.fixed_scale is not None:
            return no(f"{value} has a fixed scale")
        after = sole_consumer(plan.graph, value)
        if after is None:
            return no(f"{value} is a graph output, or has several readers")
        if after.name in by_name:
            reads = after.inputs[0] == value and value not in after.inputs[1:]
            if not reads or axis != channel_axis(by_name[after.name], len(shapes[value])):
                return no(f"{after.name} does not read it as its channels")
            if _is_shared(after, uses) or _has_fixed_weight(plan, after):
                return no(f"the weight of {after.name} is shared, or has a fixed scale")
            return Pair(node.name, after.name)
        through = _axis_after(after.op, axis, shapes[value])
        if through is None:
            return no(f"{after.name} ({type(after.op).__name__}) is not homogeneous in each channel alone")
        value, axis = after.name, through


def _is_shared(node: Node, uses: Mapping[str, int]) -> bool:
    return any(uses[key] > 1 for key in node.params.values())


def _has_fixed_weight(plan: Plan, node: Node) -> bool:
    spec = plan.weights.get(node.params["weight"])
    return spec is not None and spec.fixed_scale is not None


def _axis_after(op: Op, axis: int, shape: tuple[int, ...]) -> int | None:
    """Where the channels are behind an operator that is homogeneous in each; None for one that is not."""
    rank = len(shape)
    match op:
        case Relu() | LeakyRelu() | PRelu() | Dropout() | Requantize():
            return axis
        case MaxPool() | AvgPool() | AdaptiveAvgPool() | AdaptiveMaxPool():
            return axis if axis == (rank - 1 if op.channels_last else 1) else None
        case Permute():
            return op.axes.index(axis)
        case Mean():
            reduced = {a % rank for a in op.axes}
            return None if axis in reduced else axis - (0 if op.keepdims else sum(a < axis for a in reduced))
        case Pad():
            scales = op.mode != "constant" or op.value == 0
            return axis if scales and op.padding[axis] == (0, 0) else None
        case Flatten():
            start, end = op.start % rank, op.end % rank
            if start <= axis <= end:
                alone = all(shape[i] == 1 for i in range(start, end + 1) if i != axis)
                return start if alone else None
            return axis if axis < start else axis - (end - start)
    return None


def equalize(model: Model) -> Model:
    """Evens out the ranges of channels between layers; the float function stays what it is.

    For output channel i of a layer and input channel i of the next, of ranges r1 = max |W1[i]| and r2 = max |W2[:, i]|,
    W1[i] and its bias are divided by sqrt(r1 / r2), and W2[:, i] multiplied, which makes both ranges sqrt(r1 r2).
    Chains (conv, depthwise, conv) are swept until nothing moves. Values change by float rounding alone. Calibrate
    afterwards: the scales of values between the layers are others.

    Args:
      model: what `prepare` returned, batch norm folded.

    Returns:
      The model with other weights and without scales. Layers that cannot be paired keep theirs; `find_pairs` says why.

    References:
      Nagel et al. 2019, Data-Free Quantization Through Weight Equalization and Bias Correction, section 4.1.
    """
    check_folded(model.plan, "equalize")
    check_model(model, scales=False)
    plan, new = model.plan, dict(model.params)
    pairs = find_pairs(model).equalizable
    for _ in range(SWEEPS):
        moved = [_equalize(plan, new, pair) for pair in pairs]
        if not moved or max(moved) < CONVERGED:
            break
    return Model(plan, new)


def _equalize(plan: Plan, params: dict[str, Array], pair: Pair) -> float:
    """Equalizes one pair in place; returns the largest relative change of a channel."""
    by_name = {node.name: (node, op) for node, op in layers(plan.graph)}
    (first, first_op), (second, second_op) = by_name[pair.first], by_name[pair.second]
    weight, following = params[first.params["weight"]], params[second.params["weight"]]
    ranges, needed = output_ranges(first_op, weight), input_ranges(second_op, following)
    alive = (ranges > 0) & (needed > 0)  # a dead channel says nothing about its scale
    by = jnp.where(alive, jnp.sqrt(ranges / jnp.where(alive, needed, 1.0)), 1.0)
    params[first.params["weight"]] = scale_outputs(first_op, weight, 1.0 / by)
    if "bias" in first.params:
        params[first.params["bias"]] = params[first.params["bias"]] / by
    params[second.params["weight"]] = scale_inputs(second_op, following, by)
    return float(jnp.max(jnp.maximum(by, 1.0 / by)) - 1.0)
