"""Pooling of regions at sampled points: roi_align, section 7 of the specification.

Boxes are coordinates like those of a grid: int16 at a scale of their own, turned into pixels with F fraction bits by
one multiply-add-shift. The float boxes of the specification are what is quantized to them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jquant.graph.operator import (
    Lowered,
    Operand,
    check_roles,
    constraints,
    eval_float,
    eval_integer,
    lower_op,
    to_channels_last,
)
from jquant.numerics.resample import Line, coordinate_bits, inside_border, line_of, on_line, points_between
from jquant.numerics.rescale import Rescale, ratio, rescale, rescale_of
from jquant.numerics.rounding import widen
from jquant.ops.grid_sampling import Corners, gather
from jquant.types import Array, GraphError, NodeFormat, Op, Target, bit_width


@dataclass(frozen=True, kw_only=True)
class RoiAlign(Op):
    """The mean of `sampling_ratio`^2 bilinear samples in each bin of every box: torchvision's roi_align.

    Operands: x [N, C, H, W]; boxes [K, 5] = (image, x1, y1, x2, y2), or [K, 4] without the first, all on image 0.
    Box coordinates times `spatial_scale` are pixels of x. Result [K, C, *output_size].
    """

    layout: ClassVar = "spatial"
    ports: ClassVar = ("x", "boxes")
    scale_rule: ClassVar = "same_as_input"
    needs_stats: ClassVar = False

    output_size: tuple[int, int]
    spatial_scale: float = 1.0
    sampling_ratio: int = 2
    aligned: bool = False
    channels_last: bool = False

    def __post_init__(self) -> None:
        if self.sampling_ratio < 1:
            raise GraphError("RoiAlign needs a fixed number of samples; give sampling_ratio, 2 is usual")
        if min(self.output_size) < 1 or self.spatial_scale <= 0:
            raise GraphError(f"RoiAlign to {self.output_size} by {self.spatial_scale}: all must be positive")


def _counts(op: RoiAlign) -> tuple[int, int]:
    """Sample points along (y, x) of a box."""
    return op.output_size[0] * op.sampling_ratio, op.output_size[1] * op.sampling_ratio


def _sum_bins(op: RoiAlign, x: Array, image: Array, rows: Corners, columns: Corners) -> Array:
    """The sum over the samples of each bin, [K, *output_size, C].

    x [N, H, W, C]; image [K]; along each axis a list of (index, weight), both [K, samples].
    """
    n, h, w, c = x.shape
    k, r = image.shape[0], op.sampling_ratio
    tall = x.reshape(1, n * h, w, c)
    rows = [((index + (image * h)[:, None])[None, :, :, None], weight[None, :, :, None]) for index, weight in rows]
    columns = [(index[None, :, None, :], weight[None, :, None, :]) for index, weight in columns]
    samples = gather(tall, rows, columns)[0]  # [K, samples y, samples x, C]
    out_h, out_w = op.output_size
    return samples.reshape(k, out_h, r, out_w, r, c).sum((2, 4))


def _to_last(op: RoiAlign, x: Array) -> Array:
    return x if op.channels_last else jnp.moveaxis(x, 1, -1)


def _back(op: RoiAlign, y: Array) -> Array:
    return y if op.channels_last else jnp.moveaxis(y, -1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Float


def _float_corners(start: Array, end: Array, count: int, n: int, aligned: bool) -> Corners:
    length = end - start if aligned else jnp.maximum(end - start, 1.0)
    fraction = jnp.asarray((np.arange(count) + 0.5) / count, jnp.float32)
    at = start[:, None] + length[:, None] * fraction
    near = (at >= -1) & (at <= n)
    at = jnp.clip(at, 0, n - 1)
    below = jax.lax.stop_gradient(jnp.floor(at))
    index = jnp.clip(below.astype(jnp.int32), 0, n - 1)  # as an integer, for NaN
    low, high = jnp.where(near, 1 - (at - below), 0.0), jnp.where(near, at - below, 0.0)
    return [(index, low), (jnp.minimum(index + 1, n - 1), high)]


@eval_float.register
def _(op: RoiAlign, x: Array, boxes: Array) -> Array:
    if x.ndim != 4 or boxes.ndim != 2 or boxes.shape[1] not in (4, 5):
        raise GraphError(f"x must be [N, C, H, W] and boxes [K, 4] or [K, 5], not {x.shape} and {boxes.shape}")
    x = _to_last(op, x)
    image = jnp.zeros(boxes.shape[0], jnp.int32)
    if boxes.shape[1] == 5:
        image = jnp.clip(jnp.round(jax.lax.stop_gradient(boxes[:, 0])).astype(jnp.int32), 0, x.shape[0] - 1)
    x1, y1, x2, y2 = jnp.moveaxis(boxes[:, -4:] * op.spatial_scale - (0.5 if op.aligned else 0.0), 1, 0)
    count_y, count_x = _counts(op)
    rows = _float_corners(y1, y2, count_y, x.shape[1], op.aligned)
    columns = _float_corners(x1, x2, count_x, x.shape[2], op.aligned)
    return _back(op, _sum_bins(op, x, image, rows, columns) / op.sampling_ratio**2)


# ---------------------------------------------------------------------------------------------------------------------
# Integers


def _sides(op: RoiAlign, shape: Sequence[int | None]) -> tuple[int, int]:
    h, w = shape[1:3] if op.channels_last else shape[2:4]
    assert h is not None
    assert w is not None
    return h, w


@lower_op.register
def _(op: RoiAlign, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    x, boxes = inputs
    form = target.grid
    bits = coordinate_bits(form, *_sides(op, x.shape))
    line = line_of(ratio(boxes.scale, op.spatial_scale, 1.0, 2.0**-bits), -1 if op.aligned else 0, bits, form)
    image = rescale_of(ratio(boxes.scale, 1.0, 1.0, 1.0), bits=16, narrow=True, form=target.rescale)
    share = ratio(1.0, 2.0 ** (-2 * bits), op.sampling_ratio**2, 1.0)
    mean = rescale_of(share, bits=bit_width(output.dtype), form=target.rescale)
    return Lowered(
        {**line._asdict(), **mean._asdict(), **{f"image_{role}": v for role, v in image._asdict().items()}},
        worst_case=op.sampling_ratio**2 << (7 + 2 * bits),
    )


@eval_integer.register
def _(op: RoiAlign, node_format: NodeFormat, target: Target, x: Array, boxes: Array, **constants: Array) -> Array:
    x = _to_last(op, x)
    n, h, w, _ = x.shape
    check_roles(constants, *Line._fields, *Rescale._fields, *(f"image_{role}" for role in Rescale._fields))
    form = target.grid
    bits = coordinate_bits(form, h, w)
    image = jnp.zeros(boxes.shape[0], jnp.int32)
    if boxes.shape[1] == 5:
        by = Rescale(*(constants[f"image_{role}"] for role in Rescale._fields))
        image = jnp.clip(widen(rescale(widen(boxes[:, 0]), by, "int16", target)), 0, n - 1)
    line = Line(*(constants[r] for r in Line._fields))
    x1, y1, x2, y2 = jnp.moveaxis(on_line(boxes[:, -4:], line, form), 1, 0)
    least = None if op.aligned else 1 << bits
    count_y, count_x = _counts(op)
    rows = inside_border(points_between(y1, y2, count_y, form, least=least), h, bits, form)
    columns = inside_border(points_between(x1, x2, count_x, form, least=least), w, bits, form)
    mean = Rescale(*(constants[role] for role in Rescale._fields))
    total = _sum_bins(op, x, image, rows, columns)
    return _back(op, rescale(total, mean, node_format.output, target, average=True))


@constraints.register
def _(op: RoiAlign, inputs: Sequence[Operand], output: Operand, weight_dtype: str | None, target: Target) -> list[str]:
    x, boxes = (operand.dtype for operand in inputs)
    found = []
    if x not in ("int8", "float"):
        found.append(f"its data is {x}, and roi_align takes int8; give it Policy(input={{'x': jq.int8()}})")
    if boxes not in ("int16", "float"):
        found.append(f"its boxes are {boxes}, and coordinates need int16: jq.templates.grid_int16(graph)")
    bits = target.grid.max_fraction_bits
    most = isqrt(2 ** (31 - 7 - 2 * bits))  # a side of a bin, of int8 times weights
    if op.sampling_ratio > most:
        found.append(f"sampling_ratio {op.sampling_ratio} is above {most}, where the sum leaves int32")
    return found


@to_channels_last.register
def _(op: RoiAlign, rank: int) -> Op:
    return replace(op, channels_last=True)
