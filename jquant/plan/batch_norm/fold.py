"""What is trained of a kept batch norm, and how it is folded."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import numpy as np

from jquant.graph.passes import keep_used, param_uses, with_params
from jquant.numerics.namespace import array_namespace, barrier, constant, to_device, to_host
from jquant.numerics.rounding import dequantize, expand, quantize
from jquant.ops.batch_norm import STATISTICS, KeptBatchNorm, batch_norm_affine
from jquant.ops.conv import Conv, ConvTranspose, Linear
from jquant.plan.accumulators import raise_folded_scales
from jquant.plan.fold import Shared, fold_affine, scale_outputs
from jquant.plan.scales import check_model, quantizer_of, scale_of
from jquant.quantizers.surrogate import straight_through
from jquant.types import Array, FrozenMap, JQuantError, Model, Node, Params, Plan, QParams, QuantSpec

Layer = Conv | ConvTranspose | Linear


def kept_batch_norm(node: Node) -> KeptBatchNorm | None:
    """The batch norm that a node keeps."""
    return node.op.batch_norm if isinstance(node.op, Layer) else None


def kept_nodes(plan: Plan) -> tuple[Node, ...]:
    """The nodes of a plan that keep a batch norm."""
    return tuple(node for node in plan.graph.nodes if kept_batch_norm(node) is not None)


def untrained(plan: Plan) -> tuple[str, ...]:
    """Parameters that no gradient moves: running statistics, and the ones that a batch norm without a layer follows."""
    found: dict[str, None] = {}
    for node in kept_nodes(plan):
        kept = kept_batch_norm(node)
        assert kept is not None
        found |= dict.fromkeys(node.params[role] for role in STATISTICS)
        found |= {node.params["weight"]: None} if kept.alone else {}
    return tuple(found)


def norm_params(plan: Plan) -> tuple[str, ...]:
    """The weights and biases of kept batch norms."""
    roles = ("norm_weight", "norm_bias")
    return tuple(dict.fromkeys(n.params[r] for n in kept_nodes(plan) for r in roles if r in n.params))


def split_batch_stats(model: Model) -> tuple[Model, dict[str, Array]]:
    """A model as (what is trained, batch_stats): the second holds the running statistics of kept batch norms.

    Example:
      trained, batch_stats = jq.training.split_batch_stats(model)
      y, batch_stats = jq.apply_train(trained, x, batch_stats=batch_stats)
    """
    params, apart = model.params, untrained(model.plan)
    trained = {key: value for key, value in params.items() if key not in set(apart)}
    return model.replace(params=trained), {key: params[key] for key in apart}


def check_folded(plan: Plan, what: str) -> None:
    """Raises JQuantError where `what` needs a plan without kept batch norm."""
    if kept := kept_nodes(plan):
        raise JQuantError(
            f"{what} works on folded weights, and node {kept[0].name!r} keeps its batch norm; call "
            "jq.training.fold_batch_norm first, or prepare with batch_norm='fold'"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Weights as they are quantized


def affine_of(node: Node, params: Params) -> tuple[Array, Array]:
    """Multiplier and offset [O] that the running statistics of a kept batch norm amount to."""
    kept = kept_batch_norm(node)
    assert kept is not None
    mean, variance = (constant(params[node.params[role]]) for role in STATISTICS)
    weight, bias = (params.get(node.params.get(role, "")) for role in ("norm_weight", "norm_bias"))
    return batch_norm_affine(kept, mean, variance, weight, bias)


def weights_to_quantize(plan: Plan, params: Params) -> dict[str, Array]:
    """{key: what its spec quantizes}: the weight, scaled by its batch norm for "reverse_fold", else with its sign."""
    found = {key: params[key] for key in plan.weights}
    for node in kept_nodes(plan):
        kept, key = kept_batch_norm(node), node.params["weight"]
        if kept is not None and key in found:
            factor = affine_of(node, params)[0] if kept.scaled else orientation(node, params)
            found[key] = params[key] if factor is None else scale_outputs(node.op, params[key], factor)
    return found


def raise_collapsed_scales(model: Model) -> Model:
    """Raises the weight scales of channels so near zero that the accumulator of their layer cannot hold what is added.

    `calibrate` does it, and training may undo it: a channel that it switches off takes its scale along, and `lower`
    refuses a scale of which the fused addend is more than 32767 times as much. What is lost of such weights is below a
    step of what is added. Weights whose scale folding changes (batch norm "live" or "frozen") are raised there.

    Args:
      model: calibrated or trained.

    Returns:
      The model with new scales; those that are large enough, fixed, or of values stay as they are.

    Example:
      program = jq.lower(jq.training.raise_collapsed_scales(state.model))
    """
    return model.replace(qparams=to_device(raise_collapsed(model.plan, to_host(model.params), to_host(model.qparams))))


def raise_collapsed(plan: Plan, params: Params, qparams: QParams) -> dict[str, Array]:
    """The scales of `raise_collapsed_scales`."""
    folded = fold_kept(Model(plan, params, qparams))
    raised = raise_folded_scales(folded.plan, folded.params, folded.qparams)
    rescaled = weights_that_folding_rescales(plan)
    return {key: v if key in rescaled else raised.get(key, v) for key, v in qparams.items()}


def _rescales(node: Node) -> bool:
    kept = kept_batch_norm(node)
    return kept is not None and not kept.scaled


def weights_that_folding_rescales(plan: Plan) -> set[str]:
    """The weights whose scale is that before their batch norm."""
    return {node.params["weight"] for node in plan.graph.nodes if _rescales(node)}


def orientation(node: Node, params: Params) -> Array | None:
    """The sign [O] of the batch norm's weight, 1 at 0; None where it has none.

    Folding turns the weight of a channel over where it is negative. The weight is quantized turned over, since an
    integer range is not symmetric.
    """
    weight = params.get(node.params.get("norm_weight", ""))
    if weight is None:
        return None
    xp = array_namespace(weight)
    return xp.where(weight < 0, xp.float32(-1), xp.float32(1))


# ---------------------------------------------------------------------------------------------------------------------
# Folding


def fold_batch_norm(model: Model, *, batch_stats: Params | None = None) -> Model:
    """Folds every kept batch norm, with its running statistics, into weight, bias and weight scale of its layer.

    The integers are those of training. For "live" and "frozen" the weight w, quantized at scale s, becomes w * m at
    s * |m|, m being the batch norm's multiplier: the same integers at a scale for each channel, whatever the spec said.
    Where float rounding would make w * m another integer, the folded weight is put on the right one. For "reverse_fold"
    the weight becomes w * m at the scale that it was quantized with. `lower` and `apply` do this by themselves.

    Args:
      model: calibrated or trained.
      batch_stats: the running statistics, where the model's params do not hold them.

    Returns:
      A model without batch norm, as `prepare(..., batch_norm="fold")` makes it.

    Example:
      folded = jq.training.fold_batch_norm(state.model)
    """
    model = model.replace(params={**model.params, **(batch_stats or {})})
    check_model(model)
    return fold_kept(model)


def fold_kept(model: Model, *, only: Literal["batch", "running"] | None = None) -> Model:
    """`fold_batch_norm` without looking at values, for use inside jit; `only` those with these statistics."""
    plan, params, qparams = model.plan, model.params, model.qparams
    new_params, new_qparams = dict(params), dict(qparams)
    shared = Shared(param_uses(plan.graph), [(node, node) for node in kept_nodes(plan)])
    specs: dict[str, QuantSpec] = {}
    nodes = []
    for node in plan.graph.nodes:
        kept = kept_batch_norm(node)
        if kept is None or (only is not None and kept.statistics != only):
            nodes.append(node)
            continue
        multiplier, offset = affine_of(node, params)
        plain = {role: key for role, key in node.params.items() if role in ("weight", "bias")}
        bare = replace(node, op=replace(node.op, batch_norm=None), params=FrozenMap(plain))  # type: ignore[call-arg]
        made = dict(params)
        keys, is_made = shared.keys(node, node)
        if is_made:
            nodes.append(with_params(bare, keys))
            continue
        folded = fold_affine(bare, made, keys, multiplier, offset)
        old, new = node.params["weight"], folded.params["weight"]
        if (spec := plan.weights.get(old)) is not None and not spec.is_float:
            made[new], parameter, specs[new] = _fold_spec(node, kept, plan, params, qparams, made[new])
            new_qparams |= {} if parameter is None else {new: parameter}
        new_params |= {key: made[key] for key in folded.params.values()}
        nodes.append(folded)
    if not specs and tuple(nodes) == plan.graph.nodes:
        return model
    changed = [(old, new) for old, new in zip(plan.graph.nodes, nodes, strict=True) if old != new]
    rescaled = {new.params["weight"] for old, new in changed if _rescales(old)}
    plan = _with_weights(replace(plan, graph=replace(plan.graph, nodes=tuple(nodes))), specs)
    new_qparams = {k: new_qparams[k] for k in plan.trained if k in new_qparams}
    if rescaled & set(new_qparams):  # a norm that switches a channel off makes its scale collapse
        raised = raise_folded_scales(plan, new_params, new_qparams)
        new_qparams |= {key: raised[key] for key in rescaled & set(new_qparams)}
    return Model(plan, keep_used(plan.graph, new_params), new_qparams)


def _fold_spec(
    node: Node, kept: KeptBatchNorm, plan: Plan, params: Params, qparams: QParams, folded: Array
) -> tuple[Array, Array | None, QuantSpec]:
    """The folded weight with its quantizer parameter (None: a fixed scale) and spec."""
    key = node.params["weight"]
    spec, parameter = plan.weights[key], qparams.get(key)
    if kept.scaled:
        return folded, parameter, spec
    multiplier, _ = affine_of(node, params)
    size, xp = abs(multiplier), array_namespace(multiplier)
    scale = scale_of(key, plan, qparams)
    outputs = barrier(xp.broadcast_to(scale * size, size.shape))
    by_channel = replace(spec, axis="out", fixed_scale=None)
    quantizer = quantizer_of(by_channel)
    if parameter is not None and quantizer.has_offset:
        return folded, parameter * size, by_channel  # a scale and an offset; both grow with the weight
    parameter = quantizer.init(outputs, by_channel)
    axis, rank = node.op.weight_axis, folded.ndim
    sign = orientation(node, params)
    turned = params[key] if sign is None else scale_outputs(node.op, params[key], sign)
    wanted = quantize(turned, expand(scale, plan.weight_axis.get(key), rank), spec.dtype, spec.rounding)
    legal = expand(quantizer.scale(parameter, by_channel), axis, rank)
    same = quantize(folded, legal, spec.dtype, spec.rounding) == wanted
    exact = dequantize(wanted, expand(outputs, axis, rank))
    kept_exact = xp.where(same, folded, exact)
    return (kept_exact if xp is np else straight_through(folded, kept_exact)), parameter, by_channel


def _with_weights(plan: Plan, specs: Mapping[str, QuantSpec]) -> Plan:
    """The plan with the weight specs that its graph reads, in the order of its nodes."""
    weights, axes = {}, {}
    for node in plan.graph.nodes:
        for key in (node.params[role] for role in node.op.weight_roles):
            if (spec := specs.get(key, plan.weights.get(key))) is None:
                continue
            weights[key] = spec
            if spec.axis is not None:
                axes[key] = node.op.weight_axis
    rows = tuple(
        replace(row, applied=str(weights[row.name])) if row.port == "weight" and row.name in specs else row
        for row in plan.resolutions
    )
    return replace(plan, weights=FrozenMap(weights), weight_axis=FrozenMap(axes), resolutions=rows)
