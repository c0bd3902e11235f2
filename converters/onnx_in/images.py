"""Handlers: pools, resizing, and sampling at coordinates."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

import jquant.ops as ops
from jquant.ops.resample import factor_is_ignored

from .call import Call, Handler
from .layers import window
from .values import Refused, Result, Unsupported, Value, require

MAX_SIDE = 2**15  # of an image that is made here
MAX_PIXELS = 2**24


def max_pool(call: Call) -> list[Result]:
    x, found = pooled(call)
    require(not call.flag("storage_order") or len(call.node.output) == 1, "positions in column-major order")
    y: Result = call.make(ops.MaxPool(**found, ceil_mode=call.flag("ceil_mode")), x)
    return [y, Refused("the positions of a maximum have no operator")]


def average_pool(call: Call) -> Result:
    x, found = pooled(call)
    require(all(d == 1 for d in found.pop("dilation")), "an average over a dilated window")
    include = call.flag("count_include_pad")
    return call.make(ops.AvgPool(**found, ceil_mode=call.flag("ceil_mode"), count_include_pad=include), x)


def pooled(call: Call) -> tuple[Value, dict[str, Any]]:
    x = call.real(0)
    kernel = call.integers("kernel_shape", ())
    require(len(kernel) == x.rank - 2 >= 1, f"a window {kernel} of {list(x.shape)}")
    require(None not in x.shape[2:] and prod(x.shapes[0][2:]) <= MAX_PIXELS, f"an image of {list(x.shape)}")
    found = {"kernel": kernel, **window(call, kernel, x.shape[2:])}
    require(all(max(p) < k * d for p, k, d in zip(found["padding"], kernel, found["dilation"], strict=True)),
            "padding as wide as the window")  # fmt: skip
    sizes = (n + sum(p) for n, p in zip(x.shapes[0][2:], found["padding"], strict=True))
    require(prod(sizes) <= MAX_PIXELS, f"an image of {list(x.shape)} with padding {found['padding']}")
    if call.text("auto_pad", "NOTSET") not in ("NOTSET", ""):
        require(not call.flag("ceil_mode"), "auto_pad with ceil_mode")
    return x, found


def global_pool(cls: Any) -> Handler:
    def handler(call: Call) -> Result:
        x = call.real(0)
        require(x.rank >= 3 and None not in x.shape[2:], f"a pool over {list(x.shape)}")
        return call.make(cls(output_size=(1,) * (x.rank - 2)), x)

    return handler


# ---------------------------------------------------------------------------------------------------------------------
# Resizing

_MODES: dict[tuple[str, str, str], tuple[Any, bool]] = {
    ("nearest", "asymmetric", "floor"): ("nearest", False),
    ("nearest", "half_pixel", "round_prefer_ceil"): ("nearest-exact", False),
    ("nearest", "pytorch_half_pixel", "round_prefer_ceil"): ("nearest-exact", False),
    ("linear", "half_pixel", ""): ("bilinear", False),
    ("linear", "pytorch_half_pixel", ""): ("bilinear", False),
    ("linear", "align_corners", ""): ("bilinear", True),
}


def resize(call: Call) -> Result:
    """By sizes, or by factors. What torch's interpolate does not have is refused, but where it is the same."""
    x = call.real(0)
    require(not call.flag("antialias"), "antialias=1")
    require(not call.flag("exclude_outside"), "exclude_outside=1")
    require(call.text("keep_aspect_ratio_policy", "stretch") == "stretch", "an aspect ratio that is kept")
    factors: Any
    if call.opset < 11:
        mode, coordinates, nearest = call.text("mode", "nearest"), "asymmetric", "floor"
        factors, sizes = call.known(1, "scales"), None
    else:
        mode, coordinates = call.text("mode", "nearest"), call.text("coordinate_transformation_mode", "half_pixel")
        nearest = call.text("nearest_mode", "round_prefer_floor")
        sizes = call.known_integers(3, "sizes") if call.given(3) else None
        scaled = call.given(2) and sizes is None
        factors = call.known(2, "scales") if scaled else None
    axes = call.integers("axes", tuple(range(x.rank)))
    require(len(set(axes)) == len(axes) and all(-x.rank <= a < x.rank for a in axes), f"axes {axes}")
    axes = tuple(a % x.rank for a in axes)
    if factors is not None and factors.size == 0:
        factors = None
    require((factors is None) != (sizes is None), "either sizes or scales")
    return resized(call, x, (mode, coordinates, nearest), axes, factors, sizes)


