"""Convolutions, matrix products, embeddings, normalizations, softmax and attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

import jquant.ops as ops
from jquant.plan.masks import VERY_NEGATIVE

from ..einsum import NoForm, Step, einsum_steps
from .call import (
    Call,
    Handler,
    Shape,
    Unsupported,
    aten,
    axis_of,
    both_sides,
    constant_of,
    dtype_of,
    is_weight,
    mask_constant,
    number,
    per_axis,
    rank_of,
    require,
    require_batched,
    require_float32,
    row_of,
    scaled,
    shape_of,
)

# ---------------------------------------------------------------------------------------------------------------------
# Convolutions


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
    op = ops.Conv(strides=per_axis(stride, rank), padding=padding, dilation=dilation, groups=groups)
    return Call(op, (x,), {"weight": weight, "bias": bias})


def conv_transpose(
    out: Shape,
    x: Node,
    weight: Node,
    bias: Node | None,
    stride: Any,
    padding: Any,
    output_padding: Any,
    groups: int,
    dilation: Any,
) -> Call:
    rank = rank_of(weight) - 2
    require_batched(x, rank)
    op = ops.ConvTranspose(
        strides=per_axis(stride, rank),
        padding=both_sides(padding, rank),
        output_padding=per_axis(output_padding, rank),
        dilation=per_axis(dilation, rank),
        groups=groups,
    )
    return Call(op, (x,), {"weight": weight, "bias": bias})


def convolution(
    out: Shape,
    x: Node,
    weight: Node,
    bias: Node | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Call:
    if transposed:
        return conv_transpose(out, x, weight, bias, stride, padding, output_padding, groups, dilation)
    return conv(out, x, weight, bias, stride, padding, dilation, groups)


# ---------------------------------------------------------------------------------------------------------------------
# Matrix products


def linear(out: Shape, x: Node, weight: Node, bias: Node | None) -> Call:
    """A weight that the model computes from its inputs is an operand of a matrix product."""
    if is_weight(weight) and rank_of(weight) == 2:
        return Call(ops.Linear(), (x,), {"weight": weight, "bias": bias})
    product = Call(ops.MatMul(transpose_b=rank_of(weight) == 2), (x, weight), label="matmul" if bias else "")
    return Call(ops.Add(), (product, bias)) if bias else product


def matmul(out: Shape, a: Node, b: Node) -> Call:
    return Call(ops.MatMul(), (a, b))


def einsum(out: Shape, equation: str, operands: Sequence[Node], path: Any = None) -> Any:
    shapes = [tuple(n if isinstance(n, int) else str(n) for n in shape_of(x)) for x in operands]
    try:
        step = einsum_steps(equation, shapes)
    except NoForm as reason:
        raise Unsupported(str(reason)) from reason

    def call_of(found: Any) -> Any:
        if not isinstance(found, Step):
            return operands[found]
        return Call(found.op, tuple(map(call_of, found.operands)), label=found.label)

    return call_of(step)


def add_product(out: Shape, c: Node, a: Node, b: Node, beta: Any = 1, alpha: Any = 1) -> Any:
    """beta * c + alpha * a @ b; a factor of 0 leaves its term out."""
    require(alpha != 0, "alpha is 0")
    product = Call(ops.MatMul(), (a, b), label="" if alpha == 1 and beta == 0 else "matmul")
    term = scaled(product, number(alpha), "" if beta == 0 else "scale")
    return Call(ops.Add(), (scaled(c, number(beta)), term)) if beta else term


def embedding(out: Shape, weight: Node, index: Node, padding: Any, *_: Any) -> Call:
    require(is_weight(weight), "its table is computed from the inputs; use index_select")
    return Call(ops.Embedding(padding_index=int(padding)), (index,), {"weight": weight})


# ---------------------------------------------------------------------------------------------------------------------
# Normalizations


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
    return Call(ops.BatchNorm(epsilon=epsilon, momentum=momentum), (x,), params)


def batch_norm_of_running(
    out: Any, x: Node, weight: Any, bias: Any, mean: Node, var: Node, momentum: float, epsilon: float
) -> list[Any]:
    """The functional form of torch.export, with results that are empty."""
    first = batch_norm(out[0], x, weight, bias, mean, var, False, momentum, epsilon, False)
    return [first, "an empty tensor", "an empty tensor"]


def instance_norm(
    out: Shape,
    x: Node,
    weight: Node | None,
    bias: Node | None,
    running_mean: Node | None,
    running_var: Node | None,
    use_input_stats: bool,
    momentum: float,
    epsilon: float,
    cudnn: bool,
) -> Call:
    if not use_input_stats:
        return batch_norm(out, x, weight, bias, running_mean, running_var, False, momentum, epsilon, cudnn)
    return Call(ops.InstanceNorm(epsilon=epsilon), (x,), {"weight": weight, "bias": bias})


def layer_norm(
    out: Shape, x: Node, shape: Sequence[int], weight: Node | None, bias: Node | None, epsilon: float, *_: Any
) -> Call:
    return Call(ops.LayerNorm(rank=len(shape), epsilon=epsilon), (x,), {"weight": weight, "bias": bias})


def native_layer_norm(
    out: Any, x: Node, shape: Sequence[int], weight: Node | None, bias: Node | None, epsilon: float
) -> list[Any]:
    reason = "its mean and deviation; use nn.LayerNorm"
    return [layer_norm(out, x, shape, weight, bias, epsilon), reason, reason]


def rms_norm(out: Shape, x: Node, shape: Sequence[int], weight: Node | None, epsilon: float | None) -> Call:
    epsilon = torch.finfo(torch.float32).eps if epsilon is None else epsilon
    return Call(ops.RmsNorm(rank=len(shape), epsilon=epsilon), (x,), {"weight": weight})


def group_norm(
    out: Shape, x: Node, groups: int, weight: Node | None, bias: Node | None, epsilon: float, *_: Any
) -> Call:
    return Call(ops.GroupNorm(groups=groups, epsilon=epsilon), (x,), {"weight": weight, "bias": bias})


# ---------------------------------------------------------------------------------------------------------------------
# Softmax and attention


def softmax(out: Shape, x: Node, axis: int, dtype: Any = None) -> Call:
    require_float32(dtype)
    require(rank_of(x) > 0, "the softmax of a number is 1")
    return Call(ops.Softmax(axis=axis_of(axis, rank_of(x))), (x,))


def plain_softmax(out: Shape, x: Node, axis: int, half: bool) -> Call:
    return softmax(out, x, axis)


def log_softmax(out: Shape, x: Node, axis: int, dtype: Any = None) -> Call:
    require_float32(dtype)
    require(rank_of(x) > 0, "the softmax of a number is 1")
    return Call(ops.LogSoftmax(axis=axis_of(axis, rank_of(x))), (x,))


def attention(
    out: Shape,
    query: Node,
    key: Node,
    value: Node,
    mask: Node | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    grouped: bool,
) -> Call:
    require(dropout == 0, "it drops probabilities in eval mode as well; pass dropout_p=0.0 unless self.training")
    if grouped:
        return attention_of_groups(out, query, key, value, mask, causal, scale)
    return attend(query, key, value, mask, causal, scale)


def attention_of_groups(
    out: Shape, query: Node, key: Node, value: Node, mask: Node | None, causal: bool, scale: float | None
) -> Call:
    """Each head of the keys and values serves as many heads of the query in a row."""

    def repeated(x: Node, label: str) -> Any:
        heads, wanted = shape_of(x)[-3], shape_of(query)[-3]
        require(isinstance(heads, int) and isinstance(wanted, int), "its heads depend on the batch size")
        indices = tuple(i // (wanted // heads) for i in range(wanted))
        return Call(ops.IndexSelect(axis=rank_of(x) - 3, indices=indices), (x,), label=label) if wanted > heads else x

    require(rank_of(query) >= 3, "enable_gqa without an axis of heads")
    return attend(query, repeated(key, "key"), repeated(value, "value"), mask, causal, scale)


def attend(query: Node, key: Any, value: Any, mask: Node | None, causal: bool, scale: float | None) -> Call:
    if mask is None:
        return Call(ops.Attention(scale=scale, causal=causal), (query, key, value))
    known = row_of(mask) if constant_of(mask) is None else constant_of(mask)
    allowed = known if dtype_of(mask) == torch.bool else allowed_by(known)
    if allowed is not None and bool(allowed.all()):
        return Call(ops.Attention(scale=scale, causal=causal), (query, key, value))
    kind = "bool" if dtype_of(mask) == torch.bool or allowed is not None else "add"
    operand = mask if allowed is None or constant_of(mask) is allowed else mask_constant(allowed)
    op = ops.Attention(scale=scale, causal=causal, mask="bool" if kind == "bool" else "add")
    return Call(op, (query, key, value, operand))


def allowed_by(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A constant addend of 0 and of what is as good as minus infinity, as a mask of what is allowed."""
    if mask is None:
        return None
    masked = mask <= VERY_NEGATIVE
    if bool((mask[~masked] == 0).all()) and bool(masked.any()):
        return ~masked
    require(bool(torch.isfinite(mask).all()), "a mask of minus infinity and numbers; use a bool mask")
    return None


