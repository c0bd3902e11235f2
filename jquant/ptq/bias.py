"""Bias correction: what rounding the weights adds to a channel on average is taken out of its bias."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jquant.graph.axes import automatic
from jquant.graph.checks import check_params
from jquant.graph.evaluate import bind_inputs, evaluate
from jquant.graph.float import float_rule
from jquant.graph.operator import eval_float
from jquant.graph.passes import param_uses
from jquant.host.progress import track
from jquant.meanings.fake_quant import fake_quant_weight
from jquant.numerics.fusion import computed_once
from jquant.numerics.namespace import to_device, to_host
from jquant.plan.batch_norm import check_folded
from jquant.plan.scales import check_model
from jquant.ptq.channels import Layer, channel_axis, layers
from jquant.types import Array, CalibrationError, Model, Node, Params, Plan


def correct_bias(model: Model, batches: Iterable[Any], *, reference: Model | None = None) -> Model:
    """Adds E[(W - W_q) x] to every bias: the mean that rounding the weight takes from each output channel.

    x are the operands of the layer in the float model, the same for W and W_q. So only the rounding of the weights is
    corrected. What the values lose (rounding, and above all saturation) is not: a few saturated entries would otherwise
    shift every entry of their channel. A weight that is on its grid leaves its bias as it is, bit for bit.

    A layer is linear before its bias, so a batch takes one evaluation of the float model, and the mean operand is all
    that is kept. Layers without a bias of their own stay as they are (batch norm, once folded, leaves a bias).

    Args:
      model: calibrated.
      batches: calibration data, as for `jq.calibrate`.
      reference: the model that W and x are taken from, in float; `model` if left out. After `jq.ptq.adaround`, the
        model from before it.

    Returns:
      The model with other biases.

    Raises:
      CalibrationError: no batches, or scales that are missing. GraphError: missing params.

    References:
      Nagel et al. 2019, Data-Free Quantization Through Weight Equalization and Bias Correction, section 4.2. E[x] is
      measured, as in appendix D.

    Example:
      model = jq.ptq.correct_bias(jq.calibrate(model, batches), batches)
    """
    check_folded(model.plan, "correct_bias")
    check_model(model)
    before = model.params if reference is None else reference.params
    check_params(model.plan.graph, before)
    corrections = to_host(_corrections(model, before, _mean_operands(model.plan, before, batches)))
    biases = to_host({key: model.params[key] for key in corrections})
    params = {key: biases[key] + correction for key, correction in corrections.items()}
    return model.replace(params={**model.params, **to_device(params)})


def _corrected(plan: Plan) -> dict[str, tuple[Node, Layer]]:
    """Layers with a weight that is rounded and a bias that no other node reads."""
    uses = param_uses(plan.graph)
    return {
        node.name: (node, op)
        for node, op in layers(plan.graph)
        if node.params["weight"] in plan.weights and "bias" in node.params and uses[node.params["bias"]] == 1
    }


def _mean_operands(plan: Plan, reference: Params, batches: Iterable[Any]) -> dict[str, Array]:
    """{layer: the mean over all samples of the operand that it has in float, [1, ...]}."""
    total, samples = dict[str, Array](), 0
    for batch in track(batches, "correcting biases"):
        arrays = jax.tree.map(automatic, batch if isinstance(batch, tuple | list) else (batch,))
        inputs = bind_inputs(plan.graph, arrays)
        if not samples:
            shapes = jax.eval_shape(partial(_sums_of_operands, plan), reference, inputs)
            total = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
        total = _add_operands(plan, total, reference, inputs)
        samples += next(iter(inputs.values())).shape[0]
    if not samples:
        raise CalibrationError("no calibration batches: the iterable was empty (or used up by an earlier pass)")
    return {name: sum_ / np.float32(samples) for name, sum_ in to_host(total).items()}


@partial(jax.jit, static_argnames=("plan",))
def _add_operands(
    plan: Plan, total: dict[str, Array], reference: Params, inputs: Mapping[str, Array]
) -> dict[str, Array]:
    return jax.tree.map(jnp.add, total, _sums_of_operands(plan, reference, inputs))


def _sums_of_operands(plan: Plan, reference: Params, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """{layer: the sum over the samples of a batch of the operand that it has in float, [1, ...]}."""
    wanted, found, rule = _corrected(plan), dict[str, Array](), float_rule(plan.graph, reference)

    def recording(node: Node, *operands: Array) -> Array:
        if node.name in wanted:
            found[node.name] = operands[0].sum(0, keepdims=True)
        return rule(node, *operands)

    evaluate(plan.graph, inputs, recording)
    return found


@jax.jit
def _corrections(model: Model, reference: Params, operands: Mapping[str, Array]) -> dict[str, Array]:
    """{bias: E[(W - W_q) x], [out]}."""
    plan, found = model.plan, {}
    for name, (node, op) in _corrected(plan).items():
        key = node.params["weight"]
        # A product of its own: contracted with the subtraction it would leave a rounding error of itself.
        rounded = computed_once(fake_quant_weight(key, plan, model.params, model.qparams))
        rounded = rounded.transpose(plan.turned[key]) if key in plan.turned else rounded
        alone = replace(op, activation="none", addend=False)
        y = eval_float(alone, operands[name], weight=reference[key] - rounded)
        axis = channel_axis(op, y.ndim)
        found[node.params["bias"]] = y.mean(tuple(i for i in range(y.ndim) if i != axis))
    return found
