"""Indices of several axes at once, as one index of those axes in one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.fx import Node

import jquant.ops as ops

from .call import EXAMPLES, Call, Shape, aten, constant_of, dtype_of, integers, rank_of, require, reshaped, shape_of
from .movement import expanded

_NOT_NEGATIVE = (
    aten.argmax.default, aten.argmin.default, aten.argsort.default, aten.argsort.stable, aten.topk.default,
    aten.sort.default, aten.sort.stable, aten.abs.default,
)  # fmt: skip
_MOVES = (
    aten.reshape.default, aten.view.default, aten.flatten.using_ints, aten.unsqueeze.default, aten.squeeze.dim,
    aten.expand.default, aten.select.int, aten.slice.Tensor, aten.permute.default, aten.transpose.int,
    aten.contiguous.default, aten.clone.default, aten.gather.default, aten.repeat.default,
)  # fmt: skip


def is_not_negative(index: Any) -> bool:
    """Whether the code shows that an index counts from the start: a position, or clamped to 0."""
    if not isinstance(index, Node):
        return False
    source = index.args[0] if index.args and isinstance(index.args[0], Node) else None
    if getattr(index.target, "__name__", "") == "getitem" or index.target in _MOVES:
        return source is not None and is_not_negative(source)
    if index.target in (aten.clamp.default, aten.clamp_min.default, aten.clip.default):
        low = index.args[1] if len(index.args) > 1 else index.kwargs.get("min")
        return isinstance(low, int | float) and low >= 0
    return index.target in _NOT_NEGATIVE


def from_the_start(index: Any, size: int, label: str = "index") -> Any:
    """An index that may count from the end as one that counts from the start."""
    if is_not_negative(index):
        return index
    behind = Call(ops.Add(), (index, integers((), [size], label=f"{label}.size")), label=f"{label}.from_end")
    negative = Call(ops.Less(value=0.0), (index,), label=f"{label}.is_negative")
    return Call(ops.Where(), (negative, behind, index), label=f"{label}.from_start")


@dataclass(frozen=True)
class Places:
    """Where an index of several axes points to.

    x is permuted by `order`, and its axes from `axis` on, `count` of them, are one. `shape` is that of the index, which
    `known` has as numbers, and `flat` as an operand. With `of_examples` axis 0 is the batch, each example has places of
    its own, and `shape` begins with the batch.
    """

    order: tuple[int, ...]
    axis: int
    count: int
    shape: Shape
    known: tuple[int, ...] | None
    flat: Any
    flat_shape: Shape
    of_examples: bool = False


def places_of(x: Node, indices: Sequence[Node | None]) -> Places:
    """Raises Unsupported for masks, for an index of the batch, and where sizes cannot be known."""
    given = [(axis, i) for axis, i in enumerate(indices) if i is not None]
    for _, i in given:
        require(dtype_of(i) not in (torch.bool, torch.uint8), "a selection by a mask: its size depends on values")
    require(bool(given), "it has no index")
    sizes, rank = shape_of(x), rank_of(x)
    shape = broadcast([shape_of(i) for _, i in given])
    of_examples = given[0][0] == 0 and EXAMPLES in given[0][1].meta and not isinstance(sizes[0], int)
    if of_examples:
        require(not isinstance(shape[0], int), "the examples are not the first axis of the index")
        given = given[1:]
        require(bool(given), "it picks every example")
    axes = [axis for axis, _ in given]
    require(all(isinstance(sizes[a], int) for a in axes), "it picks examples of the batch; do that outside the model")
    together = axes == list(range(axes[0], axes[0] + len(axes)))
    first = axes[0] if together and not of_examples else int(of_examples)
    others = [a for a in range(rank) if a not in axes]
    order = (*others[:first], *axes, *others[first:])
    linear = linear_index([(i, sizes[a]) for a, i in given])
    numbers = None
    if isinstance(linear, torch.Tensor) and not of_examples:
        numbers = tuple(linear.expand(shape).flatten().tolist())
    flat_shape = broadcast([shape_of(i) for _, i in given])
    return Places(order, first, len(axes), shape, numbers, _operand(linear, "index"), flat_shape, of_examples)


def linear_index(given: Sequence[tuple[Node, int]]) -> Any:
    """One index of axes that are one: a tensor where all are known, else an operand."""
    total: Any = None
    for k, (index, size) in enumerate(given):
        constant = constant_of(index)
        one: Any = index
        if constant is not None:
            require(bool(((constant >= -size) & (constant < size)).all()), f"an index beyond an axis of {size}")
            one = constant.to(torch.int64) % size
        else:
            one = from_the_start(index, size, f"index_{k}" if len(given) > 1 else "index")
        total = one if total is None else _added(_times(total, size, k), one, k)
    return total


def _times(total: Any, size: int, k: int) -> Any:
    if isinstance(total, torch.Tensor):
        return total * size
    return Call(ops.Mul(), (total, integers((), [size], label=f"index_{k}.rows")), label=f"index_{k}.first")


def _added(first: Any, second: Any, k: int) -> Any:
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first + second
    pair = (_operand(first, f"index_{k}.known_first"), _operand(second, f"index_{k}.known"))
    return Call(ops.Add(), pair, label=f"index_{k}.flat")


def _operand(value: Any, label: str) -> Any:
    return integers(value.shape, value.flatten().tolist(), label=label) if isinstance(value, torch.Tensor) else value


def broadcast(shapes: Sequence[Shape]) -> Shape:
    """The common shape; the batch counts as a size of its own."""
    rank = max(map(len, shapes))
    full = [(1,) * (rank - len(s)) + tuple(s) for s in shapes]
    found = []
    for sizes in zip(*full, strict=True):
        longer = {str(n): n for n in sizes if not isinstance(n, int) or n != 1}
        require(len(longer) <= 1, "indices of different shapes")
        found.append(next(iter(longer.values()), 1))
    return tuple(found)


def merged(x: Node, places: Places) -> tuple[Any, Shape, Shape]:
    """x with the axes of the index in one; the sizes before that axis and behind it."""
    sizes = [shape_of(x)[a] for a in places.order]
    before, behind = tuple(sizes[: places.axis]), tuple(sizes[places.axis + places.count :])
    result: Any = x
    if places.order != tuple(range(len(sizes))):
        result = Call(ops.Permute(axes=places.order), (x,), label="turned")
    if places.count > 1:
        one = prod(sizes[places.axis : places.axis + places.count])
        result = reshaped((*before, one, *behind), result, label="merged")
    return result, before, behind


def index_of_rank(places: Places, before: Shape, behind: Shape) -> Any:
    """The index in the rank of the merged x: 1 long along the other axes, but for the batch with `of_examples`."""
    ends = (*(1 for _ in behind),)
    if places.known is not None:
        return integers((*(1 for _ in before), len(places.known), *ends), places.known, label="places")
    inner = places.shape[1:] if places.of_examples else places.shape
    require(all(isinstance(n, int) for n in inner), "the size of the index depends on the batch")
    first = places.shape[:1] if places.of_examples else tuple(1 for _ in before)
    return reshaped((*first, prod(inner), *ends), spread(places), label="places")


def spread(places: Places) -> Any:
    """The index in its whole shape, where each of several has a part of it."""
    if [str(n) for n in places.flat_shape] == [str(n) for n in places.shape]:
        return places.flat
    missing = [n for n in places.shape if not isinstance(n, int) and str(n) not in map(str, places.flat_shape)]
    return expanded(places.shape, places.flat, like_batch=bool(missing), label="index.spread")