TABLE: dict[Any, Handler] = {
    aten.conv1d.default: conv,
    aten.conv1d.padding: conv,
    aten.conv2d.default: conv,
    aten.conv2d.padding: conv,
    aten.conv3d.default: conv,
    aten.conv3d.padding: conv,
    aten.conv_transpose1d.default: conv_transpose,
    aten.conv_transpose2d.input: conv_transpose,
    aten.conv_transpose3d.input: conv_transpose,
    aten.convolution.default: convolution,
    aten.linear.default: linear,
    aten.matmul.default: matmul,
    aten.mm.default: matmul,
    aten.bmm.default: matmul,
    aten.mv.default: matmul,
    aten.dot.default: matmul,
    aten.addmm.default: add_product,
    aten.addmv.default: add_product,
    aten.baddbmm.default: add_product,
    aten.einsum.default: einsum,
    aten.embedding.default: embedding,
    aten.batch_norm.default: batch_norm,
    aten._native_batch_norm_legit_no_training.default: batch_norm_of_running,
    aten.instance_norm.default: instance_norm,
    aten.layer_norm.default: layer_norm,
    aten.native_layer_norm.default: native_layer_norm,
    aten.rms_norm.default: rms_norm,
    aten.group_norm.default: group_norm,
    aten.softmax.int: softmax,
    aten._softmax.default: plain_softmax,
    aten.log_softmax.int: log_softmax,
    aten._log_softmax.default: lambda out, x, axis, half: log_softmax(out, x, axis),
    aten.scaled_dot_product_attention.default: attention,
}
