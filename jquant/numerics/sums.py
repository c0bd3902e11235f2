"""Exact sums: in int32 where the worst case fits, else in limbs."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jquant.numerics import limbs
from jquant.numerics.limbs import Limbs
from jquant.types import Array

_REACH = {"bool": 1, "uint8": 255, "int8": 2**7, "int16": 2**15}

MAX_TERMS = 2**23  # of a sum in limbs, which is taken byte by byte in int32


def worst_sum(count: int, dtype: str) -> int:
    """The largest |sum| of so many elements."""
    return count * _REACH[dtype]


def wide_sum(x: Array, axes: Sequence[int], *, keepdims: bool) -> Limbs:
    """The sum over axes of int32 x, elements of an int16 and at most MAX_TERMS of them."""
    return _join(*(part.sum(axes, keepdims=keepdims) for part in (x >> 8, x & 255)))


def running_sum(x: Array, axis: int, *, reverse: bool, exclusive: bool) -> Array:
    """The sums up to every element of an axis, or up to the one before it; `reverse`: counted from the end."""
    axis %= x.ndim
    y = jax.lax.cumsum(x, axis, reverse)
    if not exclusive:
        return y
    n, edge = x.shape[axis], (0, 1) if reverse else (1, 0)
    padded = jnp.pad(y, [edge if i == axis else (0, 0) for i in range(x.ndim)])
    return jax.lax.slice_in_dim(padded, edge[1], edge[1] + n, axis=axis)


def wide_running_sum(x: Array, axis: int, *, reverse: bool, exclusive: bool) -> Limbs:
    """`running_sum` of int32 x, elements of an int16."""
    return _join(*(running_sum(part, axis, reverse=reverse, exclusive=exclusive) for part in (x >> 8, x & 255)))


def _join(high: Array, low: Array) -> Limbs:
    """high * 2^8 + low."""
    return limbs.add(limbs.shift_left(limbs.from_int32(high), jnp.int32(8)), limbs.from_int32(low))
