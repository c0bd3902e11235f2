"""Export rules: convolutions, matrix products, normalizations, softmax and attention."""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np

import jquant.ops as ops
from jquant.ops.attention import LEAST_ADDED, allowed_of
from jquant.ops.composite import MASKED

from .writer import Call, Operand, emit

# ---------------------------------------------------------------------------------------------------------------------
# What the convolution unit does in one go


def finish(op: ops.Conv | ops.ConvTranspose | ops.Linear, call: Call, first: str, *inputs: Any, **options: Any) -> None:
    """The product, which keeps the name of the node, then the fused add and activation."""
    steps: list[tuple[str, tuple[Any, ...]]] = []
    if first == "MatMul" and "bias" in call.params:
        steps.append(("Add", (call.params["bias"],)))
    if op.addend:
        steps.append(("Add", (call.inputs[1],)))
    if op.activation == "relu":
        steps.append(("Relu", ()))
    elif op.activation == "relu6":
        upper = call.snap(6.0)
        steps.append(("Clip", (call.constant(0.0, "minimum"), call.constant(upper, "maximum"))))
    y = call.add(first, *inputs, part="product" if steps else "", title=call.name, **options)
    for i, (kind, others) in enumerate(steps, start=1):
        part = "" if i == len(steps) else f"{kind.lower()}_{i}"
        y = call.add(kind, y, *others, part=part, title=f"{call.name}:{kind.lower()}")


def biased(call: Call) -> tuple[str, ...]:
    return (call.params["bias"],) if "bias" in call.params else ()


def pads(padding: tuple[tuple[int, int], ...]) -> list[int]:
    return [low for low, _ in padding] + [high for _, high in padding]


@emit.register
def _(op: ops.Conv, call: Call) -> None:
    finish(
        op,
        call,
        "Conv",
        call.inputs[0],
        call.params["weight"],
        *biased(call),
        kernel_shape=list(call.param_shapes["weight"][2:]),
        strides=list(op.strides),
        pads=pads(op.padding),
        dilations=list(op.dilation),
        group=op.groups,
    )


@emit.register
def _(op: ops.ConvTranspose, call: Call) -> None:
    finish(
        op,
        call,
        "ConvTranspose",
        call.inputs[0],
        call.params["weight"],
        *biased(call),
        kernel_shape=list(call.param_shapes["weight"][2:]),
        strides=list(op.strides),
        pads=pads(op.padding),
        dilations=list(op.dilation),
        output_padding=list(op.output_padding),
        group=op.groups,
    )


@emit.register
def _(op: ops.Linear, call: Call) -> None:
    """The weight keeps its shape [O, I]."""
    x, weight = call.inputs[0], call.params["weight"]
    if len(x.shape) == 2:
        finish(op, call, "Gemm", x, weight, *biased(call), transB=1)
    else:
        turned = call.add("Transpose", weight, part="weight_transposed", perm=[1, 0])
        finish(op, call, "MatMul", x, turned)


@emit.register
def _(op: ops.MatMul, call: Call) -> None:
    a, b = call.inputs
    first = paired(call, 0, swapped(call, a, "a_transposed")) if op.transpose_a else a.name
    second = paired(call, 1, swapped(call, b, "b_transposed")) if op.transpose_b else b.name
    call.add("MatMul", first, second)


def paired(call: Call, port: int, x: str) -> str:
    """An int8 operand that was moved, with a pair at opset 21: onnxruntime would put one there, and refuse its file."""
    if call.opset < 21 or not call.scales or call.scales[port] is None or call.dtypes[port] != "int8":
        return x
    return call.writer.pair(x, call.scales[port], "int8", x, call.writer.unique(f"{x}:dequantized"))


def swapped(call: Call, x: Operand, part: str) -> str:
    rank = len(x.shape)
    return call.add("Transpose", x, part=part, perm=[*range(rank - 2), rank - 1, rank - 2])


@emit.register
def _(op: ops.Embedding, call: Call) -> None:
    call.add("Gather", call.params["weight"], call.inputs[0], axis=0)


# ---------------------------------------------------------------------------------------------------------------------
# Normalizations


@emit.register
def _(op: ops.BatchNorm, call: Call) -> None:
    (x,) = call.inputs
    count = call.param_shapes["running_mean"][0]
    weight = call.params.get("weight") or call.constant(np.ones(count), "weight")
    bias = call.params.get("bias") or call.constant(np.zeros(count), "bias")
    mean, variance = call.params["running_mean"], call.params["running_var"]
    call.add("BatchNormalization", x, weight, bias, mean, variance, epsilon=op.epsilon)


@emit.register
def _(op: ops.LayerNorm, call: Call) -> None:
    (x,) = call.inputs
    shape = call.static(x.shape[len(x.shape) - op.rank :])
    weight = call.params.get("weight") or call.constant(np.ones(shape), "weight")
    bias = (call.params["bias"],) if "bias" in call.params else ()
    call.add("LayerNormalization", x, weight, *bias, axis=-op.rank, epsilon=op.epsilon)


