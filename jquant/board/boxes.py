"""Joint values of fields as boxes, where they are too many to be listed: a box gives each field a set of values.

Inside, a value is its position among all values of its field, and a set of them is the bits of an unsigned integer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from jquant.board.positions import distinct, firsts

MOST_PAIRS = 40_000_000  # of boxes that are laid over each other; beyond, a question is left
MOST_KEPT = 400_000  # boxes that they leave


@dataclass(frozen=True, eq=False)
class Boxes:
    """A union of products. `masks`: [n, fields], uint64; a bit for each value of the field that the box holds."""

    fields: tuple[str, ...]
    masks: np.ndarray

    def project(self, fields: Sequence[str]) -> "Boxes":
        """What the boxes leave of some of the fields."""
        found = self.masks[:, [self.fields.index(field) for field in fields]]
        return Boxes(tuple(fields), _unique(found))

    def count(self) -> int:
        """Of the joint values, at most: those of two boxes are counted twice."""
        return int(np.prod(np.bitwise_count(self.masks).astype(np.float64), axis=1).sum())

    def rows(self) -> np.ndarray:
        """The joint values, [n, fields] positions."""
        if not self.fields:
            return np.zeros((min(len(self.masks), 1), 0), np.int64)
        made = [_product([positions_of(mask) for mask in box]) for box in self.masks]
        whole = np.concatenate(made) if made else np.zeros((0, len(self.fields)), np.int64)
        return distinct(whole)[0] if len(whole) else whole

    def moved(self, positions: Sequence[np.ndarray]) -> "Boxes":
        """The same boxes where the value i of a field is at `positions`[i]."""
        masks = np.zeros_like(self.masks)
        for column, places in enumerate(positions):
            for i, place in enumerate(places):
                masks[:, column] |= ((self.masks[:, column] >> np.uint64(i)) & np.uint64(1)) << np.uint64(place)
        return Boxes(self.fields, masks)

    def merged(self) -> "Boxes":
        """The same union in fewer boxes: those that differ in one field are one."""
        if not self.fields:
            return Boxes((), self.masks[:1])
        masks, before = _unique(self.masks), -1
        while len(masks) > 1 and len(masks) != before:
            before = len(masks)
            for column in range(masks.shape[1]):
                masks = _merged(masks, column)
        return Boxes(self.fields, masks)


def of_rows(fields: Sequence[str], rows: np.ndarray) -> Boxes:
    """[n, fields] positions as boxes."""
    return Boxes(tuple(fields), np.uint64(1) << rows.astype(np.uint64).reshape(len(rows), len(fields))).merged()


def of_pairs(a: tuple[Sequence[str], np.ndarray], b: tuple[Sequence[str], np.ndarray], good: np.ndarray) -> Boxes:
    """The joint values of some fields, [n, fields] positions, with those of others that are good, [n, m]."""
    patterns, which = np.unique(np.packbits(good, axis=1), axis=0, return_inverse=True)
    masks = [np.zeros((0, len(a[0]) + len(b[0])), np.uint64)]
    for i in range(len(patterns)):
        own = np.flatnonzero(which.ravel() == i)
        if good[own[0]].any():
            masks.append(product([of_rows(a[0], a[1][own]), of_rows(b[0], b[1][good[own[0]]])]).masks)
    return Boxes((*a[0], *b[0]), np.concatenate(masks))


def product(parts: Sequence[Boxes]) -> Boxes:
    """Every box of each with every box of the others, which have other fields."""
    if not parts:
        return Boxes((), np.zeros((1, 0), np.uint64))
    which = np.indices([len(part.masks) for part in parts]).reshape(len(parts), -1)
    masks = [part.masks[i] for part, i in zip(parts, which, strict=True)]
    return Boxes(tuple(f for part in parts for f in part.fields), np.concatenate(masks, axis=1))


def positions_of(mask: np.uint64) -> np.ndarray:
    return np.flatnonzero([(int(mask) >> bit) & 1 for bit in range(int(mask).bit_length())])


def _product(columns: Sequence[np.ndarray]) -> np.ndarray:
    return np.stack(np.meshgrid(*columns, indexing="ij"), axis=-1).reshape(-1, len(columns))


def _merged(masks: np.ndarray, column: int) -> np.ndarray:
    if masks.shape[1] == 1:
        return np.bitwise_or.reduce(masks, axis=0, keepdims=True)
    first, which = firsts(_numbered(np.delete(masks, column, axis=1)))
    order = np.argsort(which, kind="stable")
    found = masks[first]
    found[:, column] = np.bitwise_or.reduceat(masks[order, column], np.flatnonzero(np.diff(which[order], prepend=-1)))
    return found


def _unique(masks: np.ndarray) -> np.ndarray:
    return masks[firsts(_numbered(masks))[0]] if masks.size else masks[:1]


def _numbered(masks: np.ndarray) -> np.ndarray:
    """The sets of each field by their number, so that rows of them are positions."""
    return np.stack([np.unique(column, return_inverse=True)[1].ravel() for column in masks.T], axis=1)


class Space:
    """The joint values that are left: a product of `Boxes` over fields that nothing has tied together."""

    def __init__(self, domains: Mapping[str, Sequence[Any]], tables: Sequence[Boxes] | None = None) -> None:
        self.domains = {field: tuple(values) for field, values in domains.items()}
        full = {field: np.array([[2 ** len(values) - 1]], np.uint64) for field, values in self.domains.items()}
        self._tables = [Boxes((f,), mask) for f, mask in full.items()] if tables is None else list(tables)
        self._changed = dict.fromkeys(self.domains, 0)  # when a field's table was last another one
        self._projected: dict[tuple[int, tuple[str, ...]], tuple[Boxes, Boxes]] = {}  # asked again while tables stay

    def mask(self, field: str) -> int:
        """The positions that are left of the values of a field, as bits."""
        return int(np.bitwise_or.reduce(self._of(self._table_of(field), (field,)).masks[:, 0]))

    def values(self, field: str) -> tuple[Any, ...]:
        """What a field can still be."""
        mask = self.mask(field)
        return tuple(value for i, value in enumerate(self.domains[field]) if mask >> i & 1)

    def positions(self, field: str) -> np.ndarray:
        """The same as ascending positions."""
        return positions_of(np.uint64(self.mask(field)))

    def over(self, fields: Sequence[str]) -> Boxes:
        """What is left of the fields, in their order."""
        return product(self._parts(fields)).project(fields)

    def rows(self, fields: Sequence[str]) -> np.ndarray:
        """The joint values of the fields, [n, fields] positions in their order."""
        return self.over(fields).rows()

    def some(self, fields: Sequence[str], count: int) -> np.ndarray:
        """Some joint values of the fields at random, [count, fields] positions."""
        rng, found = np.random.default_rng(0), np.zeros((count, len(fields)), np.int64)
        for part in self._parts(fields):
            boxes = part.masks[rng.integers(len(part.masks), size=count)]
            drawn = [[int(rng.choice(positions_of(mask))) for mask in box] for box in boxes]
            found[:, [fields.index(f) for f in part.fields]] = drawn
        return found

    def count(self, fields: Sequence[str]) -> int:
        """How many joint values the fields have, at most."""
        return prod(part.count() for part in self._parts(fields))

    def changed(self, fields: Sequence[str]) -> int:
        """A number that is another one once what is left of the fields may be."""
        return max((self._changed[field] for field in fields), default=0)

    def nearest(self, wanted: Mapping[str, Any], field: str = "", value: Any = None) -> dict[str, Any]:
        """A joint value that is left, with as many of the wanted ones as each table allows; with a value of a field."""
        found, near = {}, {**wanted, field: value} if field else wanted
        for table in self._tables:
            at = [_bit(self.domains[f], near.get(f)) for f in table.fields]
            masks = table.masks
            if field in table.fields:
                column = table.fields.index(field)
                masks = masks[(masks[:, column] & np.uint64(at[column])) != 0]
            has = (masks & np.array(at, np.uint64)) != 0
            best = int(has.sum(1).argmax())
            for f, mask, own in zip(table.fields, masks[best], has[best], strict=True):
                found[f] = near[f] if own else self.domains[f][int(positions_of(mask)[-1])]
        return found

    def keep(self, fields: Sequence[str], explains: Callable[[np.ndarray], np.ndarray]) -> bool | None:
        """Leaves out what does not explain something, [n, fields] positions to bool [n]; as `keep_boxes`."""
        rows = self.rows(fields)
        return self.keep_rows(fields, rows[explains(rows)])

    def keep_rows(self, fields: Sequence[str], good: np.ndarray) -> bool | None:
        """Leaves what has values of `fields` among `good`, [n, fields] positions; as `keep_boxes`."""
        return self.keep_boxes(of_rows(fields, good))

    def keep_boxes(self, good: Boxes) -> bool | None:
        """Leaves what is in `good`; False where that is nothing, and None where it is too much: then all stays."""
        good = telling(good, {field: self.mask(field) for field in good.fields})
        if not good.fields or not len(good.masks):
            return bool(len(good.masks))
        touched = self._touched(good.fields)
        if float(len(good.masks)) * sum(len(table.masks) for table in touched) > MOST_PAIRS:
            return None
        columns = [[good.fields.index(f) for f in table.fields if f in good.fields] for table in touched]
        own = [[i for i, f in enumerate(table.fields) if f in good.fields] for table in touched]
        kept, count = [], 0
        for box in good.masks:
            parts = []
            for table, at, of_box in zip(touched, own, columns, strict=True):
                masks = table.masks.copy()
                masks[:, at] &= box[of_box]
                parts.append(Boxes(table.fields, masks[(masks != 0).all(1)]))
            count += prod(len(part.masks) for part in parts)
            if count > MOST_KEPT:
                return None
            kept.append(product(parts).masks)
        left = np.concatenate(kept)
        if not len(left):
            return False
        fields = tuple(f for table in touched for f in table.fields)
        rest = [table for table in self._tables if table.fields[0] not in fields]
        self._tables = rest + list(_apart(Boxes(fields, left).merged()))
        self._changed |= dict.fromkeys(fields, max(self._changed.values()) + 1)
        return True

    def copy(self) -> "Space":
        other = Space(self.domains, self._tables)
        other._changed = dict(self._changed)
        return other

    def _parts(self, fields: Sequence[str]) -> list[Boxes]:
        """What each table has of the fields."""
        return [self._of(t, tuple(f for f in fields if f in t.fields)) for t in self._touched(fields)]

    def _of(self, table: Boxes, fields: tuple[str, ...]) -> Boxes:
        known = self._projected.get((id(table), fields))
        if known is None or known[0] is not table:
            known = self._projected[id(table), fields] = table, table.project(fields).merged()
        return known[1]

    def _touched(self, fields: Sequence[str]) -> list[Boxes]:
        return [table for table in self._tables if set(table.fields) & set(fields)]

    def _table_of(self, field: str) -> Boxes:
        return next(table for table in self._tables if field in table.fields)


def telling(boxes: Boxes, left: Mapping[str, int]) -> Boxes:
    """The boxes as far as they leave something out: without the fields of which each has all that is left, as bits."""
    masks = boxes.masks & np.array([left[field] for field in boxes.fields], np.uint64)
    found = Boxes(boxes.fields, masks[(masks != 0).all(1)]).merged()
    while True:
        tells = [f for f in found.fields if (found.project([f]).masks != np.uint64(left[f])).any()]
        if len(tells) == len(found.fields) or not len(found.masks):
            return found
        found = found.project(tells).merged()


def _bit(values: Sequence[Any], wanted: Any) -> int:
    return 1 << values.index(wanted) if wanted in values else 0


def _apart(table: Boxes) -> Iterator[Boxes]:
    """Fields with the same set in every box stand apart."""
    alike = (table.masks == table.masks[:1]).all(0)
    for field, same in zip(table.fields, alike, strict=True):
        if same:
            yield Boxes((field,), table.project([field]).masks)
    tied = [field for field, same in zip(table.fields, alike, strict=True) if not same]
    if tied:
        yield table.project(tied).merged()
