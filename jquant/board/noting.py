"""A march that notes which of its fields are read."""

from dataclasses import fields as entries
from dataclasses import is_dataclass
from types import FunctionType
from typing import Any


class Noting:
    """A march, or a group of one, that adds the path of each field that is read to `read`, in order."""

    def __init__(self, of: Any, read: dict[str, None], path: str = "") -> None:
        self._of, self._read, self._path = of, read, path

    def __getattr__(self, name: str) -> Any:
        own = getattr(type(self._of), name, None)
        if isinstance(own, FunctionType):
            return own.__get__(self)
        if isinstance(own, property):
            return own.__get__(self)  # made of fields, which are noted
        value = getattr(self._of, name)
        if is_dataclass(value):
            return Noting(value, self._read, f"{self._path}{name}.")
        if name in {entry.name for entry in entries(self._of)}:
            self._read[f"{self._path}{name}"] = None
        return value
