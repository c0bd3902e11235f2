"""What a name in an ONNX graph stands for while it is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

BATCHES = (7, 11)  # two sizes of the free batch: what differs between them depends on it
Pair = tuple[Any, Any]  # of something at the two batch sizes


class Unsupported(Exception):  # noqa: N818 - a reason that is collected, not an error that callers see
    """Why a node has no jquant operator."""


def require(condition: bool, reason: str) -> None:
    if not condition:
        raise Unsupported(reason)


@dataclass(frozen=True, eq=False)
class Grid:
    """The integers behind a dequantized constant: its scale, scalar or [channels] along `axis`.

    `integers` of int32 are kept: float32 does not hold all of them, and a bias is rounded again at another scale.
    """

    dtype: str
    scale: np.ndarray
    axis: int | None
    integers: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Known:
    """An array that is known now, at both batch sizes: of the file, or computed from such and from shapes.

    `name` is that of the initializer, `label` that of the value. `turned` is the constant that this one is the
    transpose of.
    """

    at: tuple[np.ndarray, np.ndarray]
    name: str = ""
    grid: Grid | None = None
    turned: Known | None = None
    label: str = ""

    @property
    def fixed(self) -> bool:
        """Whether it is the same at every batch size."""
        a, b = self.at
        return a is b or (a.shape == b.shape and bool((a == b).all()))


@dataclass(frozen=True)
class Value:
    """A value of the graph: its shape at both batch sizes, and its dtype as jquant has it."""

    name: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtype: str

    @property
    def rank(self) -> int:
        return len(self.shapes[0])

    @property
    def shape(self) -> tuple[int | None, ...]:
        """With None for what depends on the batch."""
        return merged(*self.shapes)


@dataclass(frozen=True)
class Integers:
    """A quantized value, between QuantizeLinear and DequantizeLinear."""

    value: Value
    dtype: str
    scale: float


@dataclass(frozen=True)
class Refused:
    """A result without an operator: an error only where it is read."""

    reason: str


Result = Known | Value | Integers | Refused


def merged(small: tuple[int, ...], large: tuple[int, ...]) -> tuple[int | None, ...]:
    return tuple(a if a == b else None for a, b in zip(small, large, strict=True))


def known(array: Any, name: str = "") -> Known:
    value = np.asarray(array)
    return Known((value, value), name)
