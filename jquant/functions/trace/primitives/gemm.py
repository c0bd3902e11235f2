"""Convolutions and matrix products. A factor that depends on no input is a weight, in the operator's layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np

import jquant.ops as ops
from jquant.drafts import values
from jquant.drafts.values import Known, Shape, Value
from jquant.functions.trace.primitives.common import is_float, out_dtype, out_shape, require
from jquant.functions.trace.reader import Reader

Axes = Sequence[int]

# ---------------------------------------------------------------------------------------------------------------------
# Products


def dot_general(reader: Reader, equation: Any, a: Value, b: Value) -> Value:
    (contract_a, contract_b), (batch_a, batch_b) = equation.params["dimension_numbers"]
    require(is_float(a) and is_float(b) and str(out_dtype(equation)) == "float32", "a product that is not float32")
    if not batch_a and isinstance(b, Known):
        return linear(reader, a, b, contract_a, contract_b)
    if not batch_a and isinstance(a, Known):
        y = linear(reader, b, a, contract_b, contract_a)
        free = len(b.shape) - len(contract_b)  # the weight's axes come first in the result
        return reader.permute(y, [*range(free, len(y.shape)), *range(free)])
    return matmul(reader, a, b, (contract_a, contract_b), (batch_a, batch_b))


def linear(reader: Reader, x: Value, weight: Known, contract_x: Axes, contract_weight: Axes) -> Value:
    """x's free axes, then those of the weight: a linear layer over the contracted axes, joined to one."""
    free_x = [i for i in range(len(x.shape)) if i not in contract_x]
    free_w = [i for i in range(len(weight.shape)) if i not in contract_weight]
    order = sorted(range(len(contract_x)), key=lambda i: contract_x[i])  # x keeps its order where it can
    inputs = prod(x.shape[i] for i in contract_x)
    x = reader.permute(x, [*free_x, *(contract_x[i] for i in order)])
    kept, sizes = x.shape[: len(free_x)], tuple(weight.shape[i] for i in free_w)
    x = reader.reshape(x, (*kept, inputs))
    moved = reader.permute(values.full(weight), [*free_w, *(contract_weight[i] for i in order)])
    matrix = reader.reshape(moved, (prod(sizes), inputs))
    assert isinstance(matrix, Known)
    x, lead = (x, kept) if kept else (reader.reshape(x, (1, inputs)), (1,))
    y = reader.draft(ops.Linear(), x, shape=(*lead, prod(sizes)), weight=matrix)
    return reader.reshape(y, (*kept, *sizes))


def matmul(reader: Reader, a: Value, b: Value, contract: tuple[Axes, Axes], batch: tuple[Axes, Axes]) -> Value:
    """Batch axes, then those of a, then those of b; a transposition is left to the product where it can do it."""
    a, rows, transpose_a = _factor(reader, a, batch[0], contract[0], contracted_last=True)
    b, columns, transpose_b = _factor(reader, b, batch[1], contract[1], contracted_last=False)
    lead = a.shape[: len(batch[0])]
    op = ops.MatMul(transpose_a=transpose_a, transpose_b=transpose_b)
    y = reader.draft(op, a, b, shape=(*lead, prod(rows), prod(columns)))
    return reader.reshape(y, (*lead, *rows, *columns))


def _factor(
    reader: Reader, x: Value, batch: Axes, contract: Axes, *, contracted_last: bool
) -> tuple[Value, Shape, bool]:
    """A factor as [*batch, free, contracted] or the other way round, the sizes of its free axes, and which it is."""
    free = [i for i in range(len(x.shape)) if i not in batch and i not in contract]
    sizes = tuple(x.shape[i] for i in free)
    lead = tuple(x.shape[i] for i in batch)
    inner = prod(x.shape[i] for i in contract)
    natural = [*batch, *free, *contract] if contracted_last else [*batch, *contract, *free]
    swapped = [*batch, *contract, *free] if contracted_last else [*batch, *free, *contract]
    transpose = swapped == sorted(swapped) and natural != sorted(natural)
    x = reader.permute(values.full(x) if isinstance(x, Known) else x, swapped if transpose else natural)
    is_last = contracted_last != transpose
    return reader.reshape(x, (*lead, *((prod(sizes), inner) if is_last else (inner, prod(sizes))))), sizes, transpose


