"""`model_from_onnx`: a QDQ model as a plan, its parameters and its scales, ready for `jq.lower` or for training.

A QuantizeLinear and DequantizeLinear around a value give it its format. What lies between a convolution and the next
pair (an addition, a ReLU) is what the convolution unit does before it rounds.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import numpy as np

import jquant.ops as ops
from jquant.config.qconfig import QConfig
from jquant.graph.checks import validate
from jquant.graph.float import value_shapes, value_types
from jquant.numerics.namespace import real
from jquant.numerics.rounding import dequantize, quantize
from jquant.ops.conv import channel_scale
from jquant.plan.formats import HIGH_PRECISION
from jquant.plan.prepare import prepare
from jquant.plan.scales import scale_of, value_scales
from jquant.types import (
    MIN_SCALE,
    Array,
    ConversionError,
    FrozenMap,
    Graph,
    JQuantError,
    Model,
    Node,
    Op,
    Plan,
    Policy,
    QuantSpec,
    Resolution,
    Target,
)

from .file_names import naming
from .foreign import ZeroPoint
from .onnx_import import Imported, OnGrid, read
from .onnx_missing import calibrate_missing, missing_scales

_HOSTS = (ops.Conv, ops.ConvTranspose, ops.Linear, ops.MatMul)
_BETWEEN = (ops.Add, ops.BatchNorm, ops.Relu, ops.Relu6)  # what a convolution takes in before it rounds
# Rounding before or after these is the same: they move values, or keep their order.
_COMMUTES = (
    ops.AdaptiveMaxPool, ops.ChannelShuffle, ops.Clamp, ops.Dropout, ops.Expand, ops.Flatten, ops.Flip, ops.IndexSelect,
    ops.MaxPool, ops.Permute, ops.PixelShuffle, ops.PixelUnshuffle, ops.ReduceMax, ops.ReduceMin, ops.Relu, ops.Relu6,
    ops.Reshape, ops.Roll, ops.Slice, ops.Tile,
)  # fmt: skip


class ScaleWarning(UserWarning):
    """Scales of a file that are smaller than the smallest one here."""


class Format(NamedTuple):
    """The grid of a value: real per LSB."""

    dtype: str
    scale: float


def model_from_onnx(
    source: Any,
    *,
    target: Target,
    shapes: Mapping[str, Sequence[int | None]] | None = None,
    zero_point: ZeroPoint = "refuse",
    batches: Iterable[Any] | None = None,
    batch_axis: int = 0,
) -> Model:
    """Imports a quantized ONNX model of opset 10 to 28 as a calibrated model.

    The forms are pairs of QuantizeLinear and DequantizeLinear (QDQ), integer operators (QLinearConv and its like),
    QONNX's Quant, and dynamic quantization, of which the weights are taken. Weights are int4, int8 or int16. A value
    that no pair surrounds belongs to the convolution before it, or becomes int16 with a scale that follows from its
    operands, where all of these are integers. A convolution, linear layer or matrix product that feeds only outputs,
    without a QuantizeLinear, keeps its int32 accumulator.

    Args:
      source, shapes, batch_axis: as for `from_onnx`.
      target: the march, such as `jq.targets.NASH_E`.
      zero_point: what becomes of a zero point that is not 0, which the chip does not have. "refuse": an error that
        names all. "widen": int16 with the same scale, exact. "requantize": symmetric int8 of the same range. uint8 with
        zero point 128 is int8 with zero point 0, and read as that.
      batches: inputs, as for `jq.calibrate`, for the scales that the file does not have. Those that it has stay.

    Returns:
      The model; its qparams are the scales of the file, real per LSB. `jq.explain` lists what the file does not say, or
      says otherwise, with the reason. Biases are quantized again, at the scale of the input times that of the weight,
      which is what a QDQ model has. A dynamically quantized model has scales of weights alone, unless `batches` are
      given: `calibrate_missing` gives it the others.

    Raises:
      ConversionError: a damaged file, zero points other than 0, operators jquant lacks, or scales that a chain of
        integers needs and that do not follow. QConfigError: a format that the target does not have.

    Warns:
      ScaleWarning: weights with scales below 2^-23, and how many.
      RangeWarning: a range such as -127 to 127, which torch.onnx left out of the file.
    """
    with naming(source):
        return model_from_imported(read(source, shapes, zero_point, batch_axis=batch_axis), target, batches)


def model_from_imported(imported: Imported, target: Target, batches: Iterable[Any] | None) -> Model:
    """The same of a file that was read already."""
    imported = replace(imported, graph=imported.notes.add_tables(imported.graph))
    if not (imported.grids or imported.weights or imported.notes.given):
        raise ConversionError("the model has no QuantizeLinear: from_onnx reads float models; then calibrate")
    model = _dynamic(imported, target) if imported.dynamic else _static(imported, target, batches is None)
    return model if batches is None else calibrate_missing(model, batches)


def _static(imported: Imported, target: Target, complete: bool) -> Model:
    """A model whose pairs say what is quantized. `complete`: with scales for what has none in the file.

    Else batches will tell them, and then inputs without a pair are quantized too.
    """
    placed = _Placed(imported, target)
    graph = placed.place()
    try:
        validate(graph, imported.params)
    except JQuantError as error:
        raise ConversionError(f"the model is not well formed: {error}") from error
    placed.find_gaps(graph, inputs=not complete)
    while True:
        formats, wide = placed.inside_units(graph)
        model = _prepared(graph, imported, placed, formats, wide)
        parted = _not_taken_in(graph, model.plan, formats.keys() - placed.formats.keys())
        if not parted:
            break
        placed.parted |= parted
    plan, params = model.plan, dict(model.params)
    _check_batch_norm(graph, imported, plan)
    final = {plan.renamed.get(name, name) for name in wide}
    held = {name for name in final if (op := plan.graph.by_name[name].op).keeps_accumulator or _passes(op)}
    plan = _widened(plan, params, held)
    known = _qparams(plan, params, imported, _final(graph, plan, formats))
    known |= _of_constants(plan, params, imported, known)
    missing = missing_scales(plan, params, known) if complete else {}
    plan = _reported(plan, imported, placed, {n for n in plan.trained if n not in known}, missing)
    found = {name: jax.device_put(np.float32(scale)) for name, scale in missing.items()}
    scales = {**known, **found}
    qparams = {name: scales[name] for name in plan.trained if name in scales}
    return Model(plan, params | _biases(plan, params, imported, qparams), qparams)


def _dynamic(imported: Imported, target: Target) -> Model:
    """int8 values that are still to be calibrated, and the weights of the file."""
    values = QConfig({"*": Policy(output=QuantSpec(dtype="int8"))})
    weights = {
        node.name: Policy(weight=spec)
        for node in imported.graph.nodes
        for role in node.op.weight_roles
        if (spec := _weight_spec(node, role, imported)) is not None
    }
    qconfig = QConfig({**values.rules, **weights})
    model = prepare(imported.graph, imported.params, qconfig, target=target, strict=False)
    known = _qparams(model.plan, dict(model.params), imported, {})
    return Model(_reported(model.plan, imported, None, set(), {}), model.params, known)


def _prepared(
    graph: Graph, imported: Imported, placed: _Placed, formats: Mapping[str, Format], wide: set[str]
) -> Model:
    rounded = [node.name for node in graph.nodes if node.name in placed.formats and isinstance(node.op, _HOSTS)]
    return prepare(
        graph,
        imported.params,
        _qconfig(graph, imported, formats, wide, placed.gaps - wide - formats.keys()),
        target=placed.target,
        high_precision_outputs=False,
        strict=False,
        unfused=[name for name in rounded if any(isinstance(c.op, ops.Add) for c in graph.consumers[name])],
    )


def _not_taken_in(graph: Graph, plan: Plan, assumed: Set[str]) -> set[str]:
    """The nodes that were to be taken in by what follows and were not: each makes a value of its own.

    Such a value has no scale in the file, and would have the scale of another one without notice.
    """
    members: dict[str, list[str]] = {}
    for node in graph.nodes:
        members.setdefault(plan.renamed.get(node.name, node.name), []).append(node.name)
    return {name for group in members.values() if group[-1] in assumed for name in group if name in assumed}


# ---------------------------------------------------------------------------------------------------------------------
# Which value each pair belongs to


@dataclass
class _Placed:
    """Puts the formats of pairs on values; where a value is read off its grid too, on a Requantize behind it."""

    imported: Imported
    target: Target
    formats: dict[str, Format] = field(default_factory=dict)  # of values with a scale of their own
    alias: dict[str, str] = field(default_factory=dict)  # {operand behind a pair: value}
    nodes: dict[str, Node] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    readers: dict[str, int] = field(default_factory=dict)
    gaps: set[str] = field(default_factory=set)  # values between integers that the file leaves float
    parted: set[str] = field(default_factory=set)  # of these, what no unit takes in
    copies: dict[str, str] = field(default_factory=dict)  # {node that is there twice: the first one}

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
            op = _relu6(node.op, pairs.get(node.name, []), self.target)
            self.nodes[node.name] = replace(node, op=op, inputs=tuple(self.alias.get(v, v) for v in node.inputs))
            self.put_constant(node)
            self.put(node.name, pairs.get(node.name, []), raw=node.name in readers)
        outputs = tuple(self.alias.get(v, v) for v in graph.outputs)
        return Graph(graph.inputs, tuple(self.nodes.values()), outputs)

    def put_constant(self, node: Node) -> None:
        grid = self.imported.weights.get(node.params["value"]) if isinstance(node.op, ops.Constant) else None
        if grid is not None and grid.axis is None and grid.dtype in ("int8", "int16"):
            self.formats[node.name] = Format(grid.dtype, float(grid.scale))

    def put(self, value: str, pairs: list[tuple[str, OnGrid]], raw: bool) -> None:
        rounded = self.natural(value) is not None  # before any of these pairs
        for i, (name, grid) in enumerate(pairs):
            wanted = Format(grid.dtype, grid.scale)
            if self.natural(value) == wanted or (i == 0 and not raw and self.assign(value, wanted, len(pairs))):
                self.alias[name] = value
            elif not rounded and self.is_own(value):
                self.alias[name] = self.copy(value, self.free(grid.result, value, grid.dtype), wanted)
            else:
                result = self.free(grid.result, value, grid.dtype)
                self.nodes[result] = Node(result, ops.Requantize(), (value,))
                self.formats[result], self.alias[name] = wanted, result

    def free(self, wanted: str, value: str, dtype: str) -> str:
        result = wanted if wanted not in self.taken else f"{value}.{dtype}"
        while result in self.taken:
            result += "_"
        self.taken.add(result)
        return result

    def is_own(self, value: str) -> bool:
        """Whether a node makes the value, behind which all is rounded as it is before."""
        node = self.nodes.get(value)
        if node is None:
            return False
        return node.op.scale_rule == "own" or (isinstance(node.op, _COMMUTES) and self.is_own(node.inputs[0]))

    def copy(self, value: str, result: str, wanted: Format) -> str:
        """Computes a value once more, for another grid: rounding it twice would be something else."""
        node = self.nodes[value]
        if node.op.scale_rule == "own":
            self.formats[result] = wanted
        else:
            source = self.copy(node.inputs[0], self.free(f"{result}.{node.inputs[0]}", node.inputs[0], "copy"), wanted)
            node = replace(node, inputs=(source, *node.inputs[1:]))
        self.nodes[result] = replace(node, name=result, call_of="")
        self.copies[result] = value
        return result

    def assign(self, value: str, wanted: Format, pairs: int) -> bool:
        """Gives the format to the value, or to the one whose scale it keeps, if nothing else reads that.

        An input that several pairs round keeps its numbers for all of them.
        """
        node = self.nodes.get(value)
        if value in self.formats or (node is None and pairs > 1):
            return False
        if node is None or node.op.scale_rule == "own":
            self.formats[value] = wanted
            return True
        if not isinstance(node.op, _COMMUTES) or self.readers.get(node.inputs[0], 0) != 1:
            return False
        return self.assign(node.inputs[0], wanted, pairs)

    def natural(self, value: str) -> Format | None:
        """The format that a value has by its own or its operands' formats."""
        node = self.nodes.get(value)
        if node is None or node.op.scale_rule == "own":
            return self.formats.get(value)
        found = [f for f in map(self.natural, node.inputs) if f is not None]
        if not found:
            return None
        if isinstance(node.op, ops.Scale):
            return Format(found[0].dtype, float(np.float32(found[0].scale) * abs(node.op.factor)))
        if isinstance(node.op, ops.Maximum | ops.Minimum | ops.Mod):
            return max(found, key=lambda f: f.scale) if len(found) == len(node.inputs) else None
        return found[0]

    def find_gaps(self, graph: Graph, inputs: bool) -> None:
        """What the file leaves float though integers come in: the chip has no float there. `inputs`: these too.

        A convolution that goes on into an addition, an activation or an output is none in the end: see `inside_units`.
        """
        exact = {n for n, kind in value_types(graph, self.imported.params).items() if str(kind.dtype) != "float32"}
        constants = {node.name for node in graph.nodes if isinstance(node.op, ops.Constant)}
        for entry in graph.inputs:
            readers = graph.consumers[entry.name]
            rounded = any(isinstance(r.op, ops.Requantize) and r.name in self.formats for r in readers)
            if entry.name not in (*self.formats, *exact) and (rounded or inputs):
                self.gaps.add(entry.name)
        for node in graph.nodes:
            numbers = [v for v in node.inputs if v not in exact]
            ready = [v for v in numbers if v not in constants]
            if node.name in exact or not ready or not self.weights_on_grid(node) or not all(map(self.whole, ready)):
                continue
            self.gaps |= {v for v in numbers if v in constants and v not in self.formats}
            if node.name not in self.formats and node.op.scale_rule == "own":
                self.gaps.add(node.name)

    def weights_on_grid(self, node: Node) -> bool:
        grids = [self.imported.weights.get(node.params[role]) for role in node.op.weight_roles]
        return all(grid is not None and grid.dtype != "int32" for grid in grids)

    def whole(self, value: str) -> bool:
        """Whether a value is one of integers, with a scale of the file or one that is still to be found."""
        return self.natural(value) is not None or self.follows_gap(value)

    def follows_gap(self, value: str) -> bool:
        node = self.nodes.get(value)
        while value not in self.gaps and node is not None and node.inputs and node.op.scale_rule != "own":
            value = node.inputs[0]
            node = self.nodes.get(value)
        return value in self.gaps

    def inside_units(self, graph: Graph) -> tuple[dict[str, Format], set[str]]:
        """Formats for what a convolution takes in before it rounds, and the values that keep their accumulator."""
        formats, wide = dict(self.formats), set()
        on_grid = {key for key, grid in self.imported.weights.items() if grid.dtype != "int32"}
        for node in reversed(graph.nodes):
            if node.name in (*formats, *self.parted) or not isinstance(node.op, (*_HOSTS, *_BETWEEN)):
                continue
            if node.op.scale_rule != "own" and self.natural(node.name) is not None:
                continue  # an activation whose operand was rounded has the scale of that
            consumers = graph.consumers[node.name]
            weights = [node.params[r] in on_grid for r in node.op.weight_roles]
            ready = all(weights) and all(self.whole(v) or v in formats or v in wide for v in node.inputs[:1])
            if node.name in graph.outputs or all(_passes(c.op) for c in consumers):
                if isinstance(node.op, _HOSTS) and ready and self.feeds_only_outputs(graph, node.name):
                    wide.add(node.name)
                elif isinstance(node.op, ops.Add | ops.Relu | ops.Relu6) and self.feeds_only_outputs(graph, node.name):
                    wide |= self.host_of(graph, node, on_grid)
            elif len(consumers) == 1 and isinstance(consumers[0].op, _BETWEEN) and ready:
                found = formats.get(consumers[0].name) or self.natural(consumers[0].name)
                if found is not None:
                    formats[node.name] = found
                elif consumers[0].name in wide:
                    wide.add(node.name)
        return formats, wide

    def host_of(self, graph: Graph, node: Node, on_grid: set[str]) -> set[str]:
        """An activation or addition that is an output, with the convolution before it and what lies between."""
        chain = {node.name}
        if not isinstance(node.op, ops.Add):
            before = self.alone(graph, node.inputs[0], node)
            if before is None or not isinstance(before.op, ops.Add):
                return (
                    chain | {before.name} if self.keeps_accumulator(before, on_grid) and before is not None else set()
                )
            chain, node = chain | {before.name}, before
        for value, other in (node.inputs, node.inputs[::-1]):
            before = self.alone(graph, value, node)
            if before is not None and self.keeps_accumulator(before, on_grid) and self.natural(other) is not None:
                return chain | {before.name}
        return set()

    def alone(self, graph: Graph, value: str, reader: Node) -> Node | None:
        """The node that makes a value which only `reader` reads and no pair rounds."""
        before = graph.by_name.get(value)
        read = before is not None and graph.consumers[value] == (reader,) and value not in graph.outputs
        return before if read and value not in self.formats else None

    def keeps_accumulator(self, node: Node | None, on_grid: set[str]) -> bool:
        """Whether it is a convolution of integers."""
        if node is None or not isinstance(node.op, ops.Conv | ops.ConvTranspose | ops.Linear):
            return False
        return all(node.params[r] in on_grid for r in node.op.weight_roles) and self.natural(node.inputs[0]) is not None

    @staticmethod
    def feeds_only_outputs(graph: Graph, name: str) -> bool:
        readers = graph.consumers[name]
        onward = all(_passes(r.op) and _Placed.feeds_only_outputs(graph, r.name) for r in readers)
        return onward and (bool(readers) or name in graph.outputs)


