"""QConfigs as JSON and TOML: data with a schema version, checked when read. No code is run by reading a file.

[jquant]
schema = 1

[rules."*".output]
dtype = "int8"
observer = { name = "mse" }

[rules."*".weight]
dtype = "int8"
axis = "out"

[rules."head.*"]
float = true
"""

import json
import tomllib
from collections.abc import Mapping
from typing import Any

from jquant import observers, quantizers
from jquant.qconfig import QConfig
from jquant.text import did_you_mean
from jquant.types import FLOAT, FormatError, Inherit, Observer, Policy, QConfigError, Quantizer, QuantSpec

SCHEMA = 1
_FIELDS = ("dtype", "axis", "scale_form", "quantizer", "observer", "fixed_scale")


def qconfig_to_dict(qconfig: QConfig) -> dict[str, Any]:
    """A qconfig as plain data.

    Raises:
      QConfigError: a quantizer or observer of one's own, which a file cannot hold.
    """
    return {"jquant": {"schema": SCHEMA}, "rules": {p: _from_policy(p, rule) for p, rule in qconfig.rules.items()}}


def qconfig_from_dict(data: Any) -> QConfig:
    """The qconfig that `qconfig_to_dict` described.

    Raises:
      FormatError: another schema, an unknown key, a wrong type. QConfigError: values that no spec can have.
    """
    header = data.get("jquant") if isinstance(data, Mapping) else None
    schema = header.get("schema") if isinstance(header, Mapping) else None
    if schema != SCHEMA:
        raise FormatError(f"qconfig schema {schema!r}; this release reads schema {SCHEMA}")
    _check_keys("the file", data, ("jquant", "rules"))
    rules = data.get("rules")
    if not isinstance(rules, Mapping):
        raise FormatError(f"rules must be a table of pattern to rule, not {type(rules).__name__}")
    return QConfig({pattern: _to_policy(f"rule {pattern!r}", rule) for pattern, rule in rules.items()})


def qconfig_to_json(qconfig: QConfig) -> str:
    """A qconfig as JSON text."""
    return json.dumps(qconfig_to_dict(qconfig), indent=1)


def qconfig_from_json(text: str) -> QConfig:
    """The qconfig of JSON text.

    Raises:
      FormatError: not JSON, or as for `qconfig_from_dict`.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"not JSON: {error}") from error
    return qconfig_from_dict(data)


def qconfig_to_toml(qconfig: QConfig) -> str:
    """A qconfig as TOML text."""
    lines = ["[jquant]", f"schema = {SCHEMA}"]
    for pattern, rule in qconfig_to_dict(qconfig)["rules"].items():
        lines += ["", f"[rules.{json.dumps(pattern)}]"]
        lines += [f"{key} = {_toml(value)}" for key, value in rule.items()]
    return "\n".join(lines) + "\n"


def qconfig_from_toml(text: str) -> QConfig:
    """The qconfig of TOML text.

    Raises:
      FormatError: not TOML, or as for `qconfig_from_dict`.
    """
    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise FormatError(f"not TOML: {error}") from error
    return qconfig_from_dict(data)


def _toml(value: Any) -> str:
    """A value in one line; JSON strings, numbers and booleans are TOML too."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + " }"
    return json.dumps(value)


# ---------------------------------------------------------------------------------------------------------------------
# Policies and specs


def _from_policy(pattern: str, policy: Policy) -> dict[str, Any]:
    if policy == FLOAT:
        return {"float": True}
    found: dict[str, Any] = {}
    for port in ("output", "weight"):
        spec = getattr(policy, port)
        if not isinstance(spec, Inherit):
            found[port] = "float" if spec is None else spec_to_dict(f"rule {pattern!r}", spec)
    if not isinstance(policy.input, Inherit):
        found["input"] = {port: spec_to_dict(f"rule {pattern!r}", spec) for port, spec in policy.input.items()}
    return found


