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
import os
import tomllib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from jquant import observers, quantizers
from jquant.config.qconfig import QConfig, observer_named, quantizer_named
from jquant.text import cut, did_you_mean, short
from jquant.types import FLOAT, FormatError, Inherit, JQuantError, Observer, Policy, QConfigError, Quantizer, QuantSpec

SCHEMA = 1
TABLES = (
    "jquant",
    "rules",
    "target",
    "image",
    "train",
)  # of the one file that the commands and `qconfig_from_toml` read
Found = TypeVar("Found", Quantizer, Observer)
Own = Collection[Quantizer | Observer]  # of the reader: what a file may name by its `source`
_FIELDS = ("dtype", "axis", "scale_form", "quantizer", "observer", "fixed_scale")


def qconfig_to_dict(qconfig: QConfig) -> dict[str, Any]:
    """A qconfig as plain data.

    Raises:
      QConfigError: a quantizer or observer of one's own, without a `source` by which a file can name it.
    """
    return {"jquant": {"schema": SCHEMA}, "rules": {p: _from_policy(p, rule) for p, rule in qconfig.rules.items()}}


def qconfig_from_dict(data: Any, own: Own = ()) -> QConfig:
    """The qconfig that `qconfig_to_dict` described; other tables of the commands' file are left to them.

    Raises:
      FormatError: another schema, an unknown key, a wrong type. QConfigError: values that no spec can have.
    """
    header = data.get("jquant") if isinstance(data, Mapping) else None
    schema = header.get("schema") if isinstance(header, Mapping) else None
    if schema != SCHEMA:
        raise FormatError(f"qconfig schema {schema!r}; this release reads schema {SCHEMA}")
    _check_keys("the file", data, TABLES)
    if "rules" not in data:
        raise FormatError('there are no rules; a rule is a table such as [rules."*".output] with dtype = "int8"')
    rules = data["rules"]
    if not isinstance(rules, Mapping):
        raise FormatError(f"rules must be a table of pattern to rule, not {type(rules).__name__}")
    return QConfig({pattern: _to_policy(f"rule {short(pattern)}", rule, own) for pattern, rule in rules.items()})


def qconfig_to_json(qconfig: QConfig) -> str:
    """A qconfig as JSON text."""
    return json.dumps(qconfig_to_dict(qconfig), indent=1)


def qconfig_from_json(source: str | os.PathLike[str], *, own: Own = ()) -> QConfig:
    """The qconfig of JSON text, or of a file.

    Args:
      source: the text, or a path: a `Path`, or a string that ends in ".json".
      own: the quantizers and observers of your own that the file may name, by their `source`. No code is imported.

    Raises:
      FormatError: no such file, not JSON, or as for `qconfig_from_dict`.
    """
    return _read(source, ".json", "JSON", json.loads, own)


def _read(source: str | os.PathLike[str], suffix: str, kind: str, parse: Callable[[str], Any], own: Own) -> QConfig:
    """The qconfig of text or of a file; an error names the file."""
    is_path = isinstance(source, os.PathLike) or (source.endswith(suffix) and "\n" not in source)
    where = f"{os.fspath(source)}: " if is_path else ""
    try:
        text = Path(source).read_text(encoding="utf-8") if is_path else str(source)
        data = parse(text)
    except OSError as error:
        raise FormatError(f"{where}cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}not {kind}: {error}") from error
    try:
        return qconfig_from_dict(data, own)
    except JQuantError as error:
        raise type(error)(f"{where}{cut(str(error), 2000)}") from error


def qconfig_to_toml(qconfig: QConfig) -> str:
    """A qconfig as TOML text."""
    lines = ["[jquant]", f"schema = {SCHEMA}"]
    for pattern, rule in qconfig_to_dict(qconfig)["rules"].items():
        lines += ["", f"[rules.{json.dumps(pattern)}]"]
        lines += [f"{key} = {_toml(value)}" for key, value in rule.items()]
    return "\n".join(lines) + "\n"