def _relu6(op: Op, pairs: list[tuple[str, OnGrid]], target: Target) -> Op:
    """A clamp from 0 to what 6 is on the grid behind it is a ReLU6: `to_onnx` puts bounds on the grid."""
    if not isinstance(op, ops.Clamp) or op.minimum != 0 or op.maximum is None or len(pairs) != 1:
        return op
    grid = pairs[0][1]
    scale = real(grid.scale)
    six = float(dequantize(quantize(real(6.0), scale, grid.dtype, target.number_rounding), scale))
    return ops.Relu6() if np.float32(op.maximum) == np.float32(six) else op


def _read(node: Node) -> tuple[str, ...]:
    """The operands whose values count: of an expansion to the batch of another value, only the size does."""
    return node.inputs[:1] if isinstance(node.op, ops.Expand) else node.inputs


# ---------------------------------------------------------------------------------------------------------------------
# The plan


def _qconfig(
    graph: Graph, imported: Imported, formats: Mapping[str, Format], wide: set[str], made: Set[str]
) -> QConfig:
    """One rule for all values of one policy; the others are float."""
    names: dict[Policy, list[str]] = {}
    dtypes = dict.fromkeys(made, "int16") | dict.fromkeys(wide, "int8")
    dtypes |= {name: found.dtype for name, found in formats.items()}

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


