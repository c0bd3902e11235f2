"""Grids that torch code computes from pixels and normalizes for `grid_sample`: read as the pixels that they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jquant.ops.composite import Div
from jquant.ops.elementwise import Add, Mul, Neg, Scale, Sub
from jquant.ops.grid_sampling import GridSample
from jquant.ops.indexing import Slice
from jquant.ops.movement import Cat, Reshape, Stack

from .drafts import Draft

_NEAR = 2e-6  # factors and addends are numbers of float32, rounded a few times

Step = tuple[Any, int | None, float, float]  # a value, its component, and (a, b): coordinate = a * component + b


def join_pixels(draft: Draft) -> None:
    """A grid sample whose grid is (2 p + 1) / n - 1 of pixels p, or 2 p / (n - 1) - 1 with corners aligned, takes p.

    The chip's operator has pixels; the arithmetic in between would be quantized three times over. This is what
    `to_torch` writes, and what code has to write that keeps pixels, since torch's function takes normalized grids.
    """
    if not isinstance(draft.op, GridSample) or draft.op.coordinates != "normalized" or draft.op.channels_last:
        return
    image, grid = draft.operands
    sides = image.value.shape[3:1:-1] if isinstance(image, Draft) else image.shape[3:1:-1]  # width, height
    corners = draft.op.align_corners
    found = []
    for component, side in enumerate(sides):
        if not isinstance(side, int) or side <= corners:
            return
        a, b = (2 / (side - 1), -1.0) if corners else (2 / side, 1 / side - 1)
        steps = _steps(grid, component)
        found.append(
            [v for v, own, x, y in steps if own == component and abs(x / a - 1) < _NEAR and abs(y - b) < _NEAR]
        )
    for pixels in found[0]:
        if any(pixels is other for other in found[1]) and _alike(_shape(pixels), _shape(grid)):
            draft.operands = (image, pixels)
            draft.op = replace(draft.op, coordinates="absolute", align_corners=False)
            return


def _shape(value: Any) -> tuple[Any, ...]:
    return tuple(value.value.shape if isinstance(value, Draft) else value.shape)


def _alike(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether shapes are the same; the batch of an input is None, that of a draft the one of the example."""
    return len(a) == len(b) and a[1:] == b[1:] and (a[:1] == b[:1] or None in (a[0], b[0]))


def _steps(grid: Any, component: int) -> list[Step]:
    """What a component of a grid is computed from by one factor and one addend, the nearest first.

    The component of a value is its index on the last axis, None where the value is that component alone.
    """
    value, a, b = grid, 1.0, 0.0
    own: int | None = component
    steps: list[Step] = []
    while (before := _before(value, own)) is not None:
        value, own, factor, addend = before
        a, b = a * factor, b + a * addend
        steps.append((value, own, a, b))
    return steps


def _before(value: Any, component: int | None) -> Step | None:
    """The operand behind a component of a value, with the factor and the addend in between."""
    if not isinstance(value, Draft):
        return None
    op, operands = value.op, value.operands
    if isinstance(op, Scale):
        return operands[0], component, op.factor, 0.0
    if isinstance(op, Neg):
        return operands[0], component, -1.0, 0.0
    if isinstance(op, Add | Sub | Mul | Div):
        return _beside_a_number(value, component)
    last = len(_shape(value)) - 1
    if isinstance(op, Cat | Stack) and component is not None and op.axis == last:
        if isinstance(op, Stack):
            return operands[component], None, 1.0, 0.0
        ones = all(_shape(operand)[-1] == 1 for operand in operands)
        return (operands[component], 0, 1.0, 0.0) if ones else None
    if isinstance(op, Slice) and component is not None:
        whole = _alike(_shape(value)[:-1], _shape(operands[0])[:-1]) and op.steps[-1] == 1 and op.starts[-1] >= 0
        return (operands[0], component + op.starts[-1], 1.0, 0.0) if whole else None
    if isinstance(op, Reshape) and component is None and _alike((*_shape(value), 1), _shape(operands[0])):
        return operands[0], 0, 1.0, 0.0
    return None


def _beside_a_number(value: Draft, component: int | None) -> Step | None:
    """Of a sum, difference, product or quotient with a constant that is one number for the component."""
    for place, operand in enumerate(value.operands):
        if not isinstance(operand, Draft) or operand.constant is None:
            continue
        tensor = operand.constant.tensor
        if tensor.numel() != 1 and (component is None or tuple(tensor.shape)[-1:] != (tensor.numel(),)):
            return None
        flat = tensor.flatten().tolist()
        number = flat[0] if len(flat) == 1 else flat[component or 0]
        other = value.operands[1 - place]
        if not _alike(_shape(other), _shape(value)):
            return None
        if isinstance(value.op, Mul):
            return other, component, number, 0.0
        if isinstance(value.op, Div):
            return (other, component, 1 / number, 0.0) if place == 1 and number else None
        if isinstance(value.op, Add):
            return other, component, 1.0, number
        return (other, component, 1.0, -number) if place == 1 else (other, component, -1.0, number)
    return None
