"""The bytes of a camera in front of a program that takes centred pixels: pyramid and resizer inputs."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from jquant.graph.operator import Operand, eval_float
from jquant.numerics.color import check_even
from jquant.ops.image import CentrePixels, Nv12ToCentredYuv444, RoiResize
from jquant.program.insert.colour import picture_shape
from jquant.program.insert.front import Step, entry_of, front_of, join, operand_of, unused
from jquant.program.insert.parity import check_pictures, compare, quantized, random_integers
from jquant.types import Input, InputError, Node, Op, Program

Shape = tuple[int | None, int, int, int]


def insert_image_convert(
    program: Program,
    input: str,
    mode: Literal["nv12", "gray", "yuv444"] = "nv12",
    *,
    check: Sequence[Any] | None = None,
) -> Program:
    """Makes an input of centred pixels take a camera's bytes.

    Args:
      program: a program whose input is centred pixels: behind `insert_image_preprocess`.
      input: that input, int8 [N, H, W, C] at scale 1.
      mode: "nv12" (C = 3): y uint8 [N, H, W, 1] and uv uint8 [N, H/2, W/2, 2], inputs `input_y` and `input_uv`;
        "gray" (C = 1): `input_y`; "yuv444" (any C): all channels in one uint8 array, `input_yuv`.
      check: more planes to compare on, one array for each new input.

    Raises:
      InputError: an input that is not centred pixels, or of odd sides for NV12.
      LoweringError: the inserted integers are not exactly the float formula.
    """
    entry, shape = _centred(program, input)
    _need_channels(mode, shape[-1], {"nv12": 3, "gray": 1, "yuv444": shape[-1]})
    planes = _planes(program, input, mode, shape)
    op: Op = Nv12ToCentredYuv444() if mode == "nv12" else CentrePixels()
    front = _front(program, entry, op, planes, "convert")
    raw = random_integers(planes)
    if check is not None:
        given = [check_pictures(a, x.shape) for a, x in zip(check, planes.values(), strict=True)]
        raw = [np.concatenate(pair) for pair in zip(raw, given, strict=True)]
    wanted = [a.astype(np.int64) for a in raw]
    if mode == "nv12":
        wanted[1] = wanted[1].repeat(2, axis=1).repeat(2, axis=2)
    compare(front, raw, np.concatenate(wanted, axis=-1) - 128, 0, channel_axis=3)
    return join(program, input, front)


def insert_roi_resize(
    program: Program,
    input: str,
    *,
    size: tuple[int, int],
    mode: Literal["nv12", "gray"] = "nv12",
    interpolation: Literal["bilinear", "nearest"] = "bilinear",
    pad_mode: Literal["constant", "border"] = "constant",
    pad_value: tuple[int, int] = (0, -128),
) -> Program:
    """Makes an input of centred pixels take regions of larger pictures, cropped and resized: see `jq.ops.RoiResize`.

    Args:
      program: a program whose input is centred pixels: behind `insert_image_preprocess`.
      input: that input, int8 [N, H, W, C] at scale 1.
      size: (height, width) of the pictures. The inputs are `input_y` uint8 [N, height, width, 1], `input_uv` uint8
        [N, height/2, width/2, 2] unless gray, and `input_roi` int32 [N, 4]: left, top, right, bottom, the last two
        included.
      mode: "nv12" (C = 3) or "gray" (C = 1).
      interpolation, pad_mode, pad_value: see `jq.ops.RoiResize`.

    Raises:
      InputError: an input that is not centred pixels, or of odd sides for NV12.
      LoweringError: the inserted integers differ from floating-point interpolation by more than their weights allow.
    """
    entry, (n, h, w, c) = _centred(program, input)
    _need_channels(mode, c, {"nv12": 3, "gray": 1})
    planes = _planes(program, input, mode, (n, *size, c))
    roi = {unused(f"{input}_roi", program, input): Operand("int32", jnp.float32(1), (n, 4))}
    op = RoiResize(size=(h, w), mode=mode, interpolation=interpolation, pad_mode=pad_mode, pad_value=pad_value)
    front = _front(program, entry, op, planes | roi, "resize")
    regions = _regions(*size)
    raw = [*_smooth(list(planes.values()), len(regions)), regions]
    real = np.asarray(eval_float(op, *map(jnp.asarray, raw)))
    # Neighbours differ by 1 along one axis: a coordinate that is less than a pixel off moves the result by less than 1.
    compare(front, raw, quantized(real, 1.0, "int8"), 1, channel_axis=3)
    return join(program, input, front)


def _centred(program: Program, name: str) -> tuple[Input, Shape]:
    """An input of centred pixels, and its shape."""
    entry = entry_of(program, name)
    if program.inputs[name] != "int8" or np.any(np.asarray(program.scales[name]) != 1) or len(entry.shape) != 4:
        raise InputError(
            f"input {name!r} is {program.inputs[name]} {entry.shape} at scale {program.scales[name]}, and not centred "
            "pixels (int8 [N, H, W, C] at scale 1); call insert_image_preprocess first, with mode=None, divisor=1, "
            "mean=128 and std=128 for a network that takes centred / 128"
        )
    return entry, (entry.shape[0], *picture_shape(entry, "NHWC"))


def _need_channels(mode: str, channels: int, needed: Mapping[str, int]) -> None:
    if mode not in needed:
        raise InputError(f"unknown mode {mode!r}; known: {', '.join(needed)}")
    if channels != needed[mode]:
        raise InputError(f"mode {mode!r} gives {needed[mode]} channels, the input has {channels}")


def _planes(program: Program, name: str, mode: str, shape: Shape) -> dict[str, Operand]:
    """The inputs of a camera by name, for pictures of a shape [N, H, W, C]."""
    n, h, w, _ = shape
    if mode == "nv12":
        check_even(h, w)
    y: Shape = (n, h, w, 1)
    found: dict[str, dict[str, Shape]] = {
        "nv12": {"_y": y, "_uv": (n, h // 2, w // 2, 2)},
        "gray": {"_y": y},
        "yuv444": {"_yuv": shape},
    }
    return {unused(f"{name}{s}", program, name): Operand("uint8", jnp.float32(1), x) for s, x in found[mode].items()}


def _front(program: Program, entry: Input, op: Op, inputs: Mapping[str, Operand], role: str) -> Program:
    name = unused(f"{entry.name}.{role}", program, entry.name)
    steps: list[Step] = [(Node(name, op, tuple(inputs)), operand_of(program, entry), {})]
    return front_of(inputs, steps, name, program.target)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures for the parity test of a resize


def _regions(height: int, width: int) -> np.ndarray:
    """Regions inside pictures: whole, halves, one pixel, odd and random ones. [K, 4], int32."""
    rng = np.random.default_rng(0)
    x, y = (np.sort(rng.integers(0, side, (8, 2)), axis=1) for side in (width, height))
    random = np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], axis=1)
    right, bottom = width - 1, height - 1
    fixed = [(0, 0, right, bottom), (0, 0, right // 2, bottom), (right // 2, bottom // 2, right, bottom), (0, 0, 0, 0)]
    return np.concatenate([np.array(fixed), random]).astype(np.int32)


def _smooth(planes: Sequence[Operand], count: int) -> list[np.ndarray]:
    """Pictures whose neighbours differ by 1 along one axis and not at all along the other, which alternates."""
    found = []
    for plane in planes:
        h, w, c = (n or 1 for n in plane.shape[1:])
        rows, columns = (np.abs((np.arange(side) + 40) % 510 - 255) for side in (h, w))
        ramps = [np.broadcast_to(rows[:, None, None], (h, w, c)), np.broadcast_to(columns[:, None], (h, w, c))]
        found.append(np.stack([ramps[i % 2] for i in range(count)]).astype(np.uint8))
    return found
