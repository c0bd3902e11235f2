"""Marches as TOML or JSON, read with strict checks, and the list of their fields with the values that each can have."""

import json
import os
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from jquant.host.whole_files import replacing
from jquant.text import cut, did_you_mean, short
from jquant.types import FormatError, QConfigError, Target, field_kinds


def fields() -> dict[str, tuple[str, ...] | tuple[bool, ...] | range]:
    """Every field that computes, with all the values that it can have, by the path that `Target.with_fields` takes.

    The name, the dtypes and `integer` are left out. A format may refuse two values that do not go together.

    Example:
      >>> import jquant as jq
      >>> jq.targets.fields()["rescale.inner_bits"], jq.targets.fields()["resize.nearest_index"]
      (range(16, 33), ('exact', 'fixed'))
    """
    found: dict[str, tuple[str, ...] | tuple[bool, ...] | range] = {}
    for name, kind in field_kinds(Target).items():
        if is_dataclass(kind):
            found |= {f"{name}.{port}": values for port, of in field_kinds(kind).items() if (values := _values(of))}
        elif name not in ("default_dtype", "integer") and (values := _values(kind)):
            found[name] = values
    return found


def _values(kind: Any) -> tuple[Any, ...] | range | None:
    match typing.get_origin(kind), typing.get_args(kind):
        case typing.Literal, choices:
            return choices
        case typing.Annotated, (_, (low, high)):
            return range(low, high + 1)
    return (False, True) if kind is bool else None


def value_of(target: Target, path: str) -> Any:
    """The value of a field by its path, such as "rescale.post_rounding".

    Raises:
      QConfigError: no such field.
    """
    value: Any = target
    for part in path.split("."):
        if not is_dataclass(value) or part not in field_kinds(type(value)):
            raise QConfigError(f"a Target has no field {path!r}{did_you_mean(path, fields())}")
        value = getattr(value, part)
    return value


def differences(a: Target, b: Target) -> dict[str, tuple[Any, Any]]:
    """{path: (value in a, value in b)} of the fields in which two marches differ, the name left out."""
    paths = [*fields(), "default_dtype", "integer", "activation_dtypes", "weight_dtypes"]
    return {p: (value_of(a, p), value_of(b, p)) for p in paths if value_of(a, p) != value_of(b, p)}


def to_dict(target: Target) -> dict[str, Any]:
    """A march as nested dictionaries that TOML and JSON hold; `from_dict` reads them back."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(target).items()}


def from_dict(data: Any) -> Target:
    """The march that `to_dict` wrote.

    Raises:
      FormatError: fields that are missing or unknown, with their paths and near names, or values that they cannot have.
    """
    problems: list[str] = []
    values = _read(Target, data, "", problems)
    if problems:
        raise FormatError("no march: " + "; ".join(problems))
    try:
        groups: dict[str, Any] = {name: kind for name, kind in field_kinds(Target).items() if is_dataclass(kind)}
        made: dict[str, Any] = {}
        for name, kind in groups.items():
            try:
                made[name] = kind(**values[name])
            except QConfigError as error:
                problems.append(str(error))
        if problems:
            raise QConfigError("; ".join(problems))
        return Target(**(values | made))
    except QConfigError as error:
        raise FormatError(f"no march: {error}") from error


def _read(cls: Any, data: Any, where: str, problems: list[str]) -> dict[str, Any]:
    """The values of the fields of one dataclass; what is wrong is added to `problems`."""
    if not isinstance(data, Mapping):
        problems.append(f"{where or 'the file'} is {short(data)}, and should be a table of {cls.__name__}")
        return {}
    kinds = field_kinds(cls)
    dot = f"{where}." if where else ""
    problems += [
        f"unknown field {dot}{cut(str(key), 60)}{did_you_mean(str(key), kinds)}" for key in data if key not in kinds
    ]
    problems += [f"missing field {dot}{name}" for name in kinds if name not in data]
    found = {}
    for name, kind in kinds.items():
        if name in data:
            value = data[name]
            found[name] = _read(kind, value, f"{dot}{name}", problems) if is_dataclass(kind) else value
            if typing.get_origin(kind) is tuple and isinstance(value, list):
                found[name] = tuple(value)
    return found


def to_toml(target: Target, table: str = "") -> str:
    """A march as TOML text, its fields below `table` where that is given."""
    simple = [f"{k} = {json.dumps(v)}" for k, v in to_dict(target).items() if not isinstance(v, dict)]
    lines = [f"[{table}]", *simple] if table else simple
    for name, group in to_dict(target).items():
        if isinstance(group, dict):
            title = f"{table}.{name}" if table else name
            lines += ["", f"[{title}]", *(f"{k} = {json.dumps(v)}" for k, v in group.items())]
    return "\n".join(lines) + "\n"


def dump(target: Target, path: str | os.PathLike[str]) -> None:
    """Writes a march as TOML, or as JSON where the name of the file ends so. An existing file is replaced as a whole.

    Args:
      target: the march.
      path: the file.

    Raises:
      OSError: the file cannot be written.

    Example:
      >>> import jquant as jq, tempfile, pathlib
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "mine.toml"
      >>> jq.targets.dump(jq.targets.NASH_E.with_fields({"name": "mine", "rescale.inner_bits": 32}), path)
      >>> jq.targets.load(path).rescale.inner_bits
      32
    """
    path = Path(path)
    text = json.dumps(to_dict(target), indent=1) + "\n" if path.suffix == ".json" else to_toml(target)
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def load(path: str | os.PathLike[str]) -> Target:
    """Reads a march that `dump` or a person wrote, as TOML or JSON.

    Args:
      path: the file, which has every field of `Target`; its name ends in ".json" for JSON.

    Returns:
      A `Target`. Its fingerprint depends on its values alone, not on the file.

    Raises:
      FormatError: no TOML or JSON, missing or unknown fields (all named), or a value that a field cannot have.
      FileNotFoundError: no file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no march at {path}")
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise FormatError(f"{path}: {error}") from error
    try:
        return from_dict(data)
    except FormatError as error:
        raise FormatError(f"{path}: {cut(str(error), 2000)}") from error
