"""A convolution or matrix product in parts, whose accumulators are small: XLA writes them to memory, in int32.

`benchmarks/memory.py` measures time and memory against products as a whole. Smaller parts of several examples would
read the weights more often.
"""

from collections.abc import Callable
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jquant.numerics.platform import is_traced_for_another, platform
from jquant.types import Array

OF_EXAMPLES = 2**23  # bytes of the accumulators of a part: of several examples,
OF_ROWS = 2**22  # and of rows of one


class Parts(NamedTuple):
    """`size` of the `total` entries of the result along `axis` at once; each reads `extent` entries, `stride` apart."""

    axis: int
    size: int
    total: int
    stride: int = 1
    extent: int = 1


def are_parts_of_use() -> bool:
    """On one CPU. XLA divides a product over several devices, and not a loop over its batch; a file stays plain."""
    return platform() == "cpu" and jax.device_count() == 1 and not is_traced_for_another()


def parts_of_examples(shape: tuple[int, ...], width: int) -> Parts | None:
    """Parts of a result [N, ...] along axis 0; None where all of it is small, or not even one example is.

    Args:
      shape: of the result; N may be unknown, which is small.
      width: bytes of the accumulator of one element.
    """
    each = width * prod(shape[1:])
    return _parts(0, shape[0], each, OF_EXAMPLES) if isinstance(shape[0], int) and each <= OF_EXAMPLES else None


def parts_of_rows(shape: tuple[int, ...], width: int, stride: int, extent: int) -> Parts | None:
    """Parts of a result [N, H, W, O] along axis 1, of windows of `extent` rows; None where examples do."""
    count = shape[0]
    if not isinstance(count, int) or (count > 1 and width * prod(shape[1:]) <= OF_EXAMPLES):
        return None
    found = _parts(1, shape[1], width * prod(shape) // shape[1], OF_ROWS)
    return None if found is None else found._replace(stride=stride, extent=extent)


def _parts(axis: int, total: int, each: int, most: int) -> Parts | None:
    fitting = max(most // max(each, 1), 1)
    return None if total <= fitting else Parts(axis, -(-total // -(-total // fitting)), total)


def in_parts(
    compute: Callable[[Array, Array | None], Array], parts: Parts, x: Array, addend: Array | None = None
) -> Array:
    """compute(x, addend), in parts; the last one overlaps the one before it where the size does not divide the total.

    Args:
      compute: a function of x and addend whose result has `parts.total` entries along `parts.axis`.
      x: with (total - 1) * stride + extent entries along that axis.
      addend: of the shape of the result, or None.
    """
    axis, size, total, stride, extent = parts

    def of(start: Array | int) -> Array:
        part = jax.lax.dynamic_slice_in_dim(x, start * stride, (size - 1) * stride + extent, axis)
        added = None if addend is None else jax.lax.dynamic_slice_in_dim(addend, start, size, axis)
        return compute(part, added)

    def step(i: Array, found: Array) -> Array:
        start = jnp.minimum(i * size, total - size)
        return jax.lax.dynamic_update_slice_in_dim(found, of(start), start, axis)

    first = jax.eval_shape(of, 0)
    shape = tuple(total if i == axis else n for i, n in enumerate(first.shape))
    # All of it is written over. As it depends on x, XLA cannot make it before x, and hold those of all layers at once.
    blank = jnp.full(shape, x[(0,) * x.ndim].astype(first.dtype))
    return jax.lax.fori_loop(0, -(-total // size), step, blank)
