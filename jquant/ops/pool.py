"""Pooling and means."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jquant.numerics.rescale import Rescale, ratio, rescale, rescale_of
from jquant.numerics.rounding import widen
from jquant.ops.base import Lowered, Operand, constraints, eval_float, eval_integer, lower_op, to_channels_last
from jquant.ops.movement import channels_last_axis
from jquant.types import Array, LoweringError, NodeFormat, Op, Target, bit_width, integer_range


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


@dataclass(frozen=True, kw_only=True)
class AvgPool(Op):
    """Mean over windows; `count_include_pad`: zeros of the padding count as elements."""

    layout: ClassVar = "spatial"

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    ceil_mode: bool = False
    count_include_pad: bool = True
    channels_last: bool = False


@dataclass(frozen=True, kw_only=True)
class AdaptiveAvgPool(Op):
    """Mean over windows that tile the input into `output_size`: window i is [floor(i*n/m), ceil((i+1)*n/m))."""

    layout: ClassVar = "spatial"

    output_size: tuple[int, ...]
    channels_last: bool = False


@dataclass(frozen=True, kw_only=True)
class Mean(Op):
    """Mean over `axes`."""

    layout: ClassVar = "axes"

    axes: tuple[int, ...]
    keepdims: bool = False


# ---------------------------------------------------------------------------------------------------------------------
# Windows, channels last


def _full_padding(op: MaxPool | AvgPool, sizes: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """The padding with what ceil_mode adds at the end; a window must start inside the input or its left padding."""
    if not op.ceil_mode:
        return op.padding
    padding = []
    dilation = getattr(op, "dilation", (1,) * len(op.kernel))
    for n, k, s, d, (low, high) in zip(sizes, op.kernel, op.strides, dilation, op.padding, strict=True):
        free = n + low + high - d * (k - 1) - 1
        windows = -(-free // s) + 1
        windows -= (windows - 1) * s >= n + low
        padding.append((low, max(high, high + (windows - 1) * s - free)))
    return tuple(padding)


def _reduce(op: MaxPool | AvgPool, x: Array, start: Any, combine: Any) -> Array:
    """A window reduction over the spatial axes of [N, *S, C]."""
    padding = _full_padding(op, x.shape[1:-1])
    dilation = (1, *op.dilation, 1) if isinstance(op, MaxPool) else None
    ends = ((0, 0), *padding, (0, 0))
    return jax.lax.reduce_window(
        x, start, combine, (1, *op.kernel, 1), (1, *op.strides, 1), ends, window_dilation=dilation
    )


def _counts(op: AvgPool, sizes: Sequence[int]) -> np.ndarray:
    """How many elements each window divides by, [*S_out, 1], or [1] where it is the same everywhere."""
    per_axis = []
    for n, k, s, (low, high), (_, full) in zip(
        sizes, op.kernel, op.strides, op.padding, _full_padding(op, sizes), strict=True
    ):
        first = np.arange((n + low + full - k) // s + 1) * s - low
        if op.count_include_pad:  # what ceil_mode adds is no padding
            per_axis.append(np.minimum(first + k, n + high) - first)
        else:
            per_axis.append(np.minimum(first + k, n) - np.maximum(first, 0))
    counts = np.ones((), np.int64)
    for axis in per_axis:
        counts = counts[..., None] * axis
    return np.array([counts.flat[0]]) if (counts == counts.flat[0]).all() else counts[..., None]


def _spatial_last(op: MaxPool | AvgPool | AdaptiveAvgPool, x: Array) -> Array:
    return x if op.channels_last else jnp.moveaxis(x, 1, -1)


def _spatial_back(op: MaxPool | AvgPool | AdaptiveAvgPool, y: Array) -> Array:
    return y if op.channels_last else jnp.moveaxis(y, -1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Maximum


@eval_float.register
def _(op: MaxPool, x: Array) -> Array:
    return _spatial_back(op, _reduce(op, _spatial_last(op, x), -jnp.inf, jax.lax.max))


@lower_op.register
def _(op: MaxPool, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    return Lowered({})


@eval_integer.register
def _(op: MaxPool, node_format: NodeFormat, target: Target, x: Array) -> Array:
    lowest = np.asarray(integer_range(node_format.output)[0], x.dtype)
    return _spatial_back(op, _reduce(op, _spatial_last(op, x), lowest, jax.lax.max))


# ---------------------------------------------------------------------------------------------------------------------
# Averages: exact integer sum, rescale from s_x / N (specification, section 5)


@eval_float.register
def _(op: AvgPool, x: Array) -> Array:
    x = _spatial_last(op, x)
    counts = jnp.asarray(_counts(op, x.shape[1:-1]), jnp.float32)
    return _spatial_back(op, _reduce(op, x, 0.0, jax.lax.add) / counts)


def _bins(n: int, m: int) -> list[tuple[int, int]]:
    return [(i * n // m, -(-(i + 1) * n // m)) for i in range(m)]


@eval_float.register
def _(op: AdaptiveAvgPool, x: Array) -> Array:
    x = _spatial_last(op, x)
    for axis, size in enumerate(op.output_size, start=1):
        n = x.shape[axis]
        if n % size == 0:
            shape = (*x.shape[:axis], size, n // size, *x.shape[axis + 1 :])
            x = x.reshape(shape).mean(axis + 1)
        else:
            parts = [jax.lax.slice_in_dim(x, a, b, axis=axis).mean(axis, keepdims=True) for a, b in _bins(n, size)]
            x = jnp.concatenate(parts, axis)
    return _spatial_back(op, x)


@eval_float.register
def _(op: Mean, x: Array) -> Array:
    return x.mean(op.axes, keepdims=op.keepdims)


def _sizes(x: Operand) -> tuple[int, ...]:
    """Spatial sizes of a channels-last operand; only the batch can be unknown."""
    return tuple(n for n in x.shape[1:-1] if n is not None)


def _average(x: Operand, output: Operand, counts: Any) -> Lowered:
    by = rescale_of(ratio(x.scale, 1.0, output.scale, jnp.asarray(counts, jnp.float32)), bits=bit_width(output.dtype))
    return Lowered(by._asdict())


@lower_op.register
def _(op: AvgPool, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    return _average(inputs[0], output, _counts(op, _sizes(inputs[0])))


@lower_op.register
def _(
    op: AdaptiveAvgPool, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target
) -> Lowered:
    sizes = _sizes(inputs[0])
    if any(n % m for n, m in zip(sizes, op.output_size, strict=True)):
        raise LoweringError(
            f"input size {sizes} does not divide into {op.output_size}; resize the input or pool by avg_pool"
        )
    return _average(inputs[0], output, [prod(n // m for n, m in zip(sizes, op.output_size, strict=True))])


@lower_op.register
def _(op: Mean, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    (x,) = inputs
    if any(axis % len(x.shape) == 0 for axis in op.axes):
        raise LoweringError("a mean over the batch has no fixed number of elements; average after the network")
    return _average(x, output, prod(x.shape[axis] for axis in op.axes))


@eval_integer.register
def _(op: AvgPool, node_format: NodeFormat, target: Target, x: Array, **by: Array) -> Array:
    total = _reduce(op, _spatial_last(op, widen(x)), np.int32(0), jax.lax.add)
    return _spatial_back(op, rescale(total, Rescale(**by), node_format.output, target, average=True))


@eval_integer.register
def _(op: AdaptiveAvgPool, node_format: NodeFormat, target: Target, x: Array, **by: Array) -> Array:
    total = _spatial_last(op, widen(x))
    for axis, size in enumerate(op.output_size, start=1):
        shape = (*total.shape[:axis], size, total.shape[axis] // size, *total.shape[axis + 1 :])
        total = total.reshape(shape).sum(axis + 1)
    return _spatial_back(op, rescale(total, Rescale(**by), node_format.output, target, average=True))


@eval_integer.register
def _(op: Mean, node_format: NodeFormat, target: Target, x: Array, **by: Array) -> Array:
    return rescale(widen(x).sum(op.axes, keepdims=op.keepdims), Rescale(**by), node_format.output, target)


def _reduced_limit(count: int, target: Target) -> list[str]:
    return [f"{count} elements are reduced, more than {target.max_reduced}"] if count > target.max_reduced else []


@constraints.register
def _(op: AvgPool, inputs: Sequence[Operand], output: Operand, weight_dtype: str | None, target: Target) -> list[str]:
    return _reduced_limit(prod(op.kernel), target)


@constraints.register
def _(
    op: AdaptiveAvgPool, inputs: Sequence[Operand], output: Operand, weight_dtype: str | None, target: Target
) -> list[str]:
    return _reduced_limit(prod(-(-n // m) for n, m in zip(_sizes(inputs[0]), op.output_size, strict=True)), target)


@constraints.register
def _(op: Mean, inputs: Sequence[Operand], output: Operand, weight_dtype: str | None, target: Target) -> list[str]:
    return _reduced_limit(prod(inputs[0].shape[axis] or 1 for axis in op.axes), target)


# ---------------------------------------------------------------------------------------------------------------------
# Layout


@to_channels_last.register(MaxPool)
@to_channels_last.register(AvgPool)
@to_channels_last.register(AdaptiveAvgPool)
def _(op: MaxPool | AvgPool | AdaptiveAvgPool, rank: int) -> Op:
    return replace(op, channels_last=True)


@to_channels_last.register
def _(op: Mean, rank: int) -> Op | None:
    """Without keepdims the result is in the framework's order only if exactly the spatial axes go."""
    if not op.keepdims and {a % rank for a in op.axes} != set(range(2, rank)):
        return None
    return replace(op, axes=tuple(sorted(channels_last_axis(a, rank) for a in op.axes)))
