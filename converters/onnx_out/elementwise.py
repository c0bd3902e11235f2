"""Export rules: arithmetic, functions, comparisons and choices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import jquant.ops as ops
from jquant.ops.names import FUNCTIONS
from jquant.types import Op

from .writer import Call, Operand, Unsupported, emit

# One ONNX operator of the same name and meaning, on floats. Others have a rule below.
PLAIN: dict[type[Op], str] = {type(row.op): row.onnx for row in FUNCTIONS if row.onnx}
PLAIN |= {ops.Div: "Div"}
PLAIN |= dict.fromkeys((ops.DeQuantStub, ops.Dequantize, ops.Dropout, ops.QuantStub, ops.Requantize), "Identity")
PLAIN |= {ops.StopGradient: "Identity"}
BINARY: dict[type[Op], str] = {ops.Add: "Add", ops.Mul: "Mul", ops.Sub: "Sub"}
EXTREMES: dict[type[Op], str] = {ops.Maximum: "Max", ops.Minimum: "Min"}
COMPARISONS: dict[type[Op], str] = {
    ops.Equal: "Equal",
    ops.Greater: "Greater",
    ops.GreaterEqual: "GreaterOrEqual",
    ops.Less: "Less",
    ops.LessEqual: "LessOrEqual",
    ops.NotEqual: "Equal",
}
LOGICAL: dict[type[Op], str] = {
    ops.LogicalAnd: "And",
    ops.LogicalNot: "Not",
    ops.LogicalOr: "Or",
    ops.LogicalXor: "Xor",
}
BITWISE: dict[type[Op], str] = {
    ops.BitwiseAnd: "BitwiseAnd",
    ops.BitwiseNot: "BitwiseNot",
    ops.BitwiseOr: "BitwiseOr",
    ops.BitwiseXor: "BitwiseXor",
}


def register(table: dict[type[Op], str], rule: Callable[[Op, Call, str], None]) -> None:
    for cls, kind in table.items():
        emit.register(cls)(lambda op, call, kind=kind: rule(op, call, kind))


def _plain(op: Op, call: Call, kind: str) -> None:
    call.add(kind, *call.inputs)


def numbers(call: Call) -> list[str]:
    """Operands in one dtype, as `as_numbers` makes them: float32 if one is a number, else int32."""
    dtype = "float32" if any(x.dtype == "float32" for x in call.inputs) else "int32"
    return [x.name if x.dtype == dtype else call.cast(x, dtype, f"as_{dtype}") for x in call.inputs]


def _binary(op: Op, call: Call, kind: str) -> None:
    call.add(kind, *numbers(call))


def alike(call: Call) -> list[str]:
    """Operands as they are where they have one dtype, else as numbers."""
    return [x.name for x in call.inputs] if len({x.dtype for x in call.inputs}) == 1 else numbers(call)


def _extreme(op: Op, call: Call, kind: str) -> None:
    a, b = alike(call)
    if all(x.dtype == "bool" for x in call.inputs):
        call.add("Or" if kind == "Max" else "And", a, b)
    else:
        call.add(kind, a, b)


def _compare(op: Any, call: Call, kind: str) -> None:
    if all(x.dtype == "bool" for x in call.inputs) and kind != "Equal":
        raise Unsupported("an order of masks; use logical operators")
    if op.value is None:
        operands = call.requantized(alike(call))
    else:
        (x,) = call.inputs
        source = call.cast(x, "int32", "as_int32") if x.dtype in ("bool", "uint8") else x.name
        dtype = np.float32 if x.dtype == "float32" else np.int32
        operands = [source, call.constant(op.value, "value", dtype)]
    if isinstance(op, ops.NotEqual):
        call.add("Not", call.add(kind, *operands, part="equal"))
    else:
        call.add(kind, *operands)


def _logical(op: Op, call: Call, kind: str) -> None:
    call.add(kind, *(x.name if x.dtype == "bool" else call.cast(x, "bool", "as_bool") for x in call.inputs))


def _bitwise(op: Op, call: Call, kind: str) -> None:
    masks = {"BitwiseAnd": "And", "BitwiseOr": "Or", "BitwiseXor": "Xor", "BitwiseNot": "Not"}
    call.add(masks[kind] if call.inputs[0].dtype == "bool" else kind, *call.inputs)


register(PLAIN, _plain)
register(BINARY, _binary)
register(EXTREMES, _extreme)
register(COMPARISONS, _compare)
register(LOGICAL, _logical)
register(BITWISE, _bitwise)

# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic with a number


@emit.register
def _(op: ops.Scale, call: Call) -> None:
    call.add("Mul", call.inputs[0], call.constant(op.factor, "factor"))


@emit.register(ops.Neg)
@emit.register(ops.Abs)
def _(op: ops.Neg | ops.Abs, call: Call) -> None:
    call.add(type(op).__name__, *numbers(call))


@emit.register
def _(op: ops.Clamp, call: Call) -> None:
    (x,) = call.inputs
    if x.dtype != "float32":
        bounds = [None if b is None else call.constant(b, n, x.dtype) for b, n in _bounds(op)]
    else:
        bounds = [None if b is None else call.constant(call.snap(b), n) for b, n in _bounds(op)]
    if x.dtype == "bool":
        raise Unsupported("bounds of a mask")
    if bounds == [None, None]:
        call.add("Identity", x)
    else:
        call.add("Clip", x, *(b or "" for b in bounds))


def _bounds(op: ops.Clamp) -> tuple[tuple[float | None, str], ...]:
    return (op.minimum, "minimum"), (op.maximum, "maximum")


@emit.register
def _(op: ops.Relu6, call: Call) -> None:
    call.add("Clip", call.inputs[0], call.constant(0.0, "minimum"), call.constant(call.snap(6.0), "maximum"))


@emit.register
def _(op: ops.Pow, call: Call) -> None:
    call.add("Pow", call.inputs[0], call.constant(op.exponent, "exponent"))


@emit.register
def _(op: ops.Mod, call: Call) -> None:
    """Operands meet at the larger scale, and a number is a whole count of steps, as in the integers."""
    a, *others = call.requantized(numbers(call))
    floating = any(x.dtype == "float32" for x in call.inputs)
    if not floating:
        b = others[0] if others else call.constant(op.value, "divisor", np.int32)
        call.add("Mod", a, b, fmod=int(op.same_sign_as_dividend))
        return
    b = others[0] if others else call.constant(call.in_steps(op.value or 0.0), "divisor")
    if op.same_sign_as_dividend:
        rest = call.add("Mod", a, b, part="rest", fmod=1)
    else:  # ONNX has no remainder of floats with the sign of the divisor
        whole = call.add("Floor", call.add("Div", a, b, part="quotient"), part="whole")
        rest = call.add("Sub", a, call.add("Mul", whole, b, part="multiple"), part="rest")
    zero = call.constant(0.0, "zero")
    call.add("Where", call.add("Equal", b, zero, part="by_zero"), zero, rest)


@emit.register
def _(op: ops.BitShift, call: Call) -> None:
    """ONNX shifts unsigned integers only: to the left a product that wraps, to the right an exact quotient."""
    (x,) = call.inputs
    if not -31 < op.bits < 31:
        raise Unsupported(f"a shift by {op.bits} bits; ONNX has it for unsigned integers only")
    factor = call.constant(2 ** abs(op.bits), "factor", np.int32)
    if op.bits <= 0:
        call.add("Mul", x, factor)
        return
    rest = call.add("Mod", x, factor, part="rest")
    call.add("Div", call.add("Sub", x, rest, part="multiple"), factor)


# ---------------------------------------------------------------------------------------------------------------------
# Functions with attributes


def shifted(call: Call, epsilon: float) -> str:
    (x,) = call.inputs
    return call.add("Add", x, call.constant(epsilon, "epsilon"), part="shifted") if epsilon else x.name


@emit.register(ops.Log)
@emit.register(ops.Sqrt)
@emit.register(ops.Reciprocal)
def _(op: ops.Log | ops.Sqrt | ops.Reciprocal, call: Call) -> None:
    call.add(type(op).__name__, shifted(call, op.epsilon))


@emit.register
def _(op: ops.Expm1, call: Call) -> None:
    call.add("Sub", call.add("Exp", call.inputs[0], part="exp"), call.constant(1.0, "one"))


@emit.register
def _(op: ops.Rsqrt, call: Call) -> None:
    call.add("Reciprocal", call.add("Sqrt", shifted(call, op.epsilon), part="sqrt"))


@emit.register(ops.Celu)
@emit.register(ops.Elu)
def _(op: ops.Celu | ops.Elu, call: Call) -> None:
    call.add(type(op).__name__, *call.inputs, alpha=op.alpha)


@emit.register
def _(op: ops.LeakyRelu, call: Call) -> None:
    call.add("LeakyRelu", *call.inputs, alpha=op.negative_slope)


@emit.register
def _(op: ops.Selu, call: Call) -> None:
    call.add("Selu", *call.inputs)


@emit.register
def _(op: ops.HardSigmoid, call: Call) -> None:
    call.add("HardSigmoid", *call.inputs, alpha=1 / 6, beta=0.5)


@emit.register
def _(op: ops.Silu, call: Call) -> None:
    call.add("Mul", call.inputs[0], call.add("Sigmoid", call.inputs[0], part="sigmoid"))


@emit.register
def _(op: ops.LogSigmoid, call: Call) -> None:
    negative = call.add("Neg", call.inputs[0], part="negative")
    call.add("Neg", call.add("Softplus", negative, part="softplus"))


_SOFTPLUS_IS_LINEAR = 17.0  # log(1 + exp(x)) - x is less than half an ulp of x from about 15 on


@emit.register
def _(op: ops.Softplus, call: Call) -> None:
    (x,) = call.inputs
    plain = op.threshold >= _SOFTPLUS_IS_LINEAR  # beyond it torch gives x, and so does float32
    if op.beta == 1.0 and plain:
        call.add("Softplus", x)
        return
    scaled = x if op.beta == 1.0 else call.add("Mul", x, call.constant(op.beta, "beta"), part="scaled")
    soft: Any = call.add("Softplus", scaled, part="softplus")
    if op.beta != 1.0:
        soft = call.add("Div", soft, call.constant(op.beta, "divisor"), part="" if plain else "divided")
    if not plain:
        linear = call.add("Greater", scaled, call.constant(op.threshold, "threshold"), part="linear")
        call.add("Where", linear, x, soft)


@emit.register
def _(op: ops.ThresholdedRelu, call: Call) -> None:
    (x,) = call.inputs
    if op.value == 0.0 and op.threshold >= 0:
        call.add("ThresholdedRelu", x, alpha=op.threshold)
        return
    above = call.add("Greater", x, call.constant(op.threshold, "threshold"), part="above")
    call.add("Where", above, x, call.constant(op.value, "value"))


@emit.register
def _(op: ops.Gelu, call: Call) -> None:
    (x,) = call.inputs
    if call.opset >= 20:
        call.add("Gelu", x, approximate=op.approximate)
    elif op.approximate == "none":
        inner = call.add("Div", x, call.constant(np.sqrt(2), "root"), part="scaled")
        erf = call.add("Add", call.add("Erf", inner, part="erf"), call.constant(1.0, "one"), part="shifted")
        half = call.add("Mul", x, erf, part="product")
        call.add("Mul", half, call.constant(0.5, "half"))
    else:
        _gelu_tanh(x, call)


def _gelu_tanh(x: Operand, call: Call) -> None:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    cube = call.add("Mul", call.add("Mul", x, x, part="square"), x, part="cube")
    scaled = call.add("Mul", cube, call.constant(0.044715, "cubic"), part="scaled")
    inner = call.add("Add", x, scaled, part="inner")
    angle = call.add("Mul", inner, call.constant(np.sqrt(2 / np.pi), "root"), part="angle")
    tanh = call.add("Add", call.add("Tanh", angle, part="tanh"), call.constant(1.0, "one"), part="shifted")
    call.add("Mul", call.add("Mul", x, tanh, part="product"), call.constant(0.5, "half"))


@emit.register
def _(op: ops.PRelu, call: Call) -> None:
    """The slope [C] along axis 1."""
    (x,) = call.inputs
    count, slope = call.param_shapes["weight"][0], call.params["weight"]
    if count > 1 and len(x.shape) > 2:
        shape = (count, *(1,) * (len(x.shape) - 2))
        slope = call.reshape_to(shape, slope, "slope")
    call.add("PRelu", x, slope)


# ---------------------------------------------------------------------------------------------------------------------
# Choices and constants


@emit.register
def _(op: ops.Where, call: Call) -> None:
    mask, a, b = call.inputs
    dtype = a.dtype if a.dtype == b.dtype else "float32" if "float32" in (a.dtype, b.dtype) else "int32"
    pair = [x.name if x.dtype == dtype else call.cast(x, dtype, f"as_{dtype}") for x in (a, b)]
    call.add("Where", mask, *pair)


@emit.register
def _(op: ops.MaskedFill, call: Call) -> None:
    x, mask = call.inputs
    value = call.snap(op.value) if x.dtype == "float32" else op.value
    call.add("Where", mask, call.constant(value, "value", x.dtype), x)


@emit.register
def _(op: ops.Constant, call: Call) -> None:
    call.add("Identity", call.params["value"])


@emit.register
def _(op: ops.IntegerConstant, call: Call) -> None:
    values = np.asarray(op.values).reshape(op.shape)
    call.add("Identity", call.constant(values, "value", np.bool_ if op.dtype == "bool" else np.int32))


@emit.register
def _(op: ops.CentrePixels, call: Call) -> None:
    number = call.cast(call.inputs[0], "float32", "number")
    centred = call.add("Sub", number, call.constant(128.0, "centre"), part="centred")
    call.add("Mul", centred, call.constant(op.unit, "unit"))
