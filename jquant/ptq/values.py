"""Scales of values by search: the threshold of the least squared error, weighted by what the outputs make of it."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jquant.calibration.batches import bound_batches
from jquant.calibration.observe import observed_values
from jquant.graph.evaluate import evaluate
from jquant.graph.float import float_rule
from jquant.numerics.rounding import dequantize, quantize
from jquant.plan.batch_norm import check_folded
from jquant.plan.scales import check_model, quantizer_of, scale_of
from jquant.types import Array, Model, Plan, QParams, Rounding

# Of the scale that is there. It is the first of equals: where no gradient arrives, it stays.
_FACTORS = np.asarray([1.0, *(2.0 ** (k / 4) for k in range(-10, 5) if k)], np.float32)

_BLOCK = 1 << 14  # entries: in the cache while all factors are tried


def search_value_scales(model: Model, batches: Iterable[Any], *, seed: int = 0) -> Model:
    """Replaces the scale of every value by the one with the smallest sum of (g (x_hat - x))^2.

    g is the gradient, at each entry of x, of the outputs of the float model in a random direction of +1 and -1. The
    expectation of g^2 is the sum of the squared derivatives of all outputs, so an error counts as far as it reaches
    them: what a relu cuts off behind the value does not, and what a mean dilutes counts little. Scales tried are 2^(k /
    4) times the one that is there, k = -10 .. 4.

    A batch takes one evaluation and one gradient of the float model, all values of which are in memory at once: give
    small batches. 24 samples are enough for a network of images.

    Args:
      model: calibrated.
      batches: calibration data, as for `jq.calibrate`.
      seed: of the random directions.

    Returns:
      The model with other scales of values; those of weights, and fixed scales, stay as they are.

    Raises:
      CalibrationError: no batches, a batch that is not finite, or scales that are missing.

    References:
      Li et al. 2021, BRECQ (the squared gradient in the place of the Hessian); Hutchinson 1990 (random directions).

    Example:
      model = jq.ptq.search_value_scales(jq.calibrate(model, batches), batches)
    """
    check_folded(model.plan, "search_value_scales")
    check_model(model)
    plan, qparams = model.plan, dict(model.qparams)
    total, key = None, jax.random.key(seed)
    for index, inputs in enumerate(bound_batches(plan, batches)):
        found = _errors(model, inputs, jax.random.fold_in(key, index))
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    assert total is not None  # bound_batches raises
    found = {name: _best(plan, qparams, name, error) for name, error in total.items()}
    return model.replace(qparams=qparams | found)


def _best(plan: Plan, qparams: QParams, name: str, error: Array) -> Array:
    spec, factor = plan.spec(name), _FACTORS[int(np.argmin(np.asarray(error)))]
    # Where nothing is better, the parameter itself stays, offsets included.
    return qparams[name] if factor == 1 else quantizer_of(spec).init(scale_of(name, plan, qparams) * factor, spec)


@jax.jit
def _errors(model: Model, inputs: Mapping[str, Array], key: Array) -> dict[str, Array]:
    """{value: the weighted error with each factor, [15]} on one batch."""
    plan, params, qparams = model.plan, model.params, model.qparams
    names = observed_values(plan)

    def outputs(moves: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
        seen: dict[str, Array] = {}

        def moved(name: str, value: Array) -> Array:
            if name not in names:
                return value
            seen[name] = value + moves[name] if name in moves else value
            return seen[name]

        values = evaluate(plan.graph, inputs, float_rule(plan.graph, params), moved)
        found = [values[name] for name in plan.graph.outputs if jnp.issubdtype(values[name].dtype, jnp.floating)]
        signs = (jax.random.rademacher(jax.random.fold_in(key, i), y.shape, y.dtype) for i, y in enumerate(found))
        return sum((jnp.vdot(y, s) for y, s in zip(found, signs, strict=True)), jnp.float32(0.0)), seen

    shapes = jax.eval_shape(lambda: outputs({})[1])
    still = {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in shapes.items()}
    gradients, values = jax.grad(outputs, has_aux=True)(still)
    return _weighted_errors(plan, qparams, values, gradients)


def _weighted_errors(
    plan: Plan, qparams: QParams, values: Mapping[str, Array], gradients: Mapping[str, Array]
) -> dict[str, Array]:
    """{value: the sum of (g (x_hat - x))^2 with each factor}.

    All values of one format go through one loop over blocks of entries, which is compiled once.
    """
    kinds = defaultdict[tuple[str, Rounding], list[str]](list)
    for name in values:
        kinds[plan.spec(name).dtype, plan.spec(name).rounding].append(name)
    found = dict[str, Array]()
    for (dtype, rounding), names in kinds.items():
        parts = [_blocks(values[name]) for name in names]
        owner = np.repeat(np.arange(len(names)), [len(part) for part in parts])
        scales = jnp.stack([_candidates(plan, qparams, name) for name in names])[owner]
        slopes = jnp.concatenate([_blocks(gradients[name]) for name in names])
        of_blocks = jax.lax.map(partial(_block_errors, dtype, rounding), (jnp.concatenate(parts), slopes, scales))
        sums = jax.ops.segment_sum(of_blocks, owner, len(names), indices_are_sorted=True)
        found |= dict(zip(names, sums, strict=True))
    return found


def _block_errors(dtype: str, rounding: Rounding, block: tuple[Array, Array, Array]) -> Array:
    """The sums of (g (x_hat - x))^2 over x and g [_BLOCK], for each of the scales."""
    x, gradient, scales = block

    def error(scale: Array) -> Array:
        rounded = dequantize(quantize(x, scale, dtype, rounding), scale)
        return jnp.sum(jnp.square(gradient * (rounded - x)))

    return jax.lax.map(error, scales)


def _blocks(x: Array) -> Array:
    """[blocks, _BLOCK], the last one filled with zeros: where the gradient is 0, there is no error."""
    count = max(1, -(-x.size // _BLOCK))
    return jnp.pad(x.reshape(-1), (0, count * _BLOCK - x.size)).reshape(count, _BLOCK)


def _candidates(plan: Plan, qparams: QParams, name: str) -> Array:
    """The scale of a value with each factor, as the quantizer has it."""
    spec = plan.spec(name)
    now = scale_of(name, plan, qparams)
    of = jax.vmap(lambda factor: quantizer_of(spec).scale(quantizer_of(spec).init(now * factor, spec), spec))
    return of(jnp.asarray(_FACTORS))
