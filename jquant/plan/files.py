"""Plans as versioned JSON, to record what was trained and to compare it; models as files. No code is run."""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jquant.config.files import Own, spec_from_dict, spec_to_dict
from jquant.graph.checks import validate
from jquant.graph.sealed import (
    VERSION,
    read_sealed_kind,
    read_sealed_text,
    refusing,
    sealed_arrays,
    sealed_text,
    short,
)
from jquant.graph.serialize import decode, encode, read_graph
from jquant.host.whole_files import replacing
from jquant.numerics.namespace import to_device
from jquant.plan.scales import check_model
from jquant.targets import differences, find_target
from jquant.types import (
    EXACT_DTYPES,
    ROUNDINGS,
    FormatError,
    FrozenMap,
    Model,
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


def save(path: str | os.PathLike[str], model: Model, *, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a model: plan, parameters and scales. An interrupted save leaves an existing file as it was.

    `jq.save` writes the program that `jq.lower` makes of it, which runs on without the model. This file goes on where
    the model was: it is calibrated, trained, compared and lowered as before. The state of an optimizer is no part of a
    model; `jq.training.open_checkpoints` keeps both.

    Args:
      path: the file.
      model: what `jq.prepare` or `jq.calibrate` returned, or a trained one.
      metadata: further entries of the file's header, text by text; the digest covers them. "model" and "digest" are
        taken.

    Raises:
      JQuantError: no model. GraphError, CalibrationError: parameters or scales that are missing or broken.
      FormatError: an operator that no file can hold, or metadata that are not text.
      QConfigError: a quantizer or observer of one's own, without a `source` by which a file can name it.
      OSError: what the system says.

    Example:
      >>> import pathlib, tempfile, jax.numpy as jnp, jquant as jq
      >>> x, weights = jnp.array([[1.0, 0.5], [-0.25, 0.75]]), {"w": jnp.array([[0.5, 1.0], [-1.0, 0.25]])}
      >>> graph, params = jq.trace(lambda p, x: x @ p["w"], weights, x)
      >>> model = jq.prepare(graph, params, jq.QConfig(jq.templates.int8_default()), target="nash-e")
      >>> model = jq.calibrate(model, [x])
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     jq.plan.save(pathlib.Path(folder) / "net.jqm", model)
      ...     again = jq.plan.load(pathlib.Path(folder) / "net.jqm", target="nash-e")
      >>> bool((jq.apply(again, x) == jq.apply(model, x)).all())
      True
    """
    check_model(model, scales=False)
    if model.qparams:
        check_model(model)
    if "model" in (metadata or {}):
        raise FormatError("the metadata key 'model' is that of the model itself")
    arrays = {f"param:{name}": np.asarray(model.params[name]) for name in model.plan.graph.param_names}
    arrays |= {f"scale:{name}": np.asarray(value) for name, value in model.qparams.items()}
    header = {"jquant": VERSION, "plan": _plan_to_dict(model.plan), "calibrated": bool(model.qparams)}
    content = sealed_arrays(arrays, {"model": json.dumps(header), **(metadata or {})})
    with replacing(path) as partial:
        partial.write_bytes(content)


def load(path: str | os.PathLike[str], *, target: Target | str | None = None, own: Own = ()) -> Model:
    """Reads a model that `save` wrote.

    Args:
      path: the file.
      target: the march that the model has to be prepared for; None: any.
      own: quantizers and observers of your own that the file may name, by their `source`. No code is imported.

    Raises:
      FormatError: a file that is truncated, damaged, of another version, of another march or no model.
      FileNotFoundError: no file.

    Example:
      >>> import jquant as jq
      >>> jq.plan.load("no.jqm")  # `save` has an example of both
      Traceback (most recent call last):
      FileNotFoundError: no model at no.jqm
    """
    path = Path(path)
    header, arrays = read_sealed_kind(path, "model")
    with refusing(path):
        model = _assembled(header, arrays, own)
    if target is not None and find_target(target) != model.plan.target:
        raise FormatError(
            f"{path}: prepared for {model.plan.target}, not for {find_target(target)}; call jq.prepare for that"
        )
    return model


def _assembled(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray], own: Own) -> Model:
    wanted = {"jquant", "plan", "calibrated"}
    if odd := header.keys() ^ wanted:
        raise FormatError(f"the header {'lacks' if min(odd) in wanted else 'has an unknown'} {short(min(odd))}")
    if not isinstance(header["calibrated"], bool):
        raise FormatError(f"calibrated: expected true or false, found {short(header['calibrated'])}")
    found: dict[str, dict[str, Any]] = {"param": {}, "scale": {}}
    for key, array in arrays.items():
        kind, _, name = key.partition(":")
        if kind not in found:
            raise FormatError(f"unexpected array {short(key)}")
        found[kind][name] = array
    plan = _plan_from_dict(header["plan"], own)
    if unknown := found["param"].keys() - set(plan.graph.param_names):
        raise FormatError(f"array {short(f'param:{min(unknown)}')} is a parameter of no node")
    if found["scale"] and not header["calibrated"]:
        raise FormatError(f"unexpected array {short('scale:' + min(found['scale']))}: the model is not calibrated")
    validate(plan.graph, found["param"])
    params, qparams = to_device((found["param"], found["scale"]))
    model = Model(plan, params, qparams)
    check_model(model, scales=header["calibrated"])
    return model


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
