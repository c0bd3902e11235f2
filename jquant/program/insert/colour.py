"""Colour conversion, mean and std as one 1x1 convolution in front of a program."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np

from jquant.graph.operator import Operand
from jquant.numerics.color import Swing, check_swing, rgb_matrix
from jquant.numerics.rounding import quantize
from jquant.ops.conv import Conv
from jquant.ops.image import SwapChannels
from jquant.ops.movement import Permute
from jquant.program.insert.front import Step, entry_of, front_of, join, operand_of, unused
from jquant.program.insert.parity import (
    YUV_LOSS,
    Pipeline,
    camera_pixels,
    check_levels,
    check_pictures,
    colours,
    compare,
    pictures_of,
    quantized,
    real_inputs,
)
from jquant.text import did_you_mean
from jquant.types import FrozenMap, Input, InputError, LoweringError, Node, Program, RescaleFormat, Target, bit_width

Mode = Literal[
    "skip", "yuvbt601full2rgb", "yuvbt601full2bgr", "yuvbt601video2rgb", "yuvbt601video2bgr", "bgr2rgb", "rgb2bgr"
]
Layout = Literal["NCHW", "NHWC"]

_ONE_BY_ONE = Conv(strides=(1, 1), padding=((0, 0), (0, 0)), dilation=(1, 1), channels_last=True)
_IDENTITY = 2.0**-20  # of a factor or LSB: less than this is no arithmetic


def insert_image_preprocess(
    program: Program,
    input: str,
    *,
    mode: Mode | None,
    divisor: float = 256.0,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
    layout: Layout = "NCHW",
    expected: Pipeline | None = None,
    camera_swing: Swing | None = None,
    check: Any = None,
    max_difference: int | None = None,
) -> Program:
    """Makes an input take centred pixels, int8 [N, H, W, C]: colour conversion, then (pixel / divisor - mean) / std.

    All of it is one 1x1 convolution with int16 weights, to the format that the input has; and none where the arithmetic
    is the identity. RGB is not clamped to [0, 255] between the two.

    Args:
      program: what `lower` or `load` returned; it stays as it is.
      input: an input [N, C, H, W], or [N, H, W, C] with `layout="NHWC"`.
      mode: "yuvbt601full2rgb", "yuvbt601full2bgr", "yuvbt601video2rgb", "yuvbt601video2bgr" (video is studio swing),
        "bgr2rgb", "rgb2bgr", or None ("skip") for a network that takes the colours as they come.
      divisor, mean, std: as in training; mean and std one number, or one a channel of the network.
      layout: of the old input.
      expected: the float pipeline of training, to be sure: uint8 pictures [N, H, W, C] -> real input of the network, in
        its layout. The pictures have the colours of the new input; with `camera_swing` they are RGB.
      camera_swing: RGB pictures reach the new input as BT.601 YUV of this swing, as from a camera. Catches a mode of
        the wrong swing.
      check: more pictures to compare on, of those that `expected` takes.
      max_difference: LSB; None derives it from the constants: 1 for an int8 input at any sensible scale. With
        `expected`, the rounding of YUV pixels comes on top.

    Raises:
      LoweringError: the inserted integers are further from the floats; the message has the worst colour, and the mode
        that would agree with `expected`, if there is one.
      InputError: arguments that do not fit the input.
    """
    entry = entry_of(program, input)
    height, width, channels = picture_shape(entry, layout)
    formula = _formula_of(mode, divisor, mean, std, channels, layout)
    if camera_swing is not None and (expected is None or channels != 3):
        raise InputError("camera_swing says how `expected` gets RGB pictures; it needs expected= and three channels")
    output = operand_of(program, entry)
    steps, error = _steps(program, entry, output, formula)
    value = steps[-1][0].name if steps else input
    pixels = Operand("int8", jnp.float32(1), (entry.shape[0], height, width, channels))
    front = front_of({input: pixels}, steps, value, program.target)
    test = _Test(front, output, formula, error, max_difference)
    pictures = pictures_of(colours(channels), height, width)
    if check is not None:
        pictures = np.concatenate([pictures, check_pictures(check, pixels.shape)])
    check_levels(_verify(test, formula.apply, pictures, pictures, "the documented formula"), formula.channel_axis)
    if expected is not None:
        swing = camera_swing or formula.swing
        seen = pictures if swing is None else camera_pixels(pictures, swing)
        lost = 0.0 if swing is None else YUV_LOSS[swing] * formula.gain / float(output.scale)
        test = test._replace(error=error + lost)
        _verify(test, expected, pictures if camera_swing else seen, seen, "expected")
    return join(program, input, front)


def picture_shape(entry: Input, layout: str) -> tuple[int, int, int]:
    """(H, W, C) of an input of pictures."""
    if layout not in get_args(Layout):
        raise InputError(f"layout must be 'NCHW' or 'NHWC', not {layout!r}")
    sizes = [n for n in entry.shape[1:] if n is not None]
    if len(sizes) != 3 or len(entry.shape) != 4:
        raise InputError(
            f"input {entry.name!r} has shape {entry.shape}; a picture has a fixed height, width and number of channels"
        )
    c, h, w = sizes if layout == "NCHW" else (sizes[2], *sizes[:2])
    return h, w, c


# ---------------------------------------------------------------------------------------------------------------------
# The documented float pipeline


class _Formula(NamedTuple):
    """(colour / divisor - mean) / std of the colours that `mode` makes of pixels. mean and std [C], float64."""

    mode: Mode | None
    divisor: float
    mean: np.ndarray
    std: np.ndarray
    layout: str

    @property
    def swing(self) -> Swing | None:
        """The swing of the YUV that the mode takes."""
        if self.mode is None or not self.mode.startswith("yuv"):
            return None
        return "full" if "full" in self.mode else "studio"

    @property
    def gain(self) -> float:
        """Real units of the network for one step of a pixel, at most."""
        return float(np.max(1 / np.abs(self.divisor * self.std)))

    @property
    def channel_axis(self) -> int:
        return 1 if self.layout == "NCHW" else 3

    def colours(self) -> tuple[np.ndarray, np.ndarray]:
        """(matrix [C, C], offset [C]) to the colours of the network: matrix @ centred pixels + offset."""
        matrix, offset = np.eye(len(self.std)), 128.0
        if self.swing is not None:
            matrix, offset = rgb_matrix(check_swing(self.swing))
        if self.mode is not None and (self.mode in ("bgr2rgb", "rgb2bgr") or self.mode.endswith("2bgr")):
            matrix = matrix[::-1]
        return matrix, np.full(len(self.std), offset)

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 pixels [N, H, W, C] of the new input to the real input of the network."""
        matrix, offset = self.colours()
        x = ((pixels - 128.0) @ matrix.T + offset) / self.divisor
        x = (x - self.mean) / self.std
        return np.moveaxis(x, -1, 1) if self.layout == "NCHW" else x


