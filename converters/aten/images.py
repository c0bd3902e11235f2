"""Pooling, resizing, and sampling at coordinates."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch.fx import Node

import jquant.ops as ops

from ..torch_functions import GRID_SAMPLE_ABSOLUTE
from .call import (
    Call,
    Handler,
    Shape,
    aten,
    both_sides,
    integer,
    per_axis,
    require,
    require_batched,
    reshaped,
    shape_of,
)
from .movement import sliced

NO_POSITIONS = "the positions of a maximum; return_indices has no operator"


def max_pool(rank: int) -> Handler:
    def handler(
        out: Shape, x: Node, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool = False
    ) -> Call:
        require_batched(x, rank)
        op = ops.MaxPool(
            kernel=per_axis(kernel, rank),
            strides=per_axis(stride or kernel, rank),
            padding=both_sides(padding, rank),
            dilation=per_axis(dilation, rank),
            ceil_mode=ceil_mode,
        )
        return Call(op, (x,))

    return handler


def without_positions(handler: Handler) -> Handler:
    return lambda out, *arguments: [handler(out[0], *arguments), NO_POSITIONS]


def avg_pool(rank: int) -> Handler:
    def handler(
        out: Shape, x: Node, kernel: Any, stride: Any, padding: Any, ceil_mode: bool, include: bool, divisor: Any = None
    ) -> Call:
        require_batched(x, rank)
        op = ops.AvgPool(
            kernel=per_axis(kernel, rank),
            strides=per_axis(stride or kernel, rank),
            padding=both_sides(padding, rank),
            ceil_mode=ceil_mode,
            count_include_pad=include,
            divisor=divisor,
        )
        return Call(op, (x,))

    return handler


def adaptive_avg_pool(rank: int) -> Handler:
    def handler(out: Shape, x: Node, size: Any) -> Any:
        require_batched(x, rank)
        wanted, given = per_axis(size, rank), per_axis(shape_of(x)[2:], rank)
        uneven = [i for i in range(rank) if given[i] % wanted[i]]
        if not uneven:
            return Call(ops.AdaptiveAvgPool(output_size=wanted), (x,))
        even = tuple(n if i in uneven else wanted[i] for i, n in enumerate(given))
        result: Any = x
        if even != given:
            result = Call(ops.AdaptiveAvgPool(output_size=even), (x,), label="even")
        for i in uneven:
            last = i == uneven[-1]
            result = uneven_means(result, 2 + i, rank + 2, given[i], wanted[i], "" if last else f"axis{2 + i}")
        return result

    return handler


def uneven_means(x: Any, axis: int, rank: int, size: int, count: int, label: str) -> Call:
    """Means of windows of one axis, which are of several sizes and overlap where the count does not divide the size."""
    windows = [(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]
    starts, sizes = {b[0] - a[0] for a, b in pairwise(windows)}, {stop - start for start, stop in windows}
    if len(sizes) == len(starts) == 1:
        (kernel,), (step,) = sizes, starts
        spatial = range(2, rank)
        return Call(
            ops.AvgPool(
                kernel=tuple(kernel if i == axis else 1 for i in spatial),
                strides=tuple(step if i == axis else 1 for i in spatial),
                padding=tuple((0, 0) for _ in spatial),
            ),
            (x,),
            label=label,
        )
    prefix = f"{label or 'axis' + str(axis)}."
    parts = []
    for i, (start, stop) in enumerate(windows):
        part = sliced(x, axis, start, stop, rank=rank, label=f"{prefix}{i}.slice")
        mean = Call(ops.Mean(axes=(axis,), keepdims=True), (part,), label=f"{prefix}{i}.mean")
        parts.append(part if stop - start == 1 else mean)
    return Call(ops.Cat(axis=axis), tuple(parts), label=label)


def adaptive_max_pool(rank: int) -> Handler:
    def handler(out: list[Shape], x: Node, size: Any) -> list[Any]:
        require_batched(x, rank)
        return [Call(ops.AdaptiveMaxPool(output_size=per_axis(size, rank)), (x,)), NO_POSITIONS]

    return handler


def resize(mode: Any) -> Handler:
    """By size, or by factors where they were given: then the coordinates follow from the factors."""

    def resized(out: Shape, x: Node, size: Any, align_corners: bool, factors: Any) -> Call:
        if factors is not None and all(f is not None for f in factors):
            op = ops.Interpolate(scale_factor=tuple(map(float, factors)), mode=mode, align_corners=align_corners)
        else:
            op = ops.Interpolate(size=tuple(map(integer, out[2:])), mode=mode, align_corners=align_corners)
        require_batched(x, len(out) - 2)
        return Call(op, (x,))

    if mode == "bilinear":
        return resized
    return lambda out, x, size, factors: resized(out, x, size, False, factors)


def trilinear(out: Shape, x: Node, size: Any, align_corners: bool, factors: Any) -> Call:
    """The planes of a volume, and then along its first axis, with the planes as one axis."""
    require_batched(x, 3)
    n, c, depth, height, width = shape_of(x)
    sizes = tuple(map(integer, out[2:]))
    by = tuple(map(float, factors)) if factors is not None and all(f is not None for f in factors) else None

    def made(source: Any, to: Any, factor: Any, label: str) -> Call:
        option: dict[str, Any] = {"size": to} if factor is None else {"scale_factor": factor}
        return Call(ops.Interpolate(mode="bilinear", align_corners=align_corners, **option), (source,), label=label)

    planes = reshaped((n, c * depth, height, width), x, label="planes")
    y = made(planes, sizes[1:], by and by[1:], "in_planes")
    y = reshaped((n, c, depth, sizes[1] * sizes[2]), y, label="columns")
    y = made(y, (sizes[0], sizes[1] * sizes[2]), by and (by[0], 1.0), "between_planes")
    return reshaped(out, y)


def resample(mode: Any, antialias: bool) -> Handler:
    """Cubic, or with antialiasing, which the chip does not have."""

    def handler(out: Shape, x: Node, size: Any, align_corners: bool, factors: Any) -> Call:
        require_batched(x, 2)
        require(not (antialias and align_corners), "antialias with align_corners")
        by = tuple(map(float, factors)) if factors is not None and all(f is not None for f in factors) else None
        op = ops.Resample(
            size=tuple(map(integer, out[2:])),
            scale_factor=None if align_corners else by,
            mode=mode,
            coordinates="align_corners" if align_corners else "half_pixel",
            antialias=antialias,
            coefficient=-0.5 if antialias else -0.75,
            exclude_outside=antialias,
        )
        return Call(op, (x,))

    return handler


def by_axis(handler: Handler) -> Handler:
    """The overload with one factor for each axis instead of a list."""
    return lambda out, x, size, align, *factors: handler(out, x, size, align, factors)


def resize_by_axis(mode: Any) -> Handler:
    """The overload with one factor for each axis instead of a list."""
    handler = resize(mode)
    if mode == "bilinear":
        return lambda out, x, size, align, *factors: handler(out, x, size, align, factors)
    return lambda out, x, size, *factors: handler(out, x, size, factors)


def grid_sample(out: Shape, x: Node, grid: Node, mode: int, padding: int, align_corners: bool) -> Call:
    require(len(shape_of(x)) == 4, "sampling of volumes; only images [N, C, H, W] have an operator")
    require(mode in (0, 1), "bicubic sampling; use bilinear or nearest")
    require(padding in (0, 1), "reflection padding; use zeros or border")
    op = ops.GridSample(
        mode="nearest" if mode else "bilinear",
        padding="border" if padding else "zeros",
        align_corners=bool(align_corners),
    )
    return Call(op, (x, grid))


def grid_sample_absolute(out: Shape, x: Node, grid: Node, mode: str, padding: str) -> Call:
    op = ops.GridSample(mode=mode, padding=padding, coordinates="absolute")  # type: ignore[arg-type]
    return Call(op, (x, grid))


def affine_grid(out: Shape, theta: Node, size: Any, align_corners: bool) -> Call:
    require(len(out) == 4, "a grid of volumes; only images [N, C, H, W] have an operator")
    return Call(ops.AffineGrid(size=(integer(out[1]), integer(out[2])), align_corners=align_corners), (theta,))


TABLE: dict[Any, Handler] = {
    **{getattr(aten, f"max_pool{n}d").default: max_pool(n) for n in (1, 2, 3)},
    **{getattr(aten, f"max_pool{n}d_with_indices").default: without_positions(max_pool(n)) for n in (2, 3)},
    aten.max_pool1d_with_indices.default: without_positions(max_pool(1)),
    **{getattr(aten, f"avg_pool{n}d").default: avg_pool(n) for n in (1, 2, 3)},
    **{getattr(aten, f"adaptive_avg_pool{n}d").default: adaptive_avg_pool(n) for n in (1, 2, 3)},
    **{getattr(aten, f"adaptive_max_pool{n}d").default: adaptive_max_pool(n) for n in (1, 2, 3)},
    **{getattr(aten, f"upsample_nearest{n}d").vec: resize("nearest") for n in (1, 2, 3)},
    **{getattr(aten, f"upsample_nearest{n}d").default: resize_by_axis("nearest") for n in (1, 2, 3)},
    **{getattr(aten, f"_upsample_nearest_exact{n}d").vec: resize("nearest-exact") for n in (1, 2, 3)},
    aten.upsample_linear1d.vec: resize("bilinear"),
    aten.upsample_linear1d.default: resize_by_axis("bilinear"),
    aten.upsample_bilinear2d.vec: resize("bilinear"),
    aten.upsample_bilinear2d.default: resize_by_axis("bilinear"),
    aten.upsample_trilinear3d.vec: trilinear,
    aten.upsample_trilinear3d.default: by_axis(trilinear),
    aten.upsample_bicubic2d.vec: resample("cubic", False),
    aten.upsample_bicubic2d.default: by_axis(resample("cubic", False)),
    aten._upsample_bilinear2d_aa.vec: resample("linear", True),
    aten._upsample_bilinear2d_aa.default: by_axis(resample("linear", True)),
    aten._upsample_bicubic2d_aa.vec: resample("cubic", True),
    aten._upsample_bicubic2d_aa.default: by_axis(resample("cubic", True)),
    aten.grid_sampler.default: grid_sample,
    aten.grid_sampler_2d.default: grid_sample,
    GRID_SAMPLE_ABSOLUTE: grid_sample_absolute,
    aten.affine_grid_generator.default: affine_grid,
}
