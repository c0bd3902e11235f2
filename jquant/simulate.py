"""The float and fake-quant meanings of a plan, as rules and taps of the evaluation loop."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jquant.ir.evaluate import bind_inputs, evaluate
from jquant.ir.graph import check_params, is_finite
from jquant.numerics.fusion import computed_once
from jquant.ops.base import derived_scale, eval_float
from jquant.quantizers import fake_quant, float16_cast, forward_mode
from jquant.text import did_you_mean
from jquant.types import Array, CalibrationError, Graph, Node, Params, Plan, QParams, Quantizer, QuantSpec

_BIAS = QuantSpec(dtype="int32")


def float_rule(
    graph: Graph, params: Params, rng: Array | None = None, positions: Mapping[str, Any] | None = None
) -> Callable[..., Array]:
    """The rule of the float meaning. With `rng`, stochastic operators are active, each with a key of its own.

    The key is made of a node's position, in the graph or as `positions` has it.
    """
    if positions is None:
        positions = positions_of(graph) if rng is not None else {}

    def rule(node: Node, *operands: Array) -> Array:
        key = {"rng": jax.random.fold_in(rng, positions[node.name])} if rng is not None and node.op.stochastic else {}
        return eval_float(node.op, *operands, **{role: params[k] for role, k in node.params.items()}, **key)

    return rule


def positions_of(graph: Graph) -> dict[str, int]:
    return {node.name: i for i, node in enumerate(graph.nodes)}


def evaluate_float(graph: Graph, params: Params, *inputs: Array) -> tuple[Array, ...]:
    """Runs a float graph as imported.

    Args:
      graph: a valid graph, in its framework's layout.
      params: {name: float32 array}.
      *inputs: one array for each graph input.

    Returns:
      The outputs, in order.
    """
    check_params(graph, params)
    values = evaluate(graph, bind_inputs(graph, inputs), float_rule(graph, params))
    return tuple(values[name] for name in graph.outputs)


def value_shapes(graph: Graph, params: Mapping[str, Any], batch: int = 2) -> dict[str, tuple[int, ...]]:
    """The shape of every value at a batch size, without computing anything."""
    return {name: value.shape for name, value in value_types(graph, params, batch).items()}


def value_types(graph: Graph, params: Mapping[str, Any], batch: int = 2) -> dict[str, jax.ShapeDtypeStruct]:
    """The shape and the float meaning's dtype of every value. What is not float32 is exact: a mask, index or pixel."""
    inputs = {
        i.name: jax.ShapeDtypeStruct(tuple(batch if n is None else n for n in i.shape), jnp.dtype(i.dtype))
        for i in graph.inputs
    }
    specs = {k: jax.ShapeDtypeStruct(jnp.shape(params[k]), jnp.float32) for k in graph.param_names}

    def run(inputs: dict, params: dict) -> dict:
        return evaluate(graph, inputs, float_rule(graph, params))

    return jax.eval_shape(run, inputs, specs)


def quantizer_of(spec: QuantSpec) -> Quantizer:
    """The quantizer of a spec; a fixed scale is never trained, so it takes plain fake-quant.

    Where the spec cannot choose, it is the forward-mode twin, which serves both directions.
    """
    if spec.is_float:
        return forward_mode(float16_cast)
    if spec.fixed_scale is not None:
        return forward_mode(fake_quant)
    return spec.quantizer or fake_quant


def parameter_of(name: str, spec: QuantSpec, qparams: QParams) -> Array:
    if spec.fixed_scale is not None or spec.is_float:
        return jnp.float32(spec.fixed_scale or 1.0)
    return qparams[name]


