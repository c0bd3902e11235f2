"""A torch module to an exported program, undecomposed, with a symbolic batch."""

from __future__ import annotations

import copy
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from jquant.types import ConversionError

from .exact import DTYPES

OTHER_FLOATS = (torch.float16, torch.bfloat16, torch.float64)  # which are read as float32
_QUANTIZED = ("torch.ao.nn.quantized", "torch.nn.quantized", "torch.ao.nn.intrinsic.quantized")
_FLOAT = ("FloatFunctional", "FXFloatFunctional")  # float modules that torch keeps in a package of _QUANTIZED


def check_arguments(example_inputs: Any, dynamic_batch: bool, axis: int = 0) -> tuple[Any, ...]:
    """The arguments as fresh tensors, with a batch of 1 along `axis` repeated: torch.export specialises 1."""
    arguments = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else tuple(example_inputs)
    leaves = pytree.tree_leaves(arguments)
    if not leaves:
        raise ConversionError("example_inputs is empty; pass the forward's arguments, such as (x,)")
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, torch.Tensor):
            if hasattr(leaf, "dtype") and hasattr(leaf, "shape"):
                raise ConversionError(
                    f"example input {i} is a {type(leaf).__name__}; give it as torch.from_numpy(array)"
                )
            if isinstance(example_inputs, Mapping):
                names = ", ".join(map(repr, example_inputs))
                raise ConversionError(
                    f"example inputs go by position: a tuple in the order of the forward, not a mapping of {names}"
                )
            if all(isinstance(n, int) for n in leaves):
                raise ConversionError(f"example inputs are tensors, not a shape: (torch.zeros{tuple(leaves)},)")
            raise ConversionError(f"example input {i} is {leaf!r}, not a tensor; wrap the module to fix this argument")
        if leaf.is_nested or leaf.layout != torch.strided or is_traceable_wrapper_subclass(leaf):
            kind = "nested" if leaf.is_nested else type(leaf).__name__ if leaf.layout == torch.strided else leaf.layout
            raise ConversionError(f"example input {i} is no plain tensor but {kind}; make it dense before the model")
        if leaf.dtype not in DTYPES and leaf.dtype not in OTHER_FLOATS:
            raise ConversionError(f"example input {i} is {leaf.dtype}; convert it to float32 before the model")
    if dynamic_batch:
        if axis < 0:
            raise ConversionError(f"batch_axis={axis}; count the axes of the inputs from the front")
        batches = sorted({leaf.shape[axis] if leaf.ndim > axis else None for leaf in leaves}, key=str)
        if len(batches) > 1 or batches[0] in (None, 0):
            shapes = ", ".join(str(list(leaf.shape)) for leaf in leaves)
            raise ConversionError(
                f"axis {axis} of every input must be one batch, the example inputs have shapes {shapes}; "
                "give them equal batches, or pass dynamic_batch=False to fix all shapes"
            )
    repeats = 2 if dynamic_batch and leaves[0].shape[axis] == 1 else 1
    return pytree.tree_map(lambda x: _fresh(x, repeats, axis), arguments)


def _fresh(x: torch.Tensor, repeats: int, axis: int) -> torch.Tensor:
    fresh = torch.cat([x.detach()] * repeats, axis) if x.ndim > axis else x.detach().clone()
    return fresh.float() if x.dtype in OTHER_FLOATS else fresh


def in_float32(module: torch.nn.Module) -> torch.nn.Module:
    """The module, or a copy of it in float32 where a parameter or buffer has another float dtype.

    Raises:
      ConversionError: a module that cannot be copied.
    """
    others = [(key, x.dtype) for key, x in _tensors(module) if x.dtype in OTHER_FLOATS]
    if not others:
        return module
    try:
        return copy.deepcopy(module).float()
    except Exception as error:  # whatever the model's own code raises
        raise ConversionError(
            f"parameter {others[0][0]!r} is {others[0][1]}, and {type(module).__name__} cannot be copied to "
            f"float32 ({_first_line(error)}); convert it with module.float() first"
        ) from error


def _tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def check_dtypes(module: torch.nn.Module) -> None:
    """Raises ConversionError for parameters that are no plain real numbers, and for modules of integers."""
    for name, inner in module.named_modules():
        called = f"module {name!r}" if name else "the model"
        if type(inner).__module__.startswith(_QUANTIZED) and type(inner).__name__ not in _FLOAT:
            raise ConversionError(
                f"{called} is a {type(inner).__module__}.{type(inner).__name__}, which computes on integers of torch's "
                "own. Import the float model, and quantize it with jq.prepare"
            )
        if isinstance(inner, torch.jit.ScriptModule):
            raise ConversionError(f"{called} is TorchScript, which torch.export does not take; import its nn.Module")
    for key, tensor in _tensors(module):
        check_plain(key, tensor)
        known = tensor.dtype in (torch.float32, *OTHER_FLOATS)
        if (tensor.is_floating_point() or tensor.is_complex()) and not known:
            raise ConversionError(f"parameter {key!r} is {tensor.dtype}; convert the model with module.float() first")


