"""The rescale of a node, solved: which joint values of the fields of section 3 make a board's integers of a sum.

They are too many to be tried one by one. But a row of constants is a mantissa and two shifts, so that few rows are
distinct; and a row makes real numbers that no rounding moves by more than its steps, so that fewer still are near.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from jquant.board.answers import ONLY_EVALUATED, ONLY_LOWERED, digest_of
from jquant.board.asking import Question
from jquant.board.boxes import Boxes, of_rows, product
from jquant.board.lone import Constants, Lone
from jquant.board.neutral import NEUTRAL
from jquant.board.roundings import ORDER, rounded_all
from jquant.reference.arithmetic import round_shift, saturate
from jquant.reference.call import channels_back, channels_to_last
from jquant.types import JQuantError, QConfigError, Target, integer_range

ROW = ("mantissa", "pre", "post")
_BELOW = ("negative_mantissa", "negative_pre", "negative_post")  # of PReLU, for operands below 0
_MANTISSA = ("rescale.mantissa_bits", "rescale.mantissa_rounding", "rescale.mantissa_overflow", "rescale.ratio_bits")
_OPEN = {"rescale.max_pre_shift": 31, "rescale.max_post_shift": 31}
_WIDEST = {"rescale.post_shift_int8": 31, "rescale.post_shift_int16": 31}
_FINEST = dict(zip(_MANTISSA, (15, "floor", "clamp", 15), strict=True))
_READ = {"rescale.post_rounding", "rescale.max_post_shift", "rescale.max_pre_shift", "rescale.high_precision"}
_ALIKE = {"half_away": "half_up", "toward_zero": "floor"}  # of a mantissa, which is positive
MOST_ROWS = 5_000  # of constants that are tried on the sums of a node; beyond, the question is left
MOST_LOWERED = 3_000  # times that a node is lowered for one question, in vain for those before it
_SAMPLE = 96  # integers that each row is tried on before all of them


class Left(Protocol):
    """Values of fields, of which some joint ones are left: `rows` gives those of some fields, as positions."""

    @property
    def domains(self) -> Mapping[str, Sequence[Any]]: ...
    def rows(self, fields: Sequence[str]) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class Sums:
    """What a node rescales, for some values of its other fields: `acc`, and the most that its result can be."""

    acc: np.ndarray
    target: Target
    upper: np.ndarray | None


@dataclass(eq=False)
class Rescaled:
    """A question whose node rescales a sum. Its fields are those of section 3 and others, which make the sum."""

    question: Question
    _lowered: dict[tuple, Any] = field(default_factory=dict)
    _made: dict[tuple, Any] = field(default_factory=dict)
    _boxed: dict[tuple, Boxes] = field(default_factory=dict)

    def again(self, question: Question) -> "Rescaled":
        """The same for other integers of the board."""
        return replace(self, question=question)

    @property
    def lone(self) -> Lone:
        return self.question.answers.lone

    def own(self, names: Sequence[str]) -> tuple[str, ...]:
        return tuple(f for f in self.question.asks if f in names)

    @property
    def others(self) -> tuple[str, ...]:
        return tuple(f for f in self.question.asks if not f.startswith("rescale."))

    @property
    def shifts(self) -> tuple[str, ...]:
        return self.own((*_OPEN, *_WIDEST))

    @property
    def evaluated(self) -> tuple[str, ...]:
        return tuple(f for f in self.question.asks if f.startswith("rescale.") and f in ONLY_EVALUATED)

    def good(self, space: Left) -> Boxes | None:
        """The joint values of the fields of the question that make the board's integers; None: too many are near."""
        by_totals: dict[bytes, _Shifts] = {}
        found, tried, before = [], 0, len(self._lowered)
        for rows, sums, constants in self._classes(space):
            others = of_rows(self.others, rows)
            for parts in self._solved(space, sums, constants, by_totals):
                tried += 1
                if tried > MOST_ROWS or len(self._lowered) - before > MOST_LOWERED:
                    return None
                if parts is None:
                    continue
                whole = product([others, *parts])
                found.append(whole.masks[:, [whole.fields.index(f) for f in self.question.asks]])
        if not found:
            return Boxes(self.question.asks, np.zeros((0, len(self.question.asks)), np.uint64))
        return Boxes(self.question.asks, np.concatenate(found)).merged()

    def _classes(self, space: Left) -> Iterator[tuple[np.ndarray, Sums, Constants]]:
        """The joint values of the other fields, those together that make the same sum; with it and its constants."""
        rows = space.rows(self.others)
        groups: dict[tuple, tuple[tuple[Any, ...], Constants, list[np.ndarray]]] = {}
        reads = [i for i, f in enumerate(self.others) if f not in ONLY_EVALUATED]
        evaluated = [i for i, f in enumerate(self.others) if f not in ONLY_LOWERED]
        for row in rows:
            values = tuple(space.domains[f][i] for f, i in zip(self.others, row, strict=True))
            key = tuple(values[i] for i in reads)
            if key not in self._made:
                target = self._target(values)
                constants = target and self._constants(target)
                digest = constants and digest_of([np.asarray(constants[role]) for role in sorted(constants)])
                self._made[key] = constants, digest
            constants, digest = self._made[key]
            if constants is not None:
                groups.setdefault((digest, *row[evaluated]), (values, constants, []))[2].append(row)
        for values, constants, same in groups.values():
            target = self._target(values)
            sums = None if target is None else self._sums(target, constants)
            if sums is not None:
                yield np.array(same), sums, constants

    def _sums(self, target: Target, constants: Constants) -> Sums | None:
        plain = {role: np.full_like(constants[role], int("mantissa" in role)) for role in _roles(constants)}
        upper = constants.get("upper")
        if upper is not None:
            plain["upper"] = np.full_like(upper, 2**31 - 1)
        whole = _in_acc(self.lone)
        march = target.with_fields({"rescale.high_precision": True, "rescale.post_rounding": "floor"})
        try:
            acc = whole.evaluate(march, {**constants, **plain}, self.question.operands.arrays)
        except JQuantError:
            return None
        return Sums(acc, target, None if upper is None else np.asarray(upper, np.int64))

    def _solved(
        self, space: Left, sums: Sums, constants: Constants, by_totals: "dict[bytes, _Shifts]"
    ) -> Iterator[tuple[Boxes, Boxes, Boxes] | None]:
        """For each row of constants that is near: boxes of mantissa, shifts and the rest that make the integers."""
        wanted, acc = self.question.wanted.ravel(), sums.acc.ravel()
        if wanted.shape != acc.shape or sums.acc.shape != self.question.wanted.shape:
            return
        at = _sample(acc, wanted)
        shifts, readings = space.rows(self.shifts), self._readings(space)
        upper = None if sums.upper is None else np.broadcast_to(sums.upper, sums.acc.shape).ravel()
        narrow = self._narrow(sums)
        every = tuple(space.domains[f] for f in self.shifts)
        given = np.stack([np.array(d)[c] for d, c in zip(every, shifts.T, strict=True)], axis=1)
        for rows, mantissa, total in self._of_mantissas(space, sums, constants):
            m, t = (np.broadcast_to(v, sums.acc.shape).ravel().astype(np.int64) for v in (mantissa, total))
            totals, column = np.unique(2 * t + narrow, return_inverse=True)
            if (key := totals.tobytes()) not in by_totals:
                by_totals[key] = _Shifts.of(self.shifts, shifts, given, *np.divmod(totals, 2))
            made = by_totals[key]
            yield None
            top = None if upper is None else upper[at]
            near = made.near(acc[at], m[at], column[at], wanted[at], self.lone.output.dtype, top)
            good = self._explaining(readings, made, _Along(acc, m, column, wanted, upper), near)
            for which, ds in _alike(good):
                values = np.array([row for i in np.flatnonzero(which) for row in readings[i].rows])
                yield self._boxes(_MANTISSA, rows), made.boxes(ds), self._boxes(self.evaluated, values)

    def _boxes(self, names: Sequence[str], rows: np.ndarray) -> Boxes:
        """Joint values of some fields as boxes; the same ones come again and again."""
        key = tuple(names), rows.tobytes()
        if key not in self._boxed:
            self._boxed[key] = of_rows(self.own(names), rows)
        return self._boxed[key]

    def _of_mantissas(self, space: Left, sums: Sums, constants: Constants) -> Any:
        """(joint values of the fields of a mantissa, mantissas, shifts in all), those together that are the same."""
        names = self.own(_MANTISSA)
        rows = space.rows(names)
        roles = _roles(constants)
        key = digest_of([np.asarray(constants[role]) for role in roles]), self._signs(constants)
        pairs = [(role, role.replace("post", "pre")) for role in roles if "post" in role]
        shifts = [np.asarray(constants[post]) + np.asarray(constants[pre]) for post, pre in pairs]
        largest = 15 - min(int(shift.min()) for shift in shifts)  # exponent of a ratio
        groups: dict[bytes, tuple[list[np.ndarray], np.ndarray, np.ndarray]] = {}
        for row in rows:
            values = {f: space.domains[f][i] for f, i in zip(names, row, strict=True)}
            if (rounding := values.get("rescale.mantissa_rounding")) in _ALIKE:
                values["rescale.mantissa_rounding"] = _ALIKE[rounding]
            if largest < 8 and "rescale.ratio_bits" in values:
                values["rescale.ratio_bits"] = 15  # below 2^7 nothing is clamped
            own = key, tuple(values.values())
            if own not in self._lowered:
                found = self._constants(sums.target.with_fields(values))
                assert found is not None
                m, pre, post_ = self._along(found)
                t = pre + post_
                self._lowered[own] = m, t, digest_of([m, t])
            m, t, digest = self._lowered[own]
            groups.setdefault(digest, ([], m, t))[0].append(row)
        for same, m, t in groups.values():
            yield np.array(same), m, t

    def _narrow(self, sums: Sums) -> np.ndarray:
        """[n] where the node has no pre-shift, whatever the march."""
        found = self._constants(sums.target.with_fields(dict.fromkeys(_WIDEST, 0)))
        assert found is not None
        _, pre, post = self._along(found)
        return np.broadcast_to((pre == 0) & (post != 0), sums.acc.shape).ravel()

    def _signs(self, constants: Constants) -> bytes:
        """What tells apart the operands by which rows lie along the result: those of PReLU."""
        return self.question.operands.digest if _BELOW[0] in constants else b""

    def _along(self, constants: Constants) -> list[np.ndarray]:
        """Mantissa, pre and post as they lie along the result; of PReLU, that of the sign of its operand."""
        rows = [np.asarray(constants[role], np.int64) for role in ROW]
        if _BELOW[0] not in constants or self.lone.node is None:
            return rows
        last = getattr(self.lone.node.op, "channels_last", False)
        below = channels_to_last(self.question.operands.arrays[0], last) < 0
        others = [np.asarray(constants[role], np.int64) for role in _BELOW]
        return [channels_back(np.where(below, b, a), last) for a, b in zip(rows, others, strict=True)]

    def _readings(self, space: Left) -> "list[_Reading]":
        """What evaluation can read of section 3, with the joint values for each."""
        names = self.evaluated
        found: dict[tuple, list[np.ndarray]] = {}
        rounding = next(f for f in names if f.endswith("pre_rounding"))
        for row in space.rows(names):
            v = {f: space.domains[f][i] for f, i in zip(names, row, strict=True)}
            wide = v["rescale.high_precision"]
            first = None if wide else (v[rounding], v.get("rescale.inner_bits", 32))  # where not asked, it cuts nothing
            found.setdefault((first, v["rescale.post_rounding"]), []).append(row)
        return [_Reading(first, last, tuple(rows)) for (first, last), rows in found.items()]

    def _explaining(self, readings: "list[_Reading]", made: "_Shifts", sums: "_Along", near: np.ndarray) -> np.ndarray:
        """[shifts, readings] bool: which make the board's integers. A shift in all is looked at by itself: what it is
        split into has few forms, though all of them together have many."""
        good, dtype = np.repeat(near[:, None], len(readings), axis=1), self.lone.output.dtype
        for column in range(made.pre.shape[1]):
            own = sums.at(np.flatnonzero(sums.column == column))
            left = np.flatnonzero(good.any(1))
            pairs, which = np.unique(made.pre[left, column] * 64 + made.post[left, column], return_inverse=True)
            for i, pair in enumerate(pairs):
                of_pair = left[which.ravel() == i]
                good[of_pair] &= own.matching(readings, *divmod(int(pair), 64), dtype)
        return good

    def _constants(self, target: Target) -> Constants | None:
        try:
            return self.lone.constants(target)
        except JQuantError:
            return None

    def _target(self, values: Sequence[Any]) -> Target | None:
        """With these values of the other fields, and the finest of section 3."""
        own = dict(zip(self.others, values, strict=True))
        try:
            return NEUTRAL.with_fields({**_OPEN, **_WIDEST, **_FINEST, **own})
        except QConfigError:
            return None


