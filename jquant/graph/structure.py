"""How the arguments and the result of a model are nested, so that a graph takes and gives them as the model does."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from jquant.types import Graph, GraphError, InputError, Structure

LEAF = Structure("leaf")
# {"module:name": class} of the classes that models of this process returned. A file cannot add one.
_CLASSES: dict[str, type] = {}


def structure_from(unflatten: Callable[[list[int]], Any], count: int, *, arguments: bool = False) -> Structure | None:
    """The structure that a framework's own `unflatten` gives to a list of leaves.

    None stands for one leaf alone and for a tuple of several, which need no structure; and for what the leaves cannot
    be put into in their order, such as a container of another library that keeps more than arrays.
    """
    nested = unflatten(list(range(count)))
    structure = structure_of(nested)
    flat = structure.kind == "tuple" and all(part.kind == "leaf" for part in structure.parts)
    plain = structure.kind == "leaf" or flat
    if plain and (arguments or len(structure.parts) != 1):
        return None
    try:
        return structure if flatten(structure, nested) == list(range(count)) else None
    except InputError:
        return None


def structure_of(value: Any) -> Structure:
    """The structure of tuples, lists, dicts, named tuples and dataclasses; anything else is a leaf, None is nothing."""
    if value is None:
        return Structure("none")
    items = _items(value)
    if items is None:
        return LEAF
    kind, keys, parts = items
    name = ""
    if kind == "object":
        name = f"{type(value).__module__}:{type(value).__qualname__}"
        _CLASSES[name] = type(value)
    return Structure(kind, keys, tuple(map(structure_of, parts)), name)


def _items(value: Any) -> tuple[Any, tuple[str, ...], Sequence[Any]] | None:
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return "object", tuple(value._fields), tuple(value)
    if isinstance(value, tuple | list):
        return type(value).__name__ if type(value) in (tuple, list) else "tuple", (), value
    if isinstance(value, Mapping):
        return "dict", tuple(map(str, value)), tuple(value.values())
    if is_dataclass(value) and not isinstance(value, type):
        names = tuple(f.name for f in fields(value))
        return "object", names, tuple(getattr(value, name) for name in names)
    return None


def leaves_of(structure: Structure) -> int:
    """How many leaves there are."""
    return 1 if structure.kind == "leaf" else sum(map(leaves_of, structure.parts))


def paths_of(structure: Structure, before: str = "") -> list[str]:
    """The name of each leaf: keys and positions, such as "heads.0.boxes"; "" for one alone."""
    if structure.kind == "leaf":
        return [before]
    names = structure.keys or tuple(map(str, range(len(structure.parts))))
    prefix = f"{before}." if before else ""
    return [p for name, part in zip(names, structure.parts, strict=True) for p in paths_of(part, prefix + name)]


def flatten(structure: Structure, value: Any, where: str = "the inputs") -> list[Any]:
    """The leaves of a value that is nested so.

    Raises:
      InputError: another nesting, with the place and the keys.
    """
    if structure.kind == "leaf":
        return [value]
    if structure.kind == "none":
        if value is not None:
            raise InputError(f"{where}: None is expected, not {type(value).__name__}")
        return []
    items = _items(value)
    wanted = f"a {structure.kind}" + (f" with {', '.join(structure.keys)}" if structure.keys else "")
    if items is None or ((structure.kind == "dict") != (items[0] == "dict") and not structure.type):
        raise InputError(f"{where}: {wanted} is expected, not {type(value).__name__}")
    _, keys, parts = items
    if structure.keys:
        given = dict(zip(keys, parts, strict=True))
        if set(given) != set(structure.keys):
            raise InputError(f"{where}: {wanted} is expected, not one with {', '.join(keys) or 'nothing'}")
        parts = [given[key] for key in structure.keys]
    if len(parts) != len(structure.parts):
        raise InputError(f"{where}: {len(structure.parts)} entries are expected, not {len(parts)}")
    names = structure.keys or tuple(map(str, range(len(parts))))
    found: list[Any] = []
    for name, part, entry in zip(names, structure.parts, parts, strict=True):
        found += flatten(part, entry, f"{where}, {name}")
    return found


def unflatten(structure: Structure, leaves: Iterable[Any]) -> Any:
    """A value that is nested so. A class that this process has not seen, from a file, becomes a dict of its fields."""
    return _unflatten(structure, iter(leaves))


def _unflatten(structure: Structure, leaves: Iterator[Any]) -> Any:
    if structure.kind == "leaf":
        return next(leaves)
    if structure.kind == "none":
        return None
    parts = [_unflatten(part, leaves) for part in structure.parts]
    if structure.kind in ("tuple", "list"):
        return tuple(parts) if structure.kind == "tuple" else parts
    named = dict(zip(structure.keys, parts, strict=True))
    return _CLASSES[structure.type](**named) if structure.type in _CLASSES else named


def input_leaves(graph: Graph, inputs: Sequence[Any]) -> Sequence[Any]:
    """The arrays for the inputs of a graph, in order: from arguments nested as its model takes them, or flat.

    Raises:
      InputError: another nesting.
    """
    if graph.takes is None or (len(inputs) == len(graph.inputs) and all(_items(x) is None for x in inputs)):
        return inputs
    return flatten(graph.takes, tuple(inputs))


def nested_outputs(graph: Graph, outputs: Sequence[Any]) -> Any:
    """The outputs of a graph, nested as its model gives them; else one alone, or a tuple of several."""
    if graph.gives is not None:
        return unflatten(graph.gives, outputs)
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def output_names(graph: Graph) -> dict[str, str]:
    """{name of an output in the model's result: value of the graph}, such as {"boxes": "head.conv"}."""
    if graph.gives is None:
        return {}
    paths = paths_of(graph.gives)
    return {path: value for path, value in zip(paths, graph.outputs, strict=True) if path}


def check_structures(graph: Graph) -> None:
    """Raises GraphError where the nesting has another number of leaves than the graph has inputs or outputs."""
    for what, structure, entries in (("inputs", graph.takes, graph.inputs), ("outputs", graph.gives, graph.outputs)):
        if structure is not None and leaves_of(structure) != len(entries):
            raise GraphError(f"the graph has {len(entries)} {what}, and their structure {leaves_of(structure)} leaves")
