"""Comparisons, logic, and choices by a mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

import jquant.ops as ops
from jquant.types import Op

from .call import Call, Handler, Shape, Unsupported, aten, dtype_of, one_like, require, scalar_of


def comparison(cls: Callable[..., Op]) -> Handler:
    """A number is no operand: it has no scale."""

    def handler(out: Shape, a: Any, b: Any) -> Call:
        b = scalar_of(b)
        if isinstance(b, Node):
            return Call(cls(), (a, b))
        require(isinstance(b, int | float), "it compares with the batch size; make it a constant")
        return Call(cls(value=float(b)), (a,))

    return handler


def logical(op: Op) -> Handler:
    return lambda out, *operands: Call(op, operands)


def bitwise(of_masks: Op, of_integers: Op) -> Handler:
    def handler(out: Shape, *operands: Any) -> Call:
        tensors = [x for x in operands if isinstance(x, Node)]
        if all(dtype_of(x) == torch.bool for x in tensors) and all(isinstance(x, Node | bool) for x in operands):
            pairs = (x if isinstance(x, Node) else one_like(tensors[0], x) for x in operands)
            return Call(of_masks, tuple(pairs))
        return Call(of_integers, tuple(one_like(tensors[0], x) for x in operands))

    return handler


def shift(sign: int) -> Handler:
    """By a number of bits, to the right (1) or to the left (-1)."""

    def handler(out: Shape, x: Any, bits: Any) -> Call:
        bits = scalar_of(bits)
        require(isinstance(x, Node) and isinstance(bits, int | float) and bits == int(bits), "the bits are a tensor")
        kind = dtype_of(x)
        require(kind in (torch.int32, torch.int64), f"a shift of {kind}; convert it with .int() before")
        require(0 <= bits < 32, f"a shift by {bits} bits; an int32 has 0 to 31")
        return Call(ops.BitShift(bits=sign * int(bits)), (x,))

    return handler


def where(out: Shape, condition: Node, a: Any, b: Any) -> Call:
    """A number on one side is a fill of the other one; of two numbers the smaller one is."""
    a, b = scalar_of(a), scalar_of(b)
    inverse = Call(ops.LogicalNot(), (condition,), label="not")
    if isinstance(a, float) and isinstance(b, float):
        fill, base, mask = (a, b, condition) if a < b else (b, a, inverse)
        return Call(ops.MaskedFill(value=fill), (base, mask))
    for value, other, mask in ((a, b, condition), (b, a, inverse)):
        if not isinstance(value, Node) and isinstance(other, Node) and other.meta["val"].dtype == torch.float32:
            return Call(ops.MaskedFill(value=float(value)), (other, mask))
    require(isinstance(a, Node) or isinstance(b, Node), "a choice between two numbers; multiply the mask instead")
    return Call(ops.Where(), (condition, one_like(b, a), one_like(a, b)))


def masked_fill(out: Shape, x: Node, mask: Node, value: Any) -> Call:
    value = scalar_of(value)
    require(isinstance(value, int | float), "the value is a tensor; use torch.where")
    return Call(ops.MaskedFill(value=float(value)), (x, mask))


def to_dtype(out: Shape, x: Node, dtype: torch.dtype | None = None, *_: Any) -> Any:
    """Between float32, masks, pixels and indices, where no rounding is needed."""
    was = dtype_of(x)
    dtype = was if dtype is None else dtype
    whole = (torch.int8, torch.int16, torch.int32, torch.int64)
    if dtype == was or (dtype in (torch.int32, torch.int64) and was in whole):
        return x
    if dtype == torch.bool:
        return Call(ops.NotEqual(value=0.0), (x,))
    if dtype == torch.float32 and was in (torch.bool, torch.uint8):
        return Call(ops.Mul(), (x, 1.0))
    if dtype in (torch.int32, torch.int64) and was in (torch.bool, torch.uint8):
        return Call(ops.Add(), (x, one_like(x, 0)))
    raise Unsupported(f"a conversion from {was} to {dtype}; keep the model in float32")


def to_other(out: Shape, x: Node, other: Node, *_: Any) -> Any:
    return to_dtype(out, x, dtype_of(other))


def to_layout(out: Shape, x: Node, dtype: Any = None, *_: Any) -> Any:
    return to_dtype(out, x, dtype)


def to_device(out: Shape, x: Node, device: Any, dtype: Any, *_: Any) -> Any:
    return to_dtype(out, x, dtype)


COMPARISONS: dict[str, Callable[..., Op]] = {
    "eq": ops.Equal,
    "ne": ops.NotEqual,
    "gt": ops.Greater,
    "ge": ops.GreaterEqual,
    "lt": ops.Less,
    "le": ops.LessEqual,
}
_AND = bitwise(ops.LogicalAnd(), ops.BitwiseAnd())
_OR = bitwise(ops.LogicalOr(), ops.BitwiseOr())
_XOR = bitwise(ops.LogicalXor(), ops.BitwiseXor())
_RIGHT, _LEFT = shift(1), shift(-1)

TABLE: dict[Any, Handler] = {
    **{getattr(aten, name).Tensor: comparison(cls) for name, cls in COMPARISONS.items()},
    **{getattr(aten, name).Scalar: comparison(cls) for name, cls in COMPARISONS.items()},
    aten.logical_and.default: logical(ops.LogicalAnd()),
    aten.logical_or.default: logical(ops.LogicalOr()),
    aten.logical_xor.default: logical(ops.LogicalXor()),
    aten.logical_not.default: logical(ops.LogicalNot()),
    aten.bitwise_and.Tensor: _AND,
    aten.bitwise_and.Scalar: _AND,
    aten.__and__.Tensor: _AND,
    aten.__and__.Scalar: _AND,
    aten.bitwise_or.Tensor: _OR,
    aten.bitwise_or.Scalar: _OR,
    aten.__or__.Tensor: _OR,
    aten.__or__.Scalar: _OR,
    aten.bitwise_xor.Tensor: _XOR,
    aten.bitwise_xor.Scalar: _XOR,
    aten.__xor__.Tensor: _XOR,
    aten.__xor__.Scalar: _XOR,
    aten.bitwise_not.default: bitwise(ops.LogicalNot(), ops.BitwiseNot()),
    aten.bitwise_right_shift.Tensor: _RIGHT,
    aten.bitwise_right_shift.Tensor_Scalar: _RIGHT,
    aten.__rshift__.Scalar: _RIGHT,
    aten.__rshift__.Tensor: _RIGHT,
    aten.bitwise_left_shift.Tensor: _LEFT,
    aten.bitwise_left_shift.Tensor_Scalar: _LEFT,
    aten.__lshift__.Scalar: _LEFT,
    aten.__lshift__.Tensor: _LEFT,
    aten.where.self: where,
    aten.where.ScalarSelf: where,
    aten.where.ScalarOther: where,
    aten.masked_fill.Scalar: masked_fill,
    aten.masked_fill.Tensor: masked_fill,
    aten.to.dtype: to_dtype,
    aten.to.other: to_other,
    aten.to.dtype_layout: to_layout,
    aten.to.device: to_device,
    aten._to_copy.default: to_layout,
    aten.type_as.default: to_other,
}