@dataclass(frozen=True, eq=False)
class _Shifts:
    """The distinct shifts that limits make of some totals. `pre`, `post`: [n, totals]."""

    names: tuple[str, ...]
    rows: np.ndarray
    which: np.ndarray
    pre: np.ndarray
    post: np.ndarray
    _boxed: dict[bytes, Boxes] = field(default_factory=dict)

    @classmethod
    def of(
        cls, names: tuple[str, ...], rows: np.ndarray, given: np.ndarray, totals: np.ndarray, narrow: np.ndarray
    ) -> "_Shifts":
        """rows: [n, names] positions; given: the values of them; totals: distinct shifts in all, of some mantissas.

        narrow: which of the totals have no pre-shift, as 0 and 1.
        """
        limit = {name: given[:, i : i + 1] for i, name in enumerate(names)}
        after = next(limit[name] for name in names if name in _WIDEST)
        pre = np.clip(totals - after, 0, limit["rescale.max_pre_shift"]) * (1 - narrow)
        post = np.clip(totals - pre, 0, limit["rescale.max_post_shift"])
        code = np.zeros(len(rows), np.int64)
        for column in (*pre.T, *post.T):
            code = np.unique(code * 64 + column, return_inverse=True)[1].ravel()
        first = np.unique(code, return_index=True)[1]
        return cls(names, rows, code, pre[first], post[first])

    def boxes(self, ds: np.ndarray) -> Boxes:
        """The limits that make some of the shifts."""
        if (key := ds.tobytes()) not in self._boxed:
            self._boxed[key] = of_rows(self.names, self.rows[np.isin(self.which, ds)])
        return self._boxed[key]

    def near(
        self, acc: np.ndarray, m: np.ndarray, column: np.ndarray, wanted: np.ndarray, dtype: str, top: np.ndarray | None
    ) -> np.ndarray:
        """Which shifts make numbers within a rounding of each shift; a sum that may be cut says nothing."""
        pre, post = self.pre[:, column], self.post[:, column]
        real = acc * m.astype(np.float64) / 2.0 ** (pre + post)
        slack = 1.001 + m / 2.0**post
        low, high = integer_range(dtype)
        most, least = np.clip(real + slack, low, high), np.clip(real - slack, low, high)
        if top is not None:
            most, least = np.minimum(most, top), np.minimum(least, top)
        cut = np.abs(acc) / 2.0**pre > 2**15 - 2
        return (cut | ((least <= wanted) & (wanted <= most))).all(1)


