"""Which probe would tell apart the values that a field is left with."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from jquant.board.probes import probe
from jquant.board.questions import Asked
from jquant.board.separating import outputs_of
from jquant.types import JQuantError, Target

_MOST_VALUES = 8  # of those that are left, as far apart as they are
_MOST_TRIED = 24  # values of probes


def telling(field: str, values: Sequence[Any], march: Target) -> str:
    """The probe with the fewest other fields whose dumps differ between values of a field, all else as in a march.

    "" where none of those that depend least on other fields does.
    """
    some = [values[i] for i in sorted({round(i) for i in np.linspace(0, len(values) - 1, _MOST_VALUES)})]
    for one, name in _depending(field)[:_MOST_TRIED]:
        try:
            made = outputs_of(one, name, field, some, march)
        except JQuantError:  # the march has no form for the probe
            continue
        if any(not _same(made[0], other) for other in made[1:]):
            return one.probe.name
    return ""


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is b if a is None or b is None else np.array_equal(a, b)


@cache
def _asked() -> tuple[Asked, ...]:
    return tuple(Asked(made) for made in probe())


@cache
def _depending(field: str) -> list[tuple[Asked, str]]:
    """The values of probes that depend on a field, those with the fewest other fields first."""
    found = [(one, name) for one in _asked() for name, asks in one.probe.asks.items() if field in asks]
    return sorted(found, key=lambda pair: len(pair[0].probe.asks[pair[1]]))
