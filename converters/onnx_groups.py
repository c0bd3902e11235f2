"""Operators that ONNX has as several nodes: noted in the metadata of a QDQ file, and found again where nothing changed.

A note holds the operator, what it reads, and a digest of its nodes and constants. A file that another tool changed
there is read node by node, as any other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from jquant.graph.serialize import decode, encode
from jquant.types import ConversionError, FormatError, FrozenMap, Op


@dataclass(frozen=True)
class Group:
    """The nodes of one operator, by their results in order; the last one makes the result of the operator.

    `inputs` and `params` are the names of what it reads, in the file
    """

    op: Op
    inputs: tuple[str, ...]
    params: FrozenMap[str]
    results: tuple[str, ...]
    digest: str


def group_of(op: Op, inputs: Sequence[str], params: Mapping[str, str], nodes: Sequence[onnx.NodeProto],
             tensors: Iterable[onnx.TensorProto]) -> Group:  # fmt: skip
    """The note of an operator that was written as these nodes and constants."""
    results = tuple(name for node in nodes for name in node.output)
    return Group(op, tuple(inputs), FrozenMap(params), results, _digest(nodes, tensors))


def encode_groups(groups: Mapping[str, Group]) -> dict[str, Any]:
    return {name: encode(group) for name, group in groups.items()}


def decode_groups(data: Any) -> dict[str, Group]:
    """Raises FormatError for what `encode_groups` did not write."""
    if not isinstance(data, dict):
        raise FormatError("groups are no object")
    return {name: decode(Group, value, f"the nodes of {name!r}") for name, value in data.items()}


def unchanged(model: onnx.ModelProto, groups: Mapping[str, Group]) -> dict[str, tuple[str, Group]]:
    """{result of a group that is as it was written: (its name, the group)}."""
    makers = {name: node for node in model.graph.node for name in node.output}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    readers: dict[str, list[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).extend(node.output)
    outputs = {output.name for output in model.graph.output}
    found: dict[str, tuple[str, Group]] = {}
    for name, group in groups.items():
        nodes = [makers[result] for result in group.results if result in makers]
        if not nodes or len(nodes) != len(group.results):
            continue
        inside = set(group.results)
        seen_outside = any(not inside.issuperset(readers.get(r, ())) or r in outputs for r in group.results[:-1])
        outer = {*group.inputs, *group.params.values(), *inside}
        read = dict.fromkeys(i for node in nodes for i in node.input)
        own = [tensors[i] for i in read if i in tensors and i not in outer]
        if not seen_outside and _digest(nodes, own) == group.digest:
            found[group.results[-1]] = name, group
    return found


def _digest(nodes: Sequence[onnx.NodeProto], tensors: Iterable[onnx.TensorProto]) -> str:
    """Of the operators, their connections and attributes, and the constants, but not of how they are stored."""
    described: list[Any] = [
        [node.op_type, list(node.input), list(node.output), sorted(_attribute(a) for a in node.attribute)]
        for node in nodes
    ]
    for tensor in sorted(tensors, key=lambda t: t.name):
        array = onnx.numpy_helper.to_array(tensor)
        described.append([tensor.name, str(array.dtype), list(array.shape), array.tobytes().hex()])
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _attribute(attribute: onnx.AttributeProto) -> str:
    value = onnx.helper.get_attribute_value(attribute)
    plain = isinstance(value, int | float | bytes) or (isinstance(value, Sequence) and not isinstance(value, str))
    if not plain:
        raise ConversionError(f"the attribute {attribute.name!r} holds {type(value).__name__}, which no rule writes")
    return (
        f"{attribute.name}={list(value) if isinstance(value, Sequence) and not isinstance(value, bytes) else value!r}"
    )