def qconfig_from_toml(source: str | os.PathLike[str], *, own: Own = ()) -> QConfig:
    """The qconfig of TOML text, or of a file: of the one that `jquant demo` writes and the commands take as well.

    Args:
      source: the text, or a path: a `Path`, or a string that ends in ".toml".
      own: the quantizers and observers of your own that the file may name, by their `source`. No code is imported.

    Raises:
      FormatError: no such file, not TOML, or as for `qconfig_from_dict`.

    Example:
      model = jq.prepare(graph, params, jq.config.qconfig_from_toml("jquant-demo/q.toml"), target="nash-e")
    """
    return _read(source, ".toml", "TOML", tomllib.loads, own)


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
        ours = getattr(quantizers, spec.quantizer.name, None) == spec.quantizer
        found["quantizer"] = spec.quantizer.name if ours else _source(where, "quantizer", spec.quantizer)
    if spec.observer is not None:
        ours = not spec.observer.source and spec.observer.name in observers.__all__
        name = spec.observer.name if ours else _source(where, "observer", spec.observer)
        found["observer"] = {"name": name} | dict(spec.observer.options)
    return found


def _source(where: str, kind: str, value: Quantizer | Observer) -> str:
    """The name that a file has for a quantizer or observer of the user's own."""
    if ":" not in value.source:
        raise QConfigError(
            f"{where}: the {kind} {value.name!r} is one of your own; for files give it a name of its own: "
            f'{type(value).__name__}(..., source="package.module:{value.name}")'
        )
    return value.source


def _to_policy(where: str, rule: Any, own: Own) -> Policy | None:
    if not isinstance(rule, Mapping):
        raise FormatError(f"{where} must be a table, not {type(rule).__name__}")
    _check_keys(where, rule, ("float", "output", "weight", "input"))
    if "float" in rule:
        if rule["float"] is not True or len(rule) > 1:
            raise FormatError(f"{where}: 'float = true' stands alone")
        return None
    fields: dict[str, Any] = {
        port: None if rule[port] == "float" else spec_from_dict(f"{where}, {port}", rule[port], own)
        for port in ("output", "weight")
        if port in rule
    }
    if "input" in rule:
        if not isinstance(rule["input"], Mapping):
            raise FormatError(f"{where}: input must be a table of port to spec")
        fields["input"] = {
            port: spec_from_dict(f"{where}, input {port}", spec, own) for port, spec in rule["input"].items()
        }
    return Policy(**fields)


def spec_from_dict(where: str, data: Any, own: Own = ()) -> QuantSpec:
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
        fields["quantizer"] = _found(where, Quantizer, quantizer_named, fields["quantizer"], own)
    if "observer" in fields:
        asked = fields["observer"]
        asked = {"name": asked} if isinstance(asked, str) else asked
        if not isinstance(asked, Mapping) or not isinstance(asked.get("name"), str):
            raise FormatError(f"{where}: observer must be a name or a table with a name, not {asked!r}")
        options = {key: value for key, value in asked.items() if key != "name"}
        fields["observer"] = _found(where, Observer, observer_named, asked["name"], own, **options)
    return QuantSpec(**fields)


def _found(where: str, kind: type[Found], find: Callable[..., Found], name: Any, own: Own, /, **options: Any) -> Found:
    """The quantizer or observer of a name, one of `own` where the name has a colon."""
    if ":" not in str(name):
        return _named(where, find, name, **options)
    for value in own:
        if isinstance(value, kind) and value.source == name and dict(getattr(value, "options", ())) == options:
            return value
    raise FormatError(f"{where}: {name!r} is of the writer's own; import it, and pass it to the reader in own=[...]")


def _named(where: str, find: Callable[..., Found], name: Any, /, **options: Any) -> Found:
    """The quantizer or observer of a name; in a file, an unknown one is a FormatError."""
    try:
        return find(str(name), **options)
    except QConfigError as error:
        raise FormatError(f"{where}: {error}") from error


def _check_keys(where: str, data: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in data:
        if key not in known:
            raise FormatError(
                f"{where}: unknown key {short(key)}{did_you_mean(str(key), known)}; known: {', '.join(known)}"
            )
