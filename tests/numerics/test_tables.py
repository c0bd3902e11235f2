"""Constants of lookup tables against exact rationals, and the ends of their ranges."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.numerics import tables
from jquant.numerics.tables import Shape, boundaries_of, line_constants, reduce_turns, segment_table, turn_constants
from jquant.reference import tables as reference
from jquant.targets import NASH_E

FORM = NASH_E.tables
PI = Fraction(3141592653589793238462643383279502884197, 10**39)
WHOLE = Shape(6, "evenly", 0, -np.inf, np.inf, (None, None))


def drawn_lines(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Ends and values of every size, extremes and equal ends among them."""
    rng = np.random.default_rng(0)
    ends = np.sort(rng.integers(-32768, 32769, size=(count, 2)), axis=1)
    near = rng.random(count) < 0.4
    ends[near, 1] = np.minimum(ends[near, 0] + rng.integers(0, 40, size=near.sum()), 32768)
    values = np.rint(rng.choice([-1, 1], size=(count, 2)) * np.exp2(rng.uniform(-1, 23, size=(count, 2)))).astype(int)
    values[rng.random(count) < 0.1] = 0
    same = rng.random(count) < 0.1
    values[same, 1] = values[same, 0]
    ends[:4] = [[-32768, 32767], [-32768, 32768], [32767, 32768], [-32768, -32768]]
    values[:4] = [[-(2**23), 2**23], [2**23, -(2**23)], [2**23, -(2**23)], [5, 7]]
    return ends, values


def test_lines_are_those_of_exact_rationals() -> None:
    ends, values = drawn_lines(3000)
    anchor = np.arange(len(ends)) % 2
    made = np.asarray(line_constants(*(jnp.asarray(v, jnp.int32) for v in (ends, values, anchor)), form=FORM))
    for (a, b), (y_a, y_b), at, line in zip(ends.tolist(), values.tolist(), anchor, made.tolist(), strict=True):
        if a == b:  # a constant, the anchored value
            y_a = y_b = (y_a, y_b)[at]
        assert tuple(line) == reference.outer_line(a, y_a, b, y_b, through=(a, b)[at], form=FORM), (a, b, y_a, y_b, at)


def test_every_width_of_a_table_has_its_index_line() -> None:
    widths = np.unique(np.concatenate([np.arange(1, 400), np.geomspace(400, 65535, 300).astype(int)]))
    lows = np.random.default_rng(1).integers(-32768, 32768 - widths)
    ends = np.stack([lows, lows + widths], 1)
    values = np.broadcast_to([0, FORM.last_index], ends.shape)
    made = np.asarray(line_constants(*(jnp.asarray(v, jnp.int32) for v in (ends, values, 0 * lows)), form=FORM))
    assert [tuple(line) for line in made.tolist()] == [reference.index_line(a, b, FORM) for a, b in ends.tolist()]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("mirror", [0, 1])
@pytest.mark.parametrize("n", [6, 126])
@pytest.mark.parametrize("placement", ["evenly", "curvature", "balanced", "points"])
def test_boundaries_increase_strictly_within_the_axis(placement: str, n: int, mirror: int, scale: float) -> None:
    points = tuple(float(p) for p in np.linspace(0, 1e-3, n + 1))
    for low, high in ((-np.inf, np.inf), (-1e-3, 1e-3), (3e4, 4e4), (-4e4, -3e4), (0.0, 1e-30)):
        shape = Shape(n, points if placement == "points" else placement, mirror, low, high, (None, None))
        for function in (jnp.zeros_like, jnp.exp, lambda x: 0.3 * x, jnp.sign):
            made = np.asarray(boundaries_of(function, jnp.float32(scale), jnp.float32(1e-2), "int16", shape))
            assert (np.diff(made) > 0).all()
            assert shape.axis[0] <= made[0] < made[-1] <= shape.axis[1]


def test_evenly_is_rounded_half_up() -> None:
    for low, high in ((-32768, 32767), (0, 32768), (-5, 17), (100, 131)):
        shape = WHOLE._replace(low=float(low), high=float(high))
        made = boundaries_of(jnp.exp, jnp.float32(1), jnp.float32(1), "int16", shape)
        assert made.tolist() == reference.evenly(low, min(high, 32767), 6)


def test_curvature_splits_a_line_evenly_and_crowds_at_a_bend() -> None:
    shape = WHOLE._replace(placement="curvature")
    straight = np.asarray(boundaries_of(lambda x: 2 * x, jnp.float32(1), jnp.float32(4), "int16", shape))
    np.testing.assert_allclose(straight, reference.evenly(-32768, 32767, 6), atol=150)
    bend = np.asarray(boundaries_of(lambda x: jnp.abs(x - 9000), jnp.float32(1), jnp.float32(4), "int16", shape))
    assert (np.abs(bend[1:-1] - 9000) < 600).all()


