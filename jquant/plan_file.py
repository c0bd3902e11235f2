"""Plans as versioned JSON: to record what was trained, to compare it, and to read it back. No code is run."""

import json
from dataclasses import replace
from typing import Any

from jquant.ir.graph import validate
from jquant.ir.serialize import VERSION, decode, encode, read_versioned
from jquant.qconfig_file import spec_from_dict, spec_to_dict
from jquant.types import FormatError, FrozenMap, Graph, Plan, QConfigError, QuantSpec, Resolution, Target

_FIELDS = ("graph", "values", "weights", "weight_axis", "owned", "target", "resolutions", "renamed", "exact")


def plan_to_json(plan: Plan) -> str:
    """A plan as JSON text.

    Raises:
      QConfigError: a quantizer or observer of one's own, which a file cannot hold.

    Example:
      text = jq.plan_to_json(plan)
      assert jq.plan_from_json(text) == plan
    """
    return json.dumps({"jquant": VERSION, "plan": _plan_to_dict(plan)}, indent=1)


def plan_from_json(text: str) -> Plan:
    """The plan that `plan_to_json` wrote.

    Raises:
      FormatError: not JSON, another version, or not a plan.
    """
    data = read_versioned(text).get("plan")
    if not isinstance(data, dict) or set(data) != set(_FIELDS):
        raise FormatError("plan: expected an object with " + ", ".join(_FIELDS))
    try:
        graph = validate(decode(Graph, data["graph"], "graph"))
    except Exception as error:
        raise FormatError(f"the graph is not well formed: {error}") from error
    for part in ("values", "weights"):
        if not isinstance(data[part], dict):
            raise FormatError(f"{part}: expected an object, found {type(data[part]).__name__}")
    values = {name: None if spec is None else _to_spec(name, spec) for name, spec in data["values"].items()}
    plan = Plan(
        graph,
        FrozenMap(values),
        FrozenMap({name: _to_spec(name, spec) for name, spec in data["weights"].items()}),
        decode(FrozenMap[int], data["weight_axis"], "weight_axis"),
        decode(tuple[str, ...], data["owned"], "owned"),
        decode(Target, data["target"], "target"),
        decode(tuple[Resolution, ...], data["resolutions"], "resolutions"),
        decode(FrozenMap[str], data["renamed"], "renamed"),
        decode(FrozenMap[str], data["exact"], "exact"),
    )
    unknown = (set(plan.values) ^ set(graph.values)) | (set(plan.weights) - set(graph.param_names))
    unknown |= set(plan.owned) - {name for name, spec in values.items() if spec is not None}
    if unknown:
        raise FormatError(f"{min(unknown)!r} does not belong to the graph")
    return plan


def _plan_to_dict(plan: Plan) -> dict[str, Any]:
    return {
        "graph": encode(plan.graph),
        "values": {name: None if spec is None else _from_spec(name, spec) for name, spec in plan.values.items()},
        "weights": {name: _from_spec(name, spec) for name, spec in plan.weights.items()},
        "weight_axis": encode(plan.weight_axis),
        "owned": list(plan.owned),
        "target": encode(plan.target),
        "resolutions": encode(plan.resolutions),
        "renamed": encode(plan.renamed),
        "exact": encode(plan.exact),
    }


def _from_spec(name: str, spec: QuantSpec) -> dict[str, Any]:
    return spec_to_dict(repr(name), spec) | {"rounding": spec.rounding}


def _to_spec(name: str, data: Any) -> QuantSpec:
    if not isinstance(data, dict) or data.get("rounding") not in ("half_even", "half_up"):
        raise FormatError(f"{name!r}: expected a spec with a rounding")
    rest = {key: value for key, value in data.items() if key != "rounding"}
    try:
        return replace(spec_from_dict(repr(name), rest), rounding=data["rounding"])
    except QConfigError as error:
        raise FormatError(f"{name!r}: {error}") from error


def find_mismatch(saved: Plan, plan: Plan) -> str | None:
    """What differs between two plans, in words that name both; None where they train the same."""
    if saved.target != plan.target:
        if saved.target.name != plan.target.name:
            return f"march: saved for {saved.target.name}, this plan is for {plan.target.name}"
        return f"march: {saved.target.name} has other settings: {saved.target} and {plan.target}"
    for what, old, new in (("value", saved.values, plan.values), ("weight", saved.weights, plan.weights)):
        for name in dict.fromkeys((*old, *new)):
            if name not in old or name not in new:
                return f"qconfig: {what} {name!r} is {'only in this plan' if name in new else 'missing in this plan'}"
            if old[name] != new[name]:
                return f"qconfig: {what} {name!r} was saved as {_show(old[name])}, this plan has {_show(new[name])}"
    for before, after in zip(saved.graph.nodes, plan.graph.nodes, strict=False):
        if before != after:
            return f"graph: node {before.name!r} was saved as {before}, this plan has {after}"
    if saved != plan and (saved.graph, saved.owned, saved.exact) != (plan.graph, plan.owned, plan.exact):
        return "graph: inputs, outputs or the number of nodes differ"
    return None


def _show(spec: QuantSpec | None) -> str:
    return "float" if spec is None else f"{spec} ({spec.rounding})"