def check_plain(key: str, tensor: torch.Tensor) -> None:
    """Raises ConversionError for a tensor without plain numbers: of another tool's class, sparse, on "meta"."""
    if is_traceable_wrapper_subclass(tensor):
        raise ConversionError(
            f"parameter {key!r} is a {type(tensor).__name__}, a tensor class of another tool. Import the model before "
            "that tool changed it, or put plain weights back: layer.weight = torch.nn.Parameter(weight.dequantize())"
        )
    if tensor.is_quantized or tensor.layout != torch.strided:
        kind = "quantized" if tensor.is_quantized else str(tensor.layout)
        raise ConversionError(f"parameter {key!r} is {kind}; make it a plain tensor, with .dequantize() or .to_dense()")
    if tensor.device.type == "meta":
        raise ConversionError(f"parameter {key!r} is on the meta device and has no numbers; load the weights before")
    if isinstance(tensor, torch.nn.parameter.UninitializedTensorMixin):
        raise ConversionError(f"parameter {key!r} of a lazy module has no shape yet; call the module once before")


def check_exported(program: Any, dynamic_batch: bool, batch_axis: int = 0) -> None:
    """An exported program has one batch axis, the same of every input, and no other axis of unknown size."""
    known = {spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"}
    symbols = set()
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op != "placeholder" or node.name not in known or not isinstance(value, torch.Tensor):
            continue
        if value.dtype not in DTYPES:
            raise ConversionError(f"input {node.name!r} is {value.dtype}; export the model with float32")
        unknown = [axis for axis, n in enumerate(value.shape) if not isinstance(n, int)]
        if any(axis != batch_axis for axis in unknown) or (unknown and not dynamic_batch):
            raise ConversionError(
                f"input {node.name!r} has axes {unknown} of unknown size; only axis {batch_axis}, the batch, may be "
                "one: export the program with dynamic_shapes of that alone, or give another batch_axis"
            )
        symbols |= {str(value.shape[axis]) for axis in unknown}
    if len(symbols) > 1:
        raise ConversionError(f"the inputs have different batches, {', '.join(sorted(symbols))}; give them one Dim")


def export(module: torch.nn.Module, arguments: tuple[Any, ...], dynamic_batch: bool, batch_axis: int = 0) -> Any:
    try:
        return _trace(module, arguments, dynamic_batch, batch_axis)
    except Exception as error:  # torch.export raises a dozen types, and whatever the model's own code raises
        where, message = _user_line(error), _first_line(error)
        if dynamic_batch and _traces(module, arguments):
            if (place := _exported_part(module)) is not None:
                raise ConversionError(
                    f"the batch axis cannot stay symbolic: {place} is an exported program with a fixed batch. Export "
                    "it with dynamic_shapes=({0: torch.export.Dim('batch')},), or pass dynamic_batch=False"
                ) from error
            raise ConversionError(
                f"the batch axis cannot stay symbolic: the model works for some batch sizes only{where} ({message}). "
                f"Use flatten(1) or sizes taken from the input, {_other_axis(module, arguments, batch_axis)}"
                "or pass dynamic_batch=False to fix the batch"
            ) from error
        raise ConversionError(
            f"torch.export cannot trace {type(module).__name__}{where}: {message}. The forward must run on the example "
            "inputs and must not branch on tensor values: use torch.where, or import the parts around the branch"
        ) from error


def _other_axis(module: torch.nn.Module, arguments: tuple[Any, ...], batch_axis: int) -> str:
    """The advice for a model whose layers have the batch on axis 1."""
    kinds = (torch.nn.RNNBase, torch.nn.MultiheadAttention, torch.nn.Transformer)
    time_first = any(isinstance(m, kinds) and not m.batch_first for m in module.modules())
    return "batch_axis=1 for inputs [T, N, ...] of a time-first model, " if time_first and not batch_axis else ""


def _trace(module: torch.nn.Module, arguments: tuple[Any, ...], dynamic_batch: bool, batch_axis: int = 0) -> Any:
    shapes = torch.export.ShapesCollection()
    batch = torch.export.Dim("batch")
    for leaf in pytree.tree_leaves(arguments) if dynamic_batch else ():
        shapes[leaf] = {batch_axis: batch}
    with warnings.catch_warnings(), torch.no_grad(), without_fast_paths():
        warnings.simplefilter("ignore")
        return torch.export.export(module, arguments, dynamic_shapes=shapes if dynamic_batch else None, strict=False)


@contextmanager
def without_fast_paths() -> Iterator[None]:
    """nn.TransformerEncoderLayer as operators, instead of as one that no backend but torch's own has."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _traces(module: torch.nn.Module, arguments: tuple[Any, ...]) -> bool:
    try:
        _trace(module, arguments, dynamic_batch=False)
    except Exception:
        return False
    return True


def _exported_part(module: torch.nn.Module) -> str | None:
    """Where a model holds an exported program, or the module of one; None: nowhere."""
    for name, inner in module.named_modules():
        place = f"module {name!r}" if name else "the model"
        if isinstance(inner, torch.fx.GraphModule):
            return place
        held = [key for key, v in vars(inner).items() if isinstance(v, torch.export.ExportedProgram)]
        if held:
            return f"the attribute {held[0]!r} of {place}"
    return None


def _user_line(error: BaseException | None) -> str:
    """The last line of the model's own code in the tracebacks of an error and its causes."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    while error is not None:
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            if not frame.filename.startswith(ours) and Path(frame.filename).is_file():
                return f" at {frame.filename}:{frame.lineno} `{frame.line}`"
            if frame.filename == __file__ and frame.name == "_trace":
                break  # what lies before is the caller of from_torch
        error = error.__cause__ or error.__context__
    return ""


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    if lines[0].startswith("Constraints violated"):  # what was violated is in the next line
        lines = lines[1:2] or lines
    return f"{type(error).__name__}: {lines[0][:300]}".rstrip(".")
