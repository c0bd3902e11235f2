"""From a calibrated plan to an integer program. Works inside jit as well: accumulators are wider there."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jquant.batch_norm import fold_kept
from jquant.ir.graph import check_params
from jquant.ir.passes import prune
from jquant.numerics.rounding import dequantize, expand, quantize
from jquant.ops.base import Lowered, Operand, lower_op
from jquant.ops.lookup import is_table, lower_tables_alike
from jquant.quantizers import has_offset
from jquant.simulate import check_qparams, quantizer_of, scale_of, value_scales, value_shapes
from jquant.types import Array, FrozenMap, Graph, LoweringError, Node, NodeFormat, Params, Plan, Program, QParams


def lower(plan: Plan, params: Params, qparams: QParams, *, outputs: Sequence[str] | None = None) -> Program:
    """Turns a calibrated plan into integers: weights, biases, mantissas and shifts.

    Args:
      plan: what `prepare` returned; a batch norm that it kept is folded.
      params: {name: float32 array}.
      qparams: {name: scale}, calibrated or trained.
      outputs: the deployed outputs, a subset of the graph's; nodes that only others need are left out.

    Returns:
      A `Program`: a pytree of integer constants with a static graph. `jq.run` executes it, `jq.save` writes it.

    Raises:
      LoweringError: a node without an integer form, a float value on the way to a deployed output, or a march whose
        arithmetic is not public. CalibrationError: no calibration.
    """
    check_params(plan.graph, params)
    check_qparams(plan, qparams)
    return lower_traced(plan, params, qparams, outputs)


def lower_traced(plan: Plan, params: Params, qparams: QParams, outputs: Sequence[str] | None = None) -> Program:
    """`lower` without looking at values, for use inside jit."""
    plan, params, qparams = fold_kept(plan, params, qparams)
    _check_target(plan)
    check_offsets(plan, qparams)
    graph = _deployed(plan.graph, outputs)
    for entry in graph.inputs:
        if plan.values[entry.name] is None and entry.name not in plan.exact:
            raise LoweringError(
                f"input {entry.name!r} is float; give it a format: {{{entry.name!r}: jq.Policy(output=jq.int8())}}"
            )
    scales = value_scales(plan, qparams)
    constants, formats = lower_nodes(plan, params, qparams, graph.nodes, scales)
    kept = {n: jnp.asarray(scale, jnp.float32) for n in graph.values if (scale := scales[n]) is not None}
    inputs = FrozenMap({i.name: dtype_of(i.name, plan) for i in graph.inputs})
    return Program(constants, kept, graph, FrozenMap(formats), inputs, plan.target)


def lower_nodes(
    plan: Plan, params: Params, qparams: QParams, nodes: Sequence[Node], scales: Mapping[str, Array | None]
) -> tuple[dict[str, dict[str, Array]], dict[str, NodeFormat]]:
    """Integer constants and formats of some nodes of a plan without kept batch norm; `scales` of all its values."""
    _check_target(plan)
    shapes = {n: (None, *s[1:]) for n, s in value_shapes(plan.graph, params).items()}

    def operand(value: str) -> Operand:
        scale = scales[value]
        return Operand(dtype_of(value, plan), jnp.float32(1) if scale is None else scale, shapes[value])

    constants: dict[str, dict[str, Array]] = {}
    formats: dict[str, NodeFormat] = {}
    alike: dict[str, Lowered] = {}
    if any(isinstance(scale, jax.core.Tracer) for scale in scales.values()):
        found = [n for n in nodes if is_table(n.op) and plan.values[n.inputs[0]] and plan.values[n.name]]
        alike = lower_tables_alike({n.name: (n.op, operand(n.inputs[0]), operand(n.name)) for n in found}, plan.target)
    for node in nodes:
        where = f"node {node.name!r} ({type(node.op).__name__})"
        for value in (*node.inputs, node.name):
            _check_format(where, value, plan, scales[value])
        operands, output = [operand(v) for v in node.inputs], operand(node.name)
        try:
            integers = _integer_params(plan, params, qparams, node)
            if output.dtype == "float16":
                lowered = lower_island(operands, integers, node, plan)
            elif node.name in alike:
                lowered = alike[node.name]
            else:
                lowered = lower_op(node.op, operands, output, integers, plan.target)
        except LoweringError as error:
            raise LoweringError(f"{where}: {error}") from error
        constants[node.name] = {role: jnp.asarray(v) for role, v in lowered.constants.items()}
        formats[node.name] = NodeFormat(
            tuple(o.dtype for o in operands), output.dtype, lowered.accumulator, lowered.worst_case, lowered.kernel
        )
    return constants, formats


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
        if not has_offset(quantizer_of(plan.spec(name))):
            continue
        offset = qparams[name][1]
        if isinstance(offset, jax.core.Tracer):
            raise LoweringError(
                f"{name!r} has a learned offset (lsq_plus), and inside jit nobody knows whether it is 0; use jq.lsq "
                "for mode 'bit_true'"
            )
        if bool(jnp.any(offset != 0)):
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


def _deployed(graph: Graph, outputs: Sequence[str] | None) -> Graph:
    if outputs is None:
        return graph
    chosen = []
    for name in outputs:  # an output may have got a permutation behind it
        final = name if name in graph.outputs else f"{name}.to_first"
        if final not in graph.outputs:
            raise LoweringError(f"{name!r} is no output of the graph; outputs: {', '.join(graph.outputs)}")
        chosen.append(final)
    return prune(Graph(graph.inputs, graph.nodes, tuple(chosen)))


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
