"""The table from ATen overloads to jquant operators: to support another one, add a line.

A handler gets the output shape and every argument of the schema in order (tensors as fx nodes), and returns a `Call`,
or one of its arguments where the operator is an identity, or raises `Unsupported` with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, prod
from typing import Any

import torch
from torch.fx import Node

from jquant.ops.activation import Dropout, LeakyRelu, PRelu, Relu, Relu6, Sigmoid, Softmax
from jquant.ops.conv import BatchNorm, Conv, Linear
from jquant.ops.elementwise import Add, Mul, Scale
from jquant.ops.movement import Cat, Flatten, Pad, Permute, Reshape
from jquant.ops.pool import AdaptiveAvgPool, AvgPool, MaxPool, Mean
from jquant.types import Op

aten = torch.ops.aten
Shape = tuple[Any, ...]  # of int, with a torch.SymInt for what depends on the batch


class Unsupported(Exception):  # noqa: N818 - a reason that is collected, not an error that callers see
    """Why a call has no jquant operator."""


@dataclass(frozen=True)
class Call:
    """An operator on operands: fx nodes, other calls, or numbers (which become constants).

    `params` maps roles to the fx nodes of parameters, None where the layer has none; `label` tells a helper call from
    the call it helps.
    """

    op: Op
    operands: tuple[Node | Call | float, ...]
    params: Mapping[str, Node | None] = field(default_factory=dict)
    label: str = ""


Handler = Callable[..., "Call | Node"]


# ---------------------------------------------------------------------------------------------------------------------
# Helpers


def shape_of(value: Any) -> Shape:
    return tuple(value.meta["val"].shape)


def rank_of(value: Any) -> int:
    return len(shape_of(value))


def per_axis(value: Any, rank: int) -> tuple[int, ...]:
    """An int or a list of one means the same for every spatial axis."""
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    values = values * rank if len(values) == 1 else values
    if not all(isinstance(v, int) for v in values):
        raise Unsupported("an attribute depends on the batch size; make it a constant")
    return values


def both_sides(padding: Any, rank: int) -> tuple[tuple[int, int], ...]:
    return tuple((p, p) for p in per_axis(padding, rank))


def require(condition: bool, reason: str) -> None:
    if not condition:
        raise Unsupported(reason)


def require_batched(x: Node, rank: int) -> None:
    require(rank_of(x) == rank + 2, f"the input has {rank_of(x)} axes, not {rank + 2}; add a batch axis")


def number(value: Any) -> float:
    require(isinstance(value, int | float), "the factor depends on the batch size; make it a constant")
    require(isfinite(value) and value != 0, f"the factor is {value}")
    return float(value)


# ---------------------------------------------------------------------------------------------------------------------
# Handlers of more than one line


def conv(
    out: Shape, x: Node, weight: Node, bias: Node | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> Call:
    rank = rank_of(weight) - 2
    require_batched(x, rank)
    dilation = per_axis(dilation, rank)
    if padding == "same":  # torch puts the odd element at the end
        totals = [d * (k - 1) for d, k in zip(dilation, shape_of(weight)[2:], strict=True)]
        padding = tuple((t // 2, t - t // 2) for t in totals)
    else:
        padding = both_sides(0 if padding == "valid" else padding, rank)
    op = Conv(strides=per_axis(stride, rank), padding=padding, dilation=dilation, groups=groups)
    return Call(op, (x,), {"weight": weight, "bias": bias})


def batch_norm(
    out: Shape,
    x: Node,
    weight: Node | None,
    bias: Node | None,
    running_mean: Node | None,
    running_var: Node | None,
    training: bool,
    momentum: float,
    epsilon: float,
    cudnn: bool,
) -> Call:
    frozen = not training and running_mean is not None and running_var is not None
    require(frozen, "it uses the statistics of the batch; train it with track_running_stats=True")
    params = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    return Call(BatchNorm(epsilon=epsilon), (x,), params)


def clamp(out: Shape, x: Node, low: float | None, high: float | None) -> Call:
    require(low == 0 and high in (None, 6), f"a clamp to [{low}, {high}]; only [0, 6] and [0, inf) are operators")
    return Call(Relu() if high is None else Relu6(), (x,))


def dropout(out: Shape, x: Node, rate: float, train: bool) -> Call:
    require(not train, "it drops values in eval mode as well; pass training=self.training")
    return Call(Dropout(rate=rate), (x,))


def refused_dropout(out: Shape, x: Node, rate: float, train: bool) -> Node:
    """Dropout of whole channels, or alpha dropout: passing it through would lose it in training without a word."""
    require(rate == 0, "dropout of whole channels and alpha dropout have no operator; use nn.Dropout, or rate 0")
    return x


def to_dtype(out: Shape, x: Node, dtype: torch.dtype, *_: Any) -> Node:
    require(dtype == torch.float32 == x.meta["val"].dtype, f"a conversion to {dtype}; keep the model in float32")
    return x


def add(out: Shape, a: Node, b: Any, alpha: Any = 1) -> Call:
    require(alpha == 1, f"alpha={alpha}; multiply the operand instead")
    return Call(Add(), (a, b))


def sub(out: Shape, a: Node, b: Any, alpha: Any = 1) -> Call:
    return add(out, a, negative(b), alpha)


def rsub(out: Shape, a: Node, b: Any, alpha: Any = 1) -> Call:
    require(alpha == 1, f"alpha={alpha}; multiply the operand instead")
    return Call(Add(), (negative(a), b))


def negative(x: Any) -> Any:
    return Call(Scale(factor=-1.0), (x,), label="neg") if isinstance(x, Node) else -x


def mul(out: Shape, a: Node, b: Any) -> Call:
    return Call(Mul(), (a, b)) if isinstance(b, Node) else Call(Scale(factor=number(b)), (a,))


def div(out: Shape, a: Node, b: Any) -> Call:
    require(not isinstance(b, Node), "a division by a tensor; multiply by its reciprocal instead")
    return Call(Scale(factor=1.0 / number(b)), (a,))


def max_pool(rank: int) -> Handler:
    def handler(out: Shape, x: Node, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> Call:
        require_batched(x, rank)
        op = MaxPool(
            kernel=per_axis(kernel, rank),
            strides=per_axis(stride or kernel, rank),
            padding=both_sides(padding, rank),
            dilation=per_axis(dilation, rank),
            ceil_mode=ceil_mode,
        )
        return Call(op, (x,))

    return handler


def avg_pool(rank: int) -> Handler:
    def handler(
        out: Shape, x: Node, kernel: Any, stride: Any, padding: Any, ceil_mode: bool, include: bool, divisor: Any = None
    ) -> Call:
        require_batched(x, rank)
        require(divisor is None, f"divisor_override={divisor}; scale the output instead")
        op = AvgPool(
            kernel=per_axis(kernel, rank),
            strides=per_axis(stride or kernel, rank),
            padding=both_sides(padding, rank),
            ceil_mode=ceil_mode,
            count_include_pad=include,
        )
        return Call(op, (x,))

    return handler


def adaptive_avg_pool(rank: int) -> Handler:
    def handler(out: Shape, x: Node, size: Any) -> Call:
        require_batched(x, rank)
        return Call(AdaptiveAvgPool(output_size=per_axis(size, rank)), (x,))

    return handler


def mean(out: Shape, x: Node, axes: Any = None, keepdims: bool = False, dtype: Any = None) -> Call:
    require(dtype in (None, torch.float32), f"dtype={dtype}; keep the model in float32")
    rank = rank_of(x)
    return Call(Mean(axes=tuple(sorted(a % rank for a in axes or range(rank))), keepdims=keepdims), (x,))


def reshape(out: Shape, x: Node, *_: Any) -> Call:
    """The target is the shape that the output has, so that sizes computed from the batch need no arithmetic."""
    symbolic = [n for n in out if not isinstance(n, int)]
    require(len(symbolic) <= 1, f"the shape {format_shape(out)} has more than one axis that depends on the batch")
    require(prod(n for n in out if isinstance(n, int)) > 0, f"the shape {format_shape(out)} is empty")
    return Call(Reshape(shape=tuple(n if isinstance(n, int) else -1 for n in out)), (x,))


def permute(out: Shape, x: Node, axes: Sequence[int]) -> Call:
    return Call(Permute(axes=tuple(a % rank_of(x) for a in axes)), (x,))


def transpose(out: Shape, x: Node, first: int = 0, second: int = 1) -> Call:
    axes = list(range(rank_of(x)))
    axes[first], axes[second] = axes[second], axes[first]
    return permute(out, x, axes)


def transpose_matrix(out: Shape, x: Node) -> Call:
    return permute(out, x, range(rank_of(x))[::-1])  # torch leaves a vector as it is


def pad(out: Shape, x: Node, padding: Sequence[int], mode: str = "constant", value: float | None = None) -> Call:
    require(mode == "constant", f"padding mode {mode!r}; only constant padding is an operator")
    pairs = list(zip(padding[::2], padding[1::2], strict=True))[::-1]  # torch starts at the last axis
    require(all(isinstance(n, int) and n >= 0 for pair in pairs for n in pair), f"padding {padding}; crop by a slice")
    full = [(0, 0)] * (rank_of(x) - len(pairs)) + pairs
    return Call(Pad(padding=tuple(full), value=float(value or 0.0)), (x,))


def constant_pad(out: Shape, x: Node, padding: Sequence[int], value: float) -> Call:
    return pad(out, x, padding, "constant", value)


def softmax(out: Shape, x: Node, axis: int, dtype: Any) -> Call:
    require(dtype in (None, torch.float32), f"dtype={dtype}; keep the model in float32")
    return Call(Softmax(axis=axis % rank_of(x)), (x,))


def cat(out: Shape, tensors: Sequence[Node], axis: int) -> Call:
    require(len({rank_of(t) for t in tensors}) == 1, "operands of different rank")
    return Call(Cat(axis=axis % len(out)), tuple(tensors))


def format_shape(shape: Shape) -> str:
    return "[" + ", ".join(str(n) if isinstance(n, int) else "batch" for n in shape) + "]"


# ---------------------------------------------------------------------------------------------------------------------
# The table

TABLE: dict[Any, Handler] = {
    # layers
    aten.conv1d.default: conv,
    aten.conv1d.padding: conv,
    aten.conv2d.default: conv,
    aten.conv2d.padding: conv,
    aten.linear.default: lambda out, x, weight, bias: Call(Linear(), (x,), {"weight": weight, "bias": bias}),
    aten.batch_norm.default: batch_norm,
    # activations
    aten.relu.default: lambda out, x: Call(Relu(), (x,)),
    aten.relu_.default: lambda out, x: Call(Relu(), (x,)),
    aten.relu6.default: lambda out, x: Call(Relu6(), (x,)),
    aten.relu6_.default: lambda out, x: Call(Relu6(), (x,)),
    aten.hardtanh.default: clamp,
    aten.hardtanh_.default: clamp,
    aten.clamp.default: clamp,
    aten.clamp_.default: clamp,
    aten.clamp_min.default: lambda out, x, low: clamp(out, x, low, None),
    aten.prelu.default: lambda out, x, weight: Call(PRelu(), (x,), {"weight": weight}),
    aten.leaky_relu.default: lambda out, x, slope: Call(LeakyRelu(negative_slope=float(slope)), (x,)),
    aten.leaky_relu_.default: lambda out, x, slope: Call(LeakyRelu(negative_slope=float(slope)), (x,)),
    aten.sigmoid.default: lambda out, x: Call(Sigmoid(), (x,)),
    aten.sigmoid_.default: lambda out, x: Call(Sigmoid(), (x,)),
    aten.softmax.int: softmax,
    aten.dropout.default: dropout,
    aten.dropout_.default: dropout,
    aten.feature_dropout.default: refused_dropout,
    aten.feature_dropout_.default: refused_dropout,
    aten.alpha_dropout.default: refused_dropout,
    aten.alpha_dropout_.default: refused_dropout,
    # arithmetic
    aten.add.Tensor: add,
    aten.add_.Tensor: add,
    aten.add.Scalar: add,
    aten.sub.Tensor: sub,
    aten.sub_.Tensor: sub,
    aten.rsub.Scalar: rsub,
    aten.neg.default: lambda out, x: Call(Scale(factor=-1.0), (x,)),
    aten.mul.Tensor: mul,
    aten.mul_.Tensor: mul,
    aten.mul.Scalar: mul,
    aten.div.Tensor: div,
    aten.div_.Tensor: div,
    aten.div.Scalar: div,
    # pooling
    aten.max_pool1d.default: max_pool(1),
    aten.max_pool2d.default: max_pool(2),
    aten.avg_pool1d.default: avg_pool(1),
    aten.avg_pool2d.default: avg_pool(2),
    aten.adaptive_avg_pool1d.default: adaptive_avg_pool(1),
    aten.adaptive_avg_pool2d.default: adaptive_avg_pool(2),
    aten.mean.dim: mean,
    aten.mean.default: lambda out, x, dtype: mean(out, x, dtype=dtype),
    # movement
    aten.cat.default: cat,
    aten.concat.default: cat,
    aten.flatten.using_ints: lambda out, x, start, end: Call(Flatten(start=start, end=end), (x,)),
    aten.reshape.default: reshape,
    aten.view.default: reshape,
    aten.unflatten.int: reshape,
    aten.squeeze.default: reshape,
    aten.squeeze.dim: reshape,
    aten.squeeze.dims: reshape,
    aten.unsqueeze.default: reshape,
    aten.permute.default: permute,
    aten.transpose.int: transpose,
    aten.swapaxes.default: transpose,
    aten.t.default: transpose_matrix,
    aten.pad.default: pad,
    aten.constant_pad_nd.default: constant_pad,
    # identities
    aten.alias.default: lambda out, x: x,
    aten.clone.default: lambda out, x, memory_format: x,
    aten.contiguous.default: lambda out, x, memory_format: x,
    aten.detach.default: lambda out, x: x,
    aten.detach_.default: lambda out, x: x,
    aten.lift_fresh_copy.default: lambda out, x: x,
    aten.to.dtype: to_dtype,
}
