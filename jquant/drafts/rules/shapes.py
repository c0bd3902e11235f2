"""Reshapes, permutations and reductions in one form, so that the other rules meet fewer of them."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import jquant.ops as ops
from jquant.drafts.rules.match import Context, Rule, become, is_near, op_of
from jquant.drafts.values import Draft

_REDUCTIONS = (ops.Mean, ops.Sum, ops.ReduceMax, ops.ReduceMin, ops.ReduceAll, ops.ReduceAny)


def reshape_twice(context: Context, draft: Draft) -> bool:
    if not op_of(draft, ops.Reshape):
        return False
    (x,) = draft.operands
    if x.shape == draft.shape:
        return context.replace(draft, x)
    return op_of(x, ops.Reshape) is not None and become(draft, draft.op, *x.operands)


def permute_twice(context: Context, draft: Draft) -> bool:
    op = op_of(draft, ops.Permute)
    if op is None:
        return False
    (x,) = draft.operands
    if op.axes == tuple(range(len(op.axes))):
        return context.replace(draft, x)
    inner = op_of(x, ops.Permute)
    if inner is None:
        return False
    return become(draft, ops.Permute(axes=tuple(inner.axes[a] for a in op.axes)), *x.operands)


def permute_of_ones(context: Context, draft: Draft) -> bool:
    """A permutation that only moves axes of size 1 is a reshape."""
    op = op_of(draft, ops.Permute)
    if op is None:
        return False
    moved = [a for a in op.axes if draft.operands[0].shape[a] != 1]
    return moved == sorted(moved) and become(draft, ops.Reshape(shape=draft.shape), *draft.operands)


def permute_of_stack(context: Context, draft: Draft) -> bool:
    """The steps of a scan, stacked in front and moved behind the batch."""
    op = op_of(draft, ops.Permute)
    stack = op_of(draft.operands[0], ops.Stack) if op else None
    if op is None or stack is None or stack.axis != 0:
        return False
    others = [a for a in op.axes if a != 0]
    if others != sorted(others):
        return False
    return become(draft, ops.Stack(axis=op.axes.index(0)), *draft.operands[0].operands)


def element_of_stack(context: Context, draft: Draft) -> bool:
    """The last step of a scan, taken out of all of them."""
    cut = op_of(draft.operands[0], ops.Slice) if op_of(draft, ops.Reshape) else None
    stack = op_of(draft.operands[0].operands[0], ops.Stack) if cut else None
    if cut is None or stack is None:
        return False
    whole = draft.operands[0].operands[0]
    taken = [
        range(start, n if stop is None else stop, step)
        for start, stop, step, n in zip(cut.starts, cut.stops, cut.steps, whole.shape, strict=True)
    ]
    others = all(len(t) == n for i, (t, n) in enumerate(zip(taken, whole.shape, strict=True)) if i != stack.axis)
    if not others or len(taken[stack.axis]) != 1:
        return False
    part = whole.operands[taken[stack.axis][0]]
    return part.shape == draft.shape and context.replace(draft, part)


def keep_reduced_axes(context: Context, draft: Draft) -> bool:
    """A reduction, then a reshape that puts the reduced axes back as 1."""
    if not op_of(draft, ops.Reshape):
        return False
    (reduced,) = draft.operands
    op = op_of(reduced, *_REDUCTIONS)
    if op is None or op.keepdims:
        return False
    (x,) = reduced.operands
    kept = tuple(1 if i in _positive(op.axes, len(x.shape)) else n for i, n in enumerate(x.shape))
    return kept == draft.shape and become(draft, replace(op, keepdims=True), x)


def _positive(axes: tuple[int, ...], rank: int) -> set[int]:
    return {a % rank for a in axes}


def mean(context: Context, draft: Draft) -> bool:
    """A sum divided by how many there are."""
    op = op_of(draft, ops.Scale)
    total = op_of(draft.operands[0], ops.Sum) if op else None
    if op is None or total is None:
        return False
    (x,) = draft.operands[0].operands
    count = prod(x.shape[a] for a in total.axes)
    return is_near(op.factor * count, 1.0) and become(draft, ops.Mean(axes=total.axes, keepdims=total.keepdims), x)


def scale_twice(context: Context, draft: Draft) -> bool:
    op = op_of(draft, ops.Scale)
    inner = op_of(draft.operands[0], ops.Scale) if op else None
    if op is None or inner is None:
        return False
    return become(draft, ops.Scale(factor=op.factor * inner.factor), *draft.operands[0].operands)


def scale_last(context: Context, draft: Draft) -> bool:
    """A factor moves behind a permutation or reshape, towards the product that may take it in."""
    inner = op_of(draft.operands[0], ops.Scale) if op_of(draft, ops.Permute, ops.Reshape) else None
    if inner is None or not context.is_only_reader(draft.operands[0]):
        return False
    (x,) = draft.operands[0].operands
    maker = context.maker
    op = draft.op
    moved = maker.permute(x, op.axes) if isinstance(op, ops.Permute) else maker.reshape(x, draft.shape)
    return become(draft, inner, moved)


def product_of_swapped(context: Context, draft: Draft) -> bool:
    """A matrix product transposes its factors itself."""
    op = op_of(draft, ops.MatMul)
    if op is None:
        return False
    rank = len(draft.shape)
    swap = (*range(rank - 2), rank - 1, rank - 2)
    a, b = (v.operands[0] if p and p.axes == swap else v for v in draft.operands for p in (op_of(v, ops.Permute),))
    if (a, b) == draft.operands:
        return False
    flags = {"transpose_a": op.transpose_a != (a is not draft.operands[0])}
    flags["transpose_b"] = op.transpose_b != (b is not draft.operands[1])
    return become(draft, ops.MatMul(**flags), a, b)


RULES: tuple[Rule, ...] = (
    reshape_twice,
    permute_twice,
    permute_of_ones,
    permute_of_stack,
    element_of_stack,
    keep_reduced_axes,
    mean,
    scale_twice,
    scale_last,
    product_of_swapped,
)
