"""Arithmetic, rounding, and functions that the chip looks up in tables."""

from __future__ import annotations

from math import isfinite, log
from typing import Any

import torch
from torch.fx import Node

import jquant.ops as ops
from jquant.ops.names import FUNCTIONS
from jquant.types import Op

from .call import (
    Call,
    Handler,
    Shape,
    aten,
    constant_of,
    dtype_of,
    is_exact,
    mask_constant,
    number,
    one_like,
    rank_of,
    require,
    scalar_of,
    scaled,
)
from .quotients import quotient

# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic


def add(out: Shape, a: Any, b: Any, alpha: Any = 1) -> Call:
    a, b = scalar_of(a), scalar_of(b)
    mask = infinite_mask(b) if alpha == 1 else None
    if mask is not None and isinstance(a, Node):
        return Call(ops.MaskedFill(value=float("-inf")), (a, mask))
    return Call(ops.Add(), operands(a, b, alpha))


def operands(a: Any, b: Any, alpha: Any) -> tuple[Any, Any]:
    """Of a sum or a difference, with alpha in the second one."""
    if alpha != 1:
        require(not (is_exact(a) or is_exact(b)), f"alpha={alpha}; multiply the operand instead")
        b = scaled(b, number(alpha, "alpha"), "alpha")
    return one_like(b, a), one_like(a, b)


def infinite_mask(b: Any) -> Call | None:
    """A mask instead of a constant of 0 and minus infinity, which has no scale."""
    constant = constant_of(b)
    if constant is None or not constant.is_floating_point() or not bool(torch.isneginf(constant).any()):
        return None
    masked = torch.isneginf(constant)
    require(bool((constant[~masked] == 0).all()), "a constant of minus infinity and numbers; split it into two")
    return mask_constant(masked)


def sub(out: Shape, a: Any, b: Any, alpha: Any = 1) -> Call:
    a, b = scalar_of(a), scalar_of(b)
    return Call(ops.Sub(), operands(a, b, alpha))


def rsub(out: Shape, a: Any, b: Any, alpha: Any = 1) -> Call:
    return sub(out, b, a, alpha)


def mul(out: Shape, a: Any, b: Any) -> Call:
    """By a number: `Scale`. Of masks: `LogicalAnd`."""
    if isinstance(b, Node):
        if dtype_of(a) == dtype_of(b) == torch.bool:
            return Call(ops.LogicalAnd(), (a, b))
        return Call(ops.Mul(), (a, b))
    if is_exact(a) and isinstance(b, int):
        return Call(ops.Mul(), (a, one_like(a, b)))
    factor = number(b)
    require(factor != 0, "the factor is 0")
    return Call(ops.Mul(), (a, factor)) if is_exact(a) else Call(ops.Scale(factor=factor), (a,))


def div(out: Shape, a: Any, b: Any, rounding_mode: str | None = None) -> Any:
    if rounding_mode is not None:
        return quotient(a, b, towards_zero=rounding_mode == "trunc")
    b = scalar_of(b)
    if isinstance(b, Node):
        require(not (is_exact(a) or is_exact(b)), "a division of integers; convert them to float32 before")
        return Call(ops.Div(), (a, b))
    require(number(b) != 0, "the divisor is 0")
    return scaled(a, 1.0 / number(b), label="")


def power(out: Shape, x: Any, exponent: Any) -> Any:
    exponent = scalar_of(exponent)
    require(isinstance(exponent, int | float), "an exponent that is a tensor; use a number")
    require(not is_exact(x) or exponent == 2, "a power of integers; convert them to float32 before")
    plain: dict[float, Op] = {0.5: ops.Sqrt(), -0.5: ops.Rsqrt(), -1.0: ops.Reciprocal()}
    if exponent == 1:
        return x
    if exponent == 2:
        return Call(ops.Mul(), (x, x))
    require(isfinite(exponent), f"the exponent is {exponent}")
    return Call(plain.get(float(exponent), ops.Pow(exponent=float(exponent))), (x,))


def power_of_number(out: Shape, base: Any, x: Node) -> Call:
    require(isinstance(base, int | float) and base > 0, f"a power of {base}; the base must be a positive number")
    return Call(ops.Exp(), (scaled(x, log(base), "log"),))


