"""From a float graph and a qconfig to a plan: every value and weight gets its format, or one error says why not."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from jquant.adapt import bounded_values, expand, insert_conversions, insert_requantize
from jquant.batch_norm import BatchNormHandling, check_kept, kept_batch_norms, with_exact_ones
from jquant.ir.graph import validate
from jquant.ir.passes import prune
from jquant.ops.base import Operand, constraints
from jquant.ops.conv import kernel_limits
from jquant.ops.elementwise import Constant, Requantize
from jquant.ops.movement import Permute
from jquant.ops.rewrite import channels_last, fold_batch_norm, fuse
from jquant.qconfig import QConfig
from jquant.region import mark_region
from jquant.simulate import value_types
from jquant.text import did_you_mean, format_table
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
    strict: bool = True,
    batch_norm: BatchNormHandling | Mapping[str, BatchNormHandling] = "fold",
    unfused: Collection[str] = (),
) -> tuple[Plan, dict[str, Array]]:
    """Folds batch norm, fuses, and resolves the qconfig to a format for every value and weight.

    Args:
      graph: a float graph, as `from_torch` makes it.
      params: {name: float32 array}.
      qconfig: names are those of `graph`, before fusion. A fused node takes the weight policy of its conv or linear and
        the output policy of the last node that it took in.
      target: a march, such as `jq.targets.NASH_E`.
      high_precision_outputs: a conv or linear that feeds only graph outputs keeps its int32 accumulator.
      strict: a format that a rule asks for by the full name of a node, and that the node cannot have, is an error. A
        pattern that covers a node among others gives way, and `explain` says why; with strict=False names do too.
      batch_norm: what training does with batch norm; or a mapping from patterns, as in a qconfig, on the names of batch
        norms, later ones overriding. All have the same integers in the end, see `jq.fold_batch_norm`.
        "fold": it goes into weight and bias now. "live": it stays behind the layer and normalizes with the statistics
        of the batch. "frozen": it stays, with its running statistics, its weight and bias trained. "reverse_fold": as
        live, and the weight is quantized as the running statistics scale it, the scaling undone after the layer.
      unfused: names of nodes whose result is rounded as itself: no add or activation behind them is fused with them. By
        default a convolution or linear takes in what follows, as the chip's convolution unit does.

    Returns:
      The plan, and the parameters of its graph (batch norm folded, unless `batch_norm` keeps it).

    Raises:
      QConfigError: a rule that matches nothing, or a format that the target or the operator does not have.
      GraphError, CalibrationError: a graph or parameters that are not well formed.
    """
    validate(graph, params)
    if not isinstance(qconfig, QConfig):
        raise QConfigError(f"prepare takes a jq.QConfig, not {type(qconfig).__name__}")
    if unknown := sorted(set(unfused) - set(graph.by_name)):
        raise QConfigError(f"unfused: the graph has no node {unknown[0]!r}{did_you_mean(unknown[0], graph.by_name)}")
    whole, graph = graph, prune(graph)
    policies = {i.name: qconfig.policy(i.name, "Input") for i in graph.inputs}
    policies |= {n.name: qconfig.policy(n.name, type(n.op).__name__) for n in graph.nodes}
    graph, policies, stubs, outside = mark_region(graph, policies, strict=strict)
    graph, policies = insert_requantize(graph, policies)
    graph, policies = expand(graph, params, policies, qconfig)
    qconfig.check_matches(whole, graph)
    graph, policies, notes = insert_conversions(graph, policies, bounded_values(whole))
    notes |= outside

    found = value_types(graph, params)
    shapes = {name: kind.shape for name, kind in found.items()}
    numbers = {name for name, kind in found.items() if kind.dtype == jnp.float32}
    kept = kept_batch_norms(graph, batch_norm)
    graph, folded_params, folded = fold_batch_norm(graph, params, shapes, kept)

    def fusible(node: Node, role: str) -> bool:
        return _is_narrow(policies[node.name].output) and (
            role != "add" or all(v in numbers and _is_narrow(policies[_last(folded, v)].output) for v in node.inputs)
        )

    output_policy = dict(policies)
    for old, new in folded.items():
        output_policy[new] = policies[old]
    graph, fused = fuse(graph, shapes, fusible, {folded.get(name, name) for name in unfused})
    for old, new in fused.items():
        output_policy[new] = output_policy[old]
    graph = channels_last(graph, shapes)
    renamed = {old: fused.get(new, new) for old, new in folded.items()} | fused

    types = value_types(graph, folded_params)
    exact = {name: str(kind.dtype) for name, kind in types.items() if kind.dtype != jnp.float32}
    values, owned, reasons = _resolve_values(graph, output_policy, exact, high_precision_outputs)
    if strict:
        _check_strict(output_policy, values, reasons)
    weights, axes = _resolve_weights(graph, policies)
    check_kept(graph, weights)
    weights = with_exact_ones(graph, weights)
    dtypes = {name: exact.get(name) or (spec.dtype if spec else "float") for name, spec in values.items()}
    _check(graph, dtypes, weights, {name: kind.shape for name, kind in types.items()}, folded_params, target)
    rows = _explain_rows(graph, policies, values, weights, renamed, reasons | notes, exact)
    values = {name: _with_rounding(spec, graph, name, target) for name, spec in values.items()}
    weights = {key: replace(spec, rounding=target.quantize_rounding) for key, spec in weights.items()}
    renamed |= {old: renamed.get(new, new) for old, new in stubs.items()}
    plan = Plan(
        graph,
        FrozenMap(values),
        FrozenMap(weights),
        FrozenMap(axes),
        tuple(owned),
        target,
        tuple(rows),
        FrozenMap(renamed),
        FrozenMap(exact),
    )
    return plan, folded_params


def _is_narrow(spec: Any) -> bool:
    return isinstance(spec, QuantSpec) and not spec.is_high_precision and not spec.is_float


def _last(renamed: Mapping[str, str], name: str) -> str:
    return next((old for old, new in renamed.items() if new == name), name)


def _feeds_only_outputs(graph: Graph, name: str) -> bool:
    readers = graph.consumers[name]
    if name in graph.outputs:
        return not readers
    return bool(readers) and all(isinstance(r.op, Permute) and _feeds_only_outputs(graph, r.name) for r in readers)


def _resolve_values(
    graph: Graph, policies: Mapping[str, Requested], exact: Mapping[str, str], high_precision_outputs: bool
) -> tuple[dict[str, QuantSpec | None], list[str], dict[str, str]]:
    values: dict[str, QuantSpec | None] = {i.name: policies[i.name].output for i in graph.inputs}
    values |= dict.fromkeys(exact)
    owned = [i.name for i in graph.inputs if values[i.name] is not None]
    reasons: dict[str, str] = {}
    for node in graph.nodes:
        if node.name in exact:
            continue
        policy = policies.get(node.name)
        requested = policy.output if policy else None
        if requested is not None and requested.is_float:
            values[node.name] = requested
            owned.append(node.name)
            continue
        if node.op.scale_rule != "own":
            source = _source(node, values, exact)
            # A float rule on a scale-keeping node cuts it off; everything else follows its operand.
            values[node.name] = None if policy is not None and requested is None else source
            if requested != values[node.name]:
                reasons[node.name] = f"{type(node.op).__name__} keeps the format of its operand"
            continue
        values[node.name] = requested
        if requested is None:
            continue
        keeps_accumulator = node.op.keeps_accumulator and _feeds_only_outputs(graph, node.name)
        if high_precision_outputs and keeps_accumulator and _is_narrow(requested):
            values[node.name] = HIGH_PRECISION
            reasons[node.name] = "feeds only graph outputs: the int32 accumulator is the output"
        elif _is_narrow(requested):
            owned.append(node.name)
        elif not keeps_accumulator:
            raise QConfigError(
                f"node {node.name!r} ({type(node.op).__name__}): high precision is for a conv, linear or matrix "
                "product that feeds only graph outputs; give it int8 or int16"
            )
    return values, owned, reasons


def _check_strict(
    policies: Mapping[str, Requested], values: Mapping[str, QuantSpec | None], reasons: Mapping[str, str]
) -> None:
    """Raises one QConfigError for every format that was asked for by name and is not applied."""
    broken = []
    for name, reason in reasons.items():
        asked, applied = policies.get(name, Requested()), values[name]
        if not asked.explicit or asked.output is None or applied is HIGH_PRECISION:
            continue
        if applied is None or applied.dtype != asked.output.dtype:
            broken.append(f"{name}: asked for {_show(asked.output)}, but it would be {_show(applied)}: {reason}")
    if broken:
        raise QConfigError(
            "formats asked for by name cannot be applied (give them to the operand, ask for "
            'Policy(input={"x": ...}), or pass strict=False):\n  ' + "\n  ".join(broken)
        )


def _source(node: Node, values: Mapping[str, QuantSpec | None], exact: Mapping[str, str]) -> QuantSpec | None:
    """The format that a scale-keeping node keeps: that of its first operand that is a number."""
    return next((values[v] for v in node.inputs if v not in exact), None)


def _with_rounding(spec: QuantSpec | None, graph: Graph, name: str, target: Target) -> QuantSpec | None:
    """The spec with the rounding of ties where its integers are made: quantized from real numbers, or rescaled."""
    if spec is None or not _is_narrow(spec):
        return spec
    op = graph.by_name[name].op if name in graph.by_name else None
    quantized = op is None or isinstance(op, Constant) or hasattr(op, "table")
    return replace(spec, rounding=target.quantize_rounding if quantized else target.post_rounding)


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
                axes[key] = node.op.weight_axis
    return weights, axes


def _check(
    graph: Graph,
    dtypes: Mapping[str, str],
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
        return Operand(dtypes[name], jnp.float32(1), shapes[name])

    for node in graph.nodes:
        weight = next((weights[node.params[r]] for r in node.op.weight_roles if node.params[r] in weights), None)
        if dtypes[node.name] == "float" and weight is None:
            continue
        if dtypes[node.name] == "float16":
            continue  # an island is evaluated in float
        weight_dtype = weight.dtype if weight else None
        found = list(constraints(node.op, [operand(v) for v in node.inputs], operand(node.name), weight_dtype, target))
        if node.op.weight_roles:
            found += kernel_limits(params[node.params["weight"]].shape, target, node.op)
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
    exact: Mapping[str, str],
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
        applied = f"{exact[final]} (exact)" if final in exact else _show(values[final])
        reason = reasons.get(final, "") if applied != requested else ""
        reason = "no number on a grid: never quantized" if final in exact else reason or reasons.get(name, "")
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
