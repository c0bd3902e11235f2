"""Writing elements: at indices, into slices, and all of a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.fx import Node

import jquant.ops as ops

from ..torch_functions import KEPT_DROPOUT
from .call import (
    Call,
    Handler,
    Shape,
    aten,
    axis_of,
    constant_of,
    dtype_of,
    integer,
    integers,
    is_exact,
    number,
    rank_of,
    require,
    reshaped,
    scalar_of,
    scaled,
    shape_of,
)
from .compare import masked_fill, to_dtype, where
from .movement import expand, expanded, is_batch, sliced
from .places import index_of_rank, merged, places_of

_REDUCE: dict[str, Any] = {"add": "add", "sum": "add", "amax": "max", "amin": "min"}


def filled_like(shape: Shape, x: Node, value: Any, label: str = "source") -> Call:
    """A number as a tensor of the dtype of x."""
    require(isinstance(value, int | float), "the value depends on the batch size; make it a constant")
    of_mask = dtype_of(x) == torch.bool
    source: Any = integers((), [int(value)], "bool" if of_mask else "int32") if is_exact(x) else number(value, "value")
    batch = [i for i, n in enumerate(shape) if not isinstance(n, int)]
    require(batch in ([], [0]) and all(is_batch(shape[i]) for i in batch), "its shape is computed from the batch")
    return expanded(shape, source, like_batch=bool(batch), label=label)


# ---------------------------------------------------------------------------------------------------------------------
# At an index of the rank of x


def scattered(x: Any, axis: int, index: Node, source: Any, reduce: Any) -> Any:
    """`source` may be longer than the index; then its first elements are written."""
    require(rank_of(x) > 0 and rank_of(index) == rank_of(x), "a number has no axis")
    axis = axis_of(axis, rank_of(x))
    require(isinstance(shape_of(x)[axis], int), "it writes along the batch")
    written = shape_of(index)
    require(all(n != 0 for n in written), "the index is empty")
    if isinstance(source, Node):
        longer = [a for a, (m, n) in enumerate(zip(shape_of(source), written, strict=True)) if str(m) != str(n)]
        require(all(isinstance(written[a], int) for a in longer), "index and source of different batches")
        if longer:
            stops = tuple(written[a] if a in longer else None for a in range(len(written)))
            op = ops.Slice(starts=(0,) * len(written), stops=stops, steps=(1,) * len(written))
            source = Call(op, (source,), label="source")
    return Call(ops.Scatter(axis=axis, reduce=reduce), (x, index, source))


def scatter(out: Shape, x: Node, axis: int, index: Node, source: Node) -> Any:
    return scattered(x, axis, index, source, "none")


def scatter_value(out: Shape, x: Node, axis: int, index: Node, value: Any) -> Any:
    return scattered(x, axis, index, filled_like(shape_of(index), x, value), "none")


def scatter_add(out: Shape, x: Node, axis: int, index: Node, source: Node) -> Any:
    return scattered(x, axis, index, source, "add")


def scatter_with(out: Shape, x: Node, axis: int, index: Node, source: Node, reduce: str) -> Any:
    require(reduce in _REDUCE, f"reduce={reduce!r}")
    return scattered(x, axis, index, source, _REDUCE[reduce])


def scatter_reduce(
    out: Shape, x: Node, axis: int, index: Node, source: Node, reduce: str, include_self: bool = True
) -> Any:
    """A mean is the sum of what is written to an element, divided by how many there are."""
    if reduce == "mean":
        return scattered_mean(out, x, axis, index, source, include_self)
    require(reduce in _REDUCE, f"reduce={reduce!r}; sum, mean, amax and amin are operators")
    require(include_self or is_zero(x), "include_self=False: what is written replaces what was there")
    require(include_self or _REDUCE[reduce] == "add", "include_self=False of a maximum or minimum")
    return scattered(x, axis, index, source, _REDUCE[reduce])


def is_zero(x: Node) -> bool:
    """Whether a tensor is made of zeros."""
    made = (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
    constant = constant_of(x)
    return x.target in made or (constant is not None and not bool(constant.any()))


def scattered_mean(out: Shape, x: Node, axis: int, index: Node, source: Node, include_self: bool) -> Any:
    require(not is_exact(x), "a mean of integers")
    require(include_self or is_zero(x), "include_self=False: what is written replaces what was there")
    total = scattered(x, axis, index, source, "add")
    total = Call(total.op, total.operands, label="total")
    ones = filled_like(shape_of(index), x, 1.0, label="ones")
    first = filled_like(shape_of(x), x, float(include_self), label="first")
    count = scattered(x, axis, index, ones, "add")
    count = Call(count.op, (first, *count.operands[1:]), label="count")
    least = count if include_self else Call(ops.Clamp(minimum=1.0), (count,), label="at_least_one")
    return Call(ops.Div(), (total, least))


# ---------------------------------------------------------------------------------------------------------------------
# At an index of one axis


def index_add(out: Shape, x: Node, axis: int, index: Node, source: Node, alpha: Any = 1) -> Any:
    require(not is_exact(x) or alpha == 1, "integers times a number")
    return along(x, axis, index, scaled(source, alpha, "source") if alpha != 1 else source, "add")


def index_copy(out: Shape, x: Node, axis: int, index: Node, source: Node) -> Any:
    return along(x, axis, index, source, "none")


def index_fill(out: Shape, x: Node, axis: int, index: Node, value: Any) -> Any:
    shape = list(shape_of(x))
    shape[axis] = prod(shape_of(index))
    return along(x, axis, index, filled_like(tuple(shape), x, scalar_of(value)), "none")


def along(x: Node, axis: int, index: Node, source: Any, reduce: Any) -> Any:
    require(rank_of(x) > 0, "a number has no axis")
    axis = axis_of(axis, rank_of(x))
    require(isinstance(shape_of(x)[axis], int), "it writes along the batch")
    require(rank_of(index) <= 1 and all(isinstance(n, int) for n in shape_of(index)), "the size of the index")
    places = places_of(x, [*(None for _ in range(axis)), index])
    _, before, behind = merged(x, places)
    return Call(ops.Scatter(axis=axis, reduce=reduce), (x, index_of_rank(places, before, behind), source))


def index_put(out: Shape, x: Node, indices: Sequence[Node | None], values: Any, accumulate: bool = False) -> Any:
    given = [i for i in indices if i is not None]
    if len(given) == 1 and dtype_of(given[0]) == torch.bool:
        require(not accumulate, "it accumulates where a mask is")
        return masked_put(out, x, indices.index(given[0]), given[0], values)
    places = places_of(x, indices)
    source, before, behind = merged(x, places)
    rows = (*before, *(places.shape[1:] if places.of_examples else places.shape), *behind)
    value = scalar_of(values)
    if isinstance(value, Node):
        value = expand(rows, to_dtype(shape_of(value), value, dtype_of(x)) if is_exact(value) else value)
    else:
        value = filled_like(rows, x, value)
    index = index_of_rank(places, before, behind)
    size = prod(places.shape[1:] if places.of_examples else places.shape)
    ranked = (*before, size, *behind)
    if tuple(map(str, ranked)) != tuple(map(str, rows)):
        value = reshaped(ranked, value, label="source")
    plain = places.count == 1 and places.order == tuple(range(rank_of(x)))
    op = ops.Scatter(axis=places.axis, reduce="add" if accumulate else "none")
    result = Call(op, (source, index, value), label="" if plain else "scatter")
    return result if plain else in_place_of(out, x, places.order, result)


def in_place_of(out: Shape, x: Node, order: tuple[int, ...], result: Call) -> Any:
    """The axes of x again, behind one that stands for several."""
    turned = tuple(shape_of(x)[a] for a in order)
    back = tuple(order.index(a) for a in range(len(order)))
    if order == tuple(range(len(order))):
        return reshaped(out, result)
    split = reshaped(turned, result, label="split")
    return Call(ops.Permute(axes=back), (split,))


def masked_put(out: Shape, x: Node, axis: int, mask: Node, values: Any) -> Any:
    """A number, or one row, where a mask of some axes is true."""
    ranked: Any = mask
    behind = rank_of(x) - axis - rank_of(mask)
    shape = (*(1 for _ in range(axis)), *shape_of(mask), *(1 for _ in range(behind)))
    if len(shape) != rank_of(mask):
        ranked = reshaped(shape, mask, label="mask")
    value = scalar_of(values)
    if not isinstance(value, Node):
        return masked_fill(out, x, ranked, value)
    require(rank_of(value) == 0 or rank_of(value) <= behind, "as many values as the mask has true elements")
    require(dtype_of(value) == dtype_of(x), f"values of {dtype_of(value)}")
    return Call(ops.Where(), (ranked, value, x)) if not is_exact(x) else where(out, ranked, value, x)


# ---------------------------------------------------------------------------------------------------------------------
# Into slices


def slice_scatter(
    out: Shape, x: Node, source: Node, axis: int = 0, start: Any = None, stop: Any = None, step: int = 1
) -> Any:
    size, axis = shape_of(x)[axis], axis_of(axis, rank_of(x))
    if str(shape_of(source)[axis]) == str(size) and integer(step) == 1:
        return source
    require(isinstance(size, int), "it writes to examples of the batch")
    first, last, _ = slice(integer(start or 0), size if stop is None else integer(stop)).indices(size)
    require(first < last, "the slice is empty")
    return into_slice(x, source, axis, first, last if last < size else None, integer(step))


def into_slice(x: Any, source: Any, axis: int, start: int, stop: int | None, step: int = 1) -> Call:
    part = sliced(x, axis, start, stop, step).op
    assert isinstance(part, ops.Slice)
    return Call(ops.SliceScatter(starts=part.starts, stops=part.stops, steps=part.steps), (x, source))


def select_scatter(out: Shape, x: Node, source: Node, axis: int, index: Any) -> Any:
    size, axis = shape_of(x)[axis], axis_of(axis, rank_of(x))
    require(isinstance(size, int), "it writes to an example of the batch")
    at = integer(index) % size
    shape = (*shape_of(source)[:axis], 1, *shape_of(source)[axis:])
    return into_slice(x, reshaped(shape, source, label="source"), axis, at, at + 1 if at + 1 < size else None)


# ---------------------------------------------------------------------------------------------------------------------
# All of a tensor


def copied(out: Shape, x: Node, source: Any, *_: Any) -> Any:
    value = scalar_of(source)
    if not isinstance(value, Node):
        return filled_like(out, x, value)
    same = dtype_of(value) == dtype_of(x)
    require(same or [str(n) for n in shape_of(value)] == [str(n) for n in out], "a copy that converts and repeats")
    return expand(out, value) if same else to_dtype(out, value, dtype_of(x))


def filled(out: Shape, x: Node, value: Any) -> Any:
    return copied(out, x, value)


TABLE: dict[Any, Handler] = {
    aten.scatter.src: scatter,
    aten.scatter.value: scatter_value,
    aten.scatter.reduce: scatter_with,
    aten.scatter_add.default: scatter_add,
    aten.scatter_reduce.two: scatter_reduce,
    aten.index_add.default: index_add,
    aten.index_copy.default: index_copy,
    aten.index_fill.int_Scalar: index_fill,
    aten.index_fill.int_Tensor: index_fill,
    aten.index_put.default: index_put,
    aten.slice_scatter.default: slice_scatter,
    aten.select_scatter.default: select_scatter,
}
# Without twins in place: a result that is an operand would be one more name for it.
COPIES: dict[Any, Handler] = {
    aten.copy.default: copied,
    aten.fill.Scalar: filled,
    aten.fill.Tensor: filled,
    KEPT_DROPOUT: lambda out, x, rate: Call(ops.Dropout(rate=rate), (x,)),
}
