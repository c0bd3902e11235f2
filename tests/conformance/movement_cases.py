"""Data movement, indexing, sorting and pooling."""

from conformance.harness import Case, both

from jquant import ops

IMAGE = ((6, 9, 8),)
PAIR = ((3, 5, 4), (3, 5, 4))


def every(**options) -> tuple[Case, ...]:
    """Both integer formats, and exact values: masks, indices and pixels."""
    exact = (Case(**options, inputs=(fmt,)) for fmt in ("bool", "index:70000", "uint8"))
    return (*both(**options), *exact)


def pool2d(kind: type, **options) -> tuple[Case, ...]:
    defaults = {"kernel": (3, 2), "strides": (2, 1), "padding": ((1, 1), (0, 1))}
    return both(op=kind(**defaults | options), shapes=IMAGE)


CASES = (
    *every(op=ops.Cat(axis=1), shapes=PAIR),
    *every(op=ops.Cat(axis=-1), shapes=((3, 4), (3, 1), (3, 7))),
    *every(op=ops.Stack(axis=1), shapes=PAIR),
    *every(op=ops.Stack(axis=-1), shapes=PAIR),
    Case(op=ops.Cat(axis=2), shapes=PAIR, inputs=("int16", "int8"), output="int8"),
    Case(op=ops.Cat(axis=2), shapes=PAIR, inputs=("int8", "int16"), output="int16"),
    Case(op=ops.Stack(axis=2), shapes=PAIR, inputs=("int8", "int16"), output="int16"),
    *both(op=ops.Cat(axis=1), shapes=PAIR, input_scales=(0.5, 0.5), output_scale=0.5),
    *every(op=ops.Reshape(shape=(-1, 9, 48)), shapes=IMAGE),
    *every(op=ops.Flatten(start=-3, end=2), shapes=IMAGE),
    *every(op=ops.Permute(axes=(0, 3, 1, 2)), shapes=IMAGE),
    *every(op=ops.Pad(padding=((0, 0), (0, 0), (1, 2), (0, 3)), value=1.0), shapes=IMAGE),
    *both(op=ops.Pad(padding=((0, 0), (1, 0), (1, 2), (0, 3)), value=-0.3), shapes=IMAGE),
    *every(op=ops.Pad(padding=((0, 0), (0, 0), (12, 2), (0, 3)), mode="border"), shapes=IMAGE),
    *every(op=ops.Expand(shape=(-1, 5, 9, 7)), shapes=((1, 9, 1),)),
    *every(op=ops.Tile(repeats=(1, 2, 1, 3)), shapes=IMAGE),
    *every(op=ops.Roll(shifts=(3, -5), axes=(1, -1)), shapes=IMAGE),
    *every(op=ops.Flip(axes=(1, -1)), shapes=IMAGE),
    *every(op=ops.Slice(starts=(0, 1, -5, 0), stops=(None, 5, -1, None), steps=(1, 2, 1, 3)), shapes=IMAGE),
    *every(op=ops.IndexSelect(axis=-2, indices=(3, -1, 0, 0)), shapes=IMAGE),
    Case(op=ops.IndexSelect(axis=1), shapes=((64, 256), ()), inputs=("int8", "index:66")),
    Case(op=ops.IndexSelect(axis=1), shapes=((64, 256), ()), inputs=("int16", "index:66"), output="int16"),
    *(
        Case(op=ops.Gather(axis=2), shapes=((4, 10, 3), (4, 6, 2)), inputs=(fmt, "index:12"), output=output)
        for fmt, output in (("int8", "int8"), ("int16", "int16"), ("bool", "int8"), ("index:99", "int8"))
    ),
    *every(op=ops.PixelShuffle(factor=2), shapes=((12, 4, 3),)),
    *every(op=ops.PixelUnshuffle(factor=3), shapes=((2, 6, 9),)),
    *every(op=ops.ChannelShuffle(groups=3), shapes=((12, 4, 3),)),
    *(
        case
        for kind in (ops.Sort, ops.SortIndices)
        for descending in (False, True)
        for case in every(op=kind(axis=1, descending=descending), shapes=((40, 5),))
    ),
    *(
        case
        for kind in (ops.TopK, ops.TopKIndices)
        for largest in (False, True)
        for case in every(op=kind(axis=-1, k=7, largest=largest), shapes=((3, 50),))
    ),
    *pool2d(ops.MaxPool, dilation=(1, 1)),
    *pool2d(ops.MaxPool, dilation=(2, 3), ceil_mode=True),
    *both(op=ops.MaxPool(kernel=(5,), strides=(2,), padding=((2, 2),), dilation=(1,)), shapes=((3, 17),)),
    *both(
        op=ops.MaxPool(kernel=(2, 3, 2), strides=(1, 2, 2), padding=((0, 1), (1, 1), (0, 0)), dilation=(1, 1, 1)),
        shapes=((3, 4, 7, 6),),
    ),
    *both(op=ops.AdaptiveMaxPool(output_size=(4, 3)), shapes=IMAGE),
    *(
        case
        for ceil_mode in (False, True)
        for include in (False, True)
        for case in pool2d(ops.AvgPool, strides=(2, 3), ceil_mode=ceil_mode, count_include_pad=include)
    ),
    *pool2d(ops.AvgPool, divisor=5),
    *both(op=ops.AvgPool(kernel=(4,), strides=(4,), padding=((0, 0),)), shapes=((3, 17),)),
    *both(op=ops.AvgPool(kernel=(2, 2, 3), strides=(2, 1, 1), padding=((0, 0),) * 3), shapes=((3, 4, 5, 6),)),
    *both(op=ops.AdaptiveAvgPool(output_size=(3, 2)), shapes=IMAGE),
    *both(op=ops.AdaptiveAvgPool(output_size=(1, 1)), shapes=IMAGE),
)
