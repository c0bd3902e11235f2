"""Passes that know operators: fold batch norm, fuse add and activation, run channels-last.

Each keeps the function that the graph computes (up to float rounding where batch norm is folded), and says in `renamed`
which node an old one went into.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import jax.numpy as jnp
from jax.lax import optimization_barrier as barrier

from jquant.ir.passes import keep_used, param_uses, rewire, scale_channels, sole_consumer, with_params
from jquant.ops.activation import Relu, Relu6
from jquant.ops.base import to_channels_last
from jquant.ops.batch_norm import BatchNorm, BatchNormMode, batch_norm_affine, keep
from jquant.ops.conv import Activation, Conv, ConvTranspose, Linear
from jquant.ops.elementwise import Add
from jquant.ops.movement import Permute
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
            nodes[node.name] = _alone(node, params, uses, shapes, mode)
            continue
        nodes[before.name] = _fold(before, node, params, uses) if mode is None else _keep(before, node, mode)
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


def _fold(before: Node, node: Node, params: dict[str, Array], uses: Mapping[str, int]) -> Node:
    multiplier, offset = eval_batch_norm(node, params)
    return fold_affine(before, params, uses, multiplier, offset)


def fold_affine(
    node: Node, params: dict[str, Array], uses: Mapping[str, int], multiplier: Array, offset: Array
) -> Node:
    """Puts y * multiplier + offset into a node's weight and bias; a parameter that others read too is copied first."""

    def key(role: str) -> str:
        old, new = node.params.get(role), f"{node.name}.{role}"
        if old is not None and uses.get(old, 1) == 1:
            return old
        return f"{node.name}.folded_{role}" if new in uses else new

    bias = barrier(params[node.params["bias"]] * multiplier) if "bias" in node.params else 0.0
    weight = scale_outputs(node.op, params[node.params["weight"]], multiplier)
    keys = {"weight": key("weight"), "bias": key("bias")}
    params[keys["weight"]], params[keys["bias"]] = weight, jnp.broadcast_to(bias + offset, multiplier.shape)
    return with_params(node, keys)


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


def _alone(
    node: Node, params: dict[str, Array], uses: Mapping[str, int], shapes: Shapes, mode: BatchNormMode | None
) -> Node:
    """A batch norm that follows no layer, as a depthwise 1x1 convolution; kept, it follows one of ones."""
    assert isinstance(node.op, BatchNorm)
    last, ones = node.op.channels_last, (1,) * (len(shapes[node.name]) - 2)
    channels = shapes[node.name][-1 if last else 1]
    op = Conv(strides=ones, padding=((0, 0),) * len(ones), dilation=ones, groups=channels, channels_last=last)
    weight = f"{node.name}.folded_weight"
    params[weight] = jnp.ones((channels, 1, *ones), jnp.float32)
    layer = with_params(node, {"weight": weight}, op)
    if mode is None:
        return _fold(layer, node, params, uses)
    return _keep(layer, node, mode, alone=True)


def fuse(
    graph: Graph, shapes: Shapes, fusible: Callable[[Node, str], bool], apart: Collection[str] = ()
) -> tuple[Graph, dict[str, str]]:
    """Fuses convolution or linear with an add of the same shape and with relu or relu6, where nobody reads between.

    `fusible(node, role)` decides by dtype, role "add" with the other operand's consumer, or "activation". Where both
    operands of an add could take it, the later one does, since the other operand must exist by then. The fused node
    keeps the name of the conv and stands at the place of the last node it took in. Nothing behind the values of `apart`
    is taken in.
    """
    renamed: dict[str, str] = {}
    nodes: dict[str, Node] = {}
    order = {node.name: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        operands = tuple(renamed.get(v, v) for v in node.inputs)
        nodes[node.name] = replace(node, inputs=operands)
        hosts = [
            (nodes[new], nodes[new].op)
            for new, old in zip(operands, node.inputs, strict=True)
            if new in nodes and old not in apart and sole_consumer(graph, old) is node
        ]
        free = [(host, op) for host, op in hosts if isinstance(op, FUSES) and op.activation == "none"]
        if isinstance(node.op, Relu | Relu6) and free and fusible(node, "activation"):
            host, op = free[0]
            activation: Activation = "relu" if isinstance(node.op, Relu) else "relu6"
            _move(nodes, host, replace(host, op=replace(op, activation=activation)), node, renamed)
        elif isinstance(node.op, Add) and free and fusible(node, "add"):
            host, op = max(free, key=lambda pair: order[pair[0].name])
            other = operands[1] if operands[0] == host.name else operands[0]
            same = all(shapes[v] == shapes[node.name] for v in node.inputs) and other != host.name
            if same and not op.addend:
                fused = replace(host, op=replace(op, addend=True), inputs=(host.inputs[0], other))
                _move(nodes, host, fused, node, renamed)
    return rewire(graph, renamed, list(nodes.values())), renamed


def _move(nodes: dict[str, Node], host: Node, fused: Node, last: Node, renamed: dict[str, str]) -> None:
    """Replaces host and last by the fused node, at the end of the order built so far."""
    del nodes[host.name], nodes[last.name]
    nodes[host.name] = fused
    renamed[last.name] = host.name
    for old, new in renamed.items():
        if new == last.name:
            renamed[old] = host.name


def channels_last(graph: Graph, shapes: Shapes) -> Graph:
    """Runs convolutions, pools and what lies between them on [N, *S, C]; outputs keep the framework's order.

    A value keeps its name in whichever layout it is made; inserted permutations are `name.to_last` and `name.to_first`.
    """
    last: set[str] = set()  # values made channels-last under their own name
    nodes: list[Node] = []
    made: set[str] = set()

    def in_order(value: str, want_last: bool) -> str:
        rank = len(shapes[value])
        if (value in last) == want_last or rank < 3:
            return value
        name = f"{value}.to_last" if want_last else f"{value}.to_first"
        if name not in made:
            axes = (0, *range(2, rank), 1) if want_last else (0, rank - 1, *range(1, rank - 1))
            nodes.append(Node(name, Permute(axes=axes), (value,)))
            made.add(name)
        return name

    for node in graph.nodes:
        rank = len(shapes[node.inputs[0]]) if node.inputs else 0
        alike = all(len(shapes[v]) == rank for v in (*node.inputs, node.name))
        follows = any(v in last for v in node.inputs)
        converted = node.op if node.op.layout == "elementwise" else to_channels_last(node.op, rank)
        if getattr(node.op, "channels_last", False):  # in the order of its framework already
            converted = None
        wanted = node.op.layout == "spatial" or (follows and (alike or node.op.layout == "axes"))
        if converted is None or not wanted:
            nodes.append(replace(node, inputs=tuple(in_order(v, False) for v in node.inputs)))
            continue
        nodes.append(replace(node, op=converted, inputs=tuple(in_order(v, True) for v in node.inputs)))
        if len(shapes[node.name]) == rank >= 3:  # below, the two orders are the same
            last.add(node.name)
    outputs = tuple(in_order(v, False) for v in graph.outputs)
    return Graph(graph.inputs, tuple(nodes), outputs)
