"""The fake-quant meaning of a plan, as a rule and a tap of the evaluation loop."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jquant.graph.float import float_rule, positions_of
from jquant.graph.operator import Operand, derived_scale, eval_on_grid, rounds_by_itself
from jquant.numerics.fusion import computed_once
from jquant.numerics.namespace import real
from jquant.numerics.rescale import quantize_exactly
from jquant.numerics.rounding import dequantize, expand, quantize
from jquant.ops.conv import Conv, ConvTranspose, Linear, channel_scale
from jquant.plan.scales import Scales, expand_weight, parameter_of, quantizer_of, scale_of
from jquant.quantizers import fake_quant, forward_mode
from jquant.quantizers.surrogate import straight_through
from jquant.types import Array, Graph, Model, Node, Params, Plan, QParams, QuantSpec, Target

_BIAS = QuantSpec(dtype="int32")


def fake_quant_rule(
    plan: Plan,
    params: Params,
    qparams: QParams,
    rng: Array | None = None,
    *,
    weights: Params | None = None,
    scales: Mapping[str, Array | None] | None = None,
    positions: Mapping[str, Any] | None = None,
    on: Mapping[str, Array] | None = None,
) -> Callable[..., Array]:
    """The rule of the fake-quant meaning: weights and bias on their integer grids, then the float operator.

    `on` {weight: bool scalar}: False leaves it and its bias as they are. `weights` are those of `fake_quant_weights`,
    `scales` `Scales`, `positions` as for `float_rule`: given where the nodes to evaluate are not quite those of the
    plan.
    """
    # Of all layers at once, unless scales follow from the step of a loop, or move in the step of training (`on`).
    biases = fake_quant_biases(plan, params, qparams) if scales is None and on is None else {}
    scales = Scales(plan, qparams) if scales is None else scales
    base = {**params, **(fake_quant_weights(plan, params, qparams, on) if weights is None else weights)}
    if positions is None:
        positions = positions_of(plan.graph) if rng is not None else {}

    def rule(node: Node, *operands: Array) -> Array:
        # Where it is used, not before: the gradients of several uses are summed as the weight is stored.
        turned = [k for k in node.params.values() if k in plan.turned and k in plan.weights]
        own = base | {k: base[k].transpose(plan.turned[k]) for k in turned}
        if needs_operand_scale(node, plan) and (x_scale := scales[node.inputs[0]]) is not None:
            key, bias = node.params["weight"], node.params["bias"]
            rounded = biases.get(node.name)
            if rounded is None:
                rounded = fake_quant_bias(node, params[bias], x_scale, scale_of(key, plan, qparams), plan.target)
            own |= {bias: rounded if on is None else jnp.where(on[key], rounded, params[bias])}
        value = float_rule(plan.graph, own, rng, positions)(node, *operands)
        if _is_accumulator(node, plan):
            rounded = _saturated(value, scales[node.name])
        elif (grids := _grids(node, plan, scales)) is not None:
            rounded = _on_grids(node, plan, grids, operands, value)
        else:
            return value
        return rounded if on is None else jnp.where(_all_on(node, on), rounded, value)

    return rule


def fake_quant_bias(node: Node, bias: Array, x_scale: Array, weight_scale: Array, target: Target) -> Array:
    """A bias [O] as the integer of the program times the step of the accumulator; NaN stays NaN.

    Its gradient is 1 where the integer does not saturate.
    """
    return _on_accumulator_grid(bias, *_scales_of_bias(node, x_scale, weight_scale), target)


def fake_quant_biases(plan: Plan, params: Params, qparams: QParams) -> dict[str, Array]:
    """{node: its bias as of `fake_quant_bias`}. All biases are one array on the way, as each kernel is compiled."""
    nodes, scales = [], Scales(plan, qparams)
    columns: list[tuple[Array, ...]] = []
    for node in plan.graph.nodes:
        if needs_operand_scale(node, plan) and (x_scale := scales[node.inputs[0]]) is not None:
            bias, weight_scale = params[node.params["bias"]], scale_of(node.params["weight"], plan, qparams)
            given = bias, *_scales_of_bias(node, x_scale, weight_scale)
            columns.append(tuple(jnp.broadcast_to(array, bias.shape) for array in given))
            nodes.append(node)
    if not nodes:
        return {}
    sizes = [bias.shape[0] for bias, *_ in columns]
    bias, x_scale, weight_scale, acc_scale = map(jnp.concatenate, zip(*columns, strict=True))
    rounded = _on_accumulator_grid(bias, x_scale, weight_scale, acc_scale, plan.target)
    parts = jnp.split(rounded, np.cumsum(sizes)[:-1])
    return {node.name: part for node, part in zip(nodes, parts, strict=True)}


def _scales_of_bias(node: Node, x_scale: Array, weight_scale: Array) -> tuple[Array, Array, Array]:
    """The scales of the operand, of the weight of each channel, and of the accumulator."""
    assert isinstance(node.op, Conv | ConvTranspose | Linear)
    x_scale, weight_scale = jax.lax.stop_gradient((x_scale, weight_scale))
    return x_scale, channel_scale(node.op, weight_scale), derived_scale(node.op, x_scale, weight=weight_scale)


def _on_accumulator_grid(bias: Array, x_scale: Array, weight_scale: Array, acc_scale: Array, target: Target) -> Array:
    near = forward_mode(fake_quant)(bias, acc_scale, _BIAS)
    fixed = jax.lax.stop_gradient(bias)
    exact = dequantize(quantize_exactly(fixed, x_scale, weight_scale, rounding=target.bias_rounding), acc_scale)
    return straight_through(near, jnp.where(jnp.isnan(fixed), fixed, exact))


def needs_operand_scale(node: Node, plan: Plan) -> bool:
    """Whether the node has a bias on the grid of its accumulator."""
    return node.params.get("weight") in plan.weights and "bias" in node.params and bool(node.inputs)


def scales_read(node: Node, plan: Plan) -> tuple[str, ...]:
    """The values whose scales the rule of a node reads."""
    if rounds_by_itself(node.op):
        return (*node.inputs, node.name)
    own = (node.name,) if _is_accumulator(node, plan) else ()
    return (*own, *node.inputs[:1]) if needs_operand_scale(node, plan) else own


def _is_accumulator(node: Node, plan: Plan) -> bool:
    """Whether the result is an int32 sum of its own, and not one that is moved."""
    spec = plan.values[node.name]
    return node.op.keeps_accumulator and spec is not None and spec.is_high_precision


def _saturated(value: Array, scale: Array | None) -> Array:
    """A sum at 32 bits, as the program's; in float32 both ends of the range are 2^31 steps."""
    if scale is None:
        return value
    limit = jax.lax.stop_gradient(scale) * real(2.0**31)
    return jnp.clip(value, -limit, limit)


