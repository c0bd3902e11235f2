"""Quotients that are rounded down or towards zero, by operators that exist.

An integer less its remainder is a multiple of the divisor, whose exact quotient is a product: by the inverse of the odd
part of the divisor modulo 2^32. A shift takes the powers of two. `index_arithmetic` knows its bounds.
"""

from __future__ import annotations

from math import frexp
from typing import Any

import torch
from torch.fx import Node

import jquant.ops as ops
from jquant.types import Op

from ..exact_values import exact_divisor
from .call import Call, Handler, Shape, aten, dtype_of, integers, is_exact, number, require, scalar_of


def quotient(a: Any, b: Any, towards_zero: bool) -> Any:
    b = scalar_of(b)
    require(isinstance(a, Node), "a number divided by a tensor; multiply by the reciprocal, and use torch.floor")
    if is_exact(a):
        return of_integers(a, b, towards_zero)
    require(not is_exact(b), "a number divided by integers; convert them to float32 before")
    return of_numbers(a, b, towards_zero)


def of_numbers(a: Node, b: Any, towards_zero: bool) -> Call:
    """As torch computes it: down from the remainder, which is exact; towards zero from the quotient.

    By a whole number the quotient comes from the remainder too, since its reciprocal is not exact.
    """
    if isinstance(b, Node):
        divided = Call(ops.Div(), (a, b), label="quotient")
        return cut(divided) if towards_zero else from_remainder(a, ops.Mod(), ops.Div(), (b,))
    require(number(b, "divisor") != 0, "the divisor is 0")
    scale = ops.Scale(factor=1.0 / b)
    if towards_zero and b != int(b):
        return cut(Call(scale, (a,), label="quotient"))
    if not towards_zero and abs(frexp(b)[0]) == 0.5:  # a power of two, whose reciprocal is exact
        return Call(ops.Floor(), (Call(scale, (a,), label="quotient"),))
    return from_remainder(a, ops.Mod(value=float(b), same_sign_as_dividend=towards_zero), scale, ())


def cut(x: Call) -> Call:
    """Rounded towards zero."""
    size = Call(ops.Floor(), (Call(ops.Abs(), (x,), label="abs"),), label="floor")
    return Call(ops.Mul(), (Call(ops.Sign(), (x,), label="sign"), size))


def from_remainder(a: Node, remainder: Op, division: Op, divisor: tuple[Node, ...]) -> Call:
    """(a - a mod b) / b, rounded to the whole number that it is but for float32."""
    rest = Call(remainder, (a, *divisor), label="remainder")
    multiple = Call(ops.Sub(), (a, rest), label="multiple")
    return Call(ops.Round(), (Call(division, (multiple, *divisor), label="divided"),))


def of_integers(a: Node, b: Any, towards_zero: bool) -> Any:
    require(isinstance(b, int), "integers divided by a tensor or by a fraction; divide by a whole number")
    require(b != 0, "the divisor is 0")
    require(abs(b) < 2**31, "a divisor beyond int32")
    require(dtype_of(a) not in (torch.uint8, torch.bool), f"integers of {dtype_of(a)}; convert them with .int() before")
    bits, inverse = exact_divisor(b)
    if towards_zero:
        rest = Call(ops.Mod(value=float(b), same_sign_as_dividend=True), (a,), label="remainder")
        return times(shifted(Call(ops.Sub(), (a, rest), label="multiple"), bits, "shift"), inverse)
    if inverse == 1:
        return shifted(a, bits)
    rest = Call(ops.Mod(value=float(b >> bits)), (a,), label="remainder")
    return shifted(times(Call(ops.Sub(), (a, rest), label="multiple"), inverse, "odd" if bits else ""), bits)


def shifted(x: Any, bits: int, label: str = "") -> Any:
    return Call(ops.BitShift(bits=bits), (x,), label=label) if bits else x


def times(multiple: Any, inverse: int, label: str = "") -> Any:
    if inverse == 1:
        return multiple
    return Call(ops.Mul(), (multiple, integers((), [inverse], label="inverse")), label=label)


def floor_divide(out: Shape, a: Any, b: Any) -> Any:
    return quotient(a, b, towards_zero=False)


TABLE: dict[Any, Handler] = {
    aten.floor_divide.default: floor_divide,
    aten.floor_divide.Scalar: floor_divide,
}
