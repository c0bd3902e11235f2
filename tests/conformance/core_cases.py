"""Operators that keep integers as they are, or only change their format."""

from conformance.harness import Case, both

from jquant import ops

CASES = (
    *both(op=ops.Relu(), shapes=((3, 5, 5),)),
    *both(op=ops.Relu6(), shapes=((3, 5, 5),)),
    *both(op=ops.PRelu(), shapes=((6, 5, 5),), params={"weight": (6,)}),
    *both(op=ops.Requantize(), shapes=((3, 50),)),
    Case(op=ops.Requantize(), shapes=((3, 50),), inputs=("int16",), output="int8"),
    Case(op=ops.Requantize(), shapes=((3, 50),), inputs=("int8",), output="int16"),
    *both(op=ops.Scale(factor=-0.75), shapes=((3, 50),)),
    *both(op=ops.Scale(factor=3.0), shapes=((3, 50),)),
    *both(op=ops.Dropout(rate=0.5), shapes=((3, 50),)),
    *both(op=ops.StopGradient(), shapes=((3, 50),)),
)