def _grids(node: Node, plan: Plan, scales: Mapping[str, Array | None]) -> list[Operand] | None:
    """The grids of operands and result, where the operator rounds by itself and all of its numbers lie on grids."""
    names = (*node.inputs, node.name)
    if not rounds_by_itself(node.op) or all(name in plan.exact for name in node.inputs):
        return None
    grids = []
    for name in names:
        if name in plan.exact:
            grids.append(Operand(plan.exact[name], real(1.0), ()))
            continue
        spec, scale = plan.values[name], scales[name]
        if spec is None or scale is None or spec.is_high_precision or quantizer_of(spec).has_offset:
            return None  # float; an accumulator, which is only moved; or a learned offset, which no integer has
        grids.append(Operand(spec.dtype, jax.lax.stop_gradient(scale), ()))
    return grids


def _on_grids(node: Node, plan: Plan, grids: list[Operand], operands: Sequence[Array], value: Array) -> Array:
    """What the integers make of the operands, with the gradient of the float operator, whose result `value` is."""
    fixed = jax.lax.stop_gradient(operands)
    found = eval_on_grid(node.op, grids[:-1], grids[-1], plan.target, *fixed)
    return found if node.name in plan.exact else straight_through(value, found)


def _all_on(node: Node, on: Mapping[str, Array]) -> Array:
    """Whether everything that a node reads and makes is quantized."""
    switched = [on[name] for name in (*node.inputs, node.name, *node.params.values()) if name in on]
    return jnp.all(jnp.stack(switched)) if switched else jnp.bool_(True)


def fake_quant_weights(
    plan: Plan, params: Params, qparams: QParams, on: Mapping[str, Array] | None = None
) -> dict[str, Array]:
    return {key: fake_quant_weight(key, plan, params, qparams, None if on is None else on[key]) for key in plan.weights}


def fake_quant_weight(key: str, plan: Plan, params: Params, qparams: QParams, on: Array | None = None) -> Array:
    """A weight on its grid, in the form that its quantizer trains with; before the transposition in `plan.turned`.

    `on`, a bool scalar: False leaves it as it is.
    """
    weight, spec = params[key], plan.weights[key]
    quantizer, parameter = quantizer_of(spec), expand_weight(key, plan, qparams, weight.ndim)
    axes = plan.turned.get(key)
    if axes is None:
        rounded = quantizer(weight, parameter, spec)
        return rounded if on is None else jnp.where(on, rounded, weight)
    back = [axes.index(i) for i in range(weight.ndim)]
    lead = parameter.ndim - weight.ndim
    if lead >= 0:
        parameter = parameter.transpose(*range(lead), *(lead + axis for axis in back))
    weight = weight.transpose(back)
    rounded = quantizer(weight, parameter, spec)
    return rounded if on is None else jnp.where(on, rounded, weight)


def weight_on_grid(key: str, model: Model) -> Array:
    """A weight on its grid, as the plan has it. Weights on the host stay there, and compile nothing."""
    plan, weight = model.plan, model.params[key]
    spec, quantizer = plan.weights[key], quantizer_of(plan.weights[key])
    if not quantizer.to_nearest:
        return quantizer(weight, expand_weight(key, plan, model.qparams, weight.ndim), spec)
    scale = expand(scale_of(key, plan, model.qparams), plan.weight_axis.get(key), weight.ndim)
    return dequantize(quantize(weight, scale, spec.dtype, spec.rounding), scale)


def fake_quant_tap(plan: Plan, qparams: QParams, *, unrolled: bool = True) -> Callable[[str, Array], Array]:
    """Quantizes every value that has a scale of its own. `unrolled`: the steps of a recurrence follow one another."""
    owned, states = set(plan.owned), _recurrent(plan.graph) - set(plan.exact) if unrolled else set()

    def tap(name: str, value: Array) -> Array:
        if name in owned:
            spec = plan.spec(name)
            value = quantizer_of(spec)(value, parameter_of(name, spec, qparams), spec)
        return computed_once(value) if name in states else value

    return tap


def _recurrent(graph: Graph) -> set[str]:
    """Where values are joined, if a layer runs several times: the states of a recurrence that was unrolled."""
    weights = ((node, role) for node in graph.nodes for role in node.op.weight_roles if role in node.params)
    layers = Counter((type(node.op), node.params[role]) for node, role in weights)
    repeats = max(layers.values(), default=0) > 1
    return {node.name for node in graph.nodes if len(node.inputs) > 1} if repeats else set()
