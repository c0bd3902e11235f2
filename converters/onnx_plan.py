"""`plan_from_onnx`: a QDQ model as a plan, its parameters and its scales, ready for `jq.lower` or for training.

A QuantizeLinear and DequantizeLinear around a value give it its format. What lies between a convolution and the next
pair (an addition, a ReLU) is what the convolution unit does before it rounds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax.numpy as jnp

import jquant.ops as ops
from jquant.ir.graph import validate
from jquant.prepare import HIGH_PRECISION, prepare
from jquant.qconfig import QConfig
from jquant.types import (
    Array,
    ConversionError,
    FrozenMap,
    Graph,
    JQuantError,
    Node,
    Plan,
    Policy,
    QuantSpec,
    Target,
)

from .onnx_import import Imported, OnGrid, read

_HOSTS = (ops.Conv, ops.ConvTranspose, ops.Linear, ops.MatMul)
_BETWEEN = (ops.Add, ops.BatchNorm, ops.Relu, ops.Relu6)  # what a convolution takes in before it rounds
# Rounding before or after these is the same: they move values, or keep their order.
_COMMUTES = (
    ops.AdaptiveMaxPool, ops.ChannelShuffle, ops.Dropout, ops.Expand, ops.Flatten, ops.Flip, ops.IndexSelect,
    ops.MaxPool, ops.Permute, ops.PixelShuffle, ops.PixelUnshuffle, ops.ReduceMax, ops.ReduceMin, ops.Relu, ops.Reshape,
    ops.Roll, ops.Slice, ops.Tile,
)  # fmt: skip


class Format(NamedTuple):
    """The grid of a value: real per LSB."""

    dtype: str
    scale: float


def plan_from_onnx(
    source: Any, *, target: Target, shapes: Mapping[str, Sequence[int | None]] | None = None
) -> tuple[Plan, dict[str, Array], dict[str, Array]]:
    """Imports a QDQ model of opset 10 to 21 as a calibrated plan.

    Values have to be int8 or int16 with zero point 0, weights int4, int8 or int16. A value that no pair of
    QuantizeLinear and DequantizeLinear surrounds stays float, or belongs to the convolution before it. A convolution,
    linear layer or matrix product that feeds only outputs, without a QuantizeLinear, keeps its int32 accumulator.

    Args:
      source, shapes: as for `from_onnx`.
      target: the march, such as `jq.targets.NASH_E`.

    Returns:
      Plan, parameters and qparams: {value or weight: scale, real per LSB}. Biases are quantized anew, at the scale of
      the input times that of the weight, which is what a QDQ model has.

    Raises:
      ConversionError: a damaged file, a zero point other than 0, uint8 values, operators jquant lacks, or scales that a
        chain of integers needs and the file does not have. QConfigError: a format that the target does not have.
    """
    imported = read(source, shapes)
    imported = replace(imported, graph=imported.notes.add_tables(imported.graph))
    if not imported.grids and not imported.weights:
        raise ConversionError("the model has no QuantizeLinear: from_onnx reads float models; then calibrate")
    placed = _Placed(imported)
    graph = placed.place()
    try:
        validate(graph, imported.params)
    except JQuantError as error:
        raise ConversionError(f"the model is not well formed: {error}") from error
    formats, wide = placed.inside_units(graph)
    qconfig = _qconfig(graph, imported, formats, wide)
    rounded = [node.name for node in graph.nodes if node.name in placed.formats and isinstance(node.op, _HOSTS)]
    plan, params = prepare(
        graph,
        imported.params,
        qconfig,
        target=target,
        high_precision_outputs=False,
        strict=False,
        unfused=[name for name in rounded if any(isinstance(c.op, ops.Add) for c in graph.consumers[name])],
    )
    _check_batch_norm(graph, imported, plan)
    plan = _widened(plan, {plan.renamed.get(name, name) for name in wide})
    return plan, params, _qparams(plan, imported, _final(graph, plan, formats))


# ---------------------------------------------------------------------------------------------------------------------
# Which value each pair belongs to


@dataclass
class _Placed:
    """Puts the formats of pairs on values; where a value is read off its grid too, on a Requantize behind it."""

    imported: Imported
    formats: dict[str, Format] = field(default_factory=dict)  # of values with a scale of their own
    alias: dict[str, str] = field(default_factory=dict)  # {operand behind a pair: value}
    nodes: dict[str, Node] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    readers: dict[str, int] = field(default_factory=dict)

    def place(self) -> Graph:
        graph = self.imported.graph
        self.taken = set(graph.values)
        pairs: dict[str, list[tuple[str, OnGrid]]] = {}
        for name, grid in self.imported.grids.items():
            pairs.setdefault(grid.source, []).append((name, grid))
        readers: dict[str, int] = {}
        for value in [v for node in graph.nodes for v in _read(node)] + list(graph.outputs):
            readers[value] = readers.get(value, 0) + 1
        self.readers = {v: readers.get(v, 0) + len(pairs.get(v, ())) for v in graph.values}
        for entry in graph.inputs:
            self.put(entry.name, pairs.get(entry.name, []), raw=entry.name in readers)
        for node in graph.nodes:
            self.nodes[node.name] = replace(node, inputs=tuple(self.alias.get(v, v) for v in node.inputs))
            self.put_constant(node)
            self.put(node.name, pairs.get(node.name, []), raw=node.name in readers)
        outputs = tuple(self.alias.get(v, v) for v in graph.outputs)
        return Graph(graph.inputs, tuple(self.nodes.values()), outputs)

    def put_constant(self, node: Node) -> None:
        grid = self.imported.weights.get(node.params["value"]) if isinstance(node.op, ops.Constant) else None
        if grid is not None and grid.axis is None and grid.dtype in ("int8", "int16"):
            self.formats[node.name] = Format(grid.dtype, float(grid.scale))

    def put(self, value: str, pairs: list[tuple[str, OnGrid]], raw: bool) -> None:
        for name, grid in pairs:
            wanted = Format(grid.dtype, grid.scale)
            if self.natural(value) == wanted or (len(pairs) == 1 and not raw and self.assign(value, wanted)):
                self.alias[name] = value
                continue
            result = grid.result if grid.result not in self.taken else f"{value}.{grid.dtype}"
            while result in self.taken:
                result += "_"
            self.taken.add(result)
            self.nodes[result] = Node(result, ops.Requantize(), (value,))
            self.formats[result], self.alias[name] = wanted, result

    def assign(self, value: str, wanted: Format) -> bool:
        """Gives the format to the value, or to the one whose scale it keeps, if nobody else reads that."""
        node = self.nodes.get(value)
        if value in self.formats:
            return False
        if node is None or node.op.scale_rule == "own":
            self.formats[value] = wanted
            return True
        if not isinstance(node.op, _COMMUTES) or self.readers.get(node.inputs[0], 0) != 1:
            return False
        return self.assign(node.inputs[0], wanted)

    def natural(self, value: str) -> Format | None:
        """The format that a value has by its own or its operands' formats."""
        node = self.nodes.get(value)
        if node is None or node.op.scale_rule == "own":
            return self.formats.get(value)
        found = [f for f in map(self.natural, node.inputs) if f is not None]
        if not found:
            return None
        if isinstance(node.op, ops.Scale):
            return Format(found[0].dtype, float(jnp.float32(found[0].scale) * abs(node.op.factor)))
        if isinstance(node.op, ops.Maximum | ops.Minimum | ops.Mod):
            return max(found, key=lambda f: f.scale) if len(found) == len(node.inputs) else None
        return found[0]

    def inside_units(self, graph: Graph) -> tuple[dict[str, Format], set[str]]:
        """Formats for what a convolution takes in before it rounds, and the values that keep their accumulator."""
        formats, wide = dict(self.formats), set()
        on_grid = {key for key, grid in self.imported.weights.items() if grid.dtype != "int32"}
        for node in reversed(graph.nodes):
            if node.name in formats or not isinstance(node.op, (*_HOSTS, *_BETWEEN)):
                continue
            consumers = graph.consumers[node.name]
            weights = [node.params[r] in on_grid for r in node.op.weight_roles]
            ready = all(weights) and all(self.natural(v) or v in formats or v in wide for v in node.inputs[:1])
            if node.name in graph.outputs or all(isinstance(c.op, ops.Permute) for c in consumers):
                if isinstance(node.op, _HOSTS) and ready and self.feeds_only_outputs(graph, node.name):
                    wide.add(node.name)
                elif isinstance(node.op, _BETWEEN) and node.op.scale_rule != "own" and not consumers:
                    wide |= self.host_of(graph, node, on_grid)
            elif len(consumers) == 1 and isinstance(consumers[0].op, _BETWEEN) and ready:
                found = formats.get(consumers[0].name) or self.natural(consumers[0].name)
                if found is not None:
                    formats[node.name] = found
                elif consumers[0].name in wide:
                    wide.add(node.name)
        return formats, wide

    def host_of(self, graph: Graph, node: Node, on_grid: set[str]) -> set[str]:
        """An activation that is an output, with the convolution before it."""
        before = graph.by_name.get(node.inputs[0])
        alone = before is not None and graph.consumers[before.name] == (node,) and before.name not in graph.outputs
        if before is None or not alone or before.name in self.formats:
            return set()
        gridded = all(before.params[r] in on_grid for r in before.op.weight_roles)
        fits = isinstance(before.op, ops.Conv | ops.ConvTranspose | ops.Linear) and gridded
        return {node.name, before.name} if fits and self.natural(before.inputs[0]) is not None else set()

    @staticmethod
    def feeds_only_outputs(graph: Graph, name: str) -> bool:
        readers = graph.consumers[name]
        if name in graph.outputs:
            return not readers
        return bool(readers) and all(_Placed.feeds_only_outputs(graph, r.name) for r in readers)


