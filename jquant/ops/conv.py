"""Convolutions and linear layers, with the fused bias, add and activation of the chip's convolution unit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from math import prod
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jquant.graph.checks import check_lengths
from jquant.graph.operator import (
    Lowered,
    Operand,
    constraints,
    derived_scale,
    eval_float,
    eval_integer,
    lower_op,
    to_channels_last,
)
from jquant.numerics import limbs, pairs
from jquant.numerics.convolution import (
    NO_WINDOW,
    Window,
    accumulate_exactly,
    convolve,
    kernel_of,
    matmul,
    pad_spatial,
    repeated_bytes,
)
from jquant.numerics.fused_convolution import Layer, fits, fused_convolution, is_chosen, layer_of
from jquant.numerics.limbs import Limbs
from jquant.numerics.namespace import array_namespace, real
from jquant.numerics.pairs import Pair
from jquant.numerics.parts import are_parts_of_use, in_parts, parts_of_examples, parts_of_rows
from jquant.numerics.rescale import Rescale, multiplier_of, quantize_exactly, ratio, rescale, rescale_of
from jquant.numerics.rounding import quantize, shift_right
from jquant.numerics.transposed import transpose_convolve
from jquant.ops.batch_norm import KeptBatchNorm, batch_norm_affine
from jquant.types import (
    Array,
    GraphError,
    LoweringError,
    NodeFormat,
    Op,
    Target,
    bit_width,
    integer_range,
    storage_dtype,
)

Activation = Literal["none", "relu", "relu6"]


@dataclass(frozen=True, kw_only=True)
class Conv(Op):
    """N-dimensional convolution, cross-correlation as in torch.

    Operands: x [N, C, *S] (or [N, *S, C]), and with `addend` a second one of the output's shape.
    Parameters: weight [O, C / groups, *K], bias [O] (optional).
    """

    layout: ClassVar = "spatial"
    ports: ClassVar = ("x", "addend")
    weight_roles: ClassVar = ("weight",)
    keeps_accumulator: ClassVar = True

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int = 1
    activation: Activation = "none"
    addend: bool = False
    channels_last: bool = False
    batch_norm: KeptBatchNorm | None = None

    def __post_init__(self) -> None:
        check_lengths(self, "strides", "padding", "dilation", positive=("strides", "dilation"))
        _check_groups(self)


@dataclass(frozen=True, kw_only=True)
class ConvTranspose(Op):
    """N-dimensional transposed convolution, as in torch: the adjoint of `Conv`, `output_padding` at the high end.

    Operands: x [N, C, *S] (or [N, *S, C]), and with `addend` a second one of the output's shape.
    Parameters: weight [C, O / groups, *K], bias [O] (optional). A weight scale per channel is [O / groups], shared by
    the groups, since the weight has no axis for all of O.
    """

    layout: ClassVar = "spatial"
    ports: ClassVar = ("x", "addend")
    weight_roles: ClassVar = ("weight",)
    weight_axis: ClassVar = 1
    keeps_accumulator: ClassVar = True

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    activation: Activation = "none"
    addend: bool = False
    channels_last: bool = False
    batch_norm: KeptBatchNorm | None = None

    def __post_init__(self) -> None:
        check_lengths(self, "strides", "padding", "output_padding", "dilation", positive=("strides", "dilation"))
        if min(self.output_padding, default=0) < 0:
            raise GraphError(f"ConvTranspose: output_padding {self.output_padding} must not be negative")
        _check_groups(self)


@dataclass(frozen=True, kw_only=True)
class Linear(Op):
    """y = x @ weight.T + bias over the last axis. Parameters: weight [O, I], bias [O] (optional)."""

    ports: ClassVar = ("x", "addend")
    weight_roles: ClassVar = ("weight",)
    keeps_accumulator: ClassVar = True

    activation: Activation = "none"
    addend: bool = False
    batch_norm: KeptBatchNorm | None = None


def _check_groups(op: Conv | ConvTranspose) -> None:
    if op.groups < 1:
        raise GraphError(f"{type(op).__name__}: groups {op.groups} must be positive")


# ---------------------------------------------------------------------------------------------------------------------
# Float


def activate(y: Array, activation: Activation) -> Array:
    if activation == "none":
        return y
    y = jnp.maximum(y, 0.0)
    return jnp.minimum(y, 6.0) if activation == "relu6" else y


@eval_float.register(Conv)
@eval_float.register(ConvTranspose)
def _(op: Conv | ConvTranspose, x: Array, addend: Array | None = None, *, weight: Array, **rest: Array) -> Array:
    if not op.channels_last:
        x = jnp.moveaxis(x, 1, -1)
        addend = None if addend is None else jnp.moveaxis(addend, 1, -1)
    y = _finish_float(op, _slide(op, x, kernel_layout(op, weight), convolve), addend, **rest)
    return y if op.channels_last else jnp.moveaxis(y, -1, 1)


def _slide(op: Conv | ConvTranspose, x: Array, kernel: Array, product: Any) -> Any:
    """x [N, *S, C] with [*K, C / groups, O], by the plain convolution `product`."""
    window = Window(op.strides, op.padding, op.dilation)
    if isinstance(op, Conv):
        return product(x, kernel, window, op.groups)
    return transpose_convolve(x, kernel, window, op.output_padding, op.groups, product)


def kernel_layout(op: Conv | ConvTranspose, weight: Array) -> Array:
    """torch's weight as [*K, C / groups, O], the output channels of a group side by side."""
    if isinstance(op, Conv):
        return array_namespace(weight).moveaxis(weight, (0, 1), (-1, -2))
    split = weight.reshape(op.groups, -1, *weight.shape[1:])  # [groups, C / groups, O / groups, *K]
    kernel = array_namespace(weight).moveaxis(split, (1, 0, 2), (-3, -2, -1))
    return kernel.reshape(*kernel.shape[:-2], -1)


