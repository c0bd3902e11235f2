"""Average pools, and resizing by known matrices or known places."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jquant.ops as ops
from jquant.drafts.rules.match import Context, Rule, become, is_near, op_of
from jquant.drafts.values import Draft, Known, Value
from jquant.ops.pool import window_counts
from jquant.ops.resample import nearest_indices


def average(context: Context, draft: Draft) -> bool:
    """The sum of windows, divided by the size of a window, or by how many elements of the input each one has."""
    op = op_of(draft, ops.Scale, ops.Div)
    pool = op_of(draft.operands[0], ops.AvgPool) if op else None
    if pool is None or pool.divisor != 1:
        return False
    (x,) = draft.operands[0].operands
    if isinstance(op, ops.Scale):
        same = is_near(op.factor * prod(pool.kernel), 1.0)
        return same and become(draft, replace(pool, divisor=None, count_include_pad=True), x)
    counts = draft.operands[1]
    if not isinstance(counts, Known) or counts.is_trained:
        return False
    partial = replace(pool, divisor=None, count_include_pad=False)
    sizes = x.shape[1:-1] if pool.channels_last else x.shape[2:]
    wanted = np.broadcast_to(window_counts(partial, sizes), (*draft.shape[1:-1], 1)) if pool.channels_last else None
    if wanted is None or not np.array_equal(np.broadcast_to(np.asarray(counts.array), draft.shape)[0, ..., :1], wanted):
        return False
    return become(draft, partial, x)


# ---------------------------------------------------------------------------------------------------------------------
# Resizing


def bilinear(context: Context, draft: Draft) -> bool:
    """A linear layer along one spatial axis whose constant weights are those of bilinear interpolation."""
    if not op_of(draft, ops.Linear) or "bias" in draft.params or draft.params["weight"].is_trained:
        return False
    (x,) = draft.operands
    permute = op_of(x, ops.Permute)
    source = x.operands[0] if permute else x
    axes = permute.axes if permute else tuple(range(len(x.shape)))
    axis, rank = axes[-1], len(source.shape)
    if not 3 <= rank <= 4 or axis == 0 or _is_contracted(source):
        return False
    weight = np.asarray(draft.params["weight"].array)
    if weight.shape[0] == weight.shape[1] or not np.allclose(weight, _bilinear_matrix(*weight.shape), atol=1e-6):
        return False
    op, shape = _resize(source, axis, weight.shape[0], "bilinear")
    made = context.maker.draft(op, source, shape=shape, scope=draft.scope)
    _join(context, made)
    return become(draft, ops.Permute(axes=axes), made)


def _is_contracted(source: Value) -> bool:
    """Whether a value is what a resize to one row or column leaves, whose batch may be at any axis."""
    return isinstance(source, Draft) and bool(op_of(source, ops.Reshape) and op_of(source.operands[0], ops.Linear))


def _bilinear_matrix(rows: int, columns: int) -> np.ndarray:
    """[rows, columns]: the weights with which torch's bilinear interpolation takes `columns` elements to `rows`."""
    op = ops.Interpolate(size=(rows,), mode="bilinear", channels_last=True)
    with jax.ensure_compile_time_eval():
        return np.asarray(ops.eval_float(op, jnp.eye(columns, dtype=jnp.float32)[None]))[0]


def _resize(source: Value, axis: int, size: int, mode: Any) -> tuple[ops.Interpolate, tuple[int, ...]]:
    """The resize of one axis: of [N, *S, C], or of [N, C, *S] where the axis is the last one."""
    rank, last = len(source.shape), axis < len(source.shape) - 1
    shape = tuple(size if i == axis else n for i, n in enumerate(source.shape))
    spatial = shape[1 : rank - 1] if last else shape[2:]
    return ops.Interpolate(size=spatial, mode=mode, channels_last=last), shape


def nearest(context: Context, draft: Draft) -> bool:
    """Elements picked at evenly spaced places."""
    op = op_of(draft, ops.IndexSelect)
    if op is None or op.indices is None:
        return False
    (x,) = draft.operands
    size, rank, count = x.shape[op.axis], len(x.shape), len(op.indices)
    if not 3 <= rank <= 5 or op.axis in (0, rank - 1) or count == size:
        return False
    (places,) = nearest_indices(ops.Interpolate(size=(count,), mode="nearest-exact"), (size,))
    if op.indices != tuple(places):  # jax.image.resize divides otherwise than torch: where that counts, it stays
        return False
    made, _ = _resize(x, op.axis, count, "nearest-exact")
    become(draft, made, x)
    _join(context, draft)
    return True


def repeat(context: Context, draft: Draft) -> bool:
    """An axis whose elements are repeated one by one: a new axis behind it, joined with it."""
    if not op_of(draft, ops.Reshape) or not op_of(draft.operands[0], ops.Expand):
        return False
    repeated = draft.operands[0]
    inner = repeated.operands[0]
    rank = len(draft.shape)
    if len(repeated.operands) != 1 or not op_of(inner, ops.Reshape) or len(inner.shape) != rank + 1 or rank > 5:
        return False
    grown = [i for i, (n, m) in enumerate(zip(inner.shape, repeated.shape, strict=True)) if n != m]
    axis = grown[0] - 1 if len(grown) == 1 else 0
    if not 1 <= axis < rank - 1:
        return False
    before = (*inner.shape[: axis + 1], *inner.shape[axis + 2 :])
    times = repeated.shape[axis + 1]
    if draft.shape != tuple(n * times if i == axis else n for i, n in enumerate(before)):
        return False
    x = context.maker.reshape(inner, before)
    if isinstance(x, Draft):
        repeat(context, x)  # made just now: what is below may be a repetition too
    made, _ = _resize(x, axis, draft.shape[axis], "nearest-exact")
    become(draft, made, x)
    _join(context, draft)
    return True


def _join(context: Context, draft: Draft) -> None:
    """Two resizes, each along axes that the other leaves alone, are one."""
    op = draft.op
    (before,) = draft.operands
    inner = op_of(before, ops.Interpolate)
    assert isinstance(op, ops.Interpolate)
    if inner is None or (inner.mode, inner.channels_last) != (op.mode, op.channels_last):
        return
    (x,) = before.operands
    first = [n != m for n, m in zip(x.shape, before.shape, strict=True)]
    second = [n != m for n, m in zip(before.shape, draft.shape, strict=True)]
    if not any(a and b for a, b in zip(first, second, strict=True)):
        become(draft, op, x)


RULES: tuple[Rule, ...] = (average, bilinear, nearest, repeat)
