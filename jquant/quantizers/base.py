"""What all quantizers share: a legal scale, the forward, and one derivative for both directions of differentiation."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jquant.numerics.fusion import computed_once
from jquant.numerics.namespace import array_namespace
from jquant.numerics.rounding import divide, expand, round_real, snap_to_pow2
from jquant.types import MIN_SCALE, Array, InputError, Quantizer, QuantSpec

# ---------------------------------------------------------------------------------------------------------------------
# Scales


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def legal(raw: Array, scale_form: str) -> Array:
    """max(|raw|, MIN_SCALE), snapped up to a power of two for "pow2". The derivative ignores the floor and the snap."""
    return _legal(raw, scale_form)


def _legal(raw: Array, scale_form: str) -> Array:
    xp = array_namespace(raw)
    scale = xp.maximum(abs(raw), MIN_SCALE)
    if scale_form == "pow2":
        scale = xp.where(xp.isnan(scale), scale, snap_to_pow2(scale))  # the bits of a NaN would snap to -0.0
    return scale


@legal.defjvp
def _(scale_form: str, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return legal(*primals, scale_form), flip(tangents[0], primals[0])


def flip(gradient: Array, raw: Array) -> Array:
    """The gradient of |raw|, with slope 1 at 0, so that a parameter at 0 can leave it."""
    return jnp.where(raw < 0, -gradient, gradient)


def scale_itself(scale: Array, spec: QuantSpec) -> Array:
    """`Quantizer.init` where the parameter is the scale."""
    return array_namespace(scale).asarray(scale, np.float32)


def legal_scale(parameter: Array, spec: QuantSpec) -> Array:
    """`Quantizer.scale` where the parameter is the scale: max(|parameter|, 2^-23), snapped up for pow2."""
    return legal_real(array_namespace(parameter).asarray(parameter, np.float32), spec.scale_form)


def legal_real(raw: Array, scale_form: str) -> Array:
    """`legal`, in the array namespace of its operand: numpy has no derivatives."""
    return _legal(raw, scale_form) if array_namespace(raw) is np else legal(raw, scale_form)


# ---------------------------------------------------------------------------------------------------------------------
# Values


def fit(x: Array, parameter: Array) -> tuple[Array, Array]:
    """Float32 arrays of which the second broadcasts to the first; a parameter [channels] goes along axis 0."""
    x, parameter = jnp.asarray(x, jnp.float32), jnp.asarray(parameter, jnp.float32)
    if parameter.ndim == 1 and x.ndim > 1 and parameter.shape[0] == x.shape[0]:
        return x, expand(parameter, 0, x.ndim)
    # A [channels] that happens to fit the last axis would be a silent mistake.
    stray = parameter.ndim == 1 and x.ndim > 1 and parameter.shape[0] != 1
    fits = parameter.ndim <= x.ndim and all(
        p in (1, n) for p, n in zip(reversed(parameter.shape), reversed(x.shape), strict=False)
    )
    if stray or not fits:
        raise InputError(
            f"a quantizer parameter of shape {parameter.shape} does not fit x of shape {x.shape}; pass a scalar, "
            "[x.shape[0]], or a shape such as (channels, 1, 1, 1)"
        )
    return x, parameter


def halves(parameter: Array, meaning: str, maker: str) -> tuple[Array, Array]:
    """The two arrays that a parameter [2, ...] holds."""
    parameter = array_namespace(parameter).asarray(parameter, np.float32)
    if parameter.ndim == 0 or parameter.shape[0] != 2:
        raise InputError(
            f"the parameter is {list(parameter.shape)}, and should be [2, ...], {meaning}; make it with {maker}"
        )
    return parameter[0], parameter[1]


def on_grid(x: Array, scale: Array, spec: QuantSpec) -> Array:
    """quantize(x) * scale, in floats throughout. A NaN stays one, so that training does not hide it.

    A single pass over memory once XLA has fused it, as long as no one else needs the quotient.
    """
    level = jnp.clip(round_real(divide(x, scale), spec.rounding), *map(float, spec.range))
    return jnp.where(level == 0, 0.0, level) * scale  # no -0.0, which is no integer


# ---------------------------------------------------------------------------------------------------------------------
# The derivative


class Slopes(NamedTuple):
    """The derivative that a paper gives to each element.

    `inside`  bool, the shape of x: where x passes straight through; the slope of x is 0 elsewhere
    `leaves`  for each trainable array, its slope at each element of x (before `factor`), or None for 0
    `factor`  multiplies the gradient of every leaf
    """

    inside: Array
    leaves: tuple[Array | None, ...]
    factor: float = 1.0


Core = Callable[[Array, tuple[Array, ...], QuantSpec], Array]


def differentiable(forward: Core, slopes: Callable[[Array, tuple[Array, ...], QuantSpec], Slopes]) -> tuple[Core, Core]:
    """`forward(x, leaves, spec)` with the derivative `slopes`: as a custom_vjp, and as its custom_jvp twin.

    The custom_vjp saves x and the leaves alone. The twin can be differentiated in both directions and again: slopes are
    constants to a second differentiation, which is what the straight-through rule (round' = 1) makes of round(v) - v.
    """

    @partial(jax.custom_vjp, nondiff_argnums=(2,))
    def reverse(x: Array, leaves: tuple[Array, ...], spec: QuantSpec) -> Array:
        return forward(x, leaves, spec)

    def reverse_forward(x: Array, leaves: tuple[Array, ...], spec: QuantSpec) -> tuple[Array, Any]:
        return forward(x, leaves, spec), (x, leaves)

    def reverse_backward(spec: QuantSpec, saved: Any, gradient: Array) -> tuple[Array, tuple[Array, ...]]:
        x, leaves = saved
        inside, each, factor = slopes(x, leaves, spec)
        to_leaves = tuple(
            jnp.zeros_like(leaf) if slope is None else sum_to(gradient * slope, leaf.shape) * factor
            for leaf, slope in zip(leaves, each, strict=True)
        )
        return computed_once(jnp.where(inside, gradient, 0.0)), to_leaves

    reverse.defvjp(reverse_forward, reverse_backward)

    @partial(jax.custom_jvp, nondiff_argnums=(2,))
    def both(x: Array, leaves: tuple[Array, ...], spec: QuantSpec) -> Array:
        return forward(x, leaves, spec)

    @both.defjvp
    def _(spec: QuantSpec, primals: Any, tangents: Any) -> tuple[Array, Array]:
        x, leaves = primals
        inside, each, factor = slopes(x, leaves, spec)
        each = jax.tree.map(jax.lax.stop_gradient, each)
        tangent = jnp.where(inside, tangents[0], 0.0)
        for slope, direction in zip(each, tangents[1], strict=True):
            tangent = tangent if slope is None else tangent + slope * (direction * factor)
        return both(x, leaves, spec), tangent

    def aligned(x: Array, leaves: tuple[Array, ...], spec: QuantSpec) -> Array:
        return reverse(*_varying_alike(x, leaves), spec)

    return aligned, both


def _varying_alike(x: Array, leaves: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
    """Inside shard_map: arrays that vary over the same axes of the mesh, as a custom_vjp wants them.

    The cast of a replicated array is what sums its gradient over the shards.
    """
    varies = [_mesh_axes(v) for v in (x, *leaves)]
    axes = frozenset[str]().union(*varies)
    x, *rest = (
        jax.lax.pcast(v, tuple(sorted(axes - own)), to="varying") if axes - own else v
        for v, own in zip((x, *leaves), varies, strict=True)
    )
    return x, tuple(rest)


def _mesh_axes(v: Array) -> frozenset[str]:
    """The axes over which an array varies inside shard_map; jax 0.9 names them otherwise than later ones."""
    kind: Any = jax.typeof(v)
    manual = getattr(kind, "manual_axis_type", None)
    return getattr(kind, "vma", frozenset()) if manual is None else manual.varying


def sum_to(gradient: Array, shape: tuple[int, ...]) -> Array:
    """Sums over the axes along which an array of `shape` was broadcast."""
    lead = gradient.ndim - len(shape)
    axes = tuple(i for i in range(gradient.ndim) if i < lead or shape[i - lead] == 1)
    return gradient.sum(axes).reshape(shape)


def with_twin(quantizer: Quantizer, apply: Callable[[Array, Array, QuantSpec], Array]) -> Quantizer:
    """The quantizer, with its twin on the core that can be differentiated in both directions."""
    quantizer = replace(quantizer, any_order=True)
    return replace(
        quantizer, twin=replace(quantizer, apply=apply, name=f"{quantizer.name}_forward_mode", both_ways=True)
    )
