"""Marches that no chip has run through lowering, the jitted integers and the reference with the same integers."""

import dataclasses
import importlib
import warnings
from fractions import Fraction
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance.harness import Case, check
from hypothesis import assume, given, settings
from support import graphs
from support.marches import MADE_UP, NARROW, PRECISE, WIDE, drawn
from support.meanings import meanings

import jquant as jq
from jquant import ops
from jquant.numerics import limbs, pairs, tables
from jquant.numerics import rescale as fast
from jquant.numerics.crop import divided
from jquant.numerics.resample import line_of, steps_of
from jquant.numerics.rounding import quantize, round_fraction, shift_right
from jquant.reference import lowering, round_shift
from jquant.reference import sampling as slow_sampling
from jquant.reference import tables as slow_tables
from jquant.reference.arithmetic import quantize as slow_quantize
from jquant.reference.arithmetic import rounded
from jquant.types import ROUNDINGS

CONFIGS = {
    "int8": jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int8())}),
    "int16": jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"), output=jq.int16())}),
}
EVERY_MARCH = pytest.mark.parametrize("march", MADE_UP.values(), ids=str)
FAMILIES = sorted(path.stem for path in (Path(__file__).parents[1] / "conformance").glob("*_cases.py"))
ALL_CASES = [case for family in FAMILIES for case in importlib.import_module(f"conformance.{family}").CASES]


def exact(v: float) -> Fraction:
    return Fraction(float(np.float32(v)))


# ---------------------------------------------------------------------------------------------------------------------
# Whole networks


def assert_networks_agree(network: tuple, config: str, march: jq.Target) -> None:
    graph, params = network
    model = jq.prepare(graph, params, CONFIGS[config], target=march)
    model = jq.calibrate(model, [graphs.images(0, graph)])
    try:
        program = jq.lower(model)
    except jq.LoweringError as error:
        assume("fused addend" not in str(error))  # a random layer may calibrate to zeros
        raise
    x = 2 * graphs.images(1, graph)  # beyond the calibrated range, so that it saturates
    found = jq.run_with_taps(program, x)
    _, wanted = jq.reference.run(program, np.asarray(x))
    for name in program.graph.values:
        np.testing.assert_array_equal(np.asarray(found[name]), wanted[name], err_msg=name)


@pytest.mark.parametrize(("config", "march"), [("int8", NARROW), ("int16", WIDE)], ids=str)
@settings(max_examples=2)
@given(network=graphs.networks())
def test_random_networks_equal_the_reference(config: str, march: jq.Target, network: tuple) -> None:
    assert_networks_agree(network, config, march)


@pytest.mark.slow
@EVERY_MARCH
@pytest.mark.parametrize("config", CONFIGS)
@settings(max_examples=25)
@given(network=graphs.networks())
def test_many_random_networks_equal_the_reference(config: str, march: jq.Target, network: tuple) -> None:
    assert_networks_agree(network, config, march)


# ---------------------------------------------------------------------------------------------------------------------
# Operators


def mismatches(case: Case, march: jq.Target, outputs: int, seed: int = 0) -> int | None:
    """How many integers differ from the reference; None where the march has not the tables that the case asks for."""
    march = march.with_fields({"max_reduced": case.target.max_reduced})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", jq.calibration.TableWarning
            )  # few entries are far from a function, as they should be
            return check(dataclasses.replace(case, target=march), outputs=outputs, seed=seed).mismatches
    except (jq.QConfigError, jq.LoweringError) as error:
        if "num_tables must be a multiple" not in str(error):
            raise
        return None


QUICK = ("Conv", "Linear", "Add", "Sub", "Mul", "PRelu", "AvgPool", "Mean", "Sigmoid", "Sin", "Softmax", "Interpolate")
QUICK += ("GridSample", "Warp", "RoiAlign", "AffineGrid", "RoiResize", "Clamp", "Pad", "Mod", "Cat", "Round")


@pytest.mark.parametrize("operator", QUICK)
def test_operators_equal_the_reference(operator: str) -> None:
    case = [case for case in ALL_CASES if case.operator == operator][-1]
    assert mismatches(case, NARROW, 500) == 0


@pytest.mark.slow
@EVERY_MARCH
@pytest.mark.parametrize("family", FAMILIES)
def test_every_case_equals_the_reference(family: str, march: jq.Target) -> None:
    wrong = {}
    for case in importlib.import_module(f"conformance.{family}").CASES:
        if found := mismatches(case, march, 3000):
            wrong[str(case)] = found
        jax.clear_caches()
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_drawn_marches_equal_the_reference(seed: int) -> None:
    """Each march with a tenth of all operator cases, so that every case meets several marches."""
    march, wrong = drawn(seed), {}
    for i, case in enumerate(ALL_CASES):
        if i % 10 == seed % 10 and (found := mismatches(case, march, 300, seed)):
            wrong[str(case)] = found
    jax.clear_caches()
    assert not wrong, march


