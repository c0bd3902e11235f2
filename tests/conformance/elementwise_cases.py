"""Elementwise arithmetic, comparisons, choices and reductions.

`pairs_exhaustive()` runs add, sub and mul on all 65,536 pairs of int8, at 50 pairs of scales.
"""

from collections.abc import Iterator
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from conformance.harness import Case, Row, both

import jquant as jq
from jquant import ops

PAIR = ((6, 7), (6, 7))
IMAGE = (4, 5, 6)
WIDE = replace(jq.targets.NASH_E, max_reduced=2**20)  # sums beyond int32
PRECISE = jq.targets.NASH_E.with_fields({"rescale.high_precision": True})
OTHER_ROUNDINGS = jq.targets.NASH_E.with_fields(
    {"rescale.pre_rounding": "half_up", "rescale.post_rounding": "half_even"}
)

# Scales of two operands: far apart, equal, a power of two apart, and about the ends of the shift of add.
SCALES = (
    (0.02, 0.02),
    (0.02, 0.01),
    (0.01, 0.02),
    (1.0, 2.0**-9),
    (2.0**-9, 1.0),
    (3.0, 1e-4),
    (1e-5, 2.0),
    (0.3, 0.30000001192),
    (2.0**-12, 4.0),
    (0.017, 0.0170001),
)


def pairs(op: type[jq.ops.Op], **options) -> tuple[Case, ...]:
    return (
        *both(op=op(), shapes=PAIR, **options),
        *both(op=op(), shapes=((4, 1, 6), (1, 5, 6)), **options),
        *(
            case
            for a, b in SCALES
            for case in both(op=op(), shapes=PAIR, input_scales=(a, b), output_scale=max(a, b), **options)
        ),
    )


def arithmetic() -> Iterator[Case]:
    for op in (ops.Add, ops.Sub, ops.Mul):
        yield from pairs(op)
        yield Case(op=op(), shapes=PAIR, inputs=("int8", "int16"), output="int16")
        yield Case(op=op(), shapes=PAIR, inputs=("int16", "int8"), output="int8")
        yield Case(op=op(), shapes=PAIR, inputs=("int8", "bool"))
        yield Case(op=op(), shapes=PAIR, inputs=("uint8", "int16"), output="int16")
        yield Case(op=op(), shapes=PAIR, inputs=("index:1000",))
        yield Case(op=op(), shapes=PAIR, target=OTHER_ROUNDINGS)
        yield Case(op=op(), shapes=PAIR, inputs=("int16",), output="int16", target=PRECISE)
    for op in (ops.Neg(), ops.Abs(), ops.Clamp(minimum=-0.5, maximum=0.25), ops.Clamp(maximum=1.0)):
        yield from both(op=op, shapes=(IMAGE,))
    yield from both(op=ops.Clamp(minimum=9e3), shapes=(IMAGE,))
    yield from both(op=ops.Clamp(minimum=0.5, maximum=-0.5), shapes=(IMAGE,))
    yield Case(op=ops.Neg(), shapes=(IMAGE,), inputs=("index:1000",))
    yield Case(op=ops.Abs(), shapes=(IMAGE,), inputs=("index:1000",))
    yield Case(op=ops.Clamp(minimum=10.0, maximum=99.0), shapes=(IMAGE,), inputs=("index:1000",))
    yield Case(
        op=ops.IntegerConstant(shape=(2, 3), values=(0, -1, 2**31 - 1, 3, 4, -(2**31))), shapes=(), calibrated=True
    )
    yield Case(op=ops.IntegerConstant(shape=(4,), values=(0, 1, 1, 0), dtype="bool"), shapes=(), calibrated=True)


