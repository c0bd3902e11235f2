"""Elementwise operators, activations, tables and data movement: nash-arithmetic sections 5 and 6."""

import numpy as np

from jquant.reference.arithmetic import rescale, rescale_unsaturated, saturate
from jquant.reference.call import Call, channels_back, channels_to_last
from jquant.types import GraphError


def add(call: Call) -> np.ndarray:
    """acc = a * multiplier[0] + b * multiplier[1]; the multiplier of the operand with the larger scale is 2^sh."""
    a, b = call.operands
    multiplier_a, multiplier_b = call.constants["multiplier"]
    return call.rescaled(a * multiplier_a + b * multiplier_b)


def mul(call: Call) -> np.ndarray:
    """The product, rescaled from s_a * s_b."""
    a, b = call.operands
    return call.rescaled(a * b)


def scale(call: Call) -> np.ndarray:
    """A Python number multiplies the scale; its sign goes to the integers, where -128 becomes 127."""
    (x,) = call.operands
    return saturate(-x, call.format.output) if call.op.factor < 0 else x


def constant(call: Call) -> np.ndarray:
    return call.constants["value"]


def requantize(call: Call) -> np.ndarray:
    (x,) = call.operands
    return call.rescaled(x)


def relu(call: Call) -> np.ndarray:
    (x,) = call.operands
    return np.maximum(x, 0)


def relu6(call: Call) -> np.ndarray:
    """A clamp of integers: `upper` is 6 in LSB."""
    (x,) = call.operands
    return np.minimum(np.maximum(x, 0), call.constants["upper"])


def prelu(call: Call) -> np.ndarray:
    """rescale(max(x, 0), s_x) + rescale(slope * min(x, 0), s_x * s_slope), summed before saturating. slope [C], [1]."""
    c, (operand,) = call.constants, call.operands
    x = channels_to_last(operand, call.op.channels_last)
    positive = rescale_unsaturated(np.maximum(x, 0), c["mantissa"], c["pre"], c["post"], call.target)
    row = c["negative_mantissa"], c["negative_pre"], c["negative_post"]
    negative = rescale_unsaturated(c["slope"] * np.minimum(x, 0), *row, call.target)
    return channels_back(saturate(positive + negative, call.format.output), call.op.channels_last)


def table(call: Call) -> np.ndarray:
    """Section 6, int8 in: T[x + 128]."""
    (x,), entries = call.operands, call.constants["table"]
    if call.format.inputs[0] != "int8" or entries.shape != (256,):
        raise GraphError(f"a table of 256 entries and int8 are needed, not {entries.shape} and {call.format.inputs[0]}")
    return entries[x + 128]


def cat(call: Call) -> np.ndarray:
    """Operand i rescaled by the i-th constants, then joined along `axis`."""
    c = call.constants
    rows = zip(call.operands, c["mantissa"], c["pre"], c["post"], strict=True)
    rescaled = [rescale(x, mantissa, pre, post, call.format.output, call.target) for x, mantissa, pre, post in rows]
    return np.concatenate(rescaled, axis=call.op.axis)


def reshape(call: Call) -> np.ndarray:
    (x,) = call.operands
    return x.reshape(call.op.shape)


def flatten(call: Call) -> np.ndarray:
    """Joins axes `start` to `end` inclusive; negative axes count from the end."""
    (x,) = call.operands
    start, end = call.op.start % x.ndim, call.op.end % x.ndim
    joined = int(np.prod(x.shape[start : end + 1]))
    return x.reshape(*x.shape[:start], joined, *x.shape[end + 1 :])


def permute(call: Call) -> np.ndarray:
    (x,) = call.operands
    return np.transpose(x, call.op.axes)


def pad(call: Call) -> np.ndarray:
    """`fill` is the padding value in LSB."""
    (x,) = call.operands
    return np.pad(x, call.op.padding, constant_values=call.constants["fill"].item())


def identity(call: Call) -> np.ndarray:
    (x,) = call.operands
    return x
