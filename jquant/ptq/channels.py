"""Which axis of a weight is which channel: views of the weights of convolutions and linear layers."""

from collections.abc import Iterator

import jax.numpy as jnp

from jquant.ops.conv import Conv, ConvTranspose, Linear
from jquant.types import Array, Graph, Node

Layer = Conv | ConvTranspose | Linear


def layers(graph: Graph) -> Iterator[tuple[Node, Layer]]:
    for node in graph.nodes:
        if isinstance(node.op, Conv | ConvTranspose | Linear):
            yield node, node.op


def groups_of(op: Layer) -> int:
    return 1 if isinstance(op, Linear) else op.groups


def channel_axis(op: Layer, rank: int) -> int:
    """The axis of channels in the values that a layer reads and makes."""
    return rank - 1 if isinstance(op, Linear) or op.channels_last else 1


def rows(op: Layer, weight: Array) -> Array:
    """A weight as [groups, out / groups, K], K = in / groups * kernel: one row makes one output channel."""
    groups = groups_of(op)
    if isinstance(op, ConvTranspose):  # [in, out / groups, *K]
        split = weight.reshape(groups, -1, *weight.shape[1:])
        return jnp.moveaxis(split, 2, 1).reshape(groups, weight.shape[1], -1)
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def from_rows(op: Layer, flat: Array, shape: tuple[int, ...]) -> Array:
    """The weight of that shape which has these rows."""
    if not isinstance(op, ConvTranspose):
        return flat.reshape(shape)
    split = flat.reshape(op.groups, shape[1], shape[0] // op.groups, *shape[2:])
    return jnp.moveaxis(split, 1, 2).reshape(shape)


def output_ranges(op: Layer, weight: Array) -> Array:
    """max |weight| of every output channel, [out]."""
    return jnp.abs(rows(op, weight)).max(-1).reshape(-1)


def input_ranges(op: Layer, weight: Array) -> Array:
    """max |weight| of every input channel, [in]."""
    by_input = _by_input(op, weight)
    return jnp.abs(by_input).max(tuple(i for i in range(by_input.ndim) if i not in (0, 2))).reshape(-1)


def scale_inputs(op: Layer, weight: Array, multiplier: Array) -> Array:
    """The weight with what reads input channel c multiplied by multiplier[c]."""
    by_input = _by_input(op, weight)
    shape = [by_input.shape[i] if i in (0, 2) else 1 for i in range(by_input.ndim)]
    return (by_input * multiplier.reshape(shape)).reshape(weight.shape)


def _by_input(op: Layer, weight: Array) -> Array:
    """A view with the input channels on axes 0 and 2: [groups, out / groups, in / groups, ...] or [in, 1, 1, ...]."""
    if isinstance(op, ConvTranspose):
        return weight.reshape(weight.shape[0], 1, 1, -1)
    groups = groups_of(op)
    return weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
