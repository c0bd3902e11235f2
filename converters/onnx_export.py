"""`to_onnx`: a plan as a QDQ model or as a float model for a PTQ tool, and a float graph as it is.

What is exact, and under which target, is in `docs/onnx.md`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx

import jquant.ops as ops
from jquant.graph.checks import check_params, validate
from jquant.graph.float import value_types
from jquant.graph.operator import derived_scale
from jquant.host.whole_files import replacing
from jquant.numerics.namespace import array_namespace, real, to_host
from jquant.numerics.rounding import dequantize, expand, quantize
from jquant.ops.conv import quantized_bias
from jquant.plan.batch_norm import fold_batch_norm
from jquant.plan.scales import scale_of, value_scales
from jquant.program.lower import check_offsets
from jquant.types import Array, ConversionError, Graph, Model, Node, Op, Params, Plan, QuantSpec

from .foreign.qonnx_out import to_quant
from .onnx_groups import Group, group_of
from .onnx_notes import write_notes
from .onnx_out import (
    TYPES,
    Call,
    Operand,
    Unsupported,
    Writer,
    channels_first,
    emit,
    framework_layout,
    refuse,
)
from .onnx_out.opsets import NARROW_AND_WIDE_OPSET, check_operators, check_opset, ir_version

Form = Literal["qdq", "float", "qonnx"]
# The opset of what has no int16 and int4: at opset 21, onnxruntime's default optimizations make files of int8 that it
# then refuses ("output_dtype INT8 does not match y_zero_point type UINT8").
PLAIN_OPSET = 19
MAX_BYTES = 2**31 - 1  # of a protobuf
METADATA = "jquant.quantization"  # key of the model's metadata: `quantization_table` as JSON

# Operators that keep the scale of their operand and still leave its grid: the smallest integer saturates (Neg, Abs), or
# new values lie between the old ones.
_REGRIDDED = (
    ops.Abs, ops.GridSample, ops.Interpolate, ops.Maximum, ops.Minimum, ops.Mod, ops.Neg, ops.RoiAlign, ops.Warp,
)  # fmt: skip
_DTYPES = ("int8", "int16")  # of quantized values; weights may be int2 to int4 too


@np.errstate(all="ignore")
def to_onnx(
    source: Model | Graph,
    params: Params | None = None,
    *,
    path: str | os.PathLike[str] | None = None,
    form: Form | None = None,
    opset: int | None = None,
) -> onnx.ModelProto:
    """Exports a model or a float graph. Names are jquant's; the layout is the framework's, NCHW; the batch is symbolic.

    Args:
      source: a calibrated model, or a float graph.
      params: the parameters of a graph.
      path: where to write the file. With form "float" of a model, `quantization_table` goes beside it as JSON, under
        the same name with the suffix `.json`.
      form: "qdq" (of a model, the default): QuantizeLinear and DequantizeLinear with zero point 0, weights int4, int8
        or int16, biases int32; opset 21 (IR version 10) where there is int16 or int4, else opset 19 (IR version 9).
        "qonnx": the same with a Quant node of QONNX in place of each pair; onnxruntime does not run it.
        "float": opset 19, weights on their grids, the rest float; the table is in the metadata too, under
        "jquant.quantization".
      opset: another opset, 13 to 28, such as that of the file that the model came from; int16 and int4 need 21.

    Returns:
      The model, checked by onnx.checker.

    Raises:
      ConversionError: what has no ONNX form, or none at this opset, in one error. CalibrationError, GraphError:
        parameters that do not fit.

    Example:
      >>> import jax.numpy as jnp, jquant as jq
      >>> from jquant_converters import to_onnx
      >>> graph = jq.Graph((jq.Input("x", (None, 3)),), (jq.Node("y", jq.ops.Relu(), ("x",)),), ("y",))
      >>> [node.op_type for node in to_onnx(graph, {}).graph.node]
      ['Relu']
    """
    if not isinstance(source, Model | Graph) or (params is None) == isinstance(source, Graph):
        raise ConversionError(
            f"to_onnx exports a Model, or a Graph with its params, not {type(source).__name__}"
            f"{'' if params is None else ' and params'}; jq.prepare makes a model"
        )
    form = form or ("qdq" if isinstance(source, Model) else "float")
    if form not in ("qdq", "float", "qonnx") or (form != "float" and isinstance(source, Graph)):
        raise ConversionError(
            f'form {form!r} of a {type(source).__name__}: a model has "qdq", "qonnx" and "float", a graph "float"'
        )
    model, table = None, None
    if isinstance(source, Graph):
        graph, params = validate(source), to_host(params or {})
        check_params(graph, params)
        graph = channels_first(graph, {name: kind.shape for name, kind in value_types(graph, params).items()})
    else:
        model = fold_batch_norm(Model(source.plan, to_host(source.params), to_host(source.qparams)))
        graph, params = model.plan.graph, model.params
        check_offsets(model.plan, model.qparams)
        shapes = {name: kind.shape for name, kind in value_types(graph, params).items()}
        graph = framework_layout(graph, shapes)
        if own := [node.name for node in graph.nodes if getattr(node.op, "channels_last", False)]:
            raise ConversionError(
                f"node {own[0]!r} runs channels-last in the traced function itself; ONNX has channels first. Export "
                "the float graph that jq.trace returned, or a function in the layout [N, C, H, W]"
            )
        table = quantization_table(model) if form == "float" else None
    numbers: _Numbers = _Float(dict(params))
    if model is not None:
        numbers = (_Snapped if form == "float" else _Qdq)(dict(params), model.plan, dict(model.qparams))
    check_opset(opset, numbers.needs_opset() >= NARROW_AND_WIDE_OPSET)
    numbers.wanted_opset = opset
    exporter = _Exporter(graph, params, numbers, numbers.opset())
    exported = exporter.export()
    check_operators(exported.graph.node, numbers.opset())
    if model is not None and form != "float":
        write_notes(exported, model.plan, exporter.groups)
    if form == "qonnx":
        exported = to_quant(exported)
    text = None if table is None else json.dumps(table, indent=1)
    if text is not None:
        exported.metadata_props.add(key=METADATA, value=text)
    onnx.checker.check_model(exported, full_check=exported.ByteSize() < onnx.checker.MAXIMUM_PROTOBUF)
    if path is not None:
        _check_size(exported)
        _write(Path(path), exported.SerializeToString())
        if text is not None:
            _write(Path(path).with_suffix(".json"), text.encode())
    return exported


def quantization_table(model: Model) -> dict[str, Any]:
    """What a PTQ tool needs to know of a model, by node: dtype, scale and threshold of its output and its weight.

    A threshold is the real number that the smallest integer stands for: 128 scales of int8, 32768 of int16. Lists are
    per output channel, along `axis` of the weight. A value without an entry stays float, or keeps the format of its
    operand where its operator moves data.
    """
    plan, qparams = model.plan, to_host(model.qparams)
    scales = value_scales(plan, qparams)
    nodes: dict[str, dict[str, Any]] = {}
    for name in plan.owned:
        nodes[name] = {"output": _entry(plan.spec(name), scales[name])}
    for node in plan.graph.nodes:
        spec = plan.values[node.name]
        if spec is not None and spec.is_high_precision and node.op.keeps_accumulator:
            nodes.setdefault(node.name, {})["output"] = {"dtype": "int32"}
        for role in node.op.weight_roles:
            key = node.params[role]
            if key in plan.weights:
                found = {"name": key, **_entry(plan.weights[key], scale_of(key, plan, qparams))}
                if key in plan.weight_axis:
                    found["axis"] = plan.weight_axis[key]
                nodes.setdefault(node.name, {})[role] = found
    return {"jquant": 1, "target": plan.target.name, "nodes": nodes}


def _entry(spec: QuantSpec, scale: Array | None) -> dict[str, Any]:
    if spec.is_float or scale is None:
        return {"dtype": spec.dtype}
    steps = np.asarray(scale, np.float32)
    threshold = steps.astype(np.float64) * -spec.range[0] if spec.range[0] else steps.astype(np.float64) * spec.range[1]
    return {"dtype": spec.dtype, "scale": steps.tolist(), "threshold": threshold.tolist()}


def _check_size(model: onnx.ModelProto) -> None:
    size = model.ByteSize()
    if size > MAX_BYTES:
        raise ConversionError(
            f"the file has {size} bytes, and a protobuf holds {MAX_BYTES} at most: leave out `path`, and "
            "onnx.save_model(model, path, save_as_external_data=True) writes the weights beside it"
        )


def _write(path: Path, content: bytes) -> None:
    """An interrupted write leaves an existing file as it was."""
    with replacing(path) as partial:
        partial.write_bytes(content)


# ---------------------------------------------------------------------------------------------------------------------
# What becomes of the numbers of a value: nothing, or a quantization


@dataclass
class _Float:
    """Every number as it is."""

    params: dict[str, Array]
    # {(parameter, whether as a weight): its value in the file}. An embedding may share its table with a linear layer.
    written: dict[tuple[str, bool], str] = field(default_factory=dict)
    wanted_opset: int | None = None

    @property
    def number_rounding(self) -> str:
        return "half_up"

    def param(self, writer: Writer, node: Node, role: str) -> str:
        """The value of a parameter, written once."""
        at = node.params[role], role in node.op.weight_roles
        if at not in self.written:
            self.written[at] = writer.initializer(at[0], np.asarray(self.array(node, role)))
        return self.written[at]

    def array(self, node: Node, role: str) -> Array:
        return self.params[node.params[role]]

    def keep(self, writer: Writer, name: str, op: Op | None) -> Callable[[str], str] | None:
        """How the real result of a node becomes the value `name`: None where it is that."""
        return None

    def snap(self, name: str, value: float) -> float:
        return value

    def scales(self, node: Node) -> tuple[Any, ...]:
        return ()

    def dtype(self, name: str) -> str:
        return ""

    def integers(self, writer: Writer, node: Node) -> bool:
        """Writes a constant in integers, if it has such."""
        return False

    def opset(self) -> int:
        return self.wanted_opset or self.needs_opset()

    def needs_opset(self) -> int:
        return PLAIN_OPSET


@dataclass
class _Snapped(_Float):
    """Weights on their grids."""

    plan: Plan = None  # type: ignore[assignment]
    qparams: dict[str, Array] = field(default_factory=dict)

    def __init__(self, params: dict[str, Array], plan: Plan, qparams: dict[str, Array]) -> None:
        super().__init__(params)
        self.plan, self.qparams = plan, qparams

    @property
    def number_rounding(self) -> str:
        return self.plan.target.number_rounding

    def array(self, node: Node, role: str) -> Array:
        key = node.params[role]
        if key not in self.plan.weights or role not in node.op.weight_roles:
            return self.params[key]
        integers, scale = self.quantized_weight(key)
        return dequantize(integers, expand(scale, self.plan.weight_axis.get(key), integers.ndim))

    def quantized_weight(self, key: str) -> tuple[Array, Array]:
        spec, scale = self.plan.weights[key], scale_of(key, self.plan, self.qparams)
        weight = self.params[key]
        shaped = expand(scale, self.plan.weight_axis.get(key), weight.ndim)
        return quantize(weight, shaped, spec.dtype, self.plan.target.quantize_rounding), scale


class _Qdq(_Snapped):
    """QuantizeLinear and DequantizeLinear wherever a value or a parameter meets its grid."""

    def __init__(self, params: dict[str, Array], plan: Plan, qparams: dict[str, Array]) -> None:
        super().__init__(params, plan, qparams)
        self.value_scales = value_scales(plan, qparams)
        self.owned = {name for name in plan.owned if not plan.spec(name).is_float}
        wrong = [n for n, s in plan.values.items() if s is not None and s.dtype not in (*_DTYPES, "int32", "float16")]
        if wrong:
            raise ConversionError(
                f"value {wrong[0]!r} is {plan.spec(wrong[0]).dtype}; a QDQ model has {' and '.join(_DTYPES)} here. "
                'Give it such a format, or export form="float"'
            )

    def param(self, writer: Writer, node: Node, role: str) -> str:
        key = node.params[role]
        if key in self.plan.weights and role in node.op.weight_roles:
            if (key, True) not in self.written:
                self.written[key, True] = self.write_weight(writer, key)
            return self.written[key, True]
        x_scale = self.value_scales[node.inputs[0]] if node.inputs else None
        weight = node.params.get("weight")
        if role == "bias" and weight in self.plan.weights and weight is not None and x_scale is not None:
            return self.write_bias(writer, node, x_scale, weight)
        return super().param(writer, node, role)

    def write_weight(self, writer: Writer, key: str) -> str:
        integers, scale = self.quantized_weight(key)
        axis, spec = self.plan.weight_axis.get(key), self.plan.weights[key]
        if spec.dtype.startswith("u"):
            raise ConversionError(f"weight {key!r} is {spec.dtype}; quantize it symmetrically, as {spec.dtype[1:]}")
        narrow = "int4" if spec.dtype == "int4" else ""
        return _dequantized(writer, key, writer.initializer(key, np.asarray(integers), narrow), scale, axis)

    def write_bias(self, writer: Writer, node: Node, x_scale: Array, weight: str) -> str:
        key = node.params["bias"]
        weight_scale = scale_of(weight, self.plan, self.qparams)
        assert isinstance(node.op, ops.Conv | ops.ConvTranspose | ops.Linear)
        scale = derived_scale(node.op, x_scale, weight=weight_scale)
        integers = quantized_bias(node.op, self.params[key], x_scale, weight_scale, self.plan.target)
        channels = array_namespace(scale).broadcast_to(scale, integers.shape) if scale.size > 1 else scale.reshape(())
        axis = 0 if channels.ndim else None
        return _dequantized(writer, key, writer.initializer(key, np.asarray(integers)), channels, axis)

    def keep(self, writer: Writer, name: str, op: Op | None) -> Callable[[str], str] | None:
        spec, scale = self.plan.values[name], self.value_scales[name]
        if name in self.plan.owned and spec is not None and spec.is_float:
            return lambda x: _through_float16(writer, x, name)
        negated = isinstance(op, ops.Scale) and op.factor < 0
        moves = op is not None and (op.scale_rule == "same_as_input" or isinstance(op, ops.Permute))
        moved = moves and self.writes_moved(spec)
        if scale is None or spec is None or not (name in self.owned or isinstance(op, _REGRIDDED) or negated or moved):
            return None
        if spec.is_high_precision:
            return None
        result = writer.unique(f"{name}:dequantized") if op is None else name
        return lambda x: writer.pair(x, scale, spec.dtype, name, result)

    def writes_moved(self, spec: QuantSpec | None) -> bool:
        """Whether values that an operator only moves get a pair as well, which changes none of them.

        At opset 21 onnxruntime would put one there itself, and then refuse its own file.
        """
        return spec is not None and spec.dtype == "int8" and self.opset() >= NARROW_AND_WIDE_OPSET

    def snap(self, name: str, value: float) -> float:
        """A bound or a fill as the integers have it: rounded, saturated."""
        spec, scale = self.plan.values[name], self.value_scales[name]
        if spec is None or scale is None or scale.ndim or spec.is_float or spec.is_high_precision:
            return value
        return float(dequantize(quantize(real(value), scale, spec.dtype, self.plan.target.number_rounding), scale))

    def scales(self, node: Node) -> tuple[Any, ...]:
        if self.plan.values[node.name] is None and node.name not in self.plan.exact:
            return ()  # a rule keeps the node float
        return tuple(self.value_scales[name] for name in node.inputs)

    def dtype(self, name: str) -> str:
        spec = self.plan.values[name]
        return "" if spec is None else spec.dtype

    def needs_opset(self) -> int:
        found = {spec.dtype for spec in (*self.plan.values.values(), *self.plan.weights.values()) if spec is not None}
        return NARROW_AND_WIDE_OPSET if found & {"int4", "int16"} else PLAIN_OPSET

    def integers(self, writer: Writer, node: Node) -> bool:
        spec = self.plan.values[node.name]
        if not isinstance(node.op, ops.Constant) or node.name not in self.owned or spec is None:
            return False
        scale, key = self.value_scales[node.name], node.params["value"]
        assert scale is not None
        values = quantize(self.params[key], scale, spec.dtype, self.plan.target.quantize_rounding)
        stored = writer.initializer(key, np.asarray(values))
        step = writer.initializer(f"{node.name}:scale", np.asarray(scale))
        writer.node("DequantizeLinear", (stored, step), (node.name,), node.name)
        return True


def _dequantized(writer: Writer, key: str, integers: str, scale: Array, axis: int | None) -> str:
    steps = np.asarray(scale, np.float32) if axis is not None else np.asarray(scale, np.float32).reshape(())
    step, result = writer.initializer(f"{key}:scale", steps), writer.unique(f"{key}:dequantized")
    writer.node("DequantizeLinear", (integers, step), (result,), result, axis=axis)
    return result


def _through_float16(writer: Writer, x: str, name: str) -> str:
    bounds = [writer.initializer(f"{name}:{part}", np.float32(v)) for part, v in (("low", -65504.0), ("high", 65504.0))]
    clipped, narrow = writer.unique(f"{name}:clipped"), writer.unique(f"{name}:float16")
    writer.node("Clip", (x, *bounds), (clipped,), f"{name}:clip")
    writer.node("Cast", (clipped,), (narrow,), f"{name}:narrow", to=TYPES["float16"])
    writer.node("Cast", (narrow,), (name,), f"{name}:widen", to=TYPES["float32"])
    return name


_Numbers = _Float | _Snapped | _Qdq

# ---------------------------------------------------------------------------------------------------------------------
# The walk over the graph


class _Exporter:
    """Writes the nodes of a graph in the framework's layout."""

    def __init__(self, graph: Graph, params: Params, numbers: _Numbers, opset: int) -> None:
        self.graph, self.params, self.numbers = graph, params, numbers
        self.writer = Writer(opset)
        self.writer.taken |= {*graph.values, *graph.outputs}
        small, large = (value_types(graph, params, batch) for batch in (2, 3))
        self.types = {
            name: (tuple(a if a == b else None for a, b in zip(kind.shape, large[name].shape, strict=True)), kind.dtype)
            for name, kind in small.items()
        }
        self.names: dict[str, str] = {}  # {value: its name in the file}
        self.groups: dict[str, Group] = {}  # operators that are several nodes
        self.problems: list[ConversionError] = []

    def export(self) -> onnx.ModelProto:
        for entry in self.graph.inputs:
            keep = self.numbers.keep(self.writer, entry.name, None)
            self.names[entry.name] = keep(entry.name) if keep else entry.name
        for node in self.graph.nodes:
            self.names[node.name] = node.name
            try:
                self.write(node)
            except Unsupported as reason:
                self.problems.append(refuse(node.name, node.op, str(reason)))
        if self.problems:
            raise ConversionError("\n".join(map(str, self.problems)))
        return self.assemble()

    def operand(self, name: str) -> Operand:
        shape, dtype = self.types[name]
        return Operand(self.names.get(name, name), shape, str(dtype))

    def write(self, node: Node) -> None:
        if self.numbers.integers(self.writer, node):
            return
        keep = self.numbers.keep(self.writer, node.name, node.op)
        result = self.writer.unique(f"{node.name}:real") if keep else node.name
        _, dtype = self.types[node.name]
        call = Call(
            self.writer,
            node.name,
            tuple(self.operand(v) for v in node.inputs),
            Operand(result, self.types[node.name][0], str(dtype)),
            params={role: self.numbers.param(self.writer, node, role) for role in self.written_roles(node)},
            param_shapes={role: self.params[key].shape for role, key in node.params.items()},
            arrays={role: np.asarray(self.numbers.array(node, role)) for role in node.params},
            snap=lambda value: self.numbers.snap(node.name, value),
            scales=self.numbers.scales(node),
            dtype=self.numbers.dtype(node.inputs[0]) if node.inputs else "",
            number_rounding=self.numbers.number_rounding,
            dtypes=tuple(self.numbers.dtype(name) for name in node.inputs),
        )
        nodes, tensors = len(self.writer.nodes), len(self.writer.initializers)
        emit(node.op, call)
        self.note(node, call, self.writer.nodes[nodes:], self.writer.initializers[tensors:])
        if keep:
            keep(result)

    def note(self, node: Node, call: Call, nodes: list[onnx.NodeProto], tensors: list[onnx.TensorProto]) -> None:
        """Remembers an operator that became several nodes, or one of them as an operand.

        What a convolution takes in is recognized without a note.
        """
        several = len(nodes) > 1 or isinstance(node.op, ops.Mod)
        if several and not isinstance(node.op, ops.Conv | ops.ConvTranspose | ops.Linear):
            read = [operand.name for operand in call.inputs]
            self.groups[node.name] = group_of(node.op, read, call.params, nodes, tensors)

    @staticmethod
    def written_roles(node: Node) -> list[str]:
        """The parameters that are initializers of their own; a recurrent layer reorders its gates."""
        return [] if isinstance(node.op, ops.Lstm | ops.Gru) else list(node.params)

    def assemble(self) -> onnx.ModelProto:
        outputs: list[onnx.ValueInfoProto] = []
        for name in self.graph.outputs:
            value = self.names[name]
            if value in {o.name for o in outputs} or name in {i.name for i in self.graph.inputs}:
                copy = self.writer.unique(f"{name}:output")
                self.writer.node("Identity", (value,), (copy,), copy)
                value = copy
            outputs.append(self.value_info(value, name))
        inputs = [self.value_info(entry.name, entry.name) for entry in self.graph.inputs]
        graph = onnx.helper.make_graph(self.writer.nodes, "jquant", inputs, outputs, self.writer.initializers)
        opset = self.writer.opset
        model: onnx.ModelProto = onnx.helper.make_model(
            graph,
            opset_imports=[onnx.helper.make_opsetid("", opset)],
            ir_version=ir_version(opset),
            producer_name="jquant",
        )
        return model

    def value_info(self, name: str, value: str) -> onnx.ValueInfoProto:
        shape, dtype = self.types[value]
        dims = ["batch" if n is None and i == 0 else n for i, n in enumerate(shape)]
        return onnx.helper.make_tensor_value_info(name, TYPES[str(dtype)], dims)
