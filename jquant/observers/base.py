"""What all observers share: the range of the data, and the scale that covers a threshold."""

from typing import NamedTuple, cast

import jax.numpy as jnp
import numpy as np

from jquant.numerics.rounding import divide
from jquant.types import MIN_SCALE, Array, QuantSpec


class RangeState(NamedTuple):
    """Smallest and largest value so far, real, [channels]; +inf and -inf before any data."""

    low: Array
    high: Array


def empty_range(channels: int) -> RangeState:
    return RangeState(*(cast(Array, np.full(channels, bound, np.float32)) for bound in (np.inf, -np.inf)))


def flush(x: Array) -> Array:
    """Subnormals and -0.0 become 0.0: their order under min and max depends on the backend.

    Around a product, it also keeps the compiler from fusing it with a sum, which would round once less under jit.
    """
    return jnp.where(jnp.abs(x) < np.finfo(np.float32).tiny, 0.0, x)


def range_of(x: Array) -> RangeState:
    x = flush(x)
    return RangeState(x.min(axis=1, initial=jnp.inf), x.max(axis=1, initial=-jnp.inf))


def merge_range(a: RangeState, b: RangeState) -> RangeState:
    return RangeState(jnp.minimum(a.low, b.low), jnp.maximum(a.high, b.high))


def limit_of(seen: RangeState, spec: QuantSpec) -> Array:
    """The magnitude that the integers must reach, real: max(-min, max, 0), without min for unsigned dtypes."""
    largest = jnp.maximum(seen.high, 0.0)
    return jnp.maximum(largest, -seen.low) if spec.range[0] else largest


def scale_for(limit: Array, spec: QuantSpec) -> Array:
    """limit / ((qmax - qmin) / 2), or limit / qmax for unsigned dtypes; at least 2^-23."""
    low, high = spec.range
    steps = (high - low) / 2 if low else high
    return jnp.maximum(divide(limit, jnp.float32(steps)), MIN_SCALE)


def clipped_scale(threshold: Array, seen: RangeState, spec: QuantSpec) -> Array:
    """The scale of a clipping threshold, real; a NaN or infinity in the data takes its place, so that it is refused."""
    limit = limit_of(seen, spec)
    return scale_for(jnp.where(jnp.isfinite(limit), jnp.minimum(threshold, limit), limit), spec)


def carry(lower: Array, upper: Array, bits: int) -> tuple[Array, Array]:
    """uint32 counts in two limbs: what exceeds `bits` bits of the lower one goes to the upper one."""
    return lower & jnp.uint32(2**bits - 1), upper + (lower >> jnp.uint32(bits))


def last_smallest(errors: Array) -> Array:
    """The index of the smallest along axis 0, the last of equals: of thresholds, the one that clips least."""
    return errors.shape[0] - 1 - jnp.argmin(errors[::-1], axis=0)
