"""A question to a board: one dumped value with its dumped operands."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from jquant.board.answers import Answers, Operands, Row
from jquant.board.positions import distinct, groups
from jquant.reference.sampling import coordinate_bits

_FRACTION = ("grid.coordinate_bits", "grid.max_fraction_bits")
_LAST = {"Interpolate": "resize.rounding", "Cat": "rescale.post_rounding"}  # what rounds a result once, after all else


@dataclass(frozen=True, eq=False)
class Question:
    """One dumped value with its dumped operands: all that it takes to try values of fields on it.

    `where`    (probe, value)
    `answers`  what it can be, by the values of the fields that it depends on
    `wanted`   the board's integers
    """

    where: tuple[str, str]
    answers: Answers
    operands: Operands
    wanted: np.ndarray

    @property
    def asks(self) -> tuple[str, ...]:
        return self.answers.asks

    def differing(self, rows: np.ndarray, domains: Sequence[Sequence[Any]], *, exact: bool = True) -> np.ndarray:
        """How many integers each row of values has wrong; infinity where they make no march.

        Args:
          rows: [n, asks] positions in `domains`.
          exact: False counts all of them where no last rounding mends a row, which then is not evaluated.
        """
        rows = self._with_like_bits(rows, domains)

        def values(row: np.ndarray) -> Row:
            return tuple(domain[i] for domain, i in zip(domains, row, strict=True))

        digests: dict[bytes | None, int] = {}
        _, lowered = distinct(rows[:, self.answers.lowering])
        of_lowered = np.array(
            [digests.setdefault(self._digest(map(values, group)), len(digests)) for group in groups(rows, lowered)]
        )
        keys = np.concatenate([of_lowered[lowered][:, None], rows[:, self.answers.evaluation]], axis=1)
        _, evaluated = distinct(keys)
        at = first(evaluated)
        far = np.zeros(len(at), bool) if exact else self._is_far(rows[at], of_lowered[lowered][at], domains)
        tried = zip(at, far, strict=True)
        counts = np.array([self.wanted.size if f else self.wrong(values(rows[i])) for i, f in tried])
        return counts[evaluated]

    def _with_like_bits(self, rows: np.ndarray, domains: Sequence[Sequence[Any]]) -> np.ndarray:
        """Of a grid of coordinates: the first row with as many fraction bits, which is all that it reads."""
        node = self.answers.lone.node
        if node is None or self.answers.lone.operator != "GridSample" or not set(_FRACTION) <= set(self.asks):
            return rows
        columns = [self.asks.index(f) for f in _FRACTION]
        pairs, which = distinct(rows[:, columns])
        axes = [slice(1, 3) if getattr(node.op, "channels_last", False) else slice(2, 4), slice(1, 3)]
        sides = [n for v, axis in zip(self.operands.arrays, axes, strict=True) for n in v.shape[axis]]
        firsts: dict[int, np.ndarray] = {}
        for pair in pairs:
            form = SimpleNamespace(**{f[5:]: domains[c][i] for f, c, i in zip(_FRACTION, columns, pair, strict=True)})
            firsts.setdefault(coordinate_bits(SimpleNamespace(grid=form), *sides), pair)  # type: ignore[arg-type]
            pair[:] = firsts[coordinate_bits(SimpleNamespace(grid=form), *sides)]  # type: ignore[arg-type]
        found = rows.copy()
        found[:, columns] = pairs[which]
        return found

    def _is_far(self, rows: np.ndarray, lowered: np.ndarray, domains: Sequence[Sequence[Any]]) -> np.ndarray:
        """Which rows have an integer that no last rounding mends: each of them is rounded down, or to 1 more."""
        name = _LAST.get(self.answers.lone.operator)
        if name not in self.asks or len(domains[column := self.asks.index(name)]) < 3:
            return np.zeros(len(rows), bool)
        others = [i for i in self.answers.evaluation if i != column]
        tried, which = distinct(np.concatenate([lowered[:, None], rows[:, others]], axis=1))
        far = np.zeros(len(tried), bool)
        for i, at in enumerate(first(which)):
            row = [domain[j] for domain, j in zip(domains, rows[at], strict=True)]
            row[column] = "floor"
            found = self.answers(tuple(row), self.operands)
            more = None if found is None or found.shape != self.wanted.shape else self.wanted - found
            far[i] = more is not None and bool(((more < 0) | (more > 1)).any())
        return far[which]

    def _digest(self, rows: Iterable[Row]) -> bytes | None:
        """That of the constants of rows which lower alike; some of them may be no march."""
        known = next((row for row in rows if self.answers.is_march(row)), None)
        return None if known is None else self.answers.digest(known)

    def wrong(self, row: Row) -> float:
        found = self.answers(row, self.operands)
        if found is None or found.shape != self.wanted.shape:
            return math.inf
        return int(np.count_nonzero(found != self.wanted))


def first(which: np.ndarray) -> np.ndarray:
    """Where each number of [0, n) comes first."""
    return np.unique(which, return_index=True)[1]