def _passes(op: Op) -> bool:
    """Whether an accumulator passes an operator with its scales."""
    return op.moves and not (isinstance(op, ops.Pad) and op.mode == "constant" and op.value != 0)


def _widened(plan: Plan, params: dict[str, Array], wide: set[str]) -> Plan:
    """The plan with the int32 accumulator as the output of some nodes, and of the data movement behind them."""
    if not wide:
        return plan
    values, moved, shapes = dict(plan.values), dict(plan.moved), value_shapes(plan.graph, params)
    for node in plan.graph.nodes:
        behind = _passes(node.op) and node.inputs[0] in wide
        if behind:
            moved[node.name] = shapes[node.inputs[0]][1:]
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
    return replace(plan, values=FrozenMap(values), owned=owned, resolutions=rows, moved=FrozenMap(moved))


def _final(graph: Graph, plan: Plan, formats: Mapping[str, Format]) -> dict[str, Format]:
    """Formats by the names of the plan: of a fused node, that of the last one it took in."""
    order = [*(entry.name for entry in graph.inputs), *(node.name for node in graph.nodes)]
    return {plan.renamed.get(name, name): formats[name] for name in order if name in formats}


def _qparams(
    plan: Plan, params: Mapping[str, Array], imported: Imported, formats: Mapping[str, Format]
) -> dict[str, Array]:
    """The scales of the file."""
    found: dict[str, Array] = {}
    small: dict[str, int] = {}
    for name in plan.trained:
        if name in plan.weights:
            scale = np.asarray(imported.weights[name].scale, np.float32)
            if (scale < MIN_SCALE).any():
                small[name] = int((scale < MIN_SCALE).sum())
                scale = _not_too_small(plan, params, name, scale, formats)
            found[name] = jax.device_put(scale)
        elif name in formats:
            found[name] = jax.device_put(np.float32(formats[name].scale))
    if small:
        warnings.warn(
            f"{sum(small.values())} scales of weights are below 2^-23, of {', '.join(map(repr, list(small)[:5]))}"
            f"{' and others' if len(small) > 5 else ''}: their weights are rounded at that scale, mostly to 0, and the "
            "channels keep their bias",
            ScaleWarning,
            stacklevel=4,
        )
    return found


