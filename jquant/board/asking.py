"""A question to a board: one dumped value with its dumped operands."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jquant.board.answers import Answers, Operands, Row
from jquant.board.positions import distinct


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

    def differing(self, rows: np.ndarray, domains: Sequence[Sequence[Any]]) -> np.ndarray:
        """How many integers each row of values has wrong; infinity where they make no march.

        Args:
          rows: [n, asks] positions in `domains`.
        """

        def values(row: np.ndarray) -> Row:
            return tuple(domain[i] for domain, i in zip(domains, row, strict=True))

        digests: dict[bytes | None, int] = {}
        _, lowered = distinct(rows[:, self.answers.lowering])
        of_lowered = np.array(
            [digests.setdefault(self._digest(map(values, group)), len(digests)) for group in groups(rows, lowered)]
        )
        keys = np.concatenate([of_lowered[lowered][:, None], rows[:, self.answers.evaluation]], axis=1)
        _, evaluated = distinct(keys)
        counts = np.array([self.wrong(values(rows[i])) for i in first(evaluated)])
        return counts[evaluated]

    def _digest(self, rows: Iterable[Row]) -> bytes | None:
        """That of the constants of rows which lower alike; some of them may be no march."""
        known = next((row for row in rows if self.answers.is_march(row)), None)
        return None if known is None else self.answers.digest(known)

    def wrong(self, row: Row) -> float:
        found = self.answers(row, self.operands)
        if found is None or found.shape != self.wanted.shape:
            return math.inf
        return int(np.count_nonzero(found != self.wanted))


def groups(rows: np.ndarray, which: np.ndarray) -> list[np.ndarray]:
    """The rows of each number of [0, n)."""
    order = np.argsort(which, kind="stable")
    return np.split(rows[order], np.flatnonzero(np.diff(which[order])) + 1)


def first(which: np.ndarray) -> np.ndarray:
    """Where each number of [0, n) comes first."""
    return np.unique(which, return_index=True)[1]
