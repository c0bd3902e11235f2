"""Picture inputs: from the pixels of a camera, exact uint8, to centred int8. Section 8 of the specification.

The hardware's inputs are [N, H, W, C] in every layout of the network behind them. A result is real = centred * `unit`:
1 where a program's input is in pixels, 1 / 128 for a network that is trained on centred / 128. At an output scale of
`unit` the integers are the centred pixels themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np

from jquant.graph.operator import Lowered, Operand, constraints, eval_float, eval_integer, lower_op, to_channels_last
from jquant.numerics.color import CENTRE, Swing, check_even, check_swing, join_planes, rgb_to_yuv, to_pixels
from jquant.numerics.crop import MAX_FRACTION_BITS, REACH, Region, crop_resize, region_of, taps_of
from jquant.numerics.rescale import Rescale, ratio, rescale, rescale_of
from jquant.numerics.rounding import divide, widen
from jquant.ops.movement import channels_last_axis
from jquant.types import Array, GraphError, InputError, LoweringError, NodeFormat, Op, Target, bit_width


def _check_unit(op: Any) -> None:
    if not (op.unit > 0 and isfinite(op.unit)):
        raise GraphError(f"{type(op).__name__}: unit {op.unit} must be positive and finite, real per step of a pixel")


@dataclass(frozen=True, kw_only=True)
class CentrePixels(Op):
    """Pixels minus 128: uint8, any shape. The gray input, and YUV 4:4:4 or RGB in bytes."""

    needs_stats: ClassVar = False

    unit: float = 1.0

    def __post_init__(self) -> None:
        _check_unit(self)


@dataclass(frozen=True, kw_only=True)
class Nv12ToCentredYuv444(Op):
    """The pyramid input: y [N, H, W, 1] and uv [N, H/2, W/2, 2], uint8, to [N, H, W, 3]; chroma repeated, minus 128."""

    needs_stats: ClassVar = False
    ports: ClassVar = ("y", "uv")

    unit: float = 1.0

    def __post_init__(self) -> None:
        _check_unit(self)


@dataclass(frozen=True, kw_only=True)
class RgbToCentredYuv444(Op):
    """RGB pixels (or BGR) to centred YUV 4:4:4: [..., 3], uint8. What training feeds a network that ships with YUV."""

    needs_stats: ClassVar = False

    swing: Swing = "full"
    order: Literal["rgb", "bgr"] = "rgb"
    unit: float = 1.0

    def __post_init__(self) -> None:
        _check_unit(self)
        check_swing(self.swing)
        if self.order not in ("rgb", "bgr"):
            raise GraphError(f"order must be 'rgb' or 'bgr', not {self.order!r}")


@dataclass(frozen=True, kw_only=True)
class SwapChannels(Op):
    """The channels in reverse order: RGB to BGR and back."""

    layout: ClassVar = "axes"
    scale_rule: ClassVar = "same_as_input"
    needs_stats: ClassVar = False

    axis: int = -1


@dataclass(frozen=True, kw_only=True)
class RoiResize(Op):
    """The resizer input: a region of each picture, resized to `size` and centred, [N, *size, 3] (gray: 1).

    Operands, exact: y uint8 [N, H, W, 1]; uv uint8 [N, H/2, W/2, 2] unless gray; roi int32 [N, 4] = (left, top, right,
    bottom) in pixels of y, right and bottom included. Both planes are cropped (chroma from floor(left / 2) to
    floor(right / 2)) and resized as pixels, chroma to half of `size` and then repeated.
    `pad_value` is a byte of Y and one of U and V, for pixels outside the picture: (0, -128) is (0, 128), black.
    """

    needs_stats: ClassVar = False
    ports: ClassVar = ("y", "uv", "roi")

    size: tuple[int, int]
    mode: Literal["nv12", "gray"] = "nv12"
    interpolation: Literal["bilinear", "nearest"] = "bilinear"
    pad_mode: Literal["constant", "border"] = "constant"
    pad_value: tuple[int, int] = (0, -128)
    unit: float = 1.0

    def __post_init__(self) -> None:
        _check_unit(self)
        if min(self.size) < 1 or max(self.size) > REACH:
            raise GraphError(f"RoiResize to {self.size}: sides are from 1 to {REACH}")
        if self.mode == "nv12":
            check_even(*self.size)
        if not all(-128 <= v <= 255 for v in self.pad_value):
            raise GraphError(f"pad_value {self.pad_value} holds bytes, from -128 to 255")


# ---------------------------------------------------------------------------------------------------------------------
# Float


def _real(pixels: Array, unit: float) -> Array:
    return (pixels - CENTRE) * np.float32(unit)


@eval_float.register
def _(op: CentrePixels, x: Array) -> Array:
    return _real(x.astype(jnp.float32), op.unit)


@eval_float.register
def _(op: Nv12ToCentredYuv444, y: Array, uv: Array) -> Array:
    return _real(join_planes(y, uv).astype(jnp.float32), op.unit)


@eval_float.register
def _(op: RgbToCentredYuv444, x: Array) -> Array:
    return _real(_yuv_pixels(op, x).astype(jnp.float32), op.unit)


@eval_float.register
def _(op: SwapChannels, x: Array) -> Array:
    return jnp.flip(x, op.axis)


@eval_float.register
def _(op: RoiResize, y: Array, *others: Array) -> Array:
    planes = []
    for plane, regions, size, fill in _planes(op, y, *others):
        plane = plane.astype(jnp.float32)
        for axis, (region, out) in enumerate(zip(regions, size, strict=True), start=1):
            plane = _resize_float(op, plane, axis, region, out, fill)
        planes.append(plane)
    return _real(planes[0] if op.mode == "gray" else join_planes(*planes), op.unit)


def _resize_float(op: RoiResize, x: Array, axis: int, region: Region, out: int, fill: int | None) -> Array:
    first, count = (v[:, None] for v in region)
    size = count.astype(jnp.float32)
    i = np.arange(out, dtype=np.float32)
    nearest = op.interpolation == "nearest"
    start = 0.0 if nearest else 0.5
    at = jnp.clip(divide(size * (i + start), jnp.float32(out)) - start, 0, size - 1)
    below = jnp.floor(at)
    fraction = jnp.zeros_like(at) if nearest else at - below
    shape = (x.shape[0], *(-1 if a == axis else 1 for a in range(1, x.ndim)))
    total = jnp.float32(0)
    for step, weight in enumerate((1 - fraction, fraction)):
        index = (first + jnp.minimum(below.astype(jnp.int32) + step, count - 1)).reshape(shape)
        met = jnp.take_along_axis(x, jnp.clip(index, 0, x.shape[axis] - 1), axis=axis, mode="clip")
        inside = (index >= 0) & (index < x.shape[axis])
        met = met if fill is None else jnp.where(inside, met, np.float32(fill))
        total = total + met * weight.reshape(shape)
    return total


# ---------------------------------------------------------------------------------------------------------------------
# Pixels and regions, shared by the float and the integer meaning


def _yuv_pixels(op: RgbToCentredYuv444, x: Array) -> Array:
    if x.ndim < 2 or x.shape[-1] != 3:
        raise InputError(f"{op.order.upper()} pixels are [..., 3], channels last, not {x.shape}")
    return to_pixels(rgb_to_yuv(x if op.order == "rgb" else jnp.flip(x, -1), op.swing))


def _planes(op: RoiResize, y: Array, *others: Array) -> list[tuple[Array, list[Region], tuple[int, int], int | None]]:
    """For each plane: pixels, (first, count) of rows and columns, output size, and the byte outside (None: border)."""
    if len(others) != (1 if op.mode == "gray" else 2):
        raise InputError(f"RoiResize takes {'y and roi' if op.mode == 'gray' else 'y, uv and roi'}")
    *chroma, roi = others
    if y.ndim != 4 or y.shape[-1] != 1:
        raise InputError(f"y is [N, H, W, 1], not {y.shape}")
    if roi.shape != (y.shape[0], 4):
        raise InputError(f"roi is [N, 4] with a row for each picture, not {roi.shape} for {y.shape[0]} pictures")
    left, top, right, bottom = (jnp.clip(roi[:, i], -REACH, REACH) for i in range(4))
    fills: tuple[int | None, ...] = (None, None)
    if op.pad_mode == "constant":
        fills = tuple(v % 256 for v in op.pad_value)
    found = [(y, [region_of(top, bottom), region_of(left, right)], op.size, fills[0])]
    for uv in chroma:
        check_even(*y.shape[1:3])
        if uv.shape != (y.shape[0], y.shape[1] // 2, y.shape[2] // 2, 2):
            raise InputError(f"y {y.shape} needs chroma [N, H/2, W/2, 2], not {uv.shape}")
        half = [region_of(low >> 1, high >> 1) for low, high in ((top, bottom), (left, right))]
        found.append((uv, half, (op.size[0] // 2, op.size[1] // 2), fills[1]))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Integers


def _centred(pixels: Array, node_format: NodeFormat, target: Target, by: dict[str, Array]) -> Array:
    return rescale(widen(pixels) - CENTRE, Rescale(**by), node_format.output, target)


@eval_integer.register
def _(op: CentrePixels, node_format: NodeFormat, target: Target, x: Array, **by: Array) -> Array:
    return _centred(x, node_format, target, by)


@eval_integer.register
def _(op: Nv12ToCentredYuv444, node_format: NodeFormat, target: Target, y: Array, uv: Array, **by: Array) -> Array:
    return _centred(join_planes(y, uv), node_format, target, by)


@eval_integer.register
def _(op: RgbToCentredYuv444, node_format: NodeFormat, target: Target, x: Array, **by: Array) -> Array:
    return _centred(_yuv_pixels(op, x), node_format, target, by)


@eval_integer.register
def _(op: SwapChannels, node_format: NodeFormat, target: Target, x: Array) -> Array:
    return eval_float(op, x)  # only moves elements


@eval_integer.register
def _(op: RoiResize, node_format: NodeFormat, target: Target, y: Array, *others: Array, **by: Array) -> Array:
    form, nearest = target.resize, op.interpolation == "nearest"
    planes = []
    for plane, regions, size, fill in _planes(op, y, *others):
        rows, columns = (taps_of(r, out, form, nearest=nearest) for r, out in zip(regions, size, strict=True))
        planes.append(to_pixels(crop_resize(plane, rows, columns, form, fill)))
    return _centred(planes[0] if op.mode == "gray" else join_planes(*planes), node_format, target, by)


# ---------------------------------------------------------------------------------------------------------------------
# Lowering


@lower_op.register(CentrePixels)
@lower_op.register(Nv12ToCentredYuv444)
@lower_op.register(RgbToCentredYuv444)
@lower_op.register(RoiResize)
def _(
    op: CentrePixels | Nv12ToCentredYuv444 | RgbToCentredYuv444 | RoiResize,
    inputs: Sequence[Operand],
    output: Operand,
    params: dict[str, Any],
    target: Target,
) -> Lowered:
    """`unit` to the scale of the output: the identity where they are the same."""
    if isinstance(op, RoiResize):
        if target.resize.weight_bits > MAX_FRACTION_BITS:
            raise LoweringError(f"resize.weight_bits is above {MAX_FRACTION_BITS}, where a sum leaves int32")
        if max(n or 0 for n in inputs[0].shape) > REACH:
            raise LoweringError(f"a picture of {inputs[0].shape} has a side above {REACH}, beyond the coordinates")
    to_output = ratio(np.float32(op.unit), 1.0, output.scale, 1.0)
    by = rescale_of(to_output, bits=bit_width(output.dtype), narrow=True, form=target.rescale)
    return Lowered(by._asdict())


@lower_op.register
def _(op: SwapChannels, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    return Lowered({})


@constraints.register(CentrePixels)
@constraints.register(Nv12ToCentredYuv444)
@constraints.register(RgbToCentredYuv444)
@constraints.register(RoiResize)
def _(op: Op, inputs: Sequence[Operand], output: Operand, weight_dtype: str | None, target: Target) -> list[str]:
    ports = [port for port in op.ports if not (port == "uv" and isinstance(op, RoiResize) and op.mode == "gray")]
    found = []
    for port, operand in zip(ports, inputs, strict=False):
        needed = "int32" if port == "roi" else "uint8"
        if operand.dtype != needed:
            found.append(f"its {port} is {operand.dtype}; give the graph's Input the dtype {needed!r}: it is exact")
    return found


@to_channels_last.register
def _(op: SwapChannels, rank: int) -> Op:
    return replace(op, axis=channels_last_axis(op.axis, rank))
