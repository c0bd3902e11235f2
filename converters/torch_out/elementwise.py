"""Arithmetic, functions of one operand, comparisons, choices and exact integers, as calls of torch."""

from collections.abc import Callable, Mapping
from operator import attrgetter
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F

import jquant.ops as ops
from jquant.ops.names import FUNCTIONS
from jquant.types import ConversionError, Op

from .base import Site, torch_rule

Rule = Callable[..., Any]


def _shifted(function: Rule) -> Rule:
    """The function of x + epsilon."""
    return lambda op, x: function(x + op.epsilon if op.epsilon else x)


def _number(value: float | None) -> float | None:
    """A whole number of 64 bits as an int, which leaves exact integers what they are."""
    return int(value) if value is not None and float(value).is_integer() and abs(value) < 2**63 else value


def _named(path: str) -> Rule:
    """A function below `torch`, of one operand."""
    function = attrgetter(path)(torch)
    return lambda op, x: function(x)


_ONE: Mapping[type[Op], Rule] = MappingProxyType(
    {
        **{type(row.op): _named(row.torch) for row in FUNCTIONS if row.torch},
        ops.BitwiseNot: lambda op, x: torch.bitwise_not(x),
        ops.BitShift: lambda op, x: x >> op.bits if op.bits >= 0 else x << -op.bits,
        ops.Celu: lambda op, x: F.celu(x, op.alpha),
        ops.CentrePixels: lambda op, x: (x.float() - 128.0) * op.unit,
        ops.Clamp: lambda op, x: torch.clamp(x, _number(op.minimum), _number(op.maximum)),
        ops.Elu: lambda op, x: F.elu(x, op.alpha),
        ops.Gelu: lambda op, x: F.gelu(x, approximate=op.approximate),
        ops.LeakyRelu: lambda op, x: F.leaky_relu(x, op.negative_slope),
        ops.Log: _shifted(torch.log),
        ops.LogicalNot: lambda op, x: torch.logical_not(x),
        ops.Pow: lambda op, x: torch.pow(x, op.exponent),
        ops.Reciprocal: _shifted(torch.reciprocal),
        ops.Requantize: lambda op, x: x,
        ops.Dequantize: lambda op, x: x,
        ops.Rsqrt: _shifted(torch.rsqrt),
        ops.Scale: lambda op, x: x * op.factor,
        ops.Softplus: lambda op, x: F.softplus(x, op.beta, op.threshold),
        ops.Sqrt: _shifted(torch.sqrt),
        ops.ThresholdedRelu: lambda op, x: F.threshold(x, op.threshold, op.value),
    }
)
_TWO: Mapping[type[Op], Rule] = MappingProxyType(
    {
        ops.Add: torch.add,
        ops.BitwiseAnd: torch.bitwise_and,
        ops.BitwiseOr: torch.bitwise_or,
        ops.BitwiseXor: torch.bitwise_xor,
        ops.Div: torch.div,
        ops.LogicalAnd: torch.logical_and,
        ops.LogicalOr: torch.logical_or,
        ops.LogicalXor: torch.logical_xor,
        ops.Maximum: torch.maximum,
        ops.Minimum: torch.minimum,
        ops.Mul: torch.mul,
        ops.Sub: torch.sub,
    }
)
_COMPARE: Mapping[type[Op], Rule] = MappingProxyType(
    {
        ops.Equal: torch.eq,
        ops.Greater: torch.gt,
        ops.GreaterEqual: torch.ge,
        ops.Less: torch.lt,
        ops.LessEqual: torch.le,
        ops.NotEqual: torch.ne,
    }
)


@torch_rule.register
def _(op: ops.Dropout, site: Site, x: Any) -> Any:
    """As in evaluation; torch shares a draw along all axes behind the channels, and along no others."""
    if not op.shared_axes:
        return F.dropout(x, op.rate, False)
    return torch.feature_dropout(x, op.rate, False) if op.shared_axes == tuple(range(2, len(site.output))) else x


def _one(op: Op, site: Site, x: Any) -> Any:
    return _ONE[type(op)](op, x)


def _two(op: Op, site: Site, a: Any, b: Any) -> Any:
    if site.dtype == "int32" and "uint8" in site.dtypes:  # which would wrap
        a, b = a.to(torch.int32), b.to(torch.int32)
    return _TWO[type(op)](a, b)


def _compare(op: Any, site: Site, x: Any, *others: Any) -> Any:
    return _COMPARE[type(op)](x, *others or (op.value,))


for _rules, _rule in ((_ONE, _one), (_TWO, _two), (_COMPARE, _compare)):
    for _cls in _rules:
        torch_rule.register(_cls)(_rule)


@torch_rule.register
def _(op: ops.Mod, site: Site, a: Any, *others: Any) -> Any:
    divisor = others[0] if others else _number(op.value)
    remainder = (torch.fmod if op.same_sign_as_dividend else torch.remainder)(a, divisor)
    if not others:
        return remainder
    return torch.where(divisor == 0, torch.zeros_like(remainder), remainder)


