"""How well probes tell the values of a field apart, by count of integers, with all other fields as a march has them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from jquant.board.answers import Operands
from jquant.board.probes import Probe, domains
from jquant.board.questions import Asked
from jquant.targets import NASH_E, value_of
from jquant.types import Target


@dataclass(frozen=True)
class Separation:
    """Of one field: how many integers of all dumps differ, for each pair of values that a march can have.

    `counts`  {(value, other value): integers that differ}
    `size`    integers of the dumps that depend on the field
    """

    field: str
    counts: dict[tuple[Any, Any], int]
    size: int

    @property
    def alike(self) -> tuple[tuple[Any, Any], ...]:
        """The pairs that no dump tells apart."""
        return tuple(pair for pair, count in self.counts.items() if count == 0)

    @property
    def fewest(self) -> int:
        """Integers that differ for the nearest pair that is told apart."""
        return min((count for count in self.counts.values() if count), default=0)


def separation(probes: Sequence[Probe], base: Target = NASH_E) -> dict[str, Separation]:
    """By field, how many integers differ between each pair of its values, all else as in `base`.

    Example:
      >>> import jquant as jq
      >>> found = jq.board.separation(jq.board.probe(["resize"]))["resize.rounding"]
      >>> len(found.counts), found.alike
      (10, ())
    """
    asked = [Asked(probe) for probe in probes]
    found = {}
    for field, values in domains().items():
        reading = [(one, name) for one in asked for name, asks in one.probe.asks.items() if field in asks]
        if reading:
            made = [outputs_of(one, name, field, values, base) for one, name in reading]
            found[field] = _separation(field, values, made)
    return found


def outputs_of(one: Asked, name: str, field: str, values: Sequence[Any], base: Target) -> list[np.ndarray | None]:
    """What a dumped value is for each value of a field, its operands as `base` makes them."""
    answers = one.answers[name]
    operands = Operands(tuple(_made(one, value, base) for value in answers.lone.operands))
    if answers.lone.node is None:
        operands = Operands((one.probe.inputs[name],))
    rows = [tuple(value if f == field else value_of(base, f) for f in answers.asks) for value in values]
    return [answers(row, operands) for row in rows]


def _made(one: Asked, name: str, base: Target) -> np.ndarray:
    lone = one.lones[name]
    operands = [one.probe.inputs[name]] if lone.node is None else [_made(one, v, base) for v in lone.operands]
    return lone.evaluate(base, lone.constants(base), operands)


def _separation(field: str, values: Sequence[Any], made: Sequence[list[np.ndarray | None]]) -> Separation:
    counts, possible = {}, [i for i in range(len(values)) if any(outputs[i] is not None for outputs in made)]
    for i, j in combinations(possible, 2):
        counts[values[i], values[j]] = sum(_differing(outputs[i], outputs[j]) for outputs in made)
    size = sum(next((o.size for o in outputs if o is not None), 0) for outputs in made)
    return Separation(field, counts, size)


def _differing(a: np.ndarray | None, b: np.ndarray | None) -> int:
    if a is None or b is None:
        return 0 if a is b else next(x.size for x in (a, b) if x is not None)
    return int(np.count_nonzero(a != b))
