"""AdaRound: which weights round up is learned layer by layer, against what the layer computes in float."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from jquant.graph.axes import automatic
from jquant.graph.evaluate import bind_inputs, evaluate
from jquant.graph.float import float_rule
from jquant.graph.operator import eval_float
from jquant.host.progress import track
from jquant.numerics.rounding import dequantize, divide, expand, quantize
from jquant.ops.conv import Conv, ConvTranspose, Linear
from jquant.plan.batch_norm import check_folded
from jquant.plan.scales import check_model, quantizer_of, scale_of
from jquant.ptq.channels import Layer, from_rows, layers, rows
from jquant.quantizers import adaround as soft_round
from jquant.quantizers import adaround_parameter, rectified_sigmoid, rounding_regularizer
from jquant.types import Array, CalibrationError, Model, Node, Params, Plan, QConfigError, QParams, QuantSpec

WARM_UP = 0.2  # the share of the steps without the regularizer
BETAS = (20.0, 2.0)
TINY = 1e-30
HIGHEST = jax.lax.Precision.HIGHEST


def adaround(
    model: Model,
    batches: Iterable[Any],
    *,
    steps: int = 1000,
    learning_rate: float = 1e-2,
    strength: float = 10.0,
) -> Model:
    """Learns whether each weight rounds up or down, and moves the weights onto the grid points that it chose.

    Every layer is on its own: its inputs are those of the float model, its goal what it computes from them in float,
    before bias and activation. The squared error is that of the second moments of the inputs, E[x x^T] per group, so
    batches are read once and none is kept. Layers of one shape are optimized together, under vmap. An output channel
    for which nearest rounding was better keeps it: on the calibration data no channel gets worse.

    Nearest rounding then gives what was learned, so `apply`, `lower` and training go on as ever; but keep the scales.

    Args:
      model: calibrated. Its scales stay as they are.
      batches: calibration data, as for `jq.calibrate`.
      steps: of Adam, at least 1.
      learning_rate: of Adam; in units of v, which runs from -2.4 to 2.4.
      strength: of the regularizer, relative to the error of nearest rounding.

    Returns:
      The model with other weights.

    References:
      Nagel et al. 2020, Up or Down? Adaptive Rounding for Post-Training Quantization.
    """
    if steps < 1:
        raise QConfigError(f"steps must be at least 1, not {steps!r}")
    check_folded(model.plan, "adaround")
    check_model(model)
    plan, new = model.plan, dict(model.params)
    moments = _all_moments(plan, new, batches)
    learn = jax.jit(
        jax.vmap(partial(_learn, learning_rate=learning_rate, strength=strength), in_axes=(0, 0, 0, None, None)),
        static_argnums=(3, 4),
    )
    for spec, keys in _alike(plan, new).items():
        ops = {key: _op_of(plan, key) for key in keys}
        weights = jnp.stack([rows(ops[key], new[key]) for key in keys])
        scales = jnp.stack([rows(ops[key], _scale_like(plan, model.qparams, key, new[key])) for key in keys])
        rounded = learn(weights, scales, jnp.stack([moments[key] for key in keys]), spec[0], steps)
        for key, weight in zip(keys, rounded, strict=True):
            new[key] = from_rows(ops[key], weight, new[key].shape)
    return model.replace(params=new)


# ---------------------------------------------------------------------------------------------------------------------
# Layers and their inputs


def _rounded_layers(plan: Plan) -> dict[str, tuple[Node, Layer]]:
    return {n.name: (n, op) for n, op in layers(plan.graph) if n.params["weight"] in plan.weights}


def _op_of(plan: Plan, key: str) -> Layer:
    return next(op for node, op in _rounded_layers(plan).values() if node.params["weight"] == key)


def _alike(plan: Plan, params: Params) -> dict[tuple[QuantSpec, tuple[int, ...]], list[str]]:
    """Weights by what they have in common: the format, and the shape of their rows."""
    found: dict[tuple[QuantSpec, tuple[int, ...]], list[str]] = {}
    for key in dict.fromkeys(node.params["weight"] for node, _ in _rounded_layers(plan).values()):
        spec = plan.weights[key]
        if quantizer_of(spec).has_offset:
            raise QConfigError(
                f"weight {key!r} has an offset to learn (lsq_plus); adaround rounds on a grid without one"
            )
        if not spec.is_float:
            plain = QuantSpec(dtype=spec.dtype, rounding=spec.rounding)
            found.setdefault((plain, rows(_op_of(plan, key), params[key]).shape), []).append(key)
    return found


def _scale_like(plan: Plan, qparams: QParams, key: str, weight: Array) -> Array:
    scale = expand(scale_of(key, plan, qparams), plan.weight_axis.get(key), weight.ndim)
    return jnp.broadcast_to(scale, weight.shape)


def _all_moments(plan: Plan, params: Params, batches: Iterable[Any]) -> dict[str, Array]:
    total = None
    for batch in track(batches, "measuring inputs"):
        arrays = jax.tree.map(automatic, batch if isinstance(batch, tuple | list) else (batch,))
        inputs = bind_inputs(plan.graph, arrays)
        found = _moments(plan, params, inputs)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    if total is None:
        raise CalibrationError("no calibration batches: the iterable was empty (or used up by an earlier pass)")
    return total


@partial(jax.jit, static_argnames=("plan",))
def _moments(plan: Plan, params: Params, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """{weight: sum of x x^T [groups, K, K]} of the inputs that each weight meets in one batch."""
    wanted, found, rule = _rounded_layers(plan), dict[str, Array](), float_rule(plan.graph, params)

    def recording(node: Node, *operands: Array) -> Array:
        if node.name in wanted:
            key = node.params["weight"]
            moment = _moment(wanted[node.name][1], operands[0], params[key].shape)
            found[key] = found[key] + moment if key in found else moment
        return rule(node, *operands)

    evaluate(plan.graph, inputs, recording)
    return found


def _moment(op: Layer, x: Array, shape: tuple[int, ...]) -> Array:
    """The sum of x x^T over positions, [groups, K, K]: x is what a row of `rows` is multiplied by, [K]."""
    patches = _patches(op, x, shape)
    return jnp.einsum("ngk,ngl->gkl", patches, patches, precision=HIGHEST)


def _patches(op: Layer, x: Array, shape: tuple[int, ...]) -> Array:
    """[positions, groups, K]: the layer itself, with an identity for its weight, one group at a time."""
    if isinstance(op, Linear):
        return x.reshape(-1, 1, x.shape[-1])
    axis = x.ndim - 1 if op.channels_last else 1
    split = x.reshape(*x.shape[:axis], op.groups, -1, *x.shape[axis + 1 :])
    alone = jnp.moveaxis(split, axis, 1).reshape(-1, *split.shape[1:axis], *split.shape[axis + 1 :])
    inner = (shape[0] // op.groups if isinstance(op, ConvTranspose) else shape[1], *shape[2:])
    identity = jnp.eye(prod(inner)).reshape(-1, *inner)
    identity = jnp.moveaxis(identity, 0, 1) if isinstance(op, ConvTranspose) else identity
    y = eval_float(replace(op, groups=1, activation="none", addend=False), alone, weight=identity)
    y = jnp.moveaxis(y.reshape(x.shape[0], op.groups, *y.shape[1:]), axis + 1, -1)  # [N, groups, *S, K]
    return jnp.moveaxis(y, 1, -2).reshape(-1, op.groups, identity.shape[0 if isinstance(op, Conv) else 1])


# ---------------------------------------------------------------------------------------------------------------------
# Learning


def _learn(
    weight: Array, scale: Array, moment: Array, spec: QuantSpec, steps: int, *, learning_rate: float, strength: float
) -> Array:
    """The rounded rows of one weight: rows and scales [groups, out / groups, K], moments [groups, K, K]."""
    import optax

    nearest = dequantize(quantize(weight, scale, spec.dtype, spec.rounding), scale)
    moment = moment / jnp.maximum(jnp.trace(moment, axis1=-2, axis2=-1)[:, None, None], TINY)
    baseline = _error(nearest - weight, moment)
    start = adaround_parameter(weight, scale, spec)
    optimizer = optax.adam(learning_rate)

    def loss(v: Array, step: Array) -> Array:
        parameter = jnp.stack([start[0], v])
        error = _error(soft_round(weight, parameter, spec) - weight, moment)
        progress = (step / steps - WARM_UP) / (1.0 - WARM_UP)
        beta = BETAS[1] + (BETAS[0] - BETAS[1]) * (1.0 - jnp.maximum(progress, 0.0))
        unsettled = jnp.where(progress > 0, rounding_regularizer(parameter, beta), 0.0)
        # Relative to nearest rounding and to the length of a row: `strength` means the same for every layer.
        return jnp.sum(error / jnp.maximum(baseline, TINY)) + strength * unsettled / weight.shape[-1]

    def update(state: tuple[Array, Any], step: Array) -> tuple[tuple[Array, Any], None]:
        v, memory = state
        # Optimizers mix integer counts with floats: a user's strict dtype promotion is not for their code.
        with jax.numpy_dtype_promotion("standard"):
            by, memory = optimizer.update(jax.grad(loss)(v, step), memory)
        return (v + by, memory), None

    (v, _), _ = jax.lax.scan(update, (start[1], optimizer.init(start[1])), jnp.arange(steps, dtype=jnp.float32))
    low, high = map(float, spec.range)
    up = jnp.where(rectified_sigmoid(v) >= 0.5, 1.0, 0.0)
    learned = jnp.clip(jnp.floor(divide(weight, scale)) + up, low, high) * scale
    better = _error(learned - weight, moment) < baseline
    return jnp.where(better[..., None], learned, nearest)


def _error(difference: Array, moment: Array) -> Array:
    """E[(d x)^2] of every row d, [groups, out / groups], up to a factor for each group."""
    return jnp.einsum("gok,gkl,gol->go", difference, moment, difference, precision=HIGHEST)
