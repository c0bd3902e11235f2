"""From a float graph and a qconfig to a plan: every value and weight gets its format, or one error says why not."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from jquant.ir.graph import validate
from jquant.ir.passes import prune
from jquant.ops.base import Operand, constraints
from jquant.ops.conv import Conv, Linear, kernel_limits
from jquant.ops.elementwise import Requantize
from jquant.ops.movement import Permute
from jquant.ops.rewrite import channels_last, fold_batch_norm, fuse
from jquant.qconfig import QConfig
from jquant.simulate import value_shapes
from jquant.text import format_table
from jquant.types import (
    Array,
    FrozenMap,
    Graph,
    Node,
    Params,
    Plan,
    QConfigError,
    QuantSpec,
    Requested,
    Resolution,
    Target,
)

HIGH_PRECISION = QuantSpec(dtype="int32")


def prepare(
    graph: Graph,
    params: Params,
    qconfig: QConfig,
    *,
    target: Target,
    high_precision_outputs: bool = True,
) -> tuple[Plan, dict[str, Array]]:
    """Folds batch norm, fuses, and resolves the qconfig to a format for every value and weight.

    Args:
      graph: a float graph, as `from_torch` makes it.
      params: {name: float32 array}.
      qconfig: names are those of `graph`, before fusion. A fused node takes the weight policy of its conv or linear and
        the output policy of the last node that it took in.
      target: a march, such as `jq.targets.NASH_E`.
      high_precision_outputs: a conv or linear that feeds only graph outputs keeps its int32 accumulator.

    Returns:
      The plan, and the parameters of its graph (batch norm folded).

    Raises:
      QConfigError: a rule that matches nothing, or a format that the target or the operator does not have.
      GraphError, CalibrationError: a graph or parameters that are not well formed.
    """
    validate(graph, params)
    if not isinstance(qconfig, QConfig):
        raise QConfigError(f"prepare takes a jq.QConfig, not {type(qconfig).__name__}")
    qconfig.check_matches(graph)
    graph = prune(graph)
    policies = {i.name: qconfig.policy(i.name, "Input") for i in graph.inputs}
    policies |= {n.name: qconfig.policy(n.name, type(n.op).__name__) for n in graph.nodes}
    graph, policies = _insert_requantize(graph, policies)

    shapes = value_shapes(graph, params)
    graph, folded_params, folded = fold_batch_norm(graph, params, shapes)

    def fusible(node: Node, role: str) -> bool:
        return _is_narrow(policies[node.name].output) and (
            role != "add" or all(_is_narrow(policies[_last(folded, v)].output) for v in node.inputs)
        )

    output_policy = dict(policies)
    for old, new in folded.items():
        output_policy[new] = policies[old]
    graph, fused = fuse(graph, shapes, fusible)
    for old, new in fused.items():
        output_policy[new] = output_policy[old]
    graph = channels_last(graph, shapes)
    renamed = {old: fused.get(new, new) for old, new in folded.items()} | fused

    shapes = value_shapes(graph, folded_params)
    values, owned, reasons = _resolve_values(graph, output_policy, high_precision_outputs)
    weights, axes = _resolve_weights(graph, policies)
    _check(graph, values, weights, shapes, folded_params, target)
    rows = _explain_rows(graph, policies, values, weights, renamed, reasons)
    plan = Plan(
        graph,
        FrozenMap(values),
        FrozenMap(weights),
        FrozenMap(axes),
        tuple(owned),
        target,
        tuple(rows),
        FrozenMap(renamed),
    )
    return plan, folded_params


def _is_narrow(spec: Any) -> bool:
    return isinstance(spec, QuantSpec) and not spec.is_high_precision


def _last(renamed: Mapping[str, str], name: str) -> str:
    return next((old for old, new in renamed.items() if new == name), name)


def _insert_requantize(graph: Graph, policies: Mapping[str, Requested]) -> tuple[Graph, dict[str, Requested]]:
    """Gives an operand that `Policy.input` wants in another format a node of its own, named `consumer.port`."""
    nodes, policies = [], dict(policies)
    for node in graph.nodes:
        ports, operands = node.op.ports, list(node.inputs)
        for port, spec in policies[node.name].input.items():
            if port not in ports[: len(operands)]:
                raise QConfigError(
                    f"node {node.name!r} ({type(node.op).__name__}) has no input {port!r}; it has {', '.join(ports)}"
                )
            name, index = f"{node.name}.{port}", ports.index(port)
            nodes.append(Node(name, Requantize(), (operands[index],)))
            policies[name] = Requested(output=spec)
            operands[index] = name
        nodes.append(replace(node, inputs=tuple(operands)))
    return replace(graph, nodes=tuple(nodes)), policies


def _feeds_only_outputs(graph: Graph, name: str) -> bool:
    readers = graph.consumers[name]
    if name in graph.outputs:
        return not readers
    return bool(readers) and all(isinstance(r.op, Permute) and _feeds_only_outputs(graph, r.name) for r in readers)


def _resolve_values(
    graph: Graph, policies: Mapping[str, Requested], high_precision_outputs: bool
) -> tuple[dict[str, QuantSpec | None], list[str], dict[str, str]]:
    values: dict[str, QuantSpec | None] = {i.name: policies[i.name].output for i in graph.inputs}
    owned = [i.name for i in graph.inputs if values[i.name] is not None]
    reasons: dict[str, str] = {}
    for node in graph.nodes:
        policy = policies.get(node.name)
        requested = policy.output if policy else None
        if node.op.scale_rule != "own":
            source = values[node.inputs[0]]
            # A float rule on a scale-keeping node cuts it off; everything else follows its operand.
            values[node.name] = None if policy is not None and requested is None else source
            if requested != values[node.name]:
                reasons[node.name] = f"{type(node.op).__name__} keeps the format of {node.inputs[0]}"
            continue
        values[node.name] = requested
        if requested is None:
            continue
        keeps_accumulator = isinstance(node.op, Conv | Linear) and _feeds_only_outputs(graph, node.name)
        if high_precision_outputs and keeps_accumulator and _is_narrow(requested):
            values[node.name] = HIGH_PRECISION
            reasons[node.name] = "feeds only graph outputs: the int32 accumulator is the output"
        elif _is_narrow(requested):
            owned.append(node.name)
        elif not keeps_accumulator:
            raise QConfigError(
                f"node {node.name!r} ({type(node.op).__name__}): high precision is for a conv or linear that feeds "
                "only graph outputs; give it int8 or int16"
            )
    return values, owned, reasons


def _resolve_weights(graph: Graph, policies: Mapping[str, Requested]) -> tuple[dict[str, QuantSpec], dict[str, int]]:
    weights: dict[str, QuantSpec] = {}
    axes: dict[str, int] = {}
    for node in graph.nodes:
        for role in node.op.weight_roles:
            key, spec = node.params[role], policies[node.name].weight
            if spec is None:
                continue
            if weights.setdefault(key, spec) != spec:
                raise QConfigError(
                    f"weight {key!r} is shared, and its users ask for {weights[key]} and {spec}; give one rule"
                )
            if spec.axis == "out":
                axes[key] = 0
    return weights, axes


def _check(
    graph: Graph,
    values: Mapping[str, QuantSpec | None],
    weights: Mapping[str, QuantSpec],
    shapes: Mapping[str, tuple[int, ...]],
    params: Mapping[str, Array],
    target: Target,
) -> None:
    """Raises one QConfigError that names every node which breaks a limit of an integer target."""
    if not target.integer:
        return
    broken = []

    def operand(name: str) -> Operand:
        spec = values[name]
        return Operand(spec.dtype if spec else "float", jnp.float32(1), shapes[name])

    for node in graph.nodes:
        weight = next((weights[node.params[r]] for r in node.op.weight_roles if node.params[r] in weights), None)
        if values[node.name] is None and weight is None:
            continue  # float
        weight_dtype = weight.dtype if weight else None
        found = list(constraints(node.op, [operand(v) for v in node.inputs], operand(node.name), weight_dtype, target))
        if node.op.weight_roles:
            found += kernel_limits(params[node.params["weight"]].shape, target)
        if len(shapes[node.name]) > target.max_rank:
            found.append(f"rank {len(shapes[node.name])} is above {target.max_rank}")
        broken += [f"{node.name} ({type(node.op).__name__}): {text}" for text in found]
    if broken:
        raise QConfigError(f"{target.name} cannot run {len(broken)} nodes:\n  " + "\n  ".join(broken))


def _explain_rows(
    graph: Graph,
    policies: Mapping[str, Requested],
    values: Mapping[str, QuantSpec | None],
    weights: Mapping[str, QuantSpec],
    renamed: Mapping[str, str],
    reasons: Mapping[str, str],
) -> list[Resolution]:
    hosts: dict[str, list[str]] = {}
    for old, new in renamed.items():
        hosts.setdefault(new, []).append(old)
    position = {name: i for i, name in enumerate(policies)}
    rows = []
    for name, policy in policies.items():
        final = renamed.get(name, name)
        maker = max(hosts.get(final, [final]), key=position.__getitem__)
        requested = _show(policy.output)
        if name != maker:  # asked for inside a fused node
            rows.append(Resolution(name, "output", requested, "-", f"fused: the value is made by {maker}"))
            continue
        applied = _show(values[final])
        reason = reasons.get(final, "") if applied != requested else ""
        inserted = final in graph.by_name and isinstance(graph.by_name[final].op, Requantize)
        rows.append(Resolution(name, "input" if inserted else "output", requested, applied, reason))
    for node in graph.nodes:
        for key in (node.params[role] for role in node.op.weight_roles):
            rows.append(Resolution(key, "weight", _show(policies[node.name].weight), _show(weights.get(key)), ""))
    return rows


def _show(spec: QuantSpec | None) -> str:
    return "float" if spec is None else str(spec)


def explain(plan: Plan) -> str:
    """Requested against applied for every value and weight, with the reason of each difference, as a table."""
    return format_table(
        ("name", "port", "requested", "applied", "reason"),
        [(r.name, r.port, r.requested, r.applied, r.reason) for r in plan.resolutions],
    )
