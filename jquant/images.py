"""Colour spaces for training: what the hardware feeds a network that takes centred YUV, and what NV12 loses.

Pixels are integers in [0, 255], centred ones 128 less; a network sees centred / 128, so that its input takes
`jq.int8(scale=1 / 128)`. Section 8 of the specification; every function works inside jit and under vmap.

    x = images.rgb_to_centred_yuv444(pixels).astype(jnp.float32) / 128                 # [N, H, W, 3], in [-1, 1)
    x = images.rgb_to_nv12_to_centred_yuv444(pixels).astype(jnp.float32) / 128         # with the chroma that NV12 keeps
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from jquant.numerics import color
from jquant.numerics.color import Swing
from jquant.numerics.rounding import dequantize, divide, quantize
from jquant.types import Array, InputError

__all__ = [
    "bgr_to_centred_yuv444",
    "bgr_to_nv12",
    "bgr_to_nv12_to_centred_yuv444",
    "bgr_to_nv12_to_yuv444",
    "bgr_to_real_yuv444",
    "bgr_to_yuv444",
    "centred_yuv444_to_bgr",
    "centred_yuv444_to_rgb",
    "nv12_to_centred_yuv444",
    "rgb_to_centred_yuv444",
    "rgb_to_nv12",
    "rgb_to_nv12_to_centred_yuv444",
    "rgb_to_nv12_to_yuv444",
    "rgb_to_real_yuv444",
    "rgb_to_yuv444",
]

# ---------------------------------------------------------------------------------------------------------------------
# To YUV


def rgb_to_yuv444(rgb: Array, *, swing: Swing = "full", axis: int = -1) -> Array:
    """RGB pixels to YUV pixels, uint8.

    Args:
      rgb: integers in [0, 255], any shape with 3 along `axis`.
      swing: "full" has Y in [0, 255], "studio" (video) in [16, 235].
      axis: the channel axis, of the result as well.

    Raises:
      InputError: another shape or swing, or floats: `rgb_to_real_yuv444` takes these.
    """
    return _along(lambda x: color.to_pixels(color.rgb_to_yuv(x, swing)), _pixels(rgb, 3, axis), axis)


def bgr_to_yuv444(bgr: Array, *, swing: Swing = "full", axis: int = -1) -> Array:
    """`rgb_to_yuv444` of pixels in the order B, G, R; the result is in the order Y, U, V."""
    return rgb_to_yuv444(jnp.flip(_pixels(bgr, 3, axis), axis), swing=swing, axis=axis)


def rgb_to_centred_yuv444(rgb: Array, *, swing: Swing = "full", axis: int = -1) -> Array:
    """RGB pixels to centred YUV, int8: full swing has Y in [-128, 127], studio in [-112, 107]. See `rgb_to_yuv444`."""
    return color.centre(rgb_to_yuv444(rgb, swing=swing, axis=axis))


def bgr_to_centred_yuv444(bgr: Array, *, swing: Swing = "full", axis: int = -1) -> Array:
    """`rgb_to_centred_yuv444` of pixels in the order B, G, R."""
    return color.centre(bgr_to_yuv444(bgr, swing=swing, axis=axis))


def rgb_to_real_yuv444(rgb: Array, *, swing: Swing = "full", axis: int = -1, rounded: bool = True) -> Array:
    """The differentiable conversion: real pixels in [0, 255], float32, to centred / 128, in [-1, 1).

    For integers it is exactly `rgb_to_centred_yuv444` / 128; the gradient is that of the linear map (straight-through).
    With `rounded` False, nothing is rounded.
    """
    if rgb.dtype != jnp.float32:
        raise InputError(f"pixels are {rgb.dtype}; convert them to float32, or use the exact rgb_to_centred_yuv444")
    _check_channels(rgb, 3, axis)
    return _along(lambda x: color.rgb_to_real_yuv(x, swing, rounded=rounded), rgb, axis)


def bgr_to_real_yuv444(bgr: Array, *, swing: Swing = "full", axis: int = -1, rounded: bool = True) -> Array:
    """`rgb_to_real_yuv444` of pixels in the order B, G, R."""
    return rgb_to_real_yuv444(jnp.flip(bgr, axis), swing=swing, axis=axis, rounded=rounded)


# ---------------------------------------------------------------------------------------------------------------------
# And back


def centred_yuv444_to_rgb(
    yuv: Array,
    *,
    swing: Swing = "full",
    mean: float | Sequence[float] = 128.0,
    std: float | Sequence[float] = 128.0,
    q_scale: float | None = 1 / 128,
    axis: int = -1,
) -> Array:
    """(rgb - mean) / std of centred YUV, float32.

    Args:
      yuv: centred, in [-128, 127]: integers or float32, any shape with 3 along `axis`.
      mean, std: in pixels, one number or one for each of R, G, B. RGB is not clamped to [0, 255].
      q_scale: real per LSB; the result is rounded to the int8 grid of that scale. None: not rounded, differentiable.
    """
    _check_channels(yuv, 3, axis)

    def convert(x: Array) -> Array:
        rgb = color.centred_yuv_to_rgb(x.astype(jnp.float32), swing)
        y = divide(rgb - np.asarray(mean, np.float32), jnp.asarray(std, jnp.float32))
        return y if q_scale is None else dequantize(quantize(y, jnp.float32(q_scale), "int8"), jnp.float32(q_scale))

    return _along(convert, yuv, axis)


def centred_yuv444_to_bgr(
    yuv: Array,
    *,
    swing: Swing = "full",
    mean: float | Sequence[float] = 128.0,
    std: float | Sequence[float] = 128.0,
    q_scale: float | None = 1 / 128,
    axis: int = -1,
) -> Array:
    """`centred_yuv444_to_rgb` with the result, `mean` and `std` in the order B, G, R."""
    mean, std = (v if isinstance(v, int | float) else tuple(v)[::-1] for v in (mean, std))
    rgb = centred_yuv444_to_rgb(yuv, swing=swing, mean=mean, std=std, q_scale=q_scale, axis=axis)
    return jnp.flip(rgb, axis)


# ---------------------------------------------------------------------------------------------------------------------
# NV12: full luma, one pair of chroma values for 2x2 pixels


def rgb_to_nv12(rgb: Array, *, swing: Swing = "full", axis: int = -1) -> tuple[Array, Array]:
    """RGB pictures to NV12, chroma averaged over 2x2 pixels, half up.

    Args:
      rgb: integers in [0, 255], [..., H, W, 3] where `axis` is -1; the other two of the last three axes are H and W.

    Returns:
      (y [..., H, W, 1], uv [..., H/2, W/2, 2]), uint8.

    Raises:
      InputError: an odd height or width, another shape, or floats.
    """
    yuv = jnp.moveaxis(rgb_to_yuv444(rgb, swing=swing, axis=axis), axis, -1)
    if yuv.ndim < 3:
        raise InputError(f"a picture has a height, a width and 3 channels; the shape is {rgb.shape}")
    color.check_even(*yuv.shape[-3:-1])
    return yuv[..., :1], color.to_pixels(color.halve(yuv[..., 1:]))


def bgr_to_nv12(bgr: Array, *, swing: Swing = "full", axis: int = -1) -> tuple[Array, Array]:
    """`rgb_to_nv12` of pixels in the order B, G, R."""
    return rgb_to_nv12(jnp.flip(bgr, axis), swing=swing, axis=axis)


def nv12_to_centred_yuv444(y: Array, uv: Array) -> Array:
    """What the pyramid input gives a network: chroma is repeated, 128 is subtracted from everything.

    y [..., H, W, 1] and uv [..., H/2, W/2, 2], uint8, to int8 [..., H, W, 3].
    """
    return color.centre(color.join_planes(_pixels(y, 1, -1), _pixels(uv, 2, -1)))


def rgb_to_nv12_to_yuv444(rgb: Array, *, swing: Swing = "full", axis: int = -1) -> Array:
    """RGB pictures to YUV pixels with the chroma that NV12 keeps, uint8, channels along `axis`: see `rgb_to_nv12`."""
    return jnp.moveaxis(color.join_planes(*rgb_to_nv12(rgb, swing=swing, axis=axis)), -1, axis)


def bgr_to_nv12_to_yuv444(bgr: Array, *, swing: Swing = "full", axis: int = -1) -> Array:
    """`rgb_to_nv12_to_yuv444` of pixels in the order B, G, R."""
    return rgb_to_nv12_to_yuv444(jnp.flip(bgr, axis), swing=swing, axis=axis)


def rgb_to_nv12_to_centred_yuv444(rgb: Array, *, swing: Swing = "full", axis: int = -1) -> Array:
    """`rgb_to_nv12_to_yuv444`, centred, int8: what a network sees of an RGB picture behind an NV12 input."""
    return color.centre(rgb_to_nv12_to_yuv444(rgb, swing=swing, axis=axis))


def bgr_to_nv12_to_centred_yuv444(bgr: Array, *, swing: Swing = "full", axis: int = -1) -> Array:
    """`rgb_to_nv12_to_centred_yuv444` of pixels in the order B, G, R."""
    return color.centre(bgr_to_nv12_to_yuv444(bgr, swing=swing, axis=axis))


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def _along(convert: Callable[[Array], Array], x: Array, axis: int) -> Array:
    return jnp.moveaxis(convert(jnp.moveaxis(x, axis, -1)), -1, axis)


def _pixels(x: Array, channels: int, axis: int) -> Array:
    """The array, if it is of integers with that many channels."""
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise InputError(
            f"pixels are {x.dtype}; the exact conversions take integers in [0, 255], such as uint8; for float32 there "
            "is rgb_to_real_yuv444"
        )
    _check_channels(x, channels, axis)
    return jnp.asarray(x)


def _check_channels(x: Array, channels: int, axis: int) -> None:
    if not -x.ndim <= axis < x.ndim or x.shape[axis] != channels:
        raise InputError(f"shape {tuple(x.shape)} needs {channels} channels along axis {axis}")
