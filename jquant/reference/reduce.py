"""Reductions: nash-arithmetic section 5. A node whose output is exact has no constants."""

import numpy as np

from jquant.reference.call import Call


def sum_or_mean(call: Call) -> np.ndarray:
    """Exact sum, rescale from s_x, or from s_x / N, which is in the constants. Of masks: how many are true."""
    (x,), op = call.operands, call.op
    total = x.sum(axis=tuple(op.axes), keepdims=op.keepdims)
    return call.rescaled(total) if call.constants else total


def reduce_max(call: Call) -> np.ndarray:
    (x,), op = call.operands, call.op
    return x.max(axis=tuple(op.axes), keepdims=op.keepdims)


def reduce_min(call: Call) -> np.ndarray:
    (x,), op = call.operands, call.op
    return x.min(axis=tuple(op.axes), keepdims=op.keepdims)


def reduce_all(call: Call) -> np.ndarray:
    (x,), op = call.operands, call.op
    return np.all(x, axis=tuple(op.axes), keepdims=op.keepdims)


def reduce_any(call: Call) -> np.ndarray:
    (x,), op = call.operands, call.op
    return np.any(x, axis=tuple(op.axes), keepdims=op.keepdims)


def arg_max(call: Call) -> np.ndarray:
    """The first of the largest."""
    (x,), op = call.operands, call.op
    return np.argmax(x, axis=op.axis, keepdims=op.keepdims)


def arg_min(call: Call) -> np.ndarray:
    """The first of the smallest."""
    (x,), op = call.operands, call.op
    return np.argmin(x, axis=op.axis, keepdims=op.keepdims)


def cum_sum(call: Call) -> np.ndarray:
    """Exact sums of the elements up to each one, rescaled from s_x."""
    (x,), op = call.operands, call.op
    y = np.moveaxis(x, op.axis, -1)
    y = y[..., ::-1] if op.reverse else y
    total = np.cumsum(y, axis=-1) - (y if op.exclusive else 0)
    total = np.moveaxis(total[..., ::-1] if op.reverse else total, -1, op.axis)
    return call.rescaled(total) if call.constants else total