# ---------------------------------------------------------------------------------------------------------------------
# Constants: the program's own, which the reference interpreter takes from it


@EVERY_MARCH
def test_constants_of_rescale_add_and_sumin_are_those_of_rationals(march: jq.Target) -> None:
    rng = np.random.default_rng(0)
    n, d = np.exp2(rng.uniform(-20, 18, size=(2, 400))).astype(np.float32)
    n[:60], d[:60] = np.exp2(rng.integers(-9, 9, size=(2, 60))).astype(np.float32)
    n[60:120], d[60:120] = rng.integers(1, 2**13, size=(2, 60)).astype(np.float32) + np.float32([[0.5], [0]])
    value, ratios = fast.ratio(n, 1.0, d, 1.0), [exact(a) / exact(b) for a, b in zip(n, d, strict=True)]
    for bits in (8, 16):
        for narrow in (False, True):
            found = np.stack(fast.rescale_of(value, bits=bits, narrow=narrow, form=march.rescale), axis=1)
            wanted = [lowering.rescale_constants(r, bits, narrow, march) for r in ratios]
            np.testing.assert_array_equal(found, wanted)
    form = march.addend
    how = {"bits": form.multiplier_bits, "rounding": form.multiplier_rounding}
    found = np.stack(fast.multiplier_of(value, form.max_shift, **how), axis=1)
    np.testing.assert_array_equal(found, [lowering.sumin_constants(r, march) for r in ratios])
    graph = jq.Graph(
        (jq.Input("a", (None, 3)), jq.Input("b", (None, 3))), (jq.Node("y", ops.Add(), ("a", "b")),), ("y",)
    )
    for dtype, bits in ((jq.int8, 8), (jq.int16, 16)):
        config = jq.QConfig({"*": jq.Policy(output=dtype())})
        model = jq.prepare(graph, {}, config, target=march)
        for a, b, y in zip(n[100:130], d[100:130], d[130:160], strict=True):
            program = jq.lower(model.replace(qparams={"a": np.float32(a), "b": np.float32(b), "y": np.float32(y)}))
            made, large, small = program.constants["y"], max(exact(a), exact(b)), min(exact(a), exact(b))
            shift, factor = lowering.add_constants(large, small, bits, march)
            assert sorted(made["multiplier"].tolist()) == sorted([2**shift, factor])
            row = lowering.rescale_constants(large / 2**shift / exact(y), bits, False, march)
            assert (made["mantissa"], made["pre"], made["post"]) == row


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_bias_is_the_exact_quotient(rounding: str) -> None:
    rng = np.random.default_rng(1)
    bias = (rng.normal(size=300) * np.exp2(rng.uniform(-12, 30, size=300))).astype(np.float32)
    bias[:80] = rng.integers(-40, 40, size=80) / np.float32(4)
    step = np.where(np.arange(300) < 80, 0.5, np.exp2(rng.uniform(-9, 3, size=300))).astype(np.float32)
    march = NARROW.with_fields({"bias_rounding": rounding})
    wanted = [lowering.bias_constant(exact(b), exact(s), march) for b, s in zip(bias, step, strict=True)]
    found = fast.quantize_exactly(bias, step, np.ones_like(step), rounding=rounding)
    np.testing.assert_array_equal(found, wanted)
    inside = jax.jit(lambda b, s: fast.quantize_exactly(b, s, jnp.ones_like(s), rounding=rounding))(bias, step)
    np.testing.assert_array_equal(inside, wanted)


@EVERY_MARCH
def test_numbers_and_slopes_are_rounded_as_the_march_says(march: jq.Target) -> None:
    x = jq.Input("x", (None, 4, 2, 2))
    values = np.random.default_rng(6).normal(size=8).astype(np.float32)
    fill, low, high, *_ = (float(v) for v in (values[0], -abs(values[1]), abs(values[2])))
    weight = jnp.asarray(values[4:])
    nodes = (
        jq.Node("pad", ops.Pad(padding=((0, 0), (0, 0), (1, 0), (0, 1)), value=fill), ("x",)),
        jq.Node("clamp", ops.Clamp(minimum=low, maximum=high), ("pad",)),
        jq.Node("relu6", ops.Relu6(), ("clamp",)),
        jq.Node("mod", ops.Mod(value=0.7), ("relu6",)),
        jq.Node("y", ops.PRelu(), ("mod",), jq.FrozenMap({"weight": "slope"})),
    )
    config = jq.QConfig({"*": jq.Policy(output=jq.int8(scale=0.07))})
    model = jq.prepare(jq.Graph((x,), nodes, ("y",)), {"slope": weight}, config, target=march)
    program = jq.lower(model)
    found = {**program.constants["clamp"], "fill": program.constants["pad"]["fill"], **program.constants["mod"]}
    wanted = {"lower": low, "upper": high, "fill": fill, "modulus": 0.7}
    for role, value in wanted.items():
        assert found[role] == lowering.number_constant(value, 0.07, "int8", march), role
    assert program.constants["relu6"]["upper"] == lowering.number_constant(6.0, 0.07, "int8", march)
    slope, scale = lowering.slope_constants(values[4:], march)
    made = program.constants["y"]
    np.testing.assert_array_equal(made["slope"], slope)
    assert str(made["slope"].dtype) == march.slope_dtype
    row = lowering.rescale_constants(exact(0.07) * exact(scale) / exact(0.07), 8, False, march)
    assert tuple(int(made[f"negative_{role}"]) for role in ("mantissa", "pre", "post")) == row