def clamp(out: Shape, x: Node, low: Any = None, high: Any = None) -> Call:
    low, high = scalar_of(low), scalar_of(high)
    if isinstance(low, Node) or isinstance(high, Node):
        if low is None:
            return Call(ops.Minimum(), (x, high))
        above = Call(ops.Maximum(), (x, low), label="" if high is None else "low")
        return above if high is None else Call(ops.Minimum(), (above, high))
    if low == 0 and high in (None, 6) and not is_exact(x):
        return Call(ops.Relu() if high is None else ops.Relu6(), (x,))
    low, high = (None if b is None or not isfinite(b) else float(b) for b in (low, high))
    if low is not None and high is not None:
        low = min(low, high)  # torch gives the upper bound where the two cross
    return Call(ops.Clamp(minimum=low, maximum=high), (x,))


def extreme(op: Op) -> Handler:
    return lambda out, a, b: Call(op, (one_like(b, a), one_like(a, b)))


def remainder(like_dividend: bool) -> Handler:
    def handler(out: Shape, a: Any, b: Any) -> Call:
        b = scalar_of(b)
        if isinstance(b, Node):
            return Call(ops.Mod(same_sign_as_dividend=like_dividend), (one_like(b, a), b))
        require(number(b, "divisor") != 0, "the divisor is 0")
        return Call(ops.Mod(value=float(b), same_sign_as_dividend=like_dividend), (a,))

    return handler


def round_decimals(out: Shape, x: Node, decimals: int) -> Call:
    if decimals == 0:
        return Call(ops.Round(), (x,))
    whole = Call(ops.Round(), (scaled(x, 10.0**decimals),), label="round")
    return Call(ops.Scale(factor=10.0**-decimals), (whole,))


def addcmul(out: Shape, x: Node, a: Node, b: Node, value: Any = 1) -> Call:
    return Call(ops.Add(), (x, scaled(Call(ops.Mul(), (a, b), label="mul"), number(value))))


def addcdiv(out: Shape, x: Node, a: Node, b: Node, value: Any = 1) -> Call:
    return Call(ops.Add(), (x, scaled(Call(ops.Div(), (a, b), label="div"), number(value))))


def lerp(out: Shape, a: Node, b: Node, weight: Any) -> Call:
    difference = Call(ops.Sub(), (b, a), label="sub")
    if isinstance(weight, Node):
        return Call(ops.Add(), (a, Call(ops.Mul(), (weight, difference), label="mul")))
    return Call(ops.Add(), (a, scaled(difference, number(weight))))


def square(out: Shape, x: Node) -> Call:
    return Call(ops.Mul(), (x, x))


def nan_to_num(out: Shape, x: Node, nan: Any = None, above: Any = None, below: Any = None) -> Any:
    """A number that is not equal to itself is NaN. Infinities without a value of their own are clamped.

    Integers have none of them, and only the clamp is left of it there, which does nothing.
    """
    if is_exact(x):
        return x
    most = torch.finfo(torch.float32).max
    is_nan = Call(ops.NotEqual(), (x, x), label="is_nan")
    result = Call(ops.MaskedFill(value=number(nan or 0.0, "value")), (x, is_nan), label="nan")
    for value, op, word in ((above, ops.Greater(value=most), "infinite"), (below, ops.Less(value=-most), "negative")):
        if value is not None:
            mask = Call(op, (x,), label=f"is_{word}")
            result = Call(ops.MaskedFill(value=number(value, "value")), (result, mask), label=word)
    return Call(ops.Clamp(minimum=-most, maximum=most), (result,))


# ---------------------------------------------------------------------------------------------------------------------
# Activations


def dropout(out: Shape, x: Node, rate: float, train: bool) -> Call:
    require(not train, "it drops values in eval mode as well; pass training=self.training")
    return Call(ops.Dropout(rate=rate), (x,))


def feature_dropout(out: Shape, x: Node, rate: float, train: bool) -> Node | Call:
    """Dropout of whole channels: one draw for all positions of a channel of an example."""
    if rate == 0:
        return x
    require(not train, "it drops values in eval mode as well; pass training=self.training")
    return Call(ops.Dropout(rate=rate, shared_axes=tuple(range(2, rank_of(x)))), (x,))


def refused_dropout(out: Shape, x: Node, rate: float, train: bool) -> Node:
    """Alpha dropout: passing it through would lose it in training without a word."""
    require(rate == 0, "alpha dropout has no operator; use nn.Dropout, or rate 0")
    return x


def elu(out: Shape, x: Node, alpha: float, scale: float, input_scale: float) -> Call:
    require(scale == input_scale == 1, f"scale={scale}, input_scale={input_scale}; use nn.ELU or nn.SELU")
    return Call(ops.Elu(alpha=float(alpha)), (x,))


def softplus(out: Shape, x: Node, beta: float, threshold: float) -> Call:
    return Call(ops.Softplus(beta=float(beta), threshold=float(threshold)), (x,))


