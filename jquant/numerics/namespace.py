"""One arithmetic for the host and for traces: each function computes in the array namespace of its operands.

What happens once a model (folding, scales, mantissas, tables) is given numpy arrays and runs in numpy, where nothing is
compiled. Inside jit the same lines are given tracers and run in jax.numpy. Integer arithmetic, and float32 sums,
products, quotients and square roots that are rounded one by one, have the same bits in both.

References:
  Python array API standard 2024.12, `__array_namespace__`.
"""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from jquant.numerics.fusion import computed_once
from jquant.types import Array

State = TypeVar("State")


def array_namespace(*operands: Any) -> Any:
    """`jax.numpy` where an operand is a JAX array or a tracer; else numpy."""
    return jnp if any(isinstance(operand, jax.Array) for operand in operands) else np


def traced_once(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """The function under `jax.jit` for JAX arrays, so that many uses in one program are traced once; else as it is."""
    compiled = jax.jit(function, **options)

    @wraps(function)
    def choose(*operands: Any, **static: Any) -> Any:
        leaves = jax.tree.leaves(operands)
        return (compiled if array_namespace(*leaves) is jnp else function)(*operands, **static)

    return choose


def to_host(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays by name as numpy arrays. A tracer stays, and so does an array of which other processes hold parts.

    Arrays of several devices stay, too: the devices share their work.
    """

    def fetch(array: Any) -> Any:
        if not isinstance(array, jax.Array):
            return np.asarray(array)
        if isinstance(array, jax.core.Tracer) or (len(array.sharding.device_set) > 1 and not array.is_fully_replicated):
            return array
        return np.asarray(array)

    return {name: fetch(array) for name, array in arrays.items()}


def to_device(tree: State) -> State:
    """A tree with its numpy arrays as JAX arrays. jnp.asarray would compile a program for each shape.

    One call for thousands of small arrays takes half the time of a call each.
    """
    leaves, structure = jax.tree.flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if not isinstance(leaf, jax.Array)]
    for i, array in zip(places, jax.device_put([leaves[i] for i in places]), strict=True):
        leaves[i] = array
    return cast(State, jax.tree.unflatten(structure, leaves))


def real(value: float) -> Array:
    """A float32 number in numpy, which joins numpy and JAX arrays alike."""
    return cast(Array, np.float32(value))


def barrier(x: Array) -> Array:
    """x, which the compiler must not join with what follows: each operation is rounded by itself, as in numpy.

    The barrier keeps a rewrite from seeing both sides, `computed_once` a product out of the sum behind it.
    """
    return jax.lax.optimization_barrier(computed_once(x)) if array_namespace(x) is jnp else x


def constant(x: Array) -> Array:
    """x, without a gradient."""
    return jax.lax.stop_gradient(x) if array_namespace(x) is jnp else x


def bits_of(x: Array) -> Array:
    """The bit pattern of float32, as int32."""
    if array_namespace(x) is np:
        return cast(Array, np.asarray(x, np.float32).view(np.int32))
    return jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)


def float_of(bits: Array) -> Array:
    """The float32 with a bit pattern."""
    if array_namespace(bits) is np:
        return cast(Array, np.asarray(bits, np.int32).view(np.float32))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def bit_length(v: Array) -> Array:
    """Bits up to the highest one that is set, of int32 v >= 0: 0 for 0."""
    if array_namespace(v) is np:
        return cast(Array, np.frexp(np.asarray(v, np.float64))[1].astype(np.int32))
    return 32 - jax.lax.clz(v)


def repeat(count: int, step: Callable[[Any, State], State], state: State) -> State:
    """`state` after `count` times `step(i, state)`: a rolled loop inside jit."""
    if array_namespace(*jax.tree.leaves(state)) is jnp:
        return jax.lax.fori_loop(0, count, step, state)
    for i in range(count):
        state = step(i, state)
    return state
