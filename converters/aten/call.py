"""What a handler gets and returns, and what the handlers of all families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import torch
from torch.fx import Node

from jquant.drafts.values import shortest
from jquant.ops.elementwise import IntegerConstant, Mul, Scale
from jquant.ops.movement import Reshape
from jquant.types import Op

aten = torch.ops.aten
Shape = tuple[Any, ...]  # of int, with a torch.SymInt for what depends on the batch
CONSTANT = "jquant_constant"  # key of `Node.meta`: the tensor of a parameter, a buffer, or what follows from such alone
ROW = "jquant_row"  # key of `Node.meta`: [1, ...] of a value that repeats for every example, whatever the inputs are
EXAMPLES = "jquant_examples"  # key of `Node.meta`: the value counts the examples, as torch.arange(x.shape[0]) does
FOLDED = "jquant_folded"  # key of `Node.meta`: the value follows from parameters alone, and as a weight is computed now
EXACT = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Unsupported(Exception):  # noqa: N818 - a reason that is collected, not an error that callers see
    """Why a call has no jquant operator."""


class Batch:
    """The operand that stands for a value with the batch as axis 0: the first input of the graph."""


BATCH = Batch()


@dataclass(frozen=True, eq=False)
class Call:
    """An operator on operands: fx nodes, other calls, `BATCH`, or numbers (which become constants).

    `params` maps roles to the fx nodes of parameters, None where the layer has none; `label` tells a helper call from
    the call it helps. A call that is an operand twice is one node.
    """

    op: Op
    operands: tuple[Any, ...]
    params: Mapping[str, Node | None] = field(default_factory=dict)
    label: str = ""


# A handler that makes several tensors returns a list, with the reason as a string for one that has no operator.
Result = Call | Node | list[Call | Node | str]
Handler = Callable[..., Any]


def require(condition: bool, reason: str) -> None:
    if not condition:
        raise Unsupported(reason)


def shape_of(value: Any) -> Any:
    """The shape of a tensor; of a call with several results, theirs in a list."""
    found = value.meta["val"]
    require(isinstance(found, torch.Tensor | list | tuple), "it computes with the batch size; make it a constant")
    return tuple(found.shape) if isinstance(found, torch.Tensor) else [tuple(part.shape) for part in found]


def rank_of(value: Any) -> int:
    return len(shape_of(value))


def dtype_of(value: Node) -> torch.dtype:
    found = value.meta["val"]
    require(isinstance(found, torch.Tensor), "it computes with the batch size; make it a constant")
    dtype: torch.dtype = found.dtype
    return dtype


def is_exact(value: Any) -> bool:
    """Whether a value is a tensor of masks, indices or pixels."""
    return isinstance(value, Node) and dtype_of(value) in EXACT


def constant_of(value: Any) -> torch.Tensor | None:
    """The tensor behind an fx node, where it does not depend on the inputs."""
    return value.meta.get(CONSTANT) if isinstance(value, Node) else None


def is_weight(value: Node) -> bool:
    """Whether an fx node can be the weight of a layer: it depends on no input."""
    return constant_of(value) is not None or FOLDED in value.meta


def row_of(value: Any) -> torch.Tensor | None:
    """The tensor [1, ...] that an fx node repeats for every example, where no input matters."""
    return value.meta.get(ROW) if isinstance(value, Node) else None


def scalar_of(value: Any) -> Any:
    """A number, also where it is a constant tensor of one element that the code made; else the value itself."""
    tensor = constant_of(value)
    single = tensor is not None and tensor.numel() == 1 and tensor.ndim == 0 and value.op != "placeholder"
    return tensor.item() if single and tensor is not None else value


def format_shape(shape: Shape) -> str:
    return "[" + ", ".join(str(n) if isinstance(n, int) else "batch" for n in shape) + "]"


def per_axis(value: Any, rank: int) -> tuple[int, ...]:
    """An int or a list of one means the same for every spatial axis."""
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    values = values * rank if len(values) == 1 else values
    require(all(isinstance(v, int) for v in values), "an attribute depends on the batch size; make it a constant")
    return values


def both_sides(padding: Any, rank: int) -> tuple[tuple[int, int], ...]:
    return tuple((p, p) for p in per_axis(padding, rank))


def integer(value: Any) -> int:
    require(isinstance(value, int), "an attribute depends on the batch size; make it a constant")
    return int(value)


def axis_of(axis: int, rank: int) -> int:
    return axis % rank if rank else 0


def axes_of(axes: Any, rank: int) -> tuple[int, ...]:
    """Axes as torch gives them (None or empty: all), sorted and counted from the start."""
    given = (axes,) if isinstance(axes, int) else axes
    return tuple(sorted(axis_of(a, rank) for a in given)) if given else tuple(range(rank))


def require_batched(x: Node, rank: int) -> None:
    require(rank_of(x) == rank + 2, f"the input has {rank_of(x)} axes, not {rank + 2}; add a batch axis")


def require_float32(dtype: Any) -> None:
    require(dtype in (None, torch.float32), f"dtype={dtype}; keep the model in float32")


def number(value: Any, what: str = "factor") -> float:
    require(isinstance(value, int | float), f"the {what} depends on the batch size; make it a constant")
    require(isfinite(value), f"the {what} is {value}")
    return shortest(value)


def one_like(x: Any, value: Any) -> Any:
    """The other operand of x: a number beside an exact tensor is an exact constant, if it has no fraction."""
    if isinstance(value, Node) or not is_exact(x) or not isinstance(value, int):
        return value
    return integers((), [int(value)])


def integers(shape: Sequence[int], values: Sequence[int], dtype: Any = "int32", label: str = "constant") -> Call:
    op = IntegerConstant(shape=tuple(shape), values=tuple(int(v) for v in values), dtype=dtype)
    return Call(op, (), label=label)


def mask_constant(mask: torch.Tensor) -> Call:
    return integers(tuple(mask.shape), mask.flatten().tolist(), "bool", "mask")


def scaled(x: Any, factor: float, label: str = "scale") -> Any:
    """x times a number, also where x is a mask, a pixel or a number."""
    if factor == 1 and not is_exact(x):
        return x
    if isinstance(x, int | float):
        return x * factor
    require(factor != 0, "the factor is 0")
    return Call(Mul(), (x, factor), label=label) if is_exact(x) else Call(Scale(factor=factor), (x,), label=label)


def reshaped(out: Shape, x: Any, label: str = "") -> Call:
    """x in the shape `out`, of which one axis may depend on the batch."""
    symbolic = [n for n in out if not isinstance(n, int)]
    require(len(symbolic) <= 1, f"the shape {format_shape(out)} has more than one axis that depends on the batch")
    require(all(n > 0 for n in out if isinstance(n, int)), f"the shape {format_shape(out)} is empty")
    return Call(Reshape(shape=tuple(n if isinstance(n, int) else -1 for n in out)), (x,), label=label)
