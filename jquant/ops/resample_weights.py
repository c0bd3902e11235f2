"""Resizing by sums of more than two pixels an axis: cubic, and with antialiasing. The chip has no such operator."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil, floor
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jquant.graph.operator import Lowered, Operand, eval_float, lower_op, to_channels_last
from jquant.types import Array, GraphError, LoweringError, Op, Target

Coordinates = Literal["half_pixel", "asymmetric", "align_corners"]


@dataclass(frozen=True, kw_only=True)
class Resample(Op):
    """Resize of [N, C, *S] of one or two spatial axes to `size`, each output a weighted sum of pixels along an axis.

    "cubic" takes four pixels by Keys' kernel with `coefficient` (-0.75 in torch, -0.5 in PIL), "linear" two. With
    `antialias` the kernel is as wide as the step where the image shrinks. The weights of an output sum to one. Outside
    of the image the border is repeated; with `exclude_outside` nothing counts there, as with antialiasing in torch.
    Pixels are 1 / `scale_factor` apart where it is given, else n_in / n_out.

    R. Keys, "Cubic convolution interpolation for digital image processing", IEEE Trans. ASSP 29(6), 1981.
    """

    layout: ClassVar = "spatial"

    size: tuple[int, ...]
    scale_factor: tuple[float, ...] | None = None
    mode: Literal["linear", "cubic"] = "cubic"
    coordinates: Coordinates = "half_pixel"
    antialias: bool = False
    coefficient: float = -0.75
    exclude_outside: bool = False
    channels_last: bool = False

    def __post_init__(self) -> None:
        factors = self.scale_factor or (1.0,) * len(self.size)
        if min(self.size) < 1 or min(factors) <= 0 or len(factors) != len(self.size) or len(self.size) > 2:
            raise GraphError(f"Resample to size {self.size} by {self.scale_factor}: one or two axes, all positive")


def weights_of(op: Resample, i: int, n: int) -> np.ndarray:
    """The share of every pixel in every output along spatial axis i of n pixels, [out, n] float32."""
    out = op.size[i]
    step = n / out if op.scale_factor is None else 1 / op.scale_factor[i]
    offset = step / 2 - 0.5
    if op.coordinates == "align_corners":
        step, offset = (n - 1) / (out - 1) if out > 1 else 0.0, 0.0
    elif op.coordinates == "asymmetric":
        offset = 0.0
    wide = max(step, 1.0) if op.antialias else 1.0
    kernel, reach = _KERNELS[op.mode]
    weights = np.zeros((out, n))
    for k in range(out):
        centre = k * step + offset
        at = np.arange(ceil(centre - reach * wide), floor(centre + reach * wide) + 1)
        share = np.array([kernel(abs(p - centre) / wide, op.coefficient) for p in at])
        if op.exclude_outside:
            inside = (at >= 0) & (at < n)
            at, share = at[inside], share[inside]
        share = share / share.sum()
        np.add.at(weights[k], np.clip(at, 0, n - 1), share)
    return weights.astype(np.float32)


def _linear(x: float, coefficient: float) -> float:
    return max(1.0 - x, 0.0)


def _cubic(x: float, a: float) -> float:
    if x <= 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a if x < 2 else 0.0


_KERNELS: dict[str, tuple[Callable[[float, float], float], int]] = {"linear": (_linear, 1), "cubic": (_cubic, 2)}


@eval_float.register
def _(op: Resample, x: Array) -> Array:
    sizes = x.shape[1:-1] if op.channels_last else x.shape[2:]
    if len(sizes) != len(op.size):
        raise GraphError(f"{len(sizes)} spatial axes and {len(op.size)} sizes")
    for i, n in enumerate(sizes):
        axis = i + (1 if op.channels_last else 2)
        weights = jnp.asarray(weights_of(op, i, n))
        made = jax.lax.dot_general(x, weights, (((axis,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST)
        x = jnp.moveaxis(made, -1, axis)
    return x


@lower_op.register
def _(op: Resample, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    kind = "antialiasing" if op.antialias else op.mode
    raise LoweringError(
        f"a resize with {kind} has no integers, since the chip resizes by nearest and linear only; resize outside of "
        "the deployed part, or train the model with mode='bilinear' and antialias=False"
    )


@to_channels_last.register
def _(op: Resample, rank: int) -> Op:
    return replace(op, channels_last=True)
