"""Dumps as the integers that a program has: in its order of axes, its shape and its range, or the reason why not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jquant.board.dumps import Dump, Dumps
from jquant.ops.movement import Permute
from jquant.text import did_you_mean
from jquant.types import Graph, integer_range


class Expected(NamedTuple):
    """What a value is in a program: `shape` with None for the batch; `last`: its channels are the last axis."""

    dtype: str
    shape: tuple[int | None, ...]
    last: bool
    scale: np.ndarray | None = None


@dataclass(frozen=True)
class Taken:
    """`values` as int64 in the program's form; `problems`: what is missing, extra, mis-shaped or no integer."""

    values: Mapping[str, np.ndarray]
    problems: tuple[str, ...]


def channels_last(graph: Graph) -> set[str]:
    """The values that a graph makes with their channels last."""
    last: set[str] = set()
    for node in graph.nodes:
        follows = bool(node.inputs) and node.inputs[0] in last
        if isinstance(node.op, Permute):
            rank = len(node.op.axes)
            is_last = node.op.axes == (0, *range(2, rank), 1) or (follows and node.op.axes == tuple(range(rank)))
        else:
            is_last = getattr(node.op, "channels_last", follows and node.op.layout in ("elementwise", "axes"))
        if is_last:
            last.add(node.name)
    return last


def take(dumps: Dumps, expected: Mapping[str, Expected], optional: Sequence[str] = ()) -> Taken:
    """The values that are expected, as far as the dumps have them."""
    values, problems = {}, list(dumps.problems)
    for name, wanted in expected.items():
        if name not in dumps.values:
            if name not in optional:
                problems.append(f"{name}: missing")
            continue
        try:
            values[name] = _fitted(dumps.values[name], wanted)
        except ValueError as error:
            problems.append(f"{name}: {error} ({dumps.values[name].source.name})")
    extra = [name for name in dumps.values if name not in expected]
    problems += [f"{name}: no value of the program{did_you_mean(name, expected)}" for name in extra]
    return Taken(values, tuple(problems))


def _fitted(dump: Dump, wanted: Expected) -> np.ndarray:
    array = _in_order(dump.array, dump.declared.layout, wanted.last)
    batch = array.shape[0] if array.ndim else 1
    shape = tuple(batch if n is None else n for n in wanted.shape)
    if array.shape != shape:
        fits = array.ndim == len(shape) and all(have >= need for have, need in zip(array.shape, shape, strict=True))
        if not (dump.declared.padded and fits):
            raise ValueError(_mismatch(array.shape, shape, dump.declared.padded))
        array = array[tuple(slice(n) for n in shape)]
    return _integers(array, dump.declared.scale, wanted)


def _in_order(array: np.ndarray, layout: str, last: bool) -> np.ndarray:
    """Images in the order of the program."""
    if array.ndim != 4 or layout == ("NHWC" if last else "NCHW") or not layout:
        return array
    return array.transpose(0, 2, 3, 1) if last else array.transpose(0, 3, 1, 2)


def _mismatch(found: tuple[int, ...], wanted: tuple[int, ...], padded: bool) -> str:
    text = f"its shape is {list(found)}, and the program's {list(wanted)}"
    if sorted(found) == sorted(wanted):
        return f"{text}: another order of axes? declare its layout"
    larger = len(found) == len(wanted) and all(a >= b for a, b in zip(found, wanted, strict=True))
    return f"{text}: padded? declare padded = true" if larger and not padded else text


def _integers(array: np.ndarray, scale: float | None, wanted: Expected) -> np.ndarray:
    if array.dtype.kind == "f":
        if scale is None:
            raise ValueError("it has real numbers, and no scale is declared")
        quotient = array.astype(np.float64) / scale
        array = np.rint(quotient)
        if not np.isfinite(quotient).all() or np.abs(quotient - array).max(initial=0) > 0.01:
            raise ValueError(f"its real numbers are no multiples of the scale {scale:g}")
    elif array.dtype.kind not in "iub":
        raise ValueError(f"it holds {array.dtype}, and no integers")
    low, high = (0, 1) if wanted.dtype == "bool" else integer_range(wanted.dtype)
    integers = array.astype(np.int64)
    if integers.size and not (low <= integers.min() and integers.max() <= high):
        raise ValueError(f"[{integers.min()}, {integers.max()}] leaves the range of {wanted.dtype}")
    return integers