@EVERY_MARCH
def test_lines_and_entries_of_tables_are_those_of_rationals(march: jq.Target) -> None:
    form, rng = march.tables, np.random.default_rng(2)
    ends = np.sort(rng.integers(-32768, 32768, size=(300, 2)), axis=1)
    ends[:60, 1] = ends[:60, 0] + rng.integers(1, 30, size=60)
    values = np.rint(rng.choice([-1, 1], size=(300, 2)) * np.exp2(rng.uniform(-1, 23, size=(300, 2)))).astype(np.int32)
    anchor = np.arange(300, dtype=np.int32) % 2
    made = tables.line_constants(ends.astype(np.int32), values, anchor, form=form)
    for (a, b), (y_a, y_b), at, line in zip(
        ends.tolist(), values.tolist(), anchor.tolist(), made.tolist(), strict=True
    ):
        wanted = slow_tables.outer_line(a, y_a, b, y_b, through=(a, b)[at], form=form) if a < b else None
        assert wanted is None or tuple(line) == wanted, (a, b, y_a, y_b, at)
    shape = tables.Shape(form.count, "evenly", 0, -np.inf, np.inf, (None, None))
    table = tables.segment_table(np.tanh, np.float32(1e-4), np.float32(3e-5), "int16", form, shape)
    points = slow_tables.entry_points(table.boundaries, 1e-4, form)
    wanted = slow_tables.entries(np.tanh(points), 3e-5, "int16", form)
    np.testing.assert_array_equal(table.entries, wanted)
    for (a, b), line in zip(np.stack([table.boundaries[:-1], table.boundaries[1:]], 1), table.lines[1:], strict=False):
        assert tuple(line.tolist()) == slow_tables.index_line(int(a), int(b), form)


@EVERY_MARCH
@pytest.mark.parametrize("mirror", [-1, 0, 1])
def test_every_input_of_a_table_in_the_middle_of_the_axis(march: jq.Target, mirror: int) -> None:
    """On both sides of the boundaries lie lines, with a rounding of their own."""
    form = march.tables
    low, high = (0.0, 1.1) if mirror else (-0.7, 1.1)
    shape = tables.Shape(form.count, "evenly", mirror, low, high, (0.21, 0.37))
    table = tables.segment_table(np.tanh, np.float32(1e-4), np.float32(3e-5), "int16", form, shape)
    x = np.arange(-32768, 32768, dtype=np.int32)
    y = slow_tables.segmented(np.abs(x) if mirror else x, *map(np.int64, table[:3]), "int16", form)
    wanted = np.where((mirror == -1) & (x < 0), -y, y).clip(-32768, 32767)
    assert len(set(table.boundaries.tolist()) & {-32768, 32767}) == 0
    np.testing.assert_array_equal(tables.evaluate_segments(x, table, "int16", form), wanted)
    np.testing.assert_array_equal(tables.evaluate_segments(jnp.asarray(x), table, "int16", form), wanted)


@EVERY_MARCH
def test_steps_and_maps_are_those_of_rationals(march: jq.Target) -> None:
    for step, offset in (
        (Fraction(7, 13), Fraction(-3, 13)),
        (Fraction(5, 2), Fraction(1, 3)),
        (Fraction(1), Fraction(0)),
    ):
        found = steps_of(step, offset, 5, march.resize)
        one = 2**march.resize.step_bits
        assert found[:2] == tuple(rounded(v * one, march.resize.step_rounding) for v in (step, offset))
    for scale in np.exp2(np.random.default_rng(3).uniform(-15, 0, size=60)).astype(np.float32):
        for n, bits in ((9, 6), (200, 4), (8, 0)):
            slope = fast.ratio(scale, float(n), 2.0, 2.0**-bits)
            found = tuple(int(v) for v in line_of(slope, n - 1, bits, march.grid))
            assert found == slow_sampling.normalized_constants(scale, n, bits, False, march.grid)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_steps_of_regions_are_exact_quotients(rounding: str) -> None:
    n = np.unique(np.concatenate([np.arange(1, 60), [511, 4096, 2**14, 2**15 - 1]])).astype(np.int32)
    for out in (1, 2, 3, 7, 30, 1000, 16383):
        for bits, less in ((12, 0), (16, 0), (15, 2**15)):
            wanted = [rounded(Fraction(int(v) * 2**bits, out) - less, rounding) for v in n]
            np.testing.assert_array_equal(divided(jnp.asarray(n), bits, out, rounding, less=less), wanted)