def _formula_of(
    mode: Mode | None,
    divisor: float,
    mean: float | Sequence[float],
    std: float | Sequence[float],
    channels: int,
    layout: str,
) -> _Formula:
    """The formula, if its arguments make sense for that many channels."""
    known = get_args(Mode)
    if mode is not None and mode not in known:
        raise InputError(f"unknown mode {mode!r}{did_you_mean(mode, known)}; known: {', '.join(known)}")
    if mode not in (None, "skip") and channels != 3:
        raise InputError(f"mode {mode!r} is for three channels, the input has {channels}; use mode=None")
    centre, spread = _per_channel(mean, channels, "mean"), _per_channel(std, channels, "std")
    if not (0 < divisor < float("inf") and (spread != 0).all()):
        raise InputError(f"divisor {divisor} and std {spread.tolist()}: divisor must be positive, std not zero")
    return _Formula(mode, divisor, centre, spread, layout)


def _per_channel(value: float | Sequence[float], channels: int, role: str) -> np.ndarray:
    array = np.asarray(value, np.float64)
    if array.shape not in ((), (1,), (channels,)) or not np.isfinite(array).all():
        raise InputError(f"{role} is one number or {channels}, all finite; got {value!r}")
    return np.broadcast_to(array.reshape(-1), (channels,))


# ---------------------------------------------------------------------------------------------------------------------
# The parity test


class _Test(NamedTuple):
    """`error`: LSB that front and floats may be apart before each is rounded; `limit` replaces what follows from it."""

    front: Program
    output: Operand
    formula: _Formula
    error: float
    limit: int | None

    @property
    def allowed(self) -> int:
        return int(self.error) + 1 if self.error else 0


def _verify(test: _Test, pipeline: Pipeline, shown: np.ndarray, seen: np.ndarray, what: str) -> np.ndarray:
    """Compares the front on pixels `seen` by the new input with the pipeline on pictures `shown`; returns the integers.

    Two numbers at most e apart are at most floor(e) + 1 apart once both are rounded, and equal where e is 0.
    """
    output = test.output
    wanted = quantized(real_inputs(pipeline, shown, output.shape, what), output.scale, output.dtype)
    allowed = test.allowed if test.limit is None else test.limit
    raw = (seen.astype(np.int16) - 128).astype(np.int8)

    def hint() -> str:
        return _agreeing_mode(test, seen, wanted)

    compare(test.front, [raw], wanted, allowed, channel_axis=test.formula.channel_axis, pixels=seen, hint=hint)
    return wanted


