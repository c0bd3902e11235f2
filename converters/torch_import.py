"""`from_torch`: an nn.Module to a Graph and its params, through an undecomposed `torch.export`."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch

from jquant.host.progress import stages
from jquant.types import Array, ConversionError, Graph

from .aten.quantized import Pair
from .batch_axis import batch_first
from .batch_sizes import check_batch_sizes
from .branches import leave_dropout_to_training, same_calls, seen_training_flags, set_branches
from .export import check_arguments, check_dtypes, check_exported, export, in_float32
from .file_names import naming
from .files import read_exported
from .functional import without_changes_in_place
from .habits import visible_habits
from .naming import name_graph
from .promotion import with_conversions
from .reader import Reader

_STAGES = ("torch.export", "operators", "other batch sizes")


def from_torch(
    module: Any,
    example_inputs: Any = None,
    *,
    dynamic_batch: bool = True,
    batch_axis: int = 0,
    train_branch: bool = False,
    check: bool = True,
) -> tuple[Graph, dict[str, Array]]:
    """Imports a torch module in eval mode.

    Code that asks `self.training` is imported with False, the branch that is deployed. If the module is in training
    mode and the other branch does something else, a warning says where; `train_branch=True` imports that one, and
    `jq.analysis.graph_difference` compares the two.

    A model in float16, bfloat16 or float64 is imported as float32: its parameters are converted in a copy, and no
    rounding to its own dtype is part of the graph. A None in the result stays where the model has it.

    Where the module has QuantStub or DeQuantStub modules (any class of that name), they become nodes of the graph, and
    `prepare` quantizes what lies between them and nothing else. A FloatFunctional (any class of that name) gives its
    name to the call that it makes; one that is called at several places is reported by a warning, since every call has
    a scale of its own here.

    Args:
      module: any `torch.nn.Module` that `torch.export` can trace; its training flags are left as they were. Or an
        `ExportedProgram` of one in eval mode, or the path of a `.pt2` file of such; stubs leave no trace in these.
      example_inputs: the positional arguments of its forward, tensors of any batch, such as `(x,)`. Integers (token
        ids, indices), masks and uint8 pixels become exact inputs of dtype int32, bool and uint8; floats of any width
        are float32. An exported program has its own.
      dynamic_batch: axis 0 of every input is a batch of any size; False fixes all shapes to the example. An exported
        program must have been exported that way.
      batch_axis: the axis that is the batch in every input of the model, such as 1 of a time-first LSTM [T, N, C]. The
        graph has the batch in front all the same: it takes [N, T, C], and moves the batch of each result to axis 0.
      train_branch: `self.training` is True in the model's own modules. Those of torch stay in eval mode: batch norm and
        dropout are trained as `prepare(batch_norm=...)` and the PRNG key of `apply_train` say.
      check: with a free batch, compares what torch.export traced with the module for 1 and for 3 examples; an exported
        program has nothing to be compared with, and a training branch may be random.

    Returns:
      The graph, with nodes named by module path and the framework's NCHW layout, and {state-dict key: float32 array}.

    Raises:
      ConversionError: the model cannot be traced, uses operators jquant lacks (all are listed), has bad parameters, or
        a branch on the number of examples.
      FormatError: a file that is not an exported program, or that would run code when it is read.
    """
    graph, params = import_with_pairs(
        module,
        example_inputs,
        dynamic_batch=dynamic_batch,
        batch_axis=batch_axis,
        train_branch=train_branch,
        check=check,
    )
    if any(isinstance(node.op, Pair) for node in graph.nodes):
        raise ConversionError(
            "the model is quantized: jquant_converters.model_from_torch(model, target=...) reads it with its scales"
        )
    return graph, params


def import_with_pairs(
    module: Any,
    example_inputs: Any = None,
    *,
    dynamic_batch: bool = True,
    batch_axis: int = 0,
    train_branch: bool = False,
    check: bool = True,
) -> tuple[Graph, dict[str, Array]]:
    """As `from_torch`, with a node for each value that the model quantizes."""
    if isinstance(module, str | os.PathLike):
        with naming(module):
            program = read_exported(module)
            return import_with_pairs(program, example_inputs, dynamic_batch=dynamic_batch, batch_axis=batch_axis)
    if batch_axis and not dynamic_batch:
        raise ConversionError(f"batch_axis={batch_axis} is the axis that stays free, and dynamic_batch=False fixes all")
    if isinstance(module, torch.export.ExportedProgram):
        if example_inputs is not None:
            raise ConversionError("an exported program has its own example inputs; leave example_inputs out")
        check_exported(module, dynamic_batch, batch_axis)
        reader, program = _read(batch_first(module, batch_axis), dynamic_batch)
        return name_graph(None, program, reader.drafts, reader.inputs, reader.outputs)
    if not isinstance(module, torch.nn.Module):
        called = f"; call it first: {module.__name__}()" if hasattr(module, "__name__") and callable(module) else ""
        weights = "; these are weights: load them into the module that they belong to" if _is_weights(module) else ""
        raise ConversionError(
            f"from_torch needs a torch.nn.Module, an ExportedProgram or the path of a .pt2 file, not "
            f"{type(module).__name__}{called or weights}"
        )
    if example_inputs is None:
        raise ConversionError("a module needs example_inputs, the arguments of its forward, such as (x,)")
    arguments = check_arguments(example_inputs, dynamic_batch, batch_axis)
    check_dtypes(module)
    module = in_float32(module)
    flags = {m: m.training for m in module.modules()}
    try:
        with seen_training_flags(module) as seen:
            check = check and dynamic_batch and not train_branch
            graph, params = _import(module, arguments, dynamic_batch, batch_axis, train_branch, check)
        asked = [place for place, path in seen.items() if flags[module.get_submodule(path)]]
        if asked and not train_branch:
            _warn_of_branches(module, arguments, dynamic_batch, batch_axis, graph, asked)
    finally:
        for submodule, training in flags.items():
            submodule.training = training
    return graph, params


def _is_weights(found: Any) -> bool:
    """Whether something is a state dict, or a checkpoint that holds one."""
    if not isinstance(found, dict):
        return False
    values = [part for value in found.values() for part in (value.values() if isinstance(value, dict) else (value,))]
    return any(isinstance(value, torch.Tensor) for value in values)


def _import(
    module: torch.nn.Module,
    arguments: tuple[Any, ...],
    dynamic_batch: bool,
    batch_axis: int,
    train_branch: bool,
    check: bool,
) -> tuple[Graph, dict[str, Array]]:
    set_branches(module, train_branch)
    with stages("importing", _STAGES if check else _STAGES[:-1]) as begin:
        with visible_habits(module):
            begin("torch.export")
            program = export(module, arguments, dynamic_batch, batch_axis)
            if train_branch:
                leave_dropout_to_training(program)
            begin("operators")
            reader, read = _read(batch_first(program, batch_axis), dynamic_batch)
            made = name_graph(module, read, reader.drafts, reader.inputs, reader.outputs)
        if check:
            begin("other batch sizes")
            check_batch_sizes(module, program, arguments, batch_axis)
    return made


def _read(program: Any, dynamic_batch: bool) -> tuple[Reader, Any]:
    """The drafts of a program; of its functional form where it cannot be read as it is."""
    program = with_conversions(program)
    reader = Reader(program, dynamic_batch)
    try:
        reader.read()
    except ConversionError:
        functional = without_changes_in_place(program)
        if functional is None:
            raise
        program, reader = functional, Reader(functional, dynamic_batch)
        reader.read()
    return reader, program


def _warn_of_branches(
    module: torch.nn.Module,
    arguments: tuple[Any, ...],
    dynamic_batch: bool,
    batch_axis: int,
    graph: Graph,
    places: list[str],
) -> None:
    """Warns where a module in training mode does something else than what was imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            other, _ = _import(module, arguments, dynamic_batch, batch_axis, train_branch=True, check=False)
        differs, what = not same_calls(graph, other), "does something else in training"
    except ConversionError as error:
        differs, what = (
            True,
            f"cannot be imported as in training ({' '.join(map(str.strip, str(error).splitlines()[:2]))})",
        )
    if differs:
        warnings.warn(
            f"the model is in training mode and asks self.training at {', '.join(places[:3])}"
            f"{' and elsewhere' if len(places) > 3 else ''}: it {what}, and was imported as model.eval() has it. Call "
            "model.eval() if that is meant, or import the other branch with train_branch=True",
            stacklevel=4,
        )
