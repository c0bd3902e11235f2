"""Exact integer convolution and matrix product, channels last, and the float ones with the same kernel choice.

The choice is by static shape, once, in `kernel_of`. Measured on a CPU: int8 x int8 with int32 accumulation is fast as a
dense convolution with more than four input channels; a stem is faster as patches times a matrix; a depthwise one is
many times faster as a sum of shifted products than as a grouped convolution.
"""

from collections.abc import Sequence
from math import prod
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jquant.numerics import limbs
from jquant.numerics.limbs import Limbs
from jquant.types import Array

Padding = Sequence[tuple[int, int]]
Kernel = Literal["dense", "depthwise", "patches", "grouped"]


class Window(NamedTuple):
    """How a kernel moves: one entry a spatial axis."""

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]


def kernel_of(weight_shape: Sequence[int], groups: int) -> Kernel:
    """The implementation for a weight [*K, C / groups, O]."""
    *_, per_group, out = weight_shape
    if groups > 1:
        return "depthwise" if per_group == 1 and out == groups else "grouped"
    return "patches" if len(weight_shape) == 2 or per_group <= 4 else "dense"


def pad_spatial(x: Array, padding: Padding, value: int = 0) -> Array:
    """Pads the spatial axes of [N, *S, C]."""
    if not any(low or high for low, high in padding):
        return x
    return jnp.pad(x, [(0, 0), *padding, (0, 0)], constant_values=value)


def taps(x: Array, kernel: Sequence[int], window: Window) -> list[Array]:
    """The input under each kernel position, in row-major order: a list of [N, *S_out, C]. x is padded already."""
    size = [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(x.shape[1:-1], kernel, window.strides, window.dilation, strict=True)
    ]

    def tap(position: tuple[int, ...]) -> Array:
        start = [p * d for p, d in zip(position, window.dilation, strict=True)]
        stop = [b + (n - 1) * s + 1 for b, n, s in zip(start, size, window.strides, strict=True)]
        return jax.lax.slice(x, (0, *start, 0), (x.shape[0], *stop, x.shape[-1]), (1, *window.strides, 1))

    positions: list[tuple[int, ...]] = [()]
    for k in kernel:
        positions = [(*p, i) for p in positions for i in range(k)]
    return [tap(p) for p in positions]


def convolve(x: Array, weight: Array, window: Window, groups: int = 1) -> Array:
    """Convolution of [N, *S, C] with [*K, C / groups, O]: int8 operands accumulate in int32, float32 ones in float32.

    Exact for integers: a sum of 65,535 int8 products is below 2^31.
    """
    accumulate = jnp.int32 if jnp.issubdtype(x.dtype, jnp.integer) else jnp.float32
    kind = kernel_of(weight.shape, groups)
    kernel = weight.shape[:-2]
    if kind == "grouped":
        if accumulate == jnp.float32:
            return _lax_convolve(x, weight, window, groups, accumulate)
        inputs, weights = jnp.split(x, groups, axis=-1), jnp.split(weight, groups, axis=-1)
        return jnp.concatenate([convolve(a, b, window) for a, b in zip(inputs, weights, strict=True)], axis=-1)
    if kind == "dense" or (kind == "patches" and accumulate == jnp.float32 and kernel):
        return _lax_convolve(x, weight, window, 1, accumulate)
    shifted = taps(pad_spatial(x, window.padding), kernel, window)
    if kind == "depthwise":
        factors = weight.reshape(prod(kernel), -1).astype(accumulate)
        total = shifted[0].astype(accumulate) * factors[0]
        for tap, factor in zip(shifted[1:], factors[1:], strict=True):
            total = total + tap.astype(accumulate) * factor
        return total
    return matmul(jnp.concatenate(shifted, axis=-1), weight.reshape(-1, weight.shape[-1]))


def _lax_convolve(x: Array, weight: Array, window: Window, groups: int, accumulate: jnp.dtype) -> Array:
    letters = "HWD"[: len(window.strides)]
    return jax.lax.conv_general_dilated(
        x,
        weight,
        window_strides=window.strides,
        padding=window.padding,
        rhs_dilation=window.dilation,
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        feature_group_count=groups,
        preferred_element_type=accumulate,
    )


def matmul(x: Array, weight: Array) -> Array:
    """[..., I] times [I, O], accumulated in int32 for integers and float32 for floats."""
    accumulate = jnp.int32 if jnp.issubdtype(x.dtype, jnp.integer) else jnp.float32
    return jax.lax.dot_general(x, weight, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=accumulate)


def accumulate_exactly(x: Array, weight: Array, window: Window, groups: int) -> Array | Limbs:
    """The exact sum of products: int32 for int8 x int8, limbs where one operand is int16.

    An int16 operand is two bytes, 256 * high + (low - 128) + 128 with low in [0, 255]: two int8 convolutions, and a
    third term that is a sum over the other operand.
    """
    if x.dtype == jnp.int8 and weight.dtype == jnp.int8:
        return convolve(x, weight, window, groups)
    x = pad_spatial(x, window.padding)  # before splitting: the bytes of a zero are not zero
    window = window._replace(padding=tuple((0, 0) for _ in window.padding))
    if x.dtype == jnp.int16:
        high, low = _bytes(x)
        offset = 128 * jnp.sum(weight.astype(jnp.int32), axis=tuple(range(weight.ndim - 1)))
        highs, lows = convolve(high, weight, window, groups), convolve(low, weight, window, groups)
    else:
        high, low = _bytes(weight)
        ones = jnp.ones((*weight.shape[:-1], groups), jnp.int8)
        offset = 128 * jnp.repeat(convolve(x, ones, window, groups), weight.shape[-1] // groups, axis=-1)
        highs, lows = convolve(x, high, window, groups), convolve(x, low, window, groups)
    return limbs.add(limbs.multiply(limbs.from_int32(highs), jnp.int32(256)), limbs.from_int32(lows + offset))


def _bytes(v: Array) -> tuple[Array, Array]:
    """An int16 v as int8 (high, low) with v = 256 * high + low + 128."""
    wide = v.astype(jnp.int32)
    return (wide >> 8).astype(jnp.int8), ((wide & 0xFF) - 128).astype(jnp.int8)
