"""Folds batch norm into convolutions and linear layers, or moves it there to be trained.

The function that the graph computes stays, up to float rounding. `renamed` says which node an old one went into.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from jquant.graph.passes import keep_used, param_uses, rewire, scale_channels, sole_consumer, with_params
from jquant.numerics.namespace import array_namespace, barrier
from jquant.ops.batch_norm import BatchNorm, BatchNormMode, batch_norm_affine, keep
from jquant.ops.conv import Conv, ConvTranspose, Linear
from jquant.types import Array, Graph, Node, Op

Shapes = Mapping[str, tuple[int, ...]]
FUSES = Conv | ConvTranspose | Linear  # what takes an add and an activation into its post-processing


def fold_batch_norm(
    graph: Graph, params: Mapping[str, Array], shapes: Shapes, kept: Mapping[str, BatchNormMode] | None = None
) -> tuple[Graph, dict[str, Array], dict[str, str]]:
    """Folds every batch norm into the convolution or linear before it; one that stands alone becomes a depthwise 1x1
    convolution. One that `kept` names goes there as it is, to be trained: `KeptBatchNorm`.

    Returns the graph, its parameters, and {batch norm: node it went into}.
    """
    params, uses, kept = dict(params), param_uses(graph), kept or {}
    folded = [n for n in graph.nodes if isinstance(n.op, BatchNorm) and n.name not in kept]
    shared = Shared(uses, [pair for n in folded if (pair := _layer_and_norm(graph, n, shapes)) is not None])
    renamed: dict[str, str] = {}
    nodes: dict[str, Node] = {}
    for node in graph.nodes:
        nodes[node.name] = node
        if not isinstance(node.op, BatchNorm):
            continue
        before = nodes.get(renamed.get(node.inputs[0], node.inputs[0]))
        mode = kept.get(node.name)
        takes = before is not None and _takes_batch_norm(before, node.op, shapes)
        if before is None or not takes or sole_consumer(graph, node.inputs[0]) is not node:
            nodes[node.name] = _alone(node, params, shared, shapes, mode)
            continue
        nodes[before.name] = _fold(before, node, params, shared) if mode is None else _keep(before, node, mode)
        renamed[node.name] = before.name
        del nodes[node.name]
    graph = rewire(graph, renamed, list(nodes.values()))
    return graph, keep_used(graph, params), renamed


def _takes_batch_norm(node: Node, norm: BatchNorm, shapes: Shapes) -> bool:
    """Whether a layer's output channels, last in a linear one, are those of the norm. One batch norm is kept."""
    if getattr(node.op, "batch_norm", None) is not None:
        return False
    if isinstance(node.op, Conv | ConvTranspose):
        return node.op.channels_last == norm.channels_last
    return isinstance(node.op, Linear) and (norm.channels_last or len(shapes[node.name]) == 2)


def eval_batch_norm(node: Node, params: Mapping[str, Array]) -> tuple[Array, Array]:
    assert isinstance(node.op, BatchNorm)
    roles = {role: params[key] for role, key in node.params.items()}
    mean, variance = roles["running_mean"], roles["running_var"]
    return batch_norm_affine(node.op, mean, variance, roles.get("weight"), roles.get("bias"))


@dataclass
class Shared:
    """Layers and batch norms that are called several times: what they fold to is made once.

    `uses` counts the readers of every parameter, `pairs` are the (layer, norm) to fold, each by its node.
    """

    uses: Mapping[str, int]
    pairs: Sequence[tuple[Node, Node]]
    made: dict[tuple[Any, ...], dict[str, str]] = field(default_factory=dict)

    def keys(self, node: Node, norm: Node) -> tuple[dict[str, str], bool]:
        """The keys of weight and bias of the folded layer, and whether they are made already.

        A parameter keeps its key if nothing else reads it. What others read is copied, under a key of no module.
        """
        kind = _pair(node, norm)
        if kind in self.made:
            return self.made[kind], True
        calls = max(1, sum(_pair(*pair) == kind for pair in self.pairs))
        found = {}
        for role in ("weight", "bias"):
            old, new = node.params.get(role), f"{node.name}.{role}"
            copied = f"{node.name}.folded_{role}"
            if old is not None:
                found[role] = old if self.uses.get(old, 1) <= calls else copied
            else:
                found[role] = copied if new in self.uses else new
        self.made[kind] = found
        return found, False