@eval_float.register
def _(op: Linear, x: Array, addend: Array | None = None, *, weight: Array, **rest: Array) -> Array:
    return _finish_float(op, matmul(x, weight.T), addend, **rest)


def _finish_float(
    op: Conv | ConvTranspose | Linear, y: Array, addend: Array | None, *, bias: Array | None = None, **norm: Array
) -> Array:
    """y [..., O] through what is fused behind the sum of products, in the order of the chip."""
    y = y if bias is None else y + bias
    if op.batch_norm is not None:
        statistics = norm["norm_mean"], norm["norm_var"], norm.get("norm_weight"), norm.get("norm_bias")
        multiplier, offset = batch_norm_affine(op.batch_norm, *statistics)
        y = y * multiplier + offset
    y = y if addend is None else y + addend
    return activate(y, op.activation)


# ---------------------------------------------------------------------------------------------------------------------
# Integer: acc = sum x * w + bias + rsh(e * sumin_scale, sumin_rshift), rescaled, then clamped (section 4)


@eval_integer.register(Conv)
@eval_integer.register(ConvTranspose)
def _(
    op: Conv | ConvTranspose,
    node_format: NodeFormat,
    target: Target,
    x: Array,
    addend: Array | None = None,
    *,
    weight: Array,
    **post: Array,
) -> Array:
    if (layer := _fused_layer(op, node_format, target, x, weight, addend, post)) is not None:
        return fused_convolution(layer, x, weight, addend, post)
    product = partial(accumulate_exactly, kernel=node_format.kernel, accumulator=node_format.accumulator)

    def compute(op: Conv | ConvTranspose, x: Array, addend: Array | None) -> Array:
        return _post_process(op.activation, node_format, target, _slide(op, x, weight, product), addend, **post)

    if isinstance(op, ConvTranspose) or node_format.kernel == "depthwise" or not are_parts_of_use():
        return compute(op, x, addend)
    shape = jax.eval_shape(partial(compute, op), x, addend).shape
    width = _accumulated_bytes(x, weight) + (repeated_bytes(x, weight) if op.groups == 1 else 0)
    if (parts := parts_of_examples(shape, width)) is not None:
        return in_parts(partial(compute, op), parts, x, addend)
    if len(op.strides) != 2:
        return compute(op, x, addend)
    extent = op.dilation[0] * (weight.shape[0] - 1) + 1
    if (parts := parts_of_rows(shape, width, op.strides[0], extent)) is None:
        return compute(op, x, addend)
    whole = replace(op, padding=((0, 0),) * 2)
    return in_parts(partial(compute, whole), parts, pad_spatial(x, op.padding), addend)