# ---------------------------------------------------------------------------------------------------------------------
# Convolutions


def conv_general_dilated(reader: Reader, equation: Any, x: Value, kernel: Value) -> Value:
    params = equation.params
    numbers = params["dimension_numbers"]
    require(isinstance(kernel, Known), "a kernel that is computed")
    require(is_float(x) and is_float(kernel), "a convolution that is not float32")
    require(params["batch_group_count"] == 1, "groups of the batch")
    assert isinstance(kernel, Known)
    weight = reader.permute(values.full(kernel), numbers.rhs_spec)  # [O, C / groups, *K]
    assert isinstance(weight, Known)
    dilated = any(d != 1 for d in params["lhs_dilation"])
    if dilated:
        weight, op = _transposed(reader, weight, params)
    else:
        op = _plain(params)
    channels_last = tuple(numbers.lhs_spec) != tuple(range(len(x.shape))) or numbers.out_spec != numbers.lhs_spec
    order = list(range(len(x.shape)))
    if channels_last:  # spec: the place of (N, C, *S)
        order = [numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1]]
    out = numbers.out_spec if not channels_last else (numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1])
    shape = out_shape(equation)
    y = reader.draft(
        op(channels_last=channels_last), reader.permute(x, order), shape=[shape[i] for i in out], weight=weight
    )
    return reader.permute(y, [int(i) for i in np.argsort(out)])


def _plain(params: Any) -> Callable[..., Any]:
    padding = tuple((int(low), int(high)) for low, high in params["padding"])
    require(min(min(pair) for pair in padding) >= 0, "negative padding")

    def make(**layout: Any) -> Any:
        return ops.Conv(
            strides=tuple(map(int, params["window_strides"])),
            padding=padding,
            dilation=tuple(map(int, params["rhs_dilation"])),
            groups=int(params["feature_group_count"]),
            **layout,
        )

    return make


def _transposed(reader: Reader, weight: Known, params: Any) -> tuple[Known, Callable[..., Any]]:
    """A convolution over an input with gaps is the adjoint of a strided one with the kernel reversed."""
    require(params["feature_group_count"] == 1, "a transposed convolution with groups")
    require(all(s == 1 for s in params["window_strides"]), "gaps in the input together with strides")
    reach = [d * (k - 1) for d, k in zip(params["rhs_dilation"], weight.shape[2:], strict=True)]
    padding = [(r - low, r - high) for r, (low, high) in zip(reach, params["padding"], strict=True)]
    require(min(low for low, _ in padding) >= 0, "padding beyond the kernel")
    spatial = tuple(range(2, len(weight.shape)))
    flipped = reader.share(weight, ("rev",), lambda: values.known_from("rev", lambda a: np_flip(a, spatial), [weight]))
    moved = reader.permute(flipped, [1, 0, *spatial])
    assert isinstance(moved, Known)

    def make(**layout: Any) -> Any:
        return ops.ConvTranspose(
            strides=tuple(map(int, params["lhs_dilation"])),
            padding=tuple((int(low), max(int(high), 0)) for low, high in padding),
            output_padding=tuple(max(-int(high), 0) for _, high in padding),
            dilation=tuple(map(int, params["rhs_dilation"])),
            **layout,
        )

    return moved, make


def np_flip(array: Any, axes: Sequence[int]) -> Any:
    return array[tuple(slice(None, None, -1) if i in axes else slice(None) for i in range(array.ndim))]


TABLE: dict[str, Callable[..., Any]] = {"dot_general": dot_general, "conv_general_dilated": conv_general_dilated}
