"""Operators that keep a scale: fake-quant has the integers' values, with both ends of each range among the operands.

Seen: the negative of -128 steps was +128 in fake-quant and 127 in integers; bounds, fills and bilinear values lay off
the grid. The list of operators is complete by construction: a new one without a case fails here.
"""

from typing import NamedTuple

import numpy as np
import pytest
from support.meanings import meanings

import jquant as jq
from jquant import ops
from jquant.graph.operator import rounds_by_itself
from jquant.types import integer_range

SCALE = 0.0371


class Case(NamedTuple):
    op: jq.ops.Op
    shapes: tuple[tuple[int, ...], ...] = ((3, 4, 5, 6),)
    exact: str | None = None  # of the second operand: "bool", or the number of indices
    scales: tuple[float, ...] = (SCALE, SCALE)


X = (3, 4, 5, 6)
CASES = (
    Case(ops.Abs()),
    Case(ops.AdaptiveMaxPool(output_size=(2, 3))),
    Case(ops.ChannelShuffle(groups=2)),
    *(Case(ops.Clamp(minimum=low, maximum=high)) for low, high in ((-1.0, 2.5), (None, 0.333), (-100.0, 100.0))),
    *(Case(ops.Clamp(minimum=low, maximum=high)) for low, high in ((3.0, None), (0.5, -0.5))),
    Case(ops.Expand(shape=(-1, 4, 5, 6)), shapes=((3, 4, 1, 6),)),
    Case(ops.Flatten()),
    Case(ops.Flip(axes=(2,))),
    Case(ops.Gather(axis=1), shapes=(X, X), exact="4"),
    *(Case(ops.GridSample(mode=m), shapes=(X, (3, 4, 4, 2)), scales=(SCALE, 1e-4)) for m in ("bilinear", "nearest")),
    Case(ops.IndexSelect(axis=1, indices=(0, -1, 2))),
    Case(ops.Interpolate(size=(10, 7))),
    Case(ops.Interpolate(size=(10, 7), mode="nearest-exact")),
    Case(ops.Interpolate(size=(10, 12), mode="bilinear")),
    *(Case(ops.MaskedFill(value=v), shapes=(X, X), exact="bool") for v in (0.33, -2.5, 4.7)),
    Case(ops.MaxPool(kernel=(2, 2), strides=(2, 2), padding=((1, 1), (0, 0)), dilation=(1, 1))),
    Case(ops.Maximum(), shapes=(X, X)),
    Case(ops.Minimum(), shapes=(X, X), scales=(SCALE, 0.01)),
    Case(ops.Mod(), shapes=(X, X), scales=(SCALE, 0.01)),
    Case(ops.Mod(value=0.7)),
    Case(ops.Neg()),
    *(Case(ops.Pad(padding=((0, 0), (1, 0), (0, 2), (0, 0)), value=v)) for v in (0.0, 0.33, -4.7, 100.0)),
    Case(ops.Pad(padding=((0, 0), (0, 0), (1, 2), (0, 1)), mode="border")),
    Case(ops.Permute(axes=(0, 2, 3, 1))),
    Case(ops.PixelShuffle(factor=2)),
    Case(ops.PixelUnshuffle(factor=2), shapes=((3, 4, 6, 6),)),
    Case(ops.ReduceMax(axes=(1,))),
    Case(ops.ReduceMin(axes=(2, 3))),
    Case(ops.Relu()),
    Case(ops.Relu6(), scales=(0.1371,)),
    Case(ops.Reshape(shape=(-1, 30))),
    Case(ops.RoiAlign(output_size=(2, 2)), shapes=(X, (3, 5)), scales=(SCALE, 1e-4)),
    Case(ops.Roll(shifts=(2,), axes=(1,))),
    *(Case(ops.Scale(factor=f)) for f in (-1.0, -0.5, 2.0)),
    Case(ops.Slice(starts=(0, 1, 0, 0), stops=(None, 3, None, -1), steps=(1, 1, 2, 1))),
    Case(ops.Sort(axis=1, descending=True)),
    Case(ops.StopGradient()),
    Case(ops.Dropout()),
    Case(ops.SwapChannels(axis=1)),
    Case(ops.Tile(repeats=(1, 2, 1, 1))),
    Case(ops.TopK(axis=2, k=3)),
    Case(ops.Warp(), shapes=(X, (3, 2, 5, 6)), scales=(SCALE, 1e-4)),
)
COORDINATES = (ops.GridSample, ops.Warp, ops.RoiAlign)  # their second operand is int16
AVERAGES = (*COORDINATES, ops.Interpolate)
NOT_LOWERED = {"QuantStub", "DeQuantStub", "Dequantize"}  # `prepare` takes stubs out; for finished programs alone


