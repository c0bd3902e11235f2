"""Resizing by static coordinates: section 7 of the specification."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import floor
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np

from jquant.graph.operator import Lowered, Operand, eval_float, eval_integer, lower_op, to_channels_last
from jquant.numerics.resample import Steps, pick, resize, steps_of
from jquant.types import Array, GraphError, NodeFormat, Op, ResizeFormat, Target, integer_range


@dataclass(frozen=True, kw_only=True)
class Interpolate(Op):
    """Resize of [N, C, *S] to `size`, or by `scale_factor`: torch's interpolate.

    Exactly one of the two is given. With a scale factor, sizes are floor(n * factor), and pixels are 1 / factor apart,
    or n_in / n_out with `recompute_scale_factor`, as they are with `size`. As in torch, an axis whose size stays n
    keeps its pixels whatever the factor, and one of 2 n doubles them: both for "nearest" of two axes, the first for
    "bilinear", which is linear on one axis too. "asymmetric" puts output i of "bilinear" at i times the step, as TFLite
    and ONNX can; else pixels are areas, whose centres are aligned.
    """

    layout: ClassVar = "spatial"
    scale_rule: ClassVar = "same_as_input"
    needs_stats: ClassVar = False

    size: tuple[int, ...] | None = None
    scale_factor: tuple[float, ...] | None = None
    mode: Literal["nearest", "nearest-exact", "bilinear"] = "nearest"
    align_corners: bool = False
    recompute_scale_factor: bool = False
    coordinates: Literal["half_pixel", "asymmetric"] = "half_pixel"
    channels_last: bool = False

    def __post_init__(self) -> None:
        if (self.size is None) == (self.scale_factor is None):
            raise GraphError("Interpolate takes either size or scale_factor")
        if self.align_corners and self.mode != "bilinear":
            raise GraphError(f"align_corners is for bilinear, not for {self.mode}")
        if self.coordinates == "asymmetric" and (self.align_corners or self.mode != "bilinear"):
            raise GraphError(f"asymmetric coordinates are for bilinear without align_corners, not for {self.mode}")
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
    if op.scale_factor is not None and not factor_is_ignored(op, n, out):
        return 1 / Fraction(op.scale_factor[i])
    return Fraction(n, out)


def factor_is_ignored(op: Interpolate, n: int, out: int) -> bool:
    """Whether pixels along an axis of n are n / out apart, not 1 / factor: so aten has it.

    Of "nearest" in two axes alone: in one and in three the same factor counts.
    """
    if op.scale_factor is None or op.recompute_scale_factor:
        return True
    if op.mode == "bilinear":
        return out == n
    return op.mode == "nearest" and len(op.scale_factor) == 2 and out in (n, 2 * n)


def _offset(op: Interpolate, step: Fraction, out: int, bits: int) -> Fraction:
    """The coordinate of the first output: pixel centres are at integers for bilinear, pixel starts for the nearest.

    A nearest coordinate can be an integer, and the rounded steps must not fall short of it: by half of the last of
    their `bits` fraction bits each, so the first one starts that much higher.
    """
    match op.mode:
        case "nearest":
            return Fraction(out + 1, 2 ** (bits + 1))
        case "nearest-exact":
            return step / 2 + Fraction(out + 1, 2 ** (bits + 1))
        case _:
            from_start = op.align_corners or op.coordinates == "asymmetric"
            return Fraction(0) if from_start else step / 2 - Fraction(1, 2)


def _all_steps(op: Interpolate, sizes: Sequence[int], form: ResizeFormat) -> tuple[Steps, ...]:
    """The coordinates along every spatial axis, in fraction bits."""
    outs = _sizes(op, sizes)
    steps = [_step(op, i, n, out) for i, (n, out) in enumerate(zip(sizes, outs, strict=True))]
    bits = form.step_bits
    return tuple(steps_of(s, _offset(op, s, out, bits), out, form) for s, out in zip(steps, outs, strict=True))


def _float_coordinates(op: Interpolate, i: int, n: int, out: int) -> np.ndarray:
    """Coordinates along spatial axis i, [out]: float32 as in torch for the nearest, since they are floored."""
    step = np.float32(float(_step(op, i, n, out)))
    if factor_is_ignored(op, n, out):
        step = np.float32(n) / np.float32(out)
    match op.mode:
        case "nearest":
            return np.arange(out, dtype=np.float32) * step
        case "nearest-exact":
            return (np.arange(out, dtype=np.float32) + np.float32(0.5)) * step
    exact = _step(op, i, n, out)
    return np.arange(out) * float(exact) + float(_offset(op, exact, out, 0))  # of bilinear, which needs no bits


def nearest_indices(op: Interpolate, sizes: Sequence[int]) -> tuple[np.ndarray, ...]:
    """The pixel that each output of a nearest resize takes, int32, for every spatial axis: torch's own, in float32."""
    found = []
    for i, (n, out) in enumerate(zip(sizes, _sizes(op, sizes), strict=True)):
        at = np.clip(_float_coordinates(op, i, n, out), 0, n - 1)
        found.append(np.floor(at).astype(np.int32))
    return tuple(found)


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
    if op.mode != "bilinear":
        return _back(op, _taken(x, nearest_indices(op, sizes)))
    for i, (n, out) in enumerate(zip(sizes, _sizes(op, sizes), strict=True)):
        axis = i + 1
        at = np.clip(_float_coordinates(op, i, n, out), 0, n - 1)
        below = np.floor(at).astype(np.int32)
        first = jnp.take(x, below, axis=axis, mode="clip")
        fraction = (at - below).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(x.ndim)])
        second = jnp.take(x, np.minimum(below + 1, n - 1), axis=axis, mode="clip")
        x = first * (1 - fraction) + second * fraction
    return _back(op, x)


def _taken(x: Array, indices: Sequence[np.ndarray]) -> Array:
    """Pixels along every spatial axis of [N, *S, C]."""
    for i, index in enumerate(indices):
        x = jnp.take(x, index, axis=i + 1, mode="clip")
    return x


@lower_op.register
def _(op: Interpolate, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    """All coordinates follow from the shapes, so there are no constants."""
    if op.mode != "bilinear":
        return Lowered({})
    worst = -integer_range(inputs[0].dtype)[0] << (target.resize.weight_bits * (len(output.shape) - 2))
    return Lowered({}, "int32" if worst <= 2**31 else "limbs", worst)  # 2^31 is only reached as -2^31


@eval_integer.register
def _(op: Interpolate, node_format: NodeFormat, target: Target, x: Array) -> Array:
    x = _to_last(op, x)
    form = target.resize
    if op.mode != "bilinear" and form.nearest_index == "exact":
        return _back(op, _taken(x, nearest_indices(op, x.shape[1:-1])))
    steps, axes = _all_steps(op, x.shape[1:-1], form), tuple(range(1, x.ndim - 1))
    if op.mode == "bilinear":
        return _back(op, resize(x, axes, steps, form, node_format.output))
    for axis, step in zip(axes, steps, strict=True):
        x = pick(x, axis, step)
    return _back(op, x)


@to_channels_last.register
def _(op: Interpolate, rank: int) -> Op:
    return replace(op, channels_last=True)