@dataclass(frozen=True)
class _Reading:
    """One way to evaluate a row. `first`: rounding and bits before the product, None without; `rows`: as positions."""

    first: tuple[str, int] | None
    last: str
    rows: tuple[np.ndarray, ...]

    @cached_property
    def bits(self) -> int:
        return 0 if self.first is None else self.first[1]

    @cached_property
    def at(self) -> tuple[int, ...]:
        """Where it is among all roundings."""
        return (ORDER[self.last],) if self.first is None else (ORDER[self.last], ORDER[self.first[0]])


@dataclass(frozen=True, eq=False)
class _Along:
    """A sum, its mantissa, which shift in all it has, and the board's integers, place by place: [n] each."""

    acc: np.ndarray
    mantissa: np.ndarray
    column: np.ndarray
    wanted: np.ndarray
    upper: np.ndarray | None

    def at(self, places: np.ndarray) -> "_Along":
        upper = None if self.upper is None else self.upper[places]
        acc, mantissa, column = (v[places] for v in (self.acc, self.mantissa, self.column))
        return _Along(acc, mantissa, column, self.wanted[places], upper)

    def matching(self, readings: Sequence[_Reading], pre: int, post: int, dtype: str) -> np.ndarray:
        """[readings] bool: which make the board's integers with these shifts."""
        heads = rounded_all(self.acc, np.int64(pre))
        enough = int(max(heads.max(), -1 - heads.min())).bit_length() + 1  # more bits cut nothing
        made = {}
        for bits in {min(reading.bits, enough) for reading in readings}:
            limit = 2 ** max(bits - 1, 0)
            head = np.clip(heads, -limit, limit - 1) if bits else self.acc
            made[bits] = self._equal(head, np.int64(post if bits else pre + post), dtype)
        return np.array([made[min(reading.bits, enough)][reading.at] for reading in readings])

    def _equal(self, head: np.ndarray, shift: np.int64, dtype: str) -> np.ndarray:
        """By the last rounding, whether a head of shape [..., n] becomes the board's integers: [5, ...]."""
        low, high = integer_range(dtype)
        y = np.clip(rounded_all(head * self.mantissa, shift), low, high)
        y = y if self.upper is None else np.minimum(y, self.upper)
        return np.asarray((y == self.wanted).all(-1))