@emit.register
def _(op: ops.RmsNorm, call: Call) -> None:
    (x,) = call.inputs
    square = call.add("Mul", x, x, part="square")
    mean = call.reduce("ReduceMean", square, list(range(-op.rank, 0)), "axes", part="mean", keepdims=1)
    shifted = call.add("Add", mean, call.constant(op.epsilon, "epsilon"), part="shifted")
    root = call.add("Sqrt", shifted, part="root")
    if "weight" not in call.params:
        call.add("Div", x, root)
    else:
        call.add("Mul", call.add("Div", x, root, part="normalized"), call.params["weight"])


@emit.register
def _(op: ops.InstanceNorm, call: Call) -> None:
    (x,) = call.inputs
    count = call.static(x.shape[1:2])[0]
    weight = call.params.get("weight") or call.constant(np.ones(count), "weight")
    bias = call.params.get("bias") or call.constant(np.zeros(count), "bias")
    call.add("InstanceNormalization", x, weight, bias, epsilon=op.epsilon)


@emit.register
def _(op: ops.GroupNorm, call: Call) -> None:
    """An instance norm over groups; the operator of that name has a scale a group before opset 21."""
    (x,) = call.inputs
    grouped = call.reshape_to((None, op.groups, int(np.prod(call.static(x.shape[1:]))) // op.groups), x, "grouped")
    ones, zeros = call.constant(np.ones(op.groups), "ones"), call.constant(np.zeros(op.groups), "zeros")
    normal = call.add("InstanceNormalization", grouped, ones, zeros, part="normalized", epsilon=op.epsilon)
    shape = (None, *x.shape[1:]) if x.shape[0] is None else x.shape
    steps = [(role, kind) for role, kind in (("weight", "Mul"), ("bias", "Add")) if role in call.params]
    y = call.reshape_to(shape, normal, "ungrouped" if steps else "")
    along = (call.static(x.shape[1:2])[0], *(1,) * (len(x.shape) - 2))
    for i, (role, kind) in enumerate(steps, start=1):
        shaped = call.reshape_to(along, call.params[role], f"{role}_shaped")
        y = call.add(kind, y, shaped, part="" if i == len(steps) else "scaled")


# ---------------------------------------------------------------------------------------------------------------------
# Softmax and attention


@emit.register
def _(op: ops.Softmax, call: Call) -> None:
    x, *masks = call.inputs
    if not masks:
        call.add("Softmax", x, axis=op.axis)
        return
    _masked_softmax(call, x.name, masks[0].name, op.axis, op.empty, "")


def _masked_softmax(call: Call, x: str, masked: str, axis: int, empty: str, part: str) -> str:
    if empty == "scores":
        added = call.add("Where", masked, call.constant(-1e4, "least"), call.constant(0.0, "zero"), part="mask")
        return call.add("Softmax", call.add("Add", x, added, part="biased"), part=part, axis=axis)
    least = call.constant(-np.inf if empty == "nan" else MASKED, "least")
    filled = call.add("Where", masked, least, x, part="filled")
    if empty != "zero":
        return call.add("Softmax", filled, part=part, axis=axis)
    soft = call.add("Softmax", filled, part="softmax", axis=axis)
    return call.add("Where", masked, call.constant(0.0, "zero"), soft, part=part)


@emit.register
def _(op: ops.LogSoftmax, call: Call) -> None:
    call.add("LogSoftmax", *call.inputs, axis=op.axis)


@emit.register
def _(op: ops.Attention, call: Call) -> None:
    query, key, value, *masks = call.inputs
    features = call.static(query.shape[-1:])[0]
    factor = 1 / sqrt(features) if op.scale is None else op.scale
    products = call.add("MatMul", query, swapped(call, key, "key_transposed"), part="products")
    scores = call.add("Mul", products, call.constant(factor, "factor"), part="scores")
    if op.mask == "add":
        bias = call.add("Max", masks[0], call.constant(LEAST_ADDED, "least_added"), part="bias")
        scores = call.add("Add", scores, bias, part="biased")
    left_out = [call.add("Not", mask, part="not_allowed") for mask in allowed_of(op, masks)]
    if op.causal:
        length, keys = call.static((query.shape[-2], key.shape[-2]))
        left_out.append(call.constant(~np.tril(np.ones((length, keys), bool)), "later", np.bool_))
    if left_out:
        masked = left_out[0] if len(left_out) == 1 else call.add("Or", *left_out, part="masked")
        soft = _masked_softmax(call, scores, masked, -1, op.empty, "probabilities")
    else:
        soft = call.add("Softmax", scores, part="softmax", axis=-1)
    call.add("MatMul", soft, value)
