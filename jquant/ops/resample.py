"""Resizing by static coordinates: section 7 of the specification."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import floor
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np

from jquant.numerics.resample import STEP_BITS, Steps, pick, resize, steps_of
from jquant.ops.base import Lowered, Operand, eval_float, eval_integer, lower_op, to_channels_last
from jquant.types import Array, GraphError, LoweringError, NodeFormat, Op, Target, integer_range

_MAX_FRACTION_BITS = 14  # a weight is multiplied in limbs, which take 15 bits


@dataclass(frozen=True, kw_only=True)
class Interpolate(Op):
    """Resize of [N, C, *S] to `size`, or by `scale_factor`: torch's interpolate.

    Exactly one of the two is given. With a scale factor, sizes are floor(n * factor), and pixels are 1 / factor apart,
    or n_in / n_out with `recompute_scale_factor`, as they are with `size`. "bilinear" is linear on one axis too.
    """

    layout: ClassVar = "spatial"
    scale_rule: ClassVar = "same_as_input"
    needs_stats: ClassVar = False

    size: tuple[int, ...] | None = None
    scale_factor: tuple[float, ...] | None = None
    mode: Literal["nearest", "nearest-exact", "bilinear"] = "nearest"
    align_corners: bool = False
    recompute_scale_factor: bool = False
    channels_last: bool = False

    def __post_init__(self) -> None:
        if (self.size is None) == (self.scale_factor is None):
            raise GraphError("Interpolate takes either size or scale_factor")
        if self.align_corners and self.mode != "bilinear":
            raise GraphError(f"align_corners is for bilinear, not for {self.mode}")
        if min(self.size or self.scale_factor or (0,)) <= 0:
            raise GraphError(f"Interpolate to size {self.size} by {self.scale_factor}: all must be positive")


# ---------------------------------------------------------------------------------------------------------------------
# Coordinates


def _sizes(op: Interpolate, sizes: Sequence[int]) -> tuple[int, ...]:
    """Output sizes of spatial axes of these sizes."""
    wanted = op.size or op.scale_factor or ()
    if len(wanted) != len(sizes):
        raise GraphError(f"{len(sizes)} spatial axes and {len(wanted)} sizes or factors")
    if op.mode == "bilinear" and len(sizes) > 2:
        raise GraphError("bilinear takes one or two spatial axes; resize three by two operators or by nearest")
    out = op.size or tuple(floor(n * f) for n, f in zip(sizes, op.scale_factor or (), strict=True))
    if min(out) < 1:
        raise GraphError(f"nothing is left of {tuple(sizes)} by the factor {op.scale_factor}")
    return out


def _step(op: Interpolate, i: int, n: int, out: int) -> Fraction:
    """Pixels from one output to the next along spatial axis i."""
    if op.align_corners:
        return Fraction(n - 1, out - 1) if out > 1 else Fraction(0)
    if op.scale_factor is not None and not op.recompute_scale_factor:
        return 1 / Fraction(op.scale_factor[i])
    return Fraction(n, out)


def _offset(op: Interpolate, step: Fraction, out: int) -> Fraction:
    """The coordinate of the first output: pixel centres are at integers for bilinear, pixel starts for the nearest.

    A nearest coordinate can be an integer, and the rounded steps must not fall short of it: they can by 2^-17 each, so
    the first one starts that much higher.
    """
    match op.mode:
        case "nearest":
            return Fraction(out + 1, 2 ** (STEP_BITS + 1))
        case "nearest-exact":
            return step / 2 + Fraction(out + 1, 2 ** (STEP_BITS + 1))
        case _:
            return Fraction(0) if op.align_corners else step / 2 - Fraction(1, 2)


def _all_steps(op: Interpolate, sizes: Sequence[int]) -> tuple[Steps, ...]:
    """The 16-bit coordinates along every spatial axis."""
    outs = _sizes(op, sizes)
    steps = [_step(op, i, n, out) for i, (n, out) in enumerate(zip(sizes, outs, strict=True))]
    return tuple(steps_of(s, _offset(op, s, out), out) for s, out in zip(steps, outs, strict=True))


def _float_coordinates(op: Interpolate, i: int, n: int, out: int) -> np.ndarray:
    """Coordinates along spatial axis i, [out]: float32 as in torch for the nearest, since they are floored."""
    step = np.float32(float(_step(op, i, n, out)))
    if op.scale_factor is None or op.recompute_scale_factor:
        step = np.float32(n) / np.float32(out)
    match op.mode:
        case "nearest":
            return np.arange(out, dtype=np.float32) * step
        case "nearest-exact":
            return (np.arange(out, dtype=np.float32) + np.float32(0.5)) * step
    exact = _step(op, i, n, out)
    return np.arange(out) * float(exact) + float(_offset(op, exact, out))


# ---------------------------------------------------------------------------------------------------------------------
# Meanings


def _to_last(op: Interpolate, x: Array) -> Array:
    return x if op.channels_last else jnp.moveaxis(x, 1, -1)


def _back(op: Interpolate, y: Array) -> Array:
    return y if op.channels_last else jnp.moveaxis(y, -1, 1)


@eval_float.register
def _(op: Interpolate, x: Array) -> Array:
    x = _to_last(op, x)
    sizes = x.shape[1:-1]
    for i, (n, out) in enumerate(zip(sizes, _sizes(op, sizes), strict=True)):
        axis = i + 1
        at = np.clip(_float_coordinates(op, i, n, out), 0, n - 1)
        below = np.floor(at).astype(np.int32)
        first = jnp.take(x, below, axis=axis, mode="clip")
        if op.mode != "bilinear":
            x = first
            continue
        fraction = (at - below).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(x.ndim)])
        second = jnp.take(x, np.minimum(below + 1, n - 1), axis=axis, mode="clip")
        x = first * (1 - fraction) + second * fraction
    return _back(op, x)


@lower_op.register
def _(op: Interpolate, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    """All coordinates follow from the shapes, so there are no constants."""
    bits = target.resample_fraction_bits
    if not 0 <= bits <= _MAX_FRACTION_BITS:
        raise LoweringError(f"resample_fraction_bits is {bits}; it can be 0 to {_MAX_FRACTION_BITS}")
    if op.mode != "bilinear":
        return Lowered({})
    worst = -integer_range(inputs[0].dtype)[0] << (bits * (len(output.shape) - 2))
    return Lowered({}, "int32" if worst <= 2**31 else "limbs", worst)  # 2^31 is only reached as -2^31


@eval_integer.register
def _(op: Interpolate, node_format: NodeFormat, target: Target, x: Array) -> Array:
    x = _to_last(op, x)
    steps, axes = _all_steps(op, x.shape[1:-1]), tuple(range(1, x.ndim - 1))
    if op.mode == "bilinear":
        return _back(op, resize(x, axes, steps, target.resample_fraction_bits, node_format.output))
    for axis, step in zip(axes, steps, strict=True):
        x = pick(x, axis, step)
    return _back(op, x)


@to_channels_last.register
def _(op: Interpolate, rank: int) -> Op:
    return replace(op, channels_last=True)
