"""Exact integer convolution and matrix product, channels last, and the float ones with the same kernel choice.

The choice is made here and nowhere else: `kernel_of` by static shape, which is what a program records, and `runnable`
by platform. Measured on a CPU, where XLA hands int8 x int8 to its fast library in some forms only:

dense      two spatial axes, channels in fours, more than 16 in or out, padding up to "same": others are made so; a
           matrix product where windows do not overlap, as in a pointwise convolution: XLA's own takes longer
           forward, and many times as long for the gradient
grouped    the same with groups, where small ones are merged first, by a weight that is block diagonal
depthwise  a sum of shifted products, many times faster than a grouped convolution of one channel a group
matmul     no window at all
patches    im2col and a matrix product: any window, slower

XLA lowers no integer convolution on a GPU: off the CPU, dense and grouped run as patches. Nor is its integer matrix
product on a GPU to be trusted: on an H100 it was silently wrong for small shapes, and did not compile for others. There
the bytes are multiplied as float32, in slices whose sums are exact (`_product`): operands, products and sums are
integers below 2^24, and a matrix unit that keeps few bits of an operand keeps a byte. As bfloat16 the products
themselves were seen rounded (jax 0.11.2 on an H200, two groups of two channels). The bits are the same everywhere. A
grouped float convolution runs as patches on the CPU, where the gradient of XLA's own is 20 to 200 times slower.
"""

from collections.abc import Sequence
from math import prod
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jquant.numerics import limbs
from jquant.numerics.fusion import apart
from jquant.numerics.limbs import Limbs
from jquant.numerics.platform import platform
from jquant.types import Array, GraphError

Padding = Sequence[tuple[int, int]]
Kernel = Literal["dense", "depthwise", "grouped", "matmul", "patches"]

Axes = tuple[int, ...]

_EXACT_PRODUCTS = 512  # of two int8: each at most 2^14, together at most 2^23
_LANES = 4  # the fast library takes input channels in fours
_CHANNELS = 17  # and no convolution of integers with fewer both in and out; fewer out of more in stay a convolution
_MERGED = (16, 64)  # input channels of merged groups: fewer are slow, more are mostly zeros


class Window(NamedTuple):
    """How a kernel moves: one entry a spatial axis."""

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]


NO_WINDOW = Window((), (), ())


def kernel_of(weight_shape: Sequence[int], groups: int) -> Kernel:
    """The implementation for a weight [*K, C / groups, O], on a platform that has it."""
    if groups == 1:
        return "matmul" if len(weight_shape) == 2 else "dense"
    return "depthwise" if weight_shape[-2] == 1 else "grouped"


def runnable(kernel: str, weight_shape: Sequence[int], groups: int, *, integer: bool, platform: str) -> str:
    """What runs for a recorded kernel ("": choose): itself, or patches where the platform lacks it or is slow."""
    chosen = kernel_of(weight_shape, groups)
    kernel = kernel or chosen
    others = () if len(weight_shape) == 2 else ("patches", "dense" if groups == 1 else "grouped")
    if kernel not in (chosen, *others):
        raise GraphError(
            f"kernel {kernel!r} cannot run a weight {tuple(weight_shape)} in {groups} groups; use {chosen!r}"
        )
    missing = ("dense", "grouped") if platform != "cpu" else ()
    slow = ("grouped",) if platform == "cpu" else ()
    return "patches" if kernel in (missing if integer else slow) else kernel


def is_integer(x: Array) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.integer))


