"""`from_onnx`: a float ONNX model as a graph and its params. `model_from_onnx`: a QDQ model as a calibrated plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import onnx

import jquant.ops as ops
from jquant.drafts.graphs import simplified
from jquant.drafts.names import unique
from jquant.graph.checks import validate
from jquant.graph.passes import prune
from jquant.plan.masks import VERY_NEGATIVE
from jquant.types import Array, ConversionError, FrozenMap, Graph, Input, JQuantError, Node, Op

from .file_names import naming
from .foreign import MODES, Change, Refusals, ZeroPoint, is_quantized, to_qdq
from .foreign.branches import without_branches
from .foreign.torch_ranges import warn_of_lost_ranges
from .index_arithmetic import exact_indices
from .onnx_groups import Group, unchanged
from .onnx_in import (
    BATCHES,
    FOLDS,
    INPUT_TYPES,
    MAX_ELEMENTS,
    OF_SHAPES,
    TABLE,
    TYPES,
    Call,
    Grid,
    Integers,
    Known,
    Refused,
    Result,
    Unsupported,
    Value,
    array_of,
    fold,
    load_model,
    result_of,
)
from .onnx_notes import Notes, read_notes
from .refusals import listed

REMEDY = (
    "Replace them in the model, cut it before them (onnx.utils.extract_model), or add a handler to "
    "jquant_converters.onnx_in.TABLE"
)
MAX_EXACT = 2**20  # elements of an exact constant, which is part of the graph
# What damaged numbers make numpy and jax raise. Their text becomes the reason.
_DAMAGE = (TypeError, ValueError, IndexError, KeyError, OverflowError, ZeroDivisionError, MemoryError, RecursionError)


def from_onnx(
    source: Any, *, shapes: Mapping[str, Sequence[int | None]] | None = None, batch_axis: int = 0
) -> tuple[Graph, dict[str, Array]]:
    """Imports a float ONNX model of opset 10 to 28.

    Args:
      source: a path, the bytes of a file, or an `onnx.ModelProto`.
      shapes: {input: shape}, for inputs whose shape is not in the file; None is the free batch, on `batch_axis`.
      batch_axis: the axis of the inputs that is the batch, such as 1 of a time-first LSTM [T, N, C]. The graph has it
        in front: an input of which this axis is free takes [N, T, C], and so does a result that depends on it.

    Returns:
      The graph and {initializer: float32 array}. Nodes have the names of the ONNX nodes, or of their first results;
      int64 values are int32. What follows only from constants and shapes is computed now.

    Raises:
      ConversionError: a damaged file, or operators jquant lacks (all are listed). FileNotFoundError: no file.

    Example:
      >>> import jquant as jq
      >>> from jquant_converters import from_onnx, to_onnx
      >>> graph = jq.Graph((jq.Input("x", (None, 3)),), (jq.Node("y", jq.ops.Relu(), ("x",)),), ("y",))
      >>> from_onnx(to_onnx(graph, {}))[0] == graph
      True
    """
    with naming(source):
        imported = read(source, shapes, plain=True, batch_axis=batch_axis)
        fixed = {key for key, array in imported.params.items() if is_constant(array)}
        graph, params = simplified(imported.graph, imported.params, fixed=fixed)
    return graph, dict(params)


def is_constant(array: Any) -> bool:
    """Whether an initializer is no weight: one number, or a mask."""
    numbers = np.asarray(array)
    return numbers.size == 1 or bool(np.all((numbers == 0) | (numbers <= VERY_NEGATIVE)))


@dataclass(frozen=True)
class OnGrid:
    """A QuantizeLinear and DequantizeLinear around a value: what is read behind them."""

    source: str
    dtype: str
    scale: float
    result: str  # the ONNX name of it


@dataclass(frozen=True)
class Imported:
    """A model as it was read. Values of `grids` are operands that are not made by a node: see `OnGrid`.

    `weights` {parameter: the grid it was dequantized from}; `constants` the same by node, of operands
    """

    graph: Graph
    params: dict[str, Array]
    grids: dict[str, OnGrid]
    weights: dict[str, Grid]
    notes: Notes = field(default_factory=Notes)
    changes: tuple[Change, ...] = ()  # of what the file says, by its names
    dynamic: bool = False  # whether scales of values follow from the data


def read(
    source: Any,
    shapes: Mapping[str, Sequence[int | None]] | None = None,
    zero_point: ZeroPoint = "refuse",
    *,
    plain: bool = False,
    batch_axis: int = 0,
) -> Imported:
    """Reads a model with its quantization, of whatever form; `plain` refuses one that has any."""
    model, folder = load_model(source)
    if batch_axis < 0:
        raise ConversionError(f"batch_axis={batch_axis}; count the axes of the inputs from the front")
    if zero_point not in MODES:
        raise ConversionError(f"zero_point is {zero_point!r}; it is one of {', '.join(map(repr, MODES))}")
    try:
        notes = read_notes(model)
        warn_of_lost_ranges(model)
        model = without_branches(model)
        changes: tuple[Change, ...] = ()
        dynamic = False
        if is_quantized(model):
            if plain:
                raise ConversionError(
                    "the model is quantized (QuantizeLinear, integer operators or the like): "
                    "jquant_converters.model_from_onnx(model, target=...) reads it with its scales"
                )
            rewritten = to_qdq(model, folder, zero_point)
            model, changes, dynamic = rewritten.model, tuple(rewritten.changes), bool(rewritten.calibrated)
        reader = _Reader(model, folder, dict(shapes or {}), batch_axis, groups=unchanged(model, notes.groups))
        reader.read()
        return replace(reader.build(), notes=notes, changes=(*changes, *reader.changes), dynamic=dynamic)
    except Refusals as reason:
        raise ConversionError(str(reason)) from reason
    except Unsupported as reason:
        raise ConversionError(f"an output or initializer of the model: {reason}") from reason
    except _DAMAGE as error:
        raise ConversionError(f"the model is damaged: {type(error).__name__}: {error}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Reading the nodes


@dataclass
class _Reader:
    """Resolves names, calls the handlers, and collects nodes. It is the graph that handlers see."""

    model: onnx.ModelProto
    folder: Path | None
    shapes: dict[str, Sequence[int | None]]
    batch_axis: int = 0
    groups: dict[str, tuple[str, Group]] = field(default_factory=dict)  # {result: operator of several nodes}
    results: dict[str, Result] = field(default_factory=dict)  # by ONNX name
    nodes: dict[str, Node] = field(default_factory=dict)
    made: dict[str, Value] = field(default_factory=dict)  # {node or input: its value}
    inputs: list[Input] = field(default_factory=list)
    params: dict[str, np.ndarray] = field(default_factory=dict)
    keys: dict[Known, str] = field(default_factory=dict)  # {constant: its parameter}
    repeats: dict[Known, Value] = field(default_factory=dict)  # {constant of equal rows: the node of all}
    weights: dict[str, Grid] = field(default_factory=dict)
    grids: dict[str, OnGrid] = field(default_factory=dict)
    readers: dict[str, int] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    batch: Value | None = None
    opset: int = 0
    changes: list[Change] = field(default_factory=list)

    def read(self) -> None:
        graph = self.model.graph
        self.opset = next(e.version for e in self.model.opset_import if e.domain in ("", "ai.onnx"))
        if self.model.functions:
            raise ConversionError(
                "the model has functions of its own; onnx.inliner.inline_local_functions takes them out"
            )
        if graph.sparse_initializer:
            raise ConversionError("the model has sparse initializers; make them dense")
        for node in graph.node:
            for name in node.input:
                self.readers[name] = self.readers.get(name, 0) + 1
        stored = {tensor.name for tensor in graph.initializer}
        for entry in graph.input:
            if entry.name not in stored:
                self.read_input(entry)
        for tensor in graph.initializer:
            self.define(tensor.name, self.read_tensor(tensor))
        inner = {name for _, group in self.groups.values() for name in group.results[:-1]}
        for node in graph.node:
            if not inner.intersection(node.output):
                self.read_node(node)
        if self.problems:
            raise ConversionError(listed("jquant cannot import", self.problems, REMEDY))

    def define(self, name: str, result: Result) -> None:
        if not name or name in self.results:
            raise ConversionError(f"the value {name!r} is {'made twice' if name else 'without a name'}")
        if isinstance(result, Known) and not result.label:
            result = replace(result, label=name)
        self.results[name] = result

    def read_tensor(self, tensor: onnx.TensorProto) -> Known:
        array = array_of(tensor, self.folder)
        narrow = Grid("int4", np.ones((), np.float32), None) if TYPES[tensor.data_type] == "int4" else None
        return Known((array, array), tensor.name, narrow)

    def read_input(self, entry: onnx.ValueInfoProto) -> None:
        name, kind = entry.name, entry.type.tensor_type
        dtype = INPUT_TYPES.get(TYPES.get(kind.elem_type, ""))
        if not entry.type.HasField("tensor_type") or dtype is None:
            raise ConversionError(
                f"input {name!r} is no tensor of {', '.join(INPUT_TYPES)}; convert it before the model"
            )
        if name in self.shapes:
            shape = tuple(self.shapes[name])
        elif kind.HasField("shape"):
            shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim)
        else:
            raise ConversionError(
                f"input {name!r} has no shape in the file; give it: shapes={{{name!r}: (None, 3, 32, 32)}}"
            )
        if free := [axis for axis, n in enumerate(shape) if n is None and axis != self.batch_axis]:
            raise ConversionError(_free(name, shape, free[0], self.batch_axis))
        sizes = [math.prod(b if n is None else n for n in shape) for b in BATCHES]
        if any(n is not None and n < 1 for n in shape) or max(sizes) >= MAX_ELEMENTS or len(shape) > 16:
            raise ConversionError(f"input {name!r} has the shape {list(shape)[:16]}")
        axis = self.batch_axis if None in shape else 0
        shape = _in_front(shape, axis) if axis else shape
        self.inputs.append(Input(self.unique(name), shape, dtype))
        small, large = (tuple(b if n is None else n for n in shape) for b in BATCHES)
        value = self.made[self.inputs[-1].name] = Value(self.inputs[-1].name, (small, large), dtype)
        if self.batch is None and shape and shape[0] is None:
            self.batch = value
        if axis:
            back = (*range(1, axis + 1), 0, *range(axis + 1, len(shape)))
            value = self.made[self.add(f"{name}.as_in_file", ops.Permute(axes=back), (value,), {})]
        self.define(name, value)

    def read_node(self, node: onnx.NodeProto) -> None:
        name = self.unique(node.name or next((o for o in node.output if o), node.op_type))
        self.taken.discard(name)  # `add` takes it
        try:
            results = self.convert(node, name)
        except Unsupported as reason:
            self.fail(node, str(reason))
            results = [Refused("")] * len(node.output)
        except ConversionError as error:
            self.fail(node, str(error))
            results = [Refused("")] * len(node.output)
        except (*_DAMAGE, JQuantError) as error:
            self.fail(node, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            results = [Refused("")] * len(node.output)
        for output, result in zip(node.output, results, strict=False):
            if output:
                self.define(output, result)

    def fail(self, node: onnx.NodeProto, reason: str) -> None:
        """Lists a node that cannot be read; not one that only reads what failed already."""
        if reason:
            self.problems.append(f"{node.op_type} {node.name!r} making {list(node.output)[:4]}: {reason}")

    def convert(self, node: onnx.NodeProto, name: str) -> list[Result]:
        if node.domain not in ("", "ai.onnx"):
            raise Unsupported(f"domain {node.domain!r}; only ONNX's own operators are known")
        if node.op_type not in TABLE and node.op_type not in FOLDS and node.op_type not in OF_SHAPES:
            raise Unsupported("there is no such operator in jquant")
        if node.output and node.output[0] in self.groups:
            return [self.convert_group(node, *self.groups[node.output[0]])]
        inputs = tuple(self.resolve(i) if i else None for i in node.input)
        if any(isinstance(x, Refused) and not x.reason for x in inputs):
            raise Unsupported("")
        call = Call(node, name, self.opset, inputs, self)
        folded = fold(call)
        if folded is not None:
            return folded
        if node.op_type not in TABLE:
            raise Unsupported("it is known for constants and shapes only")
        found = TABLE[node.op_type](call)
        return list(found) if isinstance(found, list) else [found]

    def convert_group(self, node: onnx.NodeProto, name: str, group: Group) -> Result:
        """The operator that a group of nodes was written for."""
        inputs = tuple(map(self.resolve, group.inputs))
        params = {role: self.resolve(value) for role, value in group.params.items()}
        if any(isinstance(x, Refused) and not x.reason for x in (*inputs, *params.values())):
            raise Unsupported("")
        if not all(isinstance(value, Known) for value in params.values()):
            raise Unsupported("a parameter that the model computes")
        call = Call(node, name, self.opset, inputs, self)
        known = {role: value for role, value in params.items() if isinstance(value, Known)}
        return self.made[self.add(name, group.op, tuple(call.values()), known)]

    def resolve(self, name: str) -> Result:
        if name not in self.results:
            raise ConversionError(
                f"it reads {name!r} before a node makes it: the graph has a cycle, or is not in order"
            )
        return self.results[name]

    # -- what handlers use

    def unique(self, name: str) -> str:
        return unique(name, self.taken)

    def add(self, name: str, op: Op, operands: tuple[Value, ...], params: dict[str, Known]) -> str:
        name = self.unique(name)
        roles = {role: self.key(value, f"{name}.{role}") for role, value in params.items()}
        call_of = self.first_call(name, op, roles)
        self.nodes[name] = Node(name, op, tuple(x.name for x in operands), FrozenMap(roles), call_of)
        kinds = tuple((x.shapes, x.dtype) for x in operands)
        shapes, dtype = result_of(op, kinds, tuple((role, v.at[0].shape) for role, v in params.items()))
        self.made[name] = Value(name, shapes, dtype)
        return name

    def first_call(self, name: str, op: Op, roles: dict[str, str]) -> str:
        """The layer of which `layer_1` is a later call: it has its operator and parameters."""
        stem, _, number = name.rpartition("_")
        first = self.nodes.get(stem) if number.isdigit() and roles else None
        return stem if first is not None and (first.op, dict(first.params)) == (op, roles) else ""

    def key(self, value: Known, name: str) -> str:
        """The key of a parameter, stored once."""
        found = self.keys.get(value)
        if found is None:
            array = value.at[0]
            if not np.isfinite(array).all():
                raise Unsupported(f"constant {value.name or name!r} has values that are not finite")
            found = unique(value.name or value.label or name, set(self.params))
            self.params[found] = np.asarray(array, np.float32)
            self.keys[value] = found
            if value.grid is not None:
                self.weights[found] = value.grid
        return found

    def constant(self, value: Known, name: str) -> Value:
        """A node for a constant that an operator reads; floats are parameters, integers part of the graph."""
        if not value.fixed:
            return self.repeated(value, name)
        array = value.at[0]
        for node in self.nodes.values():
            if isinstance(node.op, ops.Constant) and self.keys.get(value) == node.params["value"]:
                return self.made[node.name]
        if array.dtype == np.float32:
            return self.made[self.add(value.label or name, ops.Constant(), (), {"value": value})]
        if array.dtype == np.uint8:
            raise Unsupported("a constant of uint8; make it int32 or float32")
        if array.size > MAX_EXACT:
            raise Unsupported(f"a constant of {array.size} integers")
        if array.dtype != np.bool_ and array.size and (array.min() < -(2**31) or array.max() >= 2**31):
            raise Unsupported("a constant beyond int32")
        values = tuple(int(v) for v in array.reshape(-1))
        op = ops.IntegerConstant(shape=array.shape, values=values, dtype="bool" if array.dtype == np.bool_ else "int32")
        return self.made[self.add(value.label or name, op, (), {})]

    def repeated(self, value: Known, name: str) -> Value:
        """A node for what is the same for every example, however many there are: one of them, repeated."""
        found = self.repeats.get(value)
        if found is not None:
            return found
        axis, row = self.row_of(value)
        assert self.batch is not None
        one = self.constant(Known((row, row), label=value.label and f"{value.label}.row"), f"{name}.row")
        made = self.made[self.add(f"{name}.examples", ops.Expand(shape=(1, *row.shape[1:])), (one, self.batch), {})]
        if axis:
            back = (*range(1, axis + 1), 0, *range(axis + 1, row.ndim))
            made = self.made[self.add(name, ops.Permute(axes=back), (made,), {})]
        self.repeats[value] = made
        return made

    def row_of(self, value: Known) -> tuple[int, np.ndarray]:
        """The axis that is the batch, and the one element [1, ...] of it that all are, with that axis in front."""
        small, large = value.at
        axes = [i for i, (n, m) in enumerate(zip(small.shape, large.shape, strict=False)) if n != m]
        sizes = None if self.batch is None else tuple(shape[0] for shape in self.batch.shapes)
        if small.ndim == large.ndim and len(axes) == 1 and (small.shape[axes[0]], large.shape[axes[0]]) == sizes:
            row: np.ndarray = np.moveaxis(small, axes[0], 0)[:1]
            if all(bool((np.moveaxis(a, axes[0], 0) == row).all()) for a in value.at):
                return axes[0], row
        raise Unsupported("an operand computed from the batch size, and not with equal rows for its examples")

    def types(self) -> dict[str, tuple[tuple[int, ...], str]]:
        return {name: (value.shapes[0], value.dtype) for name, value in self.made.items()}

    def widths(self) -> dict[str, str]:
        """{value: its integer dtype in the file}, as far as onnx can tell."""
        graph = onnx.shape_inference.infer_shapes(self.model).graph
        kinds = {v.name: v.type.tensor_type.elem_type for v in [*graph.input, *graph.value_info, *graph.output]}
        known = {name: TYPES.get(kind, "") for name, kind in kinds.items()}
        return {
            value.name: known[name]
            for name, value in self.results.items()
            if isinstance(value, Value) and name in known
        }

    def maker_of(self, name: str) -> Op | None:
        node = self.nodes.get(name)
        return None if node is None else node.op

    def operands_of(self, name: str) -> tuple[str, ...]:
        return self.nodes[name].inputs

    def value_of(self, name: str) -> Value:
        return self.made[name]

    def known_of(self, name: str) -> np.ndarray | None:
        node = self.nodes.get(name)
        return self.params[node.params["value"]] if node is not None and isinstance(node.op, ops.Constant) else None

    def takes_bias(self, name: str) -> bool:
        """Whether a linear layer has no bias and one reader in the file."""
        names = [o for o, r in self.results.items() if isinstance(r, Value) and r.name == name]
        read_once = len(names) == 1 and self.readers.get(names[0]) == 1
        outputs = {o.name for o in self.model.graph.output}
        return read_once and not outputs & set(names) and "bias" not in self.nodes[name].params

    def set_bias(self, name: str, bias: Known) -> None:
        node = self.nodes[name]
        self.nodes[name] = replace(node, params=FrozenMap({**node.params, "bias": self.key(bias, f"{name}.bias")}))

    def on_grid(self, integers: Integers, result: str) -> Value:
        """The value behind a QuantizeLinear and DequantizeLinear: which node makes it is decided when all is read."""
        source = integers.value
        if source.name in self.grids:  # a pair behind a pair: nothing, or another format
            before = self.grids[source.name]
            if (before.dtype, before.scale) == (integers.dtype, integers.scale):
                return source
            source = self.made[self.add(result, ops.Requantize(), (source,), {})]
        for name, found in self.grids.items():
            if (found.source, found.dtype, found.scale) == (source.name, integers.dtype, integers.scale):
                return self.made[name]
        name = self.unique(f"{source.name}@{integers.dtype}")
        self.grids[name] = OnGrid(source.name, integers.dtype, integers.scale, result)
        self.made[name] = replace(source, name=name)
        return self.made[name]

    def note(self, name: str, before: str, after: str, why: str) -> None:
        """Something that is read otherwise than the file says it."""
        self.changes.append(Change(name, before, after, why))

    # -- the end

    def build(self) -> Imported:
        outputs: list[str] = []
        for entry in self.model.graph.output:
            result = self.results.get(entry.name)
            if isinstance(result, Refused):
                raise ConversionError(f"output {entry.name!r}: {result.reason}")
            if isinstance(result, Integers) or result is None:
                what = "integers; put a DequantizeLinear before it" if result is not None else "made by no node"
                raise ConversionError(f"output {entry.name!r} is {what}")
            value = self.constant(result, entry.name) if isinstance(result, Known) else result
            outputs.append(self.output_of(self.batch_first(value, entry.name), entry.name, outputs))
        if not outputs:
            raise ConversionError("the model has no outputs")
        return finish(Graph(tuple(self.inputs), tuple(self.nodes.values()), tuple(outputs)), self)

    def batch_first(self, value: Value, name: str) -> Value:
        """The value with its free axis in front, if the model's batch is another one."""
        free = [axis for axis, (n, m) in enumerate(zip(*value.shapes, strict=True)) if n != m]
        if not self.batch_axis or len(free) != 1 or free[0] == 0:
            return value
        order = _in_front(tuple(range(len(value.shapes[0]))), free[0])
        return self.made[self.add(f"{name}.batch_first", ops.Permute(axes=order), (value,), {})]

    def output_of(self, value: Value, name: str, others: list[str]) -> str:
        """The node of an output; a float input that is passed on gets one of its own, with the output's name."""
        if value.dtype != "float32" or (value.name not in {i.name for i in self.inputs} and value.name not in others):
            return value.name
        return self.add(name, ops.Requantize(), (value,), {})


