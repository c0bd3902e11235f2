"""Questions about the values of a network put to all joint values of the fields, kept as boxes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from jquant.board.answers import Row, Solver
from jquant.board.asking import Question
from jquant.board.boxes import Boxes, Space, of_rows
from jquant.board.networks import Given
from jquant.board.probes import domains
from jquant.board.rows import Rescaled, rescaled_of
from jquant.board.sifting import Exclusion, exclusion_of, over_left
from jquant.targets import value_of
from jquant.types import Target

LISTED = 50_000  # joint values of one question that are tried one by one
LISTED_RATHER = 200  # joint values of one that can be solved; more are solved together
SOLVED = 5_000  # what a question costs that is solved, in joint values
SUMMED = 20_000  # joint values of what a rescaled sum is made of
LAST_ROUNDINGS = ("resize.rounding",)  # of fields that round a result once, after all else
_TRIED = 128  # joint values that are tried to find the nearest one


@dataclass
class Searched:
    """What questions left of the joint values of all fields; as `Sifted`, which lists them."""

    worlds: Space
    base: Target
    given: Mapping[str, Any] = field(default_factory=dict)
    exclusions: dict[tuple[str, Any], Exclusion] = field(default_factory=dict)
    answered: list[Question] = field(default_factory=list)
    unexplained: list[Question] = field(default_factory=list)
    postponed: list[Question] = field(default_factory=list)
    _left: dict[int, int] = field(default_factory=dict)

    def put(self, question: Question) -> bool:
        """Leaves out the joint values that have an integer of the question wrong; False where they are too many."""
        before, had = self.worlds.copy(), {f: self.worlds.values(f) for f in question.asks}
        kept = None if (good := self._good(question)) is None else self.worlds.keep_boxes(good)
        if kept is None:
            self._left[id(question.answers)] = self.worlds.count(question.asks)
            return False
        if not kept:
            self.unexplained.append(question)
            return True
        self.answered.append(question)
        for name, values in had.items():
            for value in set(values) - set(self.worlds.values(name)):
                row = self._row(question, before, name, value)
                self.exclusions[name, value] = exclusion_of(question, value, self._wrong(question, row), row)
        return True

    def count(self, question: Question) -> float:
        """How much a question costs: joint values to list, infinity where they are too many."""
        if (failed := self._left.get(id(question.answers))) and self.worlds.count(question.asks) > failed / 16:
            return math.inf
        if self._joint(question):
            return SOLVED
        solved, lone = self._solver(question), question.answers.lone
        listed = tuple(f for f in question.asks if not isinstance(lone, Given) or f not in lone.held)
        many = self.worlds.count(solved.others if solved else listed)
        return math.inf if many > (SUMMED if solved else LISTED) else many * (100 if solved else 1)

    def values(self, field: str) -> tuple[Any, ...]:
        """What a field can still be; nothing where no question depends on it."""
        return self.worlds.values(field) if field in self.worlds.domains else ()

    def world(self, wanted: Mapping[str, Any], field: str = "", value: Any = None) -> dict[str, Any] | None:
        """What is left that has as many of the wanted values as each table allows; with a value of a field.

        None where the field is not left with it.
        """
        if field and value not in self.values(field):
            return None
        return self.worlds.nearest(wanted, field, value)

    def explains(self, question: Question) -> bool:
        """Whether one of those that were tried explains a question."""
        return self.fewest(question) == 0

    def fewest(self, question: Question) -> float:
        """How many integers the nearest of those that were tried has wrong."""
        return self._wrong(question, self.nearest(question))

    def nearest(self, question: Question) -> Row:
        """Of some joint values that are left, those with the fewest wrong integers."""
        return min(self._some(question), key=lambda row: self._wrong(question, row))

    def _some(self, question: Question) -> list[Row]:
        """The joint values that are left which are nearest to the base, and others at random."""
        domains = [self.worlds.domains[f] for f in question.asks]
        some = self.worlds.some(question.asks, _TRIED)
        rows = [tuple(d[i] for d, i in zip(domains, row, strict=True)) for row in some]
        return list(dict.fromkeys([self._row(question, self.worlds), *rows]))

    def _good(self, question: Question) -> Boxes | None:
        if solved := self._solver(question):
            return solved.good(self.worlds)
        if solver := self._joint(question):
            over = partial(over_left, self.worlds)
            found = solver.good(question.operands.arrays, question.wanted, self._values_left(question), over)
            return found.moved([self.worlds.positions(f) for f in found.fields])
        if isinstance(lone := question.answers.lone, Given):
            return self._good_where_held(question, lone.held)
        return self._listed(question, question.asks)

    def _good_where_held(self, question: Question, held: Mapping[str, Any]) -> Boxes:
        """Constants that are given say nothing of a march for which they would have been others."""
        whole = np.array([2 ** len(self.worlds.domains[f]) - 1 for f in question.asks], np.uint64)
        own = {f: self.worlds.domains[f].index(v) for f, v in held.items() if v in self.worlds.domains[f]}
        boxes, here = [], whole.copy()
        for f in held:
            column = question.asks.index(f)
            bit = np.uint64(1 << own[f] if f in own else 0)
            other = here.copy()
            other[column] &= ~bit
            boxes.append(other)
            here[column] = bit
        made = self._listed(question, tuple(f for f in question.asks if f not in held), held)
        for mask in made.masks if here.all() else ():
            box = here.copy()
            box[[question.asks.index(f) for f in made.fields]] = mask
            boxes.append(box)
        found = np.array(boxes, np.uint64).reshape(len(boxes), len(whole))
        return Boxes(question.asks, found[(found != 0).all(1)])

    def _listed(self, question: Question, free: tuple[str, ...], held: Mapping[str, Any] | None = None) -> Boxes:
        """The joint values of some fields of the question that make the board's integers, tried one by one."""
        given, domains = held or {}, self.worlds.domains
        values = [(given[f],) if f in given else domains[f] for f in question.asks]
        some = self.worlds.rows(free)
        whole = np.zeros((len(some), len(values)), np.int64)
        whole[:, [question.asks.index(f) for f in free]] = some
        near = self._near(question, whole, values)
        good = near[question.differing(near, values) == 0] if len(near) else near
        return of_rows(free, good[:, [question.asks.index(f) for f in free]])

    def _near(self, question: Question, rows: np.ndarray, values: Sequence[Sequence[Any]]) -> np.ndarray:
        """Without the joint values that no last rounding mends: each of them is rounded down, or to 1 more."""
        names = [f for f in question.asks if f in LAST_ROUNDINGS]
        if not names or not len(rows) or "floor" not in values[column := question.asks.index(names[0])]:
            return rows
        down = rows.copy()
        down[:, column] = list(values[column]).index("floor")
        tried, which = np.unique(down, axis=0, return_inverse=True)
        near = [self._is_near(question, tuple(v[i] for v, i in zip(values, row, strict=True))) for row in tried]
        return rows[np.array(near)[which.ravel()]]

    @staticmethod
    def _is_near(question: Question, row: Row) -> bool:
        found = question.answers(row, question.operands)
        if found is None or found.shape != question.wanted.shape:
            return False
        more = question.wanted - found
        return bool(((more == 0) | (more == 1)).all())

    @staticmethod
    def _solver(question: Question) -> Rescaled | None:
        return None if isinstance(question.answers.lone, Given) else rescaled_of(question)

    def _joint(self, question: Question) -> Solver | None:
        """What solves a table, a grid or averages of regions, where it is within reach; few values are listed."""
        if isinstance(question.answers.lone, Given) or self.worlds.count(question.asks) <= LISTED_RATHER:
            return None
        solver = question.answers.solver
        return solver if solver and solver.is_within(self._values_left(question), self.worlds.count) else None

    def _values_left(self, question: Question) -> dict[str, tuple[Any, ...]]:
        return {f: self.worlds.values(f) for f in question.asks}

    def _row(self, question: Question, worlds: Space, field: str = "", value: Any = None) -> Row:
        """The joint values that are left which are nearest to the base; with a value of a field."""
        found = worlds.nearest({f: value_of(self.base, f) for f in question.asks}, field, value)
        return tuple(found[f] for f in question.asks)

    @staticmethod
    def _wrong(question: Question, row: Row) -> float:
        found = question.answers(row, question.operands)
        if found is None or found.shape != question.wanted.shape:
            return math.inf
        return int(np.count_nonzero(found != question.wanted))


def search(questions: Sequence[Question], base: Target, held: Sequence[str] = ()) -> Searched:
    """Puts the questions to the joint values, the one that costs least next, as long as one is within reach."""
    asked, known = dict.fromkeys(f for question in questions for f in question.asks), domains()
    values = {f: (value_of(base, f),) if f in held else known[f] for f in asked}
    result, pending = Searched(Space(values), base), list(questions)
    while pending:
        order = sorted(range(len(pending)), key=lambda i: result.count(pending[i]))
        put = next((i for i in order if not math.isinf(result.count(pending[i])) and result.put(pending[i])), None)
        if put is None:
            break
        pending.pop(put)
    result.postponed = pending
    return result
