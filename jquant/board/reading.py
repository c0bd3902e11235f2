"""Which fields of a march a node reads: lowered and evaluated under marches that note every field that is asked for."""

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import fields as entries
from dataclasses import is_dataclass
from types import FunctionType
from typing import Any

import numpy as np

from jquant.board.answers import NEUTRAL
from jquant.board.lone import Lone
from jquant.board.probes import domains
from jquant.types import JQuantError, QConfigError, Target

_DRAWN = 8  # marches at random, beside those with every value of a field that is one of few


class Noting:
    """A march, or a group of one, that adds the path of each field that is read to `read`."""

    def __init__(self, of: Any, read: set[str], path: str = "") -> None:
        self._of, self._read, self._path = of, read, path

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._of, name)
        if isinstance(method := getattr(type(self._of), name, None), FunctionType):
            return method.__get__(self)
        if is_dataclass(value):
            return Noting(value, self._read, f"{self._path}{name}.")
        if name in {entry.name for entry in entries(self._of)}:
            self._read.add(f"{self._path}{name}")
        return value


def fields_read(lone: Lone, operands: Sequence[np.ndarray]) -> tuple[str, ...]:
    """The fields that the integers of a value depend on for given operands, and maybe some more, in order."""
    read: set[str] = set()
    for march in _marches():
        _note(lone, march, operands, read)
    tried: set[str] = set()
    while choices := {field for field in read - tried if isinstance(domains().get(field, (0,))[0], (str, bool))}:
        tried |= choices
        for field in sorted(choices):
            for value in domains()[field]:
                _note(lone, NEUTRAL.with_fields({field: value}), operands, read)
    return tuple(field for field in domains() if field in read)


def _note(lone: Lone, march: Target, operands: Sequence[np.ndarray], read: set[str]) -> None:
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
