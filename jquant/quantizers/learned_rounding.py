"""AdaRound: whether each weight rounds up or down is learned, through a smooth step."""

from functools import partial

import jax
import jax.numpy as jnp

from jquant.numerics.rounding import dequantize, divide
from jquant.quantizers.base import Core, Slopes, differentiable, fit, halves, legal_scale, with_twin
from jquant.types import Array, InputError, Quantizer, QuantSpec

STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1  # gamma and zeta: a sigmoid stretched beyond [0, 1] reaches both ends


def rectified_sigmoid(v: Array) -> Array:
    """h(v) = clip(sigmoid(v) * (zeta - gamma) + gamma, 0, 1): the share of an LSB that a weight is rounded up by."""
    return jnp.clip(jax.nn.sigmoid(v) * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW, 0.0, 1.0)


def _scale_and_v(parameter: Array) -> tuple[Array, Array]:
    return halves(parameter, "the scale and v of every element", "jq.quantizers.adaround_parameter(x, scale, spec)")


def rounding_regularizer(parameter: Array, beta: Array | float) -> Array:
    """The sum of 1 - |2 h(v) - 1|^beta, which drives every h to 0 or 1; `beta` falls from 20 to 2 in training.

    Args:
      parameter: [2, *x.shape], what `adaround` takes.
      beta: the larger, the flatter in the middle.

    References:
      Nagel et al. 2020, Up or Down? Adaptive Rounding for Post-Training Quantization, equation 24.
    """
    _, v = _scale_and_v(parameter)
    return jnp.sum(1.0 - jnp.abs(2.0 * rectified_sigmoid(v) - 1.0) ** jnp.asarray(beta, jnp.float32))


def adaround_parameter(x: Array, scale: Array, spec: QuantSpec) -> Array:
    """The parameter [2, *x.shape] of `adaround` at which x comes out as it went in (where it does not saturate).

    Args:
      x: real, the weight.
      scale: real per LSB; scalar, [x.shape[0]], or broadcastable to x. It is not trained.
      spec: the number format.
    """
    x, scale = fit(x, scale)
    scale = jnp.broadcast_to(legal_scale(scale, spec), x.shape)
    ratio = divide(x, scale)
    share = (ratio - jnp.floor(ratio) - STRETCH_LOW) / (STRETCH_HIGH - STRETCH_LOW)
    return jnp.stack([scale, jnp.log(share) - jnp.log1p(-share)])


def _soft(x: Array, leaves: tuple[Array, ...], spec: QuantSpec) -> Array:
    scale, v = leaves
    low, high = map(float, spec.range)
    return dequantize(jnp.clip(jnp.floor(divide(x, scale)) + rectified_sigmoid(v), low, high), scale)


def _slopes(x: Array, leaves: tuple[Array, ...], spec: QuantSpec) -> Slopes:
    scale, v = leaves
    low, high = map(float, spec.range)
    ratio, logistic = divide(x, scale), jax.nn.sigmoid(v)
    up, stretched = jnp.floor(ratio), logistic * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW
    soft = up + jnp.clip(stretched, 0.0, 1.0)
    moves = (stretched > 0) & (stretched < 1) & (soft > low) & (soft < high)
    slope = (STRETCH_HIGH - STRETCH_LOW) * logistic * (1.0 - logistic) * scale
    return Slopes((ratio >= low) & (ratio <= high), (None, jnp.where(moves, slope, 0.0)))


_reverse, _both = differentiable(_soft, _slopes)


def _apply_adaround(x: Array, parameter: Array, spec: QuantSpec, core: Core = _reverse) -> Array:
    """Adaptive rounding: sat(floor(x / scale) + h(v)) * scale, with a trainable v for every element of x.

    h is a rectified sigmoid, 0 or 1 once `rounding_regularizer` has done its work. v has the slope scale * h'(v) where
    nothing is clipped; x passes straight through inside the range, so that what lies before it trains; the scale gets
    no gradient. A plan has one leaf per weight made from its scale, and v needs the weight: there,
    `jq.ptq.adaround` learns the rounding and moves the weights onto the grid.

    Args:
      x: real, any shape.
      parameter: [2, *x.shape], the scale (real per LSB) and v; from `adaround_parameter(x, scale, spec)`.
      spec: the number format.

    Returns:
      Real, float32, the shape of x.

    References:
      Nagel et al. 2020, Up or Down? Adaptive Rounding for Post-Training Quantization, equations 22 and 23.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jquant.quantizers import adaround, adaround_parameter
      >>> from jquant.types import QuantSpec
      >>> x, spec = jnp.array([0.7, -0.2]), QuantSpec(dtype="int4")
      >>> parameter = adaround_parameter(x, 0.5, spec)
      >>> [round(v, 6) for v in adaround(x, parameter, spec).tolist()]
      [0.7, -0.2]
      >>> adaround(x, parameter.at[1].set(jnp.array([9.0, -9.0])), spec).tolist()  # up, down
      [1.0, -0.5]
    """
    scale, v = _scale_and_v(parameter)
    x = jnp.asarray(x, jnp.float32)
    if v.shape != x.shape:
        raise InputError(
            f"adaround takes a v for every element of x {list(x.shape)}, not {list(v.shape)}; make its parameter with "
            "jq.quantizers.adaround_parameter(x, scale, spec), or round the weights of a plan with jq.ptq.adaround"
        )
    return core(x, (legal_scale(scale, spec), v), spec)


def _init(scale: Array, spec: QuantSpec) -> Array:
    """Refuses: a scale alone does not make a parameter with a v for every weight."""
    raise InputError(
        "adaround has a v for every weight, which no calibrated scale can start: use another quantizer in the qconfig, "
        "then jq.ptq.adaround; in code of your own, jq.quantizers.adaround_parameter(x, scale, spec)"
    )


def _scale(parameter: Array, spec: QuantSpec) -> Array:
    return legal_scale(_scale_and_v(parameter)[0], spec)


adaround = with_twin(
    Quantizer(apply=_apply_adaround, init=_init, scale=_scale, name="adaround"), partial(_apply_adaround, core=_both)
)