def _agreeing_mode(test: _Test, seen: np.ndarray, wanted: np.ndarray) -> str:
    """Names another mode that agrees with the float pipeline on these pixels."""
    for other in get_args(Mode) if seen.shape[-1] == 3 else ():
        made = quantized(test.formula._replace(mode=other).apply(seen), test.output.scale, test.output.dtype)
        if other != test.formula.mode and np.abs(made - wanted).max() <= test.allowed:
            return f". It agrees with mode={other!r}"
    return ". No other mode agrees with it: check divisor, mean, std and the colours that the pipeline takes"


# ---------------------------------------------------------------------------------------------------------------------
# The nodes


def _steps(program: Program, entry: Input, output: Operand, formula: _Formula) -> tuple[list[Step], float]:
    """The nodes from centred pixels to the old input, and how many LSB they may be off before the last rounding."""
    matrix, offset = formula.colours()
    weight = matrix / (formula.divisor * formula.std)[:, None]
    bias = (offset / formula.divisor - formula.mean) / formula.std
    name = unused(f"{entry.name}.preprocess", program, entry.name)
    n, c, h, w = entry.shape
    last = Operand(output.dtype, output.scale, (n, h, w, c) if formula.layout == "NCHW" else entry.shape)
    steps: list[Step] = []
    error, order = 0.0, _moved_only(weight, bias, output)
    if order == "other":
        params, error = _quantized_conv(weight, bias, output, program.target)
        roles = FrozenMap({role: f"{name}.{role}" for role in params})
        steps.append((Node(name, _ONE_BY_ONE, (entry.name,), roles), last, params))
    elif order == "reversed":
        steps.append((Node(name, SwapChannels(), (entry.name,)), last, {}))
    if formula.layout == "NCHW":
        before, final = (name, unused(f"{name}.to_first", program, entry.name)) if steps else (entry.name, name)
        steps.append((Node(final, Permute(axes=(0, 3, 1, 2)), (before,)), output, {}))
    return steps, error


def _moved_only(weight: np.ndarray, bias: np.ndarray, output: Operand) -> Literal["same", "reversed", "other"]:
    """Whether the affine map gives the integers of centred pixels as they are, or in reverse order."""
    lsb, identity = float(output.scale), np.eye(len(weight))
    if output.dtype == "int8" and np.abs(bias / lsb).max() < _IDENTITY:
        if np.abs(weight / lsb - identity).max() < _IDENTITY:
            return "same"
        if np.abs(weight / lsb - identity[::-1]).max() < _IDENTITY:
            return "reversed"
    return "other"


def _quantized_conv(
    weight: np.ndarray, bias: np.ndarray, output: Operand, target: Target
) -> tuple[dict[str, Any], float]:
    """Parameters of the convolution on centred pixels (scale 1), and its error in LSB before the last rounding."""
    dtype = "int16" if "int16" in target.weight_dtypes else "int8"
    scale = jnp.asarray(np.abs(weight).max(1) / (2 ** (bit_width(dtype) - 1) - 0.5), jnp.float32)
    integers = quantize(jnp.asarray(weight, jnp.float32), scale[:, None], dtype, target.quantize_rounding)
    acc = np.asarray(scale, np.float64)  # real of one acc
    if (np.abs(bias) / acc >= 2**31).any():
        raise LoweringError(
            "the constant part of (pixel / divisor - mean) / std leaves int32 beside its factor: mean is in another "
            "unit than pixel / divisor"
        )
    off = np.abs(np.asarray(integers) * acc[:, None] - weight).sum(1) * 128  # the weights,
    form, bits = target.rescale, bit_width(output.dtype)
    off += acc * _reach(target.bias_rounding) + np.abs(bias) * 2.0**-23  # the bias, on its grid and in float32,
    mantissa = 2 * _reach(form.mantissa_rounding) * 2.0 ** (bits - 1 - form.mantissa_bits)
    error = off / float(output.scale) + mantissa  # the mantissa, and the last rounding, where it is not to the nearest
    error += _reach(form.post_rounding) - 0.5
    if not form.high_precision:
        error += _cut_off(acc / float(output.scale), bits, form)
    return {"weight": (integers[:, :, None, None], scale), "bias": jnp.asarray(bias, jnp.float32)}, float(error.max())


def _reach(rounding: str) -> float:
    """How far a rounding moves a number at most."""
    return 0.5 if rounding.startswith("half") else 1.0


def _cut_off(ratio: np.ndarray, bits: int, form: RescaleFormat) -> np.ndarray:
    """LSB that the shift of the accumulator before its multiplication loses at most (section 3); ratio: LSB per acc."""
    total = form.mantissa_bits - np.frexp(ratio)[1]
    pre = np.clip(total - form.post_shift(bits), 0, form.max_pre_shift)
    return np.where(pre > 0, np.exp2(pre) * ratio, 0.0)
