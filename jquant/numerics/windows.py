"""Reductions over sliding windows: one axis after the other, each window as a few runs of doubling length.

A reduction that is associative and commutative needs about 2 * log2(k) slices an axis instead of k per axis multiplied.
On a CPU that is many times faster than `reduce_window`, which XLA compiles to a scalar loop for small integers.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jquant.types import Array

Combine = Callable[[Array, Array], Array]


def reduce_windows(
    x: Array, kernel: Sequence[int], strides: Sequence[int], dilation: Sequence[int], combine: Combine
) -> Array:
    """Combines the elements of every window over the spatial axes of [N, *S, C], which is padded already.

    `combine(a, b)` gets the elements that come first along the axis as `a`.
    """
    for axis, (k, s, d) in enumerate(zip(kernel, strides, dilation, strict=True), start=1):
        x = _along(x, axis, k, s, d, combine)
    return x


def _along(x: Array, axis: int, kernel: int, stride: int, dilation: int, combine: Combine) -> Array:
    """Runs of 1, 2, 4, ... elements; those that the binary digits of `kernel` name, side by side, make a window."""
    last = (x.shape[axis] - dilation * (kernel - 1) - 1) // stride * stride  # start of the last window
    run, length, used, total = x, 1, 0, None
    while True:
        if kernel & length:
            start = used * dilation
            part = jax.lax.slice_in_dim(run, start, start + last + 1, stride, axis)
            total = part if total is None else combine(total, part)
            used += length
        if 2 * length > kernel:
            assert total is not None
            return total
        size, step = run.shape[axis], length * dilation
        run = combine(
            jax.lax.slice_in_dim(run, 0, size - step, axis=axis), jax.lax.slice_in_dim(run, step, size, axis=axis)
        )
        length *= 2


def larger(a: Array, b: Array) -> Array:
    """The maximum, `a` where equal: the gradient of a tie goes to one element. A NaN is kept."""
    first = a >= b
    return jnp.where(first | jnp.isnan(a) if jnp.issubdtype(a.dtype, jnp.floating) else first, a, b)
