"""Handlers: shapes, parts, joins, indices and order."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

import jquant.ops as ops

from .call import MAX_CONSTANTS, Call, Handler, axes_of, axis_of
from .load import MAX_ELEMENTS
from .values import Known, Result, Unsupported, Value, known, require

Sizes = tuple[int, ...]
END = 2**31 - 1  # a stop that means the end


def reshaped(call: Call, x: Value, shapes: tuple[Sizes, Sizes], part: str = "") -> Value:
    """x in a shape that is given at both batch sizes."""
    small, large = shapes
    for was, new in zip(x.shapes, shapes, strict=True):
        require(prod(was) == prod(new), f"{list(was)} has not the elements of {list(new)}")
    if shapes == x.shapes:
        return x
    sizes = [a if a == b else -1 for a, b in zip(small, large, strict=True)]
    require(sizes.count(-1) <= 1, "more than one axis depends on the batch")
    require(0 not in sizes, "the shape is empty")
    return call.make(ops.Reshape(shape=tuple(sizes)), x, part=part)


def shape_operand(call: Call, i: int) -> tuple[Sizes, Sizes]:
    """A shape at both batch sizes: a list of integers that may follow from shapes of other values."""
    found = call.operand(i)
    require(isinstance(found, Known), "its shape is computed by the model; make it a constant")
    assert isinstance(found, Known)
    for array in found.at:
        require(array.ndim == 1 and array.dtype == np.int64 and array.size <= 64, "its shape should be int64 integers")
    small, large = (tuple(int(v) for v in array) for array in found.at)
    require(len(small) == len(large), "its rank depends on the batch")
    return small, large


def reshape(call: Call) -> Result:
    x, wanted = call.value(0), shape_operand(call, 1)
    zero_is_zero = call.flag("allowzero")

    def resolved(was: Sizes, asked: Sizes) -> Sizes:
        require(all(n >= -1 for n in asked) and asked.count(-1) <= 1, f"the shape {list(asked)}")
        kept = zero_is_zero or all(n != 0 or i < len(was) for i, n in enumerate(asked))
        require(kept, f"the shape {list(asked)} keeps an axis that is not there")
        full = [was[i] if n == 0 and not zero_is_zero else n for i, n in enumerate(asked)]
        rest = prod(n for n in full if n != -1)
        require(-1 not in full or (rest > 0 and prod(was) % rest == 0), f"{list(was)} does not fit {list(asked)}")
        return tuple(prod(was) // rest if n == -1 else n for n in full)

    small, large = (resolved(was, asked) for was, asked in zip(x.shapes, wanted, strict=True))
    return reshaped(call, x, (small, large))


def flatten(call: Call) -> Result:
    x, axis = call.value(0), call.integer("axis", 1)
    require(-x.rank <= axis <= x.rank, f"axis {axis} of {x.rank}")
    axis = axis + x.rank if axis < 0 else axis
    if axis == 1 and x.rank > 2 and None not in x.shape[1:]:
        return call.make(ops.Flatten(), x)
    small, large = ((prod(s[:axis]), prod(s[axis:])) for s in x.shapes)
    return reshaped(call, x, (small, large))


def squeeze(call: Call) -> Result:
    x = call.value(0)
    given = call.optional_integers(1, "axes")
    both = [i for i in range(x.rank) if x.shape[i] == 1]
    axes = tuple(both) if given is None else axes_of(given, x.rank)
    require(all(x.shape[a] == 1 for a in axes), f"it squeezes {axes} of {list(x.shape)}")
    small, large = (tuple(n for i, n in enumerate(s) if i not in axes) for s in x.shapes)
    return reshaped(call, x, (small, large))


def unsqueeze(call: Call) -> Result:
    x, given = call.value(0), call.optional_integers(1, "axes")
    require(given is not None and x.rank + len(given) <= 16, "its axes")
    assert given is not None
    axes = axes_of(given, x.rank + len(given))

    def resolved(was: Sizes) -> Sizes:
        rest = iter(was)
        return tuple(1 if i in axes else next(rest) for i in range(len(was) + len(axes)))

    return reshaped(call, x, (resolved(x.shapes[0]), resolved(x.shapes[1])))


def transpose(call: Call) -> Result:
    x = call.value(0)
    perm = call.integers("perm", tuple(range(x.rank))[::-1])
    require(sorted(perm) == list(range(x.rank)), f"the permutation {perm} of {x.rank} axes")
    return x if perm == tuple(range(x.rank)) else call.make(ops.Permute(axes=perm), x)


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def sliced(call: Call, x: Value, bounds: dict[int, tuple[int, int | None, int]], part: str = "") -> Value:
    starts, stops, steps = zip(*(bounds.get(a, (0, None, 1)) for a in range(x.rank)), strict=True)
    return call.make(ops.Slice(starts=starts, stops=stops, steps=steps), x, part=part)


def slice_(call: Call) -> Result:
    x = call.value(0)
    starts, stops = (call.known_integers(i, n) for i, n in ((1, "starts"), (2, "ends")))
    count = len(starts)
    axes = call.known_integers(3, "axes") if call.given(3) else tuple(range(count))
    steps = call.known_integers(4, "steps") if call.given(4) else (1,) * count
    require(len(stops) == len(axes) == len(steps) == count, "starts, ends, axes and steps of different lengths")
    axes = tuple(axis_of(a, x.rank) for a in axes)
    require(len(set(axes)) == count and 0 not in steps, "an axis twice, or a step of 0")
    bounds, flipped, every = {}, [], []
    for axis, start, stop, step in zip(axes, starts, stops, steps, strict=True):
        size = x.shape[axis]
        if size is None:
            require((start, step) == (0, 1) and stop >= END, "it picks examples of the batch")
            continue
        at = range(size)[start:stop:step]
        require(len(at) > 0, "the slice is empty")
        if step == -1 and len(at) == size:
            flipped.append(axis)
        elif step < 0:
            every.append((axis, tuple(at)))
        elif len(at) < size:
            end = stop + size if stop < 0 else min(stop, size)
            bounds[axis] = (at[0], None if stop >= END else end, step)
    steps_left = [bool(bounds), bool(flipped), *(True for _ in every)]
    left = sum(steps_left)
    if bounds:
        left -= 1
        x = sliced(call, x, bounds, part="slice" if left else "")
    if flipped:
        left -= 1
        x = call.make(ops.Flip(axes=tuple(flipped)), x, part="flip" if left else "")
    for axis, indices in every:
        left -= 1
        require(len(indices) <= MAX_CONSTANTS, "too many elements of a negative step")
        x = call.make(ops.IndexSelect(axis=axis, indices=indices), x, part=f"axis_{axis}" if left else "")
    return x


def split(call: Call) -> list[Result]:
    x, outputs = call.value(0), len(call.node.output)
    axis = axis_of(call.integer("axis", 0), x.rank)
    size = x.shape[axis]
    require(size is not None, "it splits the batch")
    assert size is not None
    sizes = call.optional_integers(1, "split")
    if sizes is None:
        each = -(-size // outputs)
        sizes = (each,) * (outputs - 1) + (size - each * (outputs - 1),)
    require(len(sizes) == outputs and sum(sizes) == size and min(sizes) > 0, f"parts {sizes} of an axis of {size}")
    found: list[Result] = []
    for i, length in enumerate(sizes):
        start = sum(sizes[:i])
        part = str(i) if i else ""
        stop = None if start + length == size else start + length
        found.append(sliced(call, x, {axis: (start, stop, 1)}, part=part))
    return found


def pad(call: Call) -> Result:
    x, mode = call.value(0), call.text("mode", "constant")
    modes: dict[str, Any] = {"constant": "constant", "edge": "border", "reflect": "reflect"}
    require(mode in modes, f"mode={mode!r}; constant, edge and reflect are operators")
    pads = call.known_integers(1, "pads") if call.opset >= 11 else call.integers("pads", ())
    axes = axes_in_order(call, x, 3) if call.given(3) else tuple(range(x.rank))
    require(len(pads) == 2 * len(axes) and max(map(abs, pads), default=0) <= 2**24, f"pads {list(pads)[:16]}")
    value = 0.0
    if call.opset < 11:
        value = call.number("value", 0.0)
    elif call.given(2):
        value = call.known_number(2, "value")
    require(all(n >= 0 for n in pads), "negative pads; use Slice")
    sides = {a: (pads[i], pads[i + len(axes)]) for i, a in enumerate(axes)}
    padding = tuple(sides.get(a, (0, 0)) for a in range(x.rank))
    require(x.rank == 0 or x.shape[0] is not None or padding[0] == (0, 0), "it pads the batch")
    if not any(map(any, padding)):
        return x
    return call.make(ops.Pad(padding=padding, value=value, mode=modes[mode]), x)


def axes_in_order(call: Call, x: Value, i: int) -> Sizes:
    axes = tuple(axis_of(a, x.rank) for a in call.known_integers(i, "axes"))
    require(len(set(axes)) == len(axes), "an axis twice")
    return axes


# ---------------------------------------------------------------------------------------------------------------------
# Joining and repeating


def concat(call: Call) -> Result:
    values = call.values()
    require(len({(x.rank, x.dtype) for x in values}) == 1, "operands of different rank or dtype")
    axis = axis_of(call.integer("axis", 0), values[0].rank)
    return values[0] if len(values) == 1 else call.make(ops.Cat(axis=axis), *values)


def expand(call: Call) -> Result:
    """An axis that depends on the batch is kept, or one of 1 gets the batch of an input."""
    x, wanted = call.value(0), shape_operand(call, 1)

    def resolved(was: Sizes, asked: Sizes) -> Sizes:
        rank = max(len(was), len(asked))
        was, asked = (1,) * (rank - len(was)) + was, (1,) * (rank - len(asked)) + asked
        for a, b in zip(was, asked, strict=True):
            require(a == b or 1 in (a, b), f"{list(was)} does not broadcast to {list(asked)}")
        return tuple(b if a == 1 else a for a, b in zip(was, asked, strict=True))

    small, large = (resolved(was, asked) for was, asked in zip(x.shapes, wanted, strict=True))
    return expanded(call, x, (small, large))


def expanded(call: Call, x: Value, shapes: tuple[Sizes, Sizes], part: str = "") -> Value:
    small, large = shapes
    require(0 not in small and prod(large) < MAX_ELEMENTS, f"the shape {list(large)}")
    if shapes == x.shapes:
        return x
    new = len(small) - x.rank
    grown = [i for i, n in enumerate(small) if n != large[i] and (i < new or x.shape[i - new] is not None)]
    batch = call.graph.batch
    if not grown:
        kept = tuple(n if n == m else -1 for n, m in zip(small, large, strict=True))
        return call.make(ops.Expand(shape=kept), x, part=part)
    require(len(grown) == 1 and batch is not None, "several axes grow to the batch")
    assert batch is not None
    axis = grown[0]
    same = (small[axis], large[axis]) == (batch.shapes[0][0], batch.shapes[1][0])
    require(same, "an axis grows to a multiple of the batch")
    if axis == 0:
        return call.make(ops.Expand(shape=(1, *small[1:])), x, batch, part=part)
    ranked = tuple((1,) * (len(small) - x.rank) + s for s in x.shapes)
    x = reshaped(call, x, (ranked[0], ranked[1]), part=f"{part}_ranked" if part else "ranked") if new else x
    order = (axis, *(i for i in range(len(small)) if i != axis))
    front = call.make(ops.Permute(axes=order), x, part=f"{part}_in_front" if part else "in_front")
    rest = tuple(small[i] for i in order[1:])
    examples = call.make(ops.Expand(shape=(1, *rest)), front, batch, part=f"{part}_examples" if part else "examples")
    return call.make(ops.Permute(axes=tuple(order.index(i) for i in range(len(small)))), examples, part=part)


def tile(call: Call) -> Result:
    x, repeats = call.value(0), call.known_integers(1, "repeats")
    require(len(repeats) == x.rank and min(repeats, default=1) > 0, f"repeats {repeats}")
    require(prod(repeats) < MAX_ELEMENTS, f"repeats {repeats}")
    return call.make(ops.Tile(repeats=repeats), x) if any(n > 1 for n in repeats) else x


def constant_of_shape(call: Call) -> Result:
    """Of a shape with the batch: known for both sizes of it; a large one is a number that is expanded."""
    small, large = shape_operand(call, 0)
    value = call.attribute("value", "tensor")
    value = np.zeros(1, np.float32) if value is None else value
    require(value.size == 1, "its value should be one number")
    if small == large:
        require(prod(small) <= MAX_CONSTANTS, f"a constant of shape {list(small)}")
        return known(np.full(small, value.reshape(())))
    if prod(large) <= MAX_CONSTANTS:
        return Known((np.full(small, value.reshape(())), np.full(large, value.reshape(()))))
    number = call.constant(value.reshape((1,) * len(small)), "value")
    return expanded(call, number, (small, large))


# ---------------------------------------------------------------------------------------------------------------------
# Indices and order


def from_the_start(call: Call, index: Value, size: int | None, part: str = "index") -> Value:
    """An index that may count from the end as one that counts from the start, where jquant's are."""
    require(size is not None, "it picks examples of the batch")
    require(index.dtype == "int32", f"an index of {index.dtype}")
    negative = call.make(ops.Less(value=0.0), index, part=f"{part}_is_negative")
    size_of = call.constant(np.int32(size or 0), f"{part}_size")
    shifted = call.make(ops.Add(), index, size_of, part=f"{part}_from_end")
    return call.make(ops.Where(), negative, shifted, index, part=f"{part}_from_start")


