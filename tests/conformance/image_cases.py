"""Picture inputs, and every colour: section 8."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from conformance.harness import Case, Row

import jquant as jq
from jquant import images, ops
from jquant.program.insert.parity import YUV_LOSS
from jquant.reference.images import centred_yuv444

PYRAMID = {"shapes": ((10, 14, 1), (5, 7, 2)), "inputs": ("uint8", "uint8")}
RESIZER = {"shapes": ((18, 22, 1), (9, 11, 2), (4,)), "inputs": ("uint8", "uint8", "index:22")}
FINE = jq.targets.NASH_E.with_fields({"resize.weight_bits": 11})


def resizers() -> Iterator[Case]:
    for interpolation in ("bilinear", "nearest"):
        for pad_mode in ("constant", "border"):
            op = ops.RoiResize(size=(12, 10), interpolation=interpolation, pad_mode=pad_mode)
            yield Case(op=op, output_scale=1.0, **RESIZER)
            yield Case(op=op, output_scale=1.0, target=FINE, **RESIZER)
    far = {**RESIZER, "inputs": ("uint8", "uint8", "index:40")}  # beyond the picture
    yield Case(op=ops.RoiResize(size=(6, 30), pad_value=(77, -3)), output="int16", output_scale=0.01, **far)
    yield Case(op=ops.RoiResize(size=(6, 30), pad_mode="border", unit=1 / 128), **far)
    gray = {"shapes": ((17, 21, 1), (4,)), "inputs": ("uint8", "index:40")}
    yield Case(op=ops.RoiResize(size=(9, 7), mode="gray"), output_scale=1.0, **gray)


PIXELS = {"shapes": ((6, 7, 3),), "inputs": ("uint8",)}
CASES = (
    Case(op=ops.CentrePixels(), shapes=((6, 7, 1),), inputs=("uint8",), output_scale=1.0),
    Case(op=ops.CentrePixels(unit=1 / 128), shapes=((6, 7, 3),), inputs=("uint8",), output="int16"),
    Case(op=ops.Nv12ToCentredYuv444(), output_scale=1.0, **PYRAMID),
    Case(op=ops.Nv12ToCentredYuv444(unit=1 / 128), **PYRAMID),
    Case(op=ops.RgbToCentredYuv444(), shapes=((6, 7, 3),), inputs=("uint8",), output_scale=1.0),
    Case(
        op=ops.RgbToCentredYuv444(swing="studio", order="bgr"), shapes=((6, 7, 3),), inputs=("uint8",), output="int16"
    ),
    Case(op=ops.SwapChannels(axis=1), shapes=((3, 6, 7),)),
    Case(op=ops.SwapChannels(), shapes=((6, 7, 3),), inputs=("int16",), output="int16"),
    *resizers(),
)


def all_colours(step: int = 16) -> Iterator[np.ndarray]:
    """All 2^24 RGB colours, in parts of `step` values of red: [step * 65536, 3], uint8."""
    for first in range(0, 256, step):
        red, rest = np.arange(first, first + step), np.arange(256)
        yield np.stack(np.meshgrid(red, rest, rest, indexing="ij"), axis=-1).reshape(-1, 3).astype(np.uint8)


def every_colour() -> Iterator[Row]:
    """The integer conversion of every colour against the reference; the note has the range that it reaches."""
    for swing in ("full", "studio"):
        convert = jax.jit(partial(images.rgb_to_centred_yuv444, swing=swing))
        count, wrong, low, high = 0, 0, np.full(3, 999), np.full(3, -999)
        for colours in all_colours():
            fast, slow = np.asarray(convert(jnp.asarray(colours))), centred_yuv444(colours, swing)
            count, wrong = count + slow.size, wrong + int((fast != slow).sum())
            low, high = np.minimum(low, slow.min(0)), np.maximum(high, slow.max(0))
        note = ", ".join(f"{c} {a}..{b}" for c, a, b in zip("YUV", low, high, strict=True))
        yield Row(f"rgb_to_centred_yuv444 {swing}", "uint8 -> int8", count, wrong, note)


def every_colour_back() -> Iterator[Row]:
    """How far RGB is, in pixels, behind YUV 4:4:4 and the floating-point matrix; mismatches are beyond the bound."""
    for swing, bound in YUV_LOSS.items():

        @jax.jit
        def error(rgb, swing=swing):
            back = images.centred_yuv444_to_rgb(
                images.rgb_to_centred_yuv444(rgb, swing=swing), swing=swing, mean=0.0, std=1.0, q_scale=None
            )
            return jnp.abs(back - rgb.astype(jnp.float32))

        found = [np.asarray(error(jnp.asarray(colours))) for colours in all_colours()]
        worst, wrong = max(e.max() for e in found), sum(int((e > bound).sum()) for e in found)
        note = f"RGB to YUV and back: at most {worst:.3f} pixels, bound {bound}"
        yield Row(f"centred_yuv444_to_rgb {swing}", "int8 -> real", sum(e.size for e in found), wrong, note)


EXHAUSTIVE = (every_colour, every_colour_back)
