"""Handlers: arithmetic, functions, comparisons, choices and casts."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite, sqrt
from typing import Any

import numpy as np
import onnx

import jquant.ops as ops
from jquant.drafts.values import shortest
from jquant.ops.names import FUNCTIONS
from jquant.plan.masks import VERY_NEGATIVE
from jquant.types import Op

from ..exact_values import exact_divisor
from .call import Call, Handler
from .load import INPUT_TYPES, TYPES
from .values import Known, Result, Unsupported, Value, known, require

PLAIN: dict[str, Op] = {row.onnx: row.op for row in FUNCTIONS if row.onnx}
PLAIN |= {"Not": ops.LogicalNot(), "BitwiseNot": ops.BitwiseNot()}
_OF_SUM: dict[str, Callable[..., Op]] = {"Log": ops.Log, "Sqrt": ops.Sqrt, "Reciprocal": ops.Reciprocal}
_EXACT_FUNCTIONS = ("Abs", "Neg", "Not", "BitwiseNot")


def function(kind: str) -> Handler:
    """One operand; log, sqrt and reciprocal of a sum with a constant, and 1 / sqrt, are operators of their own."""

    def handler(call: Call) -> Result:
        x = call.value(0) if kind in _EXACT_FUNCTIONS else call.real(0)
        made, operands = call.maker(x)
        if kind == "Reciprocal" and isinstance(made, ops.Sqrt):
            return call.make(ops.Rsqrt(epsilon=made.epsilon), *_again(call, operands))
        if kind in _OF_SUM and isinstance(made, ops.Add):
            source, epsilon = _plus_constant(call, operands, x)
            if source is not None:
                return call.make(_OF_SUM[kind](epsilon=epsilon), source)
        if kind == "Neg" and isinstance(made, ops.Softplus) and made == ops.Softplus():
            negated, inner = call.maker(_again(call, operands)[0])
            if isinstance(negated, ops.Neg):
                return call.make(ops.LogSigmoid(), *_again(call, inner))
        return call.make(PLAIN[kind], x)

    return handler


def _again(call: Call, names: tuple[str, ...]) -> list[Value]:
    return [call.graph.value_of(name) for name in names]


def _plus_constant(call: Call, operands: tuple[str, ...], total: Value) -> tuple[Value | None, float]:
    for x, other in (operands, operands[::-1]):
        value = call.graph.known_of(other)
        source = call.graph.value_of(x)
        if value is not None and value.size == 1 and source.shapes == total.shapes:
            return source, shortest(value.reshape(()))
    return None, 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic


def scalar(call: Call, i: int, like: Value) -> float | None:
    """A constant operand of one element that leaves the shape of the other one."""
    found = call.operand(i)
    if not isinstance(found, Known) or not found.fixed or found.at[0].size != 1 or found.at[0].ndim > like.rank:
        return None
    number = found.at[0].reshape(-1)[0]
    return shortest(number) if found.at[0].dtype == np.float32 else float(number)


def pair(call: Call) -> tuple[Value, Value]:
    return call.value(0), call.value(1)


def plain(op: Op) -> Handler:
    return lambda call: call.make(op, *pair(call))


def no_pixels(call: Call, *values: Value) -> None:
    """Arithmetic of uint8 alone wraps at 256 in ONNX, and makes an int32 here."""
    require(any(x.dtype != "uint8" for x in values), "arithmetic of uint8 alone; cast the operands to int32 or float32")


def arithmetic(op: Op) -> Handler:
    def handler(call: Call) -> Result:
        a, b = pair(call)
        no_pixels(call, a, b)
        return call.make(op, a, b)

    return handler


def mul(call: Call) -> Result:
    """By a number: `Scale`. x * sigmoid(x) and the like are operators of their own."""
    for i in (0, 1):
        other = call.operand(1 - i)
        if isinstance(other, Value) and other.dtype == "float32":
            factor = scalar(call, i, other)
            if factor:
                return _halved_gelu(call, other, factor) or call.scaled(other, factor)
            op, operands = call.maker(call.operand(i))
            gates: dict[type, Op] = {ops.Sigmoid: ops.Silu(), ops.HardSigmoid: ops.HardSwish()}
            if type(op) in gates and operands == (other.name,):
                return call.make(gates[type(op)], other)
            scale, inside = call.maker(other)
            if isinstance(scale, ops.Scale) and scale.factor == 0.5 and _is_erf_gate(call, call.operand(i), inside[0]):
                return call.make(ops.Gelu(), *_again(call, inside))
    return arithmetic(ops.Mul())(call)


def _halved_gelu(call: Call, product: Value, factor: float) -> Value | None:
    """0.5 * (x * (1 + erf(x / sqrt 2)))."""
    op, operands = call.maker(product)
    if factor != 0.5 or not isinstance(op, ops.Mul):
        return None
    for x, gate in (operands, operands[::-1]):
        if _is_erf_gate(call, call.graph.value_of(gate), x):
            return call.make(ops.Gelu(), call.graph.value_of(x))
    return None


def _is_erf_gate(call: Call, gate: Any, x: str) -> bool:
    """Whether a value is 1 + erf(x / sqrt 2)."""
    op, operands = call.maker(gate)
    if not isinstance(op, ops.Add):
        return False
    erf = next((n for n in operands if isinstance(call.graph.maker_of(n), ops.Erf)), None)
    one = next((v for n in operands if (v := call.graph.known_of(n)) is not None), None)
    if erf is None or one is None or one.size != 1 or float(one.reshape(())) != 1.0:
        return False
    (angle,) = call.graph.operands_of(erf)
    scale = call.graph.maker_of(angle)
    root = isinstance(scale, ops.Scale) and abs(scale.factor * sqrt(2) - 1) < 1e-6
    return root and call.graph.operands_of(angle) == (x,)


def whole_quotient(call: Call, a: Value) -> Result:
    """Integers by a constant, towards zero: what is left without the remainder is a multiple of the divisor."""
    found = scalar(call, 1, a)
    require(bool(found), "integers divided by a tensor or by 0; divide by a whole number that is a constant")
    divisor = int(found or 0)
    if divisor == 1:
        return a
    bits, inverse = exact_divisor(divisor)
    rest = call.make(ops.Mod(value=float(divisor), same_sign_as_dividend=True), a, part="remainder")
    multiple = call.make(ops.Sub(), a, rest, part="multiple")
    if bits:
        multiple = call.make(ops.BitShift(bits=bits), multiple, part="" if inverse == 1 else "shift")
    return (
        multiple
        if inverse == 1
        else call.make(ops.Mul(), multiple, call.constant(np.asarray(inverse, np.int32), "inverse"))
    )


def div(call: Call) -> Result:
    a, b = call.operand(0), call.operand(1)
    if isinstance(a, Value) and a.dtype == "int32":
        return whole_quotient(call, a)
    if isinstance(a, Value) and a.dtype == "float32":
        divisor = scalar(call, 1, a)
        if divisor:
            return call.scaled(a, 1.0 / divisor)
    if isinstance(b, Value) and b.dtype == "float32" and scalar(call, 0, b) == 1.0:
        return function("Reciprocal")(_only(call, 1))
    return call.make(ops.Div(), call.real(0), call.real(1))


def _only(call: Call, i: int) -> Call:
    return Call(call.node, call.name, call.opset, (call.inputs[i],), call.graph)


def power(call: Call) -> Result:
    x, exponent = call.operand(0), call.operand(1)
    if not isinstance(x, Value) or not isinstance(exponent, Known):
        raise Unsupported("an exponent that is no constant; use a number")
    value = scalar(call, 1, x)
    require(value is not None, "an exponent that is a tensor; use a number")
    assert value is not None
    require(x.dtype == "float32", "a power of integers; cast them to float32 before")
    known_powers: dict[float, Op] = {0.5: ops.Sqrt(), -0.5: ops.Rsqrt(), -1.0: ops.Reciprocal()}
    if value == 1:
        return x
    if value == 2:
        return call.make(ops.Mul(), x, x)
    require(isfinite(value), f"the exponent is {value}")
    return call.make(known_powers.get(value, ops.Pow(exponent=value)), x)


def mod(call: Call) -> Result:
    like_c, (a, b) = call.flag("fmod"), pair(call)
    require(like_c or a.dtype != "float32", "a remainder of floats with fmod=0")
    return call.make(ops.Mod(same_sign_as_dividend=like_c), a, b)


def several(op: Op) -> Handler:
    """A function of two, over any number of operands."""

    def handler(call: Call) -> Result:
        first, *others = call.values()
        for i, x in enumerate(others, start=1):
            first = call.make(op, first, x, part="" if i == len(others) else f"part_{i}")
        return first

    return handler


def extreme(op: Op, bound: str) -> Handler:
    """Of a value and one number it is a clamp, as in the other doors, which takes no scale for the number."""

    def handler(call: Call) -> Result:
        operands = [call.operand(i) for i in range(len(call.inputs))]
        values = [x for x in operands if isinstance(x, Value) and x.dtype == "float32"]
        if len(operands) == 2 and len(values) == 1:
            i = 1 if operands[0] is values[0] else 0
            number, known_one = scalar(call, i, values[0]), operands[i]
            if number is not None and isfinite(number) and isinstance(known_one, Known) and known_one.grid is None:
                return call.make(ops.Clamp(**{bound: number}), values[0])
        return several(op)(call)

    return handler


def mean(call: Call) -> Result:
    values = call.values()
    if len(values) == 1:
        return values[0]
    total = values[0]
    for i, x in enumerate(values[1:], start=1):
        total = call.make(ops.Add(), total, x, part=f"sum_{i}")
    return call.scaled(total, 1 / len(values))


def shift(call: Call) -> Result:
    raise Unsupported("shifts are of unsigned integers in ONNX, which have no counterpart here; multiply or divide")


# ---------------------------------------------------------------------------------------------------------------------
# Functions with attributes


def clip(call: Call) -> Result:
    x = call.value(0)
    if call.opset < 11:
        low, high = (call.attribute(n, "float") for n in ("min", "max"))
    else:
        low, high = (call.known_number(i, n) if call.given(i) else None for i, n in ((1, "min"), (2, "max")))
    low, high = (None if v is None or not isfinite(v) or abs(v) > 3.4e38 else float(v) for v in (low, high))
    if low == 0.0 and x.dtype == "float32" and high in (None, 6.0):
        return call.make(ops.Relu() if high is None else ops.Relu6(), x)
    if low is not None and high is not None and low > high:
        low = high
    return call.make(ops.Clamp(minimum=low, maximum=high), x)


def hard_sigmoid(call: Call) -> Result:
    x, alpha, beta = call.real(0), call.number("alpha", 0.2), call.number("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return call.make(ops.HardSigmoid(), x)
    require(alpha != 0, "alpha is 0")
    line = call.make(ops.Add(), call.scaled(x, alpha, "scaled"), call.constant(np.float32(beta), "beta"), part="line")
    return call.make(ops.Clamp(minimum=0.0, maximum=1.0), line)


def selu(call: Call) -> Result:
    alpha, gamma = call.number("alpha", 1.6732631921768188), call.number("gamma", 1.0507010221481323)
    if abs(alpha - 1.6732632) < 1e-6 and abs(gamma - 1.050701) < 1e-6:
        return call.make(ops.Selu(), call.real(0))
    return call.scaled(call.make(ops.Elu(alpha=alpha), call.real(0), part="elu"), gamma)


def gelu(call: Call) -> Result:
    kind = call.text("approximate", "none")
    require(kind in ("none", "tanh"), f"approximate={kind!r}")
    return call.make(ops.Gelu(approximate="tanh" if kind == "tanh" else "none"), call.real(0))


def with_alpha(cls: Callable[..., Op], field: str, default: float) -> Handler:
    return lambda call: call.make(cls(**{field: call.number("alpha", default)}), call.real(0))


def prelu(call: Call) -> Result:
    x, slope = call.real(0), call.operand(1)
    require(isinstance(slope, Known) and slope.fixed, "its slope is computed by the model; make it a constant")
    assert isinstance(slope, Known)
    array = slope.at[0]
    at = 1 if x.rank > 1 else 0
    padded = (1,) * (x.rank - array.ndim) + array.shape
    channels = all(n == 1 for i, n in enumerate(padded) if i != at)
    require(array.ndim <= x.rank and channels, f"a slope of shape {list(array.shape)}: one a channel, or one number")
    flat = Known((array.reshape(-1),) * 2, slope.name if array.ndim == 1 else "")
    require(flat.at[0].size in (1, x.shape[at]), f"{flat.at[0].size} slopes")
    return call.make(ops.PRelu(), x, params={"weight": flat})


def dropout(call: Call) -> list[Result]:
    from .values import Refused

    if call.opset >= 12 and call.given(2):
        require(
            not bool(call.known(2, "training_mode").reshape(-1)[0]), "it drops values; export the model in eval mode"
        )
    rate = call.number("ratio", 0.5) if call.opset < 12 else call.known_number(1, "ratio") if call.given(1) else 0.5
    x = call.value(0)
    result: Result = call.make(ops.Dropout(rate=min(max(rate, 0.0), 1.0)), x) if x.dtype == "float32" else x
    return [result, Refused("the mask of a dropout has no operator")]


# ---------------------------------------------------------------------------------------------------------------------
# Comparisons, logic, choices, casts


def comparison(cls: Callable[..., Op]) -> Handler:
    """A number is no operand: it has no scale."""

    def handler(call: Call) -> Result:
        a, b = call.operand(0), call.operand(1)
        if isinstance(a, Value) and isinstance(b, Known):
            value = scalar(call, 1, a)
            if value is not None and isfinite(value):
                return call.make(cls(value=value), a)
        return call.make(cls(), *pair(call))

    return handler


def where(call: Call) -> Result:
    """A number on one side is a fill of the other one."""
    mask = call.value(0)
    for i, other in ((1, 2), (2, 1)):
        operand = call.operand(other)
        x = _masked_constant(call, i, other) if isinstance(operand, Known) else operand
        if not isinstance(x, Value) or x.dtype != "float32":
            continue
        value = scalar(call, i, x)
        same = all(m <= n for m, n in zip(mask.shapes[0][::-1], x.shapes[0][::-1], strict=False))
        if value is not None and (value <= VERY_NEGATIVE or (mask.rank <= x.rank and same)):
            at = mask if i == 1 else call.make(ops.LogicalNot(), mask, part="not")
            filled = call.make(ops.MaskedFill(value=value), x, at)
            return _softmax_with_mask(call, filled, value, mask) if i == 1 and value == 0 else filled
    return call.make(ops.Where(), mask, call.value(1), call.value(2))


def _masked_constant(call: Call, fill: int, other: int) -> Value | None:
    """A constant, such as the bias of an attention, into which a mask is filled: a number that means minus infinity."""
    number, constant = call.operand(fill), call.operand(other)
    if not isinstance(number, Known) or not isinstance(constant, Known) or number.at[0].size != 1:
        return None
    is_mask = (
        number.at[0].dtype == np.float32 and number.at[0].item() <= VERY_NEGATIVE and np.isfinite(constant.at[0]).all()
    )
    return call.value(other) if is_mask else None


def _softmax_with_mask(call: Call, filled: Value, value: float, mask: Value) -> Value:
    """where(mask, 0, softmax(where(mask, very negative, x))): the mask is an operand of the softmax."""
    op, (source, *_) = call.maker(call.operand(2))[0], (*call.maker(call.operand(2))[1], "")
    inner = call.graph.maker_of(source) if source else None
    if not isinstance(op, ops.Softmax) or not isinstance(inner, ops.MaskedFill) or inner.value > VERY_NEGATIVE:
        return filled
    x, masked = call.graph.operands_of(source)
    if masked != mask.name:
        return filled
    return call.make(op, call.graph.value_of(x), mask, part="with_mask")


def cast(call: Call) -> Result:
    """Between float32, masks, pixels and indices, where no rounding is needed."""
    wanted = TYPES.get(call.integer("to", 0))
    require(wanted is not None, f"a cast to {_shown(call.integer('to', 0))}; keep the model in float32")
    return cast_to(call, INPUT_TYPES.get(str(wanted), ""), str(wanted))


def cast_like(call: Call) -> Result:
    like = call.operand(1)
    dtype = like.dtype if isinstance(like, Value) else INPUT_TYPES.get(str(like.at[0].dtype), "")
    return cast_to(call, dtype, dtype)


def cast_to(call: Call, dtype: str, shown: str) -> Result:
    x = call.value(0)
    if x.dtype == dtype:
        return x
    if dtype == "bool":
        return call.make(ops.NotEqual(value=0.0), x)
    if dtype == "float32" and x.dtype in ("bool", "uint8"):
        return call.make(ops.Mul(), x, call.constant(np.float32(1), "one"))
    if dtype == "int32" and x.dtype in ("bool", "uint8"):
        return call.make(ops.Add(), x, call.constant(np.int32(0), "zero"))
    raise Unsupported(f"a cast from {x.dtype} to {shown}; keep the model in float32")


def _shown(code: int) -> str:
    return onnx.TensorProto.DataType.Name(code) if code in onnx.TensorProto.DataType.values() else str(code)


def bitwise(of_masks: Op, of_integers: Op) -> Handler:
    return lambda call: call.make(of_masks if call.value(0).dtype == "bool" else of_integers, *pair(call))


def identity(call: Call) -> Any:
    return call.inputs[0]


def is_infinite(call: Call) -> Result:
    raise Unsupported("a test for values that are not finite; jquant's values always are")


def constant(call: Call) -> Result:
    given = {a.name for a in call.node.attribute}
    if "value" in given:
        return known(call.attribute("value", "tensor"), call.name)
    forms = {"value_float": "float", "value_int": "int", "value_floats": "floats", "value_ints": "ints"}
    for name, kind in forms.items():
        if name in given:
            dtype = np.float32 if "float" in kind else np.int64
            return known(np.asarray(call.attribute(name, kind), dtype), call.name)
    raise Unsupported(f"a constant of {', '.join(sorted(given)) or 'nothing'}")


TABLE: dict[str, Handler] = {
    **{kind: function(kind) for kind in PLAIN},
    "Add": arithmetic(ops.Add()),
    "And": plain(ops.LogicalAnd()),
    "BitShift": shift,
    "BitwiseAnd": bitwise(ops.LogicalAnd(), ops.BitwiseAnd()),
    "BitwiseOr": bitwise(ops.LogicalOr(), ops.BitwiseOr()),
    "BitwiseXor": bitwise(ops.LogicalXor(), ops.BitwiseXor()),
    "Cast": cast,
    "CastLike": cast_like,
    "Celu": with_alpha(ops.Celu, "alpha", 1.0),
    "Clip": clip,
    "Constant": constant,
    "Div": div,
    "Dropout": dropout,
    "Elu": with_alpha(ops.Elu, "alpha", 1.0),
    "Equal": comparison(ops.Equal),
    "Gelu": gelu,
    "Greater": comparison(ops.Greater),
    "GreaterOrEqual": comparison(ops.GreaterEqual),
    "HardSigmoid": hard_sigmoid,
    "Identity": identity,
    "IsInf": is_infinite,
    "IsNaN": is_infinite,
    "LeakyRelu": with_alpha(ops.LeakyRelu, "negative_slope", 0.01),
    "Less": comparison(ops.Less),
    "LessOrEqual": comparison(ops.LessEqual),
    "Max": extreme(ops.Maximum(), "minimum"),
    "Mean": mean,
    "Min": extreme(ops.Minimum(), "maximum"),
    "Mod": mod,
    "Mul": mul,
    "Or": plain(ops.LogicalOr()),
    "PRelu": prelu,
    "Pow": power,
    "Selu": selu,
    "Sub": arithmetic(ops.Sub()),
    "Sum": several(ops.Add()),
    "ThresholdedRelu": with_alpha(ops.ThresholdedRelu, "threshold", 1.0),
    "Where": where,
    "Xor": plain(ops.LogicalXor()),
}
