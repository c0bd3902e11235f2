"""Fake-quantizers: a tensor is put on its integer grid in the forward, and a rule of a paper replaces the backward.

The forward of every quantizer is `quantize(x, scale) * scale` with the scale that lowering will use, so that a
fake-quantized value and the integer of the program are the same number. Quantizers differ in what the trainable
parameter means and in the gradients. Values are float32: the scale in real per LSB, `x / scale` in LSB.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from jquant.numerics.rounding import MIN_SCALE, dequantize, divide, expand, quantize, snap_to_pow2
from jquant.types import Array, InputError, Quantizer, QuantSpec

# ---------------------------------------------------------------------------------------------------------------------
# What all quantizers share


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _legal(raw: Array, scale_form: str) -> Array:
    """max(|raw|, MIN_SCALE), snapped up to a power of two for "pow2". The gradient ignores the floor and the snap."""
    scale = jnp.maximum(jnp.abs(raw), MIN_SCALE)
    if scale_form == "pow2":
        scale = jnp.where(jnp.isnan(scale), scale, snap_to_pow2(scale))  # the bits of a NaN would snap to -0.0
    return scale


def _legal_forward(raw: Array, scale_form: str) -> tuple[Array, Array]:
    return _legal(raw, scale_form), raw


def _legal_backward(scale_form: str, raw: Array, gradient: Array) -> tuple[Array]:
    return (_flip(gradient, raw),)


_legal.defvjp(_legal_forward, _legal_backward)


def _flip(gradient: Array, raw: Array) -> Array:
    """The gradient of |raw|, with slope 1 at 0, so that a parameter at 0 can leave it."""
    return jnp.where(raw < 0, -gradient, gradient)


def _prepare(x: Array, parameter: Array) -> tuple[Array, Array]:
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


def _forward(x: Array, scale: Array, spec: QuantSpec) -> Array:
    """quantize(x) * scale. A NaN stays one: an integer cannot hold it, and training must not hide it."""
    return jnp.where(jnp.isnan(x), x, dequantize(quantize(x, scale, spec.dtype), scale))


def _sum_to(gradient: Array, shape: tuple[int, ...]) -> Array:
    """Sums over the axes along which an array of `shape` was broadcast."""
    lead = gradient.ndim - len(shape)
    axes = tuple(i for i in range(gradient.ndim) if i < lead or shape[i - lead] == 1)
    return gradient.sum(axes).reshape(shape)


def _scale_itself(scale: Array, spec: QuantSpec) -> Array:
    """`Quantizer.init` where the parameter is the scale."""
    return jnp.asarray(scale, jnp.float32)


def _legal_scale(parameter: Array, spec: QuantSpec) -> Array:
    """`Quantizer.scale` where the parameter is the scale: max(|parameter|, 2^-23), snapped up for pow2."""
    return _legal(jnp.asarray(parameter, jnp.float32), spec.scale_form)


# ---------------------------------------------------------------------------------------------------------------------
# fake_quant


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _fake_quant(x: Array, scale: Array, spec: QuantSpec) -> Array:
    return _forward(x, scale, spec)


def _fake_quant_forward(x: Array, scale: Array, spec: QuantSpec) -> tuple[Array, tuple[Array, Array]]:
    return _forward(x, scale, spec), (x, scale)


def _fake_quant_backward(spec: QuantSpec, saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, scale = saved
    low, high = map(float, spec.range)
    ratio = divide(x, scale)
    return jnp.where((ratio >= low) & (ratio <= high), gradient, 0.0), jnp.zeros_like(scale)


_fake_quant.defvjp(_fake_quant_forward, _fake_quant_backward)


def _apply_fake_quant(x: Array, scale: Array, spec: QuantSpec) -> Array:
    """sat(round_half_even(x / scale)) * scale, with the saturating straight-through estimator.

    The gradient to x is 1 where qmin <= x / scale <= qmax and 0 elsewhere; the scale gets none.

    Args:
      x: real, any shape.
      scale: real per LSB; scalar, [x.shape[0]], or broadcastable to x.
      spec: the number format.

    Returns:
      Real, float32, the shape of x; every value an integer of `spec.range` times the scale.

    References:
      Jacob et al. 2018, Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jquant.quantizers import fake_quant
      >>> from jquant.types import QuantSpec
      >>> x = jnp.array([-9.0, -0.75, 0.25, 0.6, 9.0])
      >>> fake_quant(x, 0.5, QuantSpec(dtype="int4")).tolist()
      [-4.0, -1.0, 0.0, 0.5, 3.5]
      >>> jax.grad(lambda x: fake_quant(x, 0.5, QuantSpec(dtype="int4")).sum())(x).tolist()
      [0.0, 1.0, 1.0, 1.0, 0.0]
    """
    x, scale = _prepare(x, scale)
    return _fake_quant(x, _legal_scale(scale, spec), spec)


fake_quant = Quantizer(apply=_apply_fake_quant, init=_scale_itself, scale=_legal_scale, name="fake_quant")

# ---------------------------------------------------------------------------------------------------------------------
# LSQ


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _lsq(x: Array, scale: Array, spec: QuantSpec) -> Array:
    return _forward(x, scale, spec)


def _lsq_forward(x: Array, scale: Array, spec: QuantSpec) -> tuple[Array, tuple[Array, Array]]:
    return _forward(x, scale, spec), (x, scale)


def _lsq_backward(spec: QuantSpec, saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, scale = saved
    low, high = map(float, spec.range)
    ratio = divide(x, scale)
    slope = jnp.where(ratio <= low, low, jnp.where(ratio >= high, high, jnp.round(ratio) - ratio))
    sharing = math.prod(x.shape) // max(math.prod(scale.shape), 1)  # elements that share one scale
    factor = 1.0 / math.sqrt(max(sharing, 1) * high)
    to_x = jnp.where((ratio > low) & (ratio < high), gradient, 0.0)
    return to_x, _sum_to(gradient * slope, scale.shape) * factor


_lsq.defvjp(_lsq_forward, _lsq_backward)


def _apply_lsq(x: Array, scale: Array, spec: QuantSpec) -> Array:
    """Learned step size: the forward of `fake_quant` with a trainable scale.

    With v = x / scale in LSB, the slope of the scale is round(v) - v inside qmin < v < qmax, and qmin or qmax outside;
    its gradient is multiplied by 1 / sqrt(N * qmax), N the number of elements of x that share a scale. The gradient to
    x is 1 inside and 0 outside. A scale that training drives below 2^-23 acts as 2^-23 and keeps its gradient.

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
    x, scale = _prepare(x, scale)
    return _lsq(x, _legal_scale(scale, spec), spec)


