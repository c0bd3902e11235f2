"""Quantizers that train nothing of their own: the plain fake-quantizer, and the cast to float16."""

from functools import partial

import jax
import jax.numpy as jnp

from jquant.numerics.namespace import array_namespace
from jquant.numerics.rounding import to_float16
from jquant.quantizers.base import Core, Slopes, differentiable, fit, legal_scale, on_grid, scale_itself, with_twin
from jquant.types import Array, Quantizer, QuantSpec

# ---------------------------------------------------------------------------------------------------------------------
# fake_quant


def _slopes(x: Array, leaves: tuple[Array, ...], spec: QuantSpec) -> Slopes:
    low, high = map(float, spec.range)
    (scale,) = leaves
    return Slopes((x >= low * scale) & (x <= high * scale), (None,))


_reverse, _both = differentiable(lambda x, leaves, spec: on_grid(x, leaves[0], spec), _slopes)


def _apply_fake_quant(x: Array, scale: Array, spec: QuantSpec, core: Core = _reverse) -> Array:
    """sat(round(x / scale)) * scale, ties by `spec.rounding`, with the saturating straight-through estimator.

    The gradient to x is 1 where qmin * scale <= x <= qmax * scale and 0 elsewhere; the scale gets none.

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
    x, scale = fit(x, scale)
    return core(x, (jax.lax.stop_gradient(legal_scale(scale, spec)),), spec)


fake_quant = with_twin(
    Quantizer(
        apply=_apply_fake_quant,
        init=scale_itself,
        scale=legal_scale,
        name="fake_quant",
        trains_scale=False,
        to_nearest=True,
    ),
    partial(_apply_fake_quant, core=_both),
)

# ---------------------------------------------------------------------------------------------------------------------
# float16


def _cast(x: Array, leaves: tuple[Array, ...], spec: QuantSpec) -> Array:
    return to_float16(x).astype(jnp.float32)


_cast_reverse, _cast_both = differentiable(_cast, lambda x, leaves, spec: Slopes(jnp.abs(x) <= 65504.0, ()))


def _apply_float16(x: Array, parameter: Array, spec: QuantSpec, core: Core = _cast_reverse) -> Array:
    """x rounded to the nearest float16, ties to even, clamped to +-65504. The gradient is 1 inside the range.

    There is no scale: `parameter` is ignored. Specification, section 2.
    """
    return core(jnp.asarray(x, jnp.float32), (), spec)


float16_cast = with_twin(
    Quantizer(
        apply=_apply_float16,
        init=lambda scale, spec: array_namespace(scale).ones_like(scale),
        scale=lambda parameter, spec: array_namespace(parameter).ones_like(parameter),
        name="float16_cast",
        trains_scale=False,
    ),
    partial(_apply_float16, core=_cast_both),
)
