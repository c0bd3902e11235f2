"""Pictures: nash-arithmetic section 8, with the interpolation of section 7. Channels are the last axis.

`yuv444` and the functions after it take and give int64; the rules below them are the operators.
"""

from fractions import Fraction

import numpy as np

from jquant.reference.arithmetic import round_shift, rounded
from jquant.reference.call import Call
from jquant.types import GraphError, ResizeFormat

STUDIO = (np.array([[66, 129, 25], [-38, -74, 112], [112, -94, -18]]), np.array([16, 128, 128]))
FULL = (np.array([[77, 150, 29], [-43, -84, 127], [127, -106, -21]]), np.array([0, 128, 128]))


def yuv444(rgb: np.ndarray, swing: str) -> np.ndarray:
    """((M @ rgb + 128) >> 8) + offset."""
    matrix, offset = {"studio": STUDIO, "full": FULL}[swing]
    return ((np.asarray(rgb, np.int64) @ matrix.T + 128) >> 8) + offset


def centred_yuv444(rgb: np.ndarray, swing: str) -> np.ndarray:
    return yuv444(rgb, swing) - 128


def nv12(rgb: np.ndarray, swing: str) -> tuple[np.ndarray, np.ndarray]:
    """(y [..., H, W, 1], uv [..., H/2, W/2, 2]): the mean of four chroma pixels, half up."""
    yuv = yuv444(rgb, swing)
    chroma = yuv[..., 1:]
    blocks = np.stack([chroma[..., row::2, column::2, :] for row in (0, 1) for column in (0, 1)])
    return yuv[..., :1], (2 * blocks.sum(0) + 4) // 8


def join_planes(y: np.ndarray, uv: np.ndarray) -> np.ndarray:
    """Chroma pixel (i // 2, j // 2) beside luma pixel (i, j)."""
    rows, columns = np.arange(y.shape[-3]) // 2, np.arange(y.shape[-2]) // 2
    return np.concatenate([y, uv[..., rows[:, None], columns, :]], axis=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Operators


def centre_pixels(call: Call) -> np.ndarray:
    """Minus 128, then from the operator's unit to the scale of the output."""
    return call.rescaled(call.operands[0] - 128)


def nv12_to_centred_yuv444(call: Call) -> np.ndarray:
    y, uv = call.operands
    return call.rescaled(join_planes(y, uv) - 128)


def rgb_to_centred_yuv444(call: Call) -> np.ndarray:
    (pixels,) = call.operands
    rgb = pixels if call.op.order == "rgb" else pixels[..., [2, 1, 0]]
    return call.rescaled(np.clip(yuv444(rgb, call.op.swing), 0, 255) - 128)


def swap_channels(call: Call) -> np.ndarray:
    (x,) = call.operands
    last = x.shape[call.op.axis] - 1
    return np.take(x, np.arange(last, -1, -1), axis=call.op.axis)


def roi_resize(call: Call) -> np.ndarray:
    """Every picture's crop is cut out, padding included, and interpolated as in section 7."""
    op, (y, *chroma, regions) = call.op, call.operands
    pictures = []
    for i, (left, top, right, bottom) in enumerate(np.clip(regions, -(2**14) + 1, 2**14 - 1).tolist()):
        picture = resized_crop(call, y[i], (top, bottom), (left, right), op.size, op.pad_value[0])
        if op.mode == "nv12":
            half = op.size[0] // 2, op.size[1] // 2
            rows, columns = (top // 2, bottom // 2), (left // 2, right // 2)
            uv = resized_crop(call, chroma[0][i], rows, columns, half, op.pad_value[1])
            picture = join_planes(picture, uv)
        pictures.append(picture)
    return call.rescaled(np.stack(pictures) - 128)


def resized_crop(call: Call, plane: np.ndarray, rows, columns, size, pad: int) -> np.ndarray:
    """Pixels [H, W, C]: rows and columns (first, last), both included, to size."""
    if plane.min(initial=0) < 0:
        raise GraphError("pixels are in [0, 255]")
    crop = plane
    for axis, (first, last) in enumerate((rows, columns)):
        index = np.arange(first, max(first, last) + 1)
        inside = (index >= 0) & (index < plane.shape[axis])
        crop = np.take(crop, np.clip(index, 0, plane.shape[axis] - 1), axis=axis)
        if call.op.pad_mode == "constant":
            shape = [-1 if a == axis else 1 for a in range(3)]
            crop = np.where(inside.reshape(shape), crop, pad % 256)
    return interpolated(call, crop, size)


def interpolated(call: Call, crop: np.ndarray, size) -> np.ndarray:
    form = call.target.resize
    places, bits = form.step_bits, form.weight_bits
    axes = [coordinates(n, out, call.op.interpolation, form) for n, out in zip(crop.shape[:2], size, strict=True)]
    if call.op.interpolation == "nearest":
        return crop[np.ix_(axes[0] >> places, axes[1] >> places)]
    total = 0
    for down in (0, 1):
        for right in (0, 1):
            index, weights = [], []
            for at, step, n in zip(axes, (down, right), crop.shape[:2], strict=True):
                fraction = round_shift(at % 2**places, places - bits, form.weight_rounding)
                index.append(np.minimum(at // 2**places + step, n - 1))
                weights.append(fraction if step else 2**bits - fraction)
            total = total + crop[np.ix_(*index)] * np.multiply.outer(*weights)[..., None]
    return np.clip(round_shift(total, 2 * bits, form.rounding), 0, 255)


def coordinates(n: int, out: int, interpolation: str, form: ResizeFormat) -> np.ndarray:
    """Positions on a crop of n pixels, in fraction bits, clamped to it: half-pixel centres, or starts (nearest)."""
    step, one = Fraction(n, out), 2**form.step_bits
    offset = Fraction(out + 1, 2 * one) if interpolation == "nearest" else step / 2 - Fraction(1, 2)
    step_fixed, offset_fixed = (rounded(v * one, form.step_rounding) for v in (step, offset))
    return np.clip(np.arange(out) * step_fixed + offset_fixed, 0, (n - 1) * one)
