"""Modules of torch's quantization, as float modules whose values go through fake-quantization."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed
from torch import nn

from jquant.types import ConversionError

from .foreign.pairs import Encoding

Note = Callable[[torch.Tensor, Encoding], None]
_RANGES = {torch.quint8: (0, 255), torch.qint8: (-128, 127), torch.uint8: (0, 255), torch.int8: (-128, 127)}


class Rounded(nn.Module):
    """Values rounded to a grid, as torch.ao.nn.quantized has them behind each operator."""

    def __init__(self, scale: float, zero: int, low: int, high: int) -> None:
        super().__init__()
        self.scale, self.zero, self.low, self.high = scale, zero, low, high

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rounded(x, self.scale, self.zero, self.low, self.high)


def rounded(x: torch.Tensor, scale: float, zero: int, low: int, high: int) -> torch.Tensor:
    """The pair of PT2E, which torch.export takes; it has no rule for the shape of fake_quantize_per_tensor_affine."""
    grid, dtype = (float(scale), int(zero), low, high), torch.uint8 if low >= 0 else torch.int8
    integers = torch.ops.quantized_decomposed.quantize_per_tensor(x, *grid, dtype)
    found: torch.Tensor = torch.ops.quantized_decomposed.dequantize_per_tensor(integers, *grid, dtype)
    return found


def plain_modules(module: nn.Module, note: Note) -> nn.Module:
    """A copy of a module in float modules; `note(weight, grid)` is called for each weight that is on a grid.

    Raises:
      ConversionError: modules and tensors that are not known, all of them by name.
    """
    unknown: list[str] = []
    module = _copied(module)
    if isinstance(module, torch.fx.GraphModule):
        _plain_calls(module, unknown)
    module = _plain(module, "", note, unknown)
    if unknown:
        raise ConversionError(
            "jquant cannot import:\n  "
            + "\n  ".join(unknown)
            + "\nConvert the model by PT2E (torchao.quantization.pt2e), "
            "whose programs model_from_torch reads, or import the float model and calibrate it"
        )
    return module


def _copied(module: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(module)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise ConversionError(f"the module cannot be copied: {error}") from error


def _plain(module: nn.Module, path: str, note: Note, unknown: list[str]) -> nn.Module:
    made = _converted(module, path, note, unknown)
    if made is not None:
        return made
    for name, child in list(module.named_children()):
        setattr(module, name, _plain(child, f"{path}.{name}" if path else name, note, unknown))
    for name, parameter in list(module.named_parameters(recurse=False)):
        if type(parameter.data).__module__.startswith("torchao") or type(parameter).__module__.startswith("torchao"):
            _plain_weight(module, name, path, note, unknown)
    return module


def _plain_weight(module: nn.Module, name: str, path: str, note: Note, unknown: list[str]) -> None:
    """A weight of a tensor class of torchao, as the reals that it stands for."""
    tensor: Any = getattr(module, name)
    inner = getattr(tensor, "original_weight_tensor", tensor)
    real = inner.dequantize().detach().to(torch.float32)
    parts = [inner, getattr(inner, "tensor_impl", None)]
    integers = next((getattr(p, a) for p in parts for a in ("qdata", "int_data") if hasattr(p, a)), None)
    scale = next((p.scale for p in parts if getattr(p, "scale", None) is not None), None)
    zero = next((p.zero_point for p in parts if getattr(p, "zero_point", None) is not None), None)
    whole = isinstance(integers, torch.Tensor) and integers.dtype == torch.int8 and integers.shape == real.shape
    steps = None if scale is None else scale.detach().to(torch.float32).reshape(-1)
    by_channel = steps is not None and steps.numel() in (1, real.shape[0])
    if not whole or not by_channel or steps is None or (zero is not None and bool((zero != 0).any())):
        unknown.append(
            f"{path}.{name}: a {type(inner).__name__}; int8 with one symmetric scale for each channel can be read"
        )
        return
    axis = 0 if steps.numel() > 1 else None
    setattr(module, name, nn.Parameter(real, requires_grad=False))
    grid = Encoding(steps.numpy().reshape(-1 if axis == 0 else ()), np.asarray(128), 8, axis)
    note(real, grid)


# ---------------------------------------------------------------------------------------------------------------------
# torch.ao.nn.quantized


def _converted(module: nn.Module, path: str, note: Note, unknown: list[str]) -> nn.Module | None:
    """The float twin of a quantized module, None for a module that is not of torch's quantization."""
    kind, place = type(module).__name__, type(module).__module__
    if place.startswith("torch.ao.quantization.fake_quantize"):
        return _fake_quantized(module, path, unknown)
    if place.startswith("torch.ao.quantization.observer"):
        return nn.Identity()
    if place.startswith("torch.ao.nn.quantizable") or not place.startswith(("torch.ao.nn.", "torch.nn.quantized")):
        return None
    given: Any = module
    if ".qat." in place and kind in _LAYERS and hasattr(given, "weight_fake_quant"):
        layer = _trained(given, kind, note)
        return _behind(layer, True, nn.Identity()) if "ReLU" in kind else layer
    if ".qat." in place:
        unknown.append(f"{path}: {place}.{kind}; convert the model first (torch.ao.quantization.convert)")
        return module
    if ".reference" in place:
        return _reference(given, kind, path, note, unknown)
    if kind == "Quantize":
        low, high = _RANGES[given.dtype]
        return Rounded(float(given.scale), int(given.zero_point), low, high)
    if kind in ("DeQuantize", "DeQuantStub"):
        return nn.Identity()
    if kind in _LAYERS:
        return _layer(given, kind, note)
    if kind in _FUNCTIONS:
        return nn.Sequential(_FUNCTIONS[kind](given), Rounded(float(given.scale), int(given.zero_point), 0, 255))
    if kind in ("QFunctional", "FloatFunctional", "FXFloatFunctional"):
        return _Functional(given) if kind == "QFunctional" else None
    if kind == "Dropout":
        return nn.Identity()
    if ".intrinsic." in place:
        unknown.append(f"{path}: {place}.{kind}; convert the model first (torch.ao.quantization.convert)")
        return module
    if "quantized" in place and next(module.children(), None) is None:
        unknown.append(f"{path}: {place}.{kind}")
        return module
    return None


