"""Resizing and sampling: nash-arithmetic section 7.

Inside, every image is [N, H, W, C] and every grid [N, Ho, Wo, 2] in the order (x, y). A sampled value is the sum of
products of an integer weight and a pixel over the pixels that a coordinate meets, shifted back once.
"""

import math
from collections.abc import Iterator
from fractions import Fraction
from itertools import product

import numpy as np

from jquant.reference.arithmetic import rescale, rescale_unsaturated, round_shift, rounded, saturate
from jquant.reference.call import Call, channels_back, channels_to_last
from jquant.types import GraphError, GridFormat, ResizeFormat, Target

# ---------------------------------------------------------------------------------------------------------------------
# Interpolation


def interpolate(call: Call) -> np.ndarray:
    """Every pixel's coordinate in fraction bits, clamped to the image; weights cut to bits of their own."""
    op, form = call.op, call.target.resize
    places, bits = form.step_bits, form.weight_bits
    x = channels_to_last(call.operands[0], op.channels_last)
    sizes = x.shape[1:-1]
    if op.mode != "bilinear" and form.nearest_index == "exact":
        for i, n in enumerate(sizes):
            x = np.take(x, nearest_pixels(op, i, n), axis=i + 1)
        return channels_back(x, op.channels_last)
    axes = [axis_coordinates(op, i, n, form) for i, n in enumerate(sizes)]
    if op.mode != "bilinear":
        for axis, at in enumerate(axes, start=1):
            x = np.take(x, at >> places, axis=axis)
        return channels_back(x, op.channels_last)
    total = np.zeros((x.shape[0], *(len(at) for at in axes), x.shape[-1]), np.int64)
    for corner in product((0, 1), repeat=len(sizes)):
        term = x
        for axis, (step, at, n) in enumerate(zip(corner, axes, sizes, strict=True), start=1):
            fraction = round_shift(at % 2**places, places - bits, form.weight_rounding)
            weight = fraction if step else 2**bits - fraction
            shape = [-1 if a == axis else 1 for a in range(x.ndim)]
            term = np.take(term, np.minimum((at >> places) + step, n - 1), axis=axis) * weight.reshape(shape)
        total += term
    total = round_shift(total, len(sizes) * bits, form.rounding)
    return channels_back(saturate(total, call.format.output), op.channels_last)


def nearest_pixels(op, i: int, n: int) -> list[int]:
    """The pixel of each output along spatial axis i of n pixels, by torch's rule: floor(i * step) of a float32 product.

    The step is the float32 nearest to 1 / factor, or the float32 quotient of the sizes; `nearest-exact` adds 1/2 to i.
    """
    out = op.size[i] if op.size else math.floor(n * op.scale_factor[i])
    by_size = not op.scale_factor or op.recompute_scale_factor
    by_size = by_size or (op.mode == "nearest" and len(op.scale_factor) == 2 and out in (n, 2 * n))
    step = np.float32(n) / np.float32(out) if by_size else np.float32(1.0 / op.scale_factor[i])
    shift = np.float32(0.5 if op.mode == "nearest-exact" else 0)
    return [min(math.floor((np.float32(k) + shift) * step), n - 1) for k in range(out)]


def axis_coordinates(op, i: int, n: int, form: ResizeFormat) -> np.ndarray:
    """The coordinates of spatial axis i with n pixels: i * step + offset, in fraction bits, clamped to the image."""
    out = op.size[i] if op.size else math.floor(n * op.scale_factor[i])
    step = Fraction(n, out)
    planar = op.mode == "nearest" and op.scale_factor and len(op.scale_factor) == 2
    kept = (out == n and op.mode == "bilinear") or (planar and out in (n, 2 * n))  # as torch has it
    if op.scale_factor and not op.recompute_scale_factor and not kept:
        step = 1 / Fraction(op.scale_factor[i])
    if op.align_corners:
        step = Fraction(n - 1, out - 1) if out > 1 else Fraction(0)
    if op.mode == "bilinear":
        centred = not op.align_corners and op.coordinates == "half_pixel"
        offset = step / 2 - Fraction(1, 2) if centred else Fraction(0)
    else:  # floor(i * step) or floor((i + 1/2) * step), moved up by as much as the rounded steps can fall short
        offset = (step / 2 if op.mode == "nearest-exact" else 0) + Fraction(out + 1, 2 ** (form.step_bits + 1))
    fixed_step, fixed_offset = (rounded(v * 2**form.step_bits, form.step_rounding) for v in (step, offset))
    return np.clip(np.arange(out) * fixed_step + fixed_offset, 0, (n - 1) << form.step_bits)


