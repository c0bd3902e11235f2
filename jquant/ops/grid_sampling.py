"""Sampling at computed coordinates: grid_sample and warp, section 7 of the specification.

The integers work on absolute coordinates: pixels with F fraction bits, F from the sizes alone. `x` is gathered with its
channels last, one row a corner.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jquant.graph.operator import Lowered, Operand, constraints, eval_float, eval_integer, lower_op, to_channels_last
from jquant.numerics.namespace import array_namespace
from jquant.numerics.resample import Line, coordinate_bits, displaced, line_of, neighbours, on_line, round_weighted
from jquant.numerics.rescale import Rescale, leaves_int32, ratio, rescale, rescale_of, rescale_unsaturated
from jquant.numerics.rounding import widen
from jquant.ops.grid import base_grid, denormalize_grid
from jquant.types import Array, GraphError, GridFormat, NodeFormat, Op, Target, integer_range

Mode = Literal["bilinear", "nearest"]
Padding = Literal["zeros", "border"]
Corners = list[tuple[Array, Array]]  # along one axis: (index in [0, n), weight), each [N, Ho, Wo]


@dataclass(frozen=True, kw_only=True)
class GridSample(Op):
    """The values of x [N, C, H, W] at the coordinates of a grid [N, Ho, Wo, 2], order (x, y).

    "normalized": torch's grid_sample. "absolute": pixels, 0 at the centre of the first one; `align_corners` has no
    meaning. The grid keeps its order where `channels_last` is set, and a batch of one serves all images.
    """

    ports: ClassVar = ("x", "grid")
    scale_rule: ClassVar = "same_as_input"
    needs_stats: ClassVar = False

    mode: Mode = "bilinear"
    padding: Padding = "zeros"
    align_corners: bool = False
    coordinates: Literal["normalized", "absolute"] = "normalized"
    channels_last: bool = False


@dataclass(frozen=True, kw_only=True)
class Warp(Op):
    """The values of x [N, C, H, W] at every pixel displaced by flow [N, 2, Ho, Wo], in pixels, channels (x, y)."""

    layout: ClassVar = "spatial"
    ports: ClassVar = ("x", "flow")
    scale_rule: ClassVar = "same_as_input"
    needs_stats: ClassVar = False

    mode: Mode = "bilinear"
    padding: Padding = "zeros"
    channels_last: bool = False


# ---------------------------------------------------------------------------------------------------------------------
# Gathering


def gather(x: Array, y_corners: Corners, x_corners: Corners) -> Array:
    """Sums weight * pixel over the corners, with x [N, H, W, C] widened to the type of the weights; [N, Ho, Wo, C]."""
    n, h, w, c = x.shape
    flat = x.reshape(n, h * w, c)
    total = None
    for row, row_weight in y_corners:
        for column, column_weight in x_corners:
            index, weight = row * w + column, (row_weight * column_weight)[..., None]
            pixels = jax.vmap(lambda image, at: image.at[at].get(mode="promise_in_bounds"))(
                flat, jnp.broadcast_to(index, (n, *index.shape[1:]))
            )
            term = pixels.astype(weight.dtype) * weight
            total = term if total is None else total + term
    assert total is not None
    return total


def _to_last(op: GridSample | Warp, x: Array) -> Array:
    return x if op.channels_last else jnp.moveaxis(x, 1, -1)


def _back(op: GridSample | Warp, y: Array) -> Array:
    return y if op.channels_last else jnp.moveaxis(y, -1, 1)


def _float_corners(at: Array, n: int, op: GridSample | Warp) -> Corners:
    """`neighbours` for real coordinates. What lies far outside is brought near, where it is still outside."""
    at = jnp.clip(at, -2, n + 1)
    if op.mode == "nearest":
        met = [(jnp.round(at), jnp.ones_like(at))]
    else:
        below = jnp.floor(at)
        met = [(below, 1 - (at - below)), (below + 1, at - below)]
    kept = []
    for index, weight in met:
        if op.padding == "zeros":
            weight = jnp.where((index >= 0) & (index < n), weight, 0.0)
        whole = jax.lax.stop_gradient(index).astype(jnp.int32)  # clipped as an integer, for NaN
        kept.append((jnp.clip(whole, 0, n - 1), weight))
    return kept


def _sample_float(op: GridSample | Warp, x: Array, grid: Array) -> Array:
    """x [N, H, W, C], grid [N, Ho, Wo, 2] absolute."""
    return gather(x, _float_corners(grid[..., 1], x.shape[1], op), _float_corners(grid[..., 0], x.shape[2], op))


def _sample_integer(op: GridSample | Warp, form: GridFormat, x: Array, grid: Array, bits: int, dtype: str) -> Array:
    """x [N, H, W, C], grid [N, Ho, Wo, 2] absolute int32 with `bits` fraction bits."""
    nearest, border = op.mode == "nearest", op.padding == "border"
    rows = neighbours(grid[..., 1], x.shape[1], bits, form, nearest=nearest, border=border)
    columns = neighbours(grid[..., 0], x.shape[2], bits, form, nearest=nearest, border=border)
    return round_weighted(gather(x, rows, columns), bits, dtype, form.rounding)


# ---------------------------------------------------------------------------------------------------------------------
# Grid sample


@eval_float.register
def _(op: GridSample, x: Array, grid: Array) -> Array:
    if x.ndim != 4 or grid.ndim != 4 or grid.shape[-1] != 2:
        raise GraphError(f"x must be [N, C, H, W] and grid [N, Ho, Wo, 2], not {x.shape} and {grid.shape}")
    x = _to_last(op, x)
    if op.coordinates == "normalized":
        grid = denormalize_grid(grid, (x.shape[1], x.shape[2]), align_corners=op.align_corners)
    return _back(op, _sample_float(op, x, grid))


def _sides(op: GridSample | Warp, shape: Sequence[int | None]) -> tuple[int, int]:
    """(H, W) of an operand or of the result; only the batch can be unknown."""
    h, w = shape[1:3] if op.channels_last else shape[2:4]
    assert h is not None
    assert w is not None
    return h, w


@lower_op.register
def _(op: GridSample, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    x, grid = inputs
    h, w = _sides(op, x.shape)
    form = target.grid
    bits = coordinate_bits(form, h, w, *_sides(op, output.shape))
    if op.coordinates == "absolute":
        return Lowered(_to_pixels(grid, bits, target)._asdict(), worst_case=_worst_case(x, bits))
    xp = array_namespace(grid.scale)
    scales = xp.broadcast_to(grid.scale, (2,))
    axes = zip(scales, (w, h), strict=True)
    lines = [_normalized_line(scale, n, bits, op.align_corners, form) for scale, n in axes]
    both = Line(*(xp.stack(v) for v in zip(*lines, strict=True)))
    return Lowered(both._asdict(), worst_case=_worst_case(x, bits))


def _worst_case(x: Operand, bits: int) -> int:
    """Of the sum of products; 2^31, for int16 with 8 fraction bits, is only reached as -2^31."""
    return -integer_range(x.dtype)[0] << (2 * bits)


def _to_pixels(coordinates: Operand, bits: int, target: Target) -> Rescale:
    """From the scale of absolute coordinates or of a flow to 2^-bits: the identity where it is that already."""
    to_pixels = ratio(coordinates.scale, 1.0, 2.0**-bits, 1.0)
    return rescale_of(to_pixels, bits=16, narrow=True, form=target.rescale)


def _normalized_line(scale: Array, n: int, bits: int, align_corners: bool, form: GridFormat) -> Line:
    """Normalized coordinates at a scale, on n pixels, to absolute ones: q * scale * span / 2 + (n - 1) / 2."""
    span = n - 1 if align_corners else n
    return line_of(ratio(scale, float(span), 2.0, 2.0**-bits) if span else None, n - 1, bits, form)


@eval_integer.register
def _(op: GridSample, node_format: NodeFormat, target: Target, x: Array, grid: Array, **constants: Array) -> Array:
    x = _to_last(op, x)
    bits = coordinate_bits(target.grid, *x.shape[1:3], *grid.shape[1:3])
    if op.coordinates == "absolute":
        at = widen(rescale(widen(grid), Rescale(**constants), "int16", target))
    else:
        at = on_line(grid, Line(**constants), target.grid)
    return _back(op, _sample_integer(op, target.grid, x, at, bits, node_format.output))


# ---------------------------------------------------------------------------------------------------------------------
# Warp


@eval_float.register
def _(op: Warp, x: Array, flow: Array) -> Array:
    x, flow = _to_last(op, x), _to_last(op, flow)
    if x.ndim != 4 or flow.ndim != 4 or flow.shape[-1] != 2:
        raise GraphError("x must be [N, C, H, W] and flow [N, 2, Ho, Wo], with the displacements (x, y) as channels")
    return _back(op, _sample_float(op, x, base_grid((flow.shape[1], flow.shape[2])) + flow))


@lower_op.register
def _(op: Warp, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    x, flow = inputs
    bits = coordinate_bits(target.grid, *_sides(op, x.shape), *_sides(op, output.shape))
    return Lowered(_to_pixels(flow, bits, target)._asdict(), worst_case=_worst_case(x, bits))


@eval_integer.register
def _(op: Warp, node_format: NodeFormat, target: Target, x: Array, flow: Array, **by: Array) -> Array:
    x, flow = _to_last(op, x), _to_last(op, flow)
    bits = coordinate_bits(target.grid, *x.shape[1:3], *flow.shape[1:3])
    offset = rescale_unsaturated(widen(flow), Rescale(**by), target, bits=16)  # one sum before saturation
    if leaves_int32(target.rescale):  # coordinates are below 2^15: beyond 2^17 every sum saturates, and none may wrap
        offset = jnp.clip(offset, -(2**17), 2**17)
    at = displaced(offset, (flow.shape[1], flow.shape[2]), bits)
    return _back(op, _sample_integer(op, target.grid, x, at, bits, node_format.output))


# ---------------------------------------------------------------------------------------------------------------------
# Limits and layout


@constraints.register(GridSample)
@constraints.register(Warp)
def _(
    op: GridSample | Warp, inputs: Sequence[Operand], output: Operand, weight_dtype: str | None, target: Target
) -> list[str]:
    port, coordinates = op.ports[1], inputs[1].dtype
    found = []
    if coordinates not in ("int16", "float"):
        found.append(
            f"its {port} is {coordinates}, and coordinates need int16; "
            f"jq.templates.grid_int16(graph) gives the rules for the nodes that make it; or give this one "
            f"Policy(input={{{port!r}: jq.int16()}})"
        )
    longest = max(*_sides(op, inputs[0].shape), *_sides(op, output.shape))
    reach = 2**target.grid.coordinate_bits - 1
    if longest > reach:
        found.append(f"a side of {longest} pixels is beyond what a coordinate reaches, {reach}")
    return found


@to_channels_last.register
def _(op: Warp, rank: int) -> Op:
    return replace(op, channels_last=True)