def test_curvature_has_equal_sums_of_the_second_derivative() -> None:
    shape = WHOLE._replace(placement="curvature")
    made = np.asarray(boundaries_of(lambda x: x**3, jnp.float32(1e-3), jnp.float32(2), "int16", shape)) * 1e-3
    exact = np.sign(s := np.arange(-3, 4) / 3) * np.sqrt(np.abs(s)) * 32.768  # the integral of |6 x|, signed
    np.testing.assert_allclose(made, exact, atol=0.5)
    shape = shape._replace(placement="balanced")
    made = np.asarray(boundaries_of(lambda x: x**3, jnp.float32(1e-3), jnp.float32(2), "int16", shape)) * 1e-3
    np.testing.assert_allclose(made, np.sign(s) * np.abs(s) ** (2 / 3) * 32.768, atol=0.5)


@pytest.mark.parametrize("placement", ["evenly", "curvature", "balanced"])
def test_the_same_bits_inside_jit(placement: str) -> None:
    scales = jnp.float32(3e-4), jnp.float32(7e-5)

    def build(x_scale: jax.Array, y_scale: jax.Array) -> tables.Segments:
        return segment_table(jnp.exp, x_scale, y_scale, "int16", FORM, WHOLE._replace(placement=placement))

    for outside, inside in zip(build(*scales), jax.jit(build)(*scales), strict=True):
        np.testing.assert_array_equal(outside, inside)


def test_turns_are_those_of_exact_rationals() -> None:
    scales = np.exp2(np.random.default_rng(2).uniform(-23, 10, size=300)).astype(np.float32)
    edge = np.float32(np.pi / 2**15)
    for scale in (*scales, edge, np.nextafter(edge, np.float32(1))):
        turn, reduced = turn_constants(jnp.float32(scale))
        assert tuple(turn.tolist()) == reference.turn_constants(scale)
        assert reduced == (scale if scale <= edge else edge)


@pytest.mark.parametrize("reach", [3.0, 3.2, 10.0, 300.0, 20000.0])
def test_an_angle_is_reduced_to_its_nearest_sixteen_bits(reach: float) -> None:
    scale = np.float32(reach / 32767.5)
    turn, reduced = turn_constants(jnp.float32(scale))
    x = np.unique(np.random.default_rng(3).integers(-32768, 32768, size=2000))
    made = np.asarray(reduce_turns(jnp.asarray(x, jnp.int32), turn, "half_up")).tolist()
    assert min(made) >= -32768
    assert max(made) <= 32767
    for value, angle in zip(x.tolist(), made, strict=True):
        turns = value * Fraction(float(scale)) / (2 * PI) - angle * Fraction(float(reduced)) / (2 * PI)
        away = abs(turns - round(turns)) * 2**16
        assert away <= (0 if scale == reduced else Fraction(76, 100)) + Fraction(1, 10**4)


def test_many_elements_are_looked_up_in_the_expanded_table() -> None:
    table = segment_table(jnp.tanh, jnp.float32(1e-4), jnp.float32(3e-5), "int16", FORM, WHOLE)
    x = jnp.asarray(np.random.default_rng(4).integers(-32768, 32768, size=(3, 30000)), jnp.int32)
    assert x.size > 2**16
    rows = [tables.evaluate_segments(row, table, "int16", FORM) for row in x]
    np.testing.assert_array_equal(tables.evaluate_segments(x, table, "int16", FORM), np.stack(rows))


def test_a_line_too_steep_for_its_slope_goes_through_the_end_of_its_table() -> None:
    points = tuple(float(p) for p in (-32767, -200, -100, 0, 100, 200, 32766))

    def function(x: jax.Array) -> jax.Array:
        return jnp.where(jnp.abs(x) < 32767, 1000.0, 2e9 * jnp.sign(x)) + jnp.where(x == -32767, 3000.0 + 2e9, 0.0)

    made = segment_table(function, *(jnp.float32(1),) * 2, "int16", FORM, WHOLE._replace(placement=points))
    left, right = (tuple(made.lines[i].tolist()) for i in (0, -1))
    inner = int(function(jnp.float32(-32767)))
    assert left == reference.outer_line(-32768, -(2**23), -32767, inner, through=-32767, form=FORM)
    assert left != reference.outer_line(-32768, -(2**23), -32767, inner, through=-32768, form=FORM)
    assert right == reference.outer_line(32766, 1000, 32767, 2**23, through=32766, form=FORM)


def test_a_sum_fits_where_that_of_64_bits_does() -> None:
    ends = [-(2**31), 1 - 2**31, -(2**30) - 1, -(2**30), -2, -1, 0, 1, 2, 2**30 - 1, 2**30, 2**31 - 1]
    a, b = (part.reshape(-1) for part in np.meshgrid(ends, ends))
    with np.errstate(over="ignore"):
        found = tables._sum_fits(a.astype(np.int32), b.astype(np.int32))
    np.testing.assert_array_equal(found, np.abs(a + b + 0.5) < 2**31)
