"""Elementwise operators: float against torch, integers against exact rationals and against the reference."""

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from math import ceil, floor, fmod, inf
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conformance import elementwise_cases
from conformance.harness import Case, check, integers, program_of

import jquant as jq
from jquant import ops
from jquant.graph.operator import Operand, constraints, eval_float, lower_op
from jquant.graph.serialize import graph_from_json, graph_to_json
from jquant.program.integers import run_integers
from jquant.reference import add_constants, rescale_constants
from jquant.types import integer_range

NASH = jq.targets.NASH_E
COMPARISONS: dict[type[jq.ops.Op], Callable[[Any, Any], Any]] = {
    ops.Equal: np.equal,
    ops.NotEqual: np.not_equal,
    ops.Greater: np.greater,
    ops.GreaterEqual: np.greater_equal,
    ops.Less: np.less,
    ops.LessEqual: np.less_equal,
}
each_comparison = pytest.mark.parametrize("comparison", COMPARISONS, ids=lambda cls: cls.__name__)


def run_op(
    op: jq.ops.Op, *operands: Any, scales: tuple[float, ...] = (), y: float = 1.0, dtype: str = "", out: str = ""
) -> np.ndarray:
    """One node on integers [N, ...], both ways, which must agree; exact operands are as they are."""
    narrow = {"int8": jq.int8, "int16": jq.int16}
    operands = tuple(map(np.asarray, operands))
    rules: dict[str, jq.Policy | None] = {}
    inputs, real = [], iter(scales)
    for i, x in enumerate(operands):
        exact = str(x.dtype) if str(x.dtype) in ("bool", "int32", "uint8") else "float32"
        inputs.append(jq.Input(f"x{i}", (None, *x.shape[1:]), exact))
        if exact == "float32":
            rules[f"x{i}"] = jq.Policy(output=narrow[str(x.dtype)](scale=next(real)))
    rules["y"] = jq.Policy(output=narrow[out or dtype or str(operands[0].dtype).replace("bool", "int8")](scale=y))
    graph = jq.Graph(tuple(inputs), (jq.Node("y", op, tuple(i.name for i in inputs)),), ("y",))
    model = jq.prepare(graph, {}, jq.QConfig({"*": None} | rules), target=NASH)
    program = jq.lower(model)
    fast = np.asarray(jq.run(program, *map(jnp.asarray, operands), raw=True))
    (slow,), _ = jq.reference.run(program, *operands, raw=True)
    np.testing.assert_array_equal(fast, slow)
    return fast


def lowered(op: jq.ops.Op, dtypes: tuple[str, ...], scales: list[jax.Array]) -> dict[str, jax.Array]:
    """The constants of a node whose last dtype and scale are those of the output."""
    *operands, output = [Operand(dtype, scale, (None, 4)) for dtype, scale in zip(dtypes, scales, strict=True)]
    return lower_op(op, operands, output, {}, NASH).constants


lowered_in_jit = jax.jit(lowered, static_argnums=(0, 1))


def constants_of(op: jq.ops.Op, inputs: list[tuple[str, float]], output: tuple[str, float]) -> dict[str, np.ndarray]:
    """The constants of a node, which must be the same lowered inside jit and outside."""
    dtypes, scales = tuple(d for d, _ in (*inputs, output)), [jnp.float32(s) for _, s in (*inputs, output)]
    outside, inside = lowered(op, dtypes, scales), lowered_in_jit(op, dtypes, scales)
    for role, value in outside.items():
        np.testing.assert_array_equal(value, inside[role], err_msg=role)
    return {role: np.asarray(v) for role, v in outside.items()}


def exact(scale: float) -> Fraction:
    return Fraction(float(np.float32(scale)))


# ---------------------------------------------------------------------------------------------------------------------
# Float