def _read(node: Node) -> tuple[str, ...]:
    """The operands whose values count: of an expansion to the batch of another value, only the size does."""
    return node.inputs[:1] if isinstance(node.op, ops.Expand) else node.inputs


# ---------------------------------------------------------------------------------------------------------------------
# The plan


def _qconfig(graph: Graph, imported: Imported, formats: Mapping[str, Format], wide: set[str]) -> QConfig:
    """One rule for all values of one policy; the others are float."""
    names: dict[Policy, list[str]] = {}
    dtypes = {name: found.dtype for name, found in formats.items()} | dict.fromkeys(wide, "int8")

    def output(name: str) -> QuantSpec | None:
        if name not in dtypes:
            return None
        scale = formats[name].scale if name in formats else None
        return imported.notes.spec_of(name, dtypes[name], None, scale)

    for entry in graph.inputs:
        names.setdefault(_policy(output(entry.name), None), []).append(entry.name)
    for node in graph.nodes:
        if node.op.scale_rule != "own" and node.name not in dtypes:
            source = next((dtypes[v] for v in node.inputs if v in dtypes), None)
            if source is not None:
                dtypes[node.name] = source
        weight = next((_weight_spec(node, role, imported) for role in node.op.weight_roles), None)
        names.setdefault(_policy(output(node.name), weight), []).append(node.name)
    return QConfig({f"re:(?:{'|'.join(map(re.escape, found))})": policy for policy, found in names.items()})