def spec_to_dict(where: str, spec: QuantSpec) -> dict[str, Any]:
    """A spec as JSON data; `where` begins the message of an error."""
    found: dict[str, Any] = {"dtype": spec.dtype}
    for name in ("axis", "fixed_scale"):
        if getattr(spec, name) is not None:
            found[name] = getattr(spec, name)
    if spec.scale_form != "real":
        found["scale_form"] = spec.scale_form
    if spec.quantizer is not None:
        if getattr(quantizers, spec.quantizer.name, None) != spec.quantizer:
            raise QConfigError(
                f"{where}: the quantizer {spec.quantizer.name!r} is one of your own; a file cannot hold it"
            )
        found["quantizer"] = spec.quantizer.name
    if spec.observer is not None:
        options = dict(spec.observer.options)
        if _observer(where, spec.observer.name, options).name != spec.observer.name:
            raise QConfigError(
                f"{where}: the observer {spec.observer.name!r} is one of your own; a file cannot hold it"
            )
        found["observer"] = {"name": spec.observer.name} | options
    return found


def _to_policy(where: str, rule: Any) -> Policy | None:
    if not isinstance(rule, Mapping):
        raise FormatError(f"{where} must be a table, not {type(rule).__name__}")
    _check_keys(where, rule, ("float", "output", "weight", "input"))
    if "float" in rule:
        if rule["float"] is not True or len(rule) > 1:
            raise FormatError(f"{where}: 'float = true' stands alone")
        return None
    fields: dict[str, Any] = {
        port: None if rule[port] == "float" else spec_from_dict(f"{where}, {port}", rule[port])
        for port in ("output", "weight")
        if port in rule
    }
    if "input" in rule:
        if not isinstance(rule["input"], Mapping):
            raise FormatError(f"{where}: input must be a table of port to spec")
        fields["input"] = {port: spec_from_dict(f"{where}, input {port}", spec) for port, spec in rule["input"].items()}
    return Policy(**fields)


def spec_from_dict(where: str, data: Any) -> QuantSpec:
    """The spec of JSON data; `where` begins the message of an error."""
    if isinstance(data, str):
        data = {"dtype": data}
    if not isinstance(data, Mapping) or not isinstance(data.get("dtype"), str):
        raise FormatError(f"{where} must be a dtype or a table with a dtype, not {data!r}")
    _check_keys(where, data, _FIELDS)
    fields = dict(data)
    scale = fields.get("fixed_scale")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, int | float)):
        raise FormatError(f"{where}: fixed_scale must be a number, not {scale!r}")
    if "quantizer" in fields:
        fields["quantizer"] = _quantizer(where, fields["quantizer"])
    if "observer" in fields:
        asked = fields["observer"]
        asked = {"name": asked} if isinstance(asked, str) else asked
        if not isinstance(asked, Mapping) or not isinstance(asked.get("name"), str):
            raise FormatError(f"{where}: observer must be a name or a table with a name, not {asked!r}")
        fields["observer"] = _observer(where, asked["name"], {k: v for k, v in asked.items() if k != "name"})
    return QuantSpec(**fields)


def _quantizer(where: str, name: Any) -> Quantizer:
    known = {n: v for n, v in vars(quantizers).items() if isinstance(v, Quantizer)}
    if name not in known:
        raise FormatError(f"{where}: unknown quantizer {name!r}{did_you_mean(str(name), known)}")
    return known[name]


def _observer(where: str, name: str, options: Mapping[str, Any]) -> Observer:
    make = getattr(observers, name, None)
    if name.startswith("_") or not callable(make):
        raise FormatError(f"{where}: unknown observer {name!r}{did_you_mean(name, vars(observers))}")
    try:
        found = make(**options)
    except TypeError as error:
        raise FormatError(f"{where}: observer {name!r}: {error}") from error
    if not isinstance(found, Observer):
        raise FormatError(f"{where}: {name!r} is no observer")
    return found


def _check_keys(where: str, data: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in data:
        if key not in known:
            raise FormatError(f"{where}: unknown key {key!r}{did_you_mean(str(key), known)}; known: {', '.join(known)}")
