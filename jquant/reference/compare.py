"""Minimum, maximum, comparisons, logic, choices, whole numbers and remainders: nash-arithmetic section 5.

A node whose operands are exact has no constants.
"""

from collections.abc import Callable

import numpy as np

from jquant.reference.arithmetic import rescale, round_shift, saturate
from jquant.reference.call import Call
from jquant.types import GraphError

COMPARISONS: dict[str, Callable] = {
    "Equal": np.equal,
    "NotEqual": np.not_equal,
    "Greater": np.greater,
    "GreaterEqual": np.greater_equal,
    "Less": np.less,
    "LessEqual": np.less_equal,
}
LOGIC: dict[str, Callable] = {
    "LogicalAnd": np.logical_and,
    "LogicalOr": np.logical_or,
    "LogicalXor": np.logical_xor,
    "LogicalNot": np.logical_not,
}


def name_of(call: Call) -> str:
    return type(call.op).__name__


def at_larger_scale(call: Call, dtype: str) -> list[np.ndarray]:
    """Operand i rescaled by the i-th constants, to the larger scale; exact operands as they are."""
    c = call.constants
    if not c:
        return call.operands
    rows = zip(call.operands[-2:], c["mantissa"], c["pre"], c["post"], strict=True)
    return [rescale(x, mantissa, pre, post, dtype, call.target) for x, mantissa, pre, post in rows]


def minimum(call: Call) -> np.ndarray:
    return np.minimum(*at_larger_scale(call, call.format.output))


def maximum(call: Call) -> np.ndarray:
    return np.maximum(*at_larger_scale(call, call.format.output))


def comparison(call: Call) -> np.ndarray:
    """A number is given in half LSB: 2n at the grid point n, odd between two."""
    compare, number = COMPARISONS[name_of(call)], call.op.value
    if "half_steps" in call.constants:
        return compare(2 * call.operands[0], call.constants["half_steps"])
    if number is not None:  # x is exact, and so is the number
        return compare(call.operands[0], int(number))
    return compare(*at_larger_scale(call, call.format.inputs[0]))


def logical(call: Call) -> np.ndarray:
    return LOGIC[name_of(call)](*(x != 0 for x in call.operands))


def bitwise(call: Call) -> np.ndarray:
    """On int64, which has the bits of a narrower integer and its sign."""
    a, *others = call.operands
    match name_of(call), call.format.output:
        case "BitwiseAnd", _:
            return a & others[0]
        case "BitwiseOr", _:
            return a | others[0]
        case "BitwiseXor", _:
            return a ^ others[0]
        case "BitwiseNot", "int32":
            return ~a
        case "BitwiseNot", dtype:
            return {"bool": 1, "uint8": 255}[dtype] - a
    raise GraphError(f"no bitwise rule for {name_of(call)}")


def where(call: Call) -> np.ndarray:
    """Both rescaled to the output, then chosen from."""
    condition = call.operands[0] != 0
    a, b = at_larger_scale(call, call.format.output) if call.constants else call.operands[1:]
    return np.where(condition, a, b)


def masked_fill(call: Call) -> np.ndarray:
    """`fill` is the value in LSB."""
    x, mask = call.operands
    fill = call.constants["fill"] if call.constants else int(call.op.value)
    return np.where(mask != 0, fill, x)


def whole(call: Call) -> np.ndarray:
    """x * factor / 2^shift is the real x, below 2^39: cut to a whole number, then rescaled from scale 1."""
    (x,), c = call.operands, call.constants
    product, shift = x * c["factor"], min(int(c["shift"]), 62)
    match name_of(call):
        case "Floor":
            integer = round_shift(product, shift, "floor")
        case "Ceil":
            integer = -round_shift(-product, shift, "floor")
        case "Round":
            integer = round_shift(product, shift, "half_even")
        case name:
            raise GraphError(f"no rounding for {name}")
    return call.rescaled(integer)


def mod(call: Call) -> np.ndarray:
    """The remainder with the sign of the divisor, or of the dividend; 0 where the divisor is 0."""
    if "modulus" in call.constants:
        a, b = call.operands[0], call.constants["modulus"]
    elif call.op.value is not None:
        a, b = call.operands[0], np.array(int(call.op.value))
    else:
        a, b = at_larger_scale(call, call.format.output)
    divisor = np.where(b == 0, 1, b)
    quotient = np.floor_divide(a, divisor)
    if call.op.same_sign_as_dividend:
        quotient = np.sign(a) * np.sign(divisor) * (np.abs(a) // np.abs(divisor))
    return saturate(np.where(b == 0, 0, a - quotient * divisor), call.format.output)