# ---------------------------------------------------------------------------------------------------------------------
# Coordinates


def coordinate_bits(target: Target, *sides: int) -> int:
    """F = clip(15 - ceil(log2(max(sides) + 1)), 0, 8), the fraction bits of absolute coordinates; both are fields."""
    ceil_log2 = 0
    while 2**ceil_log2 < max(sides) + 1:
        ceil_log2 += 1
    return min(max(target.grid.coordinate_bits - ceil_log2, 0), target.grid.max_fraction_bits)


def line_constants(slope: Fraction, offset: Fraction, form: GridFormat) -> tuple[int, int, int]:
    """(a, b, k) of slope * g + offset as (a * g + b) >> k: a below 2^map_bits, and the largest such k.

    Where the shift rounds half up, its half is part of b.
    """
    limit, rounding = 2**form.map_bits, form.map_constant_rounding
    for k in range(form.max_map_shift, -1, -1):
        if (a := rounded(slope * 2**k, rounding)) < limit:
            break
    half = 2 ** (k - 1) if k and form.map_rounding == "half_up" else 0
    return min(a, limit - 1), rounded(offset * 2**k, rounding) + half, k


def normalized_constants(
    scale: float, n: int, bits: int, align_corners: bool, form: GridFormat
) -> tuple[int, int, int]:
    """`line_constants` of normalized coordinates at `scale` to absolute ones with `bits` fraction bits, on n pixels."""
    span = n - 1 if align_corners else n
    return line_constants(Fraction(float(scale)) * span / 2 * 2**bits, Fraction(n - 1, 2) * 2**bits, form)


