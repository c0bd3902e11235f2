"""`to_torch`: a graph or a calibrated plan as a torch.fx.GraphModule of standard functions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import fx

import jquant.ops as ops
from jquant.graph.float import value_types
from jquant.graph.operator import derived_scale, to_channels_last
from jquant.numerics.namespace import to_host
from jquant.numerics.rounding import dequantize, quantize
from jquant.plan.batch_norm import fold_batch_norm
from jquant.plan.scales import check_model, expand_weight, quantizer_of, scale_of, value_scales
from jquant.types import Array, ConversionError, Graph, Model, Node, Op, Params, Plan, QParams, QuantSpec, storage_dtype

from .base import Site, torch_rule

_DTYPES = {"int8": torch.int8, "int16": torch.int16, "int32": torch.int32, "uint8": torch.uint8}
_BIAS = QuantSpec(dtype="int32")
_SPATIAL = {ops.GridSample: 1, ops.RoiAlign: 1}  # how many operands have channels; all of the others do


def to_torch(source: Model | Graph, params: Params | None = None) -> fx.GraphModule:
    """A model as a torch module: standard functions, with quantize and dequantize operators where its plan quantizes.

    Every quantized value passes `torch.ops.quantized_decomposed.quantize_per_tensor` and its inverse. A quantized
    weight is a buffer of integers, dequantized per channel or per tensor; a bias is float, on the grid of its
    accumulator. Parameters and buffers have their keys of the params. The module runs in eager torch and goes through
    torch.export and torch.onnx.export (int16 from opset_version=21 on), with a symbolic batch; inputs and outputs keep
    the order of the graph, and what runs in between does too (channels first).

    Against `jq.apply(model, x)`: torch multiplies by the reciprocal of a scale, where jquant divides,
    and it rounds ties to even. So a quantization may differ by 1 LSB where x / scale is within an ulp of a tie, or on
    one, for a spec that rounds half up. With power-of-two scales and half_even rounding both are the same function, and
    results are equal bit for bit wherever float sums are exact.

    Args:
      source: a calibrated model; or a float graph, for a float module.
      params: the parameters of a graph.

    Raises:
      ConversionError: an operator that plain torch does not have, or a quantizer with an offset.
      CalibrationError: scales missing or broken.

    Example:
      >>> module = to_torch(model)  # doctest: +SKIP
      >>> program = torch.export.export(module, (x,))  # doctest: +SKIP
    """
    import torch.ao.quantization.fx._decomposed  # noqa: F401  (defines the operators)

    if isinstance(source, Graph) and params is not None:
        return _Writer(source, dict(params)).write()
    if not isinstance(source, Model) or params is not None:
        raise ConversionError(
            f"to_torch takes a Model, or a Graph with its params, not {type(source).__name__}; jq.prepare makes a model"
        )
    plan = source.plan
    check_model(source)
    for name in plan.trained:
        if quantizer_of(plan.spec(name)).has_offset:
            raise ConversionError(
                f"{name!r} has a learned offset in real numbers, and torch's zero points are integers; "
                "train with jq.lsq"
            )
    with np.errstate(all="ignore"):
        folded = fold_batch_norm(Model(plan, to_host(source.params), to_host(source.qparams)))
        return _QuantizedWriter(folded.plan, dict(folded.params), folded.qparams).write()


class _Writer:
    """Records the float meaning of a graph as calls of torch.

    A value that the plan makes channels-last is held channels-first: `held` says which ones. So permutations that
    `prepare` inserted are no calls, and convolutions read what they want.
    """

    def __init__(self, graph: Graph, params: dict[str, Array]) -> None:
        self.source, self.params = graph, params
        self.root, self.graph = torch.nn.Module(), fx.Graph()
        self.tracer = fx.proxy.GraphAppendingTracer(self.graph)
        self.values: dict[tuple[str, bool], fx.Proxy] = {}  # by name, and whether channels come first against the plan
        self.held: set[str] = set()
        self.keys: dict[str, fx.Proxy] = {}
        self.constants = 0
        norms = [node.params for node in graph.nodes if isinstance(node.op, ops.BatchNorm)]
        self.statistics = {roles[role] for roles in norms for role in ("running_mean", "running_var")}
        kinds = value_types(graph, params)
        self.shapes = {name: kind.shape for name, kind in kinds.items()}
        self.dtypes = {name: str(kind.dtype) for name, kind in kinds.items()}

    def write(self) -> fx.GraphModule:
        for entry in self.source.inputs:
            name = entry.name.replace(".", "_")
            proxy = fx.Proxy(self.graph.placeholder(name), self.tracer)
            self.values[entry.name, False] = self.tapped(entry.name, proxy)
        for node in self.source.nodes:
            try:
                self.write_node(node)
            except ConversionError as error:
                raise ConversionError(f"node {node.name!r} ({type(node.op).__name__}): {error}") from error
        outputs = tuple(self.read(name, False).node for name in self.source.outputs)
        self.graph.output(outputs[0] if len(outputs) == 1 else outputs)
        self.graph.lint()
        return fx.GraphModule(self.root, self.graph, "JQuant").eval()

    # -- nodes

    def write_node(self, node: Node) -> None:
        op, first = self.in_first(node)
        if isinstance(op, ops.Permute) and first is not None:
            value, held = self.read(node.inputs[0], first), not first
        else:
            held = first is True
            shaped = [self.shape_of(name, i, node, held) for i, name in enumerate(node.inputs)]
            operands = [self.read(name, self.is_first(i, name, node, held)) for i, name in enumerate(node.inputs)]
            site = Site(
                shaped,
                [self.dtypes[name] for name in node.inputs],
                self.shapes[node.name],
                self.dtypes[node.name],
                self.constant,
                self.call,
            )
            value = torch_rule(op, site, *operands, **self.parameters(node))
            held = held and len(self.shapes[node.name]) >= 3
        if held:
            self.held.add(node.name)
        self.values[node.name, held] = self.tapped(node.name, value)

    def in_first(self, node: Node) -> tuple[Op, bool | None]:
        """The operator as it is on channels-first operands, and whether it is to be given such in place of the plan's.

        For a permutation that only changes the order: whether it reads what is held channels-first.
        """
        op, rank = node.op, len(self.shapes[node.name])
        if getattr(op, "channels_last", False):
            return replace(op, channels_last=False), True  # type: ignore[call-arg]
        held = [name in self.held for name in node.inputs]
        if isinstance(op, ops.Permute) and rank >= 3:
            if op.axes == (0, rank - 1, *range(1, rank - 1)) and held[0]:
                return op, True
            if op.axes == (0, *range(2, rank), 1) and not held[0]:
                return op, False
        alike = all(len(self.shapes[v]) == rank for v in node.inputs)
        if not any(held) or rank < 3:
            return op, None
        if op.layout == "elementwise" and alike:
            return op, True
        if op.layout == "axes" and alike:
            return _rotated_back(op, rank), True
        return op, None

    def is_first(self, i: int, name: str, node: Node, held: bool) -> bool:
        count = next((n for cls, n in _SPATIAL.items() if isinstance(node.op, cls)), len(node.inputs))
        return held and i < count and len(self.shapes[name]) >= 3

    def shape_of(self, name: str, i: int, node: Node, held: bool) -> tuple[int, ...]:
        shape = self.shapes[name]
        return (shape[0], shape[-1], *shape[1:-1]) if self.is_first(i, name, node, held) else shape

    def read(self, name: str, first: bool) -> fx.Proxy:
        """A value in the order of the plan, or with channels moved to axis 1."""
        if (name, first) not in self.values:
            rank = len(self.shapes[name])
            axes = [0, rank - 1, *range(1, rank - 1)] if first else [0, *range(2, rank), 1]
            self.values[name, first] = self.values[name, not first].permute(axes)
        return self.values[name, first]

    # -- what a rule may ask for

    def call(self, function: Any, *args: Any, **kwargs: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, args, kwargs)

    def constant(self, tensor: torch.Tensor) -> fx.Proxy:
        self.constants += 1
        return self.attribute(f"constant_{self.constants - 1}", tensor)

    def attribute(self, key: str, tensor: torch.Tensor, *, trainable: bool = False) -> fx.Proxy:
        """Registers a tensor under a dotted key, at a module of that path. A method of nn.Module keeps its name."""
        *path, last = (f"{part}_" if hasattr(torch.nn.Module, part) else part for part in key.split("."))
        module = self.root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = module.get_submodule(part)
        if hasattr(module, last):
            raise ConversionError(f"the key {key!r} is taken by a module or another parameter")
        if trainable:
            module.register_parameter(last, torch.nn.Parameter(tensor))
        else:
            module.register_buffer(last, tensor)
        return fx.Proxy(self.graph.create_node("get_attr", ".".join([*path, last])), self.tracer)

    def parameters(self, node: Node) -> dict[str, fx.Proxy]:
        return {role: self.parameter(key) for role, key in node.params.items()}

    def parameter(self, key: str) -> fx.Proxy:
        if key not in self.keys:
            trained = key not in self.statistics  # torch has no gradient of them
            self.keys[key] = self.attribute(key, _tensor(self.params[key]), trainable=trained)
        return self.keys[key]

    # -- quantization

    def tapped(self, name: str, value: fx.Proxy) -> fx.Proxy:
        """The value as its readers see it."""
        return value


class _QuantizedWriter(_Writer):
    """Records fake-quant: integers for weights, and a pair of operators behind every value with a scale of its own."""

    def __init__(self, plan: Plan, params: dict[str, Array], qparams: QParams) -> None:
        super().__init__(plan.graph, params)
        self.plan, self.qparams = plan, qparams
        self.scales = value_scales(plan, qparams)
        self.owned = set(plan.owned)

    def tapped(self, name: str, value: fx.Proxy) -> fx.Proxy:
        if name not in self.owned:
            return value
        spec = self.plan.spec(name)
        if spec.is_float:
            return value.clamp(-65504.0, 65504.0).to(torch.float16).to(torch.float32)
        grid = (float(np.float32(scale_of(name, self.plan, self.qparams))), 0, *spec.range, _dtype(spec))
        integers = self.call(torch.ops.quantized_decomposed.quantize_per_tensor.default, value, *grid)
        return self.call(torch.ops.quantized_decomposed.dequantize_per_tensor.default, integers, *grid)

    def parameters(self, node: Node) -> dict[str, fx.Proxy]:
        found = {}
        for role, key in node.params.items():
            found[role] = self.weight(key) if key in self.plan.weights else None
        weight = node.params.get("weight")
        for role, name in node.params.items():
            if role == "bias" and weight in self.plan.weights and self.scales[node.inputs[0]] is not None:
                found[role] = self.bias(node, name)
            elif found[role] is None:
                found[role] = self.parameter(name)
        return found

    def weight(self, key: str) -> fx.Proxy:
        if key in self.keys:
            return self.keys[key]
        spec, array = self.plan.weights[key], self.params[key]
        parameter = expand_weight(key, self.plan, self.qparams, array.ndim)
        quantizer = quantizer_of(spec)
        if spec.is_float:
            self.keys[key] = self.attribute(key, _tensor(quantizer(array, parameter, spec)))
            return self.keys[key]
        scale = quantizer.scale(parameter, spec)
        dtype = _dtype(spec)
        if quantizer.to_nearest:
            rounded = quantize(array, scale, spec.dtype, spec.rounding)
        else:
            rounded = np.rint(np.asarray(quantizer(array, parameter, spec)) / np.asarray(scale))
        integers = self.attribute(key, _tensor(rounded).to(dtype))
        if key not in self.plan.weight_axis:
            grid = (float(np.float32(scale.reshape(()))), 0, *spec.range, dtype)
            call = torch.ops.quantized_decomposed.dequantize_per_tensor.default
            self.keys[key] = self.call(call, integers, *grid)
            return self.keys[key]
        scales = self.attribute(f"{key}_scale", _tensor(scale.reshape(-1)))
        zeros = self.attribute(f"{key}_zero_point", torch.zeros(scale.size, dtype=torch.int64))
        call = torch.ops.quantized_decomposed.dequantize_per_channel.default
        axis = self.plan.weight_axis[key]
        self.keys[key] = self.call(call, integers, scales, zeros, axis, *spec.range, dtype)
        return self.keys[key]

    def bias(self, node: Node, key: str) -> fx.Proxy:
        """On the grid of the accumulator; a bias that another node reads at another scale gets a key of its own."""
        x_scale = self.scales[node.inputs[0]]
        assert x_scale is not None
        scale = derived_scale(node.op, x_scale, weight=scale_of(node.params["weight"], self.plan, self.qparams))
        on_grid = _tensor(dequantize(quantize(self.params[key], scale, _BIAS.dtype), scale))
        taken = key in self.keys
        proxy = self.attribute(f"{node.name}.bias_on_grid" if taken else key, on_grid)
        self.keys.setdefault(key, proxy)
        return proxy


def _rotated_back(op: Op, rank: int) -> Op:
    """The operator that `to_channels_last` made this one from. It turns the axes after the first by one place."""
    for _ in range(rank - 2):
        turned = to_channels_last(op, rank)
        assert turned is not None
        op = turned
    return op


def _dtype(spec: QuantSpec) -> torch.dtype:
    return _DTYPES["uint8" if spec.dtype == "uint8" else storage_dtype(spec.dtype)]


def _tensor(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(array))