def gelu(out: Shape, x: Node, approximate: str) -> Call:
    require(approximate in ("none", "tanh"), f"approximate={approximate!r}")
    return Call(ops.Gelu(approximate="tanh" if approximate == "tanh" else "none"), (x,))


def threshold(out: Shape, x: Node, limit: float, value: float) -> Call:
    return Call(ops.ThresholdedRelu(threshold=float(limit), value=float(value)), (x,))


def glu(out: Shape, x: Node, axis: int) -> Call:
    """Half of the axis times the sigmoid of the other half."""
    from .movement import sliced

    half = x.meta["val"].shape[axis]
    require(isinstance(half, int), "it splits the batch")
    parts = [sliced(x, axis, i * half // 2, (i + 1) * half // 2, label="half") for i in (0, 1)]
    return Call(ops.Mul(), (parts[0], Call(ops.Sigmoid(), (parts[1],), label="sigmoid")))


def prelu(out: Shape, x: Node, weight: Node) -> Call:
    return Call(ops.PRelu(), (x,), {"weight": weight})


def plain(op: Op) -> Handler:
    """A function of one float tensor and no attribute."""
    return lambda out, x: Call(op, (x,))


def logarithm(base: float) -> Handler:
    return lambda out, x: Call(ops.Scale(factor=1 / log(base)), (Call(ops.Log(), (x,), label="log"),))


def identity_if_whole(op: Op) -> Handler:
    """floor, ceil, round: exact integers are whole already."""
    return lambda out, x: x if is_exact(x) else Call(op, (x,))


TABLE: dict[Any, Handler] = {
    **{getattr(aten, name).default: plain(row.op) for row in FUNCTIONS for name in row.aten.split()},
    # arithmetic
    aten.add.Tensor: add,
    aten.add.Scalar: add,
    aten.sub.Tensor: sub,
    aten.sub.Scalar: sub,
    aten.rsub.Scalar: rsub,
    aten.rsub.Tensor: rsub,
    aten.mul.Tensor: mul,
    aten.mul.Scalar: mul,
    aten.div.Tensor: div,
    aten.div.Scalar: div,
    aten.div.Tensor_mode: div,
    aten.div.Scalar_mode: div,
    aten.true_divide.Tensor: div,
    aten.addcmul.default: addcmul,
    aten.addcdiv.default: addcdiv,
    aten.lerp.Scalar: lerp,
    aten.lerp.Tensor: lerp,
    aten.square.default: square,
    aten.pow.Tensor_Scalar: power,
    aten.pow.Tensor_Tensor: power,
    aten.pow.Scalar: power_of_number,
    aten.exp2.default: lambda out, x: power_of_number(out, 2.0, x),
    aten.log2.default: logarithm(2.0),
    aten.log10.default: logarithm(10.0),
    aten.positive.default: lambda out, x: x,
    aten.minimum.default: extreme(ops.Minimum()),
    aten.maximum.default: extreme(ops.Maximum()),
    aten.min.other: extreme(ops.Minimum()),
    aten.max.other: extreme(ops.Maximum()),
    aten.remainder.Scalar: remainder(False),
    aten.remainder.Tensor: remainder(False),
    aten.fmod.Scalar: remainder(True),
    aten.fmod.Tensor: remainder(True),
    aten.floor.default: identity_if_whole(ops.Floor()),
    aten.ceil.default: identity_if_whole(ops.Ceil()),
    aten.round.default: identity_if_whole(ops.Round()),
    aten.round.decimals: round_decimals,
    # bounds
    aten.clamp.default: clamp,
    aten.clamp.Tensor: clamp,
    aten.clamp_min.default: clamp,
    aten.clamp_min.Tensor: clamp,
    aten.clamp_max.default: lambda out, x, high: clamp(out, x, None, high),
    aten.clamp_max.Tensor: lambda out, x, high: clamp(out, x, None, high),
    aten.hardtanh.default: clamp,
    aten.nan_to_num.default: nan_to_num,
    # functions with attributes
    aten.leaky_relu.default: lambda out, x, slope: Call(ops.LeakyRelu(negative_slope=float(slope)), (x,)),
    aten.prelu.default: prelu,
    aten.gelu.default: gelu,
    aten.glu.default: glu,
    aten.elu.default: elu,
    aten.celu.default: lambda out, x, alpha: Call(ops.Celu(alpha=float(alpha)), (x,)),
    aten.softplus.default: softplus,
    aten.threshold.default: threshold,
    # dropout
    aten.dropout.default: dropout,
    aten.dropout_.default: dropout,
    aten.feature_dropout.default: feature_dropout,
    aten.alpha_dropout.default: refused_dropout,
    aten.feature_alpha_dropout.default: refused_dropout,
}