def on_line(g: np.ndarray, call: Call) -> np.ndarray:
    """Absolute coordinates (a * g + b) >> k, in int16."""
    rounding = call.target.grid.map_rounding
    a, b, k = (call.constants[role] for role in ("multiplier", "offset", "shift"))
    acc = a * g + b
    if (np.abs(acc) >= 2**31).any():
        raise GraphError("a coordinate map left int32")
    return saturate(acc >> k if rounding == "half_up" else round_shift(acc, k, rounding), "int16")


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def met_pixels(
    at: np.ndarray, n: int, bits: int, mode: str, padding: str, form: GridFormat
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (index in [0, n), weight) for the pixels that coordinates meet along an axis of n."""
    if padding == "border":
        at = np.clip(at, 0, (n - 1) << bits)
    if mode == "nearest":
        met = [(round_shift(at, bits, form.nearest_rounding), np.full_like(at, 2**bits))]
    else:
        fraction = at % 2**bits
        met = [(at // 2**bits, 2**bits - fraction), (at // 2**bits + 1, fraction)]
    for index, weight in met:
        yield np.clip(index, 0, n - 1), np.where((index < 0) | (index >= n), 0, weight)


def sample(call: Call, x: np.ndarray, grid: np.ndarray, bits: int) -> np.ndarray:
    """y = sat(rsh(sum of weight products, 2 * bits)) at the absolute coordinates of an integer grid."""
    images = np.arange(len(x))[:, None, None]
    total = np.zeros((len(x), *grid.shape[1:3], x.shape[-1]), np.int64)
    form = call.target.grid
    options = bits, call.op.mode, call.op.padding, form
    for row, row_weight in met_pixels(grid[..., 1], x.shape[1], *options):
        for column, column_weight in met_pixels(grid[..., 0], x.shape[2], *options):
            total += x[images, row, column] * (row_weight * column_weight)[..., None]
    total = round_shift(total, 2 * bits, form.rounding)
    return channels_back(saturate(total, call.format.output), call.op.channels_last)


def grid_sample(call: Call) -> np.ndarray:
    """A normalized grid goes through one multiply-add-shift an axis; an absolute one through section 3 to 2^-F."""
    x, grid = channels_to_last(call.operands[0], call.op.channels_last), call.operands[1]
    bits = coordinate_bits(call.target, *x.shape[1:3], *grid.shape[1:3])
    if call.op.coordinates == "normalized":
        return sample(call, x, on_line(grid, call), bits)
    mantissa, pre, post = (call.constants[role] for role in ("mantissa", "pre", "post"))
    return sample(call, x, rescale(grid, mantissa, pre, post, "int16", call.target), bits)


def warp(call: Call) -> np.ndarray:
    """Base grid plus flow, in 2^-F pixels, saturated to int16 once."""
    x, flow = (channels_to_last(operand, call.op.channels_last) for operand in call.operands)
    height, width = flow.shape[1:3]
    bits = coordinate_bits(call.target, *x.shape[1:3], height, width)
    mantissa, pre, post = (call.constants[role] for role in ("mantissa", "pre", "post"))
    base = np.zeros((height, width, 2), np.int64)
    base[..., 0], base[..., 1] = np.arange(width), np.arange(height)[:, None]
    grid = base * 2**bits + rescale_unsaturated(flow, mantissa, pre, post, call.target)
    return sample(call, x, saturate(grid, "int16"), bits)


def affine_grid(call: Call) -> np.ndarray:
    """Products of theta [N, 2, 3] with (x, y, 1) in fraction bits, summed exactly and rescaled."""
    (theta,), (height, width), form = call.operands, call.op.size, call.target.grid
    one = 2**form.affine_bits

    def axis(n: int) -> np.ndarray:
        spans = max(n - 1, 1) if call.op.align_corners else n
        return np.array([rounded(Fraction(2 * i + 1 - n, spans) * one, form.affine_rounding) for i in range(n)])

    base = np.full((height, width, 3), one, np.int64)
    base[..., 0], base[..., 1] = axis(width), axis(height)[:, None]
    return call.rescaled(np.einsum("hwk,nik->nhwi", base, theta))


# ---------------------------------------------------------------------------------------------------------------------
# Regions


def roi_align(call: Call) -> np.ndarray:
    """Box by box: sample points, the exact sum of bilinear samples of every bin, the mean as section 5's."""
    op, (_, boxes) = call.op, call.operands
    x = channels_to_last(call.operands[0], op.channels_last)
    _, height, width, channels = x.shape
    bits, ratio = coordinate_bits(call.target, height, width), op.sampling_ratio
    totals = np.zeros((len(boxes), *op.output_size, channels), np.int64)
    for k, box in enumerate(boxes):
        image = x[image_index(call, box, len(x))]
        x1, y1, x2, y2 = (int(v) for v in on_line(box[-4:], call))
        for i, j in np.ndindex(*op.output_size):
            ys = [sample_point(call, y1, y2, op.output_size[0], i * ratio + s, bits) for s in range(ratio)]
            xs = [sample_point(call, x1, x2, op.output_size[1], j * ratio + s, bits) for s in range(ratio)]
            totals[k, i, j] = sum(region_sample(image, y, x, bits) for y, x in product(ys, xs))
    return channels_back(call.rescaled(totals, average=True), op.channels_last)


def image_index(call: Call, box: np.ndarray, images: int) -> int:
    if len(box) == 4:
        return 0
    mantissa, pre, post = (call.constants[f"image_{role}"] for role in ("mantissa", "pre", "post"))
    return int(np.clip(rescale(box[0], mantissa, pre, post, "int16", call.target), 0, images - 1))


def sample_point(call: Call, start: int, end: int, bins: int, i: int, bits: int) -> int:
    """The i-th of bins * sampling_ratio points, at the centres of equal parts of a side cut at some fraction bits."""
    op, form = call.op, call.target.grid
    length = end - start if op.aligned else max(end - start, 2**bits)
    centre = Fraction(2 * i + 1, 2 * bins * op.sampling_ratio) * 2**form.point_bits
    product = length * rounded(centre, form.point_fraction_rounding)
    return start + int(round_shift(product, form.point_bits, form.point_rounding))


def region_sample(image: np.ndarray, y: int, x: int, bits: int) -> np.ndarray:
    """The four products at a point; the border pixel up to one pixel outside the image, zero beyond."""
    height, width, channels = image.shape
    one = 2**bits
    if not (-one <= y <= height * one and -one <= x <= width * one):
        return np.zeros(channels, np.int64)
    y, x = min(max(y, 0), (height - 1) * one), min(max(x, 0), (width - 1) * one)
    (top, fy), (left, fx) = divmod(y, one), divmod(x, one)
    low, right = min(top + 1, height - 1), min(left + 1, width - 1)
    upper = image[top, left] * (one - fx) + image[top, right] * fx
    lower = image[low, left] * (one - fx) + image[low, right] * fx
    return upper * (one - fy) + lower * fy
