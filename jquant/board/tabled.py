"""A table of an int16 operand, solved: which joint values of the fields of section 6 make a board's integers.

They are millions, which are not tried one by one. But a line has few forms, which many values share; a segment sees one
line and the entries of one table; and the first integers of a segment leave few of them for the next one. The lines are
made by the function that lowering makes them with; the rest is the arithmetic of the reference, for many lines at once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, NamedTuple

import numpy as np

from jquant.board.boxes import Boxes, of_rows
from jquant.board.lone import Constants, Lone
from jquant.board.neutral import NEUTRAL
from jquant.board.roundings import ORDER, rounded_all
from jquant.numerics.tables import line_forms
from jquant.ops.lookup import has_float64, segment_lines
from jquant.reference.tables import within_period
from jquant.targets import value_of
from jquant.types import JQuantError, integer_range

_LINE = ("tables.coefficient_bits", "tables.coefficient_rounding", "tables.max_shift")
_INNER = ("tables.index_rounding", "tables.entry_rounding", "tables.interpolation_rounding")
_OUTER = ("tables.line_rounding", "tables.outer")
_LAID = ("tables.count", "tables.angle_rounding", "tables.entries", "tables.fraction_bits")
READ = (*_LAID, *_LINE, *_INNER, *_OUTER)
MOST_LINES = 20_000_000  # of all tables, for the joint values that are left
_LINES_AT_ONCE = 1_000_000
_CHUNKS = (4, 12, 48)  # integers of a segment that lines are tried on, before all of them
_KEPT = 8  # sets of lines

Values = Mapping[str, tuple[Any, ...]]
Over = Callable[[Sequence[str]], np.ndarray]  # the joint values that are left of some fields, as positions


def is_tabled(lone: Lone, asks: Sequence[str]) -> bool:
    """Whether the value is a table whose boundaries are the same for every march, but for their count."""
    if lone.node is None or not set(_LINE) <= set(asks) <= set(READ):
        return False
    table = getattr(lone.node.op, "table", None)
    fixed = table is not None and table.placement != "least_error"
    return fixed and lone.inputs[0].dtype == "int16" and has_float64(lone.node.op)


class Lines(NamedTuple):
    """The lines of a table for all values of `_LINE`, flattened to C; int64 (alpha, beta, l, r).

    `outer`  [2, C, 4]: left and right
    `inner`  [E and F, N, C, 4], of some numbers of entries and fraction bits
    `valid`  [E and F, C]: whether the last index is below the largest coefficient
    """

    outer: np.ndarray
    inner: np.ndarray
    valid: np.ndarray


class Places(NamedTuple):
    """Some integers of a dump in one segment: [n] each. `sign`: -1 where the result of a mirrored table is negated."""

    x: np.ndarray
    sign: np.ndarray
    wanted: np.ndarray

    def at(self, which: np.ndarray) -> "Places":
        return Places(self.x[which], self.sign[which], self.wanted[which])


@dataclass(eq=False)
class Tabled:
    """A value that is a table of an int16 operand."""

    lone: Lone
    asks: tuple[str, ...]
    _constants: dict[tuple[Any, ...], Constants | None] = field(default_factory=dict)
    _lines_of: dict[tuple[Any, ...], Lines] = field(default_factory=dict)

    def good(
        self, operands: Sequence[np.ndarray], wanted: np.ndarray, left: Mapping[str, Sequence[Any]], over: Over
    ) -> Boxes:
        """The joint values that make `wanted`, as boxes of positions in `left`.

        Args:
          left: for each field that is asked, the values that are tried.
          over: joint positions in `left` of fields that have several.
        """
        values = {f: tuple(left[f]) if f in self.asks else (value_of(NEUTRAL, f),) for f in READ}
        found, made = [np.zeros((0, len(READ)), np.uint64)], _Made([len(values[f]) for f in _LINE])
        allowed = self._allowed(values, over)
        for laid, good, ends in self._explaining(operands[0].ravel(), wanted.ravel(), values, allowed):
            own = np.uint64(1) << np.array(laid, np.uint64)
            for masks in made.boxes(good, ends):
                found.append(np.concatenate([np.tile(own, (len(masks), 1)), masks], axis=1))
        return Boxes(READ, np.concatenate(found)).project(self.asks).merged()

    def is_within(self, left: Mapping[str, Sequence[Any]], count: Callable[[Sequence[str]], int]) -> bool:
        """Whether so many lines can be tried."""
        tables = sum(left["tables.count"]) if "tables.count" in self.asks else 6
        return tables * count([f for f in (*_LAID[2:], *_LINE) if f in self.asks and len(left[f]) > 1]) <= MOST_LINES

    def _allowed(self, values: Values, over: Over) -> np.ndarray:
        """[E and F, C] bool: the joint values that are left of what lines are made of."""
        names = (*_LAID[2:], *_LINE)
        free = [f for f in names if len(values[f]) > 1]
        rows = np.zeros((len(some := over(free)), len(names)), np.int64)
        rows[:, [names.index(f) for f in free]] = some
        found = np.zeros([len(values[f]) for f in names], bool)
        found[tuple(rows.T)] = True
        return found.reshape(found.shape[0] * found.shape[1], -1)

    def _explaining(
        self, x: np.ndarray, wanted: np.ndarray, values: Values, allowed: np.ndarray
    ) -> Iterator[tuple[tuple[int, ...], np.ndarray, np.ndarray]]:
        """Positions of the fields of `_LAID`, and which joint values of the others explain the dump, as `_joint`."""
        entries, bits = values["tables.entries"], values["tables.fraction_bits"]
        pairs, which = list(np.ndindex(len(entries), len(bits))), np.flatnonzero(allowed.any(1))
        for i, count in enumerate(values["tables.count"]):
            some = self._made(count, entries[0], values["tables.entry_rounding"][0])
            if some is None:
                continue
            at_once = max(_LINES_AT_ONCE // (count * allowed.shape[1]), 1)
            for start in range(0, len(which), at_once):
                own = which[start : start + at_once]
                lines = self._lines(count, some, values, own)
                for j, rounding in enumerate(values["tables.angle_rounding"]):
                    segments = _segments(x, wanted, some, rounding)
                    outer = self._outer(segments, lines, values)
                    for p, (k, m) in enumerate(pairs[o] for o in own):
                        made = [self._made(count, entries[k], v) for v in values["tables.entry_rounding"]]
                        tables = np.stack([np.asarray(c["entries"], np.int64) for c in made if c is not None])
                        valid = lines.valid[p] & allowed[own[p]]
                        joint = self._joint(segments, lines.inner[p], valid, tables, bits[m], outer, values)
                        if joint is not None:
                            yield (i, j, k, m), *joint

    def _joint(
        self,
        segments: Mapping[int, Places],
        lines: np.ndarray,
        valid: np.ndarray,
        tables: np.ndarray,
        bits: int,
        outer: np.ndarray,
        values: Values,
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """What explains integers between the boundaries, [C, *_INNER] bool, and beyond, [C, entry roundings, *_OUTER].

        For one number of entries and fraction bits; None where nothing explains all.

        lines: [N, C, 4]; valid: [C]; tables: [entry roundings, N, E]; outer: [C, line roundings], of the lines.
        """
        ends = self._ends(segments, tables, outer, values) & valid[:, None, None, None]
        sizes = [len(values[f]) for f in _INNER]
        good = np.broadcast_to(ends.any((2, 3))[:, None, :, None], (len(ends), *sizes)).copy()
        for s in sorted(segments, key=lambda s: -len(segments[s].x)):
            if 0 < s <= tables.shape[1]:
                some = good.any((1, 2, 3))
                if not some.any():
                    return None
                own, which = _distinct(lines[s - 1, some])
                good[some] &= self._inner(segments[s], own, tables[:, s - 1], bits, values)[which]
        return (good, ends) if good.any() else None

    def _ends(
        self, segments: Mapping[int, Places], tables: np.ndarray, outer: np.ndarray, values: Values
    ) -> np.ndarray:
        """[C, entry roundings, line roundings, outer]: what explains the integers beyond the tables."""
        constant = np.ones(len(tables), bool)
        for s, own in ((0, tables[:, 0, 0]), (tables.shape[1] + 1, tables[:, -1, -1])):
            if s in segments:
                constant &= self._equal(own[:, None], segments[s])
        fits = outer[:, 0] >= 0
        by = {
            "line": np.broadcast_to((outer > 0)[:, None], (len(outer), len(tables), outer.shape[1])),
            "constant": np.broadcast_to(
                (fits[:, None] & constant)[..., None], (*fits.shape, len(tables), outer.shape[1])
            ),
        }
        return np.stack([by[v] for v in values["tables.outer"]], axis=-1)

    def _outer(self, segments: Mapping[int, Places], lines: Lines, values: Values) -> np.ndarray:
        """[C, line roundings]: 1 where the outer lines make the integers, 0 where not, -1 where they leave int32."""
        found = np.ones((lines.outer.shape[1], len(values["tables.line_rounding"])), np.int64)
        for s, each in ((0, lines.outer[0]), (lines.inner.shape[1] + 1, lines.outer[1])):
            if s in segments:
                own, which = _distinct(each)
                total, fits = _totals(own, segments[s].x)
                y = _by(values["tables.line_rounding"], rounded_all(total, own[:, 3:]))
                equal = self._equal(y, segments[s]).T
                found = np.minimum(found, np.where(fits[:, None], equal, -1)[which])
        return found

    def _inner(self, places: Places, lines: np.ndarray, tables: np.ndarray, bits: int, values: Values) -> np.ndarray:
        """[lines, *_INNER]: which of them make the integers of one segment."""
        found = np.zeros((len(lines), *(len(values[f]) for f in _INNER)), bool)
        order = np.random.default_rng(0).permutation(len(places.x))  # neighbours say the same
        left, start = np.arange(len(lines)), 0
        alive = np.ones_like(found)
        for end in (*(c for c in _CHUNKS if c < len(order)), len(order)):
            some = places.at(order[start:end])
            good = self._interpolated(some, lines[left], tables, bits, values)
            alive[left] &= good
            left, start = left[alive[left].any((1, 2, 3))], end
            if not len(left):
                return found
        found[left] = alive[left]
        return found

    def _interpolated(
        self, places: Places, lines: np.ndarray, tables: np.ndarray, bits: int, values: Values
    ) -> np.ndarray:
        """[lines, *_INNER] for some integers; one of another sign of the same line and table says the same."""
        total, fits = _totals(lines, places.x)
        last = (tables.shape[1] - 1) << bits
        index = np.clip(_by(values["tables.index_rounding"], rounded_all(total, lines[:, 3:])), 0, last)
        low, fraction = index >> bits, index & ((1 << bits) - 1)
        further = np.minimum(low + 1, tables.shape[1] - 1)
        base = tables[:, low]  # [entry roundings, index roundings, lines, n]
        rise = (tables[:, further] - base) * fraction
        y = base + _by(values["tables.interpolation_rounding"], rounded_all(rise, np.array(bits)))
        return self._equal(y, places).transpose(3, 2, 1, 0) & fits[:, None, None, None]

    def _equal(self, y: np.ndarray, places: Places) -> np.ndarray:
        """[...] whether integers of shape [..., n], before the sign is put back, are the board's."""
        low, high = integer_range(self.lone.output.dtype)
        return (np.clip(np.clip(y, low, high) * places.sign, low, high) == places.wanted).all(-1)

    def _made(self, count: int, entries: int, rounding: str) -> Constants | None:
        """Boundaries and entries, whatever the lines."""
        key = count, entries, rounding
        if key not in self._constants:
            fields = {"tables.count": count, "tables.entries": entries, "tables.entry_rounding": rounding}
            try:
                self._constants[key] = self.lone.constants(NEUTRAL.with_fields(fields))
            except JQuantError:
                self._constants[key] = None
        return self._constants[key]

    def _lines(self, count: int, some: Constants, values: Values, pairs: np.ndarray) -> Lines:
        """pairs: which of all entries and fraction bits."""
        key = count, pairs.tobytes(), *(values[f] for f in ("tables.entries", "tables.fraction_bits", *_LINE))
        if key not in self._lines_of:
            if len(self._lines_of) > _KEPT:
                self._lines_of.clear()
            self._lines_of[key] = self._lines_made(count, some, values, pairs)
        return self._lines_of[key]

    def _lines_made(self, count: int, some: Constants, values: Values, pairs: np.ndarray) -> Lines:
        assert self.lone.node is not None
        form = NEUTRAL.with_fields({"tables.count": count}).tables
        x_scale, y_scale = (np.asarray(v.scale, np.float32) for v in (self.lone.inputs[0], self.lone.output))
        ends, heights, anchor = segment_lines(self.lone.node.op, x_scale, y_scale, form, np.asarray(some["boundaries"]))
        last = np.array([(e - 1) << b for e in values["tables.entries"] for b in values["tables.fraction_bits"]])[pairs]
        n = len(ends) - 2
        inner = np.zeros((len(last), n, 2), np.int32)
        inner[..., 1] = last[:, None]
        given = (
            np.concatenate([ends[[0, -1]], np.tile(ends[1:-1], (len(last), 1))]),
            np.concatenate([heights[[0, -1]], inner.reshape(-1, 2)]),
            np.concatenate([anchor[[0, -1]], np.tile(anchor[1:-1], len(last))]),
        )
        bits, roundings, shifts = (values[f] for f in _LINE)
        made = [self._by_shift(given, b, r, shifts) for b in bits for r in roundings]
        whole = np.concatenate(made, axis=1)
        valid = last[:, None] < 2 ** np.repeat(np.array(bits), len(roundings) * len(shifts))
        return Lines(whole[:2], whole[2:].reshape(len(last), n, *whole.shape[1:]), valid)

    @staticmethod
    def _by_shift(given: Any, bits: int, rounding: Any, shifts: Sequence[int]) -> np.ndarray:
        """[S, max_shift, 4] lines."""
        form = replace(NEUTRAL.tables, coefficient_bits=bits, coefficient_rounding=rounding, max_shift=max(shifts))
        alpha, beta, left, fits = (np.asarray(v) for v in line_forms(*given, form=form))
        best = np.maximum.accumulate(np.where(fits, np.arange(fits.shape[1]), 0), axis=1)[:, list(shifts)]
        return np.stack([*(np.take_along_axis(v, best, 1) for v in (alpha, beta, left)), best], axis=-1).astype(
            np.int64
        )


