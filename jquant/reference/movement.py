"""Joining, moving, picking and sorting elements: nash-arithmetic section 5.

Apart from joining, nothing is computed: most rules only say which input index an output index reads.
"""

import numpy as np

from jquant.reference.arithmetic import rescale
from jquant.reference.call import Call
from jquant.types import GraphError


def joined_operands(call: Call) -> list[np.ndarray]:
    """Operand i rescaled by the i-th constants. Exact values (masks, indices, pixels) have none, and stay."""
    if call.format.output in ("bool", "int32", "uint8"):
        return call.operands
    c = call.constants
    rows = zip(call.operands, c["mantissa"], c["pre"], c["post"], strict=True)
    return [rescale(x, mantissa, pre, post, call.format.output, call.target) for x, mantissa, pre, post in rows]


def cat(call: Call) -> np.ndarray:
    return np.concatenate(joined_operands(call), axis=call.op.axis)


def stack(call: Call) -> np.ndarray:
    """Joined along an axis of size 1 that each operand gets first."""
    return np.concatenate([np.expand_dims(x, call.op.axis) for x in joined_operands(call)], axis=call.op.axis)


# ---------------------------------------------------------------------------------------------------------------------
# Shapes


def reshape(call: Call) -> np.ndarray:
    (x,) = call.operands
    return x.reshape(call.op.shape)


def flatten(call: Call) -> np.ndarray:
    """Joins axes `start` to `end` inclusive; negative axes count from the end."""
    (x,) = call.operands
    start, end = call.op.start % x.ndim, call.op.end % x.ndim
    joined = int(np.prod(x.shape[start : end + 1]))
    return x.reshape(*x.shape[:start], joined, *x.shape[end + 1 :])


def permute(call: Call) -> np.ndarray:
    (x,) = call.operands
    return np.transpose(x, call.op.axes)


def expand(call: Call) -> np.ndarray:
    """Axes of size 1 repeated, -1 keeps one. A second operand gives the size of axis 0."""
    x, shape = call.operands[0], list(call.op.shape)
    x = x.reshape((1,) * (len(shape) - x.ndim) + x.shape)
    for axis, size in enumerate(shape):
        if len(call.operands) == 2 and axis == 0:
            size = len(call.operands[1])
        if size not in (-1, x.shape[axis]):
            if x.shape[axis] != 1:
                raise GraphError(f"axis {axis} of {x.shape[axis]} elements cannot be expanded to {size}")
            x = np.repeat(x, size, axis)
    return x


def tile(call: Call) -> np.ndarray:
    """Output i reads input i modulo the size."""
    (x,), repeats = call.operands, call.op.repeats
    x = x.reshape((1,) * (len(repeats) - x.ndim) + x.shape)
    for axis, count in enumerate(repeats):
        size = x.shape[axis]
        x = np.take(x, np.arange(size * count) % size, axis)
    return x


def roll(call: Call) -> np.ndarray:
    """Output i reads input i - shift, modulo the size."""
    (x,) = call.operands
    for shift, axis in zip(call.op.shifts, call.op.axes, strict=True):
        size = x.shape[axis]
        x = np.take(x, (np.arange(size) - shift) % size, axis)
    return x


def flip(call: Call) -> np.ndarray:
    """Output i of n reads input n - 1 - i."""
    (x,) = call.operands
    for axis in call.op.axes:
        x = np.take(x, x.shape[axis] - 1 - np.arange(x.shape[axis]), axis)
    return x


def pad(call: Call) -> np.ndarray:
    """Output i reads input i - before. Outside: `fill` (in LSB), the nearest element, or the mirror image."""
    (x,), op = call.operands, call.op
    for axis, (before, after) in enumerate(op.padding):
        size = x.shape[axis]
        source = np.arange(-before, size + after)
        inside = (source >= 0) & (source < size)
        if op.mode == "reflect":
            source = np.where(source < 0, -source, source)
            source = np.where(source >= size, 2 * (size - 1) - source, source)
            if (source < 0).any():
                raise GraphError(f"reflect padding {op.padding[axis]} is not smaller than the axis of {size}")
        x = np.take(x, np.clip(source, 0, size - 1), axis)
        if op.mode == "constant":
            shape = [-1 if d == axis else 1 for d in range(x.ndim)]
            x = np.where(inside.reshape(shape), x, call.constants["fill"])
    return x


