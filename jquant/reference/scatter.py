"""Writing elements, and shifts of exact integers."""

from collections.abc import Callable

import numpy as np

from jquant.reference.arithmetic import rescale, saturate
from jquant.reference.call import Call

COMBINE: dict[str, Callable[[int, int], int]] = {
    "none": lambda old, new: new,
    "add": lambda old, new: old + new,
    "max": max,
    "min": min,
}


def both(call: Call) -> tuple[np.ndarray, np.ndarray]:
    """Copies of x and of what is written, rescaled to the output where they are numbers."""
    x, source = call.operands[0].copy(), call.operands[-1]
    if "mantissa" not in call.constants:
        return x, source
    mantissa, pre, post = (call.constants[role] for role in ("mantissa", "pre", "post"))
    first, second = (
        rescale(v, mantissa[i], pre[i], post[i], call.format.output, call.target) for i, v in enumerate((x, source))
    )
    return first, second


def slice_scatter(call: Call) -> np.ndarray:
    x, source = both(call)
    x[tuple(slice(*bounds) for bounds in zip(call.op.starts, call.op.stops, call.op.steps, strict=True))] = source
    return x


def scatter(call: Call) -> np.ndarray:
    """One element after the other, in row-major order: the last one that writes an element counts."""
    x, source = both(call)
    index, axis = np.broadcast_to(call.operands[1], source.shape), call.op.axis % x.ndim
    combine = COMBINE[call.op.reduce]
    for position in np.ndindex(*source.shape):
        at = list(position)
        at[axis] = min(max(int(index[position]), 0), x.shape[axis] - 1)
        x[tuple(at)] = combine(int(x[tuple(at)]), int(source[position]))
    return x if call.format.output in ("bool", "int32", "uint8") else saturate(x, call.format.output)


def bit_shift(call: Call) -> np.ndarray:
    """To the right with floor; to the left modulo 2^32, as int32."""
    (x,) = call.operands
    if call.op.bits >= 0:
        return x >> call.op.bits
    return ((x << -call.op.bits) + 2**31) % 2**32 - 2**31