_LAYERS = {
    "Conv1d": nn.Conv1d, "Conv2d": nn.Conv2d, "Conv3d": nn.Conv3d, "Linear": nn.Linear, "ConvReLU1d": nn.Conv1d,
    "ConvReLU2d": nn.Conv2d, "ConvReLU3d": nn.Conv3d, "LinearReLU": nn.Linear, "ConvTranspose2d": nn.ConvTranspose2d,
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[[Any], nn.Module]] = {
    "Hardswish": lambda m: nn.Hardswish(),
    "LeakyReLU": lambda m: nn.LeakyReLU(float(m.negative_slope)),
    "Sigmoid": lambda m: nn.Sigmoid(),
    "ELU": lambda m: nn.ELU(float(m.alpha)),
}


def _fake_quantized(module: Any, path: str, unknown: list[str]) -> nn.Module:
    """A FakeQuantize of a value; switched off, it does nothing."""
    if not bool(module.fake_quant_enabled[0]):
        return nn.Identity()
    if module.scale.numel() != 1:
        unknown.append(f"{path}: a {type(module).__name__} of a value by channel; values have one scale")
        return nn.Identity()
    observer = module.activation_post_process
    return Rounded(float(module.scale), int(module.zero_point), int(observer.quant_min), int(observer.quant_max))


def _trained(module: Any, kind: str, note: Note) -> nn.Module:
    """A layer of torch.ao.nn.qat: its weight as its FakeQuantize rounds it."""
    rounding = module.weight_fake_quant
    weight, scale = module.weight.detach(), rounding.scale.detach().to(torch.float32)
    points, ends = rounding.zero_point.detach(), (int(rounding.quant_min), int(rounding.quant_max))
    axis = int(rounding.ch_axis) if scale.numel() > 1 else None
    if axis is None:
        real = torch.fake_quantize_per_tensor_affine(weight, float(scale), int(points), *ends)
    else:
        real = torch.fake_quantize_per_channel_affine(weight, scale, points.to(torch.int32), axis, *ends)
    made = _float_layer(module, kind, real, module.bias)
    steps = scale.numpy().reshape(-1 if axis is not None else ())
    note(made.weight, Encoding(steps, points.numpy().astype(np.int64).reshape(steps.shape) + 128, 8, axis))
    return made


def _reference(module: Any, kind: str, path: str, note: Note, unknown: list[str]) -> nn.Module:
    """A layer of torch's reference form: a float one whose weight is rounded; its values have pairs around them."""
    if kind not in _LAYERS or not hasattr(module, "get_quantized_weight"):
        unknown.append(f"{path}: torch.ao.nn.quantized.reference.{kind}")
        return nn.Identity()
    packed = module.get_quantized_weight()
    made = _float_layer(module, kind, packed.dequantize().detach(), module.bias)
    if packed.is_quantized:
        note(made.weight, _grid_of(packed))
    return made


