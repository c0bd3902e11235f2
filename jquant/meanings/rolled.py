"""The outputs of a plan in float or fake-quant, with the steps of unrolled recurrences run as one loop.

Each step keeps its own scales: the loop takes those of all steps, one after the other.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jquant.graph.evaluate import Rule, Tap, evaluate_nodes
from jquant.graph.float import float_rule, positions_of
from jquant.graph.loops import Loop, find_loops
from jquant.meanings.fake_quant import (
    fake_quant_rule,
    fake_quant_tap,
    fake_quant_weights,
    scales_read,
)
from jquant.meanings.meaning import meaning_of
from jquant.plan.batch_norm import fold_kept
from jquant.plan.scales import Scales
from jquant.types import Array, FrozenMap, Model, Node, Plan, QParams

Steps = Callable[[Mapping[str, Any]], tuple[Rule, Tap | None]]  # rule and tap for what differs from step to step


@dataclass(frozen=True)
class _Rolled:
    """A loop, and what its nodes have of their own in each step: {kind of thing: {name in the body: [steps, ...]}}.

    `stands_for` {operand of the body that is no value of the graph: the value it is in the first step}. Where a rule
    reads the format, it is that of every step.
    """

    loop: Loop
    own: Mapping[str, Mapping[str, Array]]
    stands_for: Mapping[str, str]


def output_values(
    model: Model, mode: Literal["float", "fake_quant"], inputs: Mapping[str, Array], rng: Array | None = None
) -> dict[str, Array]:
    """The outputs of a model by name as its meaning has them, and other values that were computed on the way."""
    quantized = mode == "fake_quant"
    model = fold_kept(model) if quantized else model
    plan, params, qparams = model.plan, model.params, model.qparams
    loops = find_loops(plan.graph, lambda node: _kind(node, plan))
    if not loops:
        return meaning_of(model, mode, rng=rng).values(inputs)
    scales = Scales(plan, qparams) if quantized else None
    weights = fake_quant_weights(plan, params, qparams) if quantized else {}
    positions = positions_of(plan.graph)
    rolled = [r for loop in loops if (r := _rolled(loop, plan, qparams, scales, positions)) is not None]
    inside = _with_operands(plan, rolled)

    def meaning(own: Mapping[str, Any]) -> tuple[Rule, Tap | None]:
        place = {**positions, **own.get("positions", {})}
        if not quantized:
            return float_rule(plan.graph, params, rng, place), None
        at_step = Scales(plan, qparams, given=own.get("scales"))
        rule = fake_quant_rule(inside, params, qparams, rng, weights=weights, scales=at_step, positions=place)
        return rule, fake_quant_tap(plan, {**qparams, **own.get("qparams", {})}, unrolled=not own)

    return _evaluate(plan, inputs, meaning, rolled)


def _kind(node: Node, plan: Plan) -> Hashable:
    return node.op, node.params, plan.values.get(node.name), node.name in plan.owned


def _with_operands(plan: Plan, rolled: Sequence[_Rolled]) -> Plan:
    """The plan with the formats of the operands that only the bodies of loops have."""
    known = {key: name for each in rolled for key, name in each.stands_for.items()}

    def widened(formats: Mapping[str, Any]) -> FrozenMap[Any]:
        return FrozenMap({**formats, **{key: formats[name] for key, name in known.items() if name in formats}})

    return replace(plan, values=widened(plan.values), exact=widened(plan.exact))


def _rolled(
    loop: Loop, plan: Plan, qparams: QParams, scales: Scales | None, positions: Mapping[str, int]
) -> _Rolled | None:
    """None where an operand has another format in some steps, or a scale in some and none in others."""
    columns = dict(zip((node.name for node in loop.body), zip(*loop.steps, strict=True), strict=True))
    own: dict[str, dict[str, Any]] = {"qparams": {}, "scales": {}, "positions": {}}
    for name, names in columns.items():
        own["positions"][name] = jnp.asarray([positions[n] for n in names], jnp.int32)
    if scales is None:
        return _Rolled(loop, own, {})
    for name in columns.keys() & set(plan.trained):
        own["qparams"][name] = jnp.stack([qparams[n] for n in columns[name]])
    carried = {key: (first, *columns[loop.body[i].name][:-1]) for key, (first, i) in loop.carried.items()}
    outer = {**loop.given, **carried}
    operands = {**columns, **outer}
    for key in {name for node in loop.body for name in scales_read(node, plan)} & operands.keys():
        if len({(plan.values.get(name), plan.exact.get(name)) for name in operands[key]}) > 1:
            return None
        each = [scales[name] for name in operands[key]]
        known = [scale for scale in each if scale is not None]
        if len(known) not in (0, len(each)) or len({scale.shape for scale in known}) > 1:
            return None
        own["scales"][key] = jnp.stack(known) if known else None
    return _Rolled(loop, own, {key: names[0] for key, names in outer.items()})


def _evaluate(plan: Plan, inputs: Mapping[str, Array], meaning: Steps, rolled: Sequence[_Rolled]) -> dict[str, Array]:
    graph = plan.graph
    rule, tap = meaning({})
    values = {entry.name: inputs[entry.name] for entry in graph.inputs}
    if tap is not None:
        values = {name: tap(name, value) for name, value in values.items()}
    begin = 0
    for each in rolled:
        evaluate_nodes(graph.nodes[begin : each.loop.start], values, rule, tap)
        evaluate_nodes(each.loop.before, values, rule, tap)
        found = _run(each, values, meaning, _read_later(plan, each.loop))
        if found is None:
            evaluate_nodes(graph.nodes[each.loop.start : each.loop.stop], values, rule, tap)
        values |= found or {}
        begin = each.loop.stop
    evaluate_nodes(graph.nodes[begin:], values, rule, tap)
    return values


def _read_later(plan: Plan, loop: Loop) -> set[str]:
    """The values of a loop that what follows it needs."""
    later = {name for node in plan.graph.nodes[loop.stop :] for name in node.inputs} | set(plan.graph.outputs)
    return later & {name for row in loop.steps for name in row}


def _run(rolled: _Rolled, values: Mapping[str, Array], meaning: Steps, wanted: set[str]) -> dict[str, Array] | None:
    """The wanted values of a loop; None where shapes change from step to step, as those of a cache that grows."""
    loop = rolled.loop
    last = {loop.steps[-1][i]: key for key, (_, i) in loop.carried.items()}
    columns = {
        node.name: names
        for node, names in zip(loop.body, zip(*loop.steps, strict=True), strict=True)
        if not wanted.isdisjoint(set(names) - last.keys())
    }

    def step(carried: dict[str, Array], of_step: tuple[dict[str, Array], Any]) -> tuple[Any, Any]:
        given, own = of_step
        found = {**values, **carried, **given}
        evaluate_nodes(loop.body, found, *meaning(own))
        return {key: found[loop.body[i].name] for key, (_, i) in loop.carried.items()}, {n: found[n] for n in columns}

    start = {key: values[first] for key, (first, _) in loop.carried.items()}
    each = {key: [values[name] for name in names] for key, names in loop.given.items()}
    if any(len({(v.shape, v.dtype) for v in steps}) > 1 for steps in each.values()):
        return None
    first = {key: steps[0] for key, steps in each.items()}, jax.tree.map(lambda v: v[0], rolled.own)
    after, _ = jax.eval_shape(step, start, first)
    if any((after[key].shape, after[key].dtype) != (v.shape, v.dtype) for key, v in start.items()):
        return None
    given = {key: jnp.stack(steps) for key, steps in each.items()}
    final, kept = jax.lax.scan(step, start, (given, rolled.own))
    found = {name: kept[n][t] for n, names in columns.items() for t, name in enumerate(names) if name in wanted}
    return found | {name: final[key] for name, key in last.items() if name in wanted}