class TestFloat:
    UNARY = (
        (ops.Neg(), torch.neg),
        (ops.Abs(), torch.abs),
        (ops.Clamp(minimum=-0.5, maximum=1.0), partial(torch.clamp, min=-0.5, max=1.0)),
        (ops.Clamp(minimum=0.25), partial(torch.clamp, min=0.25)),
        (ops.Clamp(minimum=1.0, maximum=-1.0), partial(torch.clamp, min=1.0, max=-1.0)),
        (ops.Floor(), torch.floor),
        (ops.Ceil(), torch.ceil),
        (ops.Round(), torch.round),
        (ops.Mod(value=0.75), partial(torch.remainder, other=0.75)),
        (ops.Mod(value=-0.75), partial(torch.remainder, other=-0.75)),
        (ops.Mod(value=0.75, same_sign_as_dividend=True), partial(torch.fmod, other=0.75)),
    )
    BINARY = (
        (ops.Add(), torch.add),
        (ops.Sub(), torch.sub),
        (ops.Mul(), torch.mul),
        (ops.Minimum(), torch.minimum),
        (ops.Maximum(), torch.maximum),
        (ops.Mod(), torch.remainder),
        (ops.Mod(same_sign_as_dividend=True), torch.fmod),
    )
    X = np.array([[-2.5, -1.5, -1.0, -0.5, -0.25], [0.25, 0.5, 1.0, 1.5, 2.5]], np.float32)
    Y = np.array([[0.5], [-0.375]], np.float32)

    def compare(self, op: jq.ops.Op, function: Callable, *arrays: np.ndarray) -> None:
        """Values and gradients are torch's. A tie is at a bound of clamp, where torch lets the gradient through."""
        operands = [torch.from_numpy(a).requires_grad_() for a in arrays]
        function(*operands).pow(2).sum().backward()
        np.testing.assert_allclose(eval_float(op, *map(jnp.asarray, arrays)), function(*operands).detach(), rtol=1e-6)
        found = jax.grad(lambda v: (eval_float(op, *v) ** 2).sum())([jnp.asarray(a) for a in arrays])
        for gradient, operand in zip(found, operands, strict=True):
            np.testing.assert_allclose(gradient, operand.grad, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(("op", "function"), UNARY, ids=lambda v: str(v) if isinstance(v, jq.ops.Op) else "torch")
    def test_one_operand(self, op: jq.ops.Op, function: Callable) -> None:
        self.compare(op, function, self.X)

    @pytest.mark.parametrize(("op", "function"), BINARY, ids=lambda v: str(v) if isinstance(v, jq.ops.Op) else "torch")
    def test_two_operands_broadcast(self, op: jq.ops.Op, function: Callable) -> None:
        self.compare(op, function, self.X, self.Y)

    def test_choices(self) -> None:
        mask = np.array([[True], [False]])
        chosen = torch.from_numpy(mask)
        self.compare_masked(ops.Where(), partial(torch.where, chosen), mask, self.X, self.Y, first=True)
        fill = partial(torch.masked_fill, mask=chosen, value=-3.0)
        self.compare_masked(ops.MaskedFill(value=-3.0), fill, mask, self.X, first=False)

    def compare_masked(
        self, op: jq.ops.Op, function: Callable, mask: np.ndarray, *arrays: np.ndarray, first: bool
    ) -> None:
        operands = [torch.from_numpy(a).requires_grad_() for a in arrays]
        function(*operands).pow(2).sum().backward()

        def rule(v: list) -> jax.Array:
            return eval_float(op, jnp.asarray(mask), *v) if first else eval_float(op, *v, jnp.asarray(mask))

        real = [jnp.asarray(a) for a in arrays]
        np.testing.assert_array_equal(rule(real), function(*operands).detach())
        for gradient, operand in zip(jax.grad(lambda v: (rule(v) ** 2).sum())(real), operands, strict=True):
            np.testing.assert_array_equal(gradient, operand.grad)

    @each_comparison
    def test_comparisons_make_masks(self, comparison: type) -> None:
        y = eval_float(comparison(), jnp.asarray(self.X), jnp.asarray(self.Y))
        assert y.dtype == jnp.bool_
        np.testing.assert_array_equal(y, COMPARISONS[comparison](self.X, self.Y))
        y = eval_float(comparison(value=0.5), jnp.asarray(self.X))
        np.testing.assert_array_equal(y, COMPARISONS[comparison](self.X, np.float32(0.5)))

    def test_a_remainder_of_zero_is_zero_with_a_finite_gradient(self) -> None:
        def remainder(x: jax.Array, y: jax.Array) -> jax.Array:
            return eval_float(ops.Mod(), x, y).sum()

        assert remainder(jnp.float32(3.5), jnp.float32(0)) == 0
        assert np.isfinite(jax.grad(remainder, (0, 1))(jnp.float32(3.5), jnp.float32(0))).all()


# ---------------------------------------------------------------------------------------------------------------------
# Constants of lowering, in exact rationals


@pytest.mark.parametrize("op", [ops.Add(), ops.Sub()], ids=str)
@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_constants_of_add_and_sub(op: jq.ops.Op, dtype: str) -> None:
    for a, b, y in elementwise_cases.scale_pairs(40):
        found = constants_of(op, [(dtype, a), (dtype, b)], (dtype, y))
        large, small = max(exact(a), exact(b)), min(exact(a), exact(b))
        bits = 8 if dtype == "int8" else 16
        shift, factor = add_constants(large, small, bits, NASH)
        wanted = [2**shift, factor] if exact(a) >= exact(b) else [factor, 2**shift]
        sign = -1 if isinstance(op, ops.Sub) else 1
        np.testing.assert_array_equal(found["multiplier"], [wanted[0], sign * wanted[1]])
        by = rescale_constants(large / 2**shift / exact(y), bits, narrow=False, target=NASH)
        assert (found["mantissa"], found["pre"], found["post"]) == by


@pytest.mark.parametrize("op", [ops.Maximum(), ops.Less(), ops.Mod()], ids=str)
def test_operands_meet_at_the_larger_scale(op: jq.ops.Op) -> None:
    for a, b, _ in elementwise_cases.scale_pairs(30):
        found = constants_of(op, [("int16", a), ("int16", b)], ("int16", max(a, b)))
        for i, scale in enumerate((a, b)):
            by = rescale_constants(exact(scale) / max(exact(a), exact(b)), 16, narrow=True, target=NASH)
            assert tuple(found[role][i] for role in ("mantissa", "pre", "post")) == by


def test_bounds_are_rounded_half_up_and_saturated() -> None:
    found = constants_of(ops.Clamp(minimum=-0.25, maximum=0.25), [("int8", 0.5)], ("int8", 0.5))
    assert (found["lower"], found["upper"]) == (0, 1)
    found = constants_of(ops.Clamp(minimum=-1e30, maximum=inf), [("int16", 0.5)], ("int16", 0.5))
    assert (found["lower"], found["upper"]) == (-32768, 32767)
    assert constants_of(ops.MaskedFill(value=-inf), [("int8", 0.5)], ("int8", 0.5))["fill"] == -128
    assert constants_of(ops.Mod(value=1e4), [("int8", 0.5)], ("int8", 0.5))["modulus"] == 20000


# ---------------------------------------------------------------------------------------------------------------------
# Integers


def test_every_pair_of_int8_with_three_scales() -> None:
    rows = elementwise_cases.pairs_exhaustive(3)
    assert [(r.operator, r.outputs, r.mismatches) for r in rows] == [(op, 3 * 2**16, 0) for op in ("Add", "Sub", "Mul")]


@pytest.mark.parametrize(("op", "expected"), [(ops.Sub(), (65535, -65535)), (ops.Add(), (-1, -1))], ids=str)
def test_the_worst_case_of_int16_does_not_wrap(op: jq.ops.Op, expected: tuple[int, int]) -> None:
    """At equal scales, and at those with the largest accumulator: 2^15 * 2^15 and 2^15 * 32767."""
    a, b = np.array([32767, -32768], np.int16), np.array([-32768, 32767], np.int16)
    for s_b in (1.0, float(np.float32(1 - 2.0**-15))):
        y = run_op(op, a, b, scales=(1.0, s_b), y=2.0)
        np.testing.assert_allclose(y, np.array(expected) / 2, atol=3)  # the documented 2.9 LSB of int16
    y = run_op(ops.Mul(), a, np.array([-32768, -32768], np.int16), scales=(1.0, 1.0), y=2.0**15)
    np.testing.assert_allclose(y, [-32768, 32767], atol=3)


def test_sub_is_exact_where_a_negated_operand_saturates() -> None:
    assert run_op(ops.Sub(), np.int8([0]), np.int8([-128]), scales=(1.0, 1.0), out="int16").tolist() == [128]


def test_negative_and_absolute_values_saturate() -> None:
    for dtype in ("int8", "int16"):
        low, high = integer_range(dtype)
        x = np.array([low, low + 1, -1, 0, high], dtype)
        assert run_op(ops.Neg(), x, scales=(0.5,)).tolist() == [high, high, 1, 0, -high]
        assert run_op(ops.Abs(), x, scales=(0.5,)).tolist() == [high, high, 1, 0, high]


def test_slopes_are_rounded_alike_in_and_outside_of_jit() -> None:
    """The largest negative slope is half a step off by definition: one ulp of its scale moves the integer."""
    slope_of = jax.jit(
        lambda weight: lower_op(
            ops.PRelu(),
            (Operand("int8", jnp.float32(0.1), (None, 6)),),
            Operand("int8", jnp.float32(0.1), (None, 6)),
            {"weight": weight},
            jq.targets.NASH_E,
        ).constants["slope"]
    )
    weights = np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)
    for weight in weights:
        steps = weight / (np.abs(weight).max() / np.float32(32767.5))
        np.testing.assert_array_equal(slope_of(weight), np.clip(np.rint(steps), -32768, 32767))


