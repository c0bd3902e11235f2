"""What the command line needs of torch: a module and a checkpoint in, a graph out."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from jquant.types import Array, ConversionError, FormatError, Graph, Model

from .files import read_state_dict, why_unreadable
from .torch_import import from_torch
from .torch_out.module import to_torch
from .torch_out.prefixes import indexed, parts_with_keys


def import_module(
    module: Any, example: Any, shapes: Sequence[tuple[int, ...]], checkpoint: Path | None
) -> tuple[Graph, dict[str, Array]]:
    """`from_torch` of a module as it is in evaluation, with a checkpoint loaded into it first.

    Args:
      module: a torch.nn.Module.
      example: its example inputs, or None to take float inputs of `shapes`.
      shapes: of the inputs.
      checkpoint: a state dict, a mapping that holds one, whose keys may have a prefix such as "module.", or
        safetensors; None leaves the module as it is.

    Raises:
      FormatError: a checkpoint that is not readable, or does not fit. ConversionError: as `from_torch`.
    """
    if not isinstance(module, torch.nn.Module):
        raise ConversionError(f"the model is a {type(module).__name__}, not a torch.nn.Module")
    if checkpoint is not None:
        _load(module, checkpoint)
    module.eval()  # the commands deploy: what the module does in training is no question here
    if example is None:
        example = tuple(torch.zeros(shape) for shape in shapes)
    return from_torch(module, example if isinstance(example, tuple | list) else (example,))


def _load(module: torch.nn.Module, path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    found = _read(path)
    try:
        module.load_state_dict(_weights(module, found, path), strict=True)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise FormatError(f"{path}: {error}") from error


def _read(path: Path) -> Any:
    """What a checkpoint holds.

    Raises:
      FormatError: damaged, or with other classes than tensors in plain containers.
    """
    if path.suffix == ".safetensors":
        return read_state_dict(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the zip, the unpickler or its own checks raise
        raise FormatError(
            f"{path}: not a readable checkpoint of plain tensors: {why_unreadable(error, path)}"
        ) from error


def _weights(module: torch.nn.Module, found: Any, path: Path) -> Any:
    """The part of a checkpoint whose keys are those of the module, behind a prefix that all of them have or none.

    Raises:
      FormatError: no part has the keys of the module, or several have and none is under a usual name.
    """
    wanted = module.state_dict()
    parts = parts_with_keys(wanted, found) if isinstance(found, Mapping) else {}
    usual = [way for way in parts if way in ((), ("state_dict",), ("model",))]
    if len(parts) == 1 or usual:
        return parts[usual[0] if usual else next(iter(parts))]
    if parts:
        names = " and ".join(map(indexed, parts))
        raise FormatError(
            f"{path}: {names} all fit the module. Save one of them: torch.save(torch.load({str(path)!r})"
            f"{indexed(next(iter(parts)))}, 'weights.pth')"
        )
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if isinstance(found, Mapping):
        missing, unexpected = [k for k in wanted if k not in found], [str(k) for k in found if k not in wanted]
        if missing or unexpected:
            raise FormatError(
                f"{path}: not the weights of {type(module).__name__}: of its {len(wanted)} keys {_some(missing)} are "
                f"missing; of {len(found)} keys in the file {_some(unexpected)} are not of the module"
            )
    return found


def _some(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"{len(keys)} ({', '.join(keys[:3])}{more})" if keys else "none"


def torch_archive(source: Model | Graph, params: Mapping[str, Array] | None = None) -> bytes:
    """`to_torch` as the bytes of a .pt2 archive, with a symbolic batch.

    `torch.export.load` reads it once `import torch.ao.quantization.fx._decomposed` has defined the operators.

    Raises:
      ConversionError: as `to_torch`.
    """
    graph = source if isinstance(source, Graph) else source.plan.graph
    inputs = tuple(
        torch.zeros([2 if n is None else n for n in entry.shape], dtype=getattr(torch, entry.dtype))
        for entry in graph.inputs
    )
    batch = torch.export.Dim("batch", min=1)
    dynamic = tuple({0: batch} if entry.shape[:1] == (None,) else None for entry in graph.inputs)
    module = to_torch(source, params)
    program = torch.export.export(module, inputs, dynamic_shapes=(dynamic,) if _takes_any(module) else dynamic)
    stream = io.BytesIO()
    torch.export.save(program, stream)
    return stream.getvalue()


def _takes_any(module: Any) -> bool:
    """Whether forward is declared as *args, for which dynamic shapes go in one tuple."""
    import inspect

    kinds = [p.kind for p in inspect.signature(module.forward).parameters.values()]
    return kinds == [inspect.Parameter.VAR_POSITIONAL]
