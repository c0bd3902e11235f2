"""From a calibrated plan to an integer program. Works inside jit as well: accumulators are wider there."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np

from jquant.graph.checks import deployed
from jquant.graph.float import value_shapes
from jquant.graph.operator import Lowered, Operand, lower_op
from jquant.graph.passes import prune
from jquant.host.progress import PATIENCE, track
from jquant.numerics.namespace import real, to_device, to_host
from jquant.numerics.rounding import dequantize, expand, quantize
from jquant.plan.batch_norm import fold_kept
from jquant.plan.scales import check_model, quantizer_of, scale_of, value_scales
from jquant.types import (
    Accumulator,
    Array,
    FrozenMap,
    GraphError,
    LoweringError,
    Model,
    Node,
    NodeFormat,
    Params,
    Plan,
    Program,
    QParams,
)


def lower(model: Model, *, outputs: Sequence[str] | str | None = None) -> Program:
    """Turns a calibrated model into integers: weights, biases, mantissas and shifts.

    Args:
      model: calibrated or trained; a batch norm that `prepare` kept is folded.
      outputs: a deployed output, or several: values of the graph, or their names in the result of the model. Nodes
        that only others need are left out.

    Returns:
      A `Program`: a pytree of integer constants with a static graph. `jq.run` executes it, `jq.save` writes it.

    Raises:
      LoweringError: a node without an integer form, a float value on the way to a deployed output, or a march whose
        arithmetic is not public. CalibrationError: no calibration.

    Example:
      >>> import jax.numpy as jnp, jquant as jq
      >>> x, weights = jnp.array([[1.0, 0.5], [-0.25, 0.75]]), {"w": jnp.array([[0.5, 1.0], [-1.0, 0.25]])}
      >>> graph, params = jq.trace(lambda p, x: x @ p["w"], weights, x)
      >>> model = jq.prepare(graph, params, jq.QConfig(jq.templates.int8_default()), target="nash-e")
      >>> model = jq.calibrate(model, [x])
      >>> print(jq.lower(model))
      nash-e
      name    operator  operands  formats        kernel  accumulator  worst case
      --------------------------------------------------------------------------
      linear  Linear    x         int8 -> int32  matmul  int32        2^14.6
      outputs: linear
    """
    check_model(model)
    with np.errstate(all="ignore"):
        return lower_traced(Model(model.plan, to_host(model.params), to_host(model.qparams)), outputs)


def lower_traced(model: Model, outputs: Sequence[str] | str | None = None) -> Program:
    """`lower` without looking at values, for use inside jit."""
    model = fold_kept(model)
    plan, params, qparams = model.plan, model.params, model.qparams
    _check_target(plan)
    check_offsets(plan, qparams)
    try:
        graph = prune(deployed(plan.graph, outputs))
    except GraphError as error:
        raise LoweringError(str(error)) from error
    for entry in graph.inputs:
        if plan.values[entry.name] is None and entry.name not in plan.exact:
            raise LoweringError(
                f"input {entry.name!r} is float; give it a format: {{{entry.name!r}: jq.Policy(output=jq.int8())}}"
            )
    scales = value_scales(plan, qparams)
    constants, formats, accumulators = lower_nodes(plan, params, qparams, graph.nodes, scales)
    kept = to_device({n: scale for n in graph.values if (scale := scales[n]) is not None})
    inputs = FrozenMap({i.name: dtype_of(i.name, plan) for i in graph.inputs})
    return Program(constants, kept, accumulators, graph, FrozenMap(formats), inputs, plan.target, str(plan.target))


def lower_nodes(
    plan: Plan, params: Params, qparams: QParams, nodes: Sequence[Node], scales: Mapping[str, Array | None]
) -> tuple[dict[str, dict[str, Array]], dict[str, NodeFormat], dict[str, Accumulator]]:
    """Constants, formats, accumulators of some nodes of a plan without kept batch norm; `scales` of all its values."""
    _check_target(plan)
    shapes = {n: (None, *s[1:]) for n, s in value_shapes(plan.graph, params).items()}

    def operand(value: str) -> Operand:
        scale = scales[value]
        return Operand(dtype_of(value, plan), real(1) if scale is None else scale, shapes[value])

    constants: dict[str, dict[str, Array]] = {}
    formats: dict[str, NodeFormat] = {}
    accumulators: dict[str, Accumulator] = {}
    for node in track(nodes, "lowering", after=PATIENCE):
        for value in (*node.inputs, node.name):
            _check_format(_where(node), value, plan, scales[value])
        operands, output = [operand(v) for v in node.inputs], operand(node.name)
        lowered = lower_node(plan, params, qparams, node, operands, output)
        constants[node.name] = dict(lowered.constants)
        formats[node.name] = format_of(operands, output, lowered)
        accumulators |= accumulator_of(node, lowered)
    for constant in jax.tree.leaves(constants):
        assert constant.dtype.itemsize <= 4, constant.dtype  # JAX would cut a 64-bit number in silence
    return to_device(constants), formats, to_device(accumulators)


def lower_node(
    plan: Plan, params: Params, qparams: QParams, node: Node, operands: Sequence[Operand], output: Operand
) -> Lowered:
    """The integer form of one node of a plan.

    Raises:
      LoweringError: with the node and its operator.
    """
    try:
        integers = _integer_params(plan, params, qparams, node)
        if output.dtype == "float16":
            return lower_island(operands, integers, node, plan)
        return lower_op(node.op, operands, output, integers, plan.target)
    except LoweringError as error:
        raise LoweringError(f"{_where(node)}: {error}") from error


def _where(node: Node) -> str:
    return f"node {node.name!r} ({type(node.op).__name__})"


def format_of(operands: Sequence[Operand], output: Operand, lowered: Lowered) -> NodeFormat:
    return NodeFormat(tuple(o.dtype for o in operands), output.dtype, lowered.accumulator, lowered.kernel)


def accumulator_of(node: Node, lowered: Lowered) -> dict[str, Accumulator]:
    """The accumulator of a node by its name; nothing where no bound is known."""
    if lowered.worst_case is None:
        return {}
    bound = np.float32(lowered.worst_case)
    if int(bound) < lowered.worst_case:
        bound = np.nextafter(bound, np.float32(np.inf))
    arrays = cast(tuple[Array, Array | None], (np.asarray(bound), lowered.saturating))
    return {node.name: Accumulator(*arrays)}


def dtype_of(value: str, plan: Plan) -> str:
    """The quantized dtype of a value, or its own where it is exact."""
    return plan.exact.get(value) or plan.spec(value).dtype


def lower_island(inputs: Sequence[Operand], integers: dict[str, Any], node: Node, plan: Plan) -> Lowered:
    """A float16 node keeps its parameters as float, and the scales of its integer operands (1 for the others)."""
    constants = {f"scale_{i}": x.scale for i, x in enumerate(inputs)}
    for role, value in integers.items():
        if isinstance(value, tuple):
            weight, scale = value
            value = dequantize(weight, expand(scale, plan.weight_axis.get(node.params[role]), weight.ndim))
        constants[role] = value
    return Lowered(constants)


def _check_target(plan: Plan) -> None:
    """Raises LoweringError for a march whose integer arithmetic is not public."""
    if not plan.target.integer:
        raise LoweringError(
            f"{plan.target.name}: its integer post-processing is not public, so there is nothing to reproduce; "
            "fake-quant and calibration work. Prepare for jq.targets.NASH_E or NASH_M to get integers"
        )


def check_offsets(plan: Plan, qparams: QParams) -> None:
    """Raises LoweringError where a quantizer has learned an offset: every integer here has zero point 0."""
    for name in plan.trained:
        if not quantizer_of(plan.spec(name)).has_offset:
            continue
        offset = qparams[name][1]
        if isinstance(offset, jax.core.Tracer):
            raise LoweringError(
                f"{name!r} has a learned offset (lsq_plus), and inside jit it is not known whether it is 0; use jq.lsq "
                "for mode 'bit_true'"
            )
        if bool((offset != 0).any()):
            raise LoweringError(
                f"{name!r} has a learned offset (lsq_plus), and {plan.target.name} has no zero point; train it with "
                "jq.lsq, or set the offset, qparams[name][1], to 0 and train on"
            )


def _check_format(where: str, value: str, plan: Plan, scale: Array | None) -> None:
    spec = plan.values[value]
    if value in plan.exact or (spec is not None and spec.is_float):
        return
    if scale is None:
        raise LoweringError(
            f"{where}: {value!r} is float, and on the way to a deployed output. Give it a format in the qconfig, or "
            "name the deployed outputs: jq.lower(..., outputs=[...])"
        )
    dtype, known = plan.spec(value).dtype, plan.target.activation_dtypes
    if dtype not in (*known, "int32"):
        raise LoweringError(f"{where}: {value!r} is {dtype}; {plan.target.name} has {', '.join(known)}")


def _integer_params(plan: Plan, params: Params, qparams: QParams, node: Node) -> dict[str, Any]:
    """Parameters by role: quantized weights as (integers, scale), others as they are."""
    found: dict[str, Any] = {}
    for role, key in node.params.items():
        if key not in plan.weights or role not in node.op.weight_roles:
            found[role] = params[key]
            continue
        spec, scale = plan.weights[key], scale_of(key, plan, qparams)
        if spec.dtype not in plan.target.weight_dtypes and spec.bits > 4:
            raise LoweringError(
                f"weight {key!r} is {spec.dtype}; {plan.target.name} has {', '.join(plan.target.weight_dtypes)}"
            )
        if spec.dtype.startswith("u"):
            raise LoweringError(
                f"weight {key!r} is {spec.dtype}: {plan.target.name} quantizes symmetrically; use {spec.dtype[1:]}"
            )
        shaped = expand(scale, plan.weight_axis.get(key), params[key].ndim)
        found[role] = (quantize(params[key], shaped, spec.dtype, plan.target.quantize_rounding), scale)
    return found
