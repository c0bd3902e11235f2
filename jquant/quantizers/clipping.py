"""Parameterized clipping: PACT trains the threshold at which a tensor is clipped."""

from functools import partial

import jax.numpy as jnp
import numpy as np

from jquant.numerics.namespace import array_namespace, real
from jquant.numerics.rounding import divide
from jquant.quantizers.base import Core, Slopes, differentiable, fit, flip, legal_real, on_grid, with_twin
from jquant.types import MIN_SCALE, Array, Quantizer, QuantSpec


def _steps(spec: QuantSpec) -> float:
    """LSB per clipping threshold: qmax unsigned, -qmin signed (a power of two, so that no rounding occurs)."""
    low, high = spec.range
    return float(-low if low else high)


def _init(scale: Array, spec: QuantSpec) -> Array:
    """The threshold alpha = scale * steps, in real."""
    return array_namespace(scale).asarray(scale, np.float32) * _steps(spec)


def _scale(alpha: Array, spec: QuantSpec) -> Array:
    """alpha / steps, made legal: `scale(init(s)) == s` exactly for signed dtypes, to one rounding for unsigned ones."""
    alpha = array_namespace(alpha).asarray(alpha, np.float32)
    return legal_real(divide(alpha, real(_steps(spec))), spec.scale_form)


def _slopes(x: Array, leaves: tuple[Array, ...], spec: QuantSpec) -> Slopes:
    (alpha,), steps = leaves, _steps(spec)
    if spec.scale_form == "pow2":
        threshold = _scale(alpha, spec) * steps  # where the forward clips
    else:
        threshold = jnp.maximum(jnp.abs(alpha), MIN_SCALE * steps)
    above = x >= threshold
    below = x <= -threshold if spec.range[0] else x < 0
    to_alpha = jnp.where(above, 1.0, 0.0)
    if spec.range[0]:
        to_alpha = jnp.where(below, -1.0, to_alpha)
    return Slopes(~(above | below | jnp.isnan(x)), (flip(to_alpha, alpha),))


_reverse, _both = differentiable(lambda x, leaves, spec: on_grid(x, _scale(leaves[0], spec), spec), _slopes)


def _apply_pact(x: Array, alpha: Array, spec: QuantSpec, core: Core = _reverse) -> Array:
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
    x, alpha = fit(x, alpha)
    return core(x, (alpha,), spec)


pact = with_twin(
    Quantizer(apply=_apply_pact, init=_init, scale=_scale, name="pact", to_nearest=True),
    partial(_apply_pact, core=_both),
)
