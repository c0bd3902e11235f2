"""Handlers: convolutions, matrix products, normalizations and softmax."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

import jquant.ops as ops

from ..einsum import NoForm, Step, einsum_steps
from .call import MAX_TAPS, Call, Handler, axis_of
from .elementwise import arithmetic
from .values import Known, Refused, Result, Unsupported, Value, require

# ---------------------------------------------------------------------------------------------------------------------
# Windows


def window(call: Call, kernel: tuple[int, ...], sizes: tuple[Any, ...]) -> dict[str, Any]:
    """strides, padding and dilation of a window over spatial axes."""
    rank = len(kernel)
    ones = (1,) * rank
    strides, dilation = call.integers("strides", ones), call.integers("dilations", ones)
    require(len(sizes) == rank == len(strides) == len(dilation), f"a window {kernel} on {len(sizes)} spatial axes")
    positive = min((*kernel, *strides, *dilation), default=1) >= 1
    require(positive and prod(kernel) <= MAX_TAPS, f"a window of {kernel} by {strides}, dilation {dilation}")
    require(max((*strides, *dilation), default=1) <= 2**20, "strides or dilations beyond 2^20")
    return {"strides": strides, "dilation": dilation, "padding": padding_of(call, kernel, strides, dilation, sizes)}


def padding_of(call: Call, kernel: Any, strides: Any, dilation: Any, sizes: Any) -> tuple[tuple[int, int], ...]:
    mode, rank = call.text("auto_pad", "NOTSET"), len(kernel)
    if mode in ("NOTSET", ""):
        pads = call.integers("pads", (0,) * 2 * rank)
        require(len(pads) == 2 * rank and min(pads, default=0) >= 0, f"pads {pads}")
        require(max(pads, default=0) <= 2**20, "pads beyond 2^20")
        return tuple(zip(pads[:rank], pads[rank:], strict=True))
    if mode == "VALID":
        return ((0, 0),) * rank
    require(mode in ("SAME_UPPER", "SAME_LOWER"), f"auto_pad={mode!r}")
    require(None not in sizes, "auto_pad on an axis that depends on the batch")
    found = []
    for k, s, d, n in zip(kernel, strides, dilation, sizes, strict=True):
        total = max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
        less, more = total // 2, total - total // 2
        found.append((less, more) if mode == "SAME_UPPER" else (more, less))
    return tuple(found)


def weight_of(call: Call, i: int, what: str = "weight") -> Known:
    found = call.operand(i)
    require(isinstance(found, Known) and found.fixed, f"its {what} is computed by the model; make it a constant")
    assert isinstance(found, Known)
    require(found.at[0].dtype == np.float32, f"its {what} is {found.at[0].dtype}; make it float32")
    return found


def bias_of(call: Call, i: int) -> dict[str, Known]:
    return {"bias": weight_of(call, i, "bias")} if call.given(i) else {}


def conv(call: Call) -> Result:
    x, weight = call.real(0), weight_of(call, 1)
    kernel = weight.at[0].shape[2:]
    require(x.rank >= 3 and weight.at[0].ndim == x.rank, f"a weight of shape {list(weight.at[0].shape)}")
    groups = _groups(call, x, weight.at[0].shape[0], weight.at[0].shape[1])
    require(call.integers("kernel_shape", kernel) == kernel, "kernel_shape is not that of the weight")
    op = ops.Conv(**window(call, kernel, x.shape[2:]), groups=groups)
    return call.make(op, x, params={"weight": weight, **bias_of(call, 2)})


def _groups(call: Call, x: Value, outputs: int, per_group: int) -> int:
    groups = call.integer("group", 1)
    fits = groups >= 1 and outputs % groups == 0 and x.shape[1] == per_group * groups
    require(fits, f"{groups} groups of {x.shape[1]} channels by a weight for {per_group} each, to {outputs}")
    return groups


def conv_transpose(call: Call) -> Result:
    x, weight = call.real(0), weight_of(call, 1)
    kernel, rank = weight.at[0].shape[2:], x.rank - 2
    require(x.rank >= 3 and weight.at[0].ndim == x.rank, f"a weight of shape {list(weight.at[0].shape)}")
    groups = call.integer("group", 1)
    require(groups >= 1 and x.shape[1] == weight.at[0].shape[0] and weight.at[0].shape[0] % groups == 0, "its groups")
    strides, dilation = call.integers("strides", (1,) * rank), call.integers("dilations", (1,) * rank)
    extra = call.integers("output_padding", (0,) * rank)
    require(len(extra) == rank and all(0 <= e < max(s, d) for e, s, d in zip(extra, strides, dilation, strict=True)),
            f"output_padding {extra}")  # fmt: skip
    require(call.integers("output_shape") is None, "output_shape; give pads and output_padding")
    require(
        call.text("auto_pad", "NOTSET") in ("NOTSET", "VALID", ""), "auto_pad of a transposed convolution; give pads"
    )
    op = ops.ConvTranspose(**window(call, kernel, x.shape[2:]), output_padding=extra, groups=groups)
    return call.make(op, x, params={"weight": weight, **bias_of(call, 2)})


# ---------------------------------------------------------------------------------------------------------------------
# Matrix products


def transposed(weight: Known, name: str) -> Known:
    """[I, O] as [O, I]: the constant that it is the transpose of, where the file has that."""
    if weight.turned is not None:
        return weight.turned
    grid = weight.grid
    if grid is not None and grid.axis is not None:
        grid = replace(grid, axis=1 - grid.axis % 2)
    array = np.ascontiguousarray(weight.at[0].T)
    return Known((array, array), name, grid)


def linear(call: Call, x: Value, weight: Known, params: dict[str, Known]) -> Value:
    return call.make(ops.Linear(), x, params={"weight": weight, **params})


def matmul(call: Call) -> Result:
    a, b = call.operand(0), call.operand(1)
    if isinstance(a, Value) and isinstance(b, Known) and b.at[0].ndim == 2 and a.dtype == "float32" and a.rank > 1:
        weight = weight_of(call, 1)
        if b.at[0].shape[0] == a.shape[-1]:
            return linear(call, a, transposed(weight, ""), {})
    first, second = call.real(0), call.real(1)
    require(first.rank >= 1 and second.rank >= 1, "a number")
    op, operands = call.maker(second)
    rank = second.rank
    if isinstance(op, ops.Permute) and op.axes == (*range(rank - 2), rank - 1, rank - 2) and first.rank > 1:
        return call.make(ops.MatMul(transpose_b=True), first, call.graph.value_of(operands[0]))
    return call.make(ops.MatMul(), first, second)


def add_bias(call: Call) -> Value | None:
    """A constant of one axis that is added to a linear layer, which nothing else reads, is its bias."""
    for i in (0, 1):
        x, bias = call.operand(i), call.operand(1 - i)
        op, _ = call.maker(x)
        if not (isinstance(x, Value) and isinstance(bias, Known) and isinstance(op, ops.Linear) and bias.fixed):
            continue
        fits = bias.at[0].ndim == 1 and bias.at[0].shape[0] == x.shape[-1] and bias.at[0].dtype == np.float32
        if fits and call.graph.takes_bias(x.name):
            call.graph.set_bias(x.name, bias)
            return x
    return None


def gemm(call: Call) -> Result:
    a, b = call.real(0), call.operand(1)
    alpha, beta = call.number("alpha", 1.0), call.number("beta", 1.0)
    if call.flag("transA"):
        require(a.rank == 2, "transA")
        a = call.make(ops.Permute(axes=(1, 0)), a, part="a_transposed")
    require(a.rank == 2, f"its first operand has {a.rank} axes")
    c = call.operand(2) if call.given(2) else None
    plain = alpha == 1 and (c is None or beta == 1) and isinstance(b, Known)
    vector = c is None or (isinstance(c, Known) and c.fixed and c.at[0].ndim == 1 and c.at[0].shape[0] > 1)
    if plain and vector:
        weight = weight_of(call, 1)
        require(weight.at[0].ndim == 2, f"a weight of shape {list(weight.at[0].shape)}")
        weight = weight if call.flag("transB") else transposed(weight, "")
        if c is None or c.at[0].shape[0] == weight.at[0].shape[0]:  # type: ignore[union-attr]
            return linear(call, a, weight, bias_of(call, 2))
    last = c is None or beta == 0
    part = "" if last and alpha == 1 else "product"
    y = call.make(ops.MatMul(transpose_b=call.flag("transB")), a, call.real(1), part=part)
    y = call.scaled(y, alpha, "" if last else "alpha")
    if last:
        return y
    assert c is not None
    addend = call.scaled(call.as_value(c, f"{call.name}.c"), beta, "beta")
    return call.make(ops.Add(), y, addend)


# ---------------------------------------------------------------------------------------------------------------------
# Normalizations


def vector_of(call: Call, i: int, what: str) -> Known:
    found = weight_of(call, i, what)
    require(found.at[0].ndim == 1, f"its {what} has {found.at[0].ndim} axes")
    return found


def batch_norm(call: Call) -> list[Result]:
    require(not call.flag("training_mode"), "it updates its statistics; export the model in eval mode")
    roles = ("weight", "bias", "running_mean", "running_var")
    params = {role: vector_of(call, i, role) for i, role in enumerate(roles, start=1)}
    x = call.real(0)
    require(x.rank >= 2 and all(v.at[0].shape[0] == x.shape[1] for v in params.values()), "its channels")
    y: Result = call.make(ops.BatchNorm(epsilon=call.number("epsilon", 1e-5)), x, params=params)
    return [y, *(Refused("statistics of a batch norm in training") for _ in range(4))]


def instance_norm(call: Call) -> Result:
    x = call.real(0)
    params = {"weight": vector_of(call, 1, "scale"), "bias": vector_of(call, 2, "bias")}
    require(x.rank >= 3, "an instance norm without spatial axes")
    return call.make(ops.InstanceNorm(epsilon=call.number("epsilon", 1e-5)), x, params=params)


def layer_norm(call: Call) -> list[Result]:
    x = call.real(0)
    rank = x.rank - axis_of(call.integer("axis", -1), x.rank)
    params = {"weight": weight_of(call, 1, "scale"), **bias_of(call, 2)}
    for role, value in params.items():
        shape = x.shape[x.rank - rank :]
        require(value.at[0].size == 1 or value.at[0].shape == shape, f"a {role} of shape {list(value.at[0].shape)}")
    y: Result = call.make(ops.LayerNorm(rank=rank, epsilon=call.number("epsilon", 1e-5)), x, params=params)
    return [y, Refused("the mean of a layer norm"), Refused("the inverse deviation of a layer norm")]


def group_norm(call: Call) -> Result:
    """One scale a group before opset 21, one a channel since."""
    x, groups = call.real(0), call.integer("num_groups", 0)
    channels = x.shape[1] if x.rank >= 3 else None
    require(channels is not None and groups >= 1 and channels % groups == 0, f"{groups} groups of {channels} channels")
    assert channels is not None
    params = {}
    for i, role in ((1, "weight"), (2, "bias")):
        value = vector_of(call, i, role)
        if call.opset < 21:
            array = np.repeat(value.at[0], channels // max(value.at[0].shape[0], 1))
            value = Known((array, array))
        require(value.at[0].shape[0] == channels, f"{value.at[0].shape[0]} entries of {role}")
        params[role] = value
    return call.make(ops.GroupNorm(groups=groups, epsilon=call.number("epsilon", 1e-5)), x, params=params)


def lp_norm(call: Call) -> Result:
    x, order = call.real(0), call.integer("p", 2)
    require(order in (1, 2), f"p={order}")
    axis = axis_of(call.integer("axis", -1), x.rank)
    norm = ops.Norm(axes=(axis,), keepdims=True, order="1" if order == 1 else "2")
    positive = call.make(ops.Clamp(minimum=1e-30), call.make(norm, x, part="norm"), part="positive")
    return call.make(ops.Div(), x, positive)  # of zeros: zeros


def soft(cls: Any) -> Handler:
    """Over one axis; before opset 13 over all axes from `axis` on, which is 1 by default."""

    def handler(call: Call) -> Result:
        x = call.real(0)
        if call.opset >= 13:
            return call.make(cls(axis=axis_of(call.integer("axis", -1), x.rank)), x)
        axis = axis_of(call.integer("axis", 1), x.rank)
        if all(n == 1 for n in x.shape[axis + 1 :]):
            return call.make(cls(axis=axis), x)
        require(None not in x.shape[axis:], "a softmax over the batch")
        rest = x.shape[axis:]
        lead = x.shape[:axis]
        require(lead.count(None) <= 1, "its batch axes")
        flat_shape = (*(-1 if n is None else n for n in lead), prod(n for n in rest if n is not None))
        flat = call.make(ops.Reshape(shape=flat_shape), x, part="flat")
        y = call.make(cls(axis=axis), flat, part="softmax")
        return call.make(ops.Reshape(shape=tuple(-1 if n is None else n for n in x.shape)), y)

    return handler


def add(call: Call) -> Result:
    found = add_bias(call)
    return arithmetic(ops.Add())(call) if found is None else found


def quantized_operator(call: Call) -> Result:
    raise Unsupported("an operator on integers; jquant reads the QDQ form: quantize by QuantizeLinear/DequantizeLinear")


def einsum(call: Call) -> Result:
    values = call.values()
    try:
        step = einsum_steps(call.text("equation", ""), [x.shape for x in values])
    except NoForm as reason:
        raise Unsupported(str(reason)) from reason

    def value_of(found: Any) -> Value:
        if not isinstance(found, Step):
            return values[found]
        return call.make(found.op, *map(value_of, found.operands), part=found.label)

    return value_of(step)


TABLE: dict[str, Handler] = {
    "Add": add,
    "BatchNormalization": batch_norm,
    "Conv": conv,
    "ConvInteger": quantized_operator,
    "ConvTranspose": conv_transpose,
    "Gemm": gemm,
    "GroupNormalization": group_norm,
    "InstanceNormalization": instance_norm,
    "LayerNormalization": layer_norm,
    "LogSoftmax": soft(ops.LogSoftmax),
    "LpNormalization": lp_norm,
    "Einsum": einsum,
    "MatMul": matmul,
    "MatMulInteger": quantized_operator,
    "QLinearConv": quantized_operator,
    "QLinearMatMul": quantized_operator,
    "Softmax": soft(ops.Softmax),
}
