"""Weight scales by search: of many thresholds, the one that leaves the smallest squared error in each channel."""

from functools import partial

import jax
import jax.numpy as jnp

from jquant.numerics.rounding import dequantize, quantize
from jquant.observers import min_max
from jquant.plan.batch_norm import raise_collapsed_scales, weights_to_quantize
from jquant.plan.scales import check_model, quantizer_of, scale_of
from jquant.types import Array, Model, QConfigError, QuantSpec

WIDEST = 1.2  # thresholds up to this multiple of max |w|


def search_weight_scales(model: Model, *, candidates: int = 120) -> Model:
    """Replaces the scale of every weight by the one with the smallest squared error, per channel where the spec is.

    Candidates are `k / candidates * 1.2 * max |w|`, k = 1 .. candidates, and the scale that is there already, so the
    error never grows. It is computed from the weights themselves, with the scale as it will be used (snapped for pow2).

    Args:
      model: calibrated.
      candidates: thresholds tried, at least 1.

    Returns:
      The model with other scales of weights; those of values, and fixed scales, stay as they are. A learned offset
      (LSQ+) starts at 0 again.

    References:
      Nagel et al. 2021, A White Paper on Neural Network Quantization, section 3.1 (MSE range setting).
    """
    if candidates < 1:
        raise QConfigError(f"candidates must be at least 1, not {candidates!r}")
    check_model(model)
    plan, params, qparams = model.plan, model.params, model.qparams
    found, weights = dict(qparams), weights_to_quantize(plan, params)
    for key, spec in plan.weights.items():
        if spec.fixed_scale is None and not spec.is_float:
            axis = plan.weight_axis.get(key)
            best = _search(weights[key], scale_of(key, plan, qparams), spec, axis, candidates)
            found[key] = quantizer_of(spec).init(best, spec)
    return raise_collapsed_scales(model.replace(qparams=found))


@partial(jax.jit, static_argnames=("spec", "axis", "candidates"))
def _search(weight: Array, current: Array, spec: QuantSpec, axis: int | None, candidates: int) -> Array:
    """The best scale: scalar, or [channels]."""
    data = weight.reshape(1, -1) if axis is None else jnp.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    observer, quantizer = min_max(), quantizer_of(spec)
    widest = observer.finalize(observer.update(observer.init(data.shape[0]), data), spec) * WIDEST

    def used(scale: Array) -> Array:
        return quantizer.scale(quantizer.init(scale, spec), spec)

    def error(scale: Array) -> Array:
        scale = used(scale)[:, None]
        return jnp.sum(jnp.square(dequantize(quantize(data, scale, spec.dtype, spec.rounding), scale) - data), axis=1)

    shares = jnp.arange(1, candidates + 1, dtype=jnp.float32) / candidates
    tried = jnp.concatenate([jnp.broadcast_to(current, widest.shape)[None], shares[:, None] * widest])
    best = jnp.argmin(jax.lax.map(error, tried), axis=0)  # one candidate at a time; ties keep the earlier, the current
    chosen = jnp.take_along_axis(tried, best[None], axis=0)[0]
    return chosen[0] if axis is None else chosen