def _float_layer(module: Any, kind: str, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    if kind.startswith("Linear"):
        made: Any = nn.Linear(module.in_features, module.out_features, bias=bias is not None)
    else:
        names = ("stride", "padding", "dilation", "groups") + (("output_padding",) if "Transpose" in kind else ())
        made = _LAYERS[kind](
            module.in_channels, module.out_channels, module.kernel_size, bias=bias is not None,
            padding_mode=module.padding_mode, **{name: getattr(module, name) for name in names},
        )  # fmt: skip
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    result: nn.Module = made
    return result


def _layer(module: Any, kind: str, note: Note) -> nn.Module:
    """A convolution or linear layer with the weight that its integers stand for, and the rounding behind it."""
    packed, bias = module.weight(), module.bias()
    made = _float_layer(module, kind, packed.dequantize().detach(), bias)
    note(made.weight, _grid_of(packed))
    return _behind(made, "ReLU" in kind, Rounded(float(module.scale), int(module.zero_point), 0, 255))


class _Behind(nn.Module):
    """A layer with what torch's quantized layer does behind it; it keeps the names of the parameters."""

    relu: bool
    rounding: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        found: torch.Tensor = self.rounding(torch.relu(y) if self.relu else y)
        return found


def _behind(layer: nn.Module, relu: bool, rounding: nn.Module) -> nn.Module:
    layer.__class__ = type(f"Rounded{type(layer).__name__}", (_Behind, type(layer)), {})
    layer.relu, layer.rounding = relu, rounding
    return layer


def _grid_of(packed: torch.Tensor) -> Encoding:
    """The grid of a tensor of torch's quantized dtypes."""
    if packed.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric):
        scales, zeros, axis = (
            packed.q_per_channel_scales(),
            packed.q_per_channel_zero_points(),
            packed.q_per_channel_axis(),
        )
        points = zeros.numpy().astype(np.int64)
    else:
        scales, axis, points = torch.tensor(packed.q_scale()), None, np.asarray(packed.q_zero_point())
    return Encoding(scales.to(torch.float32).numpy(), points + 128, 8, axis)


class _Functional(nn.Module):
    """A QFunctional: the same calls, each rounded."""

    def __init__(self, given: Any) -> None:
        super().__init__()
        self.rounded = Rounded(float(given.scale), int(given.zero_point), 0, 255)

    def add(self, x: Any, y: Any) -> Any:
        return self.rounded(x + y)

    def add_relu(self, x: Any, y: Any) -> Any:
        return self.rounded(torch.relu(x + y))

    def mul(self, x: Any, y: Any) -> Any:
        return self.rounded(x * y)

    def add_scalar(self, x: Any, y: float) -> Any:
        return x + y

    def mul_scalar(self, x: Any, y: float) -> Any:
        return x * y

    def matmul(self, x: Any, y: Any) -> Any:
        return self.rounded(torch.matmul(x, y))

    def cat(self, x: Any, dim: int = 0) -> Any:
        return self.rounded(torch.cat(x, dim))


# ---------------------------------------------------------------------------------------------------------------------
# fx graphs


def _plain_calls(module: torch.fx.GraphModule, unknown: list[str]) -> None:
    """Calls of torch.ops.quantized, quantize_per_tensor and dequantize, as calls on reals."""
    quantized = torch.ops.quantized
    binary: dict[Any, Callable[..., Any]] = {
        quantized.add: lambda x, y: x + y,
        quantized.mul: lambda x, y: x * y,
        quantized.add_relu: lambda x, y: torch.relu(x + y),
        quantized.mul_relu: lambda x, y: torch.relu(x * y),
        quantized.matmul: torch.matmul,
        quantized.cat: torch.cat,
    }
    unary: dict[Any, Callable[..., Any]] = {
        quantized.hardswish: nn.functional.hardswish,
        quantized.sigmoid: torch.sigmoid,
        quantized.leaky_relu: nn.functional.leaky_relu,
    }
    for node in list(module.graph.nodes):
        if node.op == "call_method" and node.target == "dequantize":
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
        elif node.op == "call_function" and node.target is torch.quantize_per_tensor:
            x, scale, zero, dtype = (_attribute(module, a) for a in node.args[:4])
            with module.graph.inserting_before(node):
                new = module.graph.call_function(rounded, (x, float(scale), int(zero), *_RANGES[dtype]))
            node.replace_all_uses_with(new)
            module.graph.erase_node(node)
        elif node.op == "call_function" and node.target in (*binary, *unary):
            _replace_call(module, node, {**binary, **unary}[node.target])
        elif node.op == "call_function" and str(node.target).startswith("quantized."):
            unknown.append(f"{node.name}: torch.ops.{node.target}")
    module.graph.eliminate_dead_code()
    module.recompile()


def _replace_call(module: torch.fx.GraphModule, node: Any, function: Callable[..., Any]) -> None:
    """`function(*operands)`, rounded with the scale and zero point that come last."""
    arguments = list(node.args) + list(node.kwargs.values())
    *given, scale, zero = (_attribute(module, a) for a in arguments)
    with module.graph.inserting_before(node):
        real = module.graph.call_function(function, tuple(given))
        new = module.graph.call_function(rounded, (real, float(scale), int(zero), 0, 255))
    node.replace_all_uses_with(new)
    module.graph.erase_node(node)


def _attribute(module: nn.Module, argument: Any) -> Any:
    """A scale that fx has as a buffer, as a number."""
    if isinstance(argument, torch.fx.Node) and argument.op == "get_attr":
        found: Any = module
        for part in str(argument.target).split("."):
            found = getattr(found, part)
        return found.item() if isinstance(found, torch.Tensor) and found.numel() == 1 else argument
    return argument
