"""Bias correction: what quantization adds to a channel on average is taken out of its bias."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jquant.batch_norm import check_folded
from jquant.ir.evaluate import bind_inputs, evaluate
from jquant.ir.graph import check_params
from jquant.ir.passes import param_uses
from jquant.ops.base import derived_scale
from jquant.ops.conv import activate
from jquant.progress import track
from jquant.ptq.channels import Layer, channel_axis, layers
from jquant.quantizers import fake_quant
from jquant.simulate import check_qparams, fake_quant_rule, fake_quant_tap, float_rule, scale_of, value_scales
from jquant.types import Array, CalibrationError, Node, Params, Plan, QParams, QuantSpec

BIAS = QuantSpec(dtype="int32")


def correct_bias(
    plan: Plan, params: Params, qparams: QParams, batches: Iterable[Any], *, reference: Params | None = None
) -> dict[str, Array]:
    """Folds the expected error of every output channel, float minus fake-quant before the activation, into its bias.

    Layers are corrected in order: the error of one is measured behind the corrected ones before it. A batch takes one
    evaluation; corrections of several batches are averaged by their sizes. Layers without a bias of their own stay as
    they are (batch norm, once folded, leaves a bias).

    Args:
      plan, params, qparams: as for `jq.apply`.
      batches: calibration data, as for `jq.calibrate`.
      reference: the params of the float model to come close to; `params` if left out. After `jq.ptq.adaround`, the
        params from before it.

    Returns:
      New params.

    References:
      Nagel et al. 2019, Data-Free Quantization Through Weight Equalization and Bias Correction, section 4.2 and
      appendix D (with data).
    """
    check_folded(plan, "correct_bias")
    check_params(plan.graph, params)
    check_qparams(plan, qparams)
    params, total, samples = dict(params), None, 0
    reference = params if reference is None else dict(reference)
    for batch in track(batches, "correcting biases"):
        inputs = bind_inputs(plan.graph, batch if isinstance(batch, tuple | list) else (batch,))
        size = next(iter(inputs.values())).shape[0]
        found = jax.tree.map(
            lambda v, size=size: v * size, _corrections(plan, params, reference, dict(qparams), inputs)
        )
        total = found if total is None else jax.tree.map(jnp.add, total, found)
        samples += size
    if total is None:
        raise CalibrationError("no calibration batches: the iterable was empty (or used up by an earlier pass)")
    return params | {key: params[key] + correction / samples for key, correction in total.items()}


@partial(jax.jit, static_argnames=("plan",))
def _corrections(
    plan: Plan, params: Params, reference: Params, qparams: QParams, inputs: Mapping[str, Array]
) -> dict[str, Array]:
    """{bias: mean error [out]} on one batch."""
    uses, scales = param_uses(plan.graph), value_scales(plan, qparams)
    corrected = {n.name: op for n, op in layers(plan.graph) if "bias" in n.params and uses[n.params["bias"]] == 1}
    wanted: dict[str, Array] = {}
    corrections: dict[str, Array] = {}

    def observe(node: Node, op: Layer, y: Array) -> Array:
        wanted[node.name] = _mean(op, y)
        return y

    def correct(node: Node, op: Layer, y: Array) -> Array:
        axis = channel_axis(op, y.ndim)
        error = wanted[node.name] - _mean(op, y)
        corrections[node.params["bias"]] = error
        old = params[node.params["bias"]]
        moved = on_grid(node, old + error) - on_grid(node, old)  # later layers see the bias as it will be rounded
        return y + moved.reshape([-1 if i == axis else 1 for i in range(y.ndim)])

    def on_grid(node: Node, bias: Array) -> Array:
        key, scale = node.params["weight"], scales[node.inputs[0]]
        if key not in plan.weights or scale is None:
            return bias
        return fake_quant(bias, derived_scale(node.op, scale, weight=scale_of(key, plan, qparams)), BIAS)

    evaluate(plan.graph, inputs, _before_activation(float_rule(plan.graph, reference), corrected, observe))
    quantized = _before_activation(fake_quant_rule(plan, params, qparams), corrected, correct)
    evaluate(plan.graph, inputs, quantized, fake_quant_tap(plan, qparams))
    return corrections


def _mean(op: Layer, y: Array) -> Array:
    axis = channel_axis(op, y.ndim)
    return y.mean(tuple(i for i in range(y.ndim) if i != axis))


def _before_activation(
    rule: Callable[..., Array], where: Mapping[str, Layer], change: Callable[[Node, Layer, Array], Array]
) -> Callable[..., Array]:
    """A rule that lets `change` at the values of some layers before their fused activation."""

    def changed(node: Node, *operands: Array) -> Array:
        op = where.get(node.name)
        if op is None:
            return rule(node, *operands)
        y = rule(replace(node, op=replace(op, activation="none")), *operands)
        return activate(change(node, op, y), op.activation)

    return changed
