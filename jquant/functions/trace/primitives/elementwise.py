"""Arithmetic, functions of one number, comparisons, logic and choices."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, log
from typing import Any

import numpy as np

import jquant.ops as ops
from jquant.drafts.values import Draft, Known, Value, broadcast_in, constant, elementwise, scalar_of
from jquant.functions.trace.primitives.common import (
    DTYPES,
    is_float,
    out_dtype,
    out_shape,
    require,
    require_dtypes,
    unexpanded,
)
from jquant.functions.trace.primitives.dropout import scaled_dropout
from jquant.functions.trace.reader import Reader
from jquant.ops.names import FUNCTIONS
from jquant.types import Op

Handler = Callable[..., Any]

# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic


def binary(reader: Reader, equation: Any, op: Op, *operands: Value) -> Value:
    """A node of operands that broadcast."""
    require_dtypes(DTYPES, *operands)
    require(str(out_dtype(equation)) in ("float32", "int32", "bool"), f"a result of {out_dtype(equation)}")
    shape = out_shape(equation)
    return reader.draft(op, *unexpanded(operands, shape), shape=shape, dtype=out_dtype(equation))


def scaled(reader: Reader, x: Value, factor: float) -> Value:
    if isinstance(x, Draft) and x in reader.unscaled:
        return scaled_dropout(reader, x, factor)
    return x if factor == 1 else reader.draft(ops.Scale(factor=factor), x, shape=x.shape)


def add(reader: Reader, equation: Any, a: Value, b: Value) -> Value:
    for x, other in ((a, b), (b, a)):
        if scalar_of(other) == 0 and x.shape == out_shape(equation):
            return x
    return binary(reader, equation, ops.Add(), a, b)


def sub(reader: Reader, equation: Any, a: Value, b: Value) -> Value:
    if scalar_of(b) == 0 and a.shape == out_shape(equation):
        return a
    return binary(reader, equation, ops.Sub(), a, b)


def mul(reader: Reader, equation: Any, a: Value, b: Value) -> Value:
    for x, other in ((a, b), (b, a)):
        factor = scalar_of(other)
        if factor == 0 and is_float(x):
            return broadcast_in(number(0.0), out_shape(equation), ())
        if factor is not None and is_float(x) and x.shape == out_shape(equation):
            return scaled(reader, x, factor)
    return binary(reader, equation, ops.Mul(), a, b)


def div(reader: Reader, equation: Any, a: Value, b: Value) -> Value:
    require(is_float(a), "a division of integers")
    numerator, divisor = scalar_of(a), scalar_of(b)
    if divisor is not None and divisor != 0 and a.shape == out_shape(equation):
        return scaled(reader, a, 1 / divisor)
    if numerator is not None and b.shape == out_shape(equation):
        return scaled(reader, reader.draft(ops.Reciprocal(), b, shape=b.shape), numerator)
    if isinstance(b, Known) and b.is_trained:
        inverse = reader.share(b, ("reciprocal",), lambda: elementwise("reciprocal", lambda x: 1 / x, [b], b.shape))
        return binary(reader, equation, ops.Mul(), a, inverse)
    return binary(reader, equation, ops.Div(), a, b)


def neg(reader: Reader, equation: Any, x: Value) -> Value:
    return unary(ops.Neg())(reader, equation, x)


def square(reader: Reader, equation: Any, x: Value) -> Value:
    return binary(reader, equation, ops.Mul(), x, x)


def integer_pow(reader: Reader, equation: Any, x: Value) -> Value:
    require(is_float(x), "a power of integers")
    return reader.draft(ops.Pow(exponent=float(equation.params["y"])), x, shape=x.shape)


def power(reader: Reader, equation: Any, x: Value, y: Value) -> Value:
    exponent = scalar_of(y)
    require(exponent is not None and is_float(x), "an exponent that is computed")
    assert exponent is not None
    return reader.draft(ops.Pow(exponent=exponent), x, shape=x.shape)


def rem(reader: Reader, equation: Any, a: Value, b: Value) -> Value:
    value = scalar_of(b)
    if value is not None:
        return reader.draft(ops.Mod(value=value, same_sign_as_dividend=True), a, shape=a.shape)
    return binary(reader, equation, ops.Mod(same_sign_as_dividend=True), a, b)


def shift(sign: int) -> Handler:
    """By a number of bits, to the right (1) or to the left (-1)."""

    def handle(reader: Reader, equation: Any, x: Value, bits: Value) -> Value:
        count = scalar_of(bits)
        require_dtypes(("int32",), x)
        require(count is not None and 0 <= count < 32, "a shift by bits that are computed, or by more than 31")
        assert count is not None
        return reader.draft(ops.BitShift(bits=sign * int(count)), x, shape=x.shape, dtype=np.int32)

    return handle


# ---------------------------------------------------------------------------------------------------------------------
# Functions of one number


def unary(op: Op) -> Handler:
    def handle(reader: Reader, equation: Any, x: Value) -> Value:
        require_dtypes(("float32", "int32") if isinstance(op, ops.Neg | ops.Abs) else ("float32",), x)
        return reader.draft(op, x, shape=x.shape)

    return handle


def number(value: float) -> Known:
    return constant(np.float32(value))


def exp2(reader: Reader, equation: Any, x: Value) -> Value:
    return reader.draft(ops.Exp(), scaled(reader, x, log(2)), shape=x.shape)


def erfc(reader: Reader, equation: Any, x: Value) -> Value:
    erf = reader.draft(ops.Erf(), x, shape=x.shape)
    return reader.draft(ops.Sub(), number(1.0), erf, shape=x.shape)


def round_(reader: Reader, equation: Any, x: Value) -> Value:
    require(int(equation.params["rounding_method"]) == 1, "rounding of ties away from zero")
    return unary(ops.Round())(reader, equation, x)


# ---------------------------------------------------------------------------------------------------------------------
# Bounds


def bounded(reader: Reader, x: Value, minimum: float | None, maximum: float | None) -> Value:
    minimum = None if minimum == -inf else minimum
    maximum = None if maximum == inf else maximum
    if minimum is None and maximum is None:
        return x
    op: Op = ops.Clamp(minimum=minimum, maximum=maximum)
    if is_float(x) and minimum == 0:
        op = ops.Relu() if maximum is None else ops.Relu6() if maximum == 6 else op
    return reader.draft(op, x, shape=x.shape)


def maximum(reader: Reader, equation: Any, a: Value, b: Value) -> Value:
    for x, other in ((a, b), (b, a)):
        bound = scalar_of(other)
        if bound is not None and x.shape == out_shape(equation):
            return bounded(reader, x, bound, None)
    return binary(reader, equation, ops.Maximum(), a, b)


def minimum(reader: Reader, equation: Any, a: Value, b: Value) -> Value:
    for x, other in ((a, b), (b, a)):
        bound = scalar_of(other)
        if bound is not None and x.shape == out_shape(equation):
            return bounded(reader, x, None, bound)
    return binary(reader, equation, ops.Minimum(), a, b)


def clamp(reader: Reader, equation: Any, low: Value, x: Value, high: Value) -> Value:
    bounds = scalar_of(low), scalar_of(high)
    require(None not in bounds, "bounds that are computed")
    return bounded(reader, x, *bounds)


# ---------------------------------------------------------------------------------------------------------------------
# Comparisons, logic, choices

_MIRRORED = {
    ops.Equal: ops.Equal,
    ops.NotEqual: ops.NotEqual,
    ops.Greater: ops.Less,
    ops.GreaterEqual: ops.LessEqual,
    ops.Less: ops.Greater,
    ops.LessEqual: ops.GreaterEqual,
}


def comparison(op: Any) -> Handler:
    def handle(reader: Reader, equation: Any, a: Value, b: Value) -> Value:
        require_dtypes(("float32", "int32", "uint8"), a, b)
        for x, other, kind in ((a, b, op), (b, a, _MIRRORED[op])):
            value = scalar_of(other)
            if value is not None and x.shape == out_shape(equation):
                return reader.draft(kind(value=value), x, shape=x.shape, dtype=bool)
        return binary(reader, equation, op(), a, b)

    return handle


def logic(of_masks: Op, of_bits: Op) -> Handler:
    def handle(reader: Reader, equation: Any, *operands: Value) -> Value:
        return binary(reader, equation, of_masks if str(out_dtype(equation)) == "bool" else of_bits, *operands)

    return handle


def select(reader: Reader, equation: Any, which: Value, *cases: Value) -> Value:
    """`lax.select_n(which, if_false, if_true)`."""
    require(len(cases) == 2 and which.dtype == bool, "a choice between more than two")
    require_dtypes(DTYPES, *cases)
    shape = out_shape(equation)
    if (chosen := scalar_of(which)) is not None:
        return cases[int(chosen)]
    if_false, if_true = cases
    if not which.shape and shape:
        which = reader.reshape(which, (1,) * len(shape))
    for x, other, mask in ((if_false, if_true, which), (if_true, if_false, None)):
        fill = scalar_of(other)
        if fill is None or x.shape != shape:
            continue
        mask = reader.inverted(which) if mask is None else mask
        return reader.draft(ops.MaskedFill(value=fill), *unexpanded((x, mask), shape), shape=shape)
    operands = unexpanded((which, if_true, if_false), shape)
    return reader.draft(ops.Where(), *operands, shape=shape, dtype=out_dtype(equation))


# ---------------------------------------------------------------------------------------------------------------------
# Conversions, and what changes no value


def convert(reader: Reader, equation: Any, x: Value) -> Value:
    was, now = str(x.dtype), str(out_dtype(equation))
    require(was in DTYPES and now in DTYPES, f"a conversion from {was} to {now}")
    if was == now:
        return x
    if now == "bool":
        return reader.draft(ops.NotEqual(value=0.0), x, shape=x.shape, dtype=bool)
    if now == "float32" and was in ("bool", "uint8"):
        return reader.draft(ops.Mul(), x, number(1.0), shape=x.shape, dtype=np.float32)
    require(now == "int32" and was in ("bool", "uint8"), f"a conversion from {was} to {now}")
    return reader.draft(ops.Add(), x, constant(np.int32(0)), shape=x.shape, dtype=np.int32)


def same(reader: Reader, equation: Any, *operands: Value) -> Any:
    return list(operands)


TABLE: dict[str, Handler] = {
    "add": add, "add_any": add, "sub": sub, "mul": mul, "div": div, "neg": neg, "square": square,
    "integer_pow": integer_pow, "pow": power, "rem": rem,
    "shift_right_arithmetic": shift(1), "shift_left": shift(-1),
    "max": maximum, "min": minimum, "clamp": clamp,
    "eq": comparison(ops.Equal), "ne": comparison(ops.NotEqual), "gt": comparison(ops.Greater),
    "ge": comparison(ops.GreaterEqual), "lt": comparison(ops.Less), "le": comparison(ops.LessEqual),
    "and": logic(ops.LogicalAnd(), ops.BitwiseAnd()), "or": logic(ops.LogicalOr(), ops.BitwiseOr()),
    "xor": logic(ops.LogicalXor(), ops.BitwiseXor()), "not": logic(ops.LogicalNot(), ops.BitwiseNot()),
    "select_n": select,
    **{row.jax: unary(row.op) for row in FUNCTIONS if row.jax}, "round": round_,
    "exp2": exp2, "erfc": erfc,
    "convert_element_type": convert,
    "copy": same, "copy_p": same, "device_put": same, "name": same, "optimization_barrier": same,
    "sharding_constraint": same, "pvary": same,
}  # fmt: skip
