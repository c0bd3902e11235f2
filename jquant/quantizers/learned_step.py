"""Learned step size: LSQ trains the scale, LSQ+ the scale and the offset of the grid."""

import math
from functools import partial

import jax.numpy as jnp
import numpy as np

from jquant.numerics.namespace import array_namespace
from jquant.numerics.rounding import divide, round_real
from jquant.quantizers.base import (
    Core,
    Slopes,
    differentiable,
    fit,
    halves,
    legal_scale,
    on_grid,
    scale_itself,
    with_twin,
)
from jquant.types import Array, Quantizer, QuantSpec


def _step_slope(ratio: Array, spec: QuantSpec) -> tuple[Array, Array]:
    """Where v = x / scale is inside qmin < v < qmax, and the slope of the scale at each element, in LSB."""
    low, high = map(float, spec.range)
    slope = jnp.where(ratio <= low, low, jnp.where(ratio >= high, high, round_real(ratio, spec.rounding) - ratio))
    return (ratio > low) & (ratio < high), slope


def gradient_factor(x: Array, scale: Array, spec: QuantSpec) -> float:
    """1 / sqrt(N * qmax), N the number of elements of x that share a scale."""
    sharing = math.prod(x.shape) // max(math.prod(scale.shape), 1)
    return 1.0 / math.sqrt(max(sharing, 1) * spec.range[1])


# ---------------------------------------------------------------------------------------------------------------------
# LSQ


def _slopes(x: Array, leaves: tuple[Array, ...], spec: QuantSpec) -> Slopes:
    (scale,) = leaves
    inside, slope = _step_slope(divide(x, scale), spec)
    return Slopes(inside, (slope,), gradient_factor(x, scale, spec))


_reverse, _both = differentiable(lambda x, leaves, spec: on_grid(x, leaves[0], spec), _slopes)


def _apply_lsq(x: Array, scale: Array, spec: QuantSpec, core: Core = _reverse) -> Array:
    """Learned step size: the forward of `fake_quant` with a trainable scale.

    With v = x / scale in LSB, the slope of the scale is round(v) - v inside qmin < v < qmax, and qmin or qmax outside;
    its gradient is multiplied by 1 / sqrt(N * qmax), N the number of elements of x that share a scale. The gradient to
    x is 1 inside and 0 outside. A scale that training drives below 2^-23 acts as 2^-23 and keeps its gradient.

    N counts the elements that this call sees, the batch among them: inside `shard_map` over n devices, or in one of n
    microbatches, the gradient of a scale of values is sqrt(n) times that of the whole batch. Under `jit` with a sharded
    batch it is that of the whole batch.

    Args:
      x: real, any shape.
      scale: real per LSB, trainable; scalar, [x.shape[0]], or broadcastable to x.
      spec: the number format.

    Returns:
      Real, float32, the shape of x.

    References:
      Esser et al. 2020, Learned Step Size Quantization, equations 3 and 5 and section 2.2.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jquant.quantizers import lsq
      >>> from jquant.types import QuantSpec
      >>> x = jnp.array([-9.0, 0.25, 0.75, 9.0])
      >>> lsq(x, 0.5, QuantSpec(dtype="int3")).tolist()
      [-2.0, 0.0, 1.0, 1.5]
      >>> slope = jax.grad(lambda s: lsq(x, s, QuantSpec(dtype="int3")).sum())(0.5)
      >>> round(float(slope), 4)  # (-4 - 0.5 + 0.5 + 3) / sqrt(4 * 3)
      -0.2887
    """
    x, scale = fit(x, scale)
    return core(x, (legal_scale(scale, spec),), spec)


lsq = with_twin(
    Quantizer(apply=_apply_lsq, init=scale_itself, scale=legal_scale, name="lsq", to_nearest=True),
    partial(_apply_lsq, core=_both),
)

# ---------------------------------------------------------------------------------------------------------------------
# LSQ+


def _shifted(x: Array, leaves: tuple[Array, ...], spec: QuantSpec) -> Array:
    scale, offset = leaves
    return on_grid(x - offset, scale, spec) + offset


def _plus_slopes(x: Array, leaves: tuple[Array, ...], spec: QuantSpec) -> Slopes:
    scale, offset = leaves
    inside, slope = _step_slope(divide(x - offset, scale), spec)
    return Slopes(inside, (slope, jnp.where(inside, 0.0, 1.0)), gradient_factor(x, scale, spec))


_plus_reverse, _plus_both = differentiable(_shifted, _plus_slopes)


def _scale_and_offset(parameter: Array) -> tuple[Array, Array]:
    return halves(parameter, "the scale and the offset", "jq.lsq_plus.init(scale, spec)")


def _apply_lsq_plus(x: Array, parameter: Array, spec: QuantSpec, core: Core = _plus_reverse) -> Array:
    """LSQ+: learned step size on a grid with a learned offset, `sat(round((x - offset) / scale)) * scale + offset`.

    With v = (x - offset) / scale, x and the scale have the slopes of LSQ at v; the offset has slope 0 inside
    qmin < v < qmax and 1 outside. The gradients of scale and offset are multiplied by 1 / sqrt(N * qmax). The offset
    starts at 0, where LSQ+ is LSQ. For training studies: no march has a zero point, and `jq.lower` refuses an offset.

    Args:
      x: real, any shape.
      parameter: [2, ...], the scale (real per LSB) and the offset (real), both trainable; each scalar, [x.shape[0]], or
        broadcastable to x.
      spec: the number format.

    Returns:
      Real, float32, the shape of x.

    References:
      Bhalgat et al. 2020, LSQ+: Improving low-bit quantization through learnable offsets and better initialization,
      equations 4 to 6.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jquant.quantizers import lsq_plus
      >>> from jquant.types import QuantSpec
      >>> x, spec = jnp.array([-1.0, -0.25, 0.25, 9.0]), QuantSpec(dtype="uint2")
      >>> lsq_plus(x, jnp.array([0.5, -0.25]), spec).tolist()  # the grid -0.25, 0.25, 0.75, 1.25
      [-0.25, -0.25, 0.25, 1.25]
      >>> slope = jax.grad(lambda p: lsq_plus(x, p, spec).sum())(jnp.array([0.5, -0.25]))
      >>> [round(s, 4) for s in slope.tolist()]  # (0 + 0 + 0 + 3, 1 + 1 + 0 + 1) / sqrt(4 * 3)
      [0.866, 0.866]
    """
    scale, offset = _scale_and_offset(parameter)
    x, scale = fit(x, scale)
    x, offset = fit(x, offset)
    return core(x, (legal_scale(scale, spec), offset), spec)


def _plus_init(scale: Array, spec: QuantSpec) -> Array:
    """[2, ...]: the scale, and an offset of 0."""
    xp = array_namespace(scale)
    scale = xp.asarray(scale, np.float32)
    return xp.stack([scale, xp.zeros_like(scale)])


def _plus_scale(parameter: Array, spec: QuantSpec) -> Array:
    return legal_scale(_scale_and_offset(parameter)[0], spec)


lsq_plus = with_twin(
    Quantizer(apply=_apply_lsq_plus, init=_plus_init, scale=_plus_scale, name="lsq_plus", has_offset=True),
    partial(_apply_lsq_plus, core=_plus_both),
)
