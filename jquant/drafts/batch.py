"""The batch stays symbolic: a graph read at two batch sizes gives two, and what differs is the batch."""

from __future__ import annotations

from dataclasses import replace

from jquant.ops.movement import Expand, Reshape
from jquant.types import Node


def differing(a: tuple[int, ...], b: tuple[int, ...]) -> set[int]:
    """The axes along which two shapes differ."""
    return {i for i, (n, m) in enumerate(zip(a, b, strict=True)) if n != m}


def joined(a: Node, b: Node, example: str) -> Node | None:
    """The node of both; None where its operator depends on the batch by more than a free axis.

    `example`  a value whose axis 0 is the batch
    """
    if a.op == b.op:
        return a
    if isinstance(a.op, Reshape) and isinstance(b.op, Reshape):
        shape = tuple(n if n == m else -1 for n, m in zip(a.op.shape, b.op.shape, strict=True))
        return replace(a, op=Reshape(shape=shape)) if shape.count(-1) == 1 else None
    if isinstance(a.op, Expand) and isinstance(b.op, Expand) and differing(a.op.shape, b.op.shape) == {0}:
        return replace(a, op=Expand(shape=(-1, *a.op.shape[1:])), inputs=(a.inputs[0], example))
    return None
