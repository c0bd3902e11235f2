"""Shapes, parts of tensors, joining, repeating, padding, and tensors that the code makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

import jquant.ops as ops
from jquant.types import Op

from .call import (
    BATCH,
    Call,
    Handler,
    Shape,
    aten,
    axis_of,
    dtype_of,
    integer,
    integers,
    per_axis,
    rank_of,
    require,
    reshaped,
    shape_of,
)

# ---------------------------------------------------------------------------------------------------------------------
# Shapes


def reshape(out: Shape, x: Node, *_: Any) -> Any:
    """The target is the shape that the output has, so that sizes computed from the batch need no arithmetic."""
    return reshaped(out, x)


def flatten(out: Shape, x: Node, start: int, end: int) -> Call:
    """`Flatten` keeps the batch symbolic also where other axes depend on it."""
    return Call(ops.Flatten(start=start, end=end), (x,)) if rank_of(x) else reshaped(out, x)


def permute(out: Shape, x: Node, axes: Sequence[int]) -> Call:
    return Call(ops.Permute(axes=tuple(axis_of(a, rank_of(x)) for a in axes)), (x,))


def transpose(out: Shape, x: Node, first: int = 0, second: int = 1) -> Any:
    if not rank_of(x):
        return x
    axes = list(range(rank_of(x)))
    axes[first], axes[second] = axes[second], axes[first]
    return permute(out, x, axes)


def transpose_all(out: Shape, x: Node) -> Call:
    return permute(out, x, range(rank_of(x))[::-1])  # torch's `t` leaves a vector as it is


def transpose_last(out: Shape, x: Node) -> Call:
    return transpose(out, x, -2, -1)


def move_axes(out: Shape, x: Node, source: Any, destination: Any) -> Call:
    rank = rank_of(x)
    sources, targets = ([axis_of(a, rank) for a in ((v,) if isinstance(v, int) else v)] for v in (source, destination))
    rest = iter(a for a in range(rank) if a not in sources)
    taken = dict(zip(targets, sources, strict=True))
    return permute(out, x, [taken[a] if a in taken else next(rest) for a in range(rank)])


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def sliced(x: Any, axis: int, start: int, stop: int | None, step: int = 1, *, rank: int = -1, label: str = "") -> Call:
    rank = rank_of(x) if rank < 0 else rank
    axis = axis_of(axis, rank)
    op = ops.Slice(
        starts=tuple(start if a == axis else 0 for a in range(rank)),
        stops=tuple(stop if a == axis else None for a in range(rank)),
        steps=tuple(step if a == axis else 1 for a in range(rank)),
    )
    return Call(op, (x,), label=label)


def slice_axis(out: Shape, x: Node, axis: int = 0, start: Any = None, stop: Any = None, step: int = 1) -> Any:
    size = shape_of(x)[axis]
    if str(size) == str(out[axis]) and integer(step) == 1:
        return x
    require(isinstance(size, int), "it picks examples of the batch; do that outside the model")
    start, stop, _ = slice(integer(start or 0), size if stop is None else integer(stop)).indices(size)
    require(start < stop, "the slice is empty")
    return sliced(x, axis, start, stop if stop < size else None, step)


def narrow(out: Shape, x: Node, axis: int, start: Any, length: Any) -> Any:
    start = integer(start)
    return slice_axis(out, x, axis, start, (start + shape_of(x)[axis] if start < 0 else start) + integer(length))


def select(out: Shape, x: Node, axis: int, index: Any) -> Call:
    size = shape_of(x)[axis]
    require(isinstance(size, int), "it picks an example of the batch; do that outside the model")
    at = integer(index) % size
    return reshaped(out, sliced(x, axis, at, at + 1, label="slice"))


def pieces(out: list[Shape], x: Node, axis: int) -> list[Any]:
    """Slices along an axis of the sizes that the results have."""
    require(isinstance(shape_of(x)[axis], int), "it splits the batch")
    starts = [sum(shape[axis] for shape in out[:i]) for i in range(len(out))]
    require(all(shape[axis] > 0 for shape in out), "a part is empty")
    return [sliced(x, axis, s, s + shape[axis]) for s, shape in zip(starts, out, strict=True)]


def split(out: list[Shape], x: Node, sizes: Any, axis: int = 0) -> list[Any]:
    return pieces(out, x, axis)


def unbind(out: list[Shape], x: Node, axis: int) -> list[Any]:
    return [select(shape, x, axis, i) for i, shape in enumerate(out)]


# ---------------------------------------------------------------------------------------------------------------------
# Joining and repeating


def cat(out: Shape, tensors: Sequence[Node], axis: int = 0) -> Any:
    tensors = [t for t in tensors if shape_of(t) != (0,)]  # torch's old way to say nothing
    require(len({rank_of(t) for t in tensors}) == 1, "operands of different rank")
    require(len({dtype_of(t) for t in tensors}) == 1, "operands of different dtypes")
    return Call(ops.Cat(axis=axis_of(axis, len(out))), tuple(tensors)) if len(tensors) > 1 else tensors[0]


def hstack(out: Shape, tensors: Sequence[Node]) -> Any:
    return cat(out, tensors, 0 if len(out) == 1 else 1)


def stack(out: Shape, tensors: Sequence[Node], axis: int) -> Call:
    require(len({dtype_of(t) for t in tensors}) == 1, "operands of different dtypes")
    return Call(ops.Stack(axis=axis_of(axis, len(out))), tuple(tensors))


def is_batch(size: Any) -> bool:
    """Whether a size is the batch itself, and no multiple of it."""
    return not isinstance(size, int) and bool(size.node.expr.is_Symbol)


def expand(out: Shape, x: Any, *_: Any) -> Any:
    """An axis that depends on the batch is kept, or it is axis 0 and gets the batch of the first input."""
    was = (1,) * (len(out) - rank_of(x)) + shape_of(x)
    if rank_of(x) == len(out) and [str(n) for n in was] == [str(n) for n in out]:
        return x
    grown = [i for i, (n, old) in enumerate(zip(out, was, strict=True)) if not isinstance(n, int) and old == 1]
    require(grown in ([], [0]) and all(is_batch(out[i]) for i in grown), "an axis other than 0 grows to the batch")
    require(all(n > 0 for n in out if isinstance(n, int)), f"the shape {out} is empty")
    return expanded(out, x, like_batch=bool(grown))


def expanded(out: Shape, x: Any, *, like_batch: bool, label: str = "") -> Call:
    shape = tuple(n if isinstance(n, int) else -1 for n in out)
    if like_batch:
        return Call(ops.Expand(shape=(1, *shape[1:])), (x, BATCH), label=label)
    return Call(ops.Expand(shape=shape), (x,), label=label)


def repeat(out: Shape, x: Node, repeats: Sequence[Any]) -> Any:
    """A symbolic number of times is an expansion of axes of size 1."""
    if not all(isinstance(n, int) for n in repeats):
        was = (1,) * (len(out) - rank_of(x)) + shape_of(x)
        kept = all(n == 1 or old == 1 for n, old in zip(repeats, was, strict=True) if isinstance(n, int))
        require(kept, "it repeats by the batch and by a number; use two calls")
        return expand(out, x)
    require(min(repeats, default=1) > 0, "nothing is left")
    return Call(ops.Tile(repeats=tuple(repeats)), (x,)) if repeats else x


def tile(out: Shape, x: Node, repeats: Sequence[Any]) -> Any:
    return repeat(out, x, (*(1,) * (rank_of(x) - len(repeats)), *repeats))


def repeat_interleave(out: Shape, x: Node, repeats: Any, axis: int | None = None, size: Any = None) -> Call:
    count = integer(repeats)
    require(count > 0, "nothing is left")
    source: Any = x
    length = shape_of(x)[axis] if axis is not None else x.meta["val"].numel()
    if axis is None:
        source = Call(ops.Reshape(shape=(-1,)), (x,), label="flat")
    require(isinstance(length, int), "it repeats examples of the batch")
    indices = tuple(i for i in range(length) for _ in range(count))
    return Call(ops.IndexSelect(axis=0 if axis is None else axis_of(axis, rank_of(x)), indices=indices), (source,))


def roll(out: Shape, x: Node, shifts: Any, axes: Any = ()) -> Call:
    rank = rank_of(x)
    by = tuple(integer(s) for s in ((shifts,) if isinstance(shifts, int) else shifts))
    if axes in ((), []):
        flat = Call(ops.Roll(shifts=by, axes=(0,)), (Call(ops.Reshape(shape=(-1,)), (x,), label="flat"),), label="roll")
        return reshaped(out, flat)
    return Call(ops.Roll(shifts=by, axes=tuple(axis_of(a, rank) for a in per_axis(axes, len(by)))), (x,))


def flip(out: Shape, x: Node, axes: Sequence[int]) -> Any:
    return Call(ops.Flip(axes=tuple(axis_of(a, rank_of(x)) for a in axes)), (x,)) if axes and rank_of(x) else x


# ---------------------------------------------------------------------------------------------------------------------
# Padding

PAD_MODES: dict[str, Any] = {"constant": "constant", "replicate": "border", "reflect": "reflect"}


def pad(out: Shape, x: Node, padding: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    """Negative padding crops."""
    require(
        mode in (*PAD_MODES, "circular"), f"padding mode {mode!r}; constant, replicate, reflect and circular are known"
    )
    require(all(isinstance(n, int) for n in padding), "the padding depends on the batch size; make it a constant")
    pairs = list(zip(padding[::2], padding[1::2], strict=True))[::-1]  # torch starts at the last axis
    full = [(0, 0)] * (rank_of(x) - len(pairs)) + pairs
    if mode == "circular":
        return circular(x, full)
    added = tuple((max(low, 0), max(high, 0)) for low, high in full)
    result: Any = x
    for axis, (low, high) in enumerate(full):
        if low < 0 or high < 0:
            size = shape_of(x)[axis]
            require(isinstance(size, int), "it crops the batch")
            require(-min(low, 0) < size + min(high, 0), "nothing is left")
            last = all(n >= 0 for pair in full[axis + 1 :] for n in pair) and added == ((0, 0),) * len(full)
            label = "" if last else "crop"
            result = sliced(result, axis, -min(low, 0), size + min(high, 0), rank=len(full), label=label)
    if result is not x and added == ((0, 0),) * len(full):
        return result
    return Call(ops.Pad(padding=added, value=float(value or 0.0), mode=PAD_MODES[mode]), (result,))


def circular(x: Node, padding: Sequence[tuple[int, int]]) -> Any:
    """The elements of each axis again from its other end, after what negative padding crops."""
    result: Any = x
    axes = [axis for axis, sides in enumerate(padding) if sides != (0, 0)]
    for axis in axes:
        size, (low, high) = shape_of(x)[axis], padding[axis]
        require(isinstance(size, int), "it pads the batch")
        first, count = max(-low, 0), size + min(low, 0) + min(high, 0)
        require(count > 0, "nothing is left")
        indices = tuple(first + i % count for i in range(-max(low, 0), count + max(high, 0)))
        op = ops.IndexSelect(axis=axis, indices=indices)
        result = Call(op, (result,), label="" if axis == axes[-1] else f"axis{axis}")
    return result


def constant_pad(out: Shape, x: Node, padding: Sequence[int], value: float = 0.0) -> Any:
    return pad(out, x, padding, "constant", value)


def pad_of(mode: str) -> Handler:
    return lambda out, x, padding: pad(out, x, padding, mode)


# ---------------------------------------------------------------------------------------------------------------------
# Shuffles


def image_batch(op_of: Any) -> Handler:
    def handler(out: Shape, x: Node, factor: Any) -> Call:
        op: Op = op_of(integer(factor))
        require(rank_of(x) == 4 or isinstance(op, ops.ChannelShuffle), "an image batch of 4 axes is needed")
        return Call(op, (x,))

    return handler


# ---------------------------------------------------------------------------------------------------------------------
# Tensors that the code makes; those of static shape never come here


def filled(out: Shape, value: Any, dtype: torch.dtype) -> Call:
    require(isinstance(value, int | float), "the value depends on the batch size; make it a constant")
    known = dtype in (torch.float32, torch.int64, torch.int32, torch.bool)
    require(known, f"a tensor of {dtype}; make it float32")
    source: Any = float(value)
    if dtype != torch.float32:
        source = integers((), [int(value)], "bool" if dtype == torch.bool else "int32")
    symbolic = [i for i, n in enumerate(out) if not isinstance(n, int)]
    require(len(symbolic) <= 1 and all(is_batch(out[i]) for i in symbolic), "its shape is computed from the batch")
    if not symbolic or symbolic == [0]:
        return expanded(out, source, like_batch=bool(symbolic))
    at = symbolic[0]
    moved = (out[at], *out[:at], *out[at + 1 :])
    first = expanded(moved, source, like_batch=True, label="expand")
    return Call(ops.Permute(axes=(*range(1, at + 1), 0, *range(at + 1, len(out)))), (first,))


def full(out: Shape, size: Any, value: Any, dtype: Any = None, *_: Any) -> Call:
    plain = {bool: torch.bool, int: torch.int64, float: torch.float32}[type(value)]
    return filled(out, value, dtype or plain)


def full_with(value: float) -> Handler:
    return lambda out, size, dtype=None, *_: filled(out, value, dtype or torch.float32)


def new_full(out: Shape, x: Node, size: Any, value: Any, dtype: Any = None, *_: Any) -> Call:
    return filled(out, value, dtype or dtype_of(x))


def new_with(value: float) -> Handler:
    return lambda out, x, size, dtype=None, *_: filled(out, value, dtype or dtype_of(x))


def full_like(out: Shape, x: Node, value: Any, dtype: Any = None, *_: Any) -> Call:
    return filled(out, value, dtype or dtype_of(x))


def like_with(value: float) -> Handler:
    return lambda out, x, dtype=None, *_: filled(out, value, dtype or dtype_of(x))


def identity(out: Shape, x: Node, *_: Any) -> Node:
    return x


TABLE: dict[Any, Handler] = {
    # shapes
    aten.flatten.using_ints: flatten,
    aten.reshape.default: reshape,
    aten.reshape_as.default: reshape,
    aten.view.default: reshape,
    aten.view_as.default: reshape,
    aten._unsafe_view.default: reshape,
    aten.unflatten.int: reshape,
    aten.squeeze.default: reshape,
    aten.squeeze.dim: reshape,
    aten.squeeze.dims: reshape,
    aten.unsqueeze.default: reshape,
    aten.ravel.default: reshape,
    aten.permute.default: permute,
    aten.transpose.int: transpose,
    aten.swapaxes.default: transpose,
    aten.swapdims.default: transpose,
    aten.t.default: transpose_all,
    aten.numpy_T.default: transpose_all,
    aten.mT.default: transpose_last,
    aten.movedim.int: move_axes,
    aten.movedim.intlist: move_axes,
    aten.moveaxis.int: move_axes,
    aten.moveaxis.intlist: move_axes,
    # parts
    aten.slice.Tensor: slice_axis,
    aten.narrow.default: narrow,
    aten.select.int: select,
    aten.split.Tensor: split,
    aten.split.sizes: split,
    aten.split_with_sizes.default: split,
    aten.tensor_split.sections: split,
    aten.tensor_split.indices: split,
    aten.chunk.default: split,
    aten.unsafe_chunk.default: split,
    aten.unsafe_split.Tensor: split,
    aten.unbind.int: unbind,
    # joining, repeating
    aten.cat.default: cat,
    aten.concat.default: cat,
    aten.hstack.default: hstack,
    aten.stack.default: stack,
    aten.expand.default: expand,
    aten.expand_as.default: expand,
    aten.broadcast_to.default: expand,
    aten.repeat.default: repeat,
    aten.tile.default: tile,
    aten.repeat_interleave.self_int: repeat_interleave,
    aten.roll.default: roll,
    aten.flip.default: flip,
    # padding
    aten.pad.default: pad,
    aten.constant_pad_nd.default: constant_pad,
    **{getattr(aten, f"reflection_pad{n}d").default: pad_of("reflect") for n in (1, 2, 3)},
    **{getattr(aten, f"replication_pad{n}d").default: pad_of("replicate") for n in (1, 2, 3)},
    # shuffles
    aten.pixel_shuffle.default: image_batch(lambda n: ops.PixelShuffle(factor=n)),
    aten.pixel_unshuffle.default: image_batch(lambda n: ops.PixelUnshuffle(factor=n)),
    aten.channel_shuffle.default: image_batch(lambda n: ops.ChannelShuffle(groups=n)),
    # tensors with the batch in their shape
    aten.full.default: full,
    aten.zeros.default: full_with(0.0),
    aten.ones.default: full_with(1.0),
    aten.new_full.default: new_full,
    aten.new_zeros.default: new_with(0.0),
    aten.new_ones.default: new_with(1.0),
    aten.full_like.default: full_like,
    aten.zeros_like.default: like_with(0.0),
    aten.ones_like.default: like_with(1.0),
    # identities
    aten.alias.default: identity,
    aten.clone.default: identity,
    aten.contiguous.default: identity,
    aten.detach.default: identity,
    aten.detach_.default: identity,
    aten.lift_fresh_copy.default: identity,
    aten.lift_fresh.default: identity,
    aten.resolve_conj.default: identity,
    aten.resolve_neg.default: identity,
}
