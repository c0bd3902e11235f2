"""Modules that vendors' training tools put into a model, made visible to torch.export.

QuantStub and DeQuantStub compute nothing in a float model, and the methods of a FloatFunctional are not calls of a
module, so neither leaves a trace in an exported program. While a model is exported, stand-ins that do take their place.
A class counts by its name, whatever package it comes from.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.fx import Node

import jquant.ops as ops
from jquant.types import Op

FUNCTIONALS = ("FloatFunctional", "FXFloatFunctional", "QFunctional")


class QuantMark(nn.Module):
    """A QuantStub whose call is seen, as a copy."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()


class DeQuantMark(nn.Module):
    """A DeQuantStub whose call is seen, as a copy."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()


class FunctionalMark(nn.Module):
    """A float functional whose methods are calls of a module."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original

    def __getattr__(self, name: str) -> Any:
        if name == "original" or name in self.__dict__["_modules"]:
            return super().__getattr__(name)
        value = getattr(self.original, name)
        is_method = callable(value) and not isinstance(value, nn.Module) and not hasattr(nn.Module, name)
        return partial(self.__call__, name) if is_method else value

    def forward(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.original, method)(*args, **kwargs)


@contextmanager
def visible_habits(module: nn.Module) -> Iterator[None]:
    """Puts the stand-ins into a model, and takes them out again."""
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    marks: dict[nn.Module, nn.Module] = {}  # one for a module that several parents share
    try:
        for parent in list(module.modules()):
            for name, child in list(parent._modules.items()):
                mark = None if child is None else marks.get(child) or _mark(child)
                if child is not None and mark is not None:
                    replaced.append((parent, name, child))
                    setattr(parent, name, marks.setdefault(child, mark))
        yield
    finally:
        for parent, name, child in replaced:
            setattr(parent, name, child)


def _mark(module: nn.Module) -> nn.Module | None:
    kind = type(module).__name__
    if kind in ("QuantStub", "DeQuantStub"):
        return QuantMark() if kind == "QuantStub" else DeQuantMark()
    return FunctionalMark(module) if kind in FUNCTIONALS else None


def mark_of(node: Node) -> str:
    """The name of the stand-in's class that made a call, or nothing."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    kind = str(getattr(stack[-1][1], "__qualname__", stack[-1][1])) if stack else ""
    name = kind.rsplit(".", 1)[-1]
    return name if name in _NAMES else ""


def stub_of(node: Node) -> Op | None:
    """The operator of a call that stands for a stub."""
    return {"QuantMark": ops.QuantStub(), "DeQuantMark": ops.DeQuantStub()}.get(mark_of(node))


_NAMES = ("QuantMark", "DeQuantMark", "FunctionalMark")
