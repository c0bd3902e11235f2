"""Pooling."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jquant.graph.checks import check_lengths
from jquant.graph.operator import Lowered, Operand, constraints, eval_float, eval_integer, lower_op, to_channels_last
from jquant.numerics.rescale import Rescale, rescale
from jquant.numerics.rounding import widen
from jquant.numerics.windows import Combine, larger, reduce_windows
from jquant.ops.movement import only_moves
from jquant.ops.reduce import average, reduced_limit
from jquant.types import Array, GraphError, LoweringError, NodeFormat, Op, Target


@dataclass(frozen=True, kw_only=True)
class MaxPool(Op):
    """Maximum over windows; padding never wins."""

    layout: ClassVar = "spatial"
    scale_rule: ClassVar = "same_as_input"
    needs_stats: ClassVar = False

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    ceil_mode: bool = False
    channels_last: bool = False

    def __post_init__(self) -> None:
        counts = ("kernel", "strides", "dilation")
        check_lengths(self, "kernel", "strides", "padding", "dilation", positive=counts)


@dataclass(frozen=True, kw_only=True)
class AvgPool(Op):
    """Mean over windows; `count_include_pad`: zeros of the padding count as elements; `divisor` replaces the count."""

    layout: ClassVar = "spatial"

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor: int | None = None
    channels_last: bool = False

    def __post_init__(self) -> None:
        check_lengths(self, "kernel", "strides", "padding", positive=("kernel", "strides"))


@dataclass(frozen=True, kw_only=True)
class AdaptiveAvgPool(Op):
    """Mean over windows that tile the input into `output_size`: window i is [floor(i*n/m), ceil((i+1)*n/m))."""

    layout: ClassVar = "spatial"

    output_size: tuple[int, ...]
    channels_last: bool = False

    def __post_init__(self) -> None:
        check_lengths(self, "output_size", positive=("output_size",))


@dataclass(frozen=True, kw_only=True)
class AdaptiveMaxPool(Op):
    """Maximum over the windows of `AdaptiveAvgPool`, which may differ in size and overlap."""

    layout: ClassVar = "spatial"
    scale_rule: ClassVar = "same_as_input"
    needs_stats: ClassVar = False

    output_size: tuple[int, ...]
    channels_last: bool = False

    def __post_init__(self) -> None:
        check_lengths(self, "output_size", positive=("output_size",))


# ---------------------------------------------------------------------------------------------------------------------
# Windows, channels last


def full_padding(op: MaxPool | AvgPool, sizes: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """The padding with what ceil_mode adds at the end; a window must start inside the input or its left padding."""
    if not op.ceil_mode:
        return op.padding
    padding = []
    for n, k, s, d, (low, high) in zip(sizes, op.kernel, op.strides, _dilation(op), op.padding, strict=True):
        free = n + low + high - d * (k - 1) - 1
        windows = -(-free // s) + 1
        windows -= (windows - 1) * s >= n + low
        padding.append((low, max(high, high + (windows - 1) * s - free)))
    return tuple(padding)


def _reduce(op: MaxPool | AvgPool, x: Array, fill: Any, combine: Combine) -> Array:
    """A window reduction over the spatial axes of [N, *S, C]; `fill` is what the padding holds."""
    padding = full_padding(op, x.shape[1:-1])
    dilation = _dilation(op)
    for n, k, d, pair in zip(x.shape[1:-1], op.kernel, dilation, padding, strict=True):
        if n + sum(pair) < d * (k - 1) + 1:
            raise GraphError(f"a window of {k}, dilation {d}, does not fit into {n} + padding {pair}")
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)), constant_values=fill)
    return reduce_windows(padded, op.kernel, op.strides, dilation, combine)


def _dilation(op: MaxPool | AvgPool) -> tuple[int, ...]:
    return op.dilation if isinstance(op, MaxPool) else (1,) * len(op.kernel)


def window_counts(op: AvgPool, sizes: Sequence[int]) -> np.ndarray:
    """How many elements each window divides by, [*S_out, 1], or [1] where it is the same everywhere."""
    if op.divisor is not None:
        if op.divisor < 1:
            raise GraphError(f"divisor {op.divisor} must be positive")
        return np.array([op.divisor])
    per_axis = []
    for n, k, s, (low, high), (_, full) in zip(
        sizes, op.kernel, op.strides, op.padding, full_padding(op, sizes), strict=True
    ):
        first = np.arange((n + low + full - k) // s + 1) * s - low
        if op.count_include_pad:  # what ceil_mode adds is no padding
            per_axis.append(np.minimum(first + k, n + high) - first)
        else:
            per_axis.append(np.minimum(first + k, n) - np.maximum(first, 0))
    if min(int(axis.min()) for axis in per_axis) < 1:
        raise GraphError(f"padding {op.padding} leaves a window of {op.kernel} without an element; pad less")
    counts = np.ones((), np.int64)
    for axis in per_axis:
        counts = counts[..., None] * axis
    return np.array([counts.flat[0]]) if (counts == counts.flat[0]).all() else counts[..., None]


Pool = MaxPool | AvgPool | AdaptiveAvgPool | AdaptiveMaxPool


def _spatial_last(op: Pool, x: Array) -> Array:
    return x if op.channels_last else jnp.moveaxis(x, 1, -1)


def _spatial_back(op: Pool, y: Array) -> Array:
    return y if op.channels_last else jnp.moveaxis(y, -1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Maximum


@eval_float.register
def _(op: MaxPool, x: Array) -> Array:
    lowest = -jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).min
    return _spatial_back(op, _reduce(op, _spatial_last(op, x), np.asarray(lowest, x.dtype), larger))


def bins_of(n: int, m: int) -> list[tuple[int, int]]:
    return [(i * n // m, -(-(i + 1) * n // m)) for i in range(m)]


@eval_float.register
def _(op: AdaptiveMaxPool, x: Array) -> Array:
    x = _spatial_last(op, x)
    for axis, size in enumerate(op.output_size, start=1):
        bins = bins_of(x.shape[axis], size)
        x = jnp.concatenate([jax.lax.slice_in_dim(x, *b, axis=axis).max(axis, keepdims=True) for b in bins], axis)
    return _spatial_back(op, x)


only_moves(MaxPool, AdaptiveMaxPool)


# ---------------------------------------------------------------------------------------------------------------------
# Averages: exact integer sum, rescale from s_x / N (specification, section 5)


@eval_float.register
def _(op: AvgPool, x: Array) -> Array:
    x = _spatial_last(op, x)
    total = _reduce(op, x, np.float32(0), jnp.add)
    return _spatial_back(op, total / jnp.asarray(window_counts(op, x.shape[1:-1]), jnp.float32))


@eval_float.register
def _(op: AdaptiveAvgPool, x: Array) -> Array:
    x = _spatial_last(op, x)
    for axis, size in enumerate(op.output_size, start=1):
        n = x.shape[axis]
        if n % size == 0:
            shape = (*x.shape[:axis], size, n // size, *x.shape[axis + 1 :])
            x = x.reshape(shape).mean(axis + 1)
        else:
            parts = [jax.lax.slice_in_dim(x, a, b, axis=axis).mean(axis, keepdims=True) for a, b in bins_of(n, size)]
            x = jnp.concatenate(parts, axis)
    return _spatial_back(op, x)


def _sizes(x: Operand) -> tuple[int, ...]:
    """Spatial sizes of a channels-last operand; only the batch can be unknown."""
    return tuple(n for n in x.shape[1:-1] if n is not None)


@lower_op.register
def _(op: AvgPool, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    return Lowered(average(inputs[0], output, window_counts(op, _sizes(inputs[0])), target)._asdict())


@lower_op.register
def _(
    op: AdaptiveAvgPool, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target
) -> Lowered:
    sizes = _sizes(inputs[0])
    for reason in _unequal(op, sizes):
        raise LoweringError(reason)
    count = prod(n // m for n, m in zip(sizes, op.output_size, strict=True))
    return Lowered(average(inputs[0], output, [count], target)._asdict())


def _unequal(op: AdaptiveAvgPool, sizes: Sequence[int]) -> list[str]:
    """Windows of different sizes: the chip is described as averaging by plain windows only."""
    if any(n % m for n, m in zip(sizes, op.output_size, strict=True)):
        return [f"input size {sizes} does not divide into {op.output_size}; resize the input or pool by avg_pool"]
    return []


@eval_integer.register
def _(op: AvgPool, node_format: NodeFormat, target: Target, x: Array, **by: Array) -> Array:
    total = _reduce(op, _spatial_last(op, widen(x)), np.int32(0), jnp.add)
    return _spatial_back(op, rescale(total, Rescale(**by), node_format.output, target, average=True))


@eval_integer.register
def _(op: AdaptiveAvgPool, node_format: NodeFormat, target: Target, x: Array, **by: Array) -> Array:
    total = _spatial_last(op, widen(x))
    for axis, size in enumerate(op.output_size, start=1):
        shape = (*total.shape[:axis], size, total.shape[axis] // size, *total.shape[axis + 1 :])
        total = total.reshape(shape).sum(axis + 1)
    return _spatial_back(op, rescale(total, Rescale(**by), node_format.output, target, average=True))


@constraints.register
def _(op: AvgPool, inputs: Sequence[Operand], output: Operand, weight_dtype: str | None, target: Target) -> list[str]:
    return reduced_limit(prod(op.kernel), target)


@constraints.register
def _(
    op: AdaptiveAvgPool, inputs: Sequence[Operand], output: Operand, weight_dtype: str | None, target: Target
) -> list[str]:
    sizes = _sizes(inputs[0])
    reduced = prod(-(-n // m) for n, m in zip(sizes, op.output_size, strict=True))
    return [*_unequal(op, sizes), *reduced_limit(reduced, target)]


# ---------------------------------------------------------------------------------------------------------------------
# Layout


@to_channels_last.register(MaxPool)
@to_channels_last.register(AvgPool)
@to_channels_last.register(AdaptiveAvgPool)
@to_channels_last.register(AdaptiveMaxPool)
def _(op: Pool, rank: int) -> Op:
    return replace(op, channels_last=True)
