"""Code that asks `self.training`: which branch of it an import takes, and where the branches are."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jquant.types import Graph

_LIBRARY = str(Path(torch.__file__).parent)


def is_library(module: nn.Module) -> bool:
    """Whether a module is one of torch itself, whose training mode (dropout, batch norm) jquant has its own way for."""
    return type(module).__module__.startswith("torch.")


@contextmanager
def seen_training_flags(module: nn.Module) -> Iterator[dict[str, str]]:
    """Collects {place: module path} where the model's own code reads the training flag of a module.

    For the time of an export the modules that are not torch's have a class with that flag as a property, under the name
    of their own.
    """
    found: dict[str, str] = {}
    original: list[tuple[nn.Module, type]] = []
    classes: dict[type, type] = {}
    paths = {m: path for path, m in module.named_modules()}
    try:
        for part in paths:
            if not is_library(part):
                original.append((part, type(part)))
                flag = part.__dict__.pop("training")
                part.__class__ = classes.setdefault(type(part), _watched(type(part), paths, found))
                part.__dict__["_training_flag"] = flag
        yield found
    finally:
        for part, kind in original:
            flag = part.__dict__.pop("_training_flag")
            part.__class__ = kind
            part.__dict__["training"] = flag


def _watched(kind: type, paths: dict[nn.Module, str], found: dict[str, str]) -> type:
    def read(self: Any) -> bool:
        frame = sys._getframe(1)
        file = frame.f_code.co_filename
        if not file.startswith(_LIBRARY) and Path(file).is_file():
            found.setdefault(f"{file}:{frame.f_lineno}", paths.get(self, ""))
        flag: bool = self.__dict__["_training_flag"]
        return flag

    def write(self: Any, flag: bool) -> None:
        self.__dict__["_training_flag"] = flag

    names = {"training": property(read, write), "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), names)


def set_branches(module: nn.Module, training: bool) -> None:
    """The training flag of every module: eval for those of torch, `training` for the model's own."""
    for part in module.modules():
        part.training = training and not is_library(part)


def leave_dropout_to_training(program: Any) -> None:
    """Dropout that its caller makes active as the operator that `apply_train` makes active, as in eval mode."""
    aten = torch.ops.aten
    targets = (aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default)
    for node in program.graph.nodes:
        if node.target in targets and len(node.args) == 3:
            node.args = (*node.args[:2], False)


def same_calls(a: Graph, b: Graph) -> bool:
    """Whether two imports of one model have the same inputs, operators, operands and outputs."""
    return (a.inputs, a.nodes, a.outputs) == (b.inputs, b.nodes, b.outputs)
