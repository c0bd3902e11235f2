"""What the handlers of all families share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jquant.drafts.values import Draft, Shape, Value, seen_shape
from jquant.functions.trace.reader import UnsupportedError
from jquant.ops.movement import Expand
from jquant.types import EXACT_DTYPES

DTYPES = ("float32", *EXACT_DTYPES)  # of values in a graph


def out_shape(equation: Any, index: int = 0) -> Shape:
    return tuple(equation.outvars[index].aval.shape)


def out_dtype(equation: Any, index: int = 0) -> np.dtype:
    return np.dtype(equation.outvars[index].aval.dtype)


def require(condition: bool, reason: str) -> None:
    if not condition:
        raise UnsupportedError(reason)


def require_dtypes(allowed: Sequence[str], *operands: Value) -> None:
    for value in operands:
        require(str(value.dtype) in allowed, f"an operand of {value.dtype}")


def is_float(value: Value) -> bool:
    return str(value.dtype) == "float32"


def unexpanded(operands: Sequence[Value], shape: Shape) -> list[Value]:
    """Operands without the repetitions that broadcasting makes anyway."""
    found = list(operands)
    for i, value in enumerate(found):
        if not isinstance(value, Draft) or not isinstance(value.op, Expand) or len(value.operands) > 1:
            continue
        inner = value.operands[0]
        trial = [*found[:i], inner, *found[i + 1 :]]
        if len(inner.shape) == len(value.shape) and np.broadcast_shapes(*map(seen_shape, trial)) == shape:
            found = trial
    return found
