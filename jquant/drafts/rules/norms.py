"""Layer norm, rms norm and group norm, however mean and variance are computed, and their weight and bias."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import jquant.ops as ops
from jquant.drafts import values
from jquant.drafts.rules.match import Context, Rule, along_axis, become, factors, op_of, unshaped, varying_axes
from jquant.drafts.values import Draft, Known
from jquant.types import Op

_NORMS = (ops.LayerNorm, ops.RmsNorm, ops.GroupNorm)


class Statistic(NamedTuple):
    """A mean over axes of a value, which may be reshaped before."""

    source: Any
    axes: tuple[int, ...]


def mean_of(value: Any) -> Statistic | None:
    found = unshaped(value)
    op = op_of(found, ops.Mean)
    if op is None:
        return None
    (source,) = found.operands
    return Statistic(source, tuple(sorted(a % len(source.shape) for a in op.axes)))


def _squared(value: Any) -> Any:
    """x of x * x."""
    if op_of(value, ops.Mul) and value.operands[0] is value.operands[1]:
        return value.operands[0]
    return None


def variance_of(value: Any) -> tuple[Statistic, bool] | None:
    """(mean of what, True) of a variance, (..., False) of a mean square."""
    found = unshaped(value)
    if op_of(found, ops.Relu):  # guards a difference against rounding
        found = unshaped(found.operands[0])
    if op_of(found, ops.Variance) and found.op.correction == 0:
        (source,) = found.operands
        return Statistic(source, tuple(sorted(a % len(source.shape) for a in found.op.axes))), True
    if op_of(found, ops.Sub):
        return _difference(*found.operands)
    square = mean_of(found)
    root = _squared(square.source) if square else None
    if square is None or root is None:
        return None
    centred = root
    if op_of(centred, ops.Sub):
        x, centre = centred.operands
        statistic = mean_of(centre)
        if statistic is not None and statistic.source is x and statistic.axes == square.axes:
            return statistic, True
    return Statistic(root, square.axes), False


def _difference(mean_square: Any, square_of_mean: Any) -> tuple[Statistic, bool] | None:
    """mean(x^2) - mean(x)^2."""
    square, root = mean_of(mean_square), _squared(unshaped(square_of_mean))
    centre = mean_of(root) if root is not None else None
    if square is None or centre is None or centre.axes != square.axes or _squared(square.source) is not centre.source:
        return None
    return centre, True


def normalized(context: Context, draft: Draft) -> bool:
    """(x - mean) * rsqrt(variance + epsilon) * weight, in any order, or divided by the root."""
    if op_of(draft, ops.Mul):
        product = factors(context, draft)
        if product.number != 1 or len(product.drafts) != 2 or len(product.known) > 1:
            return False
        for body in product.drafts:
            (other,) = [v for v in product.drafts if v is not body] or [None]
            inverse = unshaped(other)
            op = op_of(inverse, ops.Rsqrt)
            if op is not None and _normalize(context, draft, body, inverse.operands[0], op.epsilon, product.known):
                return True
        return False
    if op_of(draft, ops.Div):
        body, root = draft.operands[0], unshaped(draft.operands[1])
        op = op_of(root, ops.Sqrt)
        return op is not None and _normalize(context, draft, body, root.operands[0], op.epsilon, [])
    return False


def _normalize(context: Context, draft: Draft, body: Any, variance: Any, epsilon: float, weights: list[Known]) -> bool:
    found = variance_of(variance)
    if found is None:
        return False
    statistic, is_centred = found
    x = body
    if is_centred:
        centre = mean_of(body.operands[1]) if op_of(body, ops.Sub) else None
        if centre is None or centre != statistic:
            return False
        x = body.operands[0]
    op = _operator(statistic, x, epsilon, is_centred)
    if op is None or x.shape != draft.shape:
        return False
    params = {}
    if weights:
        vector = _weight(context, op, weights[0], draft.shape)
        if vector is None:
            return False
        params["weight"] = vector
    return become(draft, op, x, **params)


def _operator(statistic: Statistic, x: Any, epsilon: float, is_centred: bool) -> Op | None:
    rank = len(x.shape)
    if statistic.source is x:
        count = len(statistic.axes)
        if statistic.axes == tuple(range(rank - count, rank)) and count < rank:
            return (
                ops.LayerNorm(rank=count, epsilon=epsilon) if is_centred else ops.RmsNorm(rank=count, epsilon=epsilon)
            )
        spatial = tuple(range(1, rank - 1))
        if is_centred and rank > 2 and statistic.axes == spatial:
            return ops.GroupNorm(groups=x.shape[-1], epsilon=epsilon, channels_last=True)
        return None
    grouped = statistic.source
    if not is_centred or op_of(grouped, ops.Reshape) is None or unshaped(grouped) is not unshaped(x):
        return None
    *lead, groups, size = grouped.shape
    if (*lead, groups * size) != x.shape or statistic.axes != (*range(1, rank - 1), rank):
        return None
    return ops.GroupNorm(groups=groups, epsilon=epsilon, channels_last=True)


def _weight(context: Context, op: Any, known: Known, shape: tuple[int, ...]) -> Known | None:
    """A known factor or addend as the parameter of a norm; None where it varies along other axes."""
    if isinstance(op, ops.GroupNorm):
        return along_axis(context, known, len(shape) - 1 if op.channels_last else 1, shape)
    rank: int = op.rank
    if rank == 1:
        return along_axis(context, known, len(shape) - 1, shape)
    if not known.shape or len(known.shape) != len(shape) or any(i < len(shape) - rank for i in varying_axes(known)):
        return None
    inner = shape[-rank:]
    if known.compact[-rank:] != inner:
        return None
    key = ("inner", inner)
    return context.maker.share(known, key, lambda: values.known_from("reshape", lambda a: a.reshape(inner), [known]))


def affine(context: Context, draft: Draft) -> bool:
    """The weight, and then the bias, of a norm that has none yet."""
    role = "weight" if op_of(draft, ops.Mul) else "bias" if op_of(draft, ops.Add) else ""
    if not role:
        return False
    for x, known in (draft.operands, draft.operands[::-1]):
        op = op_of(x, *_NORMS)
        if op is None or not isinstance(known, Known) or x.shape != draft.shape or not isinstance(x, Draft):
            continue
        taken = role in x.params or "bias" in x.params or (role == "bias" and isinstance(op, ops.RmsNorm))
        if taken or not known.is_trained:
            continue
        vector = _weight(context, op, known, draft.shape)
        if vector is not None:
            draft.scope = x.scope
            return become(draft, replace(op), *x.operands, **x.params, **{role: vector})
    return False


def group_norm(context: Context, draft: Draft) -> bool:
    """Channels-first: [N, C, *S] to [N, groups, *], a layer norm over all of a group, and back."""
    inner: Any = draft.operands[0] if op_of(draft, ops.Reshape) else None
    op = op_of(inner, ops.LayerNorm)
    if op is None or inner.params or op.rank != len(inner.shape) - 2 or not op_of(inner.operands[0], ops.Reshape):
        return False
    (before,) = inner.operands
    (x,) = before.operands
    groups = before.shape[1]
    if x.shape != draft.shape or len(x.shape) < 3 or before.shape[0] != x.shape[0] or x.shape[1] % groups:
        return False
    return become(draft, ops.GroupNorm(groups=groups, epsilon=op.epsilon), x)


RULES: tuple[Rule, ...] = (normalized, affine, group_norm)
