"""Batch norm unfolded again: the weights of a folded layer as weights and parameters of batch norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jquant.ops.batch_norm import BatchNorm
from jquant.plan.fold import eval_batch_norm, scale_outputs
from jquant.ptq.channels import rows
from jquant.types import Array, ConversionError, Node, Op, Params

_SMALLEST = 2.0**-60  # of a multiplier that a weight is divided by; what is smaller counts as zero


@dataclass(frozen=True)
class Folded:
    """A layer and what was folded into it, in order.

    `before`, `after`: its folded weight and bias, as `prepare` made them, and as they are now.
    """

    layer: Node
    norms: Sequence[Node]
    before: tuple[Array, Array]
    after: tuple[Array, Array]


def unfold(folded: Folded, original: Params) -> dict[str, np.ndarray]:
    """The parameters of a layer and its batch norms that fold to what the layer has now.

    Statistics and gamma keep their values: the weight is divided by gamma / sqrt(var + eps), and beta takes up the
    bias. Channels that nothing changed get back what they had, bit for bit. Where gamma is 0 (or so small that the
    quotient would overflow), any weight folds to 0; if the folded weight of such a channel is no longer 0, gamma
    becomes sqrt(var + eps), so that the norm multiplies by 1, and the weight is taken as it is.

    Returns {key: float32 array} for what the layer and its norms read.
    """
    layer, norms = folded.layer, folded.norms
    values = {
        (node.name, role): np.asarray(original[key], np.float64)
        for node in (layer, *norms)
        for role, key in node.params.items()
    }
    multipliers = [np.asarray(eval_batch_norm(n, original)[0], np.float64) for n in norms]
    old_weight, new_weight = (np.asarray(rows(layer.op, w)) for w in (folded.before[0], folded.after[0]))  # type: ignore[arg-type]
    weight_moved = (old_weight != new_weight).any(-1).reshape(-1)
    bias_moved = np.asarray(folded.before[1]) != np.asarray(folded.after[1])
    total = np.prod(multipliers, axis=0)
    takes_bias = "bias" in norms[-1].params
    lost = (np.abs(total) < _SMALLEST) & (weight_moved | (bias_moved & (not takes_bias)))
    if lost.any():
        _make_identity(norms, multipliers, lost, values)
        total = np.prod(multipliers, axis=0)
    moved = weight_moved | lost
    divisor = np.where(moved, total, 1.0)
    divided = _scaled(layer.op, np.asarray(folded.after[0], np.float64), 1.0 / divisor)
    keep = _scaled(layer.op, np.ones_like(divided), np.where(moved, 0.0, 1.0)) == 1.0
    values[layer.name, "weight"] = np.where(keep, values[layer.name, "weight"], divided)
    _take_bias(folded, multipliers, total, bias_moved | lost, values)
    keys = {(node.name, role): key for node in (layer, *norms) for role, key in node.params.items()}
    return {keys[at]: value.astype(np.float32) for at, value in values.items() if at in keys}


def _scaled(op: Op, weight: Any, multiplier: Any) -> np.ndarray:
    """`scale_outputs` in float64, which jax does not have here."""
    return scale_outputs(op, weight, multiplier)  # type: ignore[return-value]


def _make_identity(norms: Sequence[Node], multipliers: list[np.ndarray], lost: np.ndarray, values: Any) -> None:
    """The norms of these channels multiply by 1."""
    for i, norm in enumerate(norms):
        assert isinstance(norm.op, BatchNorm)
        deviation = np.sqrt(values[norm.name, "running_var"] + norm.op.epsilon)
        if "weight" not in norm.params:
            raise ConversionError(f"batch norm {norm.name!r} has a variance beyond float32 and no gamma to change")
        values[norm.name, "weight"] = np.where(lost, deviation, values[norm.name, "weight"])
        multipliers[i] = np.where(lost, 1.0, multipliers[i])


def _take_bias(
    folded: Folded, multipliers: Sequence[np.ndarray], total: np.ndarray, moved: np.ndarray, values: Any
) -> None:
    """What is left of the bias goes to the last beta; without one to the bias of the layer, or else to a mean."""
    layer, last = folded.layer, folded.norms[-1]
    bias = values.get((layer.name, "bias"), 0.0)
    for norm, multiplier in zip(folded.norms, multipliers, strict=True):
        bias = (bias - values[norm.name, "running_mean"]) * multiplier + values.get((norm.name, "bias"), 0.0)
    rest = np.where(moved, np.asarray(folded.after[1], np.float64) - bias, 0.0)
    if (last.name, "bias") in values:
        values[last.name, "bias"] = values[last.name, "bias"] + rest
    elif (layer.name, "bias") in values:
        values[layer.name, "bias"] = values[layer.name, "bias"] + rest / np.where(moved, total, 1.0)
    else:
        share = rest / np.where(moved, multipliers[-1], 1.0)
        values[last.name, "running_mean"] = values[last.name, "running_mean"] - share


def unfold_alone(norm: Node, multiplier: Array, offset: Array, original: Mapping[str, Array]) -> dict[str, np.ndarray]:
    """The parameters of a batch norm that became a layer of its own: gamma and beta take up what changed."""
    assert isinstance(norm.op, BatchNorm)
    before, before_offset = (np.asarray(v, np.float64) for v in eval_batch_norm(norm, original))
    values = {role: np.asarray(original[key], np.float64) for role, key in norm.params.items()}
    new, new_offset = np.asarray(multiplier, np.float64).reshape(-1), np.asarray(offset, np.float64)
    moved = (new != before) | (new_offset != before_offset)
    if not moved.any():
        return {key: np.asarray(original[key]) for key in norm.params.values()}
    if "weight" not in values or "bias" not in values:
        raise ConversionError(
            f"batch norm {norm.name!r} has no gamma and beta to hold what was trained; freeze it, or give the module "
            "affine=True"
        )
    gamma = np.where(moved, new * np.sqrt(values["running_var"] + norm.op.epsilon), values["weight"])
    beta = np.where(moved, new_offset + values["running_mean"] * new, values["bias"])
    values |= {"weight": gamma, "bias": beta}
    return {key: values[role].astype(np.float32) for role, key in norm.params.items()}
