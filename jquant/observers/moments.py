"""Clipping at a multiple of the standard deviation, from sums of x and x^2 that are exact in any order."""

from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jquant.numerics.rounding import divide
from jquant.observers.base import (
    RangeState,
    carry,
    clipped_scale,
    empty_range,
    flush,
    limit_of,
    merge_range,
    range_of,
)
from jquant.observers.histograms import power_of_two
from jquant.types import Array, Observer, QConfigError, QuantSpec

_LIMB = 20
_FIELDS = 256  # values of the exponent field of a float32
_BYTES = 9  # of the significand s: 3, of its square: 6
_PIECE = 2**20  # samples summed before a carry: 2^20 * 255 + 2^20 < 2^32, and the bytes of so many fit into memory


class MomentState(NamedTuple):
    """Exact sums of x and x^2, so that the order of batches does not matter.

    |x| is s * 2^(field - 150) with an integer s below 2^24. The samples of each sign and exponent field have a sum of
    every byte of s and of s^2, the lowest byte first, in two limbs: `upper * 2^20 + lower`, enough for 2^44 samples.
    """

    range: RangeState  # real, [channels]
    samples: Array  # uint32 [2]: the lower and the upper limb of the number of samples a channel
    lower: Array  # uint32 [channels, 2, 256, 9], below 2^20; row 0 of x > 0, row 1 of x < 0
    upper: Array  # uint32 [channels, 2, 256, 9]


def clip_std(multiple: float = 3.0) -> Observer:
    """The scale of the range mean +- multiple * standard deviation, cut to the range of the data.

    The sums are exact; mean and deviation are computed from them in float32, the deviation to about 2^-22 * (1 +
    mean^2 / variance) of itself.

    Args:
      multiple: of the standard deviation of all samples (divided by n), more than 0.

    Returns:
      An observer whose state is a `MomentState`; `update` and `merge` are exact in any order.

    Example:
      >>> import jax.numpy as jnp
      >>> from jquant.observers import clip_std
      >>> from jquant.types import QuantSpec
      >>> x = jnp.array([[-1.0, 1.0] * 50 + [8.0, -8.0]])
      >>> observer = clip_std(2.0)
      >>> scale = observer.finalize(observer.update(observer.init(1), x), QuantSpec(dtype="int8"))
      >>> round(float(scale[0]) * 127.5, 4), round(2 * float(x.std()), 4)
      (2.9902, 2.9902)
    """
    if not 0 < multiple < float("inf"):
        raise QConfigError(f"multiple must be finite and more than 0, not {multiple!r}")
    return _clip_std(float(multiple))


@cache
def _clip_std(multiple: float) -> Observer:
    finalize = partial(_clipped, multiple=multiple)
    return Observer(_init, _update, _merge, finalize, name="clip_std", options=(("multiple", multiple),))


def _init(channels: int) -> MomentState:
    sums: Any = np.zeros((channels, 2, _FIELDS, _BYTES), np.uint32)
    count: Any = np.zeros(2, np.uint32)
    return MomentState(empty_range(channels), count, sums, sums)


def significand(x: Array) -> Array:
    """The integer s of |x| = s * 2^(field - 150), int32 below 2^24; x has no subnormals."""
    return jnp.where(x == 0, 0, (jax.lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFF) | 0x800000)


def _bytes(x: Array) -> Array:
    """[samples] to the bytes of s and s^2, uint32 [samples, 9]."""
    s = significand(x)
    a, b = s >> 12, s & 0xFFF
    product = a * b  # s^2 = a^2 * 2^24 + product * 2^13 + b^2
    low = b * b + ((product & 0x7FF) << 13)
    high = a * a + (product >> 11) + (low >> 24)
    parts = [(v >> shift) & 0xFF for v in (s, low, high) for shift in (0, 8, 16)]
    return jnp.stack(parts, axis=-1).astype(jnp.uint32)


def _sums(x: Array) -> Array:
    """[samples] to sums [2, 256, 9]."""
    field = (jax.lax.bitcast_convert_type(x, jnp.int32) >> 23) & 0xFF
    index = jnp.where(x < 0, _FIELDS, 0) + field
    return jnp.zeros((2 * _FIELDS, _BYTES), jnp.uint32).at[index].add(_bytes(x)).reshape(2, _FIELDS, _BYTES)