@torch_rule.register
def _(op: ops.Where, site: Site, condition: Any, a: Any, b: Any) -> Any:
    return torch.where(condition, a, b)


@torch_rule.register
def _(op: ops.MaskedFill, site: Site, x: Any, mask: Any) -> Any:
    if len(site.shapes[1]) > len(site.shapes[0]) or any(
        m > n for m, n in zip(reversed(site.shapes[1]), reversed(site.shapes[0]), strict=False)
    ):
        return torch.where(mask, site.constant(torch.tensor(op.value)), x)  # masked_fill does not broadcast x
    return x.masked_fill(mask, op.value)


@torch_rule.register
def _(op: ops.IntegerConstant, site: Site) -> Any:
    dtype = torch.bool if op.dtype == "bool" else torch.int32
    return site.constant(torch.tensor(op.values, dtype=torch.int64).reshape(op.shape).to(dtype))


@torch_rule.register
def _(op: ops.Constant, site: Site, *, value: Any) -> Any:
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Reductions and order


def _axes(op: Any) -> list[int]:
    return list(op.axes)


def _real(site: Site, x: Any) -> Any:
    """Pixels and masks as float, of which alone torch has means."""
    return x if site.dtypes[0] == "float32" else x.float()


@torch_rule.register
def _(op: ops.Mean, site: Site, x: Any) -> Any:
    return torch.mean(_real(site, x), _axes(op), op.keepdims)


@torch_rule.register
def _(op: ops.Sum, site: Site, x: Any) -> Any:
    return _counted(site, torch.sum(x, _axes(op), op.keepdims))


@torch_rule.register
def _(op: ops.ReduceMax, site: Site, x: Any) -> Any:
    return torch.amax(x, _axes(op), op.keepdims)


@torch_rule.register
def _(op: ops.ReduceMin, site: Site, x: Any) -> Any:
    return torch.amin(x, _axes(op), op.keepdims)


@torch_rule.register(ops.ReduceAll)
@torch_rule.register(ops.ReduceAny)
def _(op: Any, site: Site, x: Any) -> Any:
    reduce = torch.all if isinstance(op, ops.ReduceAll) else torch.any
    for axis in sorted((a % len(site.shapes[0]) for a in op.axes), reverse=True):
        x = reduce(x, axis, op.keepdims)
    return x


@torch_rule.register
def _(op: ops.ArgMax, site: Site, x: Any) -> Any:
    return torch.argmax(x, op.axis, op.keepdims).to(torch.int32)


@torch_rule.register
def _(op: ops.ArgMin, site: Site, x: Any) -> Any:
    return torch.argmin(x, op.axis, op.keepdims).to(torch.int32)


@torch_rule.register
def _(op: ops.CumSum, site: Site, x: Any) -> Any:
    y = x.flip(op.axis) if op.reverse else x
    y = torch.cumsum(y, op.axis) - y if op.exclusive else torch.cumsum(y, op.axis)
    return _counted(site, y.flip(op.axis) if op.reverse else y)


def _counted(site: Site, total: Any) -> Any:
    """A sum of exact values is int64 in torch."""
    return total.to(torch.int32) if site.dtype == "int32" else total


@torch_rule.register
def _(op: ops.Variance, site: Site, x: Any) -> Any:
    return torch.var(_real(site, x), _axes(op), correction=op.correction, keepdim=op.keepdims)


@torch_rule.register
def _(op: ops.Norm, site: Site, x: Any) -> Any:
    order = {"1": 1, "2": 2, "max": float("inf")}[op.order]
    return torch.linalg.vector_norm(_real(site, x), order, _axes(op), op.keepdims)


@torch_rule.register(ops.Sort)
@torch_rule.register(ops.SortIndices)
def _(op: Any, site: Site, x: Any) -> Any:
    values, indices = _pair(torch.sort(x, dim=op.axis, descending=op.descending, stable=True))
    return values if isinstance(op, ops.Sort) else indices.to(torch.int32)


@torch_rule.register(ops.TopK)
@torch_rule.register(ops.TopKIndices)
def _(op: Any, site: Site, x: Any) -> Any:
    """By a stable sort: the order of equal elements is not defined for torch.topk."""
    values, indices = _pair(torch.sort(x, dim=op.axis, descending=op.largest, stable=True))
    chosen = values if isinstance(op, ops.TopK) else indices.to(torch.int32)
    return chosen.narrow(op.axis, 0, op.k)


def _pair(result: Any) -> tuple[Any, Any]:
    return result[0], result[1]


@torch_rule.register
def _(op: ops.MatMul, site: Site, a: Any, b: Any) -> Any:
    a = a.transpose(-1, -2) if op.transpose_a else a
    return torch.matmul(a, b.transpose(-1, -2) if op.transpose_b else b)


@torch_rule.register(ops.RoiAlign)
@torch_rule.register(ops.RoiResize)
@torch_rule.register(ops.Nv12ToCentredYuv444)
@torch_rule.register(ops.RgbToCentredYuv444)
def _(op: Op, site: Site, *operands: Any) -> Any:
    raise ConversionError(f"{type(op).__name__} has no form in plain torch; end the graph before it")
