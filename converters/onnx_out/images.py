"""Export rules: pools, resizing, and sampling at coordinates."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

import jquant.ops as ops
from jquant.ops.grid import homogeneous
from jquant.ops.pool import bins_of, full_padding, window_counts
from jquant.ops.resample import factor_is_ignored, nearest_indices

from .layers import pads
from .writer import Call, Operand, Unsupported, emit

# ---------------------------------------------------------------------------------------------------------------------
# Pools: what ceil_mode adds is written as padding, since runtimes disagree on the last window


def _sizes(call: Call) -> tuple[int, ...]:
    return call.static(call.inputs[0].shape[2:])


@emit.register
def _(op: ops.MaxPool, call: Call) -> None:
    (x,) = call.inputs
    if x.dtype != "float32":
        raise Unsupported(f"a maximum of {x.dtype} over windows; ONNX takes numbers")
    window: dict[str, Any] = {"kernel_shape": list(op.kernel), "strides": list(op.strides)}
    call.add("MaxPool", x, pads=pads(full_padding(op, _sizes(call))), dilations=list(op.dilation), **window)


@emit.register
def _(op: ops.AvgPool, call: Call) -> None:
    (x,) = call.inputs
    window: dict[str, Any] = {"kernel_shape": list(op.kernel), "strides": list(op.strides)}
    if not op.ceil_mode and op.divisor is None:
        call.add("AveragePool", x, pads=pads(op.padding), count_include_pad=int(op.count_include_pad), **window)
        return
    sizes = _sizes(call)
    padding = full_padding(op, sizes)
    mean = call.add("AveragePool", x, part="mean", pads=pads(padding), count_include_pad=1, **window)
    each = np.moveaxis(window_counts(op, sizes), -1, 0)
    call.add("Mul", mean, call.constant(prod(op.kernel) / each, "correction"))


@emit.register(ops.AdaptiveAvgPool)
@emit.register(ops.AdaptiveMaxPool)
def _(op: ops.AdaptiveAvgPool | ops.AdaptiveMaxPool, call: Call) -> None:
    (x,), sizes = call.inputs, _sizes(call)
    average = isinstance(op, ops.AdaptiveAvgPool)
    if all(m == 1 for m in op.output_size):
        call.add("GlobalAveragePool" if average else "GlobalMaxPool", x)
    elif all(n % m == 0 for n, m in zip(sizes, op.output_size, strict=True)):
        window = [n // m for n, m in zip(sizes, op.output_size, strict=True)]
        call.add("AveragePool" if average else "MaxPool", x, kernel_shape=window, strides=window)
    else:
        _unequal(op, call, "ReduceMean" if average else "ReduceMax")


def _unequal(op: Any, call: Call, kind: str) -> None:
    """Windows of several sizes, one axis after the other."""
    y: str | Operand = call.inputs[0]
    for i, (n, m) in enumerate(zip(_sizes(call), op.output_size, strict=True), start=1):
        axis = call.integers([i + 1], f"axis_{i}")
        parts = []
        for start, stop in bins_of(n, m):
            bounds = [call.integers([v], f"bound_{i}") for v in (start, stop)]
            piece = call.add("Slice", y, *bounds, axis, part=f"slice_{i}")
            parts.append(call.reduce(kind, piece, [i + 1], f"bin_axis_{i}", part=f"bin_{i}", keepdims=1))
        y = call.add("Concat", *parts, part="" if i == len(op.output_size) else f"axis_{i}_joined", axis=i + 1)


# ---------------------------------------------------------------------------------------------------------------------
# Resizing

_RESIZE: dict[str, dict[str, str]] = {
    "nearest": {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
    "nearest-exact": {
        "mode": "nearest",
        "coordinate_transformation_mode": "half_pixel",
        "nearest_mode": "round_prefer_ceil",
    },
    "bilinear": {"mode": "linear", "coordinate_transformation_mode": "half_pixel"},
}


@emit.register
def _(op: ops.Interpolate, call: Call) -> None:
    (x,) = call.inputs
    options = dict(_RESIZE[op.mode])
    if op.mode != "bilinear" and not _same_pixels(op, call):
        _picked(op, call)
        return
    if op.align_corners:
        options["coordinate_transformation_mode"] = "align_corners"
    if op.coordinates == "asymmetric":
        options["coordinate_transformation_mode"] = "asymmetric"
    if op.scale_factor is not None and not op.recompute_scale_factor and not op.align_corners:
        sizes, outs = call.static(x.shape[2:]), call.static(call.output.shape[2:])
        each = zip(op.scale_factor, sizes, outs, strict=True)
        _by_factors(call, [m / n if factor_is_ignored(op, n, m) else f for f, n, m in each], options)
        return
    sizes, outs = call.static(x.shape[2:]), call.static(call.output.shape[2:])
    if call.opset < 18:  # which has no axes, so that a size of the batch would be needed too
        _by_factors(call, [m / n for n, m in zip(sizes, outs, strict=True)], options)
        return
    axes = list(range(2, len(x.shape)))
    call.add("Resize", x, "", "", call.integers(outs, "sizes"), axes=axes, **options)


def _by_factors(call: Call, factors: list[float], options: dict[str, Any]) -> None:
    """Sizes times factors, cut to integers, as ONNX has it in float32."""
    (x,) = call.inputs
    sizes, outs = call.static(x.shape[2:]), call.static(call.output.shape[2:])
    if any(int(np.float32(n) * np.float32(f)) != m for f, n, m in zip(factors, sizes, outs, strict=True)):
        raise Unsupported(
            f"factors {factors}, which give another size of {sizes} in float32; resize to a size, at opset 18 or later"
        )
    call.add("Resize", x, "", call.constant((1.0, 1.0, *factors), "scales"), **options)


@emit.register
def _(op: ops.Resample, call: Call) -> None:
    if call.opset < 18:
        raise Unsupported("Resize with antialiasing, or to a size with a free batch, needs opset 18")
    (x,) = call.inputs
    options: dict[str, Any] = {
        "mode": op.mode,
        "coordinate_transformation_mode": op.coordinates,
        "axes": list(range(2, len(x.shape))),
        "antialias": int(op.antialias) or None,
        "exclude_outside": int(op.exclude_outside) or None,
        "cubic_coeff_a": op.coefficient if op.mode == "cubic" else None,
    }
    if op.scale_factor is None:
        call.add("Resize", x, "", "", call.integers(op.size, "sizes"), **options)
        return
    pairs = zip(call.static(x.shape[2:]), op.scale_factor, op.size, strict=True)
    if any(int(np.float32(n) * np.float32(f)) != m for n, f, m in pairs):
        raise Unsupported(f"factors {op.scale_factor}, which give another size in float32; resize to a size")
    call.add("Resize", x, "", call.constant(op.scale_factor, "scales"), **options)


def _same_pixels(op: ops.Interpolate, call: Call) -> bool:
    """Whether ONNX, which divides by the factor where torch multiplies by its inverse, takes the same pixels.

    In float32 as onnxruntime, and in float64 as onnx.reference.
    """
    sizes, outs = call.static(call.inputs[0].shape[2:]), call.static(call.output.shape[2:])
    by_size = op.scale_factor is None or op.recompute_scale_factor
    kinds: tuple[Any, ...] = (np.float32, np.float64)
    for i, (index, n, out) in enumerate(zip(nearest_indices(op, sizes), sizes, outs, strict=True)):
        for kind in kinds:
            ignored = by_size or factor_is_ignored(op, n, out)
            factor = kind(out) / kind(n) if ignored else kind(op.scale_factor[i] if op.scale_factor else 1)
            half, at = kind(0.5), np.arange(out).astype(kind)
            where = at / factor if op.mode == "nearest" else np.floor((at + half) / factor - half + half)
            if not np.array_equal(np.floor(where).clip(0, n - 1), index):
                return False
    return True


def _picked(op: ops.Interpolate, call: Call) -> None:
    """The pixels of a nearest resize by their indices, one Gather an axis."""
    sizes, y = call.static(call.inputs[0].shape[2:]), call.inputs[0].name
    for i, index in enumerate(nearest_indices(op, sizes)):
        part = "" if i == len(sizes) - 1 else f"axis_{i + 2}"
        y = call.add("Gather", y, call.integers(index, f"pixels_{i + 2}"), part=part, axis=i + 2)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def _sample(call: Call, x: Operand, grid: str, mode: str, padding: str, align: bool) -> None:
    linear = "linear" if call.opset >= 20 else "bilinear"
    options: dict[str, Any] = {"mode": "nearest" if mode == "nearest" else linear, "padding_mode": padding}
    call.add("GridSample", x, grid, align_corners=int(align), **options)


def _normalized(call: Call, x: Operand, pixels: str) -> str:
    """Absolute coordinates [N, Ho, Wo, 2] to those of align_corners=False: (2 p + 1) / n - 1."""
    height, width = call.static(x.shape[2:])
    sides = np.array([width, height], np.float64)
    scaled = call.add("Mul", pixels, call.constant(2 / sides, "per_pixel"), part="scaled")
    return call.add("Add", scaled, call.constant(1 / sides - 1, "first_pixel"), part="normalized")


@emit.register
def _(op: ops.GridSample, call: Call) -> None:
    x, grid = call.inputs
    if op.coordinates == "normalized":
        _sample(call, x, grid.name, op.mode, op.padding, op.align_corners)
    else:
        _sample(call, x, _normalized(call, x, grid.name), op.mode, op.padding, False)


@emit.register
def _(op: ops.Warp, call: Call) -> None:
    x, flow = call.inputs
    height, width = call.static(flow.shape[2:])
    moved = call.add("Transpose", flow, part="displacement", perm=[0, 2, 3, 1])
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    base = call.constant(np.stack([columns, rows], -1)[None], "base")
    pixels = call.add("Add", moved, base, part="pixels")
    _sample(call, x, _normalized(call, x, pixels), op.mode, op.padding, False)


@emit.register
def _(op: ops.AffineGrid, call: Call) -> None:
    (theta,) = call.inputs
    height, width = op.size
    base = call.constant(homogeneous(op).reshape(1, height * width, 3), "base")
    turned = call.add("Transpose", theta, part="theta_transposed", perm=[0, 2, 1])
    points = call.add("MatMul", base, turned, part="points")
    call.reshape_to((theta.shape[0], height, width, 2), points)
