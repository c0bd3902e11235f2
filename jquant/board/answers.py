"""What one value alone gives in each of many worlds. Worlds with the same constants are evaluated once."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from jquant.board.lone import Constants, Lone
from jquant.board.mapped import Mapped, is_mapped
from jquant.board.neutral import NEUTRAL
from jquant.board.noting import Noting
from jquant.board.regioned import Regioned, is_regioned
from jquant.board.tabled import Tabled, is_tabled
from jquant.types import JQuantError, QConfigError, Target

Row = tuple[Any, ...]  # of values of fields, in their order
Solver = Tabled | Mapped | Regioned

# What lowering reads, and no evaluation: its part in an answer is in the constants.
ONLY_LOWERED = frozenset(
    {
        "number_rounding",
        "bias_rounding",
        "slope_dtype",
        "rescale.mantissa_bits",
        "rescale.mantissa_rounding",
        "rescale.mantissa_overflow",
        "rescale.ratio_bits",
        "rescale.max_pre_shift",
        "rescale.max_post_shift",
        "rescale.post_shift_int8",
        "rescale.post_shift_int16",
        "addend.multiplier_bits",
        "addend.multiplier_rounding",
        "addend.max_shift",
        "addition.max_shift_int8",
        "addition.max_shift_int16",
        "addition.multiplier_bits",
        "addition.multiplier_rounding",
        "tables.count",
        "tables.entry_rounding",
        "tables.coefficient_bits",
        "tables.coefficient_rounding",
        "tables.max_shift",
        "grid.map_bits",
        "grid.map_constant_rounding",
        "grid.max_map_shift",
    }
)
# What evaluation reads, and no lowering: the constants are the same for all its values.
ONLY_EVALUATED = frozenset(
    {
        "rescale.inner_bits",
        "rescale.pre_rounding",
        "rescale.average_pre_rounding",
        "rescale.post_rounding",
        "rescale.high_precision",
        "addend.rounding",
        "tables.outer",
        "tables.index_rounding",
        "tables.line_rounding",
        "tables.interpolation_rounding",
        "tables.angle_rounding",
        "resize.step_bits",
        "resize.step_rounding",
        "resize.weight_bits",
        "resize.weight_rounding",
        "resize.rounding",
        "resize.nearest_index",
        "grid.nearest_rounding",
        "grid.rounding",
        "grid.point_bits",
        "grid.point_fraction_rounding",
        "grid.point_rounding",
    }
)


_TIED = ("tables", "resize")  # groups some of whose values do not go together; of the others all do
_MISSING = object()
_KEPT = 16 * 2**20  # bytes of integers that the answers of a value keep


class Tree:
    """Results of a computation, by the values of the fields that it reads, in the order in which it first reads them.

    With the same values up to a read, the next field that is read is the same. So a row finds the result of any other
    row that differs in fields which were not read.
    """

    def __init__(self) -> None:
        self._root: dict[Any, Any] = {}

    def find(self, row: Row) -> Any:
        """The result for a row of values, `_MISSING` where it is not known."""
        at = self._root
        while "column" in at:
            at = at["next"].get(row[at["column"]], {})
        return at.get("result", _MISSING)

    def add(self, columns: Sequence[int], row: Row, result: Any) -> None:
        """The result for a row of which these columns were read."""
        at = self._root
        for column in columns:
            assert at.setdefault("column", column) == column, "two runs with the same values read other fields"
            at = at.setdefault("next", {}).setdefault(row[column], {})
        at["result"] = result


class Answers:
    """The integers that a lone value has for given operands, by the values of the fields that it depends on.

    None where they make no march, or one on which the node has no form. Lowering and evaluation note which fields they
    read, so that each is done once for all values of the others.
    """

    def __init__(self, lone: Lone, asks: Sequence[str]) -> None:
        self.lone, self.asks = lone, tuple(asks)
        self.lowering = [i for i, field in enumerate(asks) if field not in ONLY_EVALUATED]
        self.evaluation = [i for i, field in enumerate(asks) if field not in ONLY_LOWERED]
        self._groups: dict[str, list[int]] = {}
        for i, field in enumerate(asks):
            self._groups.setdefault(field.rpartition(".")[0], []).append(i)
        self._checked = [group for group in self._groups if group in _TIED]
        self._formats: dict[tuple[str, Row], dict[str, Any] | None] = {}
        self._lowered = Tree()
        self._found: dict[tuple[bytes, bytes], Tree] = {}
        self.kept: dict[bytes, Any] = {}  # what a solver knows, by the operands that it knows it of
        self._bytes = 0

    @cached_property
    def solver(self) -> Solver | None:
        """What finds the joint values of a value of many fields together."""
        if is_tabled(self.lone, self.asks):
            return Tabled(self.lone, self.asks)
        if is_mapped(self.lone, self.asks):
            return Mapped(self.lone, self.asks)
        return Regioned(self.lone, self.asks) if is_regioned(self.lone, self.asks) else None

    def is_march(self, row: Row) -> bool:
        """Whether the values go together."""
        return all(self._format(group, row) is not None for group in self._checked)

    def digest(self, row: Row) -> bytes | None:
        """That of the constants; None where there are none."""
        lowered = self._lower(row) if self.is_march(row) else None
        return None if lowered is None else lowered[0]

    def __call__(self, row: Row, operands: "Operands") -> np.ndarray | None:
        lowered = self._lower(row) if self.is_march(row) else None
        if lowered is None:
            return None
        tree = self._found.setdefault((lowered[0], operands.digest), Tree())
        if (found := tree.find(row)) is _MISSING:
            found = self._noted(
                tree, row, lambda march: compact(self.lone.evaluate(march, lowered[1], operands.arrays))
            )
            self._bytes += 0 if found is None else found.nbytes
            if self._bytes > _KEPT:
                self._found, self._bytes = {}, 0
        return found

    def target(self, row: Row) -> Target:
        """A march with these values, and any others.

        Raises:
          QConfigError: values that do not go together.
        """
        return NEUTRAL.with_fields(dict(zip(self.asks, row, strict=True)))

    def _lower(self, row: Row) -> tuple[bytes, Constants] | None:
        if (found := self._lowered.find(row)) is _MISSING:
            found = self._noted(self._lowered, row, self._constants)
        return found

    def _constants(self, march: Target) -> tuple[bytes, Constants]:
        constants = self.lone.constants(march)
        return digest_of([np.asarray(constants[role]) for role in sorted(constants)]), constants

    def _noted(self, tree: Tree, row: Row, compute: Callable[[Target], Any]) -> Any:
        """Computes for a march of these values, and adds the result by what was read of them."""
        read: dict[str, None] = {}
        march: Any = Noting(NEUTRAL, read, instead=self._instead(row))
        try:
            result = compute(march)
        except JQuantError:  # no form on this march, or a line that leaves int32
            result = None
        tree.add([self.asks.index(field) for field in read if field in self.asks], row, result)
        return result

    def _instead(self, row: Row) -> dict[str, Any]:
        """What a march of these values has in place of that of `NEUTRAL`."""
        found: dict[str, Any] = {}
        for group in self._groups:
            found |= self._format(group, row) or {}
        return found

    def _format(self, group: str, row: Row) -> dict[str, Any] | None:
        """The changes of a march that are one of its groups; None for values that do not go together."""
        key = group, tuple(row[i] for i in self._groups[group])
        if key not in self._formats:
            values = {self.asks[i].rpartition(".")[2]: row[i] for i in self._groups[group]}
            try:
                self._formats[key] = {group: replace(getattr(NEUTRAL, group), **values)} if group else values
            except QConfigError:
                self._formats[key] = None
        return self._formats[key]


def compact(integers: np.ndarray) -> np.ndarray:
    """The same integers in the smallest dtype that holds them."""
    low, high = integers.min(initial=0), integers.max(initial=0)
    kind = next(
        k for k in (np.int8, np.int16, np.int32, np.int64) if np.iinfo(k).min <= low and high <= np.iinfo(k).max
    )
    return integers.astype(kind)


@dataclass(frozen=True)
class Operands:
    """The board's own operands of a value: integers, or the real numbers of an input."""

    arrays: tuple[np.ndarray, ...]

    @cached_property
    def digest(self) -> bytes:
        return digest_of(self.arrays)


def digest_of(arrays: Sequence[np.ndarray]) -> bytes:
    made = hashlib.sha256()
    for array in arrays:
        made.update(f"{array.dtype}{array.shape}".encode())
        made.update(np.ascontiguousarray(array).tobytes())
    return made.digest()
