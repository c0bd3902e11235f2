"""Activation functions, from the arithmetic that they are made of."""

from __future__ import annotations

from math import pi, sqrt
from typing import Any

import jquant.ops as ops
from jquant.drafts.rules.match import (
    Context,
    Product,
    Rule,
    become,
    factors,
    is_near,
    op_of,
    partner,
    plus_number,
)
from jquant.drafts.values import Draft, scalar_of

_POWERS = {1: ops.Mul(), 2: ops.Mul(), 0.5: ops.Sqrt(), -0.5: ops.Rsqrt(), -1: ops.Reciprocal()}
_EPSILON = (ops.Rsqrt, ops.Sqrt, ops.Log, ops.Reciprocal)


def power(context: Context, draft: Draft) -> bool:
    """Powers that other operators compute."""
    op = op_of(draft, ops.Pow)
    if op is None or op.exponent not in _POWERS:
        return False
    if op.exponent == 1:
        return context.replace(draft, draft.operands[0])
    return become(draft, _POWERS[op.exponent], *draft.operands * (2 if op.exponent == 2 else 1))


def epsilon(context: Context, draft: Draft) -> bool:
    """f(x + epsilon): the table functions with a pole at 0 take it in."""
    op = op_of(draft, *_EPSILON)
    found = plus_number(draft.operands[0]) if op and op.epsilon == 0 else None
    if op is None or found is None or found[1] <= 0:
        return False
    return become(draft, type(op)(epsilon=found[1]), found[0])


def relu6(context: Context, draft: Draft) -> bool:
    op = op_of(draft, ops.Clamp, ops.Relu)
    if op is None or not draft.operands:
        return False
    (x,) = draft.operands
    inner = op_of(x, ops.Clamp, ops.Relu)
    if inner is None or str(x.dtype) != "float32":
        return False
    upper = isinstance(op, ops.Clamp) and op.minimum is None and is_near(op.maximum, 6)
    upper_first = isinstance(inner, ops.Clamp) and inner.minimum is None and is_near(inner.maximum, 6)
    if (upper and isinstance(inner, ops.Relu)) or (upper_first and isinstance(op, ops.Relu)):
        return become(draft, ops.Relu6(), *x.operands)
    return False


def sigmoid(context: Context, draft: Draft) -> bool:
    """1 / (1 + exp(-x))."""
    op = op_of(draft, ops.Reciprocal)
    exp: Any = draft.operands[0] if op and is_near(op.epsilon, 1) else None
    if not op_of(exp, ops.Exp):
        return False
    (negative,) = exp.operands
    if op_of(negative, ops.Neg):
        return become(draft, ops.Sigmoid(), *negative.operands)
    return False


def quotient_by_sigmoid(context: Context, draft: Draft) -> bool:
    """x / (1 + exp(-y)) is x * sigmoid(y)."""
    found = plus_number(draft.operands[1]) if op_of(draft, ops.Div) else None
    exp = found[0] if found and is_near(found[1], 1) and op_of(found[0], ops.Exp) else None
    if exp is None or not op_of(exp.operands[0], ops.Neg):
        return False
    (y,) = exp.operands[0].operands
    return become(draft, ops.Mul(), draft.operands[0], context.maker.draft(ops.Sigmoid(), y, shape=y.shape))


def silu(context: Context, draft: Draft) -> bool:
    product = factors(context, draft)
    if not op_of(draft, ops.Mul) or product.known or not is_near(product.number, 1):
        return False
    for gate in product.drafts:
        if op_of(gate, ops.Sigmoid) and partner(product.drafts, gate) is gate.operands[0]:
            return become(draft, ops.Silu(), *gate.operands)
    return False


def gelu(context: Context, draft: Draft) -> bool:
    """x / 2 times 1 + erf(x / sqrt(2)), or 1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))."""
    if not op_of(draft, ops.Mul, ops.Scale):
        return False
    product = factors(context, draft)
    if product.known or not is_near(product.number, 0.5) or len(product.drafts) != 2:
        return False
    for gate in product.drafts:
        x = partner(product.drafts, gate)
        tail = _erf_tail(gate)
        if tail is not None:
            found = Product(drafts=[x]) if tail[0] is x else factors(context, tail[0])
            if found.drafts == [x] and is_near(found.number * tail[1], sqrt(0.5)):
                return become(draft, ops.Gelu(), x)
        bend = plus_number(gate)
        if bend and is_near(bend[1], 1) and op_of(bend[0], ops.Tanh) and _is_cubic(context, bend[0].operands[0], x):
            return become(draft, ops.Gelu(approximate="tanh"), x)
    return False


def _erf_tail(gate: Any) -> tuple[Any, float] | None:
    """(u, sign) of 1 + erf(sign * u)."""
    found = plus_number(gate)
    if found and is_near(found[1], 1) and op_of(found[0], ops.Erf):
        return found[0].operands[0], 1.0
    if op_of(gate, ops.Sub) and is_near(scalar_of(gate.operands[0]), 1) and op_of(gate.operands[1], ops.Erf):
        (inner,) = gate.operands[1].operands
        return _unsigned(inner, -1.0)
    return None


def _unsigned(value: Any, sign: float) -> tuple[Any, float]:
    """Takes a negation out of a value, also from below a factor."""
    if op_of(value, ops.Neg):
        return value.operands[0], -sign
    if op_of(value, ops.Scale) and op_of(value.operands[0], ops.Neg):
        return value.operands[0].operands[0], -sign * value.op.factor
    return value, sign


