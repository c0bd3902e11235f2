"""`model_from_torch`: quantized torch models as calibrated models: PT2E programs, fake-quantized and converted modules.

What is read are torch's own forms: quantize and dequantize of `quantized_decomposed` (PT2E of torchao), FakeQuantize
modules, the modules of `torch.ao.nn.quantized` (eager and fx), and weights of torchao's tensor classes. They become a
float graph with a pair at each value that is rounded, written as a QDQ model, which `model_from_onnx` reads.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import torch

import jquant.ops as ops
from jquant.types import Array, ConversionError, FrozenMap, Graph, Model, Node, Target

from .aten.quantized import Pair
from .file_names import naming
from .files import read_exported
from .foreign import ZeroPoint
from .foreign.pairs import Encoding, pairs_at, with_pairs
from .onnx_export import to_onnx
from .onnx_import import read
from .onnx_plan import model_from_imported
from .torch_import import import_with_pairs
from .torch_modules import plain_modules

Weights = dict[tuple[tuple[int, ...], bytes], Encoding]  # by shape and bytes of the dequantized weight


def model_from_torch(
    module: Any,
    example_inputs: Any = None,
    *,
    target: Target,
    zero_point: ZeroPoint = "refuse",
    batches: Iterable[Any] | None = None,
    dynamic_batch: bool = True,
) -> Model:
    """Imports a quantized torch model with its scales.

    Args:
      module, example_inputs, dynamic_batch: as for `from_torch`: an ExportedProgram of torchao's `convert_pt2e`, the
        path of one as a `.pt2` file, or a module with FakeQuantize modules, with modules of `torch.ao.nn.quantized`, or
        with weights of torchao's classes, such as Int8Tensor.
      target, zero_point, batches: as for `model_from_onnx`. Where only weights are quantized, the values are int8 and
        are calibrated on `batches`, or by `calibrate_missing` later.

    Returns:
      The model. Values have the names of torch's modules, weights their state-dict keys.

    Raises:
      ConversionError: what `from_torch` and `model_from_onnx` refuse, and a model without any scales.

    Example:
      program = torch.export.export(convert_pt2e(prepared), (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
      model = model_from_torch(program, target=jq.targets.NASH_E)
    """
    if isinstance(module, str | os.PathLike):
        with naming(module):
            program = read_exported(module)
            options: Any = {"zero_point": zero_point, "batches": batches, "dynamic_batch": dynamic_batch}
            return model_from_torch(program, example_inputs, target=target, **options)
    weights: Weights = {}
    if isinstance(module, torch.nn.Module):
        module = plain_modules(module, lambda tensor, grid: weights.update({_content(tensor): grid}))
    elif isinstance(module, torch.export.ExportedProgram):
        weights = dict(_weights_of(module))
    graph, params = import_with_pairs(module, example_inputs, dynamic_batch=dynamic_batch)
    graph, params = _named_as_trained(graph, params)
    grids = {key: grid for key, array in params.items() if (grid := weights.get(_content(array))) is not None}
    pairs = {node.name: _encoding(node.op) for node in graph.nodes if isinstance(node.op, Pair)}
    if not grids and not pairs:
        raise ConversionError("the model has no scales: from_torch reads float models; then calibrate")
    imported = read(_qdq(graph, params, grids, pairs), None, zero_point)
    return model_from_imported(replace(imported, dynamic=not pairs), target, batches)


def _qdq(
    graph: Graph, params: Mapping[str, Array], grids: Mapping[str, Encoding], pairs: Mapping[str, Encoding]
) -> onnx.ModelProto:
    nodes = tuple(replace(n, op=ops.Requantize()) if isinstance(n.op, Pair) else n for n in graph.nodes)
    model = with_pairs(to_onnx(replace(graph, nodes=nodes), params), grids, "the model")
    return pairs_at(model, pairs)


def _encoding(op: Any) -> Encoding:
    """A range that is not of a whole number of bits is that of the next, cut."""
    return Encoding(np.asarray(op.scale, np.float32), np.asarray(op.zero - op.low), 0, None, (op.low, op.high, op.zero))


def _content(array: Any) -> tuple[tuple[int, ...], bytes]:
    found = np.ascontiguousarray(np.asarray(array.detach() if isinstance(array, torch.Tensor) else array, np.float32))
    return tuple(found.shape), found.tobytes()


def _named_as_trained(graph: Graph, params: Mapping[str, Array]) -> tuple[Graph, dict[str, Array]]:
    """Weights under the name that they had before: torch keeps the float ones too, and never reads them."""
    new: dict[str, str] = {}
    for key in params:
        stem, _, number = key.rpartition("_")
        new[key] = stem if number.isdigit() and stem and stem not in params and stem not in new.values() else key
    names: dict[str, str] = {}
    for node in graph.nodes:  # a layer with its rounding is a module of two calls, and has the name of the module
        path = new.get(node.params.get("weight", ""), "").removesuffix(".weight")
        if path and node.name.startswith(f"{path}.") and path not in {*graph.values, *names.values()}:
            names[node.name] = path
    nodes: tuple[Node, ...] = tuple(
        replace(
            n,
            name=names.get(n.name, n.name),
            inputs=tuple(names.get(v, v) for v in n.inputs),
            params=FrozenMap({role: new[key] for role, key in n.params.items()}),
        )
        for n in graph.nodes
    )
    outputs = tuple(names.get(v, v) for v in graph.outputs)
    return replace(graph, nodes=nodes, outputs=outputs), {new[key]: value for key, value in params.items()}


def _weights_of(program: Any) -> Iterator[tuple[tuple[tuple[int, ...], bytes], Encoding]]:
    """The constants of a program that are dequantized."""
    stored = {
        spec.arg.name: program.state_dict.get(spec.target, program.constants.get(spec.target))
        for spec in program.graph_signature.input_specs
        if spec.target is not None
    }

    def value(argument: Any) -> Any:
        return stored.get(argument.name) if isinstance(argument, torch.fx.Node) else argument

    for node in program.graph.nodes:
        name = str(node.target)
        if node.op != "call_function" or not name.startswith("quantized_decomposed.dequantize"):
            continue
        integers = value(node.args[0])
        if not isinstance(integers, torch.Tensor):
            continue
        arguments = [value(a) for a in node.args]
        if "per_channel" in name and "group" not in name:
            scales, zeros, axis, low, high = arguments[1:6]
        elif "per_tensor" in name:
            (scales, zeros), axis, (low, high) = arguments[1:3], None, arguments[3:5]
        else:
            raise ConversionError(f"{name} of a weight; per tensor and per channel can be read")
        real = node.target(*arguments, **{k: value(v) for k, v in node.kwargs.items()})
        yield _content(real), weight_grid(scales, zeros, axis, int(low), int(high))


def weight_grid(scales: Any, zeros: Any, axis: int | None, low: int, high: int) -> Encoding:
    """The grid of a weight whose integers go from `low` to `high`."""
    bits = next((b for b in (4, 8, 16) if -(2 ** (b - 1)) <= low and high < 2 ** (b - 1)), 8)
    steps, points = np.asarray(scales, np.float64).astype(np.float32), np.asarray(0 if zeros is None else zeros)
    lowest = -(2 ** (bits - 1)) if low < 0 else 0
    return Encoding(steps, (points - lowest).astype(np.int64), bits, axis)
