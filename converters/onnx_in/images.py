"""Handlers: pools, resizing, and sampling at coordinates."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

import jquant.ops as ops
from jquant.ops.resample import factor_is_ignored

from .call import Call, Handler
from .layers import window
from .movement import reshaped
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
    ("linear", "asymmetric", ""): ("bilinear", False),
}


def resize(call: Call) -> Result:
    """By sizes, or by factors. What torch's interpolate does not have is refused, but where it is the same."""
    x = call.real(0)
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
    exact = sizes is not None or all(n * f == m for n, f, m in zip(spatial, wanted, out, strict=True))
    if kind[1] == "half_pixel_symmetric" and exact:
        kind = (kind[0], "half_pixel", kind[2])
    if kind[0] != "nearest" and kind[1] == "align_corners" and sizes is None:  # only the reference keeps the fraction
        whole = all(float(n * f).is_integer() for n, f in zip(spatial, wanted, strict=True))
        require(whole, "corners aligned to a size with a fraction; give sizes")
    if kind[0] == "cubic" or call.flag("antialias"):
        return resampled(call, x, kind, out, wanted if sizes is None else None)
    require(not call.flag("exclude_outside"), "exclude_outside=1 of a mode that is not cubic, without antialias")
    if kind[0] == "nearest" and not is_known(kind, spatial, out, wanted if sizes is None else None):
        return picked(call, x, kind, out, wanted if sizes is None else None)
    mode, align = mode_of(kind, spatial, out, wanted if sizes is None else None)
    option: dict[str, Any] = {"size": out} if sizes is not None or align else {"scale_factor": wanted}
    if mode == "bilinear" and len(out) == 3:
        return by_two(call, x, out, align, kind[1] == "asymmetric", wanted if sizes is None and not align else None)
    if mode == "bilinear" and kind[1] == "asymmetric":
        option["coordinates"] = "asymmetric"
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


def is_known(kind: tuple[str, str, str], sizes: Any, out: Any, factors: Any) -> bool:
    """Whether a nearest resize is one of torch's."""
    try:
        mode_of(kind, sizes, out, factors)
    except Unsupported:
        return False
    return True


_ROUNDED: dict[str, Any] = {
    "floor": np.floor,
    "ceil": np.ceil,
    "round_prefer_floor": lambda at: np.ceil(at - np.float32(0.5)),
    "round_prefer_ceil": lambda at: np.floor(at + np.float32(0.5)),
}


def pixels_of(kind: tuple[str, str, str], n: int, out: int, factor: float | None) -> np.ndarray:
    """The pixel of every output along one axis, with coordinates in float32 as runtimes have them."""
    _, coordinates, rounding = kind
    at, half = np.arange(out, dtype=np.float32), np.float32(0.5)
    factor32 = np.float32(out) / np.float32(n) if factor is None else np.float32(factor)
    require(rounding in _ROUNDED, f"nearest_mode={rounding!r}")
    match coordinates:
        case "half_pixel" | "pytorch_half_pixel":
            where = (at + half) / factor32 - half
        case "half_pixel_symmetric":
            centre = np.float32(n) / np.float32(2)
            shift = centre * (1 - np.float32(out) / (factor32 * np.float32(n)))
            where = shift + (at + half) / factor32 - half
        case "asymmetric":
            where = at / factor32
        case "tf_half_pixel_for_nn":
            where = (at + half) / factor32
        case "align_corners":
            where = at * np.float32(n - 1) / np.float32(max(out - 1, 1))
        case _:
            raise Unsupported(f"coordinate_transformation_mode={coordinates!r}")
    return _ROUNDED[rounding](where).clip(0, n - 1).astype(np.int32)


def picked(call: Call, x: Value, kind: tuple[str, str, str], out: Any, factors: Any) -> Value:
    """A nearest resize that torch does not have: pixels by their places, one axis after the other."""
    found = []
    for i, m in enumerate(out):
        at = pixels_of(kind, x.shapes[0][i + 2], m, None if factors is None else factors[i])
        if at.tolist() != list(range(x.shapes[0][i + 2])):
            found.append((i + 2, tuple(int(v) for v in at)))
    require(bool(found), "a resize that takes every pixel")
    for k, (axis, places) in enumerate(found):
        part = f"axis_{axis}" if k + 1 < len(found) else ""
        x = call.make(ops.IndexSelect(axis=axis, indices=places), x, part=part)
    return x


def resampled(call: Call, x: Value, kind: tuple[Any, Any, str], out: Any, factors: Any) -> Value:
    """Cubic, or with antialiasing."""
    mode, coordinates, _ = kind
    require(
        mode in ("linear", "cubic") and len(out) <= 2,
        f"mode={mode!r} of {len(out)} axes, antialias={call.flag('antialias')}",
    )
    if coordinates == "pytorch_half_pixel":
        coordinates = "half_pixel"
    require(
        coordinates in ("half_pixel", "asymmetric", "align_corners"), f"coordinate_transformation_mode={coordinates!r}"
    )
    antialias = call.flag("antialias")
    require(not antialias or coordinates == "half_pixel", f"antialias=1 with {coordinates!r}")
    op = ops.Resample(
        size=out, scale_factor=None if factors is None else tuple(factors), mode=mode, coordinates=coordinates,
        antialias=antialias, coefficient=call.number("cubic_coeff_a", -0.75),
        exclude_outside=call.flag("exclude_outside"),
    )  # fmt: skip
    return call.make(op, x)


def by_two(call: Call, x: Value, out: Any, align: bool, asymmetric: bool, factors: Any) -> Value:
    """A volume: its planes, and then along the first axis, with the planes as one axis."""
    coordinates: Any = "asymmetric" if asymmetric else "half_pixel"
    depth = x.shapes[0][2]

    def made(source: Value, size: Any, by: Any, part: str) -> Value:
        option: dict[str, Any] = {"size": size} if by is None else {"scale_factor": by}
        op = ops.Interpolate(mode="bilinear", align_corners=align, coordinates=coordinates, **option)
        return call.make(op, source, part=part)

    planes: Any = tuple((n, c * d, h, w) for n, c, d, h, w in x.shapes)
    y = made(reshaped(call, x, planes, part="planes"), out[1:], None if factors is None else factors[1:], "in_planes")
    columns: Any = tuple((s[0], s[1], depth, out[1] * out[2]) for s in x.shapes)
    y = reshaped(call, y, columns, part="columns")
    y = made(y, (out[0], out[1] * out[2]), None if factors is None else (factors[0], 1.0), "between_planes")
    wanted: Any = tuple((s[0], s[1], *out) for s in x.shapes)
    return reshaped(call, y, wanted)


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
