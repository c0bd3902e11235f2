"""Elements by index, and sorting."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.fx import Node

import jquant.ops as ops
from jquant.types import Op

from .call import (
    Call,
    Handler,
    Shape,
    aten,
    axis_of,
    constant_of,
    dtype_of,
    integer,
    rank_of,
    require,
    reshaped,
    shape_of,
)
from .places import index_of_rank, is_not_negative, merged, places_of, spread


def picked(out: Shape, x: Node, axis: int, index: Node) -> Any:
    """Elements of one axis at an index of any shape, whose axes take the place of that axis."""
    require(dtype_of(index) != torch.bool, "a selection by a mask: its size depends on values; use torch.where")
    require(rank_of(x) > 0, "a number has no axis")
    require(isinstance(shape_of(x)[axis], int), "it picks examples of the batch; do that outside the model")
    axis = axis_of(axis, rank_of(x))
    known = constant_of(index)
    several = rank_of(index) != 1
    if known is not None:
        indices = tuple(int(i) for i in known.flatten().tolist())
        result = Call(ops.IndexSelect(axis=axis, indices=indices), (x,), label="select" if several else "")
    else:
        source: Any = Call(ops.Reshape(shape=(-1,)), (index,), label="index") if several else index
        result = Call(ops.IndexSelect(axis=axis), (x, source), label="select" if several else "")
    return reshaped(out, result) if several else result


def index(out: Shape, x: Node, indices: Sequence[Node | None]) -> Any:
    places = places_of(x, indices)
    given = [(axis, i) for axis, i in enumerate(indices) if i is not None]
    if len(given) == 1 and (places.known is not None or is_not_negative(given[0][1])):
        return picked(out, x, *given[0])
    source, before, behind = merged(x, places)
    if places.of_examples:
        at = index_of_rank(places, before, behind)
        sizes = (*before, prod(places.shape[1:]), *behind)
        if any(n != 1 for n in behind):
            at = Call(ops.Expand(shape=tuple(n if isinstance(n, int) else -1 for n in sizes)), (at,), label="index.all")
        found = Call(ops.Gather(axis=1), (source, at), label="select")
    elif places.known is not None:
        found = Call(ops.IndexSelect(axis=places.axis, indices=places.known), (source,), label="select")
    else:
        flat = Call(ops.Reshape(shape=(-1,)), (spread(places),), label="index.flat")
        found = Call(ops.IndexSelect(axis=places.axis), (source, flat), label="select")
    return reshaped(out, found)


def gather(out: Shape, x: Node, axis: int, at: Node, *_: Any) -> Call:
    require(rank_of(x) > 0, "a number has no axis")
    axis = axis_of(axis, rank_of(x))
    require(isinstance(shape_of(x)[axis], int), "it gathers along the batch")
    return Call(ops.Gather(axis=axis), (x, at))


def sort(out: Any, x: Node, axis: int = -1, descending: bool = False) -> list[Any]:
    require(rank_of(x) > 0, "a number has no order")
    at: dict[str, Any] = {"axis": axis_of(axis, rank_of(x)), "descending": bool(descending)}
    return [Call(ops.Sort(**at), (x,)), Call(ops.SortIndices(**at), (x,))]


def stable(handler: Handler) -> Handler:
    return lambda out, x, is_stable, axis=-1, descending=False: handler(out, x, axis, descending)


def argsort(out: Shape, x: Node, axis: int = -1, descending: bool = False) -> Call:
    result: Call = sort(out, x, axis, descending)[1]
    return result


def topk(out: Any, x: Node, k: Any, axis: int = -1, largest: bool = True, is_sorted: bool = True) -> list[Any]:
    """Sorted, which torch does not promise for sorted=False."""
    require(rank_of(x) > 0, "a number has no order")
    at: dict[str, Any] = {"axis": axis_of(axis, rank_of(x)), "k": integer(k), "largest": bool(largest)}
    first: Op = ops.TopK(**at)
    return [Call(first, (x,)), Call(ops.TopKIndices(**at), (x,))]


def windows(out: Shape, x: Node, axis: int, size: int, step: int) -> Any:
    """Windows of an axis, which may overlap; their elements become the last axis."""
    require(rank_of(x) > 0, "a number has no axis")
    axis, shape = axis_of(axis, rank_of(x)), shape_of(x)
    require(isinstance(shape[axis], int), "it takes windows of the batch")
    count = (shape[axis] - size) // step + 1
    indices = tuple(i * step + j for i in range(count) for j in range(size))
    source: Any = x
    if indices != tuple(range(shape[axis])):
        source = Call(ops.IndexSelect(axis=axis, indices=indices), (x,), label="select")
    split = reshaped((*shape[:axis], count, size, *shape[axis + 1 :]), source, label="split")
    axes = (*range(axis + 1), *range(axis + 2, len(shape) + 1), axis + 1)
    return Call(ops.Permute(axes=axes), (split,))


TABLE: dict[Any, Handler] = {
    aten.index_select.default: picked,
    aten.index.Tensor: index,
    aten.gather.default: gather,
    aten.sort.default: sort,
    aten.sort.stable: stable(sort),
    aten.argsort.default: argsort,
    aten.argsort.stable: stable(argsort),
    aten.topk.default: topk,
    aten.unfold.default: windows,
}
