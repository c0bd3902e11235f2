"""The parity test: nothing is put before a program that does not do what the float pipeline does.

A front is the program of the inserted nodes alone: its inputs are the new ones, its one output takes the place of the
old input. It is run on pictures and compared with floats, quantized as the old input was.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jquant.graph.operator import Operand
from jquant.numerics.color import rgb_to_yuv
from jquant.program.integers import run
from jquant.types import InputError, LoweringError, Program, integer_range

Pipeline = Callable[[np.ndarray], Any]

# RGB -> YUV 4:4:4 -> RGB, in pixels, over all 2^24 colours: what the rounding of YUV costs at most.
YUV_LOSS = {"full": 3.28, "studio": 2.75}

_MIN_LEVELS = 16  # integers of a channel over all colours; fewer: mean, std or divisor are in another unit


class Parity(NamedTuple):
    """How an insertion was compared: `worst` and `allowed` in LSB of the old input, over `values` numbers."""

    worst: int
    allowed: int
    values: int


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def colours(channels: int) -> np.ndarray:
    """Every gray, and for three channels the corners of the cube and their surroundings, a lattice and random ones.

    [K, channels], uint8.
    """
    grays = np.repeat(np.arange(256)[:, None], channels, axis=1)
    if channels != 3:
        return grays.astype(np.uint8)
    grids = [np.array([0, 1, 127, 128, 129, 254, 255]), np.arange(0, 256, 17)]
    lattices = [np.stack(np.meshgrid(*(grid,) * channels), axis=-1).reshape(-1, channels) for grid in grids]
    random = np.random.default_rng(0).integers(0, 256, (4096, channels))
    return np.concatenate([grays, *lattices, random]).astype(np.uint8)


def pictures_of(found: np.ndarray, height: int, width: int) -> np.ndarray:
    """Colours [K, C] as pictures [N, height, width, C] that hold each of them, random ones in what is left."""
    count = -(-len(found) // (height * width))
    more = count * height * width - len(found)
    filling = np.random.default_rng(1).integers(0, 256, (more, found.shape[1]), dtype=np.uint8)
    return np.concatenate([found, filling]).reshape(count, height, width, -1)


def check_pictures(pictures: Any, shape: Sequence[int | None]) -> np.ndarray:
    """The user's pictures, if they are uint8 [N, H, W, C] of the program's size."""
    array = np.asarray(pictures)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1:] != tuple(shape[1:]):
        wanted = ", ".join(map(str, shape[1:]))
        raise InputError(f"check holds uint8 pictures [N, {wanted}], not {array.dtype} {array.shape}")
    return array


def camera_pixels(rgb: np.ndarray, swing: str) -> np.ndarray:
    """The YUV pixels of RGB pictures, uint8."""
    return np.asarray(rgb_to_yuv(jnp.asarray(rgb), swing)).astype(np.uint8)


def random_integers(inputs: Mapping[str, Operand], batch: int = 4) -> list[np.ndarray]:
    """Integers over the whole range of each operand."""
    rng = np.random.default_rng(0)
    found = []
    for name, operand in inputs.items():
        if operand.dtype == "int32":
            raise InputError(f"operand {name!r} is int32, and any number may mean nothing; give arrays with check=")
        low, high = (0, 1) if operand.dtype == "bool" else integer_range(operand.dtype)
        shape = [batch if n is None else n for n in operand.shape]
        found.append(rng.integers(low, high + 1, shape).astype(operand.dtype))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Comparison


def real_inputs(pipeline: Pipeline, pictures: np.ndarray, shape: Sequence[int | None], what: str) -> np.ndarray:
    """What the float pipeline makes of pictures: the model's real input, float64."""
    real = np.asarray(pipeline(pictures), np.float64)
    wanted = (len(pictures), *shape[1:])
    if real.shape != wanted:
        raise InputError(f"{what} made {real.shape} of pictures {pictures.shape}; the network takes {wanted}")
    if not np.isfinite(real).all():
        raise InputError(f"{what} made NaN or infinite values of pictures")
    return real


def quantized(real: np.ndarray, scale: Any, dtype: str) -> np.ndarray:
    """Real inputs to the integers of the old input, int64."""
    return np.clip(np.rint(real / np.float64(scale)), *integer_range(dtype)).astype(np.int64)


def compare(
    front: Program,
    raw: Sequence[np.ndarray],
    wanted: np.ndarray,
    allowed: int,
    *,
    channel_axis: int,
    pixels: np.ndarray | None = None,
    hint: Callable[[], str] = lambda: "",
) -> Parity:
    """Runs a front on integers and compares it with `wanted`, in LSB.

    `pixels` [N, H, W, C] are named in the error, at the worst place.

    Raises:
      LoweringError: more than `allowed` LSB apart; with the worst place, both values and the hint.
    """
    made = np.asarray(run(_any_batch(front), *map(jnp.asarray, raw), raw=True)).astype(np.int64)
    difference = np.abs(made - wanted)
    parity = Parity(int(difference.max(initial=0)), allowed, difference.size)
    if parity.worst <= allowed:
        return parity
    place = np.unravel_index(int(difference.argmax()), difference.shape)
    n, *rest = map(int, place)
    channel = rest.pop(channel_axis - 1)
    shown = "" if pixels is None else f" the pixel {tuple(pixels[(n, *rest)].tolist())} becomes"
    raise LoweringError(
        f"parity test of {front.graph.outputs[0]!r}:{shown} {made[place]} in channel {channel} of picture {n} at "
        f"{tuple(rest)}, and the float pipeline says {wanted[place]}: {parity.worst} LSB apart, {allowed} allowed; "
        f"{(difference > allowed).mean():.1%} of all values are beyond{hint()}"
    )


def _any_batch(front: Program) -> Program:
    """The front for any number of pictures, where the program behind it takes a fixed one."""
    inputs = tuple(replace(i, shape=(None, *i.shape[1:])) for i in front.graph.inputs)
    return replace(front, graph=replace(front.graph, inputs=inputs))


def check_levels(wanted: np.ndarray, channel_axis: int) -> None:
    """Refuses a pipeline that maps all colours to a few integers.

    Raises:
      LoweringError: a channel has fewer than 16.
    """
    for channel, values in enumerate(np.moveaxis(wanted, channel_axis, 0)):
        if (count := len(np.unique(values))) < _MIN_LEVELS:
            raise LoweringError(
                f"all colours together become {count} integers in channel {channel}, {values.min()} to {values.max()}: "
                "divisor, mean and std are not those of this network. They are applied as (pixel / divisor - mean) / "
                "std, so that mean and std are in units of 1 after divisor=255 and in pixels after divisor=1"
            )
