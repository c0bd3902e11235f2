"""Averages of regions, solved: which joint values of the fields of sections 3 and 7 make a board's integers.

A sum is made of coordinates and points, and rescaled. The sums of all values that make points are computed at once, and
few rows of constants and ways to evaluate them are distinct.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from jquant.board.boxes import Boxes, of_rows
from jquant.board.boxes import product as boxed
from jquant.board.lone import Constants, Lone
from jquant.board.neutral import NEUTRAL
from jquant.board.positions import distinct, groups
from jquant.board.roundings import ORDER, rounded_all
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
        free = [[f for f in names if len(left[f]) > 1] for names in (_ROW, _EVALUATED)]
        return all(count(names) <= MOST_ROWS_OF_RESCALE for names in free)

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
        shifts, readings = _whole(_ROW, left, over), _readings(_whole(_EVALUATED, left, over), left)
        points = list(product(*(range(len(left[f])) for f in _POINT)))
        places, values = np.array(points), [tuple(left[f][i] for f, i in zip(_POINT, p, strict=True)) for p in points]
        found: list[np.ndarray] = [np.zeros((0, len(READ)), np.uint64)]
        rows_of: dict[int, list[tuple[Boxes, tuple[int, int, int]]]] = {}
        boxes = _Boxed()
        for laid, bits, ends in self._laid(x, operands[1], left):
            sums, which = np.unique(self._sums(x, ends, bits, values), axis=0, return_inverse=True)
            if bits not in rows_of:
                rows_of[bits] = list(self._rows(shifts, bits, laid[0], left))
            for of_row, row in rows_of[bits]:
                good = _matching(sums, row, readings, y.ravel(), self.lone.output.dtype)
                if not good.any():
                    continue
                patterns, pattern = np.unique(good, axis=0, return_inverse=True)
                for i in np.flatnonzero(patterns.any(1)):
                    own = np.isin(which.ravel(), np.flatnonzero(pattern.ravel() == i))
                    read = np.concatenate([readings[r].rows for r in np.flatnonzero(patterns[i])])
                    parts = [boxes(_LAID, np.array(laid)), boxes(_POINT, places[own]), of_row, boxes(_EVALUATED, read)]
                    found.append(boxed(parts).masks)
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

    def _rows(
        self, rows: np.ndarray, bits: int, laid: tuple[int, ...], left: Mapping[str, Sequence[Any]]
    ) -> Iterator[tuple[Boxes, tuple[int, int, int]]]:
        """The joint values of `_ROW` that make the same row of constants, with it: (mantissa, pre, post)."""
        fixed = {f: left[f][i] for f, i in zip(_LAID, laid, strict=True)}
        made = [self._made(bits, {**fixed, **_OPEN, "rescale.mantissa_bits": v}) for v in left["rescale.mantissa_bits"]]
        rows = rows[np.array([constants is not None for constants in made])[rows[:, 0]]]
        whole = [(0, 0) if c is None else (int(c["mantissa"]), int(c["pre"]) + int(c["post"])) for c in made]
        mantissa, total = np.array(whole)[rows[:, 0]].T
        most_post, most_pre, after = (np.array(left[f])[i] for f, i in zip(_ROW[1:], rows.T[1:], strict=True))
        pre = np.clip(total - after, 0, most_pre)
        made_of = np.stack([mantissa, pre, np.clip(total - pre, 0, most_post)], axis=1)
        some, which = distinct(made_of)
        for row, same in zip(some, groups(rows, which), strict=True):
            yield of_rows(_ROW, same), (int(row[0]), int(row[1]), int(row[2]))


class _Boxed:
    """Rows as boxes, which come again and again."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Sequence[str], bytes], Boxes] = {}

    def __call__(self, fields: tuple[str, ...], rows: np.ndarray) -> Boxes:
        if (key := (fields, rows.tobytes())) not in self._kept:
            self._kept[key] = of_rows(fields, rows)
        return self._kept[key]


class _Reading(NamedTuple):
    """One way to evaluate a row. `first`: rounding and bits before the product, None without; `rows`: as positions."""

    last: str
    first: tuple[str, int] | None
    rows: np.ndarray


def _readings(rows: np.ndarray, left: Mapping[str, Sequence[Any]]) -> list[_Reading]:
    found: dict[tuple[str, tuple[str, int] | None], list[np.ndarray]] = {}
    for row in rows:
        last, first, wide, inner = (left[f][i] for f, i in zip(_EVALUATED, row, strict=True))
        found.setdefault((last, None if wide else (first, inner)), []).append(row)
    return [_Reading(*how, np.array(same)) for how, same in found.items()]


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
    sums: np.ndarray, row: tuple[int, int, int], readings: Sequence[_Reading], wanted: np.ndarray, dtype: str
) -> np.ndarray:
    """[K, readings] whether sums [K, n] become the board's integers."""
    found = np.zeros((len(sums), len(readings)), bool)
    near = np.flatnonzero(_near(sums, row, wanted, dtype))
    if not len(near):
        return found
    (mantissa, pre, post), low_high, acc = row, integer_range(dtype), sums[near]
    heads = rounded_all(acc, np.int64(pre))
    enough = int(max(heads.max(), -1 - heads.min())).bit_length() + 1  # more bits cut nothing
    made: dict[int, np.ndarray] = {}
    for i, (last, first, _) in enumerate(readings):
        bits = min(first[1], enough) if first else 0
        if bits not in made:
            head = np.clip(heads, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if bits else acc
            y = rounded_all(head * mantissa, np.int64(post if bits else pre + post))
            made[bits] = (np.clip(y, *low_high) == wanted).all(-1)
        found[near, i] = made[bits][ORDER[last], ORDER[first[0]]] if first else made[bits][ORDER[last]]
    return found


def _near(sums: np.ndarray, row: tuple[int, int, int], wanted: np.ndarray, dtype: str) -> np.ndarray:
    """[K] whether the real numbers lie within a rounding of each shift; a sum that may be cut says nothing."""
    mantissa, pre, post = row
    real, slack = sums * float(mantissa) / 2.0 ** (pre + post), 1.001 + mantissa / 2.0**post
    most, least = (np.clip(real + d, *integer_range(dtype)) for d in (slack, -slack))
    cut = np.abs(sums) / 2.0**pre > 2**15 - 2
    return np.asarray((cut | ((least <= wanted) & (wanted <= most))).all(1))
