"""Stable sorting of integers and floats."""

import jax
import jax.numpy as jnp

from jquant.numerics.rounding import widen
from jquant.types import Array


def sorted_indices(x: Array, axis: int, descending: bool) -> Array:
    """int32 positions along `axis` that sort x; equal elements keep their order, lower index first."""
    axis %= x.ndim
    key = _reversed(x) if descending else x
    position = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
    if _is_narrow(x) and x.shape[axis] <= 2**16:  # value and position in one int32: several times faster on a CPU
        packed = jax.lax.sort((widen(key) << 16) | position, dimension=axis, is_stable=False)
        return packed & 0xFFFF
    return jax.lax.sort((key, position), dimension=axis, is_stable=True, num_keys=1)[1]


def sorted_values(x: Array, axis: int, descending: bool) -> Array:
    """Integers or masks in order."""
    if not descending:
        return jax.lax.sort(x, dimension=axis % x.ndim)
    return _reversed(jax.lax.sort(_reversed(x), dimension=axis % x.ndim))


def _reversed(x: Array) -> Array:
    """A key in the opposite order. For integers the complement, since -(-128) is no int8."""
    return -x if jnp.issubdtype(x.dtype, jnp.floating) else ~x


def _is_narrow(x: Array) -> bool:
    return x.dtype in (jnp.bool_, jnp.int8, jnp.int16, jnp.uint8)