def _policy(output: QuantSpec | None, weight: QuantSpec | None) -> Policy:
    return Policy(output=output, weight=weight, input=FrozenMap({}))


def _weight_spec(node: Node, role: str, imported: Imported) -> QuantSpec | None:
    key = node.params[role]
    grid = imported.weights.get(key)
    if grid is None or grid.dtype == "int32":
        return None
    if grid.axis is not None and grid.axis != node.op.weight_axis:
        raise ConversionError(
            f"weight {key!r} of {node.name!r} ({type(node.op).__name__}) has scales along axis {grid.axis}, and its "
            f"output channels are axis {node.op.weight_axis}; quantize it along them"
        )
    return imported.notes.spec_of(key, grid.dtype, None if grid.axis is None else "out", grid.scale)


def _check_batch_norm(graph: Graph, imported: Imported, plan: Plan) -> None:
    for node in graph.nodes:
        host = plan.renamed.get(node.name)
        if isinstance(node.op, ops.BatchNorm) and host in graph.by_name:
            assert host is not None
            keys = [graph.by_name[host].params[r] for r in graph.by_name[host].op.weight_roles]
            if any(key in imported.weights for key in keys):
                raise ConversionError(
                    f"batch norm {node.name!r} follows {host!r}, whose weight is quantized; fold it before quantizing"
                )


def _widened(plan: Plan, wide: set[str]) -> Plan:
    """The plan with the int32 accumulator as the output of some nodes, and of the permutations behind them."""
    if not wide:
        return plan
    values = dict(plan.values)
    for node in plan.graph.nodes:
        behind = isinstance(node.op, ops.Permute) and node.inputs[0] in wide
        if node.name in wide or behind:
            wide = wide | {node.name}
            values[node.name] = HIGH_PRECISION
    rows = tuple(
        replace(r, applied=str(HIGH_PRECISION), reason="no QuantizeLinear: the int32 accumulator is the output")
        if r.port == "output" and plan.renamed.get(r.name, r.name) in wide and r.applied != "-"
        else r
        for r in plan.resolutions
    )
    owned = tuple(name for name in plan.owned if name not in wide)
    return replace(plan, values=FrozenMap(values), owned=owned, resolutions=rows)


def _final(graph: Graph, plan: Plan, formats: Mapping[str, Format]) -> dict[str, Format]:
    """Formats by the names of the plan: of a fused node, that of the last one it took in."""
    order = [*(entry.name for entry in graph.inputs), *(node.name for node in graph.nodes)]
    return {plan.renamed.get(name, name): formats[name] for name in order if name in formats}


def _qparams(plan: Plan, imported: Imported, formats: Mapping[str, Format]) -> dict[str, Array]:
    found: dict[str, Array] = {}
    missing = []
    for name in plan.trained:
        if name in plan.weights:
            found[name] = jnp.asarray(imported.weights[name].scale, jnp.float32)
        elif name in formats:
            found[name] = jnp.float32(formats[name].scale)
        else:
            missing.append(name)
    if missing:
        raise ConversionError(
            "the file has no scale for "
            + ", ".join(map(repr, missing[:8]))
            + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
            + ": softmax, norms and the like are chains of int16 values here. Import the float model with from_onnx "
            "and calibrate it"
        )
    return found