def test_a_mask_counts_as_its_number() -> None:
    x, mask = np.array([-100, 50, 7, 8], np.int8), np.array([True, False, True, False])
    assert run_op(ops.Mul(), x, mask, scales=(0.5,), y=0.5).tolist() == [-100, 0, 7, 0]
    assert run_op(ops.Add(), x, mask, scales=(0.5,), y=0.5).tolist() == [-98, 50, 9, 8]
    assert run_op(ops.Sub(), mask, x, scales=(0.5,), y=0.5).tolist() == [102, -50, -5, -8]


def test_minimum_and_maximum_at_equal_scales_are_exact() -> None:
    a, b = (v.reshape(-1).astype(np.int8) for v in np.mgrid[-128:128, -128:128])
    np.testing.assert_array_equal(run_op(ops.Minimum(), a, b, scales=(0.3, 0.3)), np.minimum(a, b))
    np.testing.assert_array_equal(run_op(ops.Maximum(), a, b, scales=(0.3, 0.3)), np.maximum(a, b))
    y = run_op(ops.Maximum(), np.int8([3, 4]), np.int8([100, -100]), scales=(1.0, 0.25))
    assert y.tolist() == [25, 4]  # 100 / 4, at the scale 1


@each_comparison
@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_a_number_is_compared_as_in_float(comparison: type, dtype: str) -> None:
    """For every integer: numbers on the grid, between two grid points, an ulp beside one, and out of range."""
    low, high = integer_range(dtype)
    q = np.arange(low, high + 1).astype(dtype)
    for scale in (0.1, 0.5, 1 / 127.5, 3e-4, 2e-7, 7e6):
        s = np.float32(scale)
        ulp = [np.nextafter(np.float32(5) * s, np.float32(side)) for side in (-inf, inf)]
        for value in (0.0, 0.5, -1.0, 0.3, 1e30, -1e30, 5 * s, -77 * s, 5.5 * s, high * s, (high + 1) * s, *ulp):
            op = comparison(value=float(value))
            t = np.asarray(lowered(op, (dtype, "bool"), [jnp.float32(scale), jnp.float32(1)])["half_steps"])
            wanted = COMPARISONS[comparison](q.astype(np.float32) * s, np.float32(value))
            np.testing.assert_array_equal(COMPARISONS[comparison](2 * q.astype(np.int64), t), wanted, err_msg=str(op))
    np.testing.assert_array_equal(run_op(op, q, scales=(scale,)), wanted)
    constants_of(op, [(dtype, scale)], ("bool", 1.0))