def _accumulated_bytes(x: Array, weight: Array) -> int:
    """Of one sum: int32, or the sums of two bytes and their limbs."""
    return 4 if x.dtype == weight.dtype == jnp.int8 else 20


@dataclass(frozen=True)
class _Finish:
    """What follows the products of a convolution, as a value that a compiled kernel is kept for."""

    activation: Activation
    node_format: NodeFormat
    target: Target

    def __call__(self, products: Array, addend: Array | None, constants: Mapping[str, Array]) -> Array:
        return _post_process(self.activation, self.node_format, self.target, products, addend, **constants)


def _fused_layer(
    op: Conv | ConvTranspose,
    node_format: NodeFormat,
    target: Target,
    x: Array,
    weight: Array,
    addend: Array | None,
    constants: Mapping[str, Array],
) -> Layer | None:
    """The layer as a kernel that holds the accumulator on the chip; None where that does not fit or does not pay."""
    window = Window(op.strides, op.padding, op.dilation)
    is_narrow = node_format.accumulator == "int32" and node_format.output != "int32"
    if isinstance(op, ConvTranspose) or not is_narrow or not fits(x, weight, window, op.groups):
        return None
    finish = _Finish(op.activation, node_format, target)
    layer = layer_of(x, weight, window, finish, storage_dtype(node_format.output), addend, constants)
    return layer if is_chosen(layer) else None


@eval_integer.register
def _(
    op: Linear,
    node_format: NodeFormat,
    target: Target,
    x: Array,
    addend: Array | None = None,
    *,
    weight: Array,
    **post: Array,
) -> Array:
    flat, out = x.reshape(-1, x.shape[-1]), weight.shape[-1]
    added = None if addend is None else addend.reshape(-1, out)

    def compute(x: Array, addend: Array | None) -> Array:
        products = accumulate_exactly(x, weight, NO_WINDOW, 1, accumulator=node_format.accumulator)
        return _post_process(op.activation, node_format, target, products, addend, **post)

    parts = parts_of_examples((flat.shape[0], out), _accumulated_bytes(x, weight)) if are_parts_of_use() else None
    y = compute(flat, added) if parts is None else in_parts(compute, parts, flat, added)
    return y.reshape(*x.shape[:-1], out)


def _post_process(
    activation: Activation,
    node_format: NodeFormat,
    target: Target,
    products: Array | Limbs,
    addend: Array | None,
    *,
    bias: Array,
    sumin_scale: Array | None = None,
    sumin_rshift: Array | None = None,
    upper: Array | None = None,
    **by: Array,
) -> Array:
    terms = [products]
    if addend is not None and sumin_scale is not None and sumin_rshift is not None:
        terms.append(shift_right(addend.astype(jnp.int32) * sumin_scale, sumin_rshift, target.addend.rounding))
    total = _sum(terms, bias, node_format.accumulator)
    y = finish_accumulator(total, node_format, target, **by)
    if activation == "none":
        return y
    y = jnp.maximum(y, 0)
    return y if upper is None else jnp.minimum(y, upper.astype(y.dtype))


def finish_accumulator(total: Array | Limbs | Pair, node_format: NodeFormat, target: Target, **by: Array) -> Array:
    """The rescaled accumulator, or with high precision the accumulator itself."""
    if node_format.output != "int32":
        return rescale(total, Rescale(**by), node_format.output, target)
    if by:
        raise GraphError(f"an accumulator as it is has no constant {min(by)!r}")
    if isinstance(total, Pair):
        return pairs.saturate(total)
    return limbs.saturate(total, "int32") if isinstance(total, Limbs) else total


