"""Softmax and its logarithm, the mask of one, and attention around it."""

from __future__ import annotations

from math import isfinite
from typing import Any

import jax.numpy as jnp
import numpy as np

import jquant.ops as ops
from jquant.drafts import values
from jquant.drafts.rules.match import Context, Rule, become, op_of, through, unshaped
from jquant.drafts.values import Draft, Known, Value
from jquant.plan.masks import ABSORBING, VERY_NEGATIVE


def _exponentials(total: Any) -> tuple[Draft, int] | None:
    """(exp, axis) of a sum of exponentials."""
    found = unshaped(total)
    op = op_of(found, ops.Sum)
    if op is None or len(op.axes) != 1 or not op_of(found.operands[0], ops.Exp):
        return None
    (exp,) = found.operands
    return exp, op.axes[0] % len(exp.shape)


def _scores(exp: Draft, axis: int) -> Value:
    """x of exp(x), or of exp(x - c) with one c along the axis, such as the maximum, which changes nothing."""
    (argument,) = exp.operands
    if op_of(argument, ops.Sub):
        x, shift = argument.operands
        repeated = op_of(shift, ops.Expand)
        sizes = shift.operands[0].shape if repeated else shift.shape
        if len(sizes) == len(x.shape) and sizes[axis] == 1:
            return x
    return argument


def softmax(context: Context, draft: Draft) -> bool:
    """exp / sum(exp), where what is exponentiated may be shifted by its maximum."""
    if op_of(draft, ops.Div):
        exp, total = draft.operands
    elif op_of(draft, ops.Mul):
        exp, inverse = draft.operands if op_of(draft.operands[0], ops.Exp) else draft.operands[::-1]
        total = unshaped(inverse).operands[0] if op_of(unshaped(inverse), ops.Reciprocal) else None
    else:
        return False
    found = _exponentials(total)
    if found is None or found[0] is not exp:
        return False
    return become(draft, ops.Softmax(axis=found[1]), _scores(*found))


def log_softmax(context: Context, draft: Draft) -> bool:
    """(x - max) - log(sum(exp(x - max)))."""
    if not op_of(draft, ops.Sub):
        return False
    shifted, log = draft.operands[0], unshaped(draft.operands[1])
    found = _exponentials(log.operands[0]) if op_of(log, ops.Log) and log.op.epsilon == 0 else None
    if found is None or found[0].operands != (shifted,):
        return False
    return become(draft, ops.LogSoftmax(axis=found[1]), _scores(*found))


def mask(context: Context, draft: Draft) -> bool:
    """Scores that a mask filled with something very negative: the mask becomes an operand of the softmax.

    Its integer form is exact there, while the fill would be the smallest integer, which may be near the scores.
    """
    softmax = op_of(draft, ops.Softmax)
    if softmax is None or len(draft.operands) > 1:
        return False
    (scores,) = draft.operands
    filled = op_of(scores, ops.MaskedFill)
    if filled is not None and filled.value <= VERY_NEGATIVE and scores.operands[0].shape == draft.shape:
        empty: Any = "mean" if isfinite(filled.value) else "nan"
        return become(draft, ops.Softmax(axis=softmax.axis, empty=empty), *scores.operands)
    if not op_of(scores, ops.Add):
        return False
    for x, addend in (scores.operands, scores.operands[::-1]):
        if isinstance(addend, Known) and x.shape == scores.shape and _is_mask(addend):
            least = float(np.asarray(addend.array).min())
            empty = "nan" if not isfinite(least) else "mean" if least <= ABSORBING else "scores"
            return become(draft, ops.Softmax(axis=softmax.axis, empty=empty), x, _below_zero(context, addend))
    return False


def _below_zero(context: Context, known: Known) -> Known:
    return context.maker.share(
        known, ("masked",), lambda: values.elementwise("lt", lambda a: a < jnp.float32(0), [known], known.shape)
    )


def _is_mask(known: Known) -> bool:
    """A constant of 0 where attention is allowed and of something very negative elsewhere."""
    if known.is_trained or not known.shape:
        return False
    array = np.asarray(known.array)
    return bool(np.all((array == 0) | (array <= VERY_NEGATIVE))) and bool(np.any(array != 0))