def _is_cubic(context: Context, value: Any, x: Any) -> bool:
    """sqrt(2 / pi) * (x + 0.044715 * x^3), the cube as a power or as products."""
    product = factors(context, value)
    if product.known or not is_near(product.number, sqrt(2 / pi), 1e-4) or len(product.drafts) != 1:
        return False
    (total,) = product.drafts
    if not op_of(total, ops.Add):
        return False
    cube = partner(total.operands, x)
    if cube is None:
        return False
    if op_of(cube, ops.Scale):
        factor, inner = cube.op.factor, cube.operands[0]
    else:
        found = factors(context, cube)
        factor, inner = found.number, None
        if _cubed(found.drafts, x):
            return is_near(factor, 0.044715, 1e-4)
    power = op_of(inner, ops.Pow)
    is_cube = (power is not None and power.exponent == 3 and inner.operands == (x,)) or (
        inner is not None and _cubed(factors(context, inner).drafts, x)
    )
    return is_cube and is_near(factor, 0.044715, 1e-4)


def _cubed(drafts: list[Any], x: Any) -> bool:
    count = 0
    for value in drafts:
        if value is x:
            count += 1
        elif op_of(value, ops.Mul) and value.operands == (x, x):
            count += 2
        elif op_of(value, ops.Pow) and value.operands == (x,):
            count += int(value.op.exponent)
        else:
            return False
    return count == 3


def hard_sigmoid(context: Context, draft: Draft) -> bool:
    """relu6(x + 3) / 6."""
    op = op_of(draft, ops.Scale)
    if op is None or not is_near(op.factor, 1 / 6) or not op_of(draft.operands[0], ops.Relu6):
        return False
    found = plus_number(draft.operands[0].operands[0])
    return found is not None and is_near(found[1], 3) and become(draft, ops.HardSigmoid(), found[0])


def hard_swish(context: Context, draft: Draft) -> bool:
    if not op_of(draft, ops.Mul, ops.Scale):
        return False
    product = factors(context, draft)
    if product.known or len(product.drafts) != 2:
        return False
    for gate in product.drafts:
        x = partner(product.drafts, gate)
        if op_of(gate, ops.HardSigmoid) and gate.operands == (x,) and is_near(product.number, 1):
            return become(draft, ops.HardSwish(), x)
        if op_of(gate, ops.Relu6) and is_near(product.number, 1 / 6):
            found = plus_number(gate.operands[0])
            if found is not None and is_near(found[1], 3) and found[0] is x:
                return become(draft, ops.HardSwish(), found[0])
    return False


def expm1(context: Context, draft: Draft) -> bool:
    """exp(x) - 1, as a sum."""
    found = plus_number(draft)
    if found is None or not is_near(found[1], -1) or not op_of(found[0], ops.Exp):
        return False
    return become(draft, ops.Expm1(), *found[0].operands)


def two_sided(context: Context, draft: Draft) -> bool:
    """where(x > 0, x, ...): leaky relu and elu."""
    if not op_of(draft, ops.Where):
        return False
    mask, x, other = draft.operands
    above = op_of(mask, ops.Greater, ops.GreaterEqual)
    if above is None or above.value != 0 or mask.operands != (x,):
        return False
    product = factors(context, other)
    if product.known or len(product.drafts) != 1:
        return False
    (inner,) = product.drafts
    if inner is x:
        return become(draft, ops.LeakyRelu(negative_slope=product.number), x)
    if not op_of(inner, ops.Expm1):
        return False
    (argument,) = inner.operands
    if op_of(argument, ops.MaskedFill) and argument.op.value == 0:  # the side that is not chosen, made harmless
        argument = argument.operands[0]
    return argument is x and become(draft, ops.Elu(alpha=product.number), x)


def selu(context: Context, draft: Draft) -> bool:
    op = op_of(draft, ops.Scale)
    inner = op_of(draft.operands[0], ops.Elu) if op else None
    if op is None or inner is None or not is_near(op.factor, 1.0507009873554805) or not is_near(inner.alpha, 1.6732632):
        return False
    return become(draft, ops.Selu(), *draft.operands[0].operands)


def softplus(context: Context, draft: Draft) -> bool:
    """logaddexp(x, 0): max(x, 0) + log1p(exp(-|x|)), with x where x is NaN."""
    if not op_of(draft, ops.Where):
        return False
    mask, x, total = draft.operands
    if not op_of(mask, ops.NotEqual) or mask.operands != (x, x) or not op_of(total, ops.Add):
        return False
    for first, log in (total.operands, total.operands[::-1]):
        if not op_of(first, ops.Relu) or first.operands != (x,) or not op_of(log, ops.Log) or log.op.epsilon != 1:
            continue
        exp = log.operands[0]
        negative: Any = exp.operands[0] if op_of(exp, ops.Exp) else None
        if op_of(negative, ops.Neg) and op_of(negative.operands[0], ops.Abs) and negative.operands[0].operands == (x,):
            return become(draft, ops.Softplus(), x)
    return False


def of_softplus(context: Context, draft: Draft) -> bool:
    """Mish, x * tanh(softplus(x)), and log sigmoid, -softplus(-x)."""
    if op_of(draft, ops.Neg) and op_of(draft.operands[0], ops.Softplus):
        (inner,) = draft.operands[0].operands
        return op_of(inner, ops.Neg) is not None and become(draft, ops.LogSigmoid(), *inner.operands)
    if not op_of(draft, ops.Mul):
        return False
    for gate in draft.operands:
        if op_of(gate, ops.Tanh) and op_of(gate.operands[0], ops.Softplus):
            x = gate.operands[0].operands[0]
            if partner(draft.operands, gate) is x:
                return become(draft, ops.Mish(), x)
    return False


RULES: tuple[Rule, ...] = (
    power, epsilon, relu6, sigmoid, quotient_by_sigmoid, silu, gelu, hard_sigmoid, hard_swish, expm1, two_sided, selu,
    softplus, of_softplus,
)  # fmt: skip
