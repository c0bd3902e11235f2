"""Static dataclasses to JSON values and back, checked against their annotations. No code is run by reading a file."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any

from jquant.graph.checks import validate
from jquant.graph.sealed import read_sealed_text, refusing, sealed_text, short
from jquant.types import FormatError, FrozenMap, Graph, JQuantError, Op

_INTEGERS = range(-(2**63), 2**63)


def operators() -> dict[str, type[Op]]:
    """Operator classes by name, user-defined ones included; the first definition of a name wins."""
    found: dict[str, type[Op]] = {}
    for cls in Op.__subclasses__():
        found.setdefault(cls.__name__, cls)
    return found


def encode(value: Any) -> Any:
    """A static value as what `json` can write. An operator carries its class name under "op"."""
    if isinstance(value, Op):
        return {"op": type(value).__name__} | {
            f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)
        }
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [encode(item) for item in value]
    if not (value is None or isinstance(value, str | int | float)):
        raise FormatError(f"{value!r} is a function of the model that no file can hold (`trace` found no operator)")
    return value


def decode(kind: Any, data: Any, where: str = "file") -> Any:
    """The value of an annotated type from JSON data.

    Raises:
      FormatError: data that does not have the type, with the path to it.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Op:
        return _decode_op(data, where)
    if kind is Any:
        return data
    if origin is typing.Literal:
        _require(data in args, where, f"one of {args}", data)
        return data
    if origin in (typing.Union, types.UnionType):
        return _decode_union(args, data, where)
    if origin is tuple:
        _require(isinstance(data, list), where, "a list", data)
        if args[-1] is Ellipsis:
            return tuple(decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(data))
        _require(len(data) == len(args), where, f"{len(args)} items", data)
        return tuple(decode(k, item, f"{where}[{i}]") for i, (k, item) in enumerate(zip(args, data, strict=True)))
    if origin is FrozenMap:
        _require(isinstance(data, dict), where, "an object", data)
        return FrozenMap({key: decode(args[0], item, f"{where}.{_key(key)}") for key, item in data.items()})
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, data, where)
    if kind is float:
        _require(isinstance(data, int | float) and not isinstance(data, bool), where, "a number", data)
        try:
            return float(data)
        except OverflowError as error:  # an integer beyond float64
            raise FormatError(f"{where}: {error}") from error
    _require(type(data) is kind, where, getattr(kind, "__name__", str(kind)), data)
    _require(kind is not int or data in _INTEGERS, where, "an integer of 64 bits", data)
    return data


def _key(name: str) -> str:
    return name if len(name) < 40 else short(name)


def _decode_union(kinds: tuple[Any, ...], data: Any, where: str) -> Any:
    if data is None and types.NoneType in kinds:
        return None
    errors = []
    for kind in (k for k in kinds if k is not types.NoneType):
        try:
            return decode(kind, data, where)
        except FormatError as error:
            errors.append(str(error))
    raise FormatError("; ".join(errors) or f"{where}: unexpected {short(data)}")


def _decode_op(data: Any, where: str) -> Op:
    _require(isinstance(data, dict), where, "an operator", data)
    known, name = operators(), data.get("op")
    if not isinstance(name, str) or name not in known:
        raise FormatError(f"{where}: unknown operator {short(name)}; if it is one of your own, import its module first")
    return _decode_dataclass(known[name], {k: v for k, v in data.items() if k != "op"}, where)


def _decode_dataclass(cls: type, data: Any, where: str) -> Any:
    _require(isinstance(data, dict), where, f"an object for {cls.__name__}", data)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = [key for key in data if key not in fields]
    if unknown:
        raise FormatError(f"{where}: {cls.__name__} has no field {short(unknown[0])}; the file is from another version")
    hints = _hints(cls)
    try:
        return cls(**{key: decode(hints[key], item, f"{where}.{key}") for key, item in data.items()})
    except (JQuantError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise FormatError(f"{where}: {error}") from error


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _require(condition: bool, where: str, expected: str, data: Any) -> None:
    if not condition:
        raise FormatError(f"{where}: expected {expected}, found {short(data)}")


def graph_to_json(graph: Graph) -> str:
    """A graph as versioned JSON text, with a digest."""
    return sealed_text("graph", encode(graph))


def graph_from_json(text: str) -> Graph:
    """The graph that `graph_to_json` wrote.

    Raises:
      FormatError: another content than that of its digest, another version, or a graph that is not well formed.
    """
    return read_graph(read_sealed_text(text, "graph"))


def read_graph(data: Any) -> Graph:
    """A graph from what `encode` made of one.

    Raises:
      FormatError: not a graph, or one that is not well formed.
    """
    with refusing("the graph is not well formed"):
        return validate(decode(Graph, data, "graph"))
