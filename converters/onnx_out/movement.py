"""Export rules: shapes, parts, joins, indices and order. Index operands and results are int32, as in jquant."""

from __future__ import annotations

from typing import Any

import numpy as np

import jquant.ops as ops

from .writer import TYPES, Call, Operand, Unsupported, emit

END = 2**31 - 1  # a stop beyond every axis


@emit.register
def _(op: ops.Reshape, call: Call) -> None:
    call.add("Reshape", call.inputs[0], call.integers(op.shape, "shape"))


@emit.register
def _(op: ops.Flatten, call: Call) -> None:
    if (op.start, op.end) == (1, -1) and len(call.inputs[0].shape) > 2:
        call.add("Flatten", call.inputs[0], axis=1)
        return
    call.reshape_to(call.output.shape, call.inputs[0])


@emit.register
def _(op: ops.Permute, call: Call) -> None:
    call.add("Transpose", call.inputs[0], perm=list(op.axes))


@emit.register
def _(op: ops.Cat, call: Call) -> None:
    call.add("Concat", *call.inputs, axis=op.axis)


@emit.register
def _(op: ops.Stack, call: Call) -> None:
    axes = call.integers([op.axis], "axes")
    call.add("Concat", *(call.add("Unsqueeze", x, axes, part="unsqueezed") for x in call.inputs), axis=op.axis)


@emit.register
def _(op: ops.Expand, call: Call) -> None:
    x, *like = call.inputs
    sizes = (1,) * (len(op.shape) - len(x.shape)) + x.shape
    shape = [1 if new == -1 else new for new in op.shape]  # an axis is kept by 1
    if not like:
        if any(new == -1 and i >= len(sizes) for i, new in enumerate(op.shape)):
            raise Unsupported("an axis to keep that is not there")
        call.add("Expand", x, call.integers(shape, "shape"))
        return
    batch = call.add("Shape", like[0], part="batch", start=0, end=1)
    call.add("Expand", x, call.add("Concat", batch, call.integers(shape[1:], "rest"), part="shape", axis=0))


@emit.register
def _(op: ops.Tile, call: Call) -> None:
    (x,) = call.inputs
    new = len(op.repeats) - len(x.shape)
    source = call.add("Unsqueeze", x, call.integers(range(new), "axes"), part="unsqueezed") if new else x.name
    call.add("Tile", source, call.integers(op.repeats, "repeats"))


@emit.register
def _(op: ops.Roll, call: Call) -> None:
    """By indices: an ONNX form by slices would have values without a format."""
    (x,) = call.inputs
    y: Any = x
    for i, (shift, axis) in enumerate(zip(op.shifts, op.axes, strict=True), start=1):
        size = call.static((x.shape[axis],))[0]
        order = call.integers((np.arange(size) - shift) % size, "order")
        y = call.add("Gather", y, order, part="" if i == len(op.axes) else "rolled", axis=axis)


@emit.register
def _(op: ops.Flip, call: Call) -> None:
    _reverse(call, [a % len(call.inputs[0].shape) for a in op.axes])


@emit.register
def _(op: ops.SwapChannels, call: Call) -> None:
    _reverse(call, [op.axis % len(call.inputs[0].shape)])


def _reverse(call: Call, axes: list[int]) -> None:
    starts, stops = call.integers([-1] * len(axes), "starts"), call.integers([-END] * len(axes), "stops")
    steps = call.integers([-1] * len(axes), "steps")
    call.add("Slice", call.inputs[0], starts, stops, call.integers(axes, "axes"), steps)


@emit.register
def _(op: ops.Slice, call: Call) -> None:
    rank = len(op.starts)
    axes = [a for a in range(rank) if (op.starts[a], op.stops[a], op.steps[a]) != (0, None, 1)]
    if not axes:
        call.add("Identity", call.inputs[0])
        return
    starts = call.integers([op.starts[a] for a in axes], "starts")
    ends = [op.stops[a] for a in axes]
    stops = call.integers([END if e is None else e for e in ends], "stops")
    steps = call.integers([op.steps[a] for a in axes], "steps")
    call.add("Slice", call.inputs[0], starts, stops, call.integers(axes, "axes"), steps)


_PAD_MODES = {"constant": "constant", "border": "edge", "reflect": "reflect"}


@emit.register
def _(op: ops.Pad, call: Call) -> None:
    (x,) = call.inputs
    sides = call.integers([low for low, _ in op.padding] + [high for _, high in op.padding], "pads")
    if op.mode != "constant":
        call.add("Pad", x, sides, mode=_PAD_MODES[op.mode])
        return
    value = call.snap(op.value) if x.dtype == "float32" else op.value
    call.add("Pad", x, sides, call.constant(value, "value", x.dtype), mode="constant")


# ---------------------------------------------------------------------------------------------------------------------
# Shuffles


@emit.register
def _(op: ops.PixelShuffle, call: Call) -> None:
    call.add("DepthToSpace", call.inputs[0], blocksize=op.factor, mode="CRD")


