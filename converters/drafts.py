"""Nodes on their way into a graph: before they have names, but with the shape and dtype that they make."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node as FxNode

from jquant.graph.float import result_type
from jquant.ops.elementwise import IntegerConstant
from jquant.ops.indexing import Slice
from jquant.ops.movement import Reshape, Stack
from jquant.types import Input, JQuantError, Op

from .aten import Unsupported
from .exact import DTYPES


@dataclass(frozen=True, eq=False)
class Param:
    """A parameter: its key, or None for a constant of the code, which is keyed by its first reader.

    What follows from parameters that are `fixed` alone is computed at the import. A trained one stays an operand.
    """

    key: str | None
    tensor: torch.Tensor
    fixed: bool = True


@dataclass(eq=False)
class Draft:
    """A node before it has a name."""

    op: Op
    source: FxNode
    operands: tuple[Draft | Input, ...] = ()
    params: dict[str, Param] = field(default_factory=dict)
    label: str = ""  # of a helper call
    constant: Param | None = None  # that it stands for
    constant_of: tuple[Draft | None, str] = (None, "")  # who reads it first, and as what
    value: Any = None  # shape and dtype at the example batch


@dataclass
class Results:
    """The results of a call that makes several tensors. One becomes a node when it is read."""

    source: FxNode
    calls: list[Any]


@dataclass(frozen=True)
class Refused:
    """A value that has no operator, such as one result of a call with several: an error only where it is read."""

    reason: str


def integer_constant(tensor: torch.Tensor) -> IntegerConstant:
    values = tensor.flatten().tolist()
    if any(not -(2**31) <= v < 2**31 for v in values):
        raise Unsupported("a constant beyond int32")
    dtype: Any = "bool" if tensor.dtype == torch.bool else "int32"
    return IntegerConstant(shape=tuple(tensor.shape), values=tuple(int(v) for v in values), dtype=dtype)


def unchanged(draft: Draft) -> Draft | None:
    """What a draft only takes apart again: the one state of a stack of one, or a slice of everything."""
    source = draft.operands[0] if draft.operands else None
    if isinstance(draft.op, Slice) and isinstance(source, Draft) and source.value.shape == draft.value.shape:
        return source if all(step == 1 for step in draft.op.steps) else None
    if not isinstance(draft.op, Reshape) or not isinstance(source, Draft) or not isinstance(source.op, Stack):
        return None
    inner = source.operands[0]
    alone = len(source.operands) == 1 and isinstance(inner, Draft) and inner.value.shape == draft.value.shape
    return inner if alone and isinstance(inner, Draft) else None


def evaluate(draft: Draft, batch: int) -> Any:
    """Shape and dtype of a draft at the batch of the example, from the float rule of its operator."""
    operands = []
    for operand in draft.operands:
        value = operand.value if isinstance(operand, Draft) else operand
        dtype = str(value.dtype)
        if dtype != "float32" and not draft.op.takes_exact:
            raise Unsupported(f"{type(draft.op).__name__} of {dtype}; convert it to float32 before")
        operands.append((tuple(batch if n is None else n for n in value.shape), dtype))
    params = tuple((role, tuple(p.tensor.shape)) for role, p in draft.params.items())
    try:
        return result_type(draft.op, tuple(operands), params)
    except (JQuantError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise Unsupported(str(error).splitlines()[0]) from error


def check_value(draft: Draft, expected: torch.Tensor) -> None:
    """Refuses what would have another shape or dtype than in torch."""
    shape, dtype = example_shape(expected.shape), DTYPES.get(expected.dtype)
    if dtype is None:
        raise Unsupported(f"it makes {expected.dtype}; keep the model in float32")
    if tuple(draft.value.shape) != shape or str(draft.value.dtype) != dtype:
        found = f"{draft.value.dtype}{list(draft.value.shape)}"
        raise Unsupported(f"{type(draft.op).__name__} makes {found} of it, torch {dtype}{list(shape)}")


def example_shape(shape: Any) -> tuple[int, ...]:
    """A shape at the batch of the example."""
    return tuple(n if isinstance(n, int) else int(n.node.hint) for n in shape)
