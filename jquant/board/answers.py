"""What one value alone gives in each of many worlds. Worlds with the same constants are evaluated once."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from jquant.board.lone import Constants, Lone
from jquant.targets import NASH_E
from jquant.types import JQuantError, QConfigError, Target

Row = tuple[Any, ...]  # of values of fields, in their order

# Any valid march serves where a field does not matter. These values go with every value of the others.
NEUTRAL = NASH_E.with_fields(
    {
        "name": "candidate",
        "tables.entries": 4,
        "tables.fraction_bits": 0,
        "resize.weight_bits": 0,
        "grid.max_map_shift": 0,
    }
)

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


class Answers:
    """The integers that a lone value has for given operands, by the values of the fields that it depends on.

    None where they make no march, or one on which the node has no form.
    """

    def __init__(self, lone: Lone, asks: Sequence[str]) -> None:
        self.lone, self.asks = lone, tuple(asks)
        self.lowering = [i for i, field in enumerate(asks) if field not in ONLY_EVALUATED]
        self.evaluation = [i for i, field in enumerate(asks) if field not in ONLY_LOWERED]
        self._lowered: dict[Row, tuple[bytes, Constants] | None] = {}
        self._found: dict[tuple[bytes, Row, bytes], np.ndarray | None] = {}

    def is_lowered(self, row: Row) -> bool:
        """Whether it is known what the values lower to, be it nothing. What makes no march says nothing of others."""
        key = tuple(row[i] for i in self.lowering)
        if key not in self._lowered and (target := self._valid(row)) is not None:
            self._lowered[key] = self._lower(target)
        return key in self._lowered

    def digest(self, row: Row) -> bytes | None:
        """That of the constants; None where there are none."""
        lowered = self._lowered[tuple(row[i] for i in self.lowering)] if self.is_lowered(row) else None
        return None if lowered is None else lowered[0]

    def __call__(self, row: Row, operands: "Operands") -> np.ndarray | None:
        if (digest := self.digest(row)) is None:
            return None
        key = digest, tuple(row[i] for i in self.evaluation), operands.digest
        if key not in self._found:
            self._found[key] = self._evaluate(row, operands)
        return self._found[key]

    def target(self, row: Row) -> Target:
        """A march with these values, and any others.

        Raises:
          QConfigError: values that do not go together.
        """
        return NEUTRAL.with_fields(dict(zip(self.asks, row, strict=True)))

    def _valid(self, row: Row) -> Target | None:
        try:
            return self.target(row)
        except QConfigError:  # two values that do not go together
            return None

    def _lower(self, target: Target) -> tuple[bytes, Constants] | None:
        try:
            constants = self.lone.constants(target)
        except JQuantError:
            return None
        return digest_of([np.asarray(constants[role]) for role in sorted(constants)]), constants

    def _evaluate(self, row: Row, operands: "Operands") -> np.ndarray | None:
        lowered, target = self._lowered[tuple(row[i] for i in self.lowering)], self._valid(row)
        if lowered is None or target is None:
            return None
        try:
            return self.lone.evaluate(target, lowered[1], operands.arrays)
        except JQuantError:  # a line that leaves int32
            return None


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
