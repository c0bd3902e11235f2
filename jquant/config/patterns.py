"""Patterns of names: one against one name, and many at once by an index of what they begin with."""

import fnmatch
import re
from collections.abc import Callable, Iterable

MODULE = "module:"
_TYPE, _REGEX = "type:", "re:"
_WILDCARD = re.compile(r"[*?\[]")


def matches(pattern: str, name: str, operator: str = "", call_of: str = "") -> bool:
    """Whether a qconfig pattern selects a value: by its own name, or by that of the module of which it is a call."""
    if pattern.startswith(_TYPE):
        return fnmatch.fnmatchcase(operator, pattern[5:])
    names = (name, call_of) if call_of else (name,)
    if pattern.startswith(_REGEX):
        return any(re.fullmatch(pattern[3:], n) is not None for n in names)
    if pattern.startswith(MODULE):
        path = pattern.removeprefix(MODULE)
        return any(n == path or n.startswith(f"{path}.") for n in names)
    return any(fnmatch.fnmatchcase(n, pattern) for n in names)


class Patterns:
    """An index of patterns, which answers as `matches` does, without looking at each pattern for each name.

    Names and modules are looked up. A glob is looked up by what stands before its first wildcard; globs that begin with
    a wildcard, regular expressions and types are tried one by one.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self.modules: dict[str, list[int]] = {}
        self.exact: dict[str, list[int]] = {}
        self.globs: dict[str, list[tuple[int, Callable[[str], object]]]] = {}  # by the text before the first wildcard
        self.regexes: list[tuple[int, Callable[[str], object]]] = []
        self.types: list[tuple[int, Callable[[str], object]]] = []
        for rank, pattern in enumerate(patterns):
            self._add(rank, pattern)
        self.lengths = sorted({len(start) for start in self.globs})
        self.known: dict[tuple[str, str, str], frozenset[int]] = {}

    def _add(self, rank: int, pattern: str) -> None:
        if pattern.startswith(_TYPE):
            self.types.append((rank, re.compile(fnmatch.translate(pattern[5:])).match))
        elif pattern.startswith(_REGEX):
            self.regexes.append((rank, re.compile(pattern[3:]).fullmatch))
        elif pattern.startswith(MODULE):
            self.modules.setdefault(pattern.removeprefix(MODULE), []).append(rank)
        elif wildcard := _WILDCARD.search(pattern):
            start = pattern[: wildcard.start()]
            self.globs.setdefault(start, []).append((rank, _glob(pattern)))
        else:
            self.exact.setdefault(pattern, []).append(rank)

    def matching(self, name: str, operator: str = "", call_of: str = "") -> frozenset[int]:
        """The places of the patterns that select a value."""
        asked = name, operator, call_of
        if asked not in self.known:
            self.known[asked] = frozenset(self._found(*asked))
        return self.known[asked]

    def _found(self, name: str, operator: str, call_of: str) -> set[int]:
        found = {rank for rank, is_match in self.types if is_match(operator)}
        for own in (name, call_of) if call_of else (name,):
            found.update(self.exact.get(own, ()))
            found.update(rank for rank, is_match in self.regexes if is_match(own))
            for path in _paths(own):
                found.update(self.modules.get(path, ()))
            for length in self.lengths:
                if length > len(own):
                    break
                found.update(rank for rank, is_match in self.globs.get(own[:length], ()) if is_match(own))
        return found


def _glob(pattern: str) -> Callable[[str], object]:
    """Whether a name fits a glob, as `fnmatch.fnmatchcase` has it, without a regular expression, which takes 1 ms."""
    if "[" in pattern:
        return re.compile(fnmatch.translate(pattern)).match
    first, *rest = pattern.split("*")
    tail = re.split(r"[*?]", pattern)[-1]
    return lambda name: name.endswith(tail) and _fits(name, first, rest)


def _fits(name: str, first: str, rest: list[str]) -> bool:
    """Whether a name is `first`, then the parts in this order with anything between them; the last one ends it."""
    if not rest:
        return len(name) == len(first) and _is_at(name, 0, first)
    if not _is_at(name, 0, first):
        return False
    place = len(first)
    for part in rest[:-1]:
        while not _is_at(name, place, part):
            place += 1
            if place + len(part) > len(name):
                return False
        place += len(part)
    last = len(name) - len(rest[-1])
    return last >= place and _is_at(name, last, rest[-1])


def _is_at(name: str, place: int, part: str) -> bool:
    """Whether a part of a glob, with question marks but no stars, stands there."""
    if "?" not in part:
        return name.startswith(part, place)
    return len(name) >= place + len(part) and all(
        a in ("?", b) for a, b in zip(part, name[place : place + len(part)], strict=True)
    )


def _paths(name: str) -> list[str]:
    """A name, and all that it is inside of: "a.b.c", "a.b", "a"."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts), 0, -1)]
