"""The outputs of a plan in float or fake-quant, with the steps of its loops run as such."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from jquant.graph.evaluate import Rule, Tap
from jquant.graph.float import float_rule, positions_of
from jquant.graph.loops import FEW_BLOCKS, LEAST_BLOCKS, Loop, find_loops
from jquant.graph.rolled import Keep, Own, Rolled, Stacked, columns_of, evaluate_rolled, stack, stacked, with_own
from jquant.meanings.fake_quant import (
    fake_quant_rule,
    fake_quant_tap,
    fake_quant_weight,
    scales_read,
)
from jquant.meanings.meaning import meaning_of
from jquant.plan.batch_norm import fold_kept
from jquant.plan.scales import Scales
from jquant.types import Array, FrozenMap, Model, Node, Plan


class _Known(NamedTuple):
    """A loop, and {operand of the body that is no value of the graph: the value that it is in the first step}.

    Where a rule reads the format, it is that of every step.
    """

    rolled: Rolled
    stands_for: Mapping[str, str]


Values = Literal["float", "fake_quant"]


def output_values(
    model: Model, mode: Values, inputs: Mapping[str, Array], rng: Array | None = None, blocks: int = LEAST_BLOCKS
) -> dict[str, Array]:
    """The outputs of a model by name as its meaning has them, and other values that were computed on the way.

    `blocks`: how many equal blocks make a loop.
    """
    return _evaluate(model, mode, inputs, rng, None, blocks)[0]


def stacked_values(model: Model, mode: Values, inputs: Mapping[str, Array]) -> dict[str, Array | Stacked]:
    """All values by name, as `jquant.graph.rolled.parted` takes them; those of equal blocks are `Stacked`."""
    keep = Keep(frozenset(model.plan.graph.values), lambda name, value, own: value)
    return _evaluate(model, mode, inputs, None, keep, FEW_BLOCKS)[1]


def _evaluate(
    model: Model, mode: Values, inputs: Mapping[str, Array], rng: Array | None, keep: Keep | None, blocks: int
) -> tuple[dict[str, Array], dict[str, Any]]:
    quantized = mode == "fake_quant"
    model = fold_kept(model) if quantized else model
    plan, params, qparams = model.plan, model.params, model.qparams
    loops = find_loops(plan.graph, lambda node: _kind(node, model), blocks, recurrences=keep is None)
    scales = Scales(plan, qparams) if quantized else None
    positions = positions_of(plan.graph)
    known = [k for loop in loops if (k := _known(loop, model, scales, positions)) is not None]
    if not known:
        values = meaning_of(model, mode, rng=rng).values(inputs)
        return values, values
    inside = _with_operands(plan, known)
    outside = _read_outside(plan, known) & plan.weights.keys() if quantized else ()
    weights = {key: fake_quant_weight(key, plan, params, qparams) for key in outside}

    def meaning(own: Own | None) -> tuple[Rule, Tap | None]:
        if own is None:
            return meaning_of(model, mode, rng=rng)[1:]
        place, own_params = {**positions, **own.get("positions", {})}, with_own(params, own)
        if not quantized:
            return float_rule(plan.graph, own_params, rng, place), None
        own_qparams = {**qparams, **own.get("qparams", {})}
        own_weights = own.get("params", {}).keys() & plan.weights.keys()
        rounded = weights | {key: fake_quant_weight(key, plan, own_params, own_qparams) for key in own_weights}
        at_step = Scales(plan, qparams, given=own.get("scales"))
        rule = fake_quant_rule(inside, own_params, own_qparams, rng, weights=rounded, scales=at_step, positions=place)
        return rule, fake_quant_tap(plan, own_qparams, unrolled=not own)

    return evaluate_rolled(plan.graph, inputs, meaning, [k.rolled for k in known], keep)


def _kind(node: Node, model: Model) -> Hashable:
    plan = model.plan
    params = [
        (role, model.params[key].shape, plan.weights.get(key), plan.weight_axis.get(key), plan.turned.get(key))
        for role, key in node.params.items()
    ]
    return node.op, tuple(params), plan.values.get(node.name), node.name in plan.owned


def _read_outside(plan: Plan, known: Sequence[_Known]) -> set[str]:
    """The parameters that nodes outside of loops read, or that are the same in all steps of one."""
    loops = [k.rolled.loop for k in known]
    inside = {name for loop in loops for row in loop.steps for name in row}
    nodes = [node for node in plan.graph.nodes if node.name not in inside]
    read = {key for node in nodes for key in node.params.values()}
    shared = {key for loop in loops for node in loop.body for key in node.params.values() if key not in loop.params}
    return read | shared


def _with_operands(plan: Plan, loops: Sequence[_Known]) -> Plan:
    """The plan with the formats of the operands that only the bodies of loops have."""
    known = {key: name for each in loops for key, name in each.stands_for.items()}

    def widened(formats: Mapping[str, Any]) -> FrozenMap[Any]:
        return FrozenMap({**formats, **{key: formats[name] for key, name in known.items() if name in formats}})

    return replace(plan, values=widened(plan.values), exact=widened(plan.exact))


def _known(loop: Loop, model: Model, scales: Scales | None, positions: Mapping[str, int]) -> _Known | None:
    """None where an operand has another format in some steps, or a scale in some and none in others."""
    plan, qparams, columns = model.plan, model.qparams, columns_of(loop)
    own: dict[str, dict[str, Any]] = {"params": stacked(model.params, loop.params)}
    own["positions"] = {name: jnp.asarray([positions[n] for n in names], jnp.int32) for name, names in columns.items()}
    if scales is None:
        return _Known(Rolled(loop, own), {})
    everything = {**columns, **loop.params}
    own["qparams"] = stacked(qparams, {key: everything[key] for key in everything.keys() & set(plan.trained)})
    own["scales"] = {}
    carried = {key: (first, *columns[loop.body[i].name][:-1]) for key, (first, i) in loop.carried.items()}
    outer = {**loop.given, **carried}
    operands = {**columns, **outer}
    for key in {name for node in loop.body for name in scales_read(node, plan)} & operands.keys():
        if len({(plan.values.get(name), plan.exact.get(name)) for name in operands[key]}) > 1:
            return None
        each = [scales[name] for name in operands[key]]
        found = [scale for scale in each if scale is not None]
        if len(found) not in (0, len(each)) or len({scale.shape for scale in found}) > 1:
            return None
        own["scales"][key] = stack(found) if found else None
    return _Known(Rolled(loop, own), {key: names[0] for key, names in outer.items()})
