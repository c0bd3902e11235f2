"""Names that are new, and the keys that known values have."""

from __future__ import annotations

import re

from jquant.drafts.values import Known

_MOVES = {"reshape", "transpose", "broadcast_in_dim", "broadcast", "index", "rev", "slice", "squeeze", "expand_dims"}


def unique(name: str, taken: set[str]) -> str:
    candidates = (name if i == 0 else f"{name}_{i}" for i in range(len(taken) + 1))
    found = next(c for c in candidates if c not in taken)
    taken.add(found)
    return found


def snake_case(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def source_of(known: Known) -> tuple[str, tuple[int, ...]] | None:
    """The leaf whose elements a known value only moves, and which part of a stack it is."""
    index: tuple[int, ...] = ()
    while not known.path:
        if known.primitive not in _MOVES or len(known.operands) != 1:
            return None
        index = (*known.index[-1:], *index) if known.primitive == "index" else index
        known = known.operands[0]
    return known.path, index


def reshaped_leaf(known: Known) -> Known | None:
    """The leaf that a known value has in another shape, its elements in the same order."""
    while not known.path:
        if known.primitive not in ("reshape", "broadcast_in_dim") or len(known.operands) != 1:
            return None
        (known,) = known.operands
    return known


def only_moves(known: Known) -> bool:
    """Whether a known value is made of elements of leaves, none of them changed."""
    return bool(known.path) or (
        known.primitive in (*_MOVES, "concatenate") and all(only_moves(operand) for operand in known.operands)
    )


def leaves_of(known: Known) -> list[str]:
    """The paths of all leaves that a known value is computed from."""
    found, pending, seen = [], [known], set[Known]()
    while pending:
        value = pending.pop()
        if value in seen:
            continue
        seen.add(value)
        found += [value.path] if value.path else []
        pending += value.operands
    return found


def key_of(known: Known) -> str | None:
    """The key of a parameter that is a leaf, or a part of one, in whatever layout."""
    source = source_of(known)
    if source is None:
        return None
    path, index = source
    parent, _, last = path.rpartition(".")
    return ".".join([*([parent] if parent else []), *map(str, index), last])
