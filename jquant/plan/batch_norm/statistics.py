"""Training with the statistics of the batch: the rule at a node whose batch norm is live."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp

from jquant.graph.operator import eval_float
from jquant.ops.batch_norm import KeptBatchNorm, batch_moments, normalize
from jquant.ops.conv import activate
from jquant.plan.batch_norm.fold import Layer, affine_of, kept_batch_norm, orientation
from jquant.plan.fold import scale_outputs
from jquant.plan.scales import expand_weight, quantizer_of
from jquant.types import Array, GraphError, Node, Params, Plan, QParams

SMALLEST = (
    2.0**-20
)  # a multiplier that scaling is undone by is never nearer to 0: a pruned channel must not divide by 0


def statistics_rule(
    plan: Plan,
    params: Params,
    qparams: QParams | None,
    rule: Callable[..., Array],
    new_stats: dict[str, Array],
    on: Mapping[str, Array] | None = None,
) -> Callable[..., Array]:
    """`rule`, and at nodes that keep a batch norm the layer with the statistics of the batch.

    Args:
      plan: one whose kept batch norms are all live.
      params: with the running statistics.
      qparams: None for weights in float.
      rule: for all other nodes.
      new_stats: gets the moved running statistics while the rule is evaluated; a norm that is used twice moves twice.
      on: {weight: bool scalar}, False leaves a weight in float; None quantizes all.

    References:
      Krishnamoorthi 2018, Quantizing deep convolutional networks for efficient inference, section 3.2.2 (the correction
      of folded weights); Ioffe and Szegedy 2015, Batch Normalization.
    """

    def with_statistics(node: Node, *operands: Array) -> Array:
        norm = kept_batch_norm(node)
        if norm is None:
            return rule(node, *operands)
        y, addend = _layer(node, plan, params, qparams, on, *operands)
        mean, variance = batch_moments(y)
        _move(node, norm, params, new_stats, mean, variance, y.size // y.shape[-1])
        y = normalize(norm, y, mean, variance, {role: params[key] for role, key in node.params.items()})
        assert isinstance(node.op, Layer)
        y = activate(y if addend is None else y + addend, node.op.activation)
        return y if _is_last(node) else jnp.moveaxis(y, -1, 1)

    return with_statistics


def _layer(
    node: Node,
    plan: Plan,
    params: Params,
    qparams: QParams | None,
    on: Mapping[str, Array] | None,
    x: Array,
    addend: Array | None = None,
) -> tuple[Array, Array | None]:
    """What the batch norm of a node reads, [N, ..., O], its weight on the integer grid; and the addend alike."""
    assert isinstance(node.op, Layer)
    key = node.params["weight"]
    weight, undo = params[key], None
    if qparams is not None and key in plan.weights:
        weight, undo = _quantized(node, plan, params, qparams)
        if on is not None:  # the scaling is undone behind the layer
            plain = params[key] if undo is None else scale_outputs(node.op, params[key], undo)
            weight = jnp.where(on[key], weight, plain)
    bare = replace(node.op, batch_norm=None, addend=False, activation="none")
    y = eval_float(bare, x, weight=weight)
    if not _is_last(node):
        y, addend = jnp.moveaxis(y, 1, -1), None if addend is None else jnp.moveaxis(addend, 1, -1)
    y = y if undo is None else y / undo
    return (y + params[node.params["bias"]] if "bias" in node.params else y), addend


def _quantized(node: Node, plan: Plan, params: Params, qparams: QParams) -> tuple[Array, Array | None]:
    """The fake-quantized weight, and what the layer's result is to be divided by."""
    norm, key = kept_batch_norm(node), node.params["weight"]
    assert norm is not None
    spec, weight = plan.weights[key], params[key]
    parameter = expand_weight(key, plan, qparams, weight.ndim)
    quantizer = quantizer_of(spec)
    if norm.scaled:
        by = affine_of(node, params)[0]
        undo = jnp.where(jnp.abs(by) < SMALLEST, jnp.where(by < 0, -SMALLEST, SMALLEST), by)
        return quantizer(scale_outputs(node.op, weight, by), parameter, spec), undo
    sign = orientation(node, params)
    if sign is None:
        return quantizer(weight, parameter, spec), None
    turned = quantizer(scale_outputs(node.op, weight, sign), parameter, spec)
    return scale_outputs(node.op, turned, sign), None


def _is_last(node: Node) -> bool:
    return getattr(node.op, "channels_last", True)


def _move(
    node: Node,
    norm: KeptBatchNorm,
    params: Params,
    new_stats: dict[str, Array],
    mean: Array,
    variance: Array,
    count: int,
) -> None:
    """Moves the running statistics towards those of the batch, of which `variance` is biased."""
    if count < 2:
        raise GraphError("the statistics of one value: batch norm in training needs a larger batch, or mode 'frozen'")
    variance = variance * (count / (count - 1)) if norm.unbiased else variance
    for role, found in (("norm_mean", mean), ("norm_var", variance)):
        key = node.params[role]
        old = new_stats.get(key, params[key])
        new_stats[key] = jax.lax.stop_gradient(old + norm.momentum * (found - old))
