"""What keeps XLA from computing a value again in each of its readers, which an optimization barrier does not on a CPU.

Fusion copies cheap work into everything that reads its result. That is wrong where the work is not cheap in sum, and
where a reader has a fast form for a finished array alone.
"""

import jax
import jax.numpy as jnp

from jquant.types import Array


def apart(v: Array) -> Array:
    """v, computed before its reader: a selection that is always true, since XLA drops an optimization barrier early.

    Along the longest axis: XLA knows the index of one that has a single element.
    """
    known = [n if isinstance(n, int) else 0 for n in v.shape]  # an open batch is a symbol
    axis = known.index(max(known))
    index = jax.lax.broadcasted_iota(jnp.int32, v.shape, axis)
    return jnp.where(index < v.shape[axis], v, jnp.zeros_like(v))


def held(v: Array, certain: Array) -> Array:
    """v behind a branch on `certain`, a scalar that is true and that XLA cannot know.

    For integers that are read several times along a long chain, as those of residual blocks: XLA would compute each
    from the start of the chain in every reader, in a program that grows with the square of the depth.
    """
    other = jax.lax.neg if jnp.issubdtype(v.dtype, jnp.inexact) else jax.lax.bitwise_not
    return jax.lax.cond(certain, lambda u: u, other, v)


def computed_once(x: Array) -> Array:
    """A float x, divided by a 1 that XLA takes for data, since it repeats no division.

    The division also keeps a product apart from a sum behind it, which XLA would contract to one rounding.

    For values that are read several times and made of long chains: the states of an unrolled recurrence, whose training
    step would take a time that grows with the square of its length, and gradients behind a mask.
    """
    return x / jax.lax.stop_gradient(jnp.where(jnp.isnan(x), x, 1.0))