def softmax_of_ones(context: Context, draft: Draft) -> bool:
    """Axes of 1 that a reshape puts in, before or behind a softmax, make no difference to it."""
    op = op_of(draft, ops.Softmax)
    scores, *masks = draft.operands if op else (None,)
    reshaped = through(scores, ops.Scale)
    if op is None or not op_of(reshaped, ops.Reshape):
        return False
    (x,) = reshaped.operands
    wide = [i for i, n in enumerate(x.shape) if n != 1]
    same = [x.shape[i] for i in wide] == [n for n in reshaped.shape if n != 1]
    axis = op.axis % len(reshaped.shape)
    if not same or len(x.shape) >= len(reshaped.shape) or reshaped.shape[axis] == 1:
        return False
    if not all(isinstance(m, Known) and len(m.shape) == len(reshaped.shape) for m in masks):
        return False
    maker = context.maker
    while scores is not reshaped:
        x = maker.draft(scores.op, x, shape=x.shape, scope=draft.scope)
        (scores,) = scores.operands
    masks = [maker.reshape(m, x.shape) for m in masks]
    position = wide[sum(n != 1 for n in reshaped.shape[:axis])]
    made = maker.draft(ops.Softmax(axis=position, empty=op.empty), x, *masks, shape=x.shape, scope=draft.scope)
    return become(draft, ops.Reshape(shape=draft.shape), made)


# ---------------------------------------------------------------------------------------------------------------------
# Attention


def probabilities_first(context: Context, draft: Draft) -> bool:
    """values.T @ probabilities.T is the transpose of probabilities @ values."""
    op = op_of(draft, ops.MatMul)
    if op is None or not op_of(draft.operands[1], ops.Softmax) or op_of(draft.operands[0], ops.Softmax):
        return False
    rank = len(draft.shape)
    swap = (*range(rank - 2), rank - 1, rank - 2)
    a, b = draft.operands
    made = context.maker.draft(
        ops.MatMul(transpose_a=not op.transpose_b, transpose_b=not op.transpose_a),
        b,
        a,
        shape=[draft.shape[i] for i in swap],
        scope=draft.scope,
    )
    attention(context, made)
    return become(draft, ops.Permute(axes=swap), made)


def attention(context: Context, draft: Draft) -> bool:
    """softmax(query @ key.T * scale) @ value, with or without a mask."""
    op = op_of(draft, ops.MatMul)
    softmax_op = op_of(draft.operands[0], ops.Softmax) if op else None
    if op is None or softmax_op is None or op.transpose_a:
        return False
    rows, value = draft.operands
    if softmax_op.axis % len(rows.shape) != len(rows.shape) - 1 or not context.is_only_reader(rows):
        return False
    scores, *masked = rows.operands
    factor = 1.0
    if op_of(scores, ops.Scale):
        factor, scores = scores.op.factor, scores.operands[0]
    product = op_of(scores, ops.MatMul)
    if product is None or any(isinstance(v, Known) for v in (*scores.operands, value)):
        return False
    query, key = scores.operands
    if op_of(query, ops.Scale):
        factor, query = factor * query.op.factor, query.operands[0]
    maker = context.maker
    query = _swapped(maker, query) if product.transpose_a else query
    key = key if product.transpose_b else _swapped(maker, key)
    value = _swapped(maker, value) if op.transpose_b else value
    allowed = [_allowed(context, m) for m in masked]
    attends = ops.Attention(scale=factor, mask="bool" if allowed else "none", empty=softmax_op.empty)
    return become(draft, attends, query, key, value, *allowed)


def _swapped(maker: Any, value: Value) -> Value:
    rank = len(value.shape)
    axes = (*range(rank - 2), rank - 1, rank - 2)
    if isinstance(value, Draft) and isinstance(value.op, ops.Permute):
        return maker.permute(value.operands[0], [value.op.axes[a] for a in axes])
    return maker.permute(value, axes)


def _allowed(context: Context, masked: Any) -> Value:
    """The mask of attention is True where a softmax's is False."""
    if op_of(masked, ops.LogicalNot):
        return masked.operands[0]
    return context.maker.inverted(masked)


RULES: tuple[Rule, ...] = (softmax, log_softmax, mask, softmax_of_ones, probabilities_first, attention)