def comparisons() -> Iterator[Case]:
    for op in (ops.Minimum, ops.Maximum):
        yield from pairs(op)
        yield Case(op=op(), shapes=PAIR, inputs=("index:5",))
        yield Case(op=op(), shapes=PAIR, inputs=("int16",), output="int16", target=PRECISE)
    for op in (ops.Equal, ops.NotEqual, ops.Greater, ops.GreaterEqual, ops.Less, ops.LessEqual):
        yield from pairs(op)
        yield Case(op=op(), shapes=PAIR, inputs=("index:5",))
        for value in (0.0, 0.5, -1.0, 1e6):
            yield from both(op=op(value=value), shapes=(IMAGE,))
        yield from both(op=op(value=0.3), shapes=(IMAGE,), input_scales=(0.1,))
        yield Case(op=op(value=2.0), shapes=(IMAGE,), inputs=("index:5",))
    for op in (ops.LogicalAnd, ops.LogicalOr, ops.LogicalXor):
        yield Case(op=op(), shapes=PAIR, inputs=("bool",))
        yield Case(op=op(), shapes=PAIR, inputs=("int8", "bool"))
    yield Case(op=ops.LogicalNot(), shapes=(IMAGE,), inputs=("bool",))
    yield Case(op=ops.LogicalNot(), shapes=(IMAGE,), inputs=("int16",))
    for op in (ops.BitwiseAnd, ops.BitwiseOr, ops.BitwiseXor):
        for fmt in ("bool", "uint8", "index:100000"):
            yield Case(op=op(), shapes=PAIR, inputs=(fmt,))
    for fmt in ("bool", "uint8", "index:100000"):
        yield Case(op=ops.BitwiseNot(), shapes=(IMAGE,), inputs=(fmt,))


def choices() -> Iterator[Case]:
    for fmt in ("int8", "int16"):
        operands = {"inputs": ("bool", fmt), "output": fmt}
        yield Case(op=ops.Where(), shapes=((6, 7), (6, 7), (6, 7)), **operands)
        yield Case(op=ops.Where(), shapes=((6, 1), (1, 7), (6, 7)), **operands)
        for value in (0.0, -1.0, 9e3, -9e3):
            yield Case(op=ops.MaskedFill(value=value), shapes=(IMAGE, IMAGE), inputs=(fmt, "bool"), output=fmt)
    yield Case(op=ops.Where(), shapes=((6, 7), (6, 7), (6, 7)), inputs=("bool", "int8", "int16"))
    yield Case(op=ops.Where(), shapes=((6, 7), (6, 7), (6, 7)), inputs=("bool", "index:9"))
    yield Case(op=ops.MaskedFill(value=-1.0), shapes=(IMAGE, IMAGE), inputs=("index:9", "bool"))


def whole_numbers() -> Iterator[Case]:
    for op in (ops.Floor(), ops.Ceil(), ops.Round()):
        yield from both(op=op, shapes=(IMAGE,))
        yield Case(op=op, shapes=(IMAGE,), inputs=("int16",), output="int8")
        yield Case(op=op, shapes=(IMAGE,), inputs=("int8",), output="int16")
        for scale in (0.5, 0.25, 0.1, 1.0, 1.5, 3e-4, 2.0**-23, 1e4, 2.0**22, 2.0**23, 1e9):
            yield from both(op=op, shapes=(IMAGE,), input_scales=(scale,), output_scale=max(scale, 2.0**-9))
        yield Case(op=op, shapes=(IMAGE,), inputs=("int16",), output="int16", target=PRECISE)
    for sign in (False, True):
        options = {"same_sign_as_dividend": sign}
        yield from both(op=ops.Mod(**options), shapes=PAIR)
        for scales in SCALES:
            yield from both(op=ops.Mod(**options), shapes=PAIR, input_scales=scales)
        for value in (1.0, -1.0, 0.3, 1e-9, 1e9, -1e9):
            yield from both(op=ops.Mod(value=value, **options), shapes=(IMAGE,))
        yield Case(op=ops.Mod(value=7.0, **options), shapes=(IMAGE,), inputs=("index:1000",))
        yield Case(op=ops.Mod(**options), shapes=PAIR, inputs=("index:1000", "index:30"))