def test_exact_values_are_compared_exactly() -> None:
    x = np.array([2**30, 2**30 + 1, -(2**31)], np.int32)
    assert run_op(ops.Greater(value=float(2**30)), x, out="int8").tolist() == [False, True, False]
    assert run_op(ops.LessEqual(), x, x[::-1].copy(), out="int8").tolist() == [False, True, True]


def test_logic_of_numbers_asks_for_zero() -> None:
    x, y = np.array([-128, 0, 1, 0], np.int8), np.array([True, True, False, False])
    assert run_op(ops.LogicalAnd(), x, y, scales=(0.1,)).tolist() == [True, False, False, False]
    assert run_op(ops.LogicalXor(), x, y, scales=(0.1,)).tolist() == [False, True, True, False]
    assert run_op(ops.LogicalNot(), x, scales=(0.1,)).tolist() == [False, True, False, True]
    assert run_op(ops.BitwiseNot(), np.int32([0, 5]), out="int8").tolist() == [-1, -6]


WHOLE: dict[type[jq.ops.Op], Callable[[Fraction], int]] = {ops.Floor: floor, ops.Ceil: ceil, ops.Round: round}


@pytest.mark.parametrize("operator", WHOLE, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_whole_numbers_are_those_of_exact_rationals(operator: type, dtype: str) -> None:
    """At an output scale of 1, where the second rescale is the identity. Python rounds a Fraction half to even."""
    low, high = integer_range(dtype)
    x = np.arange(low, high + 1, 1 if dtype == "int8" else 37).astype(dtype)
    for scale in (0.5, 0.25, 1.5, 1.0, 0.1, 0.125, 1 / 3, 2.5e-3, 3e-5, 2.0**-23, 77.7, 12345.6):
        y = run_op(operator(), x, scales=(scale,), y=1.0, out="int16")
        wanted = [min(max(WHOLE[operator](int(q) * exact(scale)), -32768), 32767) for q in x]
        assert y.tolist() == wanted, scale


def test_a_scale_without_fractions_is_only_rescaled() -> None:
    x = np.array([-32768, -1, 0, 5, 32767], np.int16)
    for scale in (2.0**23, 2.0**40, 3e30):
        for operator in WHOLE:
            assert run_op(operator(), x, scales=(scale,), y=scale).tolist() == x.tolist()


def python_or_c(truncated: bool) -> Callable[[int, int], int]:
    return (lambda a, b: int(fmod(a, b))) if truncated else (lambda a, b: a % b)


@pytest.mark.parametrize("truncated", [False, True])
def test_remainders(truncated: bool) -> None:
    remainder = python_or_c(truncated)
    a, b = (v.reshape(-1).astype(np.int8) for v in np.mgrid[-128:128:3, -128:128:5])
    y = run_op(ops.Mod(same_sign_as_dividend=truncated), a, b, scales=(0.25, 0.25))
    assert y.tolist() == [remainder(int(p), int(q)) if q else 0 for p, q in zip(a, b, strict=True)]
    for value, modulus in ((1.75, 7), (-1.75, -7), (1e-3, 0), (100.0, 400), (0.0, 0)):
        y = run_op(ops.Mod(value=value, same_sign_as_dividend=truncated), a, scales=(0.25,))
        wanted = [remainder(int(p), modulus) if modulus else 0 for p in a]
        assert y.tolist() == np.clip(wanted, -128, 127).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Constants that are part of the graph


def constant_graph(**options: Any) -> jq.Graph:
    return jq.Graph((), (jq.Node("c", ops.IntegerConstant(**options), ()),), ("c",))


@pytest.mark.parametrize("dtype", ["int32", "bool"])
def test_an_integer_constant_is_itself_and_survives_json(dtype: str) -> None:
    graph = constant_graph(shape=(2, 2), values=(0, 1, 1, 0), dtype=dtype)
    assert graph_from_json(graph_to_json(graph)) == graph
    model = jq.prepare(graph, {}, jq.QConfig({"*": None}), target=NASH)
    y = jq.run(jq.lower(model))
    assert (str(y.dtype), y.tolist()) == (dtype, [[0, 1], [1, 0]])
    assert model.plan.exact["c"] == dtype


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": (1,), "values": (2**31,)}, "is no int32"),
        ({"shape": (1,), "values": (2,), "dtype": "bool"}, "2 is no bool"),
        ({"shape": (2, 2), "values": (1, 2, 3)}, "reshape"),
    ],
)
def test_a_constant_that_does_not_fit_is_refused(options: dict, message: str) -> None:
    with pytest.raises(jq.GraphError, match=message):
        jq.graph.evaluate_float(constant_graph(**options), {})