def _alike(good: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """[shifts, readings] bool as the sets of readings that some shifts have, with these shifts."""
    some = np.flatnonzero(good.any(1))
    sets, which = np.unique(good[some], axis=0, return_inverse=True)
    for i, own in enumerate(sets):
        yield own, some[which.ravel() == i]


def _sample(acc: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Some places, of all magnitudes."""
    if len(acc) <= _SAMPLE:
        return np.arange(len(acc))
    order = np.argsort(np.abs(wanted), kind="stable")
    return np.sort(order[np.linspace(0, len(order) - 1, _SAMPLE).astype(int)])


def _roles(constants: Constants) -> tuple[str, ...]:
    """Those of a row of constants; of PReLU, of both rows."""
    return tuple(role for role in (*ROW, *_BELOW) if role in constants)


def _in_acc(lone: Lone) -> Lone:
    return replace(lone, output=replace(lone.output, dtype="int32"))


def rescaled_of(question: Question) -> Rescaled | None:
    """What solves the question, with all that it keeps from question to question; None where its node is no sum."""
    kept, key = question.answers.kept, question.operands.digest
    if key not in kept:
        kept[key] = is_rescaled(question)
    if not kept[key]:
        return None
    found: Rescaled = kept.setdefault(b"", Rescaled(question))
    return found.again(question)


def is_rescaled(question: Question) -> bool:
    """Whether the node is a sum and its rescale, as some marches show."""
    lone, operands = question.answers.lone, question.operands.arrays
    asks = question.asks
    if lone.node is None or not set(asks) >= _READ or not any(f in asks for f in _WIDEST):
        return False
    if not any(f.endswith("pre_rounding") for f in asks):
        return False
    return all(_is_sum(question, march, operands) for march in _tests())


def _tests() -> list[Target]:
    wide = NEUTRAL.with_fields({"rescale.pre_rounding": "half_even", "rescale.average_pre_rounding": "half_even"})
    other = {"rescale.post_rounding": "half_away", "rescale.post_shift_int8": 12, "rescale.post_shift_int16": 9}
    return [wide, wide.with_fields(other), wide.with_fields({**other, "rescale.high_precision": True})]


def _is_sum(question: Question, march: Target, operands: Sequence[np.ndarray]) -> bool:
    lone = question.answers.lone
    try:
        constants = lone.constants(march)
        others = {role for role in constants if role.endswith(("_mantissa", "_post"))} - set(_BELOW)
        if not set(ROW) <= set(constants) or others:
            return False
        found = Rescaled(question)
        sums = found._sums(march, constants)
        y = lone.evaluate(march, constants, operands)
    except JQuantError:
        return False
    if sums is None or sums.acc.shape != y.shape:
        return False
    m, pre, post = found._along(constants)
    form = march.rescale
    average = "rescale.average_pre_rounding" in question.asks
    try:
        if form.high_precision:
            made = round_shift(sums.acc * m, pre + post, form.post_rounding)
        else:
            limit = 2 ** (form.inner_bits - 1)
            rounding = form.average_pre_rounding if average else form.pre_rounding
            made = round_shift(
                np.clip(round_shift(sums.acc, pre, rounding), -limit, limit - 1) * m, post, form.post_rounding
            )
    except ValueError:  # a row that does not lie along the result
        return False
    made = saturate(saturate(made, "int32"), lone.output.dtype)
    return np.array_equal(made if sums.upper is None else np.minimum(made, sums.upper), y)
