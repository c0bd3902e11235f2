"""Sums of gradients over the slices of a batch, in their order: on one device, and around a ring of devices.

Memory does not grow with the number of slices: one sum, the gradients of one slice, and on a mesh a copy of those in
the form that travels.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jquant.numerics.fusion import computed_once
from jquant.types import Array

One = Callable[..., tuple[Any, Any, Any]]  # (trainable, context, batch, key) -> gradients, statistics, metrics


def run_slices(one: One, trainable: Any, context: Any, parts: Any) -> tuple[Any, Any]:
    """The sum of the gradients, first to last, and (statistics, metrics) of each slice, [slices, ...].

    Args:
      one: gradients, statistics and metrics of a slice.
      trainable, context: what every slice reads.
      parts: (batch, keys), arrays [slices, ...].
    """

    def add(total: Any, part: Any) -> tuple[Any, Any]:
        grads, *rest = one(trainable, context, *part)
        return jax.tree.map(jnp.add, total, _apart(grads)), tuple(rest)

    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, trainable), parts)


def spread_slices(
    one: One, trainable: Any, context: Any, parts: Any, mesh: Mesh, axis: str, order: Literal["fixed", "any"]
) -> tuple[Any, Any]:
    """`run_slices` on a mesh: slice i runs on device i % devices, so that the sum meets them in their order."""
    devices = mesh.shape[axis]
    rounds, whole = PartitionSpec(None, axis), PartitionSpec()
    parts = jax.tree.map(lambda v: v.reshape(v.shape[0] // devices, devices, *v.shape[1:]), parts)
    parts = jax.lax.with_sharding_constraint(parts, NamedSharding(mesh, rounds))
    add_all = _around if order == "fixed" else _each_alone

    def on_device(trainable: Any, context: Any, parts: Any) -> tuple[Any, Any]:
        # Varying over the mesh, so that a gradient is that of the slice and not summed by JAX in an order of its own.
        trainable, context = jax.tree.map(lambda v: jax.lax.pcast(v, (axis,), to="varying"), (trainable, context))
        total, rest = add_all(one, trainable, context, jax.tree.map(lambda v: v[:, 0], parts), axis, devices)
        return total, jax.tree.map(lambda v: v[:, None], rest)

    spread = jax.shard_map(on_device, mesh=mesh, in_specs=(whole, whole, rounds), out_specs=(whole, rounds))
    total, rest = spread(trainable, context, parts)
    rest = jax.tree.map(lambda v: v.reshape(v.shape[0] * devices, *v.shape[2:]), rest)
    return total, jax.lax.with_sharding_constraint(rest, NamedSharding(mesh, whole))


def _each_alone(one: One, trainable: Any, context: Any, parts: Any, axis: str, devices: int) -> tuple[Any, Any]:
    total, rest = run_slices(one, trainable, context, parts)
    return jax.lax.psum(total, axis), rest


def _around(one: One, trainable: Any, context: Any, parts: Any, axis: str, devices: int) -> tuple[Any, Any]:
    flat, restore = ravel_pytree(trainable)
    length = -(-flat.size // devices)

    def add(total: Array, part: Any) -> tuple[Array, Any]:
        grads, *rest = one(trainable, context, *part)
        flat = jnp.pad(ravel_pytree(_apart(grads))[0], (0, devices * length - flat_size))
        return _ring_sum(total, flat.reshape(devices, length), axis), tuple(rest)

    flat_size = flat.size
    begin = jax.lax.pcast(jnp.zeros((devices, length), flat.dtype), (axis,), to="varying")
    total, rest = jax.lax.scan(add, begin, parts)
    first = jax.lax.axis_index(axis) == 0
    total = jax.lax.psum(jnp.where(first, total, 0), axis)  # which holds it; adding zeros changes no bit
    return restore(total.ravel()[:flat_size]), rest


def _ring_sum(total: Array, own: Array, axis: str) -> Array:
    """total + own of device 0 + own of device 1 ..., each [devices, n], one row after the other around the ring.

    The result lies on device 0. In step t device d adds its row t - d to what its neighbour sent, so that all devices
    work at once: 2 devices - 1 steps of one row each.
    """
    devices, me = own.shape[0], jax.lax.axis_index(axis)
    ring = [(i, (i + 1) % devices) for i in range(devices)]

    def step(carry: tuple[Array, Array], t: Array) -> tuple[tuple[Array, Array], None]:
        total, received = carry
        row = jnp.clip(t - me, 0, devices - 1)  # outside of the range the sum is of no use, and nothing reads it
        begun = jnp.where(me == 0, jax.lax.dynamic_index_in_dim(total, row, keepdims=False), received)
        received = jax.lax.ppermute(begun + jax.lax.dynamic_index_in_dim(own, row, keepdims=False), axis, ring)
        done = t - (devices - 1)
        ended = jax.lax.dynamic_update_index_in_dim(total, received, jnp.maximum(done, 0), axis=0)
        return (jnp.where((me == 0) & (done >= 0), ended, total), received), None

    (total, _), _ = jax.lax.scan(step, (total, own[0]), jnp.arange(2 * devices - 1))
    return total


def _apart(grads: Any) -> Any:
    """Gradients that are rounded before they are added.

    XLA contracts a multiplication and the addition behind it to one rounding, on a CPU through a barrier as well, and
    not through a division.
    """
    # The barrier in front: without it XLA computes the quotients into arrays of their own.
    return jax.tree.map(computed_once, jax.lax.optimization_barrier(grads))
