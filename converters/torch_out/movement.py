"""Operators that move elements, as calls of torch."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

import jquant.ops as ops

from .base import Site, pad_spatial, torch_rule


@torch_rule.register
def _(op: ops.Cat, site: Site, *operands: Any) -> Any:
    return torch.cat(list(operands), op.axis)


@torch_rule.register
def _(op: ops.Stack, site: Site, *operands: Any) -> Any:
    return torch.stack(list(operands), op.axis)


@torch_rule.register
def _(op: ops.Reshape, site: Site, x: Any) -> Any:
    return x.reshape(list(op.shape))


@torch_rule.register
def _(op: ops.Flatten, site: Site, x: Any) -> Any:
    return torch.flatten(x, op.start, op.end)


@torch_rule.register
def _(op: ops.Permute, site: Site, x: Any) -> Any:
    return x.permute(list(op.axes))


@torch_rule.register
def _(op: ops.Expand, site: Site, x: Any, like: Any = None) -> Any:
    sizes: list[Any] = list(op.shape)
    missing = len(sizes) - len(site.shapes[0])
    sizes[:missing] = [1 if n == -1 else n for n in sizes[:missing]]
    if like is not None:
        sizes[0] = like.size(0)
    return x.expand(sizes)


@torch_rule.register
def _(op: ops.Tile, site: Site, x: Any) -> Any:
    return x.repeat(list(op.repeats))


@torch_rule.register
def _(op: ops.Roll, site: Site, x: Any) -> Any:
    return torch.roll(x, list(op.shifts), list(op.axes))


@torch_rule.register
def _(op: ops.Flip, site: Site, x: Any) -> Any:
    return x.flip(list(op.axes))


@torch_rule.register
def _(op: ops.SwapChannels, site: Site, x: Any) -> Any:
    return x.flip([op.axis])


@torch_rule.register
def _(op: ops.Pad, site: Site, x: Any) -> Any:
    if op.mode == "constant":
        return pad_spatial(x, op.padding, op.value)
    for axis, (low, high) in enumerate(op.padding):
        if low or high:
            x = _mirrored(site, x, axis, len(op.padding), low, high, "replicate" if op.mode == "border" else "reflect")
    return x


def _mirrored(site: Site, x: Any, axis: int, rank: int, low: int, high: int, mode: str) -> Any:
    """One axis at a time, as the last one of three: torch pads the last axes of a few ranks only."""
    if site.dtypes[0] != "float32":  # which torch pads with a value alone
        n = site.shapes[0][axis]
        beyond = [abs(i) if i < n else 2 * (n - 1) - i for i in range(-low, n + high)]
        places = beyond if mode == "reflect" else [min(max(i, 0), n - 1) for i in range(-low, n + high)]
        return x.index_select(axis, site.constant(torch.tensor(places)))
    last = x.transpose(axis, rank - 1)
    flat = last.flatten(0, rank - 2).unsqueeze(0) if rank > 1 else last.unsqueeze(0).unsqueeze(0)
    padded = F.pad(flat, [low, high], mode)
    back = padded.squeeze(0).unflatten(0, [last.size(i) for i in range(rank - 1)]) if rank > 1 else padded[0, 0]
    return back.transpose(axis, rank - 1)


@torch_rule.register
def _(op: ops.Slice, site: Site, x: Any) -> Any:
    bounds = zip(op.starts, op.stops, op.steps, strict=True)
    index = tuple(slice(None) if b == (0, None, 1) else slice(*b) for b in bounds)
    return x if all(i == slice(None) for i in index) else x[index]


@torch_rule.register
def _(op: ops.IndexSelect, site: Site, x: Any, index: Any = None) -> Any:
    size = site.shapes[0][op.axis]
    if op.indices is not None:
        index = site.constant(torch.tensor([i % size for i in op.indices], dtype=torch.int64))
    else:
        index = index.long().clamp(0, size - 1)
    return torch.index_select(x, op.axis, index)


@torch_rule.register
def _(op: ops.Gather, site: Site, x: Any, index: Any) -> Any:
    return torch.gather(x, op.axis, index.long().clamp(0, site.shapes[0][op.axis] - 1))


@torch_rule.register
def _(op: ops.SliceScatter, site: Site, x: Any, source: Any) -> Any:
    """As a choice between x and the source, which is spread over the slice."""
    for axis, (start, stop, step) in enumerate(zip(op.starts, op.stops, op.steps, strict=True)):
        if (start, stop, step) != (0, None, 1):
            inner = site.shapes[0][axis]
            return _scatter_axis(op, site, x, source, axis, slice(start, stop, step).indices(inner))
    return source


def _scatter_axis(op: ops.SliceScatter, site: Site, x: Any, source: Any, axis: int, at: tuple[int, int, int]) -> Any:
    rest = list(zip(op.starts, op.stops, op.steps, strict=True))
    rest[: axis + 1] = [(0, None, 1)] * (axis + 1)
    if any(b != (0, None, 1) for b in rest):
        starts, stops, steps = (tuple(v) for v in zip(*rest, strict=True))
        part = x[tuple([slice(None)] * axis + [slice(*at)])]
        inner = ops.SliceScatter(starts=starts, stops=stops, steps=steps)
        shape = list(site.shapes[0])
        shape[axis] = len(range(*at))
        source = torch_rule(inner, replace(site, shapes=[tuple(shape), site.shapes[1]]), part, source)
    return torch.slice_scatter(x, source, axis, at[0], at[1], at[2])


@torch_rule.register
def _(op: ops.Scatter, site: Site, x: Any, index: Any, source: Any) -> Any:
    index = index.long().clamp(0, site.shapes[0][op.axis] - 1).expand_as(source)
    if op.reduce == "none":
        return torch.scatter(x, op.axis, index, source)
    reduce = {"add": "sum", "max": "amax", "min": "amin"}[op.reduce]
    return torch.scatter_reduce(x, op.axis, index, source, reduce)


@torch_rule.register
def _(op: ops.PixelShuffle, site: Site, x: Any) -> Any:
    return F.pixel_shuffle(x, op.factor)


@torch_rule.register
def _(op: ops.PixelUnshuffle, site: Site, x: Any) -> Any:
    return F.pixel_unshuffle(x, op.factor)


@torch_rule.register
def _(op: ops.ChannelShuffle, site: Site, x: Any) -> Any:
    return F.channel_shuffle(x, op.groups)