def reductions() -> Iterator[Case]:
    axes = {"axes": (2, 3)}, {"axes": (1,)}, {"axes": (1, -1), "keepdims": True}, {"axes": (3,)}, {"axes": (1, 2, 3)}
    for op in (ops.Sum, ops.Mean, ops.ReduceMax, ops.ReduceMin, ops.ReduceAll, ops.ReduceAny):
        for options in axes:
            yield from both(op=op(**options), shapes=(IMAGE,))
    for op in (ops.Sum, ops.Mean):
        yield from both(op=op(axes=(1,)), shapes=((65535,),), output_scale=100.0, input_scales=(0.5,))
        yield Case(op=op(axes=(1,)), shapes=((80000,),), inputs=("int16",), output="int16", target=WIDE)
        yield Case(op=op(axes=(2,)), shapes=(IMAGE,), inputs=("uint8",))
    yield Case(op=ops.Sum(axes=(2,)), shapes=(IMAGE,), inputs=("bool",))
    for op in (ops.ReduceAll, ops.ReduceAny):
        yield Case(op=op(axes=(1,)), shapes=(IMAGE,), inputs=("bool",))
    for op in (ops.ReduceMax, ops.ReduceMin):
        yield Case(op=op(axes=(1,)), shapes=(IMAGE,), inputs=("index:9",))
    for op in (ops.ArgMax, ops.ArgMin):
        for options in ({"axis": 1}, {"axis": -1}, {"axis": 2, "keepdims": True}):
            yield from both(op=op(**options), shapes=(IMAGE,))
            yield Case(op=op(**options), shapes=(IMAGE,), inputs=("index:9",))
    for exclusive in (False, True):
        for reverse in (False, True):
            op = ops.CumSum(axis=2, exclusive=exclusive, reverse=reverse)
            yield from both(op=op, shapes=(IMAGE,))
            yield Case(op=op, shapes=(IMAGE,), inputs=("bool",))
    wide = {"inputs": ("int16",), "output": "int16", "output_scale": 1000.0, "input_scales": (0.5,), "target": WIDE}
    yield Case(op=ops.CumSum(axis=1, reverse=True, exclusive=True), shapes=((80000,),), **wide)


CASES = (*arithmetic(), *comparisons(), *choices(), *whole_numbers(), *reductions())


# ---------------------------------------------------------------------------------------------------------------------
# All pairs of int8


def scale_pairs(count: int) -> list[tuple[float, float, float]]:
    """Scales of a, b and the output: the special ones first, then drawn ones, 2^-8 to 2^8 apart."""
    rng = np.random.default_rng(0)
    drawn = np.exp2(rng.uniform(-8, 0, size=(count, 1)) + np.pad(rng.uniform(-8, 8, size=(count, 1)), ((0, 0), (1, 0))))
    found = [*SCALES, *map(tuple, drawn)][:count]
    return [(a, b, max(a, b) * float(np.exp2(rng.uniform(-1, 2)))) for a, b in found]


def program_of(op: jq.ops.Op, a: float, b: float, y: float, dtype: str = "int8") -> jq.Program:
    spec = {"int8": jq.int8, "int16": jq.int16}[dtype]
    graph = jq.Graph((jq.Input("a", (None,)), jq.Input("b", (None,))), (jq.Node("y", op, ("a", "b")),), ("y",))
    scales = {"a": a, "b": b, "y": y}
    qconfig = jq.QConfig({name: jq.Policy(output=spec(scale=float(np.float32(s)))) for name, s in scales.items()})
    model = jq.prepare(graph, {}, qconfig, target=jq.targets.NASH_E)
    return jq.lower(model)


def pairs_exhaustive(scales: int = 50) -> list[Row]:
    """Every pair of int8 through add, sub and mul."""
    a, b = (v.reshape(-1).astype(np.int8) for v in np.mgrid[-128:128, -128:128])
    rows = []
    for op in (ops.Add(), ops.Sub(), ops.Mul()):
        wrong = 0
        for s_a, s_b, s_y in scale_pairs(scales):
            program = program_of(op, s_a, s_b, s_y * s_a * 64 if isinstance(op, ops.Mul) else s_y)
            fast = jq.run(program, jnp.asarray(a), jnp.asarray(b), raw=True)
            (slow,), _ = jq.reference.run(program, a, b, raw=True)
            wrong += int((np.asarray(fast) != slow).sum())
        rows.append(Row(type(op).__name__, "int8, int8 -> int8", scales * a.size, wrong, f"all pairs, {scales} scales"))
    return rows


EXHAUSTIVE = (pairs_exhaustive,)