def _in_front(items: tuple[Any, ...], axis: int) -> tuple[Any, ...]:
    return (items[axis], *items[:axis], *items[axis + 1 :])


def _free(name: str, shape: tuple[int | None, ...], axis: int, batch_axis: int) -> str:
    first = f"axis {axis} of input {name!r} is free, and only axis {batch_axis}, the batch, can be; "
    other = f"batch_axis={axis} if that is the batch, or " if shape.count(None) == 1 and not batch_axis else ""
    return f"{first}give {other}its shape: shapes={{{name!r}: {shape}}} with numbers"


def finish(graph: Graph, reader: _Reader) -> Imported:
    """Drops what reaches no output, and checks the rest."""
    wanted = set(graph.outputs)
    nodes = []
    for node in reversed(graph.nodes):
        if node.name in wanted:
            nodes.append(node)
            for operand in node.inputs:
                wanted |= {operand, reader.grids[operand].source} if operand in reader.grids else {operand}
        elif any(g.source == node.name and n in wanted for n, g in reader.grids.items()):
            nodes.append(node)
            wanted |= set(node.inputs)
    graph = replace(graph, nodes=tuple(reversed(nodes)))
    grids = {name: found for name, found in reader.grids.items() if name in wanted}
    params = {key: jax.device_put(reader.params[key]) for key in graph.param_names}
    weights = {key: grid for key, grid in reader.weights.items() if key in params}
    if not grids:
        try:
            validate(prune(graph), params)
        except JQuantError as error:
            raise ConversionError(f"the model is not well formed: {error}") from error
    return Imported(exact_indices(graph, reader.types, reader.widths), params, grids, weights)