def gather(call: Call) -> Result:
    data, index = call.operand(0), call.operand(1)
    shape = data.at[0].shape if isinstance(data, Known) else data.shape
    axis = axis_of(call.integer("axis", 0), len(shape))
    table = isinstance(data, Known) and data.fixed and data.at[0].ndim == 2 and data.at[0].dtype == np.float32
    if isinstance(data, Known) and table and axis == 0 and isinstance(index, Value) and index.dtype == "int32":
        return call.make(ops.Embedding(), index, params={"weight": data})
    x = call.value(0)
    require(x.rank > 0, "a number has no axis")
    size = x.shape[axis]
    require(size is not None, "it picks examples of the batch")
    assert size is not None
    index_shapes = index.shapes if isinstance(index, Value) else (index.at[0].shape, index.at[1].shape)
    one_axis = len(index_shapes[0]) == 1
    part = "" if one_axis else "selected"
    if isinstance(index, Known):
        flat = call.known_integers(1, "index") if one_axis else tuple(int(v) for v in index.at[0].reshape(-1))
        require(index.fixed and 0 < len(flat) <= MAX_CONSTANTS, "its indices")
        require(np.issubdtype(index.at[0].dtype, np.integer), "an index that is no integer")
        require(all(-size <= i < size for i in flat), f"an index beyond an axis of {size}")
        picked = call.make(ops.IndexSelect(axis=axis, indices=flat), x, part=part)
    else:
        source = reshaped(call, index, tuple((prod(s),) for s in index.shapes), part="flat_index")  # type: ignore[arg-type]
        source = from_the_start(call, source, size)
        picked = call.make(ops.IndexSelect(axis=axis), x, source, part=part)
    if one_axis:
        return picked
    small, large = (s[:axis] + i + s[axis + 1 :] for s, i in zip(x.shapes, index_shapes, strict=True))
    return reshaped(call, picked, (small, large))


