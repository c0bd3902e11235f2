"""Joint values of fields as boxes, where they are too many to be listed: a box gives each field a set of values.

Inside, a value is its position among all values of its field, and a set of them is the bits of an unsigned integer.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jquant.board.positions import distinct

MOST_PAIRS = 4_000_000  # of boxes that are laid over each other; beyond, a question is left


@dataclass(frozen=True, eq=False)
class Boxes:
    """A union of products. `masks`: [n, fields], uint64; a bit for each value of the field that the box holds."""

    fields: tuple[str, ...]
    masks: np.ndarray

    def project(self, fields: Sequence[str]) -> "Boxes":
        """What the boxes leave of some of the fields."""
        found = self.masks[:, [self.fields.index(field) for field in fields]]
        return Boxes(tuple(fields), np.unique(found, axis=0))

    def count(self) -> int:
        """Of the joint values, at most: those of two boxes are counted twice."""
        return int(np.prod(np.bitwise_count(self.masks).astype(np.float64), axis=1).sum())

    def rows(self) -> np.ndarray:
        """The joint values, [n, fields] positions."""
        if not self.fields:
            return np.zeros((min(len(self.masks), 1), 0), np.int64)
        made = [_product([_positions(mask) for mask in box]) for box in self.masks]
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
        masks, before = np.unique(self.masks, axis=0), -1
        while len(masks) > 1 and len(masks) != before:
            before = len(masks)
            for column in range(masks.shape[1]):
                masks = _merged(masks, column)
        return Boxes(self.fields, masks)


def of_rows(fields: Sequence[str], rows: np.ndarray) -> Boxes:
    """[n, fields] positions as boxes."""
    return Boxes(tuple(fields), np.uint64(1) << rows.astype(np.uint64).reshape(len(rows), len(fields))).merged()


def product(parts: Sequence[Boxes]) -> Boxes:
    """Every box of each with every box of the others, which have other fields."""
    if not parts:
        return Boxes((), np.zeros((1, 0), np.uint64))
    which = np.indices([len(part.masks) for part in parts]).reshape(len(parts), -1)
    masks = [part.masks[i] for part, i in zip(parts, which, strict=True)]
    return Boxes(tuple(f for part in parts for f in part.fields), np.concatenate(masks, axis=1))


def _positions(mask: np.uint64) -> np.ndarray:
    return np.flatnonzero([(int(mask) >> bit) & 1 for bit in range(int(mask).bit_length())])


def _product(columns: Sequence[np.ndarray]) -> np.ndarray:
    return np.stack(np.meshgrid(*columns, indexing="ij"), axis=-1).reshape(-1, len(columns))


def _merged(masks: np.ndarray, column: int) -> np.ndarray:
    if masks.shape[1] == 1:
        return np.bitwise_or.reduce(masks, axis=0, keepdims=True)
    others, which = np.unique(np.delete(masks, column, axis=1), axis=0, return_inverse=True)
    joined = np.zeros(len(others), np.uint64)
    np.bitwise_or.at(joined, which.ravel(), masks[:, column])
    return np.insert(others, column, joined, axis=1)


class Space:
    """The joint values that are left: a product of `Boxes` over fields that nothing has tied together."""

    def __init__(self, domains: Mapping[str, Sequence[Any]]) -> None:
        self.domains = {field: tuple(values) for field, values in domains.items()}
        full = {field: np.array([[2 ** len(values) - 1]], np.uint64) for field, values in self.domains.items()}
        self._tables = [Boxes((field,), mask) for field, mask in full.items()]

    def mask(self, field: str) -> int:
        """The positions that are left of the values of a field, as bits."""
        return int(np.bitwise_or.reduce(self._table_of(field).project([field]).masks[:, 0]))

    def values(self, field: str) -> tuple[Any, ...]:
        """What a field can still be."""
        mask = self.mask(field)
        return tuple(value for i, value in enumerate(self.domains[field]) if mask >> i & 1)

    def over(self, fields: Sequence[str]) -> Boxes:
        """What is left of the fields, in their order."""
        parts = [t.project([f for f in fields if f in t.fields]) for t in self._touched(fields)]
        return product(parts).project(fields)

    def rows(self, fields: Sequence[str]) -> np.ndarray:
        """The joint values of the fields, [n, fields] positions in their order."""
        return self.over(fields).rows()

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
                found[f] = near[f] if own else self.domains[f][int(_positions(mask)[-1])]
        return found

    def can_keep(self, good: Boxes) -> bool:
        """Whether `keep` is within what can be computed."""
        touched = [len(t.masks) for t in self._touched(good.fields)]
        return float(np.prod(np.array(touched, np.float64))) * len(good.masks) <= MOST_PAIRS

    def keep(self, good: Boxes) -> bool:
        """Leaves what is in `good`; False where that is nothing, and then all stays."""
        if not good.fields:
            return bool(len(good.masks))
        touched = self._touched(good.fields)
        whole = product(touched)
        order = [whole.fields.index(f) for f in good.fields]
        kept = []
        for box in good.masks:
            masks = whole.masks.copy()
            masks[:, order] &= box
            kept.append(masks[(masks != 0).all(1)])
        left = np.concatenate(kept) if kept else whole.masks[:0]
        if not len(left):
            return False
        rest = [table for table in self._tables if table.fields[0] not in whole.fields]
        self._tables = rest + list(_apart(Boxes(whole.fields, left).merged()))
        return True

    def _touched(self, fields: Sequence[str]) -> list[Boxes]:
        return [table for table in self._tables if set(table.fields) & set(fields)]

    def _table_of(self, field: str) -> Boxes:
        return next(table for table in self._tables if field in table.fields)


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