# ---------------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    ("op", "operands", "message"),
    [
        (ops.Add(), (jnp.zeros(3), jnp.zeros(3, jnp.int32)), "int32 .* cannot be mixed with numbers"),
        (ops.Mul(), (jnp.zeros(3, bool), jnp.zeros(3, bool)), "use logical_and"),
        (ops.Where(), (jnp.zeros(3), jnp.zeros(3), jnp.zeros(3)), "the mask is float32; make it bool"),
        (ops.MaskedFill(value=0.5), (jnp.zeros(3, jnp.int32), jnp.zeros(3, bool)), "0.5 is no int32"),
        (ops.Greater(), (jnp.zeros(3),), "two operands, or of one operand with `value`"),
        (ops.Greater(value=1.0), (jnp.zeros(3), jnp.zeros(3)), "two operands, or of one operand with `value`"),
        (ops.Mod(), (jnp.zeros(3),), "two operands, or one operand and `value`"),
        (ops.BitwiseAnd(), (jnp.zeros(3), jnp.zeros(3)), "only exact values of one dtype"),
        (ops.Floor(), (jnp.zeros(3, jnp.int32),), "whole already"),
        (ops.Equal(value=2.5), (jnp.zeros(3, jnp.int32),), "2.5 is no int32"),
    ],
    ids=str,
)
def test_operands_that_do_not_fit_are_refused(op: jq.ops.Op, operands: tuple, message: str) -> None:
    with pytest.raises(jq.GraphError, match=message):
        eval_float(op, *operands)


