"""A march that notes which of its fields are read."""

from collections.abc import Mapping
from dataclasses import fields as entries
from dataclasses import is_dataclass
from functools import cache
from types import FunctionType
from typing import Any


class Noting:
    """A march, or a group of one, that adds the path of each field that is read to `read`, in order.

    `instead`  groups and fields that stand for those of the march
    """

    def __init__(
        self, of: Any, read: dict[str, None], path: str = "", instead: Mapping[str, Any] | None = None
    ) -> None:
        self._of, self._read, self._path, self._instead = of, read, path, instead or {}

    def __getattr__(self, name: str) -> Any:
        kind: Any = type(self._of)
        if name in _fields(kind):
            value = self._instead[name] if name in self._instead else getattr(self._of, name)
            if is_dataclass(value):
                group = Noting(value, self._read, f"{self._path}{name}.")
                self.__dict__[name] = group
                return group
            self._read[f"{self._path}{name}"] = None
            return value
        own = getattr(kind, name, None)
        if isinstance(own, FunctionType | property):
            return own.__get__(self)  # made of fields, which are noted
        return getattr(self._of, name)


@cache
def _fields(kind: Any) -> frozenset[str]:
    return frozenset(entry.name for entry in entries(kind))