class _Made:
    """What explains a dump as boxes. Lines that go with the same values of the other fields are together."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._positions = np.stack(np.unravel_index(np.arange(prod(sizes)), sizes), axis=1)
        self._boxed: dict[tuple[tuple[str, ...], bytes], np.ndarray] = {}

    def boxes(self, good: np.ndarray, ends: np.ndarray) -> Iterator[np.ndarray]:
        """Masks of (*_LINE, *_INNER, *_OUTER) for good [C, *_INNER] and ends [C, entry roundings, *_OUTER]."""
        for e in range(good.shape[2]):
            inner, outer = good[:, :, e], ends[:, e]
            some = np.flatnonzero(inner.any((1, 2)) & outer.any((1, 2)))
            if not len(some):
                continue
            whole = np.concatenate([inner[some].reshape(len(some), -1), outer[some].reshape(len(some), -1)], axis=1)
            _, which = np.unique(np.packbits(whole, axis=1), axis=0, return_inverse=True)
            entry = np.array([[1 << e]], np.uint64)
            for i in range(which.max() + 1):
                lines = some[which.ravel() == i]
                first = lines[0]
                between, beyond = np.argwhere(inner[first]), np.argwhere(outer[first])
                parts = [
                    self._of(_LINE, self._positions[lines]),
                    self._of((_INNER[0], _INNER[2]), between),
                    self._of(_OUTER, beyond),
                ]
                a, b, c = np.indices([len(part) for part in parts]).reshape(3, -1)
                line, (index, last), end = parts[0][a], parts[1][b].T, parts[2][c]
                made = [line, index[:, None], np.tile(entry, (len(a), 1)), last[:, None], end]
                yield np.concatenate(made, axis=1)

    def _of(self, fields: Sequence[str], rows: np.ndarray) -> np.ndarray:
        if (key := (tuple(fields), rows.tobytes())) not in self._boxed:
            self._boxed[key] = of_rows(fields, rows).masks
        return self._boxed[key]


def _segments(x: np.ndarray, wanted: np.ndarray, some: Constants, angle_rounding: str) -> dict[int, Places]:
    """The integers by the segment that owns them, 0 and N + 1 being the outer lines."""
    mirror, boundaries = int(some["mirror"]), np.asarray(some["boundaries"])
    if "turn" in some:
        x = within_period(x, np.asarray(some["turn"], np.int64), angle_rounding)
    sign = np.where((mirror == -1) & (x < 0), -1, 1)
    x = np.abs(x) if mirror else x
    whole = Places(x, sign, wanted)
    owner = np.searchsorted(boundaries, x, side="right")
    return {int(s): whole.at(owner == s) for s in np.unique(owner)}


def _totals(lines: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[lines, n] sums, and whether all of a line lie within int32."""
    offset = lines[:, 1:2] << lines[:, 2:3]
    total = lines[:, :1] * x + offset
    inside = (total >= -(2**31)) & (total < 2**31) & (offset >= -(2**31)) & (offset < 2**31)
    return total, inside.all(1)


def _by(roundings: Sequence[str], made: np.ndarray) -> np.ndarray:
    """Of [5, ...] by every rounding those of some."""
    return made[[ORDER[rounding] for rounding in roundings]]


def _distinct(lines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct lines of [n, 4], and which of them each is."""
    code = lines[:, 0] + 2**17
    for column, size in zip(lines.T[1:], (2**18, 2**6, 2**6), strict=True):
        code = code * size + column + (2**17 if size == 2**18 else 0)
    _, first, which = np.unique(code, return_index=True, return_inverse=True)
    return lines[first], which
