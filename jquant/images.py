"""Colour spaces for training: what the hardware feeds a network that takes centred YUV, and what NV12 loses.

Pixels are integers in [0, 255], centred ones 128 less; a network sees centred / 128, so that its input takes
`jq.int8(scale=1 / 128)`. Section 8 of the specification; every function works inside jit and under vmap. Pictures are
arrays of numpy or JAX, torch tensors of the CPU, pictures of PIL (of the mode RGB) or nested lists.

    x = images.rgb_to_centred_yuv444(pixels).astype(jnp.float32) / 128                 # [N, H, W, 3], in [-1, 1)
    x = images.rgb_to_nv12_to_centred_yuv444(pixels).astype(jnp.float32) / 128         # with the chroma that NV12 keeps

The factors are those of the specification, in 1/256. No library has the same bytes: `docs/images.md` says how far
OpenCV, Pillow and PyAV are from each function, and which of their conversions mean something else.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jquant.graph.evaluate import host_array
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
    "split_nv12",
]

# ---------------------------------------------------------------------------------------------------------------------
# To YUV


def rgb_to_yuv444(rgb: Array, *, swing: Swing = "full", axis: int = -1) -> Array:
    """RGB pixels to YUV pixels, uint8.

    "full" is within 1 (Y) and 2 (U, V) of Pillow's `convert("YCbCr")`, of OpenCV's `COLOR_RGB2YCrCb` (whose order is
    Y, V, U) and of PyAV's "yuvj444p"; "studio" within 1 of PyAV's "yuv444p". OpenCV's `COLOR_RGB2YUV` has other
    factors, up to 25 away.

    Args:
      rgb: integers in [0, 255], any shape with 3 along `axis`, or a picture of PIL.
      swing: "full" has Y in [0, 255], "studio" (video) in [16, 235].
      axis: the channel axis, of the result as well.

    Raises:
      InputError: another shape or swing, numbers outside of [0, 255], a PIL picture of another mode, or floats:
        `rgb_to_real_yuv444` takes these.

    Example:
      >>> from jquant import images
      >>> images.rgb_to_yuv444([[255, 0, 0], [255, 255, 255]]).tolist()
      [[77, 85, 255], [255, 128, 128]]
    """
    return _along(lambda x: color.to_pixels(color.rgb_to_yuv(x, swing)), _pixels(rgb, 3, axis), axis)


def bgr_to_yuv444(bgr: Array, *, swing: Swing = "full", axis: int = -1) -> Array:
    """`rgb_to_yuv444` of pixels in the order B, G, R; the result is in the order Y, U, V."""
    return rgb_to_yuv444(jnp.flip(_pixels(bgr, 3, axis, order="BGR"), axis), swing=swing, axis=axis)


def rgb_to_centred_yuv444(rgb: Array, *, swing: Swing = "full", axis: int = -1) -> Array:
    """RGB pixels to centred YUV, int8: full swing has Y in [-128, 127], studio in [-112, 107]. See `rgb_to_yuv444`."""
    return color.centre(rgb_to_yuv444(rgb, swing=swing, axis=axis))


def bgr_to_centred_yuv444(bgr: Array, *, swing: Swing = "full", axis: int = -1) -> Array:
    """`rgb_to_centred_yuv444` of pixels in the order B, G, R."""
    return color.centre(bgr_to_yuv444(bgr, swing=swing, axis=axis))


def rgb_to_real_yuv444(
    rgb: Array, *, swing: Swing = "full", axis: int = -1, rounded: bool = True, scale: float | None = None
) -> Array:
    """The differentiable conversion: real pixels in [0, 255], float32, to centred / 128, in [-1, 1).

    For integers it is exactly `rgb_to_centred_yuv444` / 128; the gradient is that of the linear map (straight-through).

    Args:
      rgb: float32, any shape with 3 along `axis`.
      swing, axis: as for `rgb_to_yuv444`.
      rounded: False rounds nothing.
      scale: what makes pixels in [0, 255] of the values: 255 for pixels / 255, as torchvision's ToTensor gives them.
        None takes 1, and refuses values that all lie in [0, 1]; inside jit, where values are not known, it does not.

    Raises:
      InputError: another shape, dtype or swing, or pixels that seem to be divided by 255.

    Example:
      >>> import jax.numpy as jnp
      >>> from jquant import images
      >>> x = jnp.array([255.0, 128.0, 0.0])
      >>> bool((images.rgb_to_real_yuv444(x / 255, scale=255) == images.rgb_to_real_yuv444(x)).all())
      True
    """
    rgb = _given(rgb)
    if rgb.dtype != jnp.float32:
        raise InputError(f"pixels are {rgb.dtype}; convert them to float32, or use the exact rgb_to_centred_yuv444")
    _check_channels(rgb, 3, axis)
    if scale is None:
        _refuse_small(rgb, "pixels", "[0, 255]", "they seem to be pixels / 255: pass scale=255, or scale=1 if not")
    elif scale != 1:
        rgb = _scaled(rgb, scale, rounded)
    return _along(lambda x: color.rgb_to_real_yuv(x, swing, rounded=rounded), rgb, axis)


def bgr_to_real_yuv444(
    bgr: Array, *, swing: Swing = "full", axis: int = -1, rounded: bool = True, scale: float | None = None
) -> Array:
    """`rgb_to_real_yuv444` of pixels in the order B, G, R."""
    bgr = _given(bgr, order="BGR")
    _check_channels(bgr, 3, axis)
    return rgb_to_real_yuv444(jnp.flip(bgr, axis), swing=swing, axis=axis, rounded=rounded, scale=scale)


def _scaled(pixels: Array, scale: float, rounded: bool) -> Array:
    """Pixels times a scale; a whole number that the division before has missed by a few ulp is that number again."""
    if not (np.isfinite(scale) and scale > 0):
        raise InputError(f"scale must be positive and finite, such as 255, not {scale!r}")
    value = pixels * jnp.float32(scale)
    if not rounded:
        return value
    whole = jnp.round(value)
    near = jnp.abs(value - whole) <= 2.0**-14  # 4 ulp of 255
    return value + jax.lax.stop_gradient(jnp.where(near, whole - value, 0.0))


def _refuse_small(x: Array, what: str, wanted: str, remedy: str) -> None:
    """Raises InputError for concrete floats that all lie in [-1, 1], where pixels were meant. 0 is the same in both."""
    if isinstance(x, jax.core.Tracer) or x.size == 0:
        return
    peak = float(np.abs(np.asarray(x)).max())
    if 0 < peak <= 1:
        raise InputError(f"{what} reach {peak:g} only, and {wanted} is expected; {remedy}")


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

    Rounded and clamped to pixels, "studio" is within 1 of OpenCV's `COLOR_YUV2RGB_NV12` and of PyAV's "yuv444p" where Y
    is in [16, 235] and U and V in [16, 240], and "full" within 1 of Pillow's YCbCr, of OpenCV's `COLOR_YCrCb2RGB` and
    of PyAV's "yuvj444p". PyAV's library, swscale, decodes the white of NV12 (235, 128, 128) to 253, and interpolates
    chroma.

    Args:
      yuv: centred, in [-128, 127]: integers or float32, any shape with 3 along `axis`. Floats that all lie in [-1, 1]
        are refused outside of jit: what a network takes is centred / 128.
      mean, std: in pixels, one number or one for each of R, G, B. RGB is not clamped to [0, 255].
      q_scale: real per LSB; the result is rounded to the int8 grid of that scale. None: not rounded, differentiable.
    """
    yuv = _given(yuv, order="centred YUV")
    _check_channels(yuv, 3, axis)
    if jnp.issubdtype(yuv.dtype, jnp.floating):
        _refuse_small(yuv, "values", "centred YUV in [-128, 127]", "if they are centred / 128, multiply them by 128")

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

    With "studio", Y is within 1 of OpenCV's `COLOR_RGB2YUV_I420` and of PyAV's "nv12". The chroma of OpenCV is that of
    the top-left pixel of each 2x2 block, and PyAV's (swscale) is filtered over four rows: both differ from the mean
    by tens of steps at edges.

    Args:
      rgb: integers in [0, 255], [..., H, W, 3] where `axis` is -1; the other two of the last three axes are H and W.

    Returns:
      (y [..., H, W, 1], uv [..., H/2, W/2, 2]), uint8.

    Raises:
      InputError: an odd height or width, another shape, or floats.
    """
    yuv = jnp.moveaxis(rgb_to_yuv444(rgb, swing=swing, axis=axis), axis, -1)
    if yuv.ndim < 3:
        raise InputError(f"a picture has a height, a width and 3 channels; the shape is {yuv.shape}")
    color.check_even(*yuv.shape[-3:-1])
    return yuv[..., :1], color.to_pixels(color.halve(yuv[..., 1:]))


def bgr_to_nv12(bgr: Array, *, swing: Swing = "full", axis: int = -1) -> tuple[Array, Array]:
    """`rgb_to_nv12` of pixels in the order B, G, R."""
    return rgb_to_nv12(jnp.flip(_pixels(bgr, 3, axis, order="BGR"), axis), swing=swing, axis=axis)


def split_nv12(nv12: Array) -> tuple[Array, Array]:
    """The planes of NV12 in one array, as PyAV's `frame.to_ndarray(format="nv12")` gives it.

    OpenCV reads the same layout (`COLOR_YUV2RGB_NV12`), and writes I420 only, whose U and V are apart: that has the
    same shape, and is not this.

    Args:
      nv12: uint8 [..., 3H/2, W]: H rows of Y, then H/2 rows of U and V in turn.

    Returns:
      (y [..., H, W, 1], uv [..., H/2, W/2, 2]), the inputs of a program behind `jq.program.insert_image_convert`.

    Raises:
      InputError: another shape or dtype.

    Example:
      >>> import numpy as np
      >>> from jquant import images
      >>> y, uv = images.split_nv12(np.arange(12, dtype=np.uint8).reshape(3, 4))
      >>> y[..., 0].tolist(), uv.tolist()
      ([[0, 1, 2, 3], [4, 5, 6, 7]], [[[8, 9], [10, 11]]])
    """
    nv12 = _given(nv12, order="NV12")
    if nv12.dtype != jnp.uint8:
        raise InputError(f"NV12 is {nv12.dtype}, not uint8")
    if nv12.ndim < 2 or nv12.shape[-2] % 3 or nv12.shape[-1] % 2:
        raise InputError(
            f"NV12 in one plane is [..., 3H/2, W] of even H and W, not {tuple(nv12.shape)}; planes of their own are "
            "y [..., H, W, 1] and uv [..., H/2, W/2, 2]"
        )
    height = nv12.shape[-2] * 2 // 3
    uv = nv12[..., height:, :]
    return nv12[..., :height, :, None], uv.reshape(*uv.shape[:-1], uv.shape[-1] // 2, 2)


def nv12_to_centred_yuv444(y: Array, uv: Array | None = None) -> Array:
    """What the pyramid input gives a network: chroma is repeated, 128 is subtracted from everything.

    Args:
      y: uint8 [..., H, W, 1]; or both planes in one, [..., 3H/2, W], as `split_nv12` takes it.
      uv: uint8 [..., H/2, W/2, 2].

    Returns:
      int8 [..., H, W, 3].

    Raises:
      InputError: planes that do not belong together, or another dtype.
    """
    if uv is None:
        y, uv = split_nv12(y)
    return color.centre(color.join_planes(_pixels(y, 1, -1, order="NV12"), _pixels(uv, 2, -1, order="NV12")))


def rgb_to_nv12_to_yuv444(rgb: Array, *, swing: Swing = "full", axis: int = -1) -> Array:
    """RGB pictures to YUV pixels with the chroma that NV12 keeps, uint8, channels along `axis`: see `rgb_to_nv12`."""
    return jnp.moveaxis(color.join_planes(*rgb_to_nv12(rgb, swing=swing, axis=axis)), -1, axis)


def bgr_to_nv12_to_yuv444(bgr: Array, *, swing: Swing = "full", axis: int = -1) -> Array:
    """`rgb_to_nv12_to_yuv444` of pixels in the order B, G, R."""
    return rgb_to_nv12_to_yuv444(jnp.flip(_pixels(bgr, 3, axis, order="BGR"), axis), swing=swing, axis=axis)


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


def _given(x: Any, *, order: str = "RGB") -> Any:
    """An array of what callers have: a picture of PIL, nested lists, a torch tensor of the CPU.

    Raises:
      InputError: a PIL picture in another order or mode, lists of unequal lengths, numbers outside of [0, 255].
    """
    if isinstance(x, jax.Array):
        return x
    mode = getattr(x, "mode", None)
    if isinstance(mode, str) and hasattr(x, "__array_interface__"):
        if order != "RGB":
            raise InputError(f"a picture of PIL is RGB, and {order} is expected; use the function whose name has rgb")
        if mode != "RGB":
            raise InputError(f"the picture of PIL has the mode {mode!r}; give picture.convert('RGB')")
        return np.asarray(x)
    x = host_array(x, "the picture")
    if isinstance(x, np.ndarray | jax.Array):
        return x
    try:
        array = np.asarray(x)
    except (ValueError, TypeError) as error:
        raise InputError(f"a {type(x).__name__} that is no picture: {error}") from error
    if array.dtype.kind not in "iuf":
        raise InputError(f"pixels are a {type(x).__name__} of {array.dtype}; give an array of numbers")
    return array.astype(np.float32) if array.dtype == np.float64 else array  # numbers of Python


def _pixels(x: Any, channels: int, axis: int, *, order: str = "RGB") -> Array:
    """The array, if it is of integers in [0, 255] with that many channels."""
    x = _given(x, order=order)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise InputError(
            f"pixels are {x.dtype}; the exact conversions take integers in [0, 255], such as uint8; for float32 there "
            "is rgb_to_real_yuv444"
        )
    _check_channels(x, channels, axis)
    if isinstance(x, np.ndarray) and x.dtype != np.uint8 and x.size and (x.min() < 0 or x.max() > 255):
        raise InputError(f"pixels lie in [{x.min()}, {x.max()}], and [0, 255] is expected")
    return jnp.asarray(x)


def _check_channels(x: Array, channels: int, axis: int) -> None:
    if not -x.ndim <= axis < x.ndim or x.shape[axis] != channels:
        raise InputError(f"shape {tuple(x.shape)} needs {channels} channels along axis {axis}")