@pytest.mark.parametrize("op", [ops.Minimum(), ops.Maximum(), ops.Equal(), ops.Less(), ops.Mod()], ids=str)
def test_operands_of_two_dtypes_are_refused(op: jq.ops.Op) -> None:
    one = jnp.float32(1)
    narrow, wide = Operand("int8", one, (2, 3)), Operand("int16", one, (2, 3))
    assert constraints(op, [narrow, narrow], narrow, None, NASH) == []
    (sentence,) = constraints(op, [narrow, wide], narrow, None, NASH)
    assert "its operands are int8 and int16" in sentence
    with pytest.raises(jq.QConfigError, match="its operands are int8 and int16"):
        run_op(op, np.int8([1]), np.int16([1]), scales=(1.0, 1.0))


# ---------------------------------------------------------------------------------------------------------------------
# Every operator of the family


def one_of_each() -> list[Case]:
    found: dict[str, Case] = {}
    for case in elementwise_cases.CASES:
        found.setdefault(case.operator, case)
    return list(found.values())


@pytest.mark.parametrize("case", one_of_each(), ids=lambda case: case.operator)
def test_no_float_enters_the_integers(case: Case) -> None:
    rng = np.random.default_rng(0)
    data = [integers(rng, fmt, (2, *shape)) for fmt, shape in zip(case.operands, case.shapes, strict=True)]
    program = program_of(rng, case, data)
    named = {entry.name: jnp.asarray(d) for entry, d in zip(program.graph.inputs, data, strict=True)}
    text = str(jax.make_jaxpr(partial(run_integers, program))(named))
    assert "f32" not in text
    assert "f16" not in text


def test_elementwise_operators_follow_the_layout() -> None:
    """Between two pools nothing is transposed, and a mask is permuted where it comes from."""
    pool = ops.MaxPool(kernel=(2, 2), strides=(2, 2), padding=((0, 0),) * 2, dilation=(1, 1))
    nodes = (
        jq.Node("p", pool, ("x",)),
        jq.Node("mask", ops.Greater(value=0.0), ("p",)),
        jq.Node("filled", ops.MaskedFill(value=-1.0), ("p", "mask")),
        jq.Node("sub", ops.Sub(), ("filled", "p")),
        jq.Node("floor", ops.Floor(), ("sub",)),
        jq.Node("y", pool, ("floor",)),
    )
    graph = jq.Graph((jq.Input("x", (None, 3, 8, 8)),), nodes, ("y",))
    model = jq.prepare(graph, {}, jq.QConfig({"*": jq.Policy(output=jq.int8())}), target=NASH)
    permutes = [n.name for n in model.plan.graph.nodes if isinstance(n.op, ops.Permute)]
    assert permutes == ["x.to_last", "y.to_first"]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 8, 8)), jnp.float32)
    np.testing.assert_array_equal(jq.apply(model, x, mode="float"), jq.graph.evaluate_float(graph, {}, x)[0])


def test_every_operator_has_a_case_and_a_rule() -> None:
    families = ("jquant.ops.elementwise", "jquant.ops.compare", "jquant.ops.rounding", "jquant.ops.reduce")
    operators = {c.__name__ for c in vars(ops).values() if getattr(c, "__module__", "") in families}
    elsewhere = {"Constant", "Requantize", "Scale"}  # in core_cases.py, and as parts of networks
    assert operators - elsewhere == {case.operator for case in elementwise_cases.CASES}
    assert operators <= set(jq.reference.RULES)


def test_a_case_with_precise_rescale() -> None:
    case = Case(op=ops.Maximum(), shapes=((6, 7), (6, 7)), target=elementwise_cases.PRECISE)
    assert check(case, outputs=2000).mismatches == 0