@emit.register
def _(op: ops.PixelUnshuffle, call: Call) -> None:
    (x,), r = call.inputs, op.factor
    n, c, h, w = x.shape
    (channels, height, width) = call.static((c, h, w))
    split = call.reshape_to((n, channels, height // r, r, width // r, r), x, "split")
    turned = call.add("Transpose", split, part="turned", perm=[0, 1, 3, 5, 2, 4])
    call.reshape_to((n, channels * r * r, height // r, width // r), turned)


@emit.register
def _(op: ops.ChannelShuffle, call: Call) -> None:
    (x,) = call.inputs
    n, *rest = x.shape
    channels, *sizes = call.static(tuple(rest))
    split = call.reshape_to((n, op.groups, channels // op.groups, *sizes), x, "split")
    perm = [0, 2, 1, *range(3, 3 + len(sizes))]
    call.reshape_to((n, channels, *sizes), call.add("Transpose", split, part="turned", perm=perm))


# ---------------------------------------------------------------------------------------------------------------------
# Indices: clamped to the axis, as in jquant


def _index(call: Call, index: Operand, size: int | None) -> str:
    if size is None:
        raise Unsupported("it picks examples of the batch")
    low, high = (call.constant(v, n, np.int32) for v, n in ((0, "first"), (size - 1, "last")))
    return call.add("Clip", index, low, high, part="index")


@emit.register
def _(op: ops.IndexSelect, call: Call) -> None:
    x, *index = call.inputs
    at = _index(call, index[0], x.shape[op.axis]) if index else call.integers(op.indices, "indices")
    call.add("Gather", x, at, axis=op.axis)


@emit.register
def _(op: ops.Gather, call: Call) -> None:
    x, index = call.inputs
    axis, source = op.axis % len(x.shape), x.name
    fewer = [a for a, (m, n) in enumerate(zip(index.shape, x.shape, strict=True)) if a != axis and m != n]
    if fewer:
        starts = call.integers([0] * len(fewer), "starts")
        stops = call.integers(call.static(tuple(index.shape[a] for a in fewer)), "stops")
        source = call.add("Slice", x, starts, stops, call.integers(fewer, "axes"), part="within")
    call.add("GatherElements", source, _index(call, index, x.shape[axis]), axis=op.axis)


@emit.register
def _(op: ops.Scatter, call: Call) -> None:
    x, index, source = call.inputs
    at = _index(call, index, x.shape[op.axis])
    first = {"none": 13, "add": 16}.get(op.reduce, 18)
    if call.opset < first:
        raise Unsupported(f"ScatterElements that reduces by {op.reduce!r} needs opset {first}")
    if index.shape != source.shape:
        at = call.add("Expand", at, call.add("Shape", source, part="shape"), part="places")
    reduction = None if call.opset < 16 else op.reduce
    call.add("ScatterElements", x, at, source, axis=op.axis, reduction=reduction)


@emit.register
def _(op: ops.SliceScatter, call: Call) -> None:
    """Along one axis after the other: into the slice of the first one, the rest, and that back into x."""
    x, source = call.inputs
    bounds = list(zip(op.starts, op.stops, op.steps, strict=True))
    axes = [a for a, b in enumerate(bounds) if b != (0, None, 1)]
    if not axes:
        call.add("Identity", source)
        return
    sizes = call.static(tuple(x.shape[a] for a in axes))
    parts = [x.name]
    for k, axis in enumerate(axes[:-1]):
        parts.append(call.add("Gather", parts[-1], _along(call, bounds[axis], sizes[k]), part="slice", axis=axis))
    result = source.name
    for k in reversed(range(len(axes))):
        places = _along(call, bounds[axes[k]], sizes[k])
        ranked = call.constant([-1 if a == axes[k] else 1 for a in range(len(x.shape))], "rank", np.int64)
        at = call.add("Reshape", places, ranked, part="places")
        at = call.add("Expand", at, call.add("Shape", result, part="shape"), part="index")
        result = call.add("ScatterElements", parts[k], at, result, part="written" if k else "", axis=axes[k])


def _along(call: Call, bounds: tuple[int, int | None, int], size: int) -> str:
    return call.integers(range(*slice(*bounds).indices(size)), "at")


@emit.register(ops.TopK)
@emit.register(ops.TopKIndices)
@emit.register(ops.Sort)
@emit.register(ops.SortIndices)
def _(op: ops.TopK | ops.TopKIndices | ops.Sort | ops.SortIndices, call: Call) -> None:
    (x,) = call.inputs
    if isinstance(op, ops.TopK | ops.TopKIndices):
        count, largest = op.k, op.largest
    else:
        count, largest = call.static((x.shape[op.axis],))[0], op.descending
    k = call.integers([count], "k")
    options: dict[str, Any] = {"axis": op.axis, "largest": int(largest), "sorted": 1}
    keeps_values, is_mask = isinstance(op, ops.TopK | ops.Sort), x.dtype == "bool"
    ordered = call.cast(x, "int32", "as_int32") if is_mask else x.name
    values = call.output.name if keeps_values and not is_mask else call.writer.unique(f"{call.name}:values")
    places = call.writer.unique(f"{call.name}:places")
    call.writer.node("TopK", (ordered, k), (values, places), call.name, **options)
    if not keeps_values:
        call.writer.node("Cast", (places,), (call.output.name,), f"{call.name}:cast", to=TYPES["int32"])
    elif is_mask:
        call.cast(values, "bool")
