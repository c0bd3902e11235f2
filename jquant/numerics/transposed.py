"""Transposed convolution as plain ones: each residue of the output index modulo the stride is a convolution of its own.

With t = o + padding counted in the full output, t = i * stride + k * dilation. The outputs with t = q * stride + r meet
only the kernel positions k with k * dilation = r modulo the stride; those are evenly spaced, so that a residue is a
convolution of stride 1 with a part of the kernel, reversed. Nothing is multiplied by inserted zeros.
"""

from collections.abc import Callable, Sequence
from itertools import product
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jquant.numerics.convolution import Window
from jquant.types import Array, GraphError

Convolution = Callable[[Array, Array, Window, int], Any]  # (x, weight, window, groups) to an array or limbs


class Phase(NamedTuple):
    """One residue along one axis: the kernel positions, already reversed, and how the input is padded (or cut)."""

    positions: tuple[int, ...]
    low: int
    high: int
    dilation: int


class Axis(NamedTuple):
    """A spatial axis: a phase for each residue (None: no kernel position meets it), and what to keep of the result."""

    phases: tuple[Phase | None, ...]
    start: int
    size: int


def plan_axis(n: int, kernel: int, stride: int, padding: tuple[int, int], dilation: int, output_padding: int) -> Axis:
    """How an axis of n inputs is computed."""
    low, high = padding
    size = (n - 1) * stride - low - high + dilation * (kernel - 1) + output_padding + 1
    if size < 1:
        raise GraphError(f"a transposed window of {kernel} over {n} elements, padding {padding}, leaves no output")
    first, last = low // stride, -(-(low + size) // stride) - 1  # of q, the same for all residues
    phases: list[Phase | None] = []
    for residue in range(stride):
        positions = [k for k in range(kernel) if k * dilation % stride == residue]
        shifts = [(k * dilation - residue) // stride for k in positions]  # y[q] sums x[q - shift]
        if not positions:
            phases.append(None)
            continue
        step = shifts[1] - shifts[0] if len(shifts) > 1 else 1
        phases.append(Phase(tuple(positions[::-1]), shifts[-1] - first, last - shifts[0] - (n - 1), step))
    return Axis(tuple(phases), low - first * stride, size)


def transpose_convolve(
    x: Array, weight: Array, window: Window, output_padding: Sequence[int], groups: int, convolve: Convolution
) -> Any:
    """Transposed convolution of [N, *S, C] with [*K, C / groups, O], not reversed, as in torch."""
    kernel = weight.shape[:-2]
    axes = [plan_axis(*a) for a in zip(x.shape[1:-1], kernel, *window, output_padding, strict=True)]
    residues = list(product(*(range(s) for s in window.strides)))
    chosen = {r: [axis.phases[i] for axis, i in zip(axes, r, strict=True)] for r in residues}
    parts: dict[tuple[int, ...], Any] = {}
    for alike in _alike(chosen):
        parts |= _convolve_phases(x, weight, chosen, alike, groups, convolve)
    some = next(iter(parts.values()))
    zeros = jax.tree.map(jnp.zeros_like, some)
    return jax.tree.map(lambda *p: _interleave(p, axes, window.strides), *(parts.get(r, zeros) for r in residues))


def _alike(chosen: dict[tuple[int, ...], list[Phase | None]]) -> list[list[tuple[int, ...]]]:
    """The residues whose convolutions differ in the weight only; those without any kernel position are left out."""
    found: dict[Any, list[tuple[int, ...]]] = {}
    for residue, phases in chosen.items():
        if all(phases):
            found.setdefault(tuple((len(p.positions), *p[1:]) for p in phases if p), []).append(residue)
    return list(found.values())


def _convolve_phases(
    x: Array,
    weight: Array,
    chosen: dict[tuple[int, ...], list[Phase | None]],
    alike: list[tuple[int, ...]],
    groups: int,
    convolve: Convolution,
) -> dict[tuple[int, ...], Any]:
    """Residues that differ in the weight only, as one convolution with their output channels side by side."""
    phases = [p for p in chosen[alike[0]] if p]
    padding = tuple((p.low, p.high) for p in phases)
    if any(min(edges) < 0 for edges in padding):  # a window that starts or ends inside the input
        x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((*edges, 0) for edges in padding), (0, 0, 0)])
        padding = tuple((0, 0) for _ in phases)
    window = Window((1,) * len(phases), padding, tuple(p.dilation for p in phases))
    kernels = [_part(weight, [p.positions for p in chosen[r] if p]) for r in alike]
    split = [k.reshape(*k.shape[:-1], groups, -1) for k in kernels]
    y = convolve(x, jnp.stack(split, axis=-2).reshape(*kernels[0].shape[:-1], -1), window, groups)

    def part(v: Array, i: int) -> Array:
        by_group = v.reshape(*v.shape[:-1], groups, len(alike), -1)[..., i, :]
        return by_group.reshape(*v.shape[:-1], -1)

    return {r: jax.tree.map(lambda v, i=i: part(v, i), y) for i, r in enumerate(alike)}


def _part(weight: Array, positions: Sequence[tuple[int, ...]]) -> Array:
    for axis, index in enumerate(positions):
        weight = jnp.stack([jax.lax.index_in_dim(weight, k, axis, keepdims=False) for k in index], axis)
    return weight


def _interleave(parts: Sequence[Array], axes: Sequence[Axis], strides: Sequence[int]) -> Array:
    """Phases [N, *Q, O], in row-major order of their residues, to [N, *S_out, O]."""
    rank = len(strides)
    if prod(strides) > 1:
        n, *counts, out = parts[0].shape
        y = jnp.stack(parts, axis=-2).reshape(n, *counts, *strides, out)
        order = [axis for i in range(rank) for axis in (1 + i, 1 + rank + i)]
        y = jnp.transpose(y, (0, *order, 1 + 2 * rank))
        y = y.reshape(n, *(c * s for c, s in zip(counts, strides, strict=True)), out)
    else:
        y = parts[0]
    return y[(slice(None), *(slice(a.start, a.start + a.size) for a in axes))]