def resized(call: Call, x: Value, kind: tuple[str, str, str], axes: Any, factors: Any, sizes: Any) -> Value:
    spatial = x.shape[2:]
    require(x.rank >= 3 and None not in spatial, f"a resize of {list(x.shape)}")
    given = sizes if sizes is not None else tuple(float(f) for f in factors.reshape(-1))
    require(len(given) == len(axes), f"{len(given)} sizes or scales of {len(axes)} axes")
    by_axis = dict(zip(axes, given, strict=True))
    neutral = x.shapes[0] if sizes is not None else (1.0,) * x.rank
    kept = all(by_axis.get(a, neutral[a]) == neutral[a] for a in (0, 1))
    require(kept, "it resizes the batch or the channels")
    wanted = tuple(by_axis.get(a, neutral[a]) for a in range(2, x.rank))
    require(all(np.isfinite(v) and v > 0 for v in wanted), f"sizes or scales {wanted}")
    out = tuple(int(v) if sizes is not None else int(np.floor(n * v)) for v, n in zip(wanted, spatial, strict=True))
    require(min(out) >= 1 and max(out) <= MAX_SIDE and prod(out) <= MAX_PIXELS, f"a result of {out}")
    if kind[1] == "pytorch_half_pixel" and any(m == 1 != n for n, m in zip(spatial, out, strict=True)):
        x, wanted = first_pixel(call, x, out, wanted)
        spatial = x.shape[2:]
    mode, align = mode_of(kind, spatial, out, wanted if sizes is None else None)
    option: dict[str, Any] = {"size": out} if sizes is not None or align else {"scale_factor": wanted}
    if align and sizes is None:
        whole = all(float(n * f).is_integer() for n, f in zip(spatial, wanted, strict=True))
        require(whole, "corners aligned to a size with a fraction; give sizes")
    op = ops.Interpolate(mode=mode, align_corners=align, **option)
    if sizes is None and not align:
        for n, m, f in zip(spatial, out, wanted, strict=True):
            assert n is not None  # as in `Call.static`
            assert m is not None
            ignored = factor_is_ignored(op, n, m)
            require(not ignored or m == n * f, f"a factor {f} from {n} to {m} pixels, which torch takes for {m / n}")
    return call.make(op, x)


def first_pixel(call: Call, x: Value, out: Any, wanted: Any) -> tuple[Value, Any]:
    """pytorch_half_pixel to one pixel takes the first one of the axis, not the middle one."""
    stops = (None, None, *(1 if m == 1 else None for m in out))
    x = call.make(ops.Slice(starts=(0,) * x.rank, stops=stops, steps=(1,) * x.rank), x, part="first")
    return x, tuple(type(v)(1) if m == 1 else v for v, m in zip(wanted, out, strict=True))


def mode_of(kind: tuple[str, str, str], sizes: Any, out: Any, factors: Any) -> tuple[Any, bool]:
    mode, coordinates, nearest = kind
    mode = "linear" if mode in ("linear", "bilinear") else mode
    require(mode in ("nearest", "linear"), f"mode={mode!r}")
    key = (mode, coordinates, nearest if mode == "nearest" else "")
    if mode == "nearest" and key not in _MODES:
        ratios = [m / n for n, m in zip(sizes, out, strict=True)]
        enlarged = all(r.is_integer() for r in ratios) and (factors is None or list(factors) == ratios)
        pixel = coordinates in ("half_pixel", "pytorch_half_pixel") and nearest in ("round_prefer_floor",)
        if enlarged and pixel:
            return "nearest-exact", False  # whole factors have no tie but where both ways are the same pixel
        if enlarged and coordinates == "asymmetric" and nearest == "floor":
            return "nearest", False
    require(key in _MODES, f"mode={mode!r} with {coordinates!r} and {nearest!r}")
    return _MODES[key]


def upsample(call: Call) -> Result:
    """The resize of opset 9, deprecated in 10."""
    x = call.real(0)
    factors = call.known(1, "scales")
    return resized(call, x, (call.text("mode", "nearest"), "asymmetric", "floor"), range(x.rank), factors, None)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def grid_sample(call: Call) -> Result:
    x, grid = call.real(0), call.real(1)
    require(x.rank == 4 and grid.rank == 4, "sampling of volumes; only images [N, C, H, W] have an operator")
    mode, padding = call.text("mode", "linear"), call.text("padding_mode", "zeros")
    modes: dict[str, Any] = {"linear": "bilinear", "bilinear": "bilinear", "nearest": "nearest"}
    paddings: dict[str, Any] = {"zeros": "zeros", "border": "border"}
    require(mode in modes, f"mode={mode!r}; linear and nearest are operators")
    require(padding in paddings, f"padding_mode={padding!r}; zeros and border are operators")
    align = call.flag("align_corners")
    return call.make(ops.GridSample(mode=modes[mode], padding=paddings[padding], align_corners=align), x, grid)


def affine_grid(call: Call) -> Result:
    theta, size = call.real(0), call.known_integers(1, "size")
    require(len(size) == 4 and theta.shapes[0][1:] == (2, 3), "a grid of volumes; only images have an operator")
    require(min(size) >= 1 and max(size[2:]) <= MAX_SIDE and prod(size[2:]) <= MAX_PIXELS, f"a grid of {size}")
    require(theta.shapes[0][0] == size[0], "a size with another batch")
    grid = ops.AffineGrid(size=(size[2], size[3]), align_corners=call.flag("align_corners"))
    return call.make(grid, theta)


def roi_align(call: Call) -> Result:
    raise Unsupported("boxes and their images are two operands in ONNX, and one [K, 5] here; cut the graph before it")


TABLE: dict[str, Handler] = {
    "AffineGrid": affine_grid,
    "AveragePool": average_pool,
    "GlobalAveragePool": global_pool(ops.AdaptiveAvgPool),
    "GlobalMaxPool": global_pool(ops.AdaptiveMaxPool),
    "GridSample": grid_sample,
    "MaxPool": max_pool,
    "Resize": resize,
    "RoiAlign": roi_align,
    "Upsample": upsample,
}