def gather_elements(call: Call) -> Result:
    x, index = call.value(0), call.value(1)
    axis = axis_of(call.integer("axis", 0), x.rank)
    return call.make(ops.Gather(axis=axis), x, from_the_start(call, index, x.shape[axis]))


def top_k(call: Call) -> list[Result]:
    x = call.value(0)
    axis = axis_of(call.integer("axis", -1), x.rank)
    require(x.shape[axis] is not None, "it orders the batch")
    (count,) = call.known_integers(1, "k") or (0,)
    largest = call.flag("largest", True)
    size = x.shape[axis]
    require(size is not None and 0 < count <= size, f"k={count} of {size}")
    values: Result = call.make(ops.TopK(axis=axis, k=count, largest=largest), x)
    return [values, call.make(ops.TopKIndices(axis=axis, k=count, largest=largest), x, part="indices")]


# ---------------------------------------------------------------------------------------------------------------------
# Channels and space


def depth_to_space(call: Call) -> Result:
    x, r = call.value(0), call.integer("blocksize", 0)
    require(x.rank == 4 and 1 <= r <= 1024 and None not in x.shape[1:], f"blocksize {r} on {list(x.shape)}")
    if call.text("mode", "DCR") == "CRD":
        return call.make(ops.PixelShuffle(factor=r), x)
    split_to, order = [], (0, 3, 4, 1, 5, 2)
    for n, c, h, w in x.shapes:
        split_to.append((n, r, r, c // (r * r), h, w))
    y = reshaped(call, x, (split_to[0], split_to[1]), part="split")
    y = call.make(ops.Permute(axes=order), y, part="turned")
    small, large = ((n, c // (r * r), h * r, w * r) for n, c, h, w in x.shapes)
    return reshaped(call, y, (small, large))


def space_to_depth(call: Call) -> Result:
    x, r = call.value(0), call.integer("blocksize", 0)
    require(x.rank == 4 and 1 <= r <= 1024, f"blocksize {r} on {list(x.shape)}")
    mode = call.text("mode", "DCR")
    require(mode in ("DCR", "CRD"), f"mode={mode!r}")
    if mode == "CRD":
        return call.make(ops.PixelUnshuffle(factor=r), x)
    split_to = [(n, c, h // r, r, w // r, r) for n, c, h, w in x.shapes]
    y = reshaped(call, x, (split_to[0], split_to[1]), part="split")
    y = call.make(ops.Permute(axes=(0, 3, 5, 1, 2, 4)), y, part="turned")
    small, large = ((n, c * r * r, h // r, w // r) for n, c, h, w in x.shapes)
    return reshaped(call, y, (small, large))


def trilu(call: Call) -> Result:
    """The upper or lower triangle: the rest is filled with 0."""
    x = call.value(0)
    k = call.known_integers(1, "k")[0] if call.given(1) else 0
    require(x.rank >= 2 and None not in x.shape[-2:], f"a triangle of {list(x.shape)}")
    rows, columns = x.shapes[0][-2:]
    require(rows * columns <= MAX_CONSTANTS, f"a triangle of {list(x.shape)}")
    kept = np.tri(rows, columns, (k - 1) if call.flag("upper", True) else k, dtype=bool)
    outside = kept if call.flag("upper", True) else ~kept
    require(x.dtype == "float32", f"a triangle of {x.dtype}")
    return call.make(ops.MaskedFill(value=0.0), x, call.constant(outside, "outside"))


def refused(reason: str) -> Handler:
    def handler(call: Call) -> Result:
        raise Unsupported(reason)

    return handler


TABLE: dict[str, Handler] = {
    "Concat": concat,
    "ConstantOfShape": constant_of_shape,
    "DepthToSpace": depth_to_space,
    "Expand": expand,
    "Flatten": flatten,
    "Gather": gather,
    "GatherElements": gather_elements,
    "If": refused("its graph depends on values; export the model without control flow"),
    "Loop": refused("its graph depends on values; export the model without control flow"),
    "NonZero": refused("the size of its result depends on values"),
    "Pad": pad,
    "Reshape": reshape,
    "Scan": refused("its graph depends on values; export the model without control flow"),
    "Slice": slice_,
    "SpaceToDepth": space_to_depth,
    "Split": split,
    "Squeeze": squeeze,
    "Tile": tile,
    "TopK": top_k,
    "Transpose": transpose,
    "Trilu": trilu,
    "Unsqueeze": unsqueeze,
}
