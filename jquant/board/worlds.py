"""Which values of fields explain what was seen: the joint ones, kept as a product of small tables.

A *world* gives each of some fields a value. Fields that nothing has tied together stand in tables of their own, so that
the number of rows is a sum and not a product. Keeping the joint values makes the answer exact: a value is left out only
where no world has it.

Inside, a value is its position among all values of its field, and rows are [n, fields] arrays of such positions.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

from jquant.board.boxes import Boxes, Space, of_rows, telling
from jquant.board.positions import code, distinct

MOST_LEFT = 400_000  # joint values that are left of the fields that boxes tell something of
MOST_TIED = 1_000_000  # rows of a table


class Table(NamedTuple):
    """The joint values of `fields`: distinct `rows`, [n, fields] positions."""

    fields: tuple[str, ...]
    rows: np.ndarray

    def project(self, fields: Sequence[str]) -> "Table":
        """The distinct joint values of some of the fields."""
        return Table(tuple(fields), distinct(self.rows[:, [self.fields.index(field) for field in fields]])[0])


class Worlds:
    """The worlds that are left of all values of some fields."""

    def __init__(self, domains: Mapping[str, Sequence[Any]]) -> None:
        self.domains = {field: tuple(values) for field, values in domains.items()}
        # Of tables, by their identity: asked again and again while they stay.
        self._sizes: dict[tuple[int, tuple[str, ...]], tuple[Table, int]] = {}
        self._places: dict[tuple[int, str], tuple[Table, np.ndarray]] = {}
        self._nearest: dict[tuple[int, bytes], tuple[Table, np.ndarray]] = {}
        self._tables = [Table((f,), np.arange(len(values))[:, None]) for f, values in self.domains.items()]
        self._changed = dict.fromkeys(self.domains, 0)  # when a field's table was last another one

    def values(self, field: str) -> tuple[Any, ...]:
        """What a field can still be."""
        return tuple(self.domains[field][i] for i in self.positions(field))

    def positions(self, field: str) -> np.ndarray:
        """What a field can still be, as ascending positions."""
        table = self._table_of(field)
        known = self._places.get((id(table), field))
        if known is None or known[0] is not table:
            known = table, np.flatnonzero(np.bincount(table.rows[:, table.fields.index(field)]))
            self._places[id(table), field] = known
        return known[1]

    def tied(self, field: str) -> tuple[str, ...]:
        """The fields whose values depend on each other with this one, itself included."""
        return self._table_of(field).fields

    def nearest(self, wanted: Mapping[str, Any], field: str = "", value: Any = None) -> dict[str, Any]:
        """A world that is left, with as many of the wanted values as each table allows; with a value of a field."""
        found: dict[str, Any] = {}
        for table in self._tables:
            places = [
                self.domains[f].index(wanted[f]) if wanted.get(f) in self.domains[f] else -1 for f in table.fields
            ]
            at = np.array(places)
            if field in table.fields:
                own = table.rows[:, table.fields.index(field)] == self.domains[field].index(value)
                row = _nearest(table.rows[own], at)
            else:
                known = self._nearest.get((id(table), at.tobytes()))
                if known is None or known[0] is not table:
                    known = self._nearest[id(table), at.tobytes()] = table, _nearest(table.rows, at)
                row = known[1]
            found |= {f: self.domains[f][i] for f, i in zip(table.fields, row, strict=True)}
        return found

    def changed(self, fields: Sequence[str]) -> int:
        """A number that is another one once what is left of the fields may be."""
        return max((self._changed[field] for field in fields), default=0)

    def count(self, fields: Sequence[str]) -> int:
        """How many joint values the fields have."""
        return prod(self._size(table, fields) for table in self._tables if set(table.fields) & set(fields))

    def rows(self, fields: Sequence[str]) -> np.ndarray:
        """The joint values of the fields, [n, fields] positions in their order."""
        joined = joint(self._projected(fields))
        return joined.rows[:, [joined.fields.index(field) for field in fields]]

    def some(self, fields: Sequence[str], count: int) -> np.ndarray:
        """Some joint values of the fields at random, as `rows` gives all of them."""
        rng, parts = np.random.default_rng(0), self._projected(fields)
        rows = np.concatenate([t.rows[rng.integers(len(t.rows), size=count)] for t in parts], axis=1)
        names = [f for t in parts for f in t.fields]
        return rows[:, [names.index(field) for field in fields]]

    def keep(self, fields: Sequence[str], explains: Callable[[np.ndarray], np.ndarray]) -> bool | None:
        """Leaves out the worlds that do not explain something which depends on `fields` alone.

        Args:
          fields: some of the fields.
          explains: [n, fields] positions to bool [n].

        Returns:
          False where no world does, and None where those that do are too many to be listed: then all of them stay.
        """
        rows = self.rows(fields)
        good = explains(rows)
        return True if good.all() else self.keep_rows(fields, rows[good])

    def keep_rows(self, fields: Sequence[str], good: np.ndarray) -> bool | None:
        """Leaves the worlds whose values of `fields` are among `good`, [n, fields] positions; as `keep`."""
        kept: Table | None = Table(tuple(fields), good)
        for table in [table for table in self._tables if set(table.fields) & set(fields)]:
            kept = kept and self._joined(kept, table)
        if kept is None:
            return None
        if not len(kept.rows):
            return False
        self._replace(kept)
        return True

    def keep_boxes(self, good: Boxes, most: int = MOST_LEFT) -> bool | None:
        """Leaves the worlds whose values of some fields are in a box, as `keep_rows`; None where they are too many.

        Args:
          most: how many joint values of the fields that the boxes say something of can be listed.
        """
        good = telling(good, {field: int(self._mask(field)) for field in good.fields})
        if not good.fields or not len(good.masks):
            return bool(len(good.masks))
        rows = self._within(good.fields, good.masks, most)
        return None if rows is None else self.keep_rows(good.fields, rows)

    def boxed(self) -> Space:
        """The same worlds as boxes."""
        return Space(self.domains, [of_rows(table.fields, table.rows) for table in self._tables])

    def _mask(self, field: str) -> np.uint64:
        return np.uint64(np.bitwise_or.reduce(np.uint64(1) << self.positions(field).astype(np.uint64)))

    def _within(self, fields: tuple[str, ...], masks: np.ndarray, most: int) -> np.ndarray | None:
        """The joint values that are left of some fields and lie in a box; None: more than `most`."""
        parts = self._projected(fields)
        bits = [np.uint64(1) << part.rows.astype(np.uint64) for part in parts]
        columns = [[fields.index(f) for f in part.fields] for part in parts]
        order = [[f for part in parts for f in part.fields].index(f) for f in fields]
        found, count = [], 0
        for box in masks:
            inside = [
                part.rows[((bit & box[column]) != 0).all(1)]
                for part, bit, column in zip(parts, bits, columns, strict=True)
            ]
            count += prod(map(len, inside))
            if count > 4 * most:
                return None
            found.append(joint([Table(p.fields, rows) for p, rows in zip(parts, inside, strict=True)]).rows[:, order])
        rows = distinct(np.concatenate(found))[0]
        return rows if len(rows) <= most else None

    def _replace(self, table: Table) -> None:
        """A table in place of those that have its fields, as independent ones."""
        rest = [t for t in self._tables if t.fields[0] not in table.fields]
        self._tables = rest + list(split(table))
        stamp = max(self._changed.values()) + 1
        self._changed |= dict.fromkeys(table.fields, stamp)

    def _joined(self, a: Table, b: Table) -> Table | None:
        """Every row of one with each row of the other that has the same values of the fields which both have."""
        shared = [f for f in a.fields if f in b.fields]
        of_a, of_b = (self._codes(t.rows[:, [t.fields.index(f) for f in shared]], shared) for t in (a, b))
        order = np.argsort(of_b, kind="stable")
        first, last = (np.searchsorted(of_b[order], of_a, side=side) for side in ("left", "right"))
        count = last - first
        if count.sum() > MOST_TIED:
            return None
        at = np.repeat(first - np.cumsum(count) + count, count) + np.arange(count.sum())
        further = [f for f in b.fields if f not in shared]
        more = b.rows[order[at]][:, [b.fields.index(f) for f in further]]
        rows = np.concatenate([a.rows[np.repeat(np.arange(len(a.rows)), count)], more], axis=1)
        return Table((*a.fields, *further), rows)

    def copy(self) -> "Worlds":
        other = Worlds(self.domains)
        other._tables, other._changed = list(self._tables), dict(self._changed)
        other._places, other._nearest = dict(self._places), dict(self._nearest)
        return other

    def _codes(self, rows: np.ndarray, fields: Sequence[str]) -> np.ndarray:
        return code(rows, [len(self.domains[field]) for field in fields])

    def _table_of(self, field: str) -> Table:
        return next(table for table in self._tables if field in table.fields)

    def _size(self, table: Table, fields: Sequence[str]) -> int:
        """How many joint values a table has for some fields: asked again and again while the table stays."""
        asked = tuple(f for f in table.fields if f in fields)
        known = self._sizes.get((id(table), asked))
        if known is None or known[0] is not table:
            known = table, len(table.project(asked).rows)
            self._sizes[id(table), asked] = known
        return known[1]

    def _projected(self, fields: Sequence[str]) -> list[Table]:
        each = ((table, [f for f in table.fields if f in fields]) for table in self._tables)
        return [table.project(asked) for table, asked in each if asked]


def _nearest(rows: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The row that has the most positions of `at`."""
    found: np.ndarray = rows[(rows == at).sum(1).argmax()]
    return found


def joint(tables: Sequence[Table]) -> Table:
    """Every row of each with every row of the others."""
    fields = tuple(field for table in tables for field in table.fields)
    which = np.indices([len(table.rows) for table in tables]).reshape(len(tables), -1)
    return Table(fields, np.concatenate([t.rows[i] for t, i in zip(tables, which, strict=True)], axis=1))


def split(table: Table) -> Iterator[Table]:
    """A table as independent ones, where every row of one goes with every row of the others."""
    for field in table.fields:
        others = [f for f in table.fields if f != field]
        if not others:
            break
        own, rest = table.project([field]), table.project(others)
        if len(own.rows) * len(rest.rows) == len(table.rows):
            yield own
            yield from split(rest)
            return
    yield table