def _pair(node: Node, norm: Node) -> tuple[Any, ...]:
    """What the folded weight and bias follow from."""
    groups = node.op.groups if isinstance(node.op, ConvTranspose) else 1
    kind = norm.op.epsilon if isinstance(norm.op, BatchNorm) else getattr(norm.op, "batch_norm", None)
    layer = type(node.op), groups, node.params.get("weight"), node.params.get("bias")
    return *layer, kind, tuple(sorted(norm.params.items()))


def _layer_and_norm(graph: Graph, node: Node, shapes: Shapes) -> tuple[Node, Node] | None:
    """A batch norm with the layer before it that takes it in."""
    before = graph.by_name.get(node.inputs[0])
    assert isinstance(node.op, BatchNorm)
    takes = before is not None and _takes_batch_norm(before, node.op, shapes)
    return (before, node) if before and takes and sole_consumer(graph, before.name) is node else None


def _fold(before: Node, node: Node, params: dict[str, Array], shared: Shared) -> Node:
    keys, is_made = shared.keys(before, node)
    if is_made:
        return with_params(before, keys)
    multiplier, offset = eval_batch_norm(node, params)
    return fold_affine(before, params, keys, multiplier, offset)


def fold_affine(
    node: Node, params: dict[str, Array], keys: Mapping[str, str], multiplier: Array, offset: Array
) -> Node:
    """Puts y * multiplier + offset into a node's weight and bias, under these keys."""
    bias = barrier(params[node.params["bias"]] * multiplier) if "bias" in node.params else 0.0
    weight = scale_outputs(node.op, params[node.params["weight"]], multiplier)
    xp = array_namespace(multiplier)
    params[keys["weight"]], params[keys["bias"]] = weight, xp.broadcast_to(bias + offset, multiplier.shape)
    return with_params(node, dict(keys))


KEPT_ROLES = {"running_mean": "norm_mean", "running_var": "norm_var", "weight": "norm_weight", "bias": "norm_bias"}


def _keep(before: Node, node: Node, mode: BatchNormMode, alone: bool = False) -> Node:
    """The layer with the batch norm behind it, whose parameters keep their keys."""
    assert isinstance(node.op, BatchNorm)
    assert isinstance(before.op, FUSES)
    roles = {KEPT_ROLES[role]: key for role, key in node.params.items()}
    op = replace(before.op, batch_norm=keep(node.op, mode, alone))
    return with_params(before, {**before.params, **roles}, op)


def scale_outputs(op: Op, weight: Array, multiplier: Array) -> Array:
    """The weight of a convolution or linear layer with output channel c multiplied by multiplier[c]."""
    if not isinstance(op, ConvTranspose):
        return scale_channels(weight, multiplier)
    split = weight.reshape(op.groups, -1, *weight.shape[1:])  # [groups, C / groups, O / groups, *K]
    by_group = multiplier.reshape(op.groups, 1, -1, *(1,) * (weight.ndim - 2))
    return (split * by_group).reshape(weight.shape)


def _alone(node: Node, params: dict[str, Array], shared: Shared, shapes: Shapes, mode: BatchNormMode | None) -> Node:
    """A batch norm that follows no layer, as a depthwise 1x1 convolution; kept, it follows one of ones."""
    assert isinstance(node.op, BatchNorm)
    last, ones = node.op.channels_last, (1,) * (len(shapes[node.name]) - 2)
    channels = shapes[node.name][-1 if last else 1]
    op = Conv(strides=ones, padding=((0, 0),) * len(ones), dilation=ones, groups=channels, channels_last=last)
    weight = f"{node.name}.folded_weight"
    params[weight] = array_namespace(*params.values()).ones((channels, 1, *ones), np.float32)
    layer = with_params(node, {"weight": weight}, op)
    if mode is None:
        return _fold(layer, node, params, shared)
    return _keep(layer, node, mode, alone=True)
