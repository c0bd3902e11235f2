"""Averages of regions, solved: which joint values of the fields of sections 3 and 7 make a board's integers.

A sum is made of coordinates and points, and rescaled. The sums of all values that make points are computed at once, and
few rows of constants and ways to evaluate them are distinct.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np

from jquant.board.boxes import Boxes, of_rows
from jquant.board.boxes import product as boxed
from jquant.board.lone import Constants, Lone
from jquant.board.neutral import NEUTRAL
from jquant.ops.regions import RoiAlign
from jquant.reference.arithmetic import round_shift, rounded, saturate
from jquant.reference.call import channels_to_last
from jquant.reference.sampling import coordinate_bits
from jquant.types import JQuantError, integer_range

_LAID = ("grid.coordinate_bits", "grid.max_fraction_bits", "grid.map_bits")
_POINT = ("grid.point_bits", "grid.point_fraction_rounding", "grid.point_rounding")
_ROW = ("rescale.mantissa_bits", "rescale.max_post_shift", "rescale.max_pre_shift", "rescale.post_shift_int8")
_EVALUATED = (
    "rescale.post_rounding",
    "rescale.average_pre_rounding",
    "rescale.high_precision",
    "rescale.inner_bits",
)
READ = (*_LAID, *_POINT, *_ROW, *_EVALUATED)
MOST_ROWS_OF_RESCALE = 400_000  # joint values of the fields of section 3
_OPEN = {"rescale.max_post_shift": 31, "rescale.max_pre_shift": 31, "rescale.post_shift_int8": 31}
_CHUNKS = (4, 16)  # integers that sums are tried on, before all of them

Over = Callable[[Sequence[str]], np.ndarray]  # the joint values that are left of some fields, as positions


def is_regioned(lone: Lone, asks: Sequence[str]) -> bool:
    """Whether the value is an average of regions of one image, whose output scale is that of the image."""
    op = None if lone.node is None else lone.node.op
    return isinstance(op, RoiAlign) and lone.inputs[1].shape[-1] == 4 and set(asks) == set(READ)


@dataclass(eq=False)
class Regioned:
    """A value that is an average of regions."""

    lone: Lone
    asks: tuple[str, ...]
    _constants: dict[tuple[Any, ...], Constants | None] = field(default_factory=dict)

    def is_within(self, left: Mapping[str, Sequence[Any]], count: Callable[[Sequence[str]], int]) -> bool:
        return count([f for f in (*_ROW, *_EVALUATED) if len(left[f]) > 1]) <= MOST_ROWS_OF_RESCALE

    def good(
        self, operands: Sequence[np.ndarray], wanted: np.ndarray, left: Mapping[str, Sequence[Any]], over: Over
    ) -> Boxes:
        """The joint values that make `wanted`, as boxes of positions in `left`.

        Args:
          left: for each field, the values that are tried.
          over: joint positions in `left` of fields that have several.
        """
        op: Any = self.lone.node.op if self.lone.node else None
        x, y = (channels_to_last(v, op.channels_last) for v in (operands[0], wanted))
        rescales = _whole((*_ROW, *_EVALUATED), left, over)
        points = list(product(*(range(len(left[f])) for f in _POINT)))
        found: list[np.ndarray] = [np.zeros((0, len(READ)), np.uint64)]
        groups: dict[int, list[Any]] = {}
        for laid, bits, ends in self._laid(x, operands[1], left):
            sums = self._sums(
                x, ends, bits, [tuple(left[f][i] for f, i in zip(_POINT, p, strict=True)) for p in points]
            )
            if bits not in groups:
                groups[bits] = [
                    (of_rows((*_ROW, *_EVALUATED), rows), *how)
                    for rows, *how in self._rescales(rescales, laid[0], left)
                ]
            of_laid = of_rows(_LAID, np.array(laid))
            for of_rescale, row, reading in groups[bits]:
                good = _matching(sums, row, reading, y.ravel(), self.lone.output.dtype)
                if good.any():
                    found.append(boxed([of_laid, of_rows(_POINT, np.array(points)[good]), of_rescale]).masks)
        return Boxes(READ, np.concatenate(found)).project(self.asks).merged()

    def _laid(
        self, x: np.ndarray, boxes: np.ndarray, left: Mapping[str, Sequence[Any]]
    ) -> Iterator[tuple[list[tuple[int, ...]], int, np.ndarray]]:
        """Positions of `_LAID` that give the same fraction bits and coordinates, with both."""
        groups: dict[tuple[int, bytes], tuple[list[tuple[int, ...]], int, np.ndarray]] = {}
        for at in product(*(range(len(left[f])) for f in _LAID)):
            values = {f: left[f][i] for f, i in zip(_LAID, at, strict=True)}
            march = NEUTRAL.with_fields(values)
            bits = coordinate_bits(march, *x.shape[1:3])
            constants = self._made(bits, values)
            if constants is None:
                continue
            a, b, k = (np.int64(constants[role]) for role in ("multiplier", "offset", "shift"))
            acc = a * boxes + b
            if (np.abs(acc) >= 2**31).any():
                continue
            ends = saturate(acc >> k, "int16")  # as NEUTRAL rounds; the boxes are whole pixels
            groups.setdefault((bits, ends.tobytes()), ([], bits, ends))[0].append(at)
        yield from groups.values()

    def _made(self, bits: int, values: Mapping[str, Any]) -> Constants | None:
        """The constants, which depend on the fields of coordinates through their fraction bits alone."""
        key = bits, *(v for f, v in values.items() if f not in _LAID[:2])
        if key not in self._constants:
            try:
                self._constants[key] = self.lone.constants(NEUTRAL.with_fields(dict(values)))
            except JQuantError:
                self._constants[key] = None
        return self._constants[key]

    def _sums(self, x: np.ndarray, ends: np.ndarray, bits: int, points: Sequence[tuple[int, str, str]]) -> np.ndarray:
        """[points, n] exact sums of samples, for each way to make points."""
        op: Any = self.lone.node.op if self.lone.node else None
        (oh, ow), r = op.output_size, op.sampling_ratio
        ys, xs = (
            np.stack([_between(ends[:, i], ends[:, i + 2], n * r, bits, op.aligned, *point) for point in points])
            for i, n in ((1, oh), (0, ow))
        )
        height, width = x.shape[1:3]
        total: Any = 0
        for (row, of_row), (column, of_column) in product(_corners(ys, height, bits), _corners(xs, width, bits)):
            weight = of_row[..., :, None] * of_column[..., None, :]
            total = total + x[0][row[..., :, None], column[..., None, :]] * weight[..., None]
        v, k = ys.shape[:2]
        whole = total.reshape(v, k, oh, r, ow, r, -1).sum((3, 5))
        return np.asarray(whole.reshape(v, -1))

    def _rescales(
        self, rows: np.ndarray, laid: tuple[int, ...] | list[Any], left: Mapping[str, Sequence[Any]]
    ) -> Iterator[tuple[np.ndarray, tuple[int, int, int], tuple[Any, ...]]]:
        """The joint values of section 3 that rescale alike, with (mantissa, pre, post) and how they are evaluated."""
        fixed = {f: left[f][i] for f, i in zip(_LAID, laid, strict=True)}
        bits = coordinate_bits(NEUTRAL.with_fields(fixed), *self.lone.inputs[0].shape[1:3])  # type: ignore[arg-type]
        made = [self._made(bits, {**fixed, **_OPEN, "rescale.mantissa_bits": v}) for v in left["rescale.mantissa_bits"]]
        rows = rows[np.array([constants is not None for constants in made])[rows[:, 0]]]
        if not len(rows):
            return
        whole = [(0, 0) if c is None else (int(c["mantissa"]), int(c["pre"]) + int(c["post"])) for c in made]
        mantissa, total = np.array(whole)[rows[:, 0]].T
        most_post, most_pre, after = (np.array(left[f])[i] for f, i in zip(_ROW[1:], rows.T[1:4], strict=True))
        pre = np.clip(total - after, 0, most_pre)
        post = np.clip(total - pre, 0, most_post)
        last, first, wide, inner = rows.T[4:]
        high = np.array(left["rescale.high_precision"])[wide]
        first, inner = np.where(high | (pre == 0), 0, first), np.where(high, 0, inner)
        pre, post = np.where(high, 0, pre), np.where(high, pre + post, post)
        keys, which = np.unique(
            np.stack([mantissa, pre, post, last, first, wide, inner], axis=1), axis=0, return_inverse=True
        )
        order = np.argsort(which.ravel(), kind="stable")
        for key, same in zip(keys, np.split(rows[order], np.cumsum(np.bincount(which.ravel()))[:-1]), strict=True):
            m, pre_shift, post_shift = map(int, key[:3])
            last_, first_, wide_, inner_ = (left[f][i] for f, i in zip(_EVALUATED, key[3:], strict=True))
            yield same, (m, pre_shift, post_shift), (last_,) if wide_ else (last_, first_, inner_)


def _whole(names: Sequence[str], left: Mapping[str, Sequence[Any]], over: Over) -> np.ndarray:
    """The joint positions of some fields; of those with one value, 0."""
    free = [f for f in names if len(left[f]) > 1]
    some = over(free)
    found = np.zeros((len(some), len(names)), np.int64)
    found[:, [names.index(f) for f in free]] = some
    return found


def _between(
    start: np.ndarray, end: np.ndarray, count: int, bits: int, aligned: bool, places: int, fraction: str, last: str
) -> np.ndarray:
    """[K, count] points at the centres of equal parts, as `sample_point` of the reference makes them one by one."""
    length = end - start if aligned else np.maximum(end - start, 2**bits)
    centres = np.array([rounded(Fraction(2 * i + 1, 2 * count) * 2**places, fraction) for i in range(count)])
    return start[:, None] + round_shift(length[:, None] * centres, places, last)


def _corners(at: np.ndarray, n: int, bits: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(pixel, weight) of the two pixels that a coordinate meets along an axis of n; as `region_sample`."""
    one = 2**bits
    inside = (-one <= at) & (at <= n * one)
    low, part = np.divmod(np.clip(at, 0, (n - 1) * one), one)
    yield low, np.where(inside, one - part, 0)
    yield np.minimum(low + 1, n - 1), np.where(inside, part, 0)


def _matching(
    sums: np.ndarray, row: tuple[int, int, int], reading: tuple[Any, ...], wanted: np.ndarray, dtype: str
) -> np.ndarray:
    """[points] whether sums become the board's integers."""
    found = np.arange(len(sums))
    order, start = np.random.default_rng(0).permutation(sums.shape[1]), 0
    for end in (*(c for c in _CHUNKS if c < len(order)), len(order)):
        some = order[start:end]
        found = found[(_rescaled(sums[found][:, some], row, reading, dtype) == wanted[some]).all(1)]
        start = end
    good = np.zeros(len(sums), bool)
    good[found] = True
    return good


def _rescaled(acc: np.ndarray, row: tuple[int, int, int], reading: tuple[Any, ...], dtype: str) -> np.ndarray:
    (mantissa, pre, post), last = row, reading[0]
    if len(reading) == 1:
        made = round_shift(acc * mantissa, pre + post, last)
    else:
        limit = 2 ** (reading[2] - 1)
        head = np.clip(round_shift(acc, pre, reading[1]), -limit, limit - 1)
        made = round_shift(head * mantissa, post, last)
    return np.clip(made, *integer_range(dtype))
