"""Operators as functions, for anyone's model: what `lax` would shred into many primitives.

They are plain jitted functions of arrays with the float meaning of the operator, differentiable, and work under every
transformation. `jq.trace` finds the operator again, since the jit carries it. Images are [N, H, W, C], as in JAX;
`channels_last=False` takes [N, C, H, W].
"""

import json
from functools import partial
from typing import Any, Literal

import jax
from jax.ad_checkpoint import checkpoint_name

from jquant.graph.operator import eval_float
from jquant.graph.serialize import decode, encode
from jquant.numerics.color import Swing
from jquant.ops.grid import AffineGrid
from jquant.ops.grid_sampling import GridSample, Mode, Padding, Warp
from jquant.ops.image import Nv12ToCentredYuv444, RgbToCentredYuv444
from jquant.ops.regions import RoiAlign
from jquant.ops.resample import Interpolate
from jquant.ops.shuffle import ChannelShuffle, PixelShuffle, PixelUnshuffle
from jquant.types import Array, FormatError, InputError, Op

NAME = "jquant_operator"  # of the jit in a jaxpr


@partial(jax.jit, static_argnums=0)
def jquant_operator(op: Op, *operands: Array) -> Array:
    """The float meaning of an operator, under a name that `trace` knows; the operator is in the name of an operand."""
    first, *rest = operands
    return eval_float(op, checkpoint_name(first, json.dumps(encode(op))), *rest)


def carried_operator(jaxpr: Any) -> Op | None:
    """The operator that a jaxpr of `jquant_operator` carries."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "name":
            try:
                found: Op = decode(Op, json.loads(equation.params["name"]))
            except (ValueError, FormatError):
                return None
            return found
    return None


def grid_sample(
    x: Array,
    grid: Array,
    *,
    mode: Mode = "bilinear",
    padding: Padding = "zeros",
    align_corners: bool = False,
    coordinates: Literal["normalized", "absolute"] = "normalized",
    channels_last: bool = True,
) -> Array:
    """The values of images at the coordinates of a grid [N, Ho, Wo, 2], order (x, y).

    "normalized" is torch's grid_sample; "absolute" takes pixels, (0, 0) at the centre of the first one, as the vendor's
    does. `jq.ops.normalize_grid` and `denormalize_grid` convert.

    Raises:
      InputError: other coordinates, mode or padding.

    Example:
      >>> import jax.numpy as jnp
      >>> from jquant.ops import grid_sample
      >>> grid_sample(jnp.arange(4.0).reshape(1, 2, 2, 1), jnp.zeros((1, 1, 1, 2))).item()
      1.5
    """
    for name, value, known in (
        ("coordinates", coordinates, ("normalized", "absolute")),
        ("mode", mode, ("bilinear", "nearest")),
        ("padding", padding, ("zeros", "border")),
    ):
        if value not in known:
            raise InputError(f"{name} {value!r}; known: {', '.join(known)}")
    op = GridSample(
        mode=mode, padding=padding, align_corners=align_corners, coordinates=coordinates, channels_last=channels_last
    )
    return jquant_operator(op, x, grid)


def warp(
    x: Array, flow: Array, *, mode: Mode = "bilinear", padding: Padding = "zeros", channels_last: bool = True
) -> Array:
    """The values of images at every pixel displaced by a flow, in pixels, [N, Ho, Wo, 2] (or [N, 2, Ho, Wo])."""
    return jquant_operator(Warp(mode=mode, padding=padding, channels_last=channels_last), x, flow)


def affine_grid(theta: Array, size: tuple[int, int], *, align_corners: bool = False) -> Array:
    """The normalized grid [N, *size, 2] of affine maps [N, 2, 3]: torch's affine_grid."""
    return jquant_operator(AffineGrid(size=size, align_corners=align_corners), theta)


def interpolate(
    x: Array,
    *,
    size: tuple[int, ...] | None = None,
    scale_factor: tuple[float, ...] | None = None,
    mode: Any = "bilinear",
    align_corners: bool = False,
    channels_last: bool = True,
) -> Array:
    """Resizes the spatial axes to `size`, or by a factor for each: torch's interpolate."""
    op = Interpolate(
        size=size, scale_factor=scale_factor, mode=mode, align_corners=align_corners, channels_last=channels_last
    )
    return jquant_operator(op, x)


def pixel_shuffle(x: Array, factor: int, *, channels_last: bool = True) -> Array:
    """Channels to space: [N, H, W, C * r * r] to [N, H * r, W * r, C], channel c * r * r + i * r + j to (i, j)."""
    return jquant_operator(PixelShuffle(factor=factor, channels_last=channels_last), x)


def pixel_unshuffle(x: Array, factor: int, *, channels_last: bool = True) -> Array:
    """Space to channels: the inverse of `pixel_shuffle`."""
    return jquant_operator(PixelUnshuffle(factor=factor, channels_last=channels_last), x)


def channel_shuffle(x: Array, groups: int, *, channels_last: bool = True) -> Array:
    """Channel i * C / groups + j becomes channel j * groups + i."""
    return jquant_operator(ChannelShuffle(groups=groups, channels_last=channels_last), x)


def roi_align(
    x: Array,
    boxes: Array,
    output_size: tuple[int, int],
    *,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 2,
    aligned: bool = False,
    channels_last: bool = True,
) -> Array:
    """Averages of images [N, H, W, C] over boxes [R, 5] (image, x0, y0, x1, y1): torchvision's roi_align."""
    op = RoiAlign(
        output_size=output_size,
        spatial_scale=spatial_scale,
        sampling_ratio=sampling_ratio,
        aligned=aligned,
        channels_last=channels_last,
    )
    return jquant_operator(op, x, boxes)


def nv12_to_centred_yuv444(y: Array, uv: Array, *, unit: float = 1.0) -> Array:
    """What a pyramid input gives a network, real: y [N, H, W, 1] and uv [N, H/2, W/2, 2], uint8, to [N, H, W, 3]."""
    return jquant_operator(Nv12ToCentredYuv444(unit=unit), y, uv)


def rgb_to_centred_yuv444(rgb: Array, *, swing: Swing = "full", unit: float = 1.0) -> Array:
    """RGB pixels [..., 3], uint8, to centred YUV times `unit`, real: 1 / 128 for a network that is trained on [-1, 1).

    The integers are those of `jq.images.rgb_to_centred_yuv444`; at an output scale of `unit` they are what a program
    computes with.

    Example:
      >>> import jax.numpy as jnp
      >>> from jquant.ops import rgb_to_centred_yuv444
      >>> rgb_to_centred_yuv444(jnp.array([[255, 255, 255], [0, 0, 255]], jnp.uint8)).tolist()
      [[127.0, 0.0, 0.0], [-99.0, 127.0, -21.0]]
    """
    return jquant_operator(RgbToCentredYuv444(swing=swing, unit=unit), rgb)


def bgr_to_centred_yuv444(bgr: Array, *, swing: Swing = "full", unit: float = 1.0) -> Array:
    """`rgb_to_centred_yuv444` of pixels in the order B, G, R; the result is in the order Y, U, V."""
    return jquant_operator(RgbToCentredYuv444(swing=swing, order="bgr", unit=unit), bgr)
