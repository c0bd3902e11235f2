"""Checks of a model before and after calibration: what cannot be deployed, and what is known to cost accuracy."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jquant.analysis.findings import Finding
from jquant.config.qconfig import QConfig
from jquant.graph.checks import check_graph, deployed
from jquant.graph.passes import param_uses, prune
from jquant.ops.activation import Relu, Relu6
from jquant.ops.conv import Conv, ConvTranspose, Linear
from jquant.ops.elementwise import Add
from jquant.ops.table import Cos, Reciprocal, Rsqrt, Sin, Tan
from jquant.plan.prepare import prepare
from jquant.plan.scales import value_scales
from jquant.program.lower import lower
from jquant.targets import NASH_E
from jquant.types import Graph, JQuantError, Model, Params, Plan, QParams, Target

RISKY_TABLES = (Reciprocal, Rsqrt, Sin, Cos, Tan)
UNLIKE_RANGES = 16.0  # of the operands of an add or concatenation: 4 of 8 bits of the smaller one are lost
UNLIKE_CHANNELS = 64.0  # of a weight with one scale: 6 of 8 bits of the smallest channel are lost


def check_model(
    graph: Graph,
    params: Params,
    qconfig: QConfig | None,
    *,
    target: Target | None = None,
    qparams: QParams | None = None,
    outputs: Sequence[str] | str | None = None,
) -> list[Finding]:
    """Everything that can be said of a model without data.

    Args:
      graph, params: the float model.
      qconfig: what is to be quantized; None checks the float graph alone.
      target: the march; None takes NASH_E.
      qparams: the scales, if it is calibrated: adds the checks of ranges, and whether it lowers.
      outputs: the deployed outputs, if not all are.

    Returns:
      Findings; an "error" means that the model cannot become a program as it is.

    Example:
      for finding in jq.analysis.check_model(graph, params, qconfig, outputs=["head"]):
          print(finding)
    """
    check_graph(graph)
    found = [*_shared(graph), *auxiliary_branches(graph, outputs)]
    if qconfig is None:
        return found
    try:
        model = prepare(graph, params, qconfig, target=target or NASH_E)
    except JQuantError as error:
        return [*found, Finding(level="error", check="prepare", where="", message=str(error), fix="see the message")]
    return [*found, *check_plan(model.replace(qparams=qparams or {}), outputs=outputs)]


def check_plan(model: Model, *, outputs: Sequence[str] | str | None = None) -> list[Finding]:
    """The checks of `check_model` that are about a plan; those of scales where the model is calibrated."""
    plan = model.plan
    found = [*_unfused(plan), *_dtypes(plan, outputs), *_tables(plan), *_weight_ranges(plan, model.params)]
    if not model.qparams:
        return found
    try:
        found += _operand_ranges(plan, model.qparams)
        lower(model, outputs=outputs)
    except JQuantError as error:
        found.append(Finding(level="error", check="lower", where="", message=str(error), fix="see the message"))
    return found


def _shared(graph: Graph) -> Iterator[Finding]:
    """Parameters that several nodes read. Values are never shared: every call site is a node with its own scale."""
    users: dict[str, list[str]] = {}
    for node in graph.nodes:
        for key in node.params.values():
            users.setdefault(key, []).append(node.name)
    for key, count in param_uses(graph).items():
        if count > 1:
            yield Finding(
                level="warning",
                check="shared operator",
                where=key,
                message=f"read by {count} nodes: {', '.join(users[key])}",
                fix="each call has a scale of its own for its value, but one for the weight; if what flows through the "
                "calls differs much, use a module for each",
                numbers={"calls": count},
            )


def auxiliary_branches(graph: Graph, outputs: Sequence[str] | str | None = None) -> list[Finding]:
    """Nodes that reach no deployed output: they take part in training, and make it harder.

    Args:
      graph: any graph.
      outputs: the deployed outputs; None takes all, so that only nodes that reach no output are found.
    """
    check_graph(graph)
    kept = {node.name for node in prune(deployed(graph, outputs)).nodes}
    aside = [node.name for node in graph.nodes if node.name not in kept]
    if not aside:
        return []
    return [
        Finding(
            level="warning",
            check="auxiliary branch",
            where=aside[0],
            message=f"{len(aside)} nodes reach no deployed output: {', '.join(aside[:5])}{' ...' * (len(aside) > 5)}",
            fix="leave them float with a rule of None, or take them out of the graph before prepare",
            numbers={"nodes": len(aside)},
        )
    ]


def _unfused(plan: Plan) -> Iterator[Finding]:
    """Activations and additions behind a convolution that stayed nodes of their own."""
    nodes = plan.graph.by_name
    for node in plan.graph.nodes:
        if not isinstance(node.op, Relu | Relu6 | Add):
            continue
        hosts = [nodes[v] for v in node.inputs if v in nodes and isinstance(nodes[v].op, Conv | ConvTranspose | Linear)]
        for host in hosts:
            readers = plan.graph.consumers[host.name]
            spec = plan.values[host.name]
            if len(readers) > 1 or host.name in plan.graph.outputs:
                others = [r.name for r in readers if r is not node] or ["a graph output"]
                why = f"the value before it is also read by {', '.join(others)}"
            elif spec is None or spec.is_float:
                why = f"{host.name} is float"
            elif getattr(host.op, "activation", "none") != "none":
                why = f"{host.name} has an activation already"
            else:
                why = "shapes or formats of the operands differ"
            yield Finding(
                level="note",
                check="unfused",
                where=node.name,
                message=f"{type(node.op).__name__} is not fused into {host.name}: {why}",
                fix="the value between them is rounded once more; fuse by giving both an integer format, or accept it",
            )


def _dtypes(plan: Plan, outputs: Sequence[str] | str | None) -> Iterator[Finding]:
    """Values that stayed float, and formats that are not what int8 everywhere would give."""
    for entry in plan.resolutions:
        if entry.reason and entry.requested != entry.applied and entry.applied != "-" and "exact" not in entry.applied:
            yield Finding(
                level="note",
                check="dtype",
                where=entry.name,
                message=f"asked for {entry.requested}, applied {entry.applied}: {entry.reason}",
                fix="see jq.explain(model)",
            )
    graph = prune(deployed(plan.graph, outputs))
    needed = {node.name for node in graph.nodes} | {v for node in graph.nodes for v in node.inputs}
    quantized = any(spec is not None for spec in plan.values.values())
    for name, spec in plan.values.items():
        if spec is None and name in needed and name not in plan.exact and quantized:
            yield Finding(
                level="error",
                check="unquantized",
                where=name,
                message="float on the way to an output, which no integer program can have",
                fix="give it a format in the qconfig, or name the deployed outputs in jq.lower(..., outputs=[...])",
            )
        elif spec is not None and spec.fixed_scale is not None:
            yield Finding(
                level="note",
                check="fixed scale",
                where=name,
                message=f"its scale is fixed at {spec.fixed_scale:g}",
                fix="make sure that its range is known; otherwise let calibration find it",
                numbers={"range": spec.fixed_scale * spec.range[1]},
            )
    for key, spec in plan.weights.items():
        if spec.dtype != "int8":
            yield Finding(
                level="note",
                check="dtype",
                where=key,
                message=f"the weight is {spec.dtype}",
                fix="nothing, if it is meant; int4 needs training or AdaRound, int16 takes twice the time",
            )


def _tables(plan: Plan) -> Iterator[Finding]:
    """Functions whose tables are known to cost accuracy: steep or periodic, with the fewest segments."""
    for node in plan.graph.nodes:
        spec, source = plan.values[node.name], plan.values.get(node.inputs[0]) if node.inputs else None
        if not isinstance(node.op, RISKY_TABLES) or spec is None or source is None or source.dtype != "int16":
            continue
        count = node.op.table.count(plan.target.tables)
        if count <= plan.target.tables.count:
            yield Finding(
                level="warning",
                check="table",
                where=node.name,
                message=f"{type(node.op).__name__} from int16 by {count} tables",
                fix="measure it with jq.analysis.table_costs, which tries more tables, other placements and one period",
                numbers={"num_tables": count},
            )


def _weight_ranges(plan: Plan, params: Params) -> Iterator[Finding]:
    """Weights with one scale for channels of very unlike range."""
    for key, spec in plan.weights.items():
        node = next(n for n in plan.graph.nodes if key in n.params.values())
        axis, weight = node.op.weight_axis, np.abs(np.asarray(params[key]))
        peaks = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1).max(axis=1)
        peaks = peaks[peaks > 0]
        if spec.axis is None and peaks.size and peaks.max() / np.median(peaks) > UNLIKE_CHANNELS:
            yield Finding(
                level="warning",
                check="weight range",
                where=key,
                message="one scale for output channels of very unlike range",
                fix='use a scale per channel, axis="out", or jq.ptq.equalize before prepare',
                numbers={"largest": float(peaks.max()), "median": float(np.median(peaks))},
            )


def _operand_ranges(plan: Plan, qparams: QParams) -> Iterator[Finding]:
    """Operands of an addition or concatenation of very unlike range: the small one loses its bits."""
    scales = value_scales(plan, qparams)

    def reach(value: str) -> float | None:
        spec, scale = plan.values[value], scales[value]
        narrow = spec is not None and scale is not None and not spec.is_high_precision and not spec.is_float
        return float(np.max(np.asarray(scale))) * spec.range[1] if narrow and spec is not None else None

    for node in plan.graph.nodes:
        if type(node.op).__name__ not in ("Add", "Sub", "Cat", "Stack") or len(node.inputs) < 2:
            continue
        ranges = {v: r for v in node.inputs if (r := reach(v)) is not None}
        if len(ranges) > 1 and max(ranges.values()) / min(ranges.values()) > UNLIKE_RANGES:
            small, large = min(ranges, key=ranges.__getitem__), max(ranges, key=ranges.__getitem__)
            yield Finding(
                level="warning",
                check="operand ranges",
                where=node.name,
                message=f"{small} has a much smaller range than {large}",
                fix="normalise both branches before they meet, or give the result int16",
                numbers={small: ranges[small], large: ranges[large]},
            )


def graph_difference(a: Graph, b: Graph) -> list[Finding]:
    """Where two graphs part: the export and the training code, or two versions of a model.

    Nodes are compared in order by operator, attributes and operands, whatever their names.

    Returns:
      Nothing where the graphs do the same; else the first node that differs (an error), then nodes that only one has.
    """
    check_graph(a)
    check_graph(b)
    found: list[Finding] = []
    same: dict[str, str] = {x.name: y.name for x, y in zip(a.inputs, b.inputs, strict=False)}

    def report(where: str, message: str, level: Any = "error") -> None:
        fix = "build the deployed graph from the function that is trained and evaluated"
        found.append(Finding(level=level, check="graph difference", where=where, message=message, fix=fix))

    if [(i.shape, i.dtype) for i in a.inputs] != [(i.shape, i.dtype) for i in b.inputs]:
        report("inputs", f"{_signature(a)} against {_signature(b)}")
    for x, y in zip(a.nodes, b.nodes, strict=False):
        operands = tuple(same.get(v, v) for v in x.inputs)
        if x.op != y.op or operands != y.inputs:
            report(x.name, f"{_call(x)} against {y.name}: {_call(y)}: the first node that differs")
            break
        same[x.name] = y.name
    else:
        longer, shorter = (a, b) if len(a.nodes) > len(b.nodes) else (b, a)
        if len(longer.nodes) != len(shorter.nodes):
            extra = longer.nodes[len(shorter.nodes)]
            report(extra.name, f"only one graph has {_call(extra)}: the first node that differs")
        elif tuple(same.get(o, o) for o in a.outputs) != b.outputs:
            report("outputs", f"{', '.join(a.outputs)} against {', '.join(b.outputs)}")
    if found:
        for one, other, name in ((a, b, "first"), (b, a, "second")):
            names = {n.name for n in other.nodes}
            only = [n.name for n in one.nodes if n.name not in names]
            if only:
                report(only[0], f"only the {name} graph has the names {', '.join(only[:5])}", "note")
    return found


def _signature(graph: Graph) -> str:
    return ", ".join(f"{i.name} {i.dtype}{list(i.shape)}" for i in graph.inputs)


def _call(node: Any) -> str:
    fields: Mapping[str, Any] = vars(node.op)
    shown = ", ".join(f"{k}={v}" for k, v in fields.items())
    return f"{type(node.op).__name__}({shown}) on {', '.join(node.inputs) or 'nothing'}"
