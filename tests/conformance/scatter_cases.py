"""Writing elements, and shifts."""

from conformance.harness import Case, both

from jquant import ops

_BOUNDS = {"starts": (0, 1, 0), "stops": (None, 6, None), "steps": (1, 2, 1)}

CASES = (
    *both(op=ops.SliceScatter(**_BOUNDS), shapes=((7, 4), (3, 4))),
    Case(op=ops.SliceScatter(**_BOUNDS), shapes=((7, 4), (3, 4)), inputs=("int8", "int16"), output="int16"),
    *(
        Case(op=ops.Scatter(axis=axis, reduce=reduce), shapes=shapes, inputs=(f, "index:9", f), output=f)
        for f in ("int8", "int16")
        for reduce in ("none", "add", "max", "min")
        for axis, shapes in (
            (1, ((7, 3), (5, 3), (5, 3))),
            (-1, ((2, 6), (2, 8), (2, 8))),
            (1, ((7, 3), (5, 1), (5, 3))),
            (2, ((3, 6), (1, 8), (2, 8))),
        )
    ),
    *(Case(op=ops.BitShift(bits=bits), shapes=((50,),), inputs=("index:2147483647",)) for bits in (0, 3, 31, -1, -20)),
)