def accumulator_of(x: Array) -> jnp.dtype:
    return jnp.dtype(jnp.int32 if is_integer(x) else jnp.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Windows


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

    return [tap(position) for position in np.ndindex(*kernel)]


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


def convolve(x: Array, weight: Array, window: Window, groups: int = 1, kernel: str = "") -> Array:
    """Convolution of [N, *S, C] with [*K, C / groups, O]: int8 operands accumulate in int32, float32 ones in float32.

    Exact for integers: a sum of 65,535 int8 products is below 2^31.
    """
    match runnable(kernel, weight.shape, groups, integer=is_integer(x), platform=platform()):
        case "matmul":
            return matmul(x, weight)
        case "depthwise":
            return _shift_and_add(x, weight, window, groups)
        case "patches":
            return _patches(x, weight, window, groups)
    if platform() != "cpu":
        return _native(x, weight, window, groups)
    if groups == 1 and _is_disjoint(weight.shape[:-2], window):
        return _disjoint(x, weight, window)
    return _planar(x, weight, window, groups)


def matmul(x: Array, weight: Array) -> Array:
    """[..., I] times [I, O], accumulated in int32 for integers and float32 for floats.

    As a matrix, since XLA copies a gradient that is summed over several axes into another order, slowly.
    """
    rows = x.reshape(-1, x.shape[-1]) if x.ndim > 2 else x
    if x.ndim < 2 or not _is_slow_row(rows):
        return _product(rows, weight, (rows.ndim - 1, 0)).reshape(*x.shape[:-1], weight.shape[1])
    return _product(_two_rows(rows), weight, (1, 0))[:1].reshape(*x.shape[:-1], weight.shape[1])


def _is_slow_row(a: Array) -> bool:
    """Whether a is one row of integers on a CPU: XLA would copy the other operand to int32, four times its bytes.

    With a second row it takes its fast library instead.
    """
    return is_integer(a) and a.shape[-2] == 1 and platform() == "cpu"


def _two_rows(a: Array) -> Array:
    return jnp.pad(a, [*((0, 0),) * (a.ndim - 2), (0, 1), (0, 0)])


def _product(a: Array, b: Array, contracted: tuple[int, int], batched: tuple[Axes, Axes] = ((), ())) -> Array:
    """`lax.dot_general` over one axis of each, accumulated in int32 for integers and float32 for floats."""
    axes = ((contracted[:1], contracted[1:]), batched)
    if not (is_integer(a) and platform() == "gpu"):
        return jax.lax.dot_general(a, b, axes, preferred_element_type=accumulator_of(a))
    total = jnp.int32(0)
    for start in range(0, a.shape[contracted[0]], _EXACT_PRODUCTS):
        x, y = (
            jax.lax.slice_in_dim(v, start, min(start + _EXACT_PRODUCTS, v.shape[axis]), axis=axis).astype(jnp.float32)
            for v, axis in zip((a, b), contracted, strict=True)
        )
        total += jax.lax.dot_general(x, y, axes, precision=jax.lax.Precision.DEFAULT).astype(jnp.int32)
    return total


def _shift_and_add(x: Array, weight: Array, window: Window, groups: int) -> Array:
    kernel, accumulate = weight.shape[:-2], accumulator_of(x)
    x = pad_spatial(x, window.padding)
    if weight.shape[-1] != groups:  # several outputs a channel
        x = jnp.repeat(x, weight.shape[-1] // groups, axis=-1)
    factors = weight.reshape(prod(kernel), -1).astype(accumulate)
    shifted = taps(x, kernel, window)
    total = shifted[0].astype(accumulate) * factors[0]
    for tap, factor in zip(shifted[1:], factors[1:], strict=True):
        total = total + tap.astype(accumulate) * factor
    return total


def _patches(x: Array, weight: Array, window: Window, groups: int) -> Array:
    *kernel, per_group, out = weight.shape
    shifted = taps(pad_spatial(x, window.padding), kernel, window)
    columns = jnp.stack([tap.reshape(*tap.shape[:-1], groups, per_group) for tap in shifted], axis=-2)
    columns = columns.reshape(*columns.shape[:-2], -1)  # [N, *S, groups, K * C / groups]
    if groups == 1:
        return matmul(columns[..., 0, :], weight.reshape(-1, out))
    blocks = weight.reshape(-1, groups, out // groups)
    y = _product(columns, blocks, (columns.ndim - 1, 0), ((columns.ndim - 2,), (1,)))
    y = jnp.moveaxis(y, 0, -2)  # from [groups, N, *S, O / groups]
    return y.reshape(*y.shape[:-2], out)


def _is_disjoint(kernel: Sequence[int], window: Window) -> bool:
    """Whether each input is in one window at most, for those windows that are simple to cut out."""
    return set(kernel) == {1} or (tuple(kernel) == tuple(window.strides) and set(window.dilation) == {1})


def _disjoint(x: Array, weight: Array, window: Window) -> Array:
    """Windows as the rows of a matrix: inputs are moved, and not repeated."""
    *kernel, channels, out = weight.shape
    x = pad_spatial(x, window.padding)
    if set(kernel) == {1}:
        (rows,) = taps(x, kernel, window)
        return matmul(rows, weight.reshape(channels, out))
    size = [n // k for n, k in zip(x.shape[1:-1], kernel, strict=True)]
    whole = (n * k for n, k in zip(size, kernel, strict=True))
    x = jax.lax.slice(x, (0,) * x.ndim, (x.shape[0], *whole, channels))
    x = x.reshape(x.shape[0], *(v for pair in zip(size, kernel, strict=True) for v in pair), channels)
    axes = range(1, x.ndim - 1)
    rows = x.transpose(0, *axes[::2], *axes[1::2], x.ndim - 1).reshape(x.shape[0], *size, -1)
    return matmul(rows, weight.reshape(-1, out))


def _planar(x: Array, weight: Array, window: Window, groups: int) -> Array:
    """The convolution in two spatial axes, with channels as the fast library wants them."""
    axes = len(window.strides)
    if axes == 1:
        window = Window((1, *window.strides), ((0, 0), *window.padding), (1, *window.dilation))
        return _planar(x[:, None], weight[None], window, groups)[:, 0]
    if axes == 3:
        return _fold_depth(x, weight, window, groups)
    weight, groups = _merge_groups(weight, groups)
    *_, channels, out = weight.shape
    if is_integer(x) and groups == 1 and (out >= _CHANNELS or channels < _CHANNELS):
        return _columns(x, weight, window)
    if is_integer(x):
        if any(sum(p) > d * (k - 1) for p, d, k in zip(*window[1:], weight.shape, strict=False)):
            x = pad_spatial(x, window.padding)  # beyond "same" the fast library takes none
            window = window._replace(padding=((0, 0), (0, 0)))
        # XLA would move a padding that made x into the convolution, whoever asked for it, and where that is beyond
        # "same" its own integer convolution is silently wrong: most outputs, as soon as 17 channels go in or out.
        x = apart(x)
    return _native(*_pad_channels(x, weight, groups), window, groups)


def _columns(x: Array, weight: Array, window: Window) -> Array:
    """Windows of two axes as the rows of a matrix. The fast library takes longer for the same convolution.

    Inputs are repeated along the second axis, and the result along the first: XLA compiles that faster than all at
    once, and in this order the weight stays as it is.
    """
    (high, wide), out = weight.shape[:-2], weight.shape[-1]
    along, across = zip(window.strides, window.dilation, strict=True)
    x = pad_spatial(x, window.padding)
    x = jnp.concatenate(taps(x, (1, wide), Window((1, across[0]), ((0, 0),) * 2, (1, across[1]))), axis=-1)
    x = apart(x) if min(high, wide) > 1 else x
    x = jnp.concatenate(taps(x, (high, 1), Window((along[0], 1), ((0, 0),) * 2, (along[1], 1))), axis=-1)
    columns = weight.reshape(-1, out)
    if out == 1:  # one column is no product of matrices for XLA
        columns = jnp.pad(columns, ((0, 0), (0, 1)))
    return matmul(x, columns)[..., :out]


def repeated_bytes(x: Array, weight: Array) -> int:
    """At most so many bytes of repeated inputs does a CPU write to memory for each sum of an integer convolution."""
    *kernel, per_group, out = weight.shape
    return -(-prod(kernel) * per_group * x.dtype.itemsize // out) if prod(kernel) > 1 else 0


def _fold_depth(x: Array, weight: Array, window: Window, groups: int) -> Array:
    """Three axes as two: the depth of the kernel goes into the channels, that of the output into the batch."""
    x = pad_spatial(x, (window.padding[0], (0, 0), (0, 0)))
    n, _, height, width, channels = x.shape
    depth = weight.shape[0]
    along = Window((window.strides[0], 1, 1), ((0, 0),) * 3, (window.dilation[0], 1, 1))
    slabs = [slab.reshape(*slab.shape[:-1], groups, channels // groups) for slab in taps(x, (depth, 1, 1), along)]
    planes = jnp.stack(slabs, axis=-2).reshape(-1, height, width, depth * channels)
    kernel = jnp.moveaxis(weight, 0, 2).reshape(*weight.shape[1:3], -1, weight.shape[-1])
    window = Window(window.strides[1:], window.padding[1:], window.dilation[1:])
    y = _planar(planes, kernel, window, groups)
    return y.reshape(n, -1, *y.shape[1:])


def _merge_groups(weight: Array, groups: int) -> tuple[Array, int]:
    """Joins small groups: a block-diagonal weight in fewer groups, in which a channel meets zeros of other groups."""
    *_, per_group, out = weight.shape
    low, high = _MERGED
    fits = [s for s in range(1, groups + 1) if groups % s == 0 and low <= s * per_group <= high]
    merged = groups if groups * per_group <= low else min(fits, default=1)
    if merged == 1:
        return weight, groups
    group_of_input = np.arange(merged * per_group) // per_group
    group_of_output = np.arange(out) // (out // groups) % merged
    tiled = jnp.concatenate([weight] * merged, axis=-2)
    mask = group_of_input[:, None] == group_of_output
    return jnp.where(mask, tiled, jnp.zeros_like(tiled)), groups // merged


def _pad_channels(x: Array, weight: Array, groups: int) -> tuple[Array, Array]:
    per_group = weight.shape[-2]
    extra = -per_group % _LANES
    if per_group == 1 or extra == 0:
        return x, weight
    split = x.reshape(*x.shape[:-1], groups, per_group)
    x = jnp.pad(split, [*((0, 0),) * (split.ndim - 1), (0, extra)]).reshape(*x.shape[:-1], -1)
    return x, jnp.pad(weight, [*((0, 0),) * (weight.ndim - 2), (0, extra), (0, 0)])


def _native(x: Array, weight: Array, window: Window, groups: int) -> Array:
    letters = "HWD"[: len(window.strides)]
    return jax.lax.conv_general_dilated(
        x,
        weight,
        window_strides=window.strides,
        padding=window.padding,
        rhs_dilation=window.dilation,
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        feature_group_count=groups,
        preferred_element_type=accumulator_of(x),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Sums beyond int32


def accumulate_exactly(
    x: Array, weight: Array, window: Window, groups: int, *, kernel: str = "", accumulator: str = "limbs"
) -> Array | Limbs:
    """The exact sum of at most 65,535 products: int32 for int8 x int8, limbs where one operand is int16.

    An int16 operand is two bytes, 256 * high + (low - 128) + 128 with low in [0, 255]: two int8 convolutions, and a
    third term that is a sum over the other operand. `accumulator` "int32" or "pair": the caller knows that the sum
    fits, and the parts are joined modulo 2^32.
    """
    if x.dtype == jnp.int8 and weight.dtype == jnp.int8:
        return convolve(x, weight, window, groups, kernel)
    x = pad_spatial(x, window.padding)  # before splitting: the bytes of a zero are not zero
    window = window._replace(padding=tuple((0, 0) for _ in window.padding))
    if x.dtype == jnp.int16:
        high, low = split_bytes(x)
        offset = 128 * jnp.sum(weight.astype(jnp.int32), axis=tuple(range(weight.ndim - 1)))
        highs, lows = convolve(high, weight, window, groups, kernel), convolve(low, weight, window, groups, kernel)
    else:
        high, low = split_bytes(weight)
        ones = jnp.ones((*weight.shape[:-1], groups), jnp.int8)
        offset = 128 * jnp.repeat(convolve(x, ones, window, groups, kernel), weight.shape[-1] // groups, axis=-1)
        highs, lows = convolve(x, high, window, groups, kernel), convolve(x, low, window, groups, kernel)
    return join_bytes(highs, lows + offset, accumulator)


def multiply_exactly(a: Array, b: Array, *, accumulator: str = "limbs") -> Array | Limbs:
    """The exact matrix product [..., M, K] times [..., K, N] of `jnp.matmul`, K at most 65,535, one operand int8."""
    if a.dtype == jnp.int8 and b.dtype == jnp.int8:
        return batch_matmul(a, b)
    if a.dtype == jnp.int16:
        high, low = split_bytes(a)
        offset = 128 * jnp.sum(b.astype(jnp.int32), axis=-2, keepdims=True)  # [..., 1, N]
        return join_bytes(batch_matmul(high, b), batch_matmul(low, b) + offset, accumulator)
    high, low = split_bytes(b)
    offset = 128 * jnp.sum(a.astype(jnp.int32), axis=-1, keepdims=True)  # [..., M, 1]
    return join_bytes(batch_matmul(a, high), batch_matmul(a, low) + offset, accumulator)


def batch_matmul(a: Array, b: Array) -> Array:
    """`jnp.matmul` that accumulates in int32 for integers and float32 for floats."""
    # XLA folds a transposition of b into the product, and its fast library takes none: five times slower.
    b = apart(b) if is_integer(b) else b
    if a.ndim > 1 and _is_slow_row(a):
        return jnp.matmul(_two_rows(a), b, preferred_element_type=accumulator_of(a))[..., :1, :]
    if not (is_integer(a) and platform() == "gpu"):
        return jnp.matmul(a, b, preferred_element_type=accumulator_of(a))
    stack = jnp.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = (jnp.broadcast_to(v, (*stack, *v.shape[-2:])) for v in (a, b))
    leading = tuple(range(len(stack)))
    return _product(a, b, (a.ndim - 1, b.ndim - 2), (leading, leading))


def split_bytes(v: Array) -> tuple[Array, Array]:
    """An int16 v as int8 (high, low) with v = 256 * high + low + 128."""
    wide = v.astype(jnp.int32)
    return (wide >> 8).astype(jnp.int8), ((wide & 0xFF) - 128).astype(jnp.int8)


def join_bytes(highs: Array, lows: Array, accumulator: str) -> Array | Limbs:
    """256 * highs + lows. Neither leaves int32: |highs| <= 65535 * 2^14, |lows| <= 65535 * 255 * 128 < 2^31."""
    if accumulator != "limbs":
        return (highs << 8) + lows
    return limbs.add(limbs.multiply(limbs.from_int32(highs), jnp.int32(256)), limbs.from_int32(lows))