def _sum(terms: Sequence[Array | Limbs], bias: Array, accumulator: str) -> Array | Limbs | Pair:
    if accumulator != "limbs":
        narrow = [(t.middle << 16) | t.low if isinstance(t, Limbs) else t for t in terms]
        total = sum(narrow[1:], narrow[0])
        return Pair(total, bias) if accumulator == "pair" else total + bias
    return reduce(limbs.add, (t if isinstance(t, Limbs) else limbs.from_int32(t) for t in (*terms, bias)))


# ---------------------------------------------------------------------------------------------------------------------
# Lowering


@lower_op.register(Conv)
@lower_op.register(ConvTranspose)
def _(
    op: Conv | ConvTranspose, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target
) -> Lowered:
    weight, scale = quantized_weight(params)
    return _lower(op, inputs, output, kernel_layout(op, weight), scale, params.get("bias"), target)


@lower_op.register
def _(op: Linear, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    weight, scale = quantized_weight(params)
    return _lower(op, inputs, output, weight.T, scale, params.get("bias"), target)


def quantized_weight(params: dict[str, Any]) -> tuple[Array, Array]:
    """The integers and scale of a weight."""
    if not isinstance(params["weight"], tuple):
        raise LoweringError("the weight is float; give it a spec with Policy(weight=jq.int8(axis='out'))")
    return params["weight"]


def _lower(
    op: Conv | ConvTranspose | Linear,
    inputs: Sequence[Operand],
    output: Operand,
    weight: Array,
    weight_scale: Array,
    bias: Array | None,
    target: Target,
) -> Lowered:
    """weight [*K, C / groups, O]."""
    x, *addends = inputs
    channels, xp = weight.shape[-1], array_namespace(x.scale, weight_scale)
    rounded = xp.zeros(channels, np.int32)
    if bias is not None:
        rounded = quantized_bias(op, bias, x.scale, weight_scale, target)
    weight_scale = xp.broadcast_to(channel_scale(op, weight_scale), (channels,))
    acc_scale = x.scale * weight_scale
    constants = {"weight": weight, "bias": rounded}
    if addends:
        sumin = ratio(addends[0].scale, 1.0, x.scale, weight_scale)
        form = target.addend
        constants["sumin_scale"], constants["sumin_rshift"] = multiplier_of(
            sumin, form.max_shift, bits=form.multiplier_bits, rounding=form.multiplier_rounding
        )
        if not isinstance(sumin.exponent, jax.core.Tracer) and int(sumin.exponent.max()) > form.multiplier_bits:
            raise LoweringError(
                f"the scale of the fused addend is more than {2**form.multiplier_bits - 1} times that of the "
                "accumulator: the weight scale of a channel has collapsed; after training call "
                "jq.training.raise_collapsed_scales(model)"
            )
    if output.dtype != "int32":
        to_output = ratio(x.scale, weight_scale, output.scale, 1.0)
        constants |= rescale_of(to_output, bits=bit_width(output.dtype), form=target.rescale)._asdict()
    if op.activation == "relu6":
        scale = acc_scale if output.dtype == "int32" else output.scale
        limit = quantize(real(6.0), scale, output.dtype, target.number_rounding)
        constants["upper"] = limit.astype(np.int32)
    worst = _worst_case(x, addends, constants)
    kernel = kernel_of(weight.shape, getattr(op, "groups", 1))
    saturating = _saturating(x, addends, constants) if worst is not None and output.dtype == "int32" else None
    return Lowered(constants, _accumulator(worst, x, addends, weight, target), worst, kernel, saturating)


def _accumulator(
    worst: int | None, x: Operand, addends: Sequence[Operand], weight: Array, target: Target
) -> Literal["int32", "pair", "limbs"]:
    """What holds the sum: int32 where the weights show that it fits; else a pair where all but the bias fits anyway."""
    if worst is not None and worst < 2**31:
        return "int32"
    products = prod(weight.shape[:-1]) << (bit_width(x.dtype) + bit_width(str(weight.dtype)) - 2)
    most = products + sum(2 ** (target.addend.multiplier_bits + bit_width(addend.dtype) - 1) for addend in addends)
    return "pair" if most < 2**31 else "limbs"


def quantized_bias(
    op: Conv | ConvTranspose | Linear, bias: Array, x_scale: Array, weight_scale: Array, target: Target
) -> Array:
    """A bias [O] in acc, int32: the exact quotient by s_x * s_w, rounded once (specification, section 4)."""
    return quantize_exactly(bias, x_scale, channel_scale(op, weight_scale), rounding=target.bias_rounding)


def channel_scale(op: Conv | ConvTranspose | Linear, scale: Array) -> Array:
    """A weight's scale as [O] or, for the whole tensor, [1]. Groups of a transposed convolution share theirs."""
    scale = scale.reshape(-1)
    return array_namespace(scale).tile(scale, op.groups) if isinstance(op, ConvTranspose) and scale.size > 1 else scale


def _worst_case(x: Operand, addends: Sequence[Operand], constants: dict[str, Array]) -> int | None:
    """Bound on |acc| over all channels; None while tracing, where the weights are not known.

    An output of a transposed convolution meets a part of the kernel only: there the bound is that of the whole.
    """
    if any(isinstance(v, jax.core.Tracer) for v in constants.values()):
        return None
    weight = np.abs(np.asarray(constants["weight"]).astype(np.int64))
    largest = weight.reshape(-1, weight.shape[-1]).sum(0) * 2 ** (bit_width(x.dtype) - 1)
    largest += np.abs(np.asarray(constants["bias"]).astype(np.int64))
    if addends:
        scale, shift = (np.asarray(constants[k]).astype(np.int64) for k in ("sumin_scale", "sumin_rshift"))
        largest += ((scale << (bit_width(addends[0].dtype) - 1)) >> shift) + 1
    return int(largest.max())


def _saturating(x: Operand, addends: Sequence[Operand], constants: dict[str, Array]) -> np.ndarray:
    """bool [O]: the channels whose largest or smallest sum leaves 32 bits."""
    weight = np.asarray(constants["weight"]).astype(np.int64).reshape(-1, constants["weight"].shape[-1])
    low, high = integer_range(x.dtype)
    bias = np.asarray(constants["bias"]).astype(np.int64)
    most = np.maximum(weight * low, weight * high).sum(0) + bias
    least = np.minimum(weight * low, weight * high).sum(0) + bias
    for addend in addends:
        scale, shift = (np.asarray(constants[k]).astype(np.int64) for k in ("sumin_scale", "sumin_rshift"))
        low, high = integer_range(addend.dtype)
        most, least = most + ((scale * high) >> shift) + 1, least + ((scale * low) >> shift)
    return (most >= 2**31) | (least < -(2**31))


@derived_scale.register(Conv)
@derived_scale.register(ConvTranspose)
@derived_scale.register(Linear)
def _(op: Conv | ConvTranspose | Linear, *scales: Array, weight: Array) -> Array:
    return scales[0] * channel_scale(op, weight)  # [O], broadcasts along the last axis


@constraints.register(Conv)
@constraints.register(ConvTranspose)
@constraints.register(Linear)
def _(op: Op, inputs: Sequence[Operand], output: Operand, weight_dtype: str | None, target: Target) -> list[str]:
    return _weight_limits(inputs, weight_dtype)


def _weight_limits(inputs: Sequence[Operand], weight_dtype: str | None) -> list[str]:
    if weight_dtype == "int16" and inputs[0].dtype == "int16":
        return ["input and weight are both int16; one of them has to be int8"]
    return []


def kernel_limits(weight_shape: Sequence[int], target: Target, op: Op) -> list[str]:
    """Documented limits on a weight [O, C / groups, *K], or [C, O / groups, *K] of a transposed convolution."""
    first, second, *kernel = weight_shape
    per_group = first // op.groups if isinstance(op, ConvTranspose) else second
    broken = []
    if kernel and max(kernel) > target.max_kernel:
        broken.append(f"kernel {tuple(kernel)} is larger than {target.max_kernel}")
    if per_group * prod(kernel) > target.max_conv_inputs:
        broken.append(f"{per_group * prod(kernel)} products a sum are more than {target.max_conv_inputs}")
    return broken


@to_channels_last.register(Conv)
@to_channels_last.register(ConvTranspose)
def _(op: Conv | ConvTranspose, rank: int) -> Op:
    return replace(op, channels_last=True)