def _of_constants(
    plan: Plan, params: Mapping[str, Array], imported: Imported, known: Mapping[str, Array]
) -> dict[str, Array]:
    """The file's scales of the constants that prepare made, such as the weight of a norm, where they fit."""
    found: dict[str, Array] = {}
    for node in plan.graph.nodes:
        if not isinstance(node.op, ops.Constant) or node.name not in plan.trained or node.name in known:
            continue
        key = node.params["value"]
        grid = imported.weights.get(key)
        if grid is None or grid.axis is not None or float(grid.scale) < MIN_SCALE:
            continue
        if np.abs(np.asarray(params[key])).max(initial=0) <= float(grid.scale) * plan.spec(node.name).range[1]:
            found[node.name] = jax.device_put(np.asarray(grid.scale, np.float32).reshape(()))
    return found


def _biases(
    plan: Plan, params: Mapping[str, Array], imported: Imported, qparams: Mapping[str, Array]
) -> dict[str, Array]:
    """Real biases whose integers are those of the file, as far as float32 numbers have them.

    A file has the scale of a bias as float32(s_x * s_w), and the chip rounds by the exact product. At 2^24 LSB and more
    their difference is a step.
    """
    if any(name not in qparams for name in plan.trained):  # batches will tell the others
        return {}
    scales, found = value_scales(plan, qparams), {}
    for node in plan.graph.nodes:
        key, weight = node.params.get("bias", ""), node.params.get("weight", "")
        grid = imported.weights.get(key)
        if grid is None or grid.integers is None or weight not in qparams:
            continue
        x_scale = scales[node.inputs[0]]
        same = key in imported.params and np.array_equal(params[key], imported.params[key])  # not folded
        if x_scale is None or not same:
            continue
        assert isinstance(node.op, ops.Conv | ops.ConvTranspose | ops.Linear)
        w_scale = channel_scale(node.op, scale_of(weight, plan, qparams))
        step = np.asarray(x_scale, np.longdouble) * np.asarray(w_scale, np.longdouble)
        if bool((step.astype(np.float32) == grid.scale).all()):
            found[key] = jax.device_put((grid.integers * step).astype(np.float32))
    return found


