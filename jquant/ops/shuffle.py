"""Channels to space and back, and channel shuffle: a reshape, a transposition and a reshape, in either layout."""

from dataclasses import dataclass, replace
from typing import ClassVar

import jax.numpy as jnp

from jquant.graph.operator import eval_float, to_channels_last
from jquant.ops.movement import only_moves
from jquant.types import Array, GraphError, Op


@dataclass(frozen=True, kw_only=True)
class PixelShuffle(Op):
    """[N, C * r * r, H, W] to [N, C, H * r, W * r] for r = `factor`: channel c * r * r + i * r + j goes to (i, j)."""

    takes_exact: ClassVar = True
    layout: ClassVar = "axes"
    scale_rule: ClassVar = "same_as_input"
    needs_stats: ClassVar = False
    moves: ClassVar = True

    factor: int
    channels_last: bool = False


@dataclass(frozen=True, kw_only=True)
class PixelUnshuffle(Op):
    """[N, C, H * r, W * r] to [N, C * r * r, H, W]: the inverse of `PixelShuffle`."""

    takes_exact: ClassVar = True
    layout: ClassVar = "axes"
    scale_rule: ClassVar = "same_as_input"
    needs_stats: ClassVar = False
    moves: ClassVar = True

    factor: int
    channels_last: bool = False


@dataclass(frozen=True, kw_only=True)
class ChannelShuffle(Op):
    """[N, C, *S]: channel i * C / groups + j becomes channel j * groups + i."""

    takes_exact: ClassVar = True
    layout: ClassVar = "axes"
    scale_rule: ClassVar = "same_as_input"
    needs_stats: ClassVar = False
    moves: ClassVar = True

    groups: int
    channels_last: bool = False


def _require_image(x: Array) -> None:
    if x.ndim != 4:
        raise GraphError(f"an image batch of 4 axes is needed, not {x.ndim}; reshape it")


@eval_float.register
def _(op: PixelShuffle, x: Array) -> Array:
    _require_image(x)
    r = op.factor
    if op.channels_last:
        n, h, w, c = x.shape
        split = x.reshape(n, h, w, c // (r * r), r, r)  # [N, H, W, C, i, j]
        return jnp.transpose(split, (0, 1, 4, 2, 5, 3)).reshape(n, h * r, w * r, c // (r * r))
    n, c, h, w = x.shape
    split = x.reshape(n, c // (r * r), r, r, h, w)  # [N, C, i, j, H, W]
    return jnp.transpose(split, (0, 1, 4, 2, 5, 3)).reshape(n, c // (r * r), h * r, w * r)


@eval_float.register
def _(op: PixelUnshuffle, x: Array) -> Array:
    _require_image(x)
    r = op.factor
    if op.channels_last:
        n, h, w, c = x.shape
        split = x.reshape(n, h // r, r, w // r, r, c)  # [N, H, i, W, j, C]
        return jnp.transpose(split, (0, 1, 3, 5, 2, 4)).reshape(n, h // r, w // r, c * r * r)
    n, c, h, w = x.shape
    split = x.reshape(n, c, h // r, r, w // r, r)  # [N, C, H, i, W, j]
    return jnp.transpose(split, (0, 1, 3, 5, 2, 4)).reshape(n, c * r * r, h // r, w // r)


@eval_float.register
def _(op: ChannelShuffle, x: Array) -> Array:
    axis = x.ndim - 1 if op.channels_last else 1
    size = x.shape[axis]
    split = x.reshape(*x.shape[:axis], op.groups, size // op.groups, *x.shape[axis + 1 :])
    return jnp.swapaxes(split, axis, axis + 1).reshape(x.shape)


only_moves(PixelShuffle, PixelUnshuffle, ChannelShuffle)


@to_channels_last.register(PixelShuffle)
@to_channels_last.register(PixelUnshuffle)
@to_channels_last.register(ChannelShuffle)
def _(op: PixelShuffle | PixelUnshuffle | ChannelShuffle, rank: int) -> Op:
    return replace(op, channels_last=True)
