"""What a QDQ file has no place for, in its metadata: how values are observed and trained, and the tables of functions.

The file's own scales decide: a note about another format than the file has does not count.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import onnx

from jquant.config.files import spec_from_dict, spec_to_dict
from jquant.graph.serialize import decode, encode
from jquant.ops.lookup import TableOptions
from jquant.types import ConversionError, FormatError, Graph, GraphError, Node, Plan, QConfigError, QuantSpec

from .onnx_groups import Group, decode_groups, encode_groups

KEY, VERSION = "jquant.plan", 1  # of the metadata; its value is JSON


@dataclass(frozen=True)
class Notes:
    """{node: its table}, {value or weight: its spec}, {operator of several nodes: these}; `given`: if there are any."""

    tables: Mapping[str, TableOptions] = field(default_factory=dict)
    specs: Mapping[str, QuantSpec] = field(default_factory=dict)
    groups: Mapping[str, Group] = field(default_factory=dict)
    given: bool = False

    def add_tables(self, graph: Graph) -> Graph:
        """The graph with the tables of its functions."""

        def op_of(node: Node) -> Any:
            has = node.name in self.tables and hasattr(node.op, "table")
            return replace(cast(Any, node.op), table=self.tables[node.name]) if has else node.op

        return replace(graph, nodes=tuple(replace(node, op=op_of(node)) for node in graph.nodes))

    def spec_of(self, name: str, dtype: str, axis: Any, scale: Any) -> QuantSpec:
        """The spec of a value or weight that has this format in the file."""
        plain = QuantSpec(dtype=dtype, axis=axis)
        noted = self.specs.get(name, plain)
        if (noted.dtype, noted.axis) != (dtype, axis):
            return plain
        fixed = noted.fixed_scale
        if fixed is not None and (scale is None or not np.all(np.float32(fixed) == np.asarray(scale, np.float32))):
            return replace(noted, fixed_scale=None)
        return noted


def write_notes(model: onnx.ModelProto, plan: Plan, groups: Mapping[str, Group]) -> None:
    """Notes of a plan and of its operators that are several nodes, as far as a file can hold them.

    Quantizers and observers of a user's own are left out.
    """
    specs: dict[str, Any] = {}
    for name, spec in [*((n, plan.spec(n)) for n in plan.owned), *plan.weights.items()]:
        try:
            specs[name] = spec_to_dict(repr(name), spec)
        except QConfigError:
            continue
    tables = {n.name: encode(t) for n in plan.graph.nodes if (t := getattr(n.op, "table", None)) is not None}
    notes = {"jquant": VERSION, "specs": specs, "tables": tables, "groups": encode_groups(groups)}
    model.metadata_props.add(key=KEY, value=json.dumps(notes))


def read_notes(model: onnx.ModelProto) -> Notes:
    """The notes of a file, empty where it has none.

    Raises:
      ConversionError: notes that `write_notes` did not write.
    """
    text = next((entry.value for entry in model.metadata_props if entry.key == KEY), None)
    if text is None:
        return Notes()
    try:
        data = json.loads(text)
        if not isinstance(data, dict) or data.get("jquant") != VERSION:
            raise FormatError("they are from another version")
        if set(data) | {"groups"} != {"jquant", "specs", "tables", "groups"}:
            raise FormatError(f"they have the entries {', '.join(map(str, data))}")
        if not isinstance(data["specs"], dict) or not isinstance(data["tables"], dict):
            raise FormatError("specs and tables are no objects")
        tables = {n: decode(TableOptions, value, f"the table of {n!r}") for n, value in data["tables"].items()}
        specs = {n: spec_from_dict(f"the spec of {n!r}", value) for n, value in data["specs"].items()}
        groups = decode_groups(data.get("groups", {}))
    except (FormatError, QConfigError, GraphError, ValueError, RecursionError) as error:
        raise ConversionError(
            f"the metadata {KEY!r} of the model is damaged: {error}. Without this entry the model is read as any other"
        ) from error
    return Notes(tables, specs, groups, given=True)