# ---------------------------------------------------------------------------------------------------------------------
# Channels and space


def channels_first(x: np.ndarray, call: Call) -> np.ndarray:
    return np.moveaxis(x, -1, 1) if call.op.channels_last else x


def channels_restored(y: np.ndarray, call: Call) -> np.ndarray:
    return np.moveaxis(y, 1, -1) if call.op.channels_last else y


def pixel_shuffle(call: Call) -> np.ndarray:
    """Pixel (h * r + i, w * r + j) of channel c reads channel c * r * r + i * r + j at (h, w)."""
    x, r = channels_first(call.operands[0], call), call.op.factor
    n, channels, height, width = x.shape
    y = np.empty((n, channels // (r * r), height * r, width * r), np.int64)
    for i, j in np.ndindex(r, r):
        y[:, :, i::r, j::r] = x[:, i * r + j :: r * r]
    return channels_restored(y, call)


def pixel_unshuffle(call: Call) -> np.ndarray:
    """Channel c * r * r + i * r + j at (h, w) reads pixel (h * r + i, w * r + j) of channel c."""
    x, r = channels_first(call.operands[0], call), call.op.factor
    n, channels, height, width = x.shape
    y = np.empty((n, channels * r * r, height // r, width // r), np.int64)
    for i, j in np.ndindex(r, r):
        y[:, i * r + j :: r * r] = x[:, :, i::r, j::r]
    return channels_restored(y, call)


def channel_shuffle(call: Call) -> np.ndarray:
    """Channel j * groups + i reads channel i * C / groups + j."""
    x, groups = channels_first(call.operands[0], call), call.op.groups
    size = x.shape[1] // groups
    return channels_restored(x[:, [i * size + j for j in range(size) for i in range(groups)]], call)


# ---------------------------------------------------------------------------------------------------------------------
# Indices


def slice_(call: Call) -> np.ndarray:
    (x,), op = call.operands, call.op
    for axis, (start, stop, step) in enumerate(zip(op.starts, op.stops, op.steps, strict=True)):
        x = np.take(x, range(x.shape[axis])[start:stop:step], axis)
    return x


def index_select(call: Call) -> np.ndarray:
    """Static indices may count from the end; those of an operand are clamped to the axis."""
    x, axis = call.operands[0], call.op.axis
    size = x.shape[axis]
    if call.op.indices is None:
        return np.take(x, np.clip(call.operands[1], 0, size - 1), axis)
    return np.take(x, [i + size if i < 0 else i for i in call.op.indices], axis)


def gather(call: Call) -> np.ndarray:
    """y[..., i, ...] = x[..., index[..., i, ...], ...]; the index is clamped to the axis."""
    x, index = call.operands
    at = list(np.indices(index.shape))
    at[call.op.axis] = np.clip(index, 0, x.shape[call.op.axis] - 1)
    return x[tuple(at)]


# ---------------------------------------------------------------------------------------------------------------------
# Order


def positions(call: Call, descending: bool) -> np.ndarray:
    """What sorts operand 0; of equal elements the one of the lower index comes first."""
    (x,) = call.operands
    return np.argsort(-x if descending else x, axis=call.op.axis, kind="stable")


def sort_indices(call: Call) -> np.ndarray:
    return positions(call, call.op.descending)


def sort(call: Call) -> np.ndarray:
    return np.take_along_axis(call.operands[0], sort_indices(call), call.op.axis)


def top_k_indices(call: Call) -> np.ndarray:
    return np.take(positions(call, call.op.largest), range(call.op.k), call.op.axis)


def top_k(call: Call) -> np.ndarray:
    return np.take_along_axis(call.operands[0], top_k_indices(call), call.op.axis)
