"""Sampling grids: the two forms of coordinates, and the grid of an affine map. Section 7 of the specification.

A grid is [..., Ho, Wo, 2] in the order (x, y). Absolute coordinates are pixels, 0 at the centre of the first one;
normalized ones put -1 and 1 at the centres of the outer pixels (align_corners) or at their outer edges.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from jquant.graph.checks import check_lengths
from jquant.graph.operator import Lowered, Operand, eval_float, eval_integer, lower_op
from jquant.numerics.rescale import Rescale, ratio, rescale, rescale_of
from jquant.numerics.rounding import round_fraction, widen
from jquant.types import Array, GraphError, GridFormat, NodeFormat, Op, Target, bit_width, integer_range


@dataclass(frozen=True, kw_only=True)
class AffineGrid(Op):
    """The normalized grid [N, *size, 2] of an affine map theta [N, 2, 3]: torch's affine_grid. size is (H, W)."""

    ports: ClassVar = ("theta",)

    size: tuple[int, int]
    align_corners: bool = False

    def __post_init__(self) -> None:
        check_lengths(self, "size", positive=("size",))


def base_grid(size: tuple[int, int]) -> Array:
    """The absolute coordinates of the pixels of an image (H, W), [H, W, 2] float32."""
    y, x = jnp.meshgrid(*(jnp.arange(n, dtype=jnp.float32) for n in size), indexing="ij")
    return jnp.stack([x, y], axis=-1)


def denormalize_grid(grid: Array, size: tuple[int, int], *, align_corners: bool) -> Array:
    """Normalized coordinates [..., 2] to absolute ones on an image of `size` (H, W)."""
    sides = jnp.asarray(size[::-1], jnp.float32)
    return ((grid + 1) * (sides - 1 if align_corners else sides) - (0 if align_corners else 1)) / 2


def normalize_grid(grid: Array, size: tuple[int, int], *, align_corners: bool) -> Array:
    """Absolute coordinates [..., 2] on an image of `size` (H, W) to normalized ones: undoes `denormalize_grid`.

    With align_corners every coordinate means the same on an axis of one pixel, so there is nothing to undo: pixel 0
    gives -1, as it does elsewhere.
    """
    sides = jnp.asarray(size[::-1], jnp.float32)
    if align_corners:
        return 2 * grid / jnp.maximum(sides - 1, 1) - 1
    return (2 * grid + 1) / sides - 1


def grid_scale(n: int, *, align_corners: bool) -> float:
    """The int16 scale of normalized coordinates on an axis of n pixels that reaches one pixel beyond the image.

    A value has one scale, so a grid takes the larger one of its two axes: that of the shorter side.
    """
    if align_corners:
        return (1 if n == 1 else 2 / (n - 1) + 1) / integer_range("int16")[1]
    return (2 / n + 1) / integer_range("int16")[1]


# ---------------------------------------------------------------------------------------------------------------------
# Affine grids


def _normalized_axis(n: int, align_corners: bool) -> np.ndarray:
    """Normalized coordinates of n pixels, float64."""
    return (2 * np.arange(n) + 1 - n) / (max(n - 1, 1) if align_corners else n)


def homogeneous(op: AffineGrid) -> np.ndarray:
    """(x, y, 1) at every pixel, [H, W, 3] float64."""
    y, x = np.meshgrid(*(_normalized_axis(n, op.align_corners) for n in op.size), indexing="ij")
    return np.stack([x, y, np.ones_like(x)], axis=-1)


@eval_float.register
def _(op: AffineGrid, theta: Array) -> Array:
    if theta.shape[1:] != (2, 3):
        raise GraphError(f"theta must be [N, 2, 3], not {theta.shape}")
    return jnp.einsum("hwk,nik->nhwi", jnp.asarray(homogeneous(op), jnp.float32), theta, precision="highest")


@lower_op.register
def _(op: AffineGrid, inputs: Sequence[Operand], output: Operand, params: dict[str, Any], target: Target) -> Lowered:
    bits = target.grid.affine_bits  # at most 14: three products with int16 stay in int32
    h, w = op.size
    base: Any = np.full((h, w, 3), 2**bits, np.int32)
    base[..., 0], base[..., 1] = _fixed_axis(op, w, target.grid), _fixed_axis(op, h, target.grid)[:, None]
    to_output = ratio(inputs[0].scale, 2.0**-bits, output.scale, 1.0)
    return Lowered({"base": base, **rescale_of(to_output, bits=bit_width(output.dtype), form=target.rescale)._asdict()})


def _fixed_axis(op: AffineGrid, n: int, form: GridFormat) -> np.ndarray:
    """Normalized coordinates of n pixels, in the fraction bits of the format."""
    span = max(n - 1, 1) if op.align_corners else n
    exact = [Fraction((2 * i + 1 - n) << form.affine_bits, span) for i in range(n)]
    return np.array([round_fraction(v, form.affine_rounding) for v in exact], np.int32)


@eval_integer.register
def _(op: AffineGrid, node_format: NodeFormat, target: Target, theta: Array, *, base: Array, **by: Array) -> Array:
    rows = widen(theta)[:, None, None, :, :]  # at most 3 * 2^15 * 2^14
    x, y, one = (rows[..., k] * base[..., k, None] for k in range(3))
    return rescale(x + y + one, Rescale(**by), node_format.output, target)
