"""Where the boundaries of a segmented table lie so that it is near its function: for host arrays of numpy.

A segment of width w interpolates between points w / 63 apart (63 is one less than the entries of a table), which costs
at most |f''| / 8 of that squared. A smallest error for which few enough segments suffice is found by bisection, each
segment as wide as the error allows: the greedy partition has the fewest segments. What the integers of lines and
entries add is in no formula, so the caller builds the table of every candidate and keeps the nearest.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from jquant.types import TableFormat

_DENSE, _STRIDE = 512, 11  # every integer near 0 and near the ends, further away one of these; no power of two
_REFINED = 48  # pairs of intervals of which every integer is looked at
_ERRORS = np.exp2(np.arange(-16, 56) / 4)  # LSB, where the bisection looks

Function = Callable[[np.ndarray], np.ndarray]  # real to real, without NaN


def sampled(
    function: Function, x_scale: np.ndarray, y_scale: np.ndarray, low: int, high: int, ends: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """(x, y): integers from low to high, increasing, and the function there in LSB, cut to `ends`; both float64.

    Every integer near 0 and near both ends, where poles are, and between the samples where the function bends most.
    """

    def values(x: np.ndarray) -> np.ndarray:
        """In whole 2^-10 LSB: the last bits of a platform's functions decide nothing."""
        return np.round(1024 * np.clip(function(x * np.float64(x_scale)) / np.float64(y_scale), *ends)) / 1024

    every = np.arange(low, high + 1)
    near = (np.abs(every) <= _DENSE) | (every - low <= _DENSE) | (high - every <= _DENSE)
    x = every[near | (every % _STRIDE == 0)].astype(np.float64)
    if x.size < 3:
        return x, values(x)
    y = values(x)
    bends = np.argsort(-np.abs(np.diff(y, 2)), kind="stable")[:_REFINED]
    between = [np.arange(x[i], x[i + 2]) for i in bends]
    more = np.setdiff1d(np.concatenate(between), x)
    both = np.concatenate([x, more])
    order = np.argsort(both)
    return both[order], np.concatenate([y, values(more)])[order]


def equal_errors(
    x: np.ndarray, y: np.ndarray, ends: tuple[int, int], count: int, form: TableFormat
) -> Iterator[np.ndarray]:
    """Candidates, [count + 1] int32 each, not always increasing, for what `sampled` gives.

    Of all samples, and of those that are not saturated: with a segment that has an entry for every integer at the upper
    end, for a pole there, and without; with widths as the error allows, and with those of an exact line.
    """
    inside = np.flatnonzero((y > ends[0]) & (y < ends[1]))
    spans = [(0, x.size - 1)]
    if inside.size and inside.size < x.size:
        # One saturated sample on each side: the outer line then lies beyond saturation.
        spans.append((max(int(inside[0]) - 1, 0), min(int(inside[-1]) + 1, x.size - 1)))
    for exact in (False, True):
        for first, last in reversed(spans):
            for reserved in (0, 1):
                part = x[first : last + 1], y[first : last + 1]
                points = _partition(*part, count, form, reserved=reserved, exact=exact)
                if points is not None:
                    yield np.round(points).astype(np.int32)


class _Bends(NamedTuple):
    """Samples x, the bend |f''| at each (0 at the ends), and the tilt |f'| up to each from the one before."""

    x: np.ndarray
    bend: np.ndarray
    tilt: np.ndarray


def _partition(
    x: np.ndarray, y: np.ndarray, count: int, form: TableFormat, *, reserved: int, exact: bool
) -> np.ndarray | None:
    """[count + 1] boundaries of a small largest error of interpolation."""
    end = x[-1] - (form.entries - 1) * reserved
    if x.size < 3 or end <= x[0]:
        return None
    slopes = np.diff(y) / np.diff(x)
    bend = np.zeros_like(x)
    bend[1:-1] = np.abs(np.diff(slopes)) / (0.5 * (x[2:] - x[:-2]))
    bends = _Bends(x, bend, np.concatenate([[0.0], np.abs(slopes)]))
    points = _smallest(bends, end, count - reserved, form, exact=exact)
    return None if points is None else _halved([*points, x[-1]] if reserved else points, count)


def _smallest(bends: _Bends, end: float, count: int, form: TableFormat, *, exact: bool) -> list[float] | None:
    """At most count + 1 boundaries for the smallest of `_ERRORS` that they allow."""
    low, high, best = 0, len(_ERRORS), None
    while low < high:
        middle = (low + high) // 2
        points = _greedy(bends, end, _ERRORS[middle], count, form, exact=exact)
        if points is None:
            low = middle + 1
        else:
            best, high = points, middle
    return best


def _greedy(
    bends: _Bends, end: float, error: float, count: int, form: TableFormat, *, exact: bool
) -> list[float] | None:
    """Boundaries of at most `count` segments, each as wide as the error allows; None where they do not suffice.

    The error is that of interpolation, and half a step of the index between two entries. A line of few bits adds
    |f'| / 2 at the far ends of the axis; `exact` gives segments where that counts a slope that is a power of two.
    """
    x, bend, tilt = bends
    parts, half, most = form.entries - 1, 2.0 ** (form.fraction_bits + 1), 2 ** (form.coefficient_bits - 1)
    points = [float(x[0])]
    for _ in range(count):
        at = points[-1]
        start = int(np.searchsorted(x, at, side="right"))
        steps = (x[start:] - at) / parts
        inner = np.maximum.accumulate(np.concatenate([[0.0], bend[start:-1]]))  # strictly inside
        steep = np.maximum.accumulate(tilt[start:])
        reached = int(np.searchsorted((inner * steps / 8 + steep / half) * steps, error, side="right"))
        width = float(x[start + reached - 1] - at) if reached else 0.0
        far = max(abs(at), abs(at + width))
        if exact and parts < width < end - at and steep[reached - 1] * far > most:
            width = parts * 2.0 ** np.floor(np.log2(width / parts))
        points.append(min(at + max(width, parts), end))  # an entry for every integer costs nothing
        if points[-1] == end:
            return points
    return None


def _halved(points: list[float], count: int) -> np.ndarray:
    """The widest segment in two parts until there are `count`."""
    found = list(points)
    while len(found) < count + 1:
        widest = int(np.argmax(np.diff(found)))
        found.insert(widest + 1, 0.5 * (found[widest] + found[widest + 1]))
    return np.array(found)
