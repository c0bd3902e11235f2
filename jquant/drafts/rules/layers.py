"""The bias of convolutions and linear layers, and batch norm: sums and products with one number for each channel."""

from __future__ import annotations

from typing import Any

import numpy as np

import jquant.ops as ops
from jquant.drafts import values
from jquant.drafts.rules.match import Context, Rule, along_axis, become, channel_axis, op_of, varying_axes
from jquant.drafts.values import Draft, Known, Value, constant, scalar_of

HOSTS = (ops.Conv, ops.ConvTranspose, ops.Linear)
MOMENTUM = 0.01  # flax's default, 0.99 for the old statistics: inference, which is what is read, does not use it


def bias(context: Context, draft: Draft) -> bool:
    """A sum with one number for each output channel, right behind the layer or behind a split of its channels."""
    if not op_of(draft, ops.Add):
        return False
    for x, known in (draft.operands, draft.operands[::-1]):
        if isinstance(known, Known) and x.shape == draft.shape:
            return _bias_of(context, draft, x, known) or _bias_of_split(context, draft, x, known)
    return False


def _takes_bias(context: Context, host: Any) -> bool:
    free = op_of(host, *HOSTS, ops.BatchNorm) is not None and "bias" not in host.params
    return free and context.is_only_reader(host)


def _axis(host: Draft) -> int:
    if isinstance(host.op, ops.BatchNorm):
        return len(host.shape) - 1 if host.op.channels_last else 1
    return channel_axis(host.op, len(host.shape))


def _bias_of(context: Context, draft: Draft, x: Value, known: Known) -> bool:
    if not isinstance(x, Draft) or not _takes_bias(context, x):
        return False
    vector = along_axis(context, known, _axis(x), x.shape)
    if vector is None:
        return False
    draft.scope = x.scope
    return become(draft, x.op, *x.operands, **x.params, bias=vector)


def _bias_of_split(context: Context, draft: Draft, x: Value, known: Known) -> bool:
    """[*N, O] reshaped to [*N, heads, O / heads], plus a bias [heads, O / heads]."""
    if not isinstance(x, Draft) or not op_of(x, ops.Reshape) or not context.is_only_reader(x):
        return False
    (host,) = x.operands
    lead = len(host.shape) - 1
    if not isinstance(host, Draft) or not op_of(host, ops.Linear) or not _takes_bias(context, host):
        return False
    if x.shape[:lead] != host.shape[:lead] or any(i < lead for i in varying_axes(known)) or not known.shape:
        return False
    inner = known.compact[lead:]
    if inner != x.shape[lead:]:
        return False
    size = host.shape[-1]
    vector = context.maker.share(
        known, ("join", size), lambda: values.known_from("reshape", lambda a: a.reshape(size), [known])
    )
    made = context.maker.draft(host.op, *host.operands, shape=host.shape, scope=host.scope, **host.params, bias=vector)
    return become(draft, ops.Reshape(shape=draft.shape), made)


def batch_norm(context: Context, draft: Draft) -> bool:
    """(x - mean) * multiplier with one number of each for a channel. The bias that follows is a rule of its own."""
    if not op_of(draft, ops.Mul):
        return False
    for x, known in (draft.operands, draft.operands[::-1]):
        centred = op_of(x, ops.Sub)
        if centred is None or not isinstance(known, Known) or not isinstance(x, Draft):
            continue
        source, mean = x.operands
        if not isinstance(mean, Known) or source.shape != draft.shape:
            continue
        return _affine(context, draft, source, mean, known)
    return False


def layer_scale(context: Context, draft: Draft) -> bool:
    """The output channels of a layer times a trained vector: a batch norm without statistics, which folds."""
    if not op_of(draft, ops.Mul):
        return False
    for x, known in (draft.operands, draft.operands[::-1]):
        host = op_of(x, *HOSTS)
        if host is None or not isinstance(known, Known) or x.shape != draft.shape or not context.is_only_reader(x):
            continue
        if _is_channel(known, channel_axis(host, len(x.shape))):
            return _affine(context, draft, x, None, known)
    return False


def _is_channel(known: Known, axis: int) -> bool:
    return known.is_trained and bool(known.compact) and varying_axes(known) in ([axis], [])


def _affine(context: Context, draft: Draft, x: Value, mean: Known | None, multiplier: Known) -> bool:
    rank = len(draft.shape)
    if rank < 2 or multiplier.compact == () or not multiplier.is_trained:
        return False
    varying = varying_axes(multiplier)
    if len(varying) > 1:
        return False
    axis = varying[0] if varying else rank - 1
    if axis not in (1, rank - 1):
        return False
    size = draft.shape[axis]
    vector = along_axis(context, multiplier, axis, draft.shape)
    centre = constant(np.zeros(size, np.float32)) if mean is None else along_axis(context, mean, axis, draft.shape)
    if vector is None or centre is None:
        return False
    layout = {"channels_last": axis == rank - 1}
    found = _statistics(context, multiplier, axis, draft.shape)
    if found is not None and mean is not None:
        variance, weight, epsilon = found
        params = {"running_mean": centre, "running_var": variance} | ({} if weight is None else {"weight": weight})
        op = ops.BatchNorm(epsilon=epsilon, momentum=MOMENTUM, unbiased=False, **layout)
        return become(draft, op, x, **params)
    ones = constant(np.ones(size, np.float32))
    op = ops.BatchNorm(epsilon=0.0, running=False, **layout)
    return become(draft, op, x, running_mean=centre, running_var=ones, weight=vector)


def _statistics(
    context: Context, multiplier: Known, axis: int, shape: tuple[int, ...]
) -> tuple[Known, Known | None, float] | None:
    """(variance, weight, epsilon) where the multiplier is rsqrt(variance + epsilon) * weight."""
    weight = None
    root = _behind_shape(multiplier)
    if root.primitive == "mul":
        for first, second in (root.operands, root.operands[::-1]):
            if _behind_shape(first).primitive == "rsqrt":
                root, weight = _behind_shape(first), second
                break
    if root.primitive != "rsqrt":
        return None
    inner = _behind_shape(root.operands[0])
    if inner.primitive != "add":
        return None
    for variance, epsilon in (inner.operands, inner.operands[::-1]):
        number = scalar_of(epsilon)
        if number is not None:
            found = _vector(context, variance, axis, shape)
            scale = None if weight is None else _vector(context, weight, axis, shape)
            if found is None or (scale is None) != (weight is None):
                return None
            return found, scale, number
    return None


def _behind_shape(known: Known) -> Known:
    while known.primitive in ("reshape", "broadcast_in_dim", "broadcast") and known.operands:
        known = known.operands[0]
    return known


def _vector(context: Context, known: Known, axis: int, shape: tuple[int, ...]) -> Known | None:
    """An operand of the multiplier along the channels: it has the rank of the whole, or is a vector already."""
    if len(known.shape) == len(shape):
        return along_axis(context, known, axis, shape)
    return known if known.shape == known.compact == (shape[axis],) else None


RULES: tuple[Rule, ...] = (bias, batch_norm, layer_scale)