class Scales(Mapping[str, Array | None]):
    """The scale (real per LSB) of every value: scalar, per channel for an accumulator, None for float and exact.

    Each is computed when it is asked for, since a trace of hundreds that nobody reads takes seconds. `given` replaces
    some.
    """

    def __init__(self, plan: Plan, qparams: QParams, given: Mapping[str, Array | None] | None = None) -> None:
        self._plan, self._qparams, self._given = plan, qparams, {} if given is None else given
        self._owned = {name for name in plan.owned if not plan.spec(name).is_float}
        self._inputs = {entry.name for entry in plan.graph.inputs}

    def __getitem__(self, name: str) -> Array | None:
        if name in self._given:
            return self._given[name]
        if name in self._owned:
            return scale_of(name, self._plan, self._qparams)
        return None if name in self._inputs else self._follow(self._plan.graph.by_name[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._plan.graph.values)

    def __len__(self) -> int:
        return len(self._plan.graph.values)

    def _follow(self, node: Node) -> Array | None:
        """The scale of a value that has none of its own."""
        plan = self._plan
        spec = plan.values[node.name]
        if spec is None or spec.is_float:
            return None
        numbers = [v for v in node.inputs if v not in plan.exact]
        operands = [scale for v in numbers if (scale := self[v]) is not None]
        weights = {r: scale_of(k, plan, self._qparams) for r, k in node.params.items() if k in plan.weights}
        if len(operands) < len(numbers) or not all(r in weights for r in node.op.weight_roles):
            return None
        if node.op.scale_rule == "same_as_input":
            return operands[0]
        return derived_scale(node.op, *operands, **weights)


def value_scales(plan: Plan, qparams: QParams) -> dict[str, Array | None]:
    """`Scales`, all computed."""
    found: dict[str, Array | None] = {}
    scales = Scales(plan, qparams, given=found)
    for name in plan.graph.values:
        found[name] = scales[name]
    return found


def scale_of(name: str, plan: Plan, qparams: QParams) -> Array:
    """The scale of a value or weight that owns one, as the integer program will use it."""
    spec = plan.spec(name)
    return quantizer_of(spec).scale(parameter_of(name, spec, qparams), spec)


@jax.custom_vjp
def straight_through(value: Array, replacement: Array) -> Array:
    """`replacement` in the forward pass, the gradient of `value` in the backward pass."""
    return replacement


straight_through.defvjp(lambda value, replacement: (replacement, None), lambda _, g: (g, jnp.zeros_like(g)))


def check_qparams(plan: Plan, qparams: QParams) -> None:
    """Every scale is there, float32 and finite; its quantizer makes it positive.

    Raises:
      CalibrationError: what is missing or wrong, and how to get it.
    """
    if not isinstance(qparams, Mapping):
        raise CalibrationError(
            f"qparams must be a mapping of name to scale, not {type(qparams).__name__}; call jq.calibrate"
        )
    wanted = plan.trained
    missing = [n for n in wanted if n not in qparams]
    if missing:
        shown = ", ".join(map(repr, missing[:3])) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise CalibrationError(f"no scale for {shown}; call jq.calibrate(plan, params, batches) first")
    extra = [n for n in qparams if n not in wanted]
    if extra:
        raise CalibrationError(
            f"qparams has {extra[0]!r}, which the plan does not{did_you_mean(extra[0], wanted)}; calibrate this plan"
        )
    for name in wanted:
        if getattr(qparams[name], "dtype", None) != jnp.float32:
            raise CalibrationError(f"the scale of {name!r} is not a float32 array")
        if not is_finite(qparams[name]):
            raise CalibrationError(
                f"the scale of {name!r} is not finite; lower the learning rate of the scales, or calibrate again"
            )


def fake_quant_rule(
    plan: Plan,
    params: Params,
    qparams: QParams,
    rng: Array | None = None,
    *,
    weights: Params | None = None,
    scales: Mapping[str, Array | None] | None = None,
    positions: Mapping[str, Any] | None = None,
) -> Callable[..., Array]:
    """The rule of the fake-quant meaning: weights and bias on their integer grids, then the float operator.

    `weights` are those of `fake_quant_weights`, `scales` `Scales`, `positions` as for `float_rule`: given
    where the nodes to evaluate are not quite those of the plan.
    """
    scales = Scales(plan, qparams) if scales is None else scales
    base = {**params, **(fake_quant_weights(plan, params, qparams) if weights is None else weights)}
    if positions is None:
        positions = positions_of(plan.graph) if rng is not None else {}

    def rule(node: Node, *operands: Array) -> Array:
        # Where it is used, not before: the gradients of several uses are summed as the weight is stored.
        turned = [k for k in node.params.values() if k in plan.turned and k in plan.weights]
        own = base | {k: base[k].transpose(plan.turned[k]) for k in turned}
        if needs_operand_scale(node, plan) and (x_scale := scales[node.inputs[0]]) is not None:
            key, bias = node.params["weight"], node.params["bias"]
            acc_scale = derived_scale(node.op, x_scale, weight=scale_of(key, plan, qparams))
            own |= {bias: forward_mode(fake_quant)(params[bias], jax.lax.stop_gradient(acc_scale), _BIAS)}
        return float_rule(plan.graph, own, rng, positions)(node, *operands)

    return rule


def needs_operand_scale(node: Node, plan: Plan) -> bool:
    """Whether the node has a bias on the grid of its accumulator."""
    return node.params.get("weight") in plan.weights and "bias" in node.params and bool(node.inputs)


def fake_quant_weights(plan: Plan, params: Params, qparams: QParams) -> dict[str, Array]:
    return {key: fake_quant_weight(key, plan, params, qparams) for key in plan.weights}


def fake_quant_weight(key: str, plan: Plan, params: Params, qparams: QParams) -> Array:
    """A weight on its grid, in the form that its quantizer trains with; before the transposition in `plan.turned`."""
    weight, spec = params[key], plan.weights[key]
    quantizer, parameter = quantizer_of(spec), expand_weight(key, plan, qparams, weight.ndim)
    axes = plan.turned.get(key)
    if axes is None:
        return quantizer(weight, parameter, spec)
    back = [axes.index(i) for i in range(weight.ndim)]
    lead = parameter.ndim - weight.ndim
    if lead >= 0:
        parameter = parameter.transpose(*range(lead), *(lead + axis for axis in back))
    return quantizer(weight.transpose(back), parameter, spec)


def expand_weight(key: str, plan: Plan, qparams: QParams, rank: int) -> Array:
    """The quantizer parameter of a weight, shaped to broadcast against it."""
    parameter = parameter_of(key, plan.weights[key], qparams)
    if parameter.ndim == 0 or key not in plan.weight_axis:
        return parameter
    axis, leading = plan.weight_axis[key], parameter.shape[:-1]  # LSQ+ has [2, channels]
    return parameter.reshape(*leading, *(-1 if i == axis else 1 for i in range(rank)))


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


def evaluate_plan(
    plan: Plan,
    params: Params,
    qparams: QParams,
    inputs: Mapping[str, Array],
    *,
    quantized: bool,
    rng: Array | None = None,
) -> dict[str, Array]:
    """All values of the plan's graph by name, in float or fake-quant."""
    if not quantized:
        return evaluate(plan.graph, inputs, float_rule(plan.graph, params, rng))
    return evaluate(plan.graph, inputs, fake_quant_rule(plan, params, qparams, rng), fake_quant_tap(plan, qparams))
