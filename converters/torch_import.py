"""`from_torch`: an nn.Module to a Graph and its params, through an undecomposed `torch.export`."""

from __future__ import annotations

import os
from typing import Any

import torch

from jquant.types import Array, ConversionError, Graph

from .export import check_arguments, check_dtypes, check_exported, export
from .files import read_exported
from .habits import visible_habits
from .naming import name_graph
from .reader import Reader


def from_torch(
    module: Any, example_inputs: Any = None, *, dynamic_batch: bool = True
) -> tuple[Graph, dict[str, Array]]:
    """Imports a torch module in eval mode.

    Where the module has QuantStub or DeQuantStub modules (any class of that name), they become nodes of the graph, and
    `prepare` quantizes what lies between them and nothing else. A FloatFunctional (any class of that name) gives its
    name to the call that it makes; one that is called at several places is reported by a warning, since every call has
    a scale of its own here.

    Args:
      module: any `torch.nn.Module` that `torch.export` can trace; its training flags are left as they were. Or an
        `ExportedProgram` of one in eval mode, or the path of a `.pt2` file of such; stubs leave no trace in these.
      example_inputs: the positional arguments of its forward, tensors of any batch, such as `(x,)`. Integers (token
        ids, indices), masks and uint8 pixels become exact inputs of dtype int32, bool and uint8; others are float32.
        An exported program has its own.
      dynamic_batch: axis 0 of every input is a batch of any size; False fixes all shapes to the example. An exported
        program must have been exported that way.

    Returns:
      The graph, with nodes named by module path and the framework's NCHW layout, and {state-dict key: float32 array}.

    Raises:
      ConversionError: the model cannot be traced, uses operators jquant lacks (all are listed), or has bad parameters.
      FormatError: a file that is not an exported program, or that would run code when it is read.
    """
    if isinstance(module, str | os.PathLike):
        module = read_exported(module)
    if isinstance(module, torch.export.ExportedProgram):
        if example_inputs is not None:
            raise ConversionError("an exported program has its own example inputs; leave example_inputs out")
        check_exported(module, dynamic_batch)
        reader = Reader(module, dynamic_batch)
        reader.read()
        return name_graph(None, module, reader.drafts, reader.inputs, reader.outputs)
    if not isinstance(module, torch.nn.Module):
        raise ConversionError(
            f"from_torch needs a torch.nn.Module, an ExportedProgram or the path of a .pt2 file, not "
            f"{type(module).__name__}"
        )
    if example_inputs is None:
        raise ConversionError("a module needs example_inputs, the arguments of its forward, such as (x,)")
    arguments = check_arguments(example_inputs, dynamic_batch)
    check_dtypes(module)
    flags = {m: m.training for m in module.modules()}
    try:
        module.eval()
        with visible_habits(module):
            program = export(module, arguments, dynamic_batch)
    finally:
        for submodule, training in flags.items():
            submodule.training = training
    reader = Reader(program, dynamic_batch)
    reader.read()
    return name_graph(module, program, reader.drafts, reader.inputs, reader.outputs)
