"""Rows of positions: [n, fields] arrays that give each of some fields a value by its place among all of them."""

from collections.abc import Sequence
from math import prod

import numpy as np


def code(rows: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """One number for each row of positions below `sizes`."""
    found = np.zeros(len(rows), np.int64)
    for column, size in zip(rows.T, sizes, strict=True):
        found = found * size + column
    return found


def distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct rows of positions, and which of them each row is."""
    first, which = firsts(rows)
    return rows[first], which


def firsts(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each distinct row of positions comes first, and which of them each row is."""
    if not rows.shape[1]:
        return np.arange(min(len(rows), 1)), np.zeros(len(rows), np.int64)
    sizes = rows.max(0, initial=0) + 1
    if prod(sizes.tolist()) > 2**62:  # more than one number holds
        _, first, which = np.unique(rows, axis=0, return_index=True, return_inverse=True)
        return first, which.ravel()
    codes, most = code(rows, sizes), prod(sizes.tolist())
    if most > 4 * len(rows) + 100_000:
        _, first, which = np.unique(codes, return_index=True, return_inverse=True)
        return first, which
    at = np.full(most, -1)  # where each code comes first, without sorting
    at[codes[::-1]] = np.arange(len(rows) - 1, -1, -1)
    there = at >= 0
    return at[there], (np.cumsum(there) - 1)[codes]


def groups(rows: np.ndarray, which: np.ndarray) -> list[np.ndarray]:
    """The rows of each number of [0, n)."""
    order = np.argsort(which, kind="stable")
    return np.split(rows[order], np.flatnonzero(np.diff(which[order])) + 1)
