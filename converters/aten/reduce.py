"""Reductions, their positions, and norms of vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Node

import jquant.ops as ops
from jquant.types import Op

from .call import Call, Handler, Shape, aten, axes_of, axis_of, rank_of, require, require_float32, reshaped


def over(x: Node, axes: Any, keepdims: bool) -> dict[str, Any]:
    return {"axes": axes_of(axes, rank_of(x)), "keepdims": bool(keepdims)}


def mean(out: Shape, x: Node, axes: Any = None, keepdims: bool = False, dtype: Any = None) -> Call:
    require_float32(dtype)
    return Call(ops.Mean(**over(x, axes, keepdims)), (x,))


def total(out: Shape, x: Node, axes: Any = None, keepdims: bool = False, dtype: Any = None) -> Call:
    return Call(ops.Sum(**over(x, axes, keepdims)), (x,))


def reduction(cls: Callable[..., Op]) -> Handler:
    return lambda out, x, axes=None, keepdims=False: Call(cls(**over(x, axes, keepdims)), (x,))


def position(cls: Callable[..., Op]) -> Handler:
    def handler(out: Shape, x: Node, axis: int | None = None, keepdims: bool = False) -> Call:
        if axis is not None and rank_of(x):
            return Call(cls(axis=axis_of(axis, rank_of(x)), keepdims=keepdims), (x,))
        flat = Call(ops.Reshape(shape=(-1,)), (x,), label="flat")
        found = Call(cls(axis=0), (flat,), label="position" if keepdims else "")
        return reshaped(out, found) if keepdims else found

    return handler


def with_position(value: Callable[..., Op], index: Callable[..., Op]) -> Handler:
    def handler(out: list[Shape], x: Node, axis: int, keepdims: bool = False) -> list[Any]:
        require(rank_of(x) > 0, "a reduction of a number")
        at = axis_of(axis, rank_of(x))
        return [Call(value(axes=(at,), keepdims=keepdims), (x,)), Call(index(axis=at, keepdims=keepdims), (x,))]

    return handler


def cumsum(out: Shape, x: Node, axis: int, dtype: Any = None) -> Call:
    return Call(ops.CumSum(axis=axis_of(axis, rank_of(x))), (x,))


def variance(out: Shape, x: Node, axes: Any, correction: Any = 1, keepdims: bool = False) -> Call:
    correction = 1 if correction is None else correction
    require(correction == int(correction), f"correction={correction}; it must be whole")
    return Call(ops.Variance(correction=int(correction), **over(x, axes, keepdims)), (x,))


def deviation(out: Shape, x: Node, axes: Any, correction: Any = 1, keepdims: bool = False) -> Call:
    squared = variance(out, x, axes, correction, keepdims)
    return Call(ops.Sqrt(), (Call(squared.op, (x,), label="variance"),))


def with_mean(first: Handler) -> Handler:
    def handler(out: list[Shape], x: Node, axes: Any, correction: Any = 1, keepdims: bool = False) -> list[Any]:
        return [first(out[0], x, axes, correction, keepdims), mean(out[1], x, axes, keepdims)]

    return handler


def norm(out: Shape, x: Node, order: Any = 2, axes: Any = None, keepdims: bool = False, dtype: Any = None) -> Call:
    require_float32(dtype)
    names: dict[float, Any] = {1.0: "1", 2.0: "2", float("inf"): "max"}
    order = 2.0 if order is None else float(order)
    require(order in names, f"a norm of order {order}; only 1, 2 and infinity are operators")
    return Call(ops.Norm(order=names[order], **over(x, axes, keepdims)), (x,))


def log_sum_exp(out: Shape, x: Node, axes: Any, keepdims: bool = False) -> Call:
    """max + log(sum(exp(x - max)))."""
    kept = over(x, axes, True)
    largest = Call(ops.ReduceMax(**kept), (x,), label="max")
    exp = Call(ops.Exp(), (Call(ops.Sub(), (x, largest), label="shift"),), label="exp")
    log = Call(ops.Log(), (Call(ops.Sum(**kept), (exp,), label="sum"),), label="log")
    result = Call(ops.Add(), (largest, log), label="" if keepdims else "add")
    return result if keepdims else reshaped(out, result)


TABLE: dict[Any, Handler] = {
    aten.sum.default: lambda out, x, dtype: total(out, x, dtype=dtype),
    aten.sum.dim_IntList: total,
    aten.mean.default: lambda out, x, dtype: mean(out, x, dtype=dtype),
    aten.mean.dim: mean,
    aten.amax.default: reduction(ops.ReduceMax),
    aten.amin.default: reduction(ops.ReduceMin),
    aten.max.default: reduction(ops.ReduceMax),
    aten.min.default: reduction(ops.ReduceMin),
    aten.max.dim: with_position(ops.ReduceMax, ops.ArgMax),
    aten.min.dim: with_position(ops.ReduceMin, ops.ArgMin),
    aten.argmax.default: position(ops.ArgMax),
    aten.argmin.default: position(ops.ArgMin),
    aten.all.default: reduction(ops.ReduceAll),
    aten.all.dim: reduction(ops.ReduceAll),
    aten.all.dims: reduction(ops.ReduceAll),
    aten.any.default: reduction(ops.ReduceAny),
    aten.any.dim: reduction(ops.ReduceAny),
    aten.any.dims: reduction(ops.ReduceAny),
    aten.cumsum.default: cumsum,
    aten.var.default: lambda out, x, unbiased: variance(out, x, None, int(unbiased)),
    aten.var.dim: lambda out, x, axes, unbiased, keepdims: variance(out, x, axes, int(unbiased), keepdims),
    aten.var.correction: lambda out, x, axes, correction, keepdims: variance(out, x, axes, correction, keepdims),
    aten.std.default: lambda out, x, unbiased: deviation(out, x, None, int(unbiased)),
    aten.std.dim: lambda out, x, axes, unbiased, keepdims: deviation(out, x, axes, int(unbiased), keepdims),
    aten.std.correction: deviation,
    aten.var_mean.default: lambda out, x, unbiased: with_mean(variance)(out, x, None, int(unbiased)),
    aten.var_mean.correction: with_mean(variance),
    aten.var_mean.dim: lambda out, x, axes, unbiased, keep: with_mean(variance)(out, x, axes, int(unbiased), keep),
    aten.std_mean.default: lambda out, x, unbiased: with_mean(deviation)(out, x, None, int(unbiased)),
    aten.std_mean.correction: with_mean(deviation),
    aten.std_mean.dim: lambda out, x, axes, unbiased, keep: with_mean(deviation)(out, x, axes, int(unbiased), keep),
    aten.norm.Scalar: norm,
    aten.norm.ScalarOpt_dim: norm,
    aten.linalg_vector_norm.default: norm,
    aten.logsumexp.default: log_sum_exp,
}
