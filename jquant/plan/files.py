"""Plans as versioned JSON: to record what was trained, to compare it, and to read it back. No code is run."""

from dataclasses import replace
from typing import Any

from jquant.config.files import Own, spec_from_dict, spec_to_dict
from jquant.graph.sealed import read_sealed_text, refusing, sealed_text, short
from jquant.graph.serialize import decode, encode, read_graph
from jquant.targets import differences
from jquant.types import (
    EXACT_DTYPES,
    ROUNDINGS,
    FormatError,
    FrozenMap,
    Plan,
    QConfigError,
    QuantSpec,
    Resolution,
    Target,
)

_FIELDS = (
    "graph", "values", "weights", "weight_axis", "owned", "target", "march", "resolutions", "renamed", "exact", "moved",
)  # fmt: skip


def plan_to_json(plan: Plan) -> str:
    """A plan as JSON text.

    Raises:
      QConfigError: a quantizer or observer of one's own, without a `source` by which a file can name it.

    Example:
      text = jq.plan.plan_to_json(model.plan)
      assert jq.plan.plan_from_json(text) == plan
    """
    return sealed_text("plan", _plan_to_dict(plan))


def plan_from_json(text: str, *, own: Own = ()) -> Plan:
    """The plan that `plan_to_json` wrote.

    Args:
      text: the JSON.
      own: the quantizers and observers of your own that the plan may name, by their `source`. No code is imported.

    Raises:
      FormatError: another content than that of its digest, another version, or not a plan.
    """
    data = read_sealed_text(text, "plan")
    with refusing("plan"):
        return _plan_from_dict(data, own)


def _plan_from_dict(data: Any, own: Own) -> Plan:
    if not isinstance(data, dict) or set(data) != set(_FIELDS):
        raise FormatError("expected an object with " + ", ".join(_FIELDS))
    graph = read_graph(data["graph"])
    for part in ("values", "weights"):
        if not isinstance(data[part], dict):
            raise FormatError(f"{part}: expected an object, found {type(data[part]).__name__}")
    values = {name: None if spec is None else _to_spec(name, spec, own) for name, spec in data["values"].items()}
    plan = Plan(
        graph,
        FrozenMap(values),
        FrozenMap({name: _to_spec(name, spec, own) for name, spec in data["weights"].items()}),
        decode(FrozenMap[int], data["weight_axis"], "weight_axis"),
        decode(tuple[str, ...], data["owned"], "owned"),
        decode(Target, data["target"], "target"),
        decode(tuple[Resolution, ...], data["resolutions"], "resolutions"),
        decode(FrozenMap[str], data["renamed"], "renamed"),
        decode(FrozenMap[str], data["exact"], "exact"),
        moved=decode(FrozenMap[tuple[int, ...]], data["moved"], "moved"),
    )
    if data["march"] != str(plan.target):
        raise FormatError(f"the plan is for {short(data['march'])}, and the target in the file is {plan.target}")
    unknown = (set(plan.values) ^ set(graph.values)) | (set(plan.weights) - set(graph.param_names))
    unknown |= set(plan.owned) - {name for name, spec in values.items() if spec is not None}
    unknown |= (set(plan.exact) | set(plan.moved)) - set(graph.values) | set(plan.weight_axis) - set(plan.weights)
    if unknown:
        raise FormatError(f"{short(min(unknown))} does not belong to the graph")
    for name, dtype in plan.exact.items():
        if dtype not in EXACT_DTYPES:
            raise FormatError(f"exact.{short(name)}: expected one of {', '.join(EXACT_DTYPES)}, found {short(dtype)}")
    return plan


def _plan_to_dict(plan: Plan) -> dict[str, Any]:
    return {
        "graph": encode(plan.graph),
        "values": {name: None if spec is None else _from_spec(name, spec) for name, spec in plan.values.items()},
        "weights": {name: _from_spec(name, spec) for name, spec in plan.weights.items()},
        "weight_axis": encode(plan.weight_axis),
        "owned": list(plan.owned),
        "target": encode(plan.target),
        "march": str(plan.target),
        "resolutions": encode(plan.resolutions),
        "renamed": encode(plan.renamed),
        "exact": encode(plan.exact),
        "moved": encode(plan.moved),
    }


def _from_spec(name: str, spec: QuantSpec) -> dict[str, Any]:
    return spec_to_dict(repr(name), spec) | {"rounding": spec.rounding}


def _to_spec(name: str, data: Any, own: Own) -> QuantSpec:
    if not isinstance(data, dict) or data.get("rounding") not in ROUNDINGS:
        raise FormatError(f"{short(name)}: expected a spec with a rounding")
    rest = {key: value for key, value in data.items() if key != "rounding"}
    try:
        return replace(spec_from_dict(repr(name), rest, own), rounding=data["rounding"])
    except QConfigError as error:
        raise FormatError(f"{short(name)}: {error}") from error


def find_mismatch(saved: Plan, plan: Plan) -> str | None:
    """What differs between two plans, in words that name both; None where they train the same."""
    if saved.target != plan.target:
        if saved.target.name != plan.target.name:
            return f"march: saved for {saved.target.name}, this plan is for {plan.target.name}"
        differ = [f"{path} {a!r} and {b!r}" for path, (a, b) in differences(saved.target, plan.target).items()]
        return f"march: {saved.target} was saved, this plan is for {plan.target}: {', '.join(differ)}"
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
