"""Which fields of a march a node reads: lowered and evaluated under marches that note every field that is asked for."""

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jquant.board.lone import Lone
from jquant.board.neutral import NEUTRAL
from jquant.board.noting import Noting
from jquant.board.probes import domains
from jquant.types import JQuantError, QConfigError, Target

_DRAWN = 8  # marches at random, beside those with every value of a field that is one of few


def fields_read(lone: Lone, operands: Sequence[np.ndarray]) -> tuple[str, ...]:
    """The fields that the integers of a value depend on for given operands, and maybe some more, in order."""
    read: dict[str, None] = {}
    for march in _marches():
        _note(lone, march, operands, read)
    tried: set[str] = set()
    while choices := {field for field in read.keys() - tried if isinstance(domains().get(field, (0,))[0], (str, bool))}:
        tried |= choices
        for field in sorted(choices):
            for value in domains()[field]:
                _note(lone, NEUTRAL.with_fields({field: value}), operands, read)
    return tuple(field for field in domains() if field in read)


def _note(lone: Lone, march: Target, operands: Sequence[np.ndarray], read: dict[str, None]) -> None:
    noting: Any = Noting(march, read)
    with contextlib.suppress(JQuantError):  # no form under this march: what it read is noted
        lone.evaluate(noting, lone.constants(noting), operands)


def _marches() -> Iterator[Target]:
    rng = random.Random(0)
    yield NEUTRAL
    found = 0
    while found < _DRAWN:
        values = {field: rng.choice(list(known)) for field, known in domains().items()}
        values["tables.count"] = 6  # to place more of them takes long, and reads nothing else
        try:
            yield NEUTRAL.with_fields(values)
        except QConfigError:  # two values that do not go together
            continue
        found += 1