def _add(sums: tuple[Array, Array], piece: Array) -> tuple[Array, Array]:
    return carry(sums[0] + jax.vmap(_sums)(piece), sums[1], _LIMB)


def _update(state: MomentState, x: Array) -> MomentState:
    x = flush(x)
    channels, samples = x.shape
    sums = (state.lower, state.upper)
    whole = samples // _PIECE * _PIECE
    if whole:
        pieces = x[:, :whole].reshape(channels, -1, _PIECE).swapaxes(0, 1)
        sums = jax.lax.scan(lambda s, piece: (_add(s, piece), None), sums, pieces)[0]
    sums = _add(sums, x[:, whole:])
    count = add_counts(state.samples, split_count(samples))
    return MomentState(merge_range(state.range, range_of(x)), count, *sums)


def split_count(samples: int) -> Array:
    """A number of samples in two limbs, uint32 [2]."""
    return jnp.asarray([samples % 2**_LIMB, samples >> _LIMB], jnp.uint32)


def add_counts(a: Array, b: Array) -> Array:
    return jnp.stack(carry(a[0] + b[0], a[1] + b[1], _LIMB))


def count_of(limbs: Array) -> Array:
    """The number as float32, at least 1."""
    return jnp.maximum(limbs[1].astype(jnp.float32) * 2.0**_LIMB + limbs[0].astype(jnp.float32), 1.0)


def _merge(a: MomentState, b: MomentState) -> MomentState:
    sums = carry(a.lower + b.lower, a.upper + b.upper, _LIMB)
    return MomentState(merge_range(a.range, b.range), add_counts(a.samples, b.samples), *sums)


def _clipped(state: MomentState, spec: QuantSpec, multiple: float) -> Array:
    mean, deviation, unit = _moments(state)
    reach = flush(multiple * deviation)
    low, high = (flush(v * 2.0) * unit for v in (mean - reach, mean + reach))  # 2 * unit itself may be 2^128
    clipped = RangeState(jnp.maximum(state.range.low, low), jnp.minimum(state.range.high, high))
    return clipped_scale(limit_of(clipped, spec), state.range, spec)


def _moments(state: MomentState) -> tuple[Array, Array, Array]:
    """Mean and standard deviation, [channels], in units of 2 * `unit`, real: the power of two beyond the limit."""
    top, below = _below(jnp.maximum(jnp.maximum(-state.range.low, state.range.high), 0.0))
    sums = _float_sums(state.lower, state.upper)
    first, second = _weighted(sums[..., :3], below), _weighted(sums[..., 3:], 2 * below)
    count = count_of(state.samples)
    mean = divide(first[:, 0] - first[:, 1], count)
    variance = divide(second[:, 0] + second[:, 1], count) - flush(mean * mean)
    return mean, jnp.sqrt(jnp.maximum(variance, 0.0)), power_of_two(top - 127)


def sum_of_fields(lower: Array, upper: Array, limit: Array) -> tuple[Array, Array]:
    """The sum of numbers >= 0 from the sums of the bytes of their significands, [channels, 256, 3], by exponent field.

    Returns it in units of 2 * `unit`, [channels], and `unit`, real: the power of two of `limit`, the largest of them.
    """
    top, below = _below(limit)
    return _weighted(_float_sums(lower, upper)[:, None], below)[:, 0], power_of_two(top - 127)


def _below(limit: Array) -> tuple[Array, Array]:
    """The exponent field of the largest number, [channels], and log2 of every field's unit over its own."""
    top = (jax.lax.bitcast_convert_type(limit, jnp.int32) >> 23) & 0xFF
    return top, jnp.arange(_FIELDS) - top[:, None]


def _float_sums(lower: Array, upper: Array) -> Array:
    return upper.astype(jnp.float32) * 2.0**_LIMB + lower.astype(jnp.float32)


def _weighted(sums: Array, below: Array) -> Array:
    """Sums [channels, 2, 256, bytes] to [channels, 2], in pairs: every product is exact, the order of sums is fixed."""
    count = sums.shape[-1]
    total = sums[..., 0] * 2.0 ** (-8 * count)
    for i in range(1, count):
        total = total + sums[..., i] * 2.0 ** (8 * (i - count))
    total = total * jnp.where(below < -126, 0.0, power_of_two(jnp.clip(below, -126, 0)))[:, None]
    while total.shape[-1] > 1:
        half = total.shape[-1] // 2
        total = total[..., :half] + total[..., half:]
    return total[..., 0]