# ---------------------------------------------------------------------------------------------------------------------
# Roundings


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_each_rounding_by_hand_and_in_every_width(rounding: str) -> None:
    by_hand = {  # of -2.5, -1.75, -1.5, -0.5, 0.5, 1.25, 1.5, 2.5
        "half_up": [-2, -2, -1, 0, 1, 1, 2, 3],
        "half_even": [-2, -2, -2, 0, 0, 1, 2, 2],
        "half_away": [-3, -2, -2, -1, 1, 1, 2, 3],
        "floor": [-3, -2, -2, -1, 0, 1, 1, 2],
        "toward_zero": [-2, -1, -1, 0, 0, 1, 1, 2],
    }[rounding]
    v = np.float32([-2.5, -1.75, -1.5, -0.5, 0.5, 1.25, 1.5, 2.5])
    quarters = (4 * v).astype(np.int32)
    n, zero = np.int32(2), jnp.zeros(8, jnp.int32)
    assert quantize(v, np.float32(1), "int8", rounding).tolist() == by_hand
    assert jax.jit(lambda v: quantize(v, jnp.float32(1), "int8", rounding))(v).tolist() == by_hand
    assert slow_quantize(v, 1.0, "int8", rounding).tolist() == by_hand
    assert [round_fraction(Fraction(float(x)), rounding) for x in v] == by_hand
    assert [rounded(Fraction(float(x)), rounding) for x in v] == by_hand
    assert round_shift(quarters, 2, rounding).tolist() == by_hand
    assert shift_right(quarters, n, rounding).tolist() == by_hand
    assert shift_right(jnp.asarray(quarters), n, rounding).tolist() == by_hand
    assert pairs.shift_right(pairs.Pair(jnp.asarray(quarters), zero), n, rounding).tolist() == by_hand
    wide = limbs.shift_right(limbs.from_int32(jnp.asarray(quarters)), n, rounding)
    assert limbs.saturate(wide, "int32").tolist() == by_hand


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_shifts_equal_int64_over_the_whole_range(rounding: str) -> None:
    rng = np.random.default_rng(4)
    a, b = rng.integers(-(2**31), 2**31, size=(2, 600))
    a[:200] = rng.integers(-300, 300, size=200)
    n = np.arange(600) % 32
    at = jnp.asarray(n, jnp.int32)
    x = jnp.asarray(a, jnp.int32)
    np.testing.assert_array_equal(shift_right(x, at, rounding), round_shift(a, n, rounding))
    wide = limbs.multiply(limbs.from_int32(x), jnp.int32(21845))
    more = n + np.where(np.arange(600) < 300, 0, 30)
    found = limbs.saturate(limbs.shift_right(wide, jnp.asarray(more, jnp.int32), rounding), "int32")
    wanted = np.clip(round_shift(a * 21845, more, rounding), -(2**31), 2**31 - 1)
    np.testing.assert_array_equal(found, wanted)
    pair = pairs.Pair(x, jnp.asarray(b, jnp.int32))
    wanted = np.clip(round_shift(a + b, n, rounding), -(2**31), 2**31 - 1)
    np.testing.assert_array_equal(pairs.shift_right(pair, at, rounding), wanted)


@pytest.mark.parametrize("march", [NARROW, PRECISE], ids=str)
def test_fake_quant_follows_the_march(march: jq.Target) -> None:
    rng = np.random.default_rng(5)
    x = rng.integers(-128, 128, size=(4, 2, 5, 6)).astype(np.int8)
    for op in (
        ops.Clamp(minimum=-0.17, maximum=0.33),
        ops.Relu6(),
        ops.MaskedFill(value=0.27),
        ops.Pad(padding=((0, 0), (0, 0), (1, 0), (0, 2)), value=0.37),
        ops.Interpolate(size=(7, 9)),
        ops.Mod(value=0.55),
    ):
        masks = (x > 3,) if isinstance(op, ops.MaskedFill) else ()
        meanings(op, x, *masks, scales=(0.1,), target=march).agree()
