"""Normalized coordinates, solved: which joint values of the fields of section 7 make a board's integers of a grid.

A march gives a line for each axis, and few lines are distinct. Many of them are evaluated at once, on a few points of
the grid first, by the arithmetic of the reference.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import product
from math import prod
from types import SimpleNamespace
from typing import Any

import numpy as np

from jquant.board.boxes import Boxes, of_pairs, of_rows
from jquant.board.boxes import product as boxed
from jquant.board.lone import Lone
from jquant.board.neutral import NEUTRAL
from jquant.board.roundings import ORDER, rounded_all
from jquant.ops.grid_sampling import GridSample
from jquant.reference.arithmetic import rounded, saturate
from jquant.reference.call import channels_to_last
from jquant.reference.sampling import coordinate_bits, sample
from jquant.targets import value_of

_FRACTION = ("grid.coordinate_bits", "grid.max_fraction_bits")
_LINE = ("grid.map_bits", "grid.map_constant_rounding", "grid.max_map_shift")
_LAST = ("grid.map_rounding", "grid.rounding", "grid.nearest_rounding")
READ = (*_FRACTION, *_LINE, *_LAST)
_CHUNKS = (3, 12, 48)  # points of a grid that lines are tried on, before all of them

Values = Mapping[str, tuple[Any, ...]]


def is_mapped(lone: Lone, asks: Sequence[str]) -> bool:
    """Whether the value is sampled at normalized coordinates."""
    op = None if lone.node is None else lone.node.op
    normalized = isinstance(op, GridSample) and op.coordinates == "normalized"
    return normalized and np.size(lone.inputs[1].scale) == 1 and set(_LINE) <= set(asks) <= set(READ)


@dataclass(eq=False)
class Mapped:
    """A value that is sampled at normalized coordinates."""

    lone: Lone
    asks: tuple[str, ...]
    _exact: dict[int, list[Any]] = field(default_factory=dict)

    def is_within(self, left: Mapping[str, Sequence[Any]], count: Any = None) -> bool:
        return prod(len(left[f]) for f in _LINE) <= 10_000

    def good(
        self, operands: Sequence[np.ndarray], wanted: np.ndarray, left: Mapping[str, Sequence[Any]], over: Any = None
    ) -> Boxes:
        """The joint values that make `wanted`, as boxes of positions in `left`.

        Args:
          left: for each field that is asked, the values that are tried.
        """
        assert self.lone.node is not None
        last: Any = self.lone.node.op
        values = {f: tuple(left[f]) if f in self.asks else (value_of(NEUTRAL, f),) for f in READ}
        x, y = (channels_to_last(v, last.channels_last) for v in (operands[0], wanted))
        grid = operands[1]
        given = x, grid.reshape(len(grid), -1, 2), y.reshape(len(y), -1, y.shape[-1])
        by_bits: dict[int, list[tuple[int, int]]] = {}
        for (i, cb), (j, most) in product(*(enumerate(values[f]) for f in _FRACTION)):
            form = SimpleNamespace(grid=SimpleNamespace(coordinate_bits=cb, max_fraction_bits=most))
            bits = coordinate_bits(form, *x.shape[1:3], *grid.shape[1:3])  # type: ignore[arg-type]
            by_bits.setdefault(bits, []).append((i, j))
        lines, lasts = (np.array(list(np.ndindex(*(len(values[f]) for f in names)))) for names in (_LINE, _LAST))
        found = [np.zeros((0, len(READ)), np.uint64)]
        for bits, pairs in by_bits.items():
            good = self._explaining(given, bits, values).reshape(len(lines), len(lasts))
            made = of_pairs((_LINE, lines), (_LAST, lasts), good)
            found.append(boxed([of_rows(_FRACTION, np.array(pairs)), made]).masks)
        return Boxes(READ, np.concatenate(found)).project(self.asks).merged()

    def _explaining(self, given: tuple[np.ndarray, np.ndarray, np.ndarray], bits: int, values: Values) -> np.ndarray:
        """[*_LINE, *_LAST] bool for some fraction bits."""
        sizes = [len(values[f]) for f in (*_LINE, *_LAST)]
        lines = np.array(list(self._lines(given[0].shape, bits, values)))
        own, which = np.unique(lines, axis=0, return_inverse=True)
        found = np.zeros((len(own), *sizes[3:]), bool)
        inside = _within(own, given[1], values["grid.map_rounding"])
        for r, (last, nearest) in enumerate(product(values["grid.rounding"], values["grid.nearest_rounding"])):
            good = self._matching(given, bits, own, inside, values["grid.map_rounding"], (last, nearest))
            found.reshape(*found.shape[:2], -1)[..., r] = good
        return found[which.ravel()].reshape(sizes)

    def _lines(self, shape: Sequence[int], bits: int, values: Values) -> Iterator[tuple[int, ...]]:
        """(a, b, k) of x and of y for every joint value of `_LINE`; b without the half of a shift."""
        made = self._slopes(shape, bits)
        for map_bits, rounding, most in product(*(values[f] for f in _LINE)):
            line: list[int] = []
            for slopes, offsets in made[rounding]:
                k = next((k for k in range(most, -1, -1) if slopes[k] < 2**map_bits), 0)
                line += [min(slopes[k], 2**map_bits - 1), offsets[k], k]
            yield tuple(line)

    def _slopes(self, shape: Sequence[int], bits: int) -> dict[str, list[tuple[list[int], list[int]]]]:
        """By rounding, for x and y, slopes and offsets at every shift."""
        assert self.lone.node is not None
        op: Any = self.lone.node.op
        scale = Fraction(float(np.asarray(self.lone.inputs[1].scale)))
        found: dict[str, list[tuple[list[int], list[int]]]] = {rounding: [] for rounding in ORDER}
        for n in (shape[2], shape[1]):
            slope, offset = scale * (n - 1 if op.align_corners else n) / 2 * 2**bits, Fraction(n - 1, 2) * 2**bits
            for rounding, of in found.items():
                of.append(tuple([rounded(v * 2**k, rounding) for k in range(17)] for v in (slope, offset)))  # type: ignore[arg-type]
        return found

    def _matching(
        self,
        given: tuple[np.ndarray, np.ndarray, np.ndarray],
        bits: int,
        lines: np.ndarray,
        inside: np.ndarray,
        roundings: Sequence[str],
        last: tuple[str, str],
    ) -> np.ndarray:
        """[lines, map roundings] bool."""
        found = np.broadcast_to(inside, (len(lines), len(roundings))).copy()
        points = given[1].shape[1]
        order, start = np.random.default_rng(0).permutation(points), 0
        for end in (*(c for c in _CHUNKS if c < points), points):
            which = np.argwhere(found)
            if not len(which):
                break
            some = order[start:end]
            at = _coordinates(lines[which[:, 0]], given[1][:, some], [ORDER[roundings[m]] for m in which[:, 1]])
            found[tuple(which.T)] = self._equal(given[0], at, given[2][:, some], bits, last)
            start = end
        return found

    def _equal(self, x: np.ndarray, at: np.ndarray, wanted: np.ndarray, bits: int, last: tuple[str, str]) -> np.ndarray:
        """Whether x sampled at coordinates [N, V, n, 2] is `wanted` [N, n, C]: [V]."""
        assert self.lone.node is not None
        op: Any = self.lone.node.op
        call: Any = SimpleNamespace(
            op=SimpleNamespace(mode=op.mode, padding=op.padding, channels_last=True),
            target=SimpleNamespace(grid=SimpleNamespace(rounding=last[0], nearest_rounding=last[1])),
            format=SimpleNamespace(output=self.lone.output.dtype),
        )
        return (sample(call, x, at, bits) == wanted[:, None]).all((0, 2, 3))


def _within(lines: np.ndarray, grid: np.ndarray, roundings: Sequence[str]) -> np.ndarray:
    """[lines, map roundings]: whether no sum leaves int32; the half of half_up is part of it."""
    found = np.ones((len(lines), len(roundings)), bool)
    for axis in (0, 1):
        a, b, k = (lines[:, 3 * axis + i, None] for i in range(3))
        half = np.array([rounding == "half_up" for rounding in roundings]) * ((np.int64(1) << k) >> 1)
        for end in (grid[..., axis].min(), grid[..., axis].max()):
            found &= np.abs(a * end + b + half) < 2**31
    return found


def _coordinates(lines: np.ndarray, grid: np.ndarray, roundings: Sequence[int]) -> np.ndarray:
    """Absolute coordinates [N, V, n, 2] of a grid [N, n, 2] by lines [V, 6], each with a rounding."""
    found = []
    for axis in (0, 1):
        a, b, k = (lines[:, 3 * axis + i, None] for i in range(3))
        every = rounded_all(a * grid[:, None, :, axis] + b, k)
        found.append(every[roundings, :, np.arange(len(lines))].swapaxes(0, 1))
    return saturate(np.stack(found, axis=-1), "int16")
