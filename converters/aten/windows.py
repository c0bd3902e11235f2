"""Windows of images as columns, and their sums back: by static indices, so that elements move and round nothing."""

from __future__ import annotations

from math import prod
from typing import Any

from torch.fx import Node

import jquant.ops as ops

from .call import Call, Handler, Shape, aten, integer, integers, per_axis, require, require_batched, reshaped, shape_of
from .movement import sliced
from .scatter import filled_like

MAX_PLACES = 2**20


def places(size: int, kernel: int, dilation: int, stride: int) -> list[int]:
    """The pixel of every tap and window along one axis, taps first."""
    count = (size - dilation * (kernel - 1) - 1) // stride + 1
    require(count > 0, f"no window of {kernel} fits into {size} pixels")
    return [tap * dilation + window * stride for tap in range(kernel) for window in range(count)]


def columns(out: Shape, x: Node, kernel: Any, dilation: Any, padding: Any, stride: Any) -> Any:
    """F.unfold: [N, C, H, W] to [N, C * kh * kw, windows]."""
    require_batched(x, 2)
    n, channels, *sizes = shape_of(x)
    kernel, dilation, padding, stride = (per_axis(v, 2) for v in (kernel, dilation, padding, stride))
    require(all(isinstance(s, int) for s in sizes), "the image depends on the batch")
    source: Any = x
    if any(padding):
        sides = ((0, 0), (0, 0), *((p, p) for p in padding))
        source = Call(ops.Pad(padding=sides), (x,), label="pad")
    counts = []
    for i in range(2):
        at = places(sizes[i] + 2 * padding[i], kernel[i], dilation[i], stride[i])
        counts.append(len(at) // kernel[i])
        source = Call(ops.IndexSelect(axis=2 + i, indices=tuple(at)), (source,), label=f"axis{2 + i}")
    split = reshaped((n, channels, kernel[0], counts[0], kernel[1], counts[1]), source, label="split")
    turned = Call(ops.Permute(axes=(0, 1, 2, 4, 3, 5)), (split,), label="turned")
    return reshaped(out, turned)


def summed(out: Shape, x: Node, size: Any, kernel: Any, dilation: Any, padding: Any, stride: Any) -> Any:
    """F.fold: what windows have in common is added, by a scatter to places that are known."""
    kernel, dilation, padding, stride, size = (per_axis(v, 2) for v in (kernel, dilation, padding, stride, size))
    require(len(shape_of(x)) == 3, "an input without a batch axis; add one")
    n, channels, width = shape_of(x)[0], integer(out[1]), size[1] + 2 * padding[1]
    rows, cols = (places(size[i] + 2 * padding[i], kernel[i], dilation[i], stride[i]) for i in range(2))
    high, wide = len(rows) // kernel[0], len(cols) // kernel[1]
    at = [
        rows[i * high + y] * width + cols[j * wide + z]
        for i in range(kernel[0])
        for j in range(kernel[1])
        for y in range(high)
        for z in range(wide)
    ]
    require(len(at) <= MAX_PLACES, f"{len(at)} places")
    total = (n, channels, (size[0] + 2 * padding[0]) * width)
    source = reshaped((n, channels, prod(kernel) * high * wide), x, label="source")
    index = integers((1, 1, len(at)), at, label="places")
    plain = not any(padding)
    added = Call(ops.Scatter(axis=2, reduce="add"), (filled_like(total, x, 0.0, "zeros"), index, source), label="sum")
    image = reshaped((n, channels, size[0] + 2 * padding[0], width), added, label="" if plain else "padded")
    for i in range(2):
        if padding[i]:
            last = i == 1 or not padding[1]
            label = "" if last else f"axis{2 + i}"
            image = sliced(image, 2 + i, padding[i], padding[i] + size[i], rank=4, label=label)
    return image


TABLE: dict[Any, Handler] = {aten.im2col.default: columns, aten.col2im.default: summed}