def operands(case: Case, dtype: str) -> list[np.ndarray]:
    """Random integers; the first examples are at the lower, and at the upper end of the range."""
    low, high = integer_range(dtype)
    rng, found = np.random.default_rng(0), []
    for i, shape in enumerate(case.shapes):
        x = rng.integers(low, high + 1, size=shape).astype(dtype)
        x[0], x[1] = low, high
        if i == 1 and isinstance(case.op, COORDINATES):
            x = rng.integers(-(2**15), 2**15, size=shape).astype(np.int16)
        if i == 1 and case.exact == "bool":
            x = rng.random(shape) < 0.5
        elif i == 1 and case.exact:
            x = rng.integers(0, int(case.exact), size=shape).astype(np.int32)
        found.append(x)
    return found


# What only moves elements is the same for int16; roi_align takes int8.
BOTH = [(case, dtype) for case in CASES for dtype in ("int8", "int16") if dtype == "int8" or rounds_by_itself(case.op)]
RUN = [(case, dtype) for case, dtype in BOTH if dtype == "int8" or not isinstance(case.op, ops.RoiAlign)]


@pytest.mark.parametrize(("case", "dtype"), RUN, ids=lambda v: v if isinstance(v, str) else str(v.op))
def test_fake_quant_has_the_values_of_the_integers(case: Case, dtype: str) -> None:
    found = meanings(case.op, *operands(case, dtype), scales=case.scales)
    np.testing.assert_array_equal(found.integers, found.reference)
    assert found.scale is not None
    real = found.integers.astype(np.float32) * found.scale
    if isinstance(case.op, ops.Scale):  # x * factor and integer * (scale * factor) are rounded in different places
        np.testing.assert_allclose(found.fake, real, rtol=2**-22)
    elif isinstance(case.op, AVERAGES) and getattr(case.op, "mode", "bilinear") == "bilinear":
        # Ties; and the weights of integers are cut to 8 bits and less, which on the int16 grid are many steps.
        bound = 1.001 if isinstance(case.op, ops.Interpolate) and dtype == "int8" else 2.0**-6 * 2 ** int(dtype[3:])
        np.testing.assert_array_less(np.abs(found.fake - real) / found.scale, bound)
    else:
        np.testing.assert_array_equal(found.fake, real)
    steps = found.fake / found.scale
    np.testing.assert_allclose(steps, np.round(steps), atol=2.0**-8)  # on the grid: an ulp of 2^15 steps
    low, high = integer_range(dtype)
    assert low <= np.round(steps.min()) <= np.round(steps.max()) <= high


def test_every_operator_that_keeps_a_scale_has_a_case() -> None:
    exported = (getattr(ops, name) for name in dir(ops))
    keeping = {v.__name__ for v in exported if isinstance(v, type) and getattr(v, "scale_rule", "own") != "own"}
    assert keeping - {"Op"} - NOT_LOWERED == {type(case.op).__name__ for case in CASES}


@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_the_negative_of_the_smallest_number_is_the_largest_number(dtype: str) -> None:
    """Of Neg, Abs and a product with a negative number alike; of the next integer it is exact."""
    low, high = integer_range(dtype)
    x = np.array([[low, low + 1, -1, 0, high]], dtype)
    for op in (ops.Neg(), ops.Abs(), ops.Scale(factor=-1.0)):
        fake = meanings(op, x, scales=(0.5,)).fake
        wanted = [high, high, 1, 0, high if isinstance(op, ops.Abs) else -high]
        np.testing.assert_array_equal(fake, np.array([wanted], np.float32) * np.float32(0.5))