lsq = Quantizer(apply=_apply_lsq, init=_scale_itself, scale=_legal_scale, name="lsq")

# ---------------------------------------------------------------------------------------------------------------------
# PACT


def _steps(spec: QuantSpec) -> float:
    """LSB per clipping threshold: qmax unsigned, -qmin signed (a power of two, so that no rounding occurs)."""
    low, high = spec.range
    return float(-low if low else high)


def _pact_init(scale: Array, spec: QuantSpec) -> Array:
    """The threshold alpha = scale * steps, in real."""
    return jnp.asarray(scale, jnp.float32) * _steps(spec)


def _pact_scale(alpha: Array, spec: QuantSpec) -> Array:
    """alpha / steps, made legal: `scale(init(s)) == s` exactly for signed dtypes, to one rounding for unsigned ones."""
    alpha = jnp.asarray(alpha, jnp.float32)
    return _legal(divide(alpha, jnp.float32(_steps(spec))), spec.scale_form)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _pact(x: Array, alpha: Array, spec: QuantSpec) -> Array:
    return _forward(x, _pact_scale(alpha, spec), spec)


def _pact_forward(x: Array, alpha: Array, spec: QuantSpec) -> tuple[Array, tuple[Array, Array]]:
    return _pact(x, alpha, spec), (x, alpha)


def _pact_backward(spec: QuantSpec, saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, alpha = saved
    steps = _steps(spec)
    if spec.scale_form == "pow2":
        threshold = _pact_scale(alpha, spec) * steps  # where the forward clips
    else:
        threshold = jnp.maximum(jnp.abs(alpha), MIN_SCALE * steps)
    above = x >= threshold
    below = x <= -threshold if spec.range[0] else x < 0
    to_x = jnp.where(above | below | jnp.isnan(x), 0.0, gradient)
    to_alpha = jnp.where(above, gradient, 0.0)
    if spec.range[0]:
        to_alpha = jnp.where(below, -gradient, to_alpha)
    return to_x, _flip(_sum_to(to_alpha, alpha.shape), alpha)


_pact.defvjp(_pact_forward, _pact_backward)


def _apply_pact(x: Array, alpha: Array, spec: QuantSpec) -> Array:
    """Parameterized clipping: the trainable parameter is the threshold, in real, at which x is clipped.

    Unsigned dtypes clip to [0, alpha] with scale alpha / qmax, as in the paper. Signed dtypes clip to [-alpha, alpha]
    with scale alpha / -qmin, the rule for a threshold given by a user (section 2 of the specification), then saturate
    to [qmin, qmax]: all codes are used, and the largest value is alpha - 1 LSB. The gradient to alpha is the sum over
    x >= alpha, and for signed dtypes minus the sum over x <= -alpha; the gradient to x is 1 between and 0 elsewhere.

    Args:
      x: real, any shape.
      alpha: real, trainable; scalar, [x.shape[0]], or broadcastable to x.
      spec: the number format.

    Returns:
      Real, float32, the shape of x.

    References:
      Choi et al. 2018, PACT: Parameterized Clipping Activation for Quantized Neural Networks, equations 1 to 3.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jquant.quantizers import pact
      >>> from jquant.types import QuantSpec
      >>> x = jnp.array([-1.0, 0.6, 2.9, 3.0, 5.0])
      >>> pact(x, 3.0, QuantSpec(dtype="uint2")).tolist()
      [0.0, 1.0, 3.0, 3.0, 3.0]
      >>> float(jax.grad(lambda alpha: pact(x, alpha, QuantSpec(dtype="uint2")).sum())(3.0))
      2.0
    """
    x, alpha = _prepare(x, alpha)
    return _pact(x, alpha, spec)


pact = Quantizer(apply=_apply_pact, init=_pact_init, scale=_pact_scale, name="pact")
