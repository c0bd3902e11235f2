"""What the torch rules share: one function from an operator of jquant to calls of torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch

from jquant.types import ConversionError, Op

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Site:
    """Where a rule is called.

    `shapes`    of the operands, with a batch that means nothing: a rule may use ranks, and all sizes but the first
    `dtypes`    of the operands: float32, or an exact bool, int32 or uint8
    `output`    the shape of the result
    `dtype`     of the result
    `constant`  records a tensor as a buffer of the module
    `call`      records the call of a function that does not see a proxy among its arguments
    """

    shapes: Sequence[Shape]
    dtypes: Sequence[str]
    output: Shape
    dtype: str
    constant: Callable[[torch.Tensor], Any]
    call: Callable[..., Any]


@singledispatch
def torch_rule(op: Op, site: Site, *operands: Any, **params: Any) -> Any:
    """The operator as calls of torch on the proxies that record them.

    Operands are channels-first, parameters arrive by role. Exact integers are int32, as they are in the graph.
    """
    raise ConversionError(
        f"{type(op).__name__} has no form in torch; end the graph before it, or register one with "
        "jquant_converters.torch_out.torch_rule"
    )


def is_same_padding(padding: Sequence[tuple[int, int]]) -> bool:
    return all(low == high for low, high in padding)


def pad_spatial(x: Any, padding: Sequence[tuple[int, int]], value: float = 0.0) -> Any:
    """Pads the last axes of x by (before, after) each, the first pair for the first of them."""
    flat = [n for pair in reversed(padding) for n in pair]
    return torch.nn.functional.pad(x, flat, "constant", value) if any(flat) else x


def by_channel(parameter: Any, rank: int) -> Any:
    """A parameter [C] that broadcasts along axis 1 of a tensor of that rank."""
    return parameter.reshape(1, -1, *(1,) * (rank - 2))
