"""Operators that bring two operands to one scale: fake-quant rounds where the integers round.

Seen: fake-quant compared on two grids and the integers on the larger one, so that 37 % of the results of a remainder
and 45 % of those of a maximum differed.
"""

from fractions import Fraction
from math import floor, trunc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.meanings import meanings
from support.onnx_helpers import run_onnxruntime

import jquant as jq
from jquant import ops
from jquant.types import integer_range
from jquant_converters import to_onnx

COMPARISONS = {
    ops.Equal: np.equal,
    ops.NotEqual: np.not_equal,
    ops.Greater: np.greater,
    ops.GreaterEqual: np.greater_equal,
    ops.Less: np.less,
    ops.LessEqual: np.less_equal,
}
AT_ONE_SCALE = (ops.Maximum(), ops.Minimum(), *(cls() for cls in COMPARISONS), ops.Mod())
SCALES = ((0.013, 0.05), (0.05, 0.013), (0.25, 1.0), (0.1, 0.1), (3e-4, 2.0))


def drawn(dtype: str, seed: int, shape: tuple[int, ...] = (64, 33)) -> np.ndarray:
    """Integers over the whole range, with both of its ends."""
    low, high = integer_range(dtype)
    x = np.random.default_rng(seed).integers(low, high + 1, size=shape)
    x[0, :4], x[1, :4] = (low, high, low + 1, 0), (high, low, -1, 1)
    return x.astype(dtype)


def at_scale(q: np.ndarray, scale: float, larger: float) -> np.ndarray:
    """Integers of 8 bits at another scale: section 3 of the specification, in rational numbers."""
    ratio, exponent = Fraction(float(np.float32(scale))) / Fraction(float(np.float32(larger))), 0
    while ratio < Fraction(1, 2):
        ratio, exponent = ratio * 2, exponent - 1
    while ratio >= 1:
        ratio, exponent = ratio / 2, exponent + 1
    mantissa = min(floor(ratio * 2**15 + Fraction(1, 2)), 32767)
    by = mantissa / Fraction(2) ** (15 - exponent)
    return np.array([floor(int(v) * by + Fraction(1, 2)) for v in q.ravel()], np.int64).reshape(q.shape)


@pytest.mark.parametrize("op", AT_ONE_SCALE, ids=lambda op: type(op).__name__)
@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_fake_quant_gives_the_bits_of_the_integers(op: jq.ops.Op, dtype: str) -> None:
    for scales in SCALES:
        meanings(op, drawn(dtype, 0), drawn(dtype, 1), scales=scales).agree()


@pytest.mark.parametrize("scales", SCALES, ids=str)
def test_maximum_minimum_and_comparisons_are_those_of_exact_rationals(scales: tuple[float, float]) -> None:
    a, b = drawn("int8", 2), drawn("int8", 3)
    larger = max(scales)
    left, right = (at_scale(q, s, larger) for q, s in zip((a, b), scales, strict=True))
    for op, function in ((ops.Maximum(), np.maximum), (ops.Minimum(), np.minimum)):
        wanted = function(left, right).astype(np.float32) * np.float32(larger)
        np.testing.assert_array_equal(meanings(op, a, b, scales=scales).fake, wanted)
    for comparison, function in COMPARISONS.items():
        np.testing.assert_array_equal(meanings(comparison(), a, b, scales=scales).fake, function(left, right))


@pytest.mark.parametrize("truncated", [False, True])
def test_remainders_are_those_of_whole_numbers(truncated: bool) -> None:
    """By an operand at the larger scale, and by a number, which is a whole number of steps: floor(v / s + 1/2)."""

    def remainder(x: int, y: int) -> int:
        return 0 if y == 0 else x - y * (trunc(Fraction(x, y)) if truncated else x // y)

    a, b = drawn("int8", 4), drawn("int8", 5)
    op = ops.Mod(same_sign_as_dividend=truncated)
    left, right = at_scale(a, 0.25, 1.0), b.astype(np.int64)
    wanted = np.vectorize(remainder)(left, right).astype(np.float32)
    np.testing.assert_array_equal(meanings(op, a, b, scales=(0.25, 1.0)).fake, wanted)
    for value, steps in ((0.7, 7), (-0.33, -3), (0.04, 0), (50.0, 500)):
        found = meanings(ops.Mod(value=value, same_sign_as_dividend=truncated), a, scales=(0.1,))
        whole = np.clip([remainder(int(v), steps) for v in a.ravel()], -128, 127).reshape(a.shape)
        np.testing.assert_array_equal(found.fake, whole.astype(np.float32) * np.float32(0.1))
        found.agree()


def test_other_roundings_of_the_target_are_followed() -> None:
    for fields in ({"post_rounding": "half_even"}, {"high_precision": True}, {"pre_rounding": "half_up"}):
        target = jq.targets.NASH_E.with_fields({f"rescale.{name}": value for name, value in fields.items()})
        for op in (ops.Maximum(), ops.Less(), ops.Mod()):
            meanings(op, drawn("int16", 6), drawn("int16", 7), scales=(0.013, 0.05), target=target).agree()


@pytest.mark.parametrize(
    "op", [*AT_ONE_SCALE, ops.Mod(value=0.9), ops.Neg(), ops.Abs(), ops.Scale(factor=-1.0)], ids=str
)
def test_onnxruntime_computes_the_integers(op: jq.ops.Op) -> None:
    """With scales that are powers of two and the rounding of ONNX, half to even, nothing is left to differ."""
    target = jq.targets.NASH_E.with_fields({"rescale.post_rounding": "half_even", "rescale.high_precision": True})
    unary = getattr(op, "value", None) is not None or isinstance(op, ops.Neg | ops.Abs | ops.Scale)
    operands = (drawn("int8", 8),) if unary else (drawn("int8", 8), drawn("int8", 9))
    found = meanings(op, *operands, scales=(0.25, 1.0), target=target)
    found.agree()
    real = [x.astype(np.float32) * np.float32(s) for x, s in zip(operands, (0.25, 1.0), strict=False)]
    (y,) = run_onnxruntime(to_onnx(jq.Model(found.plan, {}, found.qparams)), *real)
    np.testing.assert_array_equal(y, found.fake)


def test_the_gradient_stays_that_of_the_float_operator() -> None:
    """In reverse and in forward mode: 1 to the larger operand."""
    inputs = tuple(jq.Input(name, (None, 3)) for name in "ab")
    graph = jq.Graph(inputs, (jq.Node("y", ops.Maximum(), ("a", "b")),), ("y",))
    rules = {
        "a": jq.Policy(output=jq.int8(scale=0.25)),
        "b": jq.Policy(output=jq.int8(scale=1.0)),
        "y": jq.Policy(output=jq.int8()),
    }
    model = jq.prepare(graph, {}, jq.QConfig({"*": None} | rules), target=jq.targets.NASH_E)
    a, b = jnp.array([[0.75, -3.0, 5.0]]), jnp.array([[0.0, -1.0, 7.0]])

    def total(a: jax.Array) -> jax.Array:
        return jq.apply(model, a, b).sum()

    assert total(a) == 1.0 - 1.0 + 7.0  # 0.75 is 1 at the larger scale
    np.testing.assert_array_equal(jax.grad(total)(a), [[1.0, 0.0, 0.0]])
    assert jax.jvp(total, (a,), (jnp.array([[2.0, 3.0, 4.0]]),))[1] == 2.0
