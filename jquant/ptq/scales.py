"""Weight scales by search: of many thresholds, the one that leaves the smallest squared error in each channel."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jquant.numerics.namespace import array_namespace, to_host
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
    plan, params = model.plan, model.params
    qparams = to_host(model.qparams)
    found, weights = dict(qparams), to_host(weights_to_quantize(plan, params))
    for key, spec in plan.weights.items():
        if spec.fixed_scale is None and not spec.is_float:
            weight, axis = weights[key], plan.weight_axis.get(key)
            xp = array_namespace(weight)
            data = (
                weight.reshape(1, -1) if axis is None else xp.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
            )
            current = scale_of(key, plan, qparams)
            search = _search if xp is jnp else _search_in_blocks
            best: Any = search(data, current, spec, candidates)
            found[key] = quantizer_of(spec).init(best[0] if axis is None else best, spec)
    return raise_collapsed_scales(model.replace(qparams=found))


def _search_in_blocks(data: Array, current: Array, spec: QuantSpec, candidates: int) -> np.ndarray:
    """`_search` of rows in blocks of few shapes, so that it is compiled a few times and not for every weight."""
    length = max(16, 1 << (data.shape[1] - 1).bit_length())  # zeros in the rest have no error
    rows = max(1, min(64, 2**17 // length))
    scales, found = np.broadcast_to(np.asarray(current), data.shape[:1]), []
    for start in range(0, len(data), rows):
        part = data[start : start + rows]
        missing = rows - len(part)
        block: Any = np.pad(part, ((0, missing), (0, length - data.shape[1])))
        before: Any = np.pad(scales[start : start + rows], (0, missing), constant_values=1)
        found.append(_search(block, before, spec, candidates))
    return np.concatenate([np.asarray(best) for best in found])[: len(data)]


@partial(jax.jit, static_argnames=("spec", "candidates"))
def _search(data: Array, current: Array, spec: QuantSpec, candidates: int) -> Array:
    """The best scale [rows] of each row of [rows, entries]; `current` is a scalar or [rows]."""
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
    return jnp.take_along_axis(tried, best[None], axis=0)[0]