def _not_too_small(
    plan: Plan, params: Mapping[str, Array], key: str, scale: np.ndarray, formats: Mapping[str, Format]
) -> np.ndarray:
    """Scales of at least 2^-23; where the weights are 0 then, one at which the bias fits into 32 bits."""
    weight, axis = np.asarray(params[key]), plan.weight_axis.get(key)
    peak = np.abs(weight).max() if axis is None else np.abs(np.moveaxis(weight, axis, 0).reshape(scale.size, -1)).max(1)
    raised = np.maximum(scale, np.float32(MIN_SCALE))
    for node in plan.graph.nodes:
        if node.params.get("weight") != key or "bias" not in node.params:
            continue
        source = node.inputs[0]
        while source not in formats and source in plan.graph.by_name and plan.graph.by_name[source].inputs:
            source = plan.graph.by_name[source].inputs[0]  # of what only moves it
        if source not in formats:
            continue
        bias = np.abs(np.asarray(params[node.params["bias"]], np.float64))
        wanted = bias / (formats[source].scale * 2.0**30) if bias.size == scale.size else bias.max(initial=0)
        enough = np.exp2(np.ceil(np.log2(np.maximum(wanted, MIN_SCALE)))).astype(np.float32)
        dead = (scale < MIN_SCALE) & (peak < MIN_SCALE / 2)
        raised = np.where(dead, np.maximum(raised, enough), raised)
    return raised.astype(np.float32)


def _reported(
    plan: Plan, imported: Imported, placed: _Placed | None, missing: set[str], scales: Mapping[str, float]
) -> Plan:
    """The plan with what the file does not say, or says otherwise, in the table of `explain`."""
    rows = []
    for row in plan.resolutions:
        if row.name in missing and row.port != "weight":
            scale = f" at {scales[row.name]:.6g}" if row.name in scales else ", to be calibrated"
            why = f"no pair in the file{scale}" + (f" ({row.reason})" if row.reason else "")
            row = replace(row, requested="float", reason=why)
        rows.append(row)
    copies = {} if placed is None else placed.copies
    rows += [
        Resolution(name, "output", "once", "twice", f"{first!r} is read with two scales: computed for each", first)
        for name, first in copies.items()
    ]
    rows += [Resolution(c.name, "output", c.before, c.after, c.why) for c in imported.changes]
    for key, grid in imported.weights.items():
        small = np.asarray(grid.scale) < MIN_SCALE
        if key in plan.weights and small.any():
            why = f"{int(small.sum())} scales are below 2^-23, the smallest"
            rows.append(Resolution(key, "weight", f"scale {float(np.min(grid.scale)):.3g}", "at least 2^-23", why))
    return replace(plan, resolutions=tuple(rows))
