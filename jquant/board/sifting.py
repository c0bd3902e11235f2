"""Questions, and what they leave of the worlds: values of fields go where an integer of the board is not theirs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np

from jquant.board.answers import Row
from jquant.board.asking import Question
from jquant.board.boxes import Boxes, Space
from jquant.board.rows import rescaled_of
from jquant.board.worlds import Worlds
from jquant.targets import fields

LIMIT = 40_000  # worlds of one question; more are left to other dumps, which make them fewer
LISTED = 200  # worlds of a question that can be solved; more are solved together
SOLVED = 5_000  # what a question costs that is solved, in worlds
SUMMED = 20_000  # joint values of what a rescaled sum is made of
SAMPLED = 500  # worlds that are tried to find the nearest of more than LIMIT

# Where a field has a value, others read nothing. Each of its values is tried by itself, without them.
SWITCHES: Mapping[str, Mapping[Any, tuple[str, ...]]] = {
    "rescale.high_precision": {
        True: ("rescale.pre_rounding", "rescale.average_pre_rounding", "rescale.inner_bits"),
        False: (),
    }
}


@dataclass(frozen=True)
class Exclusion:
    """Why a value of a field is left out: the integers that a world with it, of those tried a near one, has wrong.

    `differing` of `size`  how many are wrong there; None: the value has no march with what is known
    `index`, `wanted`, `found`  the first wrong one: where it is, what the board made, and what that world makes
    """

    value: Any
    where: tuple[str, str]
    differing: int | None
    size: int
    index: tuple[int, ...] = ()
    wanted: int | None = None
    found: int | None = None


@dataclass
class Sifted:
    """What questions left of the worlds.

    `unexplained`  the questions that no world explains with all the others before
    `postponed`    the questions that depend on too much that is not known
    `late`         those of them that too many worlds explain, with the worlds that they were put to
    """

    worlds: Worlds | Space
    given: Mapping[str, Any] = field(default_factory=dict)
    exclusions: dict[tuple[str, Any], Exclusion] = field(default_factory=dict)
    answered: list[Question] = field(default_factory=list)
    unexplained: list[Question] = field(default_factory=list)
    postponed: list[Question] = field(default_factory=list)
    late: dict[Question, int] = field(default_factory=dict)
    _counts: dict[Question, tuple[int, float]] = field(default_factory=dict)

    @property
    def is_boxed(self) -> bool:
        return isinstance(self.worlds, Space)

    def box(self) -> None:
        """Keeps the worlds as boxes from here on, so that questions which leave too many to be listed are put too."""
        if isinstance(self.worlds, Worlds):
            self.worlds = self.worlds.boxed()
            self.late, self._counts = {}, {}

    def put(self, question: Question) -> None:
        """Leaves out the worlds that have an integer of the question wrong."""
        free = self.free(question)
        before = {name: self.worlds.values(name) for name in free}
        if self.is_solved(question):
            self._put_solved(question, free, before)
            return
        tried = Tried(question, self, exact=False)
        explains = self.worlds.keep(free, tried)
        if explains is None and not self.is_boxed:
            self.box()
            explains = self.worlds.keep(free, tried)
        if not self._noted(question, free, explains):
            return
        for name, values in before.items():
            for value in set(values) - set(self.worlds.values(name)):
                self.exclusions[name, value] = exclusion_of(question, value, *tried.nearest(name, value))

    def _put_solved(self, question: Question, free: tuple[str, ...], before: Mapping[str, tuple[Any, ...]]) -> None:
        """The same for one that is solved. Of an excluded value one world near to those that are left is tried."""
        worlds, good = self.worlds.copy(), self._solved(question)
        explains = _keep(self.worlds, free, good)
        if explains is None and good is not None and not self.is_boxed:
            self.box()
            explains = _keep(self.worlds, free, good)
        if not self._noted(question, free, explains):
            return
        near = self.worlds.nearest({})
        for name, values in before.items():
            for value in set(values) - set(self.worlds.values(name)):
                world = worlds.nearest(near, name, value)
                row = tuple(world[f] if f in free else self.fixed(f) for f in question.asks)
                self.exclusions[name, value] = exclusion_of(question, value, question.wrong(row), row)

    def is_solved(self, question: Question) -> bool:
        """Whether all joint values are tried together, since one by one they are many."""
        solver = question.answers.solver
        if self.worlds.count(self.free(question)) <= LISTED:
            return False
        if solver is None:
            return self._is_sum(question)
        return solver.is_within(self._left(question), self.worlds.count)

    def _is_sum(self, question: Question) -> bool:
        """Whether it is a rescaled sum, with few enough joint values of what the sum is made of."""
        solved, free = rescaled_of(question), self.free(question)
        return solved is not None and self.worlds.count([f for f in solved.others if f in free]) <= SUMMED

    def _left(self, question: Question) -> dict[str, tuple[Any, ...]]:
        free = self.free(question)
        return {f: self.worlds.values(f) if f in free else (self.fixed(f),) for f in question.asks}

    def _noted(self, question: Question, free: tuple[str, ...], explains: bool | None) -> bool:
        """Notes what has become of a question; whether it is answered, and neither unexplained nor late."""
        self.late.pop(question, None)
        if explains:
            self.answered.append(question)
        elif explains is None:
            self.late[question] = self.worlds.count(free)
            self._counts.pop(question, None)
        else:
            self.unexplained.append(question)
        return bool(explains)

    def _solved(self, question: Question) -> Boxes | None:
        """The joint values that explain a question; None: they are too many."""
        solver, free = question.answers.solver, self.free(question)
        if solver is None:
            solved = rescaled_of(question)
            assert solved is not None
            domains = dict(zip(question.asks, self._domains(question), strict=True))
            return solved.good(_Listed(self.worlds, free, domains))
        over = partial(over_left, self.worlds)
        good = solver.good(question.operands.arrays, question.wanted, self._left(question), over)
        return good.project(free).moved([self.worlds.positions(f) for f in free])

    def _domains(self, question: Question) -> list[tuple[Any, ...]]:
        """The values of each field of a question, the one value of those that are not free."""
        free = self.free(question)
        return [self.worlds.domains[f] if f in free else (self.fixed(f),) for f in question.asks]

    def values(self, field: str) -> tuple[Any, ...]:
        """What a field can still be; nothing where no question depends on it."""
        if field in self.given:
            return (self.given[field],)
        return self.worlds.values(field) if field in self.worlds.domains else ()

    def world(self, wanted: Mapping[str, Any], field: str = "", value: Any = None) -> dict[str, Any] | None:
        """What is left that has as many of the wanted values as each table allows; with a value of a field.

        None where the field is not left with it.
        """
        if field and value not in self.values(field):
            return None
        return {**self.worlds.nearest(wanted, field, value), **self.given}

    def explains(self, question: Question) -> bool:
        """Whether a world that is left explains a question."""
        if self.is_solved(question):
            return bool(_keep(self.worlds.copy(), self.free(question), self._solved(question)))
        return self.fewest(question) == 0

    def fewest(self, question: Question) -> float:
        """How many integers the nearest world has wrong."""
        return self._tried(question).nearest()[0]

    def nearest(self, question: Question) -> Row:
        """The values of the fields of a question in the nearest world."""
        return self._tried(question).nearest()[1]

    def dead_end(self, value: Any) -> Exclusion:
        """Why nothing is left: the first question that no world explains."""
        question = self.unexplained[0]
        return exclusion_of(question, value, *self._tried(question).nearest())

    def _tried(self, question: Question) -> "Tried":
        tried, free = Tried(question, self), self.free(question)
        many = self.worlds.count(free) > LIMIT
        tried(self.worlds.some(free, SAMPLED) if many else self.worlds.rows(free))
        return tried

    def free(self, question: Question) -> tuple[str, ...]:
        """The fields of the question that can still be several values."""
        moot = {name for field, value in self.given.items() for name in SWITCHES[field][value]}
        return tuple(f for f in question.asks if f not in self.given and f not in moot)

    def fixed(self, field: str) -> Any:
        """The one value of a field that is given or moot."""
        return self.given[field] if field in self.given else fields()[field][0]

    def count(self, question: Question) -> float:
        """How much a question costs: the worlds that it is put to; of one that is solved, as many as cost that much."""
        stamp, known = self.worlds.changed(self.free(question)), self._counts.get(question)
        if known is None or known[0] != stamp:
            known = self._counts[question] = stamp, self._counted(question)
        return known[1]

    def _counted(self, question: Question) -> float:
        count = self.worlds.count(self.free(question))
        if question in self.late and count > self.late[question] / 2:
            return math.inf
        if not self.is_solved(question):
            return count
        return SOLVED if question.answers.solver else min(count**0.5 * 10, count, LIMIT if self.is_boxed else math.inf)


def _keep(worlds: Worlds | Space, free: Sequence[str], good: Boxes | None) -> bool | None:
    """Leaves the worlds that explain a question which is solved; None where they are too many."""
    return None if good is None else worlds.keep_boxes(good.project(free))


def over_left(worlds: Worlds | Space, names: Sequence[str]) -> np.ndarray:
    """The joint values that are left of some fields, as positions among those that each has left."""
    if not names:
        return np.zeros((1, 0), np.int64)
    columns = zip(names, worlds.rows(names).T, strict=True)
    return np.stack([np.searchsorted(worlds.positions(f), column) for f, column in columns], axis=1)


class _Listed:
    """What is left of the fields of a question, as `Rescaled` asks for it; of those that are not free, one value."""

    def __init__(self, worlds: Worlds | Space, free: Sequence[str], domains: Mapping[str, tuple[Any, ...]]) -> None:
        self.domains, self._worlds, self._free = domains, worlds, free

    def rows(self, fields: Sequence[str]) -> np.ndarray:
        """The distinct joint values of some fields, as positions."""
        free = [f for f in fields if f in self._free]
        some = self._worlds.rows(free) if free else np.zeros((1, 0), np.int64)
        found = np.zeros((len(some), len(fields)), np.int64)
        found[:, [fields.index(f) for f in free]] = some
        return found


class Left(Protocol):
    """What questions left, as far as it is needed to say what is wrong with a dump: `Sifted`, and `Searched`."""

    @property
    def unexplained(self) -> Sequence[Question]: ...
    def explains(self, question: Question) -> bool: ...
    def fewest(self, question: Question) -> float: ...
    def nearest(self, question: Question) -> Row: ...


class Tried:
    """Worlds tried on a question: how many integers each has wrong."""

    def __init__(self, question: Question, sifted: Sifted, *, exact: bool = True) -> None:
        self.exact, self.question, self.free = exact, question, sifted.free(question)
        self.domains = sifted._domains(question)

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """[n, free] positions to whether each explains the question."""
        self.rows = np.zeros((len(rows), len(self.question.asks)), np.int64)
        self.rows[:, [self.question.asks.index(name) for name in self.free]] = rows
        self.counts = self.question.differing(self.rows, self.domains, exact=self.exact)
        return self.counts == 0

    def nearest(self, field: str = "", value: Any = None) -> tuple[float, Row]:
        """The fewest wrong integers, of all worlds or of those with a value of a field, and that world's values."""
        counts = self.counts
        if field:
            at = self.question.asks.index(field)
            counts = np.where(self.rows[:, at] == self.domains[at].index(value), counts, np.inf)
        best = int(counts.argmin())
        return float(counts[best]), tuple(d[i] for d, i in zip(self.domains, self.rows[best], strict=True))


def exclusion_of(question: Question, value: Any, count: float, row: Row) -> Exclusion:
    size = question.wanted.size
    if math.isinf(count):
        return Exclusion(value, question.where, None, size)
    found = question.answers(row, question.operands)
    assert found is not None
    index = tuple(int(i) for i in np.argwhere(found != question.wanted)[0])
    count = int(np.count_nonzero(found != question.wanted))
    return Exclusion(value, question.where, count, size, index, int(question.wanted[index]), int(found[index]))


def sift(
    worlds: Worlds, questions: Sequence[Question], given: Mapping[str, Any] | None = None, *, patience: int = 1
) -> Sifted:
    """Puts the questions to the worlds, that with the fewest joint values next, up to `patience` unexplained ones."""
    result, pending = Sifted(worlds, given or {}), list(questions)
    while pending and len(result.unexplained) < patience:
        counts = [result.count(question) for question in pending]
        at = min(range(len(pending)), key=counts.__getitem__)
        if counts[at] > LIMIT:
            if result.is_boxed:
                break
            result.box()
            continue
        result.put(question := pending.pop(at))
        if question in result.late:
            pending.append(question)  # once more, when other dumps have left fewer worlds
    result.postponed = pending
    return result
