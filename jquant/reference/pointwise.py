"""Elementwise operators, activations and data movement: nash-arithmetic section 5."""

import numpy as np

from jquant.reference.arithmetic import dequantize, rescale_unsaturated, saturate
from jquant.reference.call import Call, channels_back, channels_to_last
from jquant.types import EXACT_DTYPES


def wrapped(exact: np.ndarray) -> np.ndarray:
    """Exact values modulo 2^32, as int32: their sums and products wrap."""
    return (exact + 2**31) % 2**32 - 2**31


def add(call: Call) -> np.ndarray:
    """acc = a * multiplier[0] + b * multiplier[1]; the multiplier of the operand with the larger scale is 2^sh."""
    a, b = call.operands
    if not call.constants:  # exact values
        return wrapped(a + b)
    multiplier_a, multiplier_b = call.constants["multiplier"]
    return call.rescaled(a * multiplier_a + b * multiplier_b)


def sub(call: Call) -> np.ndarray:
    """As `add`, with the multiplier of b negative."""
    a, b = call.operands
    return add(call) if call.constants else wrapped(a - b)


def mul(call: Call) -> np.ndarray:
    """The product, rescaled from s_a * s_b."""
    a, b = call.operands
    return call.rescaled(a * b) if call.constants else wrapped(a * b)


def neg(call: Call) -> np.ndarray:
    """Saturates: -128 becomes 127."""
    (x,) = call.operands
    return saturate(-x, call.format.output)


def absolute(call: Call) -> np.ndarray:
    """Saturates: -128 becomes 127."""
    (x,) = call.operands
    return saturate(np.abs(x), call.format.output)


def clamp(call: Call) -> np.ndarray:
    """`lower` and `upper` are the bounds in LSB; those of exact values are the operator's own."""
    ((x,), c, op) = call.operands, call.constants, call.op
    exact = call.format.output in EXACT_DTYPES
    lower, upper = (op.minimum, op.maximum) if exact else (c.get("lower"), c.get("upper"))
    x = x if lower is None else np.maximum(x, int(lower))
    return x if upper is None else np.minimum(x, int(upper))


def integer_constant(call: Call) -> np.ndarray:
    return np.array(call.op.values, np.int64).reshape(call.op.shape)


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


def dequantized(call: Call) -> np.ndarray:
    """Section 2, float32: the constant is the scale of the operand."""
    (x,) = call.operands
    return dequantize(x, call.constants["scale"])


def identity(call: Call) -> np.ndarray:
    (x,) = call.operands
    return x
