"""Colour spaces of pictures in exact integers: section 8 of the specification. Channels are the last axis.

A pixel is in [0, 255], a centred one 128 less. Everything here is int32 between storage types.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jquant.numerics.rounding import saturate, shift_right, widen
from jquant.types import Array, InputError

Swing = Literal["full", "studio"]

CENTRE = 128  # the pixel that a centred 0 stands for

# Rows Y, U, V over (R, G, B), in 1/256, and what is added to them; ITU-R BT.601.
_TO_YUV: dict[str, tuple[tuple[int, int, int], ...]] = {
    "full": ((77, 150, 29), (-43, -84, 127), (127, -106, -21)),
    "studio": ((66, 129, 25), (-38, -74, 112), (112, -94, -18)),
}
_OFFSET = {"full": (0, 128, 128), "studio": (16, 128, 128)}

# Rows R, G, B over centred (Y, U, V), and the pixel that a centred 0 becomes in each.
_TO_RGB: dict[str, tuple[tuple[float, float, float], ...]] = {
    "full": ((1.0, 0.0, 1.402), (1.0, -0.3441, -0.7141), (1.0, 1.772, 0.0)),
    "studio": ((1.164, 0.0, 1.596), (1.164, -0.392, -0.812), (1.164, 2.016, 0.0)),
}
_RGB_AT_CENTRE = {"full": 128.0, "studio": 112 * 1.164}


def check_swing(swing: str) -> str:
    """`swing`, if it is one."""
    if swing not in _TO_YUV:
        raise InputError(f"swing must be 'full' (Y in [0, 255]) or 'studio' (Y in [16, 235]), not {swing!r}")
    return swing


def rgb_to_yuv(rgb: Array, swing: str) -> Array:
    """Pixels [..., 3] to (Y, U, V) pixels, int32: rsh(M @ rgb, 8) + offset."""
    matrix, offset = _TO_YUV[check_swing(swing)], _OFFSET[swing]
    r, g, b = (widen(rgb[..., i]) for i in range(3))
    totals = jnp.stack([m[0] * r + m[1] * g + m[2] * b for m in matrix], axis=-1)
    return shift_right(totals, jnp.int32(8), "half_up") + np.array(offset, np.int32)


def rgb_to_real_yuv(rgb: Array, swing: str, *, rounded: bool) -> Array:
    """Pixels [..., 3], real, to centred YUV / 128. `rounded`: on the integers of `rgb_to_yuv`, straight-through."""
    matrix, offset = np.array(_TO_YUV[check_swing(swing)], np.float32), np.array(_OFFSET[swing], np.float32)
    # A sum of products, not a matrix product: an accelerator may run that in less than float32. Exact for integers.
    total = rgb[..., :1] * matrix[:, 0] + rgb[..., 1:2] * matrix[:, 1] + rgb[..., 2:] * matrix[:, 2]
    exact = total / 256
    if rounded:
        exact = exact + jax.lax.stop_gradient(jnp.floor((total + 128) / 256) - exact)
    return (exact + offset - CENTRE) / 128


def rgb_matrix(swing: str) -> tuple[np.ndarray, float]:
    """(matrix [3, 3], offset) of centred YUV to RGB pixels, float64: rgb = matrix @ yuv + offset."""
    return np.array(_TO_RGB[check_swing(swing)]), _RGB_AT_CENTRE[swing]


def centred_yuv_to_rgb(yuv: Array, swing: str) -> Array:
    """Centred (Y, U, V) [..., 3], float32, to RGB pixels, not clamped."""
    matrix, offset = rgb_matrix(swing)
    m = matrix.astype(np.float32)
    return yuv[..., :1] * m[:, 0] + yuv[..., 1:2] * m[:, 1] + yuv[..., 2:] * m[:, 2] + np.float32(offset)


def centre(pixels: Array) -> Array:
    """Pixels in [0, 255] to int8: 128 less."""
    return saturate(widen(pixels) - CENTRE, "int8")


def to_pixels(v: Array) -> Array:
    """int32 to uint8, clamped to [0, 255]."""
    return jnp.clip(v, 0, 255).astype(jnp.uint8)


def halve(plane: Array) -> Array:
    """The mean of every 2x2 block, half up: [..., H, W, C] -> [..., H/2, W/2, C], int32."""
    h, w, c = plane.shape[-3:]
    blocks = widen(plane).reshape(*plane.shape[:-3], h // 2, 2, w // 2, 2, c)
    return shift_right(blocks.sum((-4, -2)), jnp.int32(2), "half_up")


def double(plane: Array) -> Array:
    """Every pixel as a 2x2 block: [..., H, W, C] -> [..., 2H, 2W, C]."""
    return jnp.repeat(jnp.repeat(plane, 2, axis=-3), 2, axis=-2)


def check_even(height: int, width: int) -> None:
    """NV12 has one pair of chroma values for 2x2 pixels.

    Raises:
      InputError: an odd side.
    """
    if height % 2 or width % 2:
        raise InputError(
            f"NV12 needs an even height and width, not {height} x {width}: it keeps one U and V for 2x2 pixels; "
            "crop or pad the picture to even sides"
        )


def join_planes(y: Array, uv: Array) -> Array:
    """NV12 planes y [..., H, W, 1] and uv [..., H/2, W/2, 2] as [..., H, W, 3], chroma repeated.

    Raises:
      InputError: planes that do not belong together.
    """
    if y.ndim < 3 or uv.ndim != y.ndim or y.shape[-1] != 1 or uv.shape[-1] != 2:
        raise InputError(f"NV12 planes are y [..., H, W, 1] and uv [..., H/2, W/2, 2], not {y.shape} and {uv.shape}")
    check_even(*y.shape[-3:-1])
    if y.shape[-3:-1] != (2 * uv.shape[-3], 2 * uv.shape[-2]):
        raise InputError(f"y {y.shape} needs chroma of half its height and width, not {uv.shape}")
    return jnp.concatenate([y, double(uv)], axis=-1)
